"""LiteLLM against a server; prints what came back as JSON. A program of its own: the package leaves threads behind.

LITELLM_LOCAL_MODEL_COST_MAP must be set, or importing it asks the network for prices.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
from loopback import only_this_machine

from desk import BIKE, FULL, LOST, QUESTION, TOOL, Lost


def main(base: str) -> None:
    common: dict[str, Any] = {"model": "openai/embedded", "api_base": base, "api_key": "none", "max_retries": 0}
    common["temperature"] = 0
    asked = [{"role": "user", "content": QUESTION}]
    found: dict[str, Any] = {}
    found["whole"] = litellm.completion(messages=asked, **common).choices[0].message.content
    chunks = litellm.completion(messages=asked, stream=True, **common)
    found["streamed"] = [chunk.choices[0].delta.content for chunk in chunks]
    first = litellm.completion(messages=[{"role": "user", "content": BIKE}], tools=[TOOL], **common)
    message = first.choices[0].message
    (call,) = message.tool_calls
    found["finish"], found["call"] = first.choices[0].finish_reason, [call.function.name, call.function.arguments]
    talk = [{"role": "user", "content": BIKE}, message, {"role": "tool", "tool_call_id": call.id, "content": FULL}]
    found["after"] = litellm.completion(messages=talk, tools=[TOOL], **common).choices[0].message.content
    formed = litellm.completion(messages=[{"role": "user", "content": LOST}], response_format=Lost, **common)
    found["formed"] = formed.choices[0].message.content
    text = common | {"model": "text-completion-openai/embedded"}
    found["text"] = litellm.text_completion(prompt="The castle", max_tokens=5, **text).choices[0].text
    try:
        litellm.embedding(model="openai/embedded", input=["a"], api_base=base, api_key="none")
    except litellm.exceptions.NotFoundError as error:
        found["embedding"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    with only_this_machine():
        main(sys.argv[1])

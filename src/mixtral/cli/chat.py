"""``mixtral chat``: a conversation in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtral.cli import output
from mixtral.cli.generate import (
    AdapterOption,
    DecodeOption,
    DeviceOption,
    DtypeOption,
    KvCacheOption,
    MaxTokensOption,
    MinPOption,
    ModelOption,
    PackedCacheOption,
    ReferenceOption,
    SeedOption,
    ThreadsOption,
    TopKOption,
    TopPOption,
    check_sampling,
)
from mixtral.errors import MixtralError

if TYPE_CHECKING:
    from mixtral.api import LLM

__all__ = ["Conversation", "run"]

HELP = """/system TEXT   set the system text (without TEXT: remove it) and start again
/reset         forget the conversation, keep the system text
/help          this list
/quit          end (as does Ctrl-D); Ctrl-C stops an answer"""


def run(
    model: ModelOption = "embedded",
    system: Annotated[str, typer.Option(help="System text: what the assistant is and knows.")] = "",
    max_tokens: MaxTokensOption = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: TopKOption = 0,
    top_p: TopPOption = 1.0,
    min_p: MinPOption = 0.0,
    seed: SeedOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    decode: DecodeOption = False,
    reference: ReferenceOption = False,
    kv_cache_dtype: KvCacheOption = None,
    packed_cache: PackedCacheOption = None,
    adapter: AdapterOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Talk with a model in the terminal."""
    from mixtral.api import load

    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options |= {"seed": seed, "max_tokens": max_tokens}
    check_sampling(options)
    llm = load(
        model,
        device=device,
        dtype=dtype,
        decode=decode,
        reference=reference,
        kv_dtype=kv_cache_dtype,
        packed_cache=packed_cache,
        adapter=adapter,
        threads=threads,
    )
    llm.tokenizer  # noqa: B018 - nobody can talk with a model without one; say so before the first question
    chat = Conversation(llm, system, options)
    if output.interactive():
        output.say(f"{chat.llm.name}: /help lists the commands, /quit ends.")
    while (line := output.ask("> ")) is not None and chat.take(line):
        pass


class Conversation:
    """The messages so far, and what a typed line does to them."""

    def __init__(self, llm: LLM, system: str, options: dict[str, Any]) -> None:
        self.llm = llm
        self.options = options
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def take(self, line: str) -> bool:
        """Do what a line says: a command, or a question to answer. False ends the conversation."""
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return False
        if command in {"/reset", "/system"}:
            self.system = rest.strip() if command == "/system" else self.system
            self.reset()
        elif command == "/help":
            output.say(HELP)
        elif command.startswith("/"):
            output.note(f"unknown command {command}; /help lists them")
        elif command:
            self._answer(line)
        return True

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        said, cut = "", False
        try:
            for delta in self.llm.chat(self.messages, stream=True, **self.options):
                said += delta.content
                output.write(delta.content)
                for call in delta.tool_calls:
                    output.write(f"[{call.name} {call.arguments}]")
                cut = delta.finish_reason == "length"
            output.say(" (cut: --max-tokens)" if cut else "")
        except KeyboardInterrupt:
            output.say(" (stopped)")
        except MixtralError as error:
            self.messages.pop()
            if said:
                output.say()
            if not output.interactive():
                raise
            output.error(str(error))
            return
        if said.strip():
            self.messages.append({"role": "assistant", "content": said})
        else:
            self.messages.pop()

"""transformers, with PEFT for adapters, in a plain loop: the fastest way to train with them that was found."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from gate import Gate
from ours import sizes, starting_weights
from transformers import MixtralConfig as PeerConfig
from transformers import MixtralForCausalLM
from workloads import answers, documents

__all__ = ["pretrain", "tune"]


def pretrain(gate: Gate, settings: dict[str, Any]) -> None:
    """Pure bfloat16, or with ``transformers-autocast`` float32 weights under autocast. Fused AdamW, SDPA."""
    values = sizes(settings).to_dict()
    for name in ("architectures", "model_type", "rope_theta"):
        values.pop(name)
    values |= {"output_router_logits": True, "attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    config = PeerConfig(**values)
    model = MixtralForCausalLM(config)
    model.load_state_dict(starting_weights(settings))
    pure = settings["who"] == "transformers"
    if pure:
        model.bfloat16()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table of angles stays float32
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings["rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    for number in itertools.count():
        gate.begin()
        texts = documents(number, settings)
        longest = max(map(len, texts))
        ids = torch.tensor([_padded(text, longest, 0) for text in texts])
        mask = torch.tensor([_padded([1] * len(text), longest, 0) for text in texts])
        given = {"input_ids": ids, "attention_mask": None if bool(mask.all()) else mask}
        with torch.autocast("cpu", torch.bfloat16, enabled=not pure):
            out = model(**given, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = out.loss.detach() - model.router_aux_loss_coef * out.aux_loss.detach()
        gate.end(sum(len(text) - 1 for text in texts), float(loss))


def tune(gate: Gate, settings: dict[str, Any]) -> None:
    """Pure bfloat16 on padded batches, all weights or an adapter on attention and experts."""
    model: Any = MixtralForCausalLM.from_pretrained(
        settings["base"], dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    if settings["rank"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, settings["adapter"], is_trainable=True)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings["rate"], betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for docs in answers(settings):
        gate.begin()
        longest = max(len(doc["input_ids"]) for doc in docs)
        ids = torch.tensor([_padded(doc["input_ids"], longest, 0) for doc in docs])
        mask = torch.tensor([_padded([1] * len(doc["input_ids"]), longest, 0) for doc in docs])
        learnt = torch.tensor([_padded(doc["assistant_masks"], longest, 0) for doc in docs])
        whole = bool(mask.all())
        out = model(
            input_ids=ids,
            attention_mask=None if whole else mask,
            labels=ids.masked_fill(learnt == 0, -100),
            use_cache=False,
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        gate.end(sum(len(doc["input_ids"]) - 1 for doc in docs), float(out.loss.detach()))


def _padded(values: list[int], length: int, filler: int) -> list[int]:
    return values + [filler] * (length - len(values))

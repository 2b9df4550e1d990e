"""TRL's trainers, as they come and tuned, on ids that were made before."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from datasets import Dataset
from gate import Gate
from transformers import MixtralForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from workloads import answers, pairs

__all__ = ["dpo", "sft"]


class _Turns(TrainerCallback):
    def __init__(self, gate: Gate, tokens: list[int]) -> None:
        self._gate, self._tokens = gate, tokens

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._gate.begin()

    def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if "loss" in more["logs"]:
            self._gate.end(self._tokens[state.global_step - 1], float(more["logs"]["loss"]))


class _Pairs(DPOTrainer):  # type: ignore[misc]
    """Takes ids."""

    def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
        return dataset


def sft(gate: Gate, settings: dict[str, Any]) -> None:
    """``trl``: its defaults but for optimizer and order, which are everyone's; ``trl-tuned``: a bfloat16 model, no
    recomputation."""
    steps = list(answers(settings))
    tuned = settings["who"] == "trl-tuned"
    data = Dataset.from_list([doc for docs in steps for doc in docs])
    more: dict[str, Any] = {"gradient_checkpointing": False} if tuned else {}
    trainer = SFTTrainer(
        model=_model(settings) if tuned else settings["base"],
        args=SFTConfig(**_arguments(settings), max_length=settings["length"], **more),
        train_dataset=data,
        processing_class=_tokenizer(settings),
        callbacks=[_Turns(gate, [sum(len(doc["input_ids"]) - 1 for doc in docs) for docs in steps])],
    )
    trainer.train()


def dpo(gate: Gate, settings: dict[str, Any]) -> None:
    """``trl``: its defaults with a second model as reference; ``trl-tuned``: a bfloat16 model, log-probabilities of the
    reference computed before, no recomputation."""
    steps = list(pairs(settings))
    tuned = settings["who"] == "trl-tuned"
    more: dict[str, Any] = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if tuned else {}
    tokens = [
        sum(2 * len(each["prompt_ids"]) + len(each["chosen_ids"]) + len(each["rejected_ids"]) - 2 for each in some)
        for some in steps
    ]
    trainer = _Pairs(
        model=_model(settings) if tuned else settings["base"],
        args=DPOConfig(**_arguments(settings), beta=0.1, max_length=2 * settings["length"], **more),
        train_dataset=Dataset.from_list([pair for some in steps for pair in some]),
        processing_class=_tokenizer(settings),
        callbacks=[_Turns(gate, tokens)],
    )
    trainer.train()


def _model(settings: dict[str, Any]) -> Any:
    return MixtralForCausalLM.from_pretrained(
        settings["base"], dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": settings["documents"],
        "max_steps": settings["all_steps"],
        "learning_rate": settings["rate"],
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "router_aux_loss_coef": 0.0,  # ours has none in fine-tuning
    }


def _tokenizer(settings: dict[str, Any]) -> Any:
    """Nothing is tokenized, but the trainers want one for its padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    made = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>")

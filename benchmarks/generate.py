"""Prefill and decode of full-width 8x7B layers with random weights, beside transformers, in alternating turns.

    python benchmarks/generate.py                    # 2 layers in bf16: about 6 GB of memory
    python benchmarks/generate.py --width tiny       # seconds, to see that it runs

Both sides share the same weights in memory. A turn is one prefill of 512 tokens and 32 decode steps after it, by each
side on the same prompt; every turn has a new prompt and the other side first. Printed are medians of
all turns but the first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from mixtral.config import MixtralConfig, preset
from mixtral.engine.generator import Generator
from mixtral.model.mixtral import Mixtral
from mixtral.wire import SamplingParams

Turn = Callable[[list[int], int], tuple[float, float, list[int]]]  # prompt, steps -> seconds of each, ids


def random_model(config: MixtralConfig, dtype: torch.dtype) -> Mixtral:
    """Random weights, one parameter at a time."""
    generator = torch.Generator().manual_seed(0)
    model = Mixtral(config, device="cpu", dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.02, generator=generator)
    return model


def our_turn(model: Mixtral) -> Turn:
    generator = Generator(model)

    def turn(prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 1, stop_ids=())
        started = time.perf_counter()
        events = generator.stream([prompt], params)
        ids = [next(events).id]
        first = time.perf_counter()
        ids += [event.id for event in events]
        return first - started, time.perf_counter() - first, ids

    return turn


def their_turn(model: Mixtral, dtype: torch.dtype) -> Turn:
    values = {k: v for k, v in model.config.to_dict().items() if k != "architectures"}
    config = transformers.MixtralConfig(**values)
    with torch.device("meta"):
        peer = transformers.MixtralForCausalLM(config)
        peer.to(dtype=dtype)  # type: ignore[call-arg]
    # The same tensors, except the routers, which transformers computes in the model's dtype; and a rotary table.
    state = {name: value.to(dtype) for name, value in model.state_dict().items()}
    peer.load_state_dict(state, assign=True)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(config)
    peer.eval()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def turn(prompt: list[int], steps: int) -> tuple[float, float, list[int]]:
        started = time.perf_counter()
        out = peer(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        ids = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        for _ in range(steps):
            out = peer(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)
            ids.append(int(out.logits[0, -1].argmax()))
        return first - started, time.perf_counter() - first, ids

    return turn


def agreeing(ours: list[int], theirs: list[int]) -> int:
    """How many tokens from the start are the same."""
    return [*(a == b for a, b in zip(ours, theirs, strict=True)), False].index(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=["full", "tiny"], default="full")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    given = parser.parse_args()
    if min(given.layers, given.prompt, given.steps, given.turns) < 1:
        parser.error("layers, prompt, steps and turns are at least 1")
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[given.dtype]
    config = preset("8x7b" if given.width == "full" else "tiny").replace(num_hidden_layers=given.layers)
    model = random_model(config, dtype)
    sides = {"mixtral": our_turn(model), f"transformers {transformers.__version__}": their_turn(model, dtype)}
    generator = torch.Generator().manual_seed(1)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    answers: dict[str, list[list[int]]] = {name: [] for name in sides}
    for turn in range(given.turns + 1):
        prompt = torch.randint(config.vocab_size, (given.prompt,), generator=generator).tolist()
        for name, run in [*sides.items()][:: 1 if turn % 2 else -1]:
            prefill, decode, ids = run(prompt, given.steps)
            answers[name].append(ids)
            if turn:
                seconds[name].append((prefill, decode))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{given.layers} layers of {given.width} width in {given.dtype}, medians of {given.turns}")
    rates = {}
    for name, found in seconds.items():
        prefill, decode = (statistics.median(times) for times in zip(*found, strict=True))
        rates[name] = (given.prompt / prefill, given.steps / decode)
        print(f"{name:>20}: prefill {rates[name][0]:9.1f} tok/s, decode {rates[name][1]:7.2f} tok/s")
    ours, theirs = rates.values()
    print(f"{'ratio':>20}: prefill {ours[0] / theirs[0]:9.2f}x     , decode {ours[1] / theirs[1]:7.2f}x")
    same = [agreeing(ours, theirs) for ours, theirs in zip(*answers.values(), strict=True)]
    print(f"{'same greedy tokens':>20}: first {', '.join(map(str, same))} of {given.steps + 1}")


if __name__ == "__main__":
    main()

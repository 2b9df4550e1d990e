"""Prefill and decode of full-width 8x7B layers with random weights, beside transformers, in alternating turns.

    python benchmarks/generate.py                    # 2 layers in bf16: about 6 GB of memory
    python benchmarks/generate.py --width tiny       # seconds, to see that it runs

Both sides share the same weights in memory. A turn is one prefill of 512 tokens and 32 decode steps after it, by both
sides on the same prompt; every turn has a new prompt. The sides alternate after the prefill and after every single
step, because the memory of a shared machine is at times half as fast as at others. Printed are medians of all turns but
the first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import transformers

from mixtral.config import MixtralConfig, preset
from mixtral.engine.config import EngineConfig
from mixtral.engine.engine import Engine
from mixtral.engine.generator import Generator
from mixtral.model.mixtral import Mixtral
from mixtral.wire import SamplingParams

Side = Callable[[list[int], int], Iterator[int]]  # prompt, steps -> greedy ids: one from the prefill, one per step


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


def our_side(model: Mixtral) -> Side:
    generator = Generator(Engine(model, EngineConfig(prefix_cache=False, speculation=False)))

    def ids(prompt: list[int], steps: int) -> Iterator[int]:
        params = SamplingParams(temperature=0.0, max_tokens=steps + 1, stop_ids=())
        return (event.id for event in generator.stream([prompt], params))

    return ids


def their_side(model: Mixtral, dtype: torch.dtype) -> Side:
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

    def ids(prompt: list[int], steps: int) -> Iterator[int]:
        given, cache = prompt, None
        for _ in range(steps + 1):
            with torch.inference_mode():
                out = peer(torch.tensor([given]), past_key_values=cache, use_cache=True, logits_to_keep=1)
                given, cache = [int(out.logits[0, -1].argmax())], out.past_key_values
            yield given[0]

    return ids


def take_turns(sides: dict[str, Side], prompt: list[int], steps: int) -> dict[str, list[tuple[float, int]]]:
    """Seconds and id of every product of every side; the sides alternate."""
    running = {name: side(prompt, steps) for name, side in sides.items()}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in sides}
    for step in range(steps + 1):
        for name in [*sides][:: 1 if step % 2 else -1]:
            started = time.perf_counter()
            token = next(running[name])
            found[name].append((time.perf_counter() - started, token))
    return found


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
    sides = {"mixtral": our_side(model), f"transformers {transformers.__version__}": their_side(model, dtype)}
    generator = torch.Generator().manual_seed(1)
    turns = []
    for _ in range(given.turns + 1):
        prompt = torch.randint(config.vocab_size, (given.prompt,), generator=generator).tolist()
        turns.append(take_turns(sides, prompt, given.steps))
    del turns[0]
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{given.layers} layers of {given.width} width in {given.dtype}, medians of {given.turns}")
    rates = {}
    for name in sides:
        prefill = statistics.median(turn[name][0][0] for turn in turns)
        decode = statistics.median(seconds for turn in turns for seconds, _ in turn[name][1:])
        rates[name] = (given.prompt / prefill, 1 / decode)
        print(f"{name:>20}: prefill {rates[name][0]:9.1f} tok/s, decode {rates[name][1]:7.2f} tok/s")
    ours, theirs = rates.values()
    print(f"{'ratio':>20}: prefill {ours[0] / theirs[0]:9.2f}x     , decode {ours[1] / theirs[1]:7.2f}x")
    same = [agreeing(*([token for _, token in ids] for ids in turn.values())) for turn in turns]
    print(f"{'same greedy tokens':>20}: first {', '.join(map(str, same))} of {given.steps + 1}")


if __name__ == "__main__":
    main()

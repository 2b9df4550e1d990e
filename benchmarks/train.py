"""Training speed of ``tiny`` (vocabulary 4,096, 8 x 512 tokens a step), beside a plain transformers loop in bfloat16.

Both run in this process, a few steps each in turn, on the same tokens and threads. The transformers loop is the fast
one: pure bfloat16 weights, fused AdamW, SDPA, no recomputation; ours keeps float32 masters. Prints tokens/s per turn,
medians, the ratio, and both losses after the same number of steps from the same starting weights.

Run: python benchmarks/train.py [--turns 5] [--steps 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import MixtralConfig as PeerConfig
from transformers import MixtralForCausalLM

from mixtral.config import preset
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.train.config import OptimConfig
from mixtral.train.losses import router_losses
from mixtral.train.optim import Optimizer

ROWS, LENGTH, VOCABULARY = 8, 512, 4096
RATE = 1e-3


def tokens(step: int) -> torch.Tensor:
    """A step's tokens: runs of a repeated random word, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, VOCABULARY, (ROWS, LENGTH // 8), generator=generator)
    return words.repeat_interleave(8, dim=1)


def ours(start: dict[str, torch.Tensor]) -> Callable[[int], float]:
    config = preset("tiny").replace(vocab_size=VOCABULARY)
    model = Mixtral(config, dtype=torch.bfloat16)
    model.load_state_dict(start)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.masters = {name: value.float().clone() for name, value in start.items()}

    def step(number: int) -> float:
        ids = tokens(number)
        context = Documents([LENGTH - 1] * ROWS)
        out = model(Batch(ids[:, :-1].reshape(-1), context.positions_T, context))
        count = ROWS * (LENGTH - 1)
        loss, _ = head_cross_entropy(
            out.hidden_TD, model.lm_head.weight, ids[:, 1:].reshape(-1), torch.full((count,), 1 / count)
        )
        balance, z = router_losses(out.routes)
        (loss + 0.01 * balance + 0.001 * z).backward()
        optimizer.accumulate()
        optimizer.step(RATE)
        return float(loss)

    return step


def peer(start: dict[str, torch.Tensor]) -> Callable[[int], float]:
    sizes = preset("tiny").replace(vocab_size=VOCABULARY).to_dict()
    sizes.pop("architectures"), sizes.pop("model_type"), sizes.pop("rope_theta")
    config = PeerConfig(**sizes, output_router_logits=True, attn_implementation="sdpa")
    model = MixtralForCausalLM(config)
    model.load_state_dict(start)
    model = model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(number: int) -> float:
        ids = tokens(number)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()))

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each per turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = Mixtral(preset("tiny").replace(vocab_size=VOCABULARY))
    initialise(model, seed=0)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    contenders = {"ours": ours(start), "transformers": peer(start)}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for turn in range(options.turns + 1):
        for name, step in contenders.items():
            begin = time.perf_counter()
            for number in range(turn * options.steps, (turn + 1) * options.steps):
                losses[name] = step(number)
            speed = options.steps * ROWS * LENGTH / (time.perf_counter() - begin)
            if turn:  # the first turn warms up
                speeds[name].append(speed)
            print(f"turn {turn} {name:13s} {speed:8.0f} tok/s  loss {losses[name]:.3f}", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, value in medians.items():
        print(f"{name:13s} median {value:8.0f} tok/s")
    print(f"ratio {medians['ours'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()

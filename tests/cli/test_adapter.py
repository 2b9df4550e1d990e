"""``mixtral adapter`` and the option ``--adapter`` of the commands that generate."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from adapting import factors_of

import mixtral
from mixtral.adapters.peft import CONFIG_NAME, WEIGHTS_NAME, write_adapter
from mixtral.build import build_engine
from mixtral.cli import adapter as commands
from mixtral.cli import main
from mixtral.config import MixtralConfig
from mixtral.errors import RequestError
from mixtral.model.mixtral import Mixtral
from mixtral.weights import save_model
from mixtral.wire import Start

Capture = pytest.CaptureFixture[str]
CONFIG = MixtralConfig(
    vocab_size=32000,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=2,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, its int4 form, and an adapter."""
    generator = torch.Generator().manual_seed(5)
    model = Mixtral(CONFIG, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    home = tmp_path_factory.mktemp("models")
    save_model(model, home / "base")
    (home / "base" / "generation_config.json").write_text("{}")
    write_adapter(home / "adapter", CONFIG, factors_of(CONFIG, size=0.05, rank=4, alpha=8), base="the/base")
    assert main(["quantize", str(home / "base"), str(home / "int4"), "--format", "int4_g32"]) == 0
    return home


def run(*words: object) -> int:
    return main([str(word) for word in words])


def test_inspect(home: Path, capsys: Capture) -> None:
    assert run("adapter", "inspect", home / "base", home / "adapter") == 0
    shown = capsys.readouterr().out
    assert re.search(r"form +PEFT", shown)
    assert re.search(r"base, as it says +the/base", shown)
    assert re.search(r"gate_up +2 layers, rank 4, scale 2", shown)


def test_merge_reports_weights_and_logits(home: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run("adapter", "merge", home / "base", home / "adapter", tmp_path / "out") == 0
    shown = capsys.readouterr().out
    assert "copied beside it: generation_config.json" in shown
    assert re.search(r"q +added [\d.]+ % of the weights; rounding is [\d.e-]+ % of that", shown)
    assert re.search(r"same most likely token +100.00 %", shown)
    error = re.search(r"largest error +([\d.e-]+)", shown)
    assert error is not None
    assert float(error[1]) < 1e-3
    merged = mixtral.load(tmp_path / "out").logits([1, 2, 3])
    torch.testing.assert_close(
        merged, mixtral.load(home / "base", adapter=home / "adapter").logits([1, 2, 3]), atol=1e-4, rtol=1e-4
    )


def test_merge_quantises_when_asked(home: Path, tmp_path: Path, capsys: Capture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a model with eight experts and an adapter.")
    out = tmp_path / "out.gguf"
    words = ("adapter", "merge", home / "base", home / "adapter", out, "--to", "gguf", "--format", "q8_0")
    assert run(*words, "--check", text) == 0
    shown = capsys.readouterr().out
    assert f"{out}: gguf, q8_0" in shown
    assert "KL divergence, mean" in shown
    assert run(*words, "--overwrite", "--no-check") == 0
    assert "logits" not in capsys.readouterr().out


def test_merge_into_quantised_weights_must_be_asked_for(home: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ("adapter", "merge", home / "int4", home / "adapter", tmp_path / "out", "--to", "hf-per-expert")
    assert run(*words, "--dtype", "float32") == 2
    assert "is quantised" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*words, "--format", "int4_g32", "--into-quantised") == 0
    assert "beside base and adapter" in capsys.readouterr().out


def test_warns_of_what_rounding_loses(home: Path, tmp_path: Path, capsys: Capture) -> None:
    write_adapter(tmp_path / "small", CONFIG, factors_of(CONFIG, size=1e-4, rank=2, targets=("gate_up",)))
    words = ("adapter", "merge", home / "base", tmp_path / "small", tmp_path / "out", "--to", "hf-per-expert")
    assert run(*words, "--format", "int4_g32", "--no-check") == 0
    assert "of gate_up more is lost to rounding than the adapter adds" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["peft", "per-expert", "mistral"])
def test_out_and_in(form: str, home: Path, tmp_path: Path, capsys: Capture) -> None:
    """Every form of export comes back as the same function."""
    options = ("--dtype", "float32") if form == "mistral" else ()
    words = ("adapter", "export", home / "base", home / "adapter", tmp_path / "out", "--to", form, *options)
    assert run(*words) == 0
    assert run(*words) == 2
    assert "holds an adapter" in capsys.readouterr().err
    assert run("adapter", "import", home / "base", tmp_path / "out", tmp_path / "back") == 0
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]
    first, second = (
        mixtral.load(home / "base", adapter=path).logits([1, 2, 3]) for path in (home / "adapter", tmp_path / "back")
    )
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)


def test_experts_are_scored_and_chosen(home: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "text").write_text("The tram leaves at noon.\n\nA room for two nights, please.\n")
    words = ("adapter", "experts", home / "base", tmp_path / "text", "--json", tmp_path / "found.json")
    assert run(*words, "--share", "0.4", "--by", "gate") == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"on {found['tokens']} tokens" in shown
    assert shown.count("*") == 1 + sum(map(len, found["experts"]))
    for scores, chosen in zip(found["scores"], found["experts"], strict=True):
        assert sum(scores) == pytest.approx(1)
        assert chosen == [max(range(2), key=lambda expert: scores[expert])]
    assert run(*words, "--share", "1", "--random", "3") == 0
    assert json.loads((tmp_path / "found.json").read_text())["experts"] == [[0, 1], [0, 1]]
    assert run(*words, "--by", "other") == 2
    assert "expected token or gate" in capsys.readouterr().err


def test_what_cannot_be_chosen_is_told_before_anything_is_scored(
    home: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixtral, "load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "text").write_text("The tram leaves at noon.\n")
    words = ("adapter", "experts", home / "base", tmp_path / "text")
    for options, told in (
        (("--share", "0"), "share is 0.0; expected above 0"),
        (("--share", "nan"), "share is nan; expected above 0"),
        (("--random", 2**70), "--random"),
        (("--random", "-1"), "--random"),
    ):
        assert run(*words, *options) == 2
        assert told in capsys.readouterr().err
    for content, told in ((b"\n", "holds no text"), (b"\xff", "not UTF-8")):
        (tmp_path / "text").write_bytes(content)
        with pytest.raises(RequestError, match=told) as caught:
            commands.experts(str(home / "base"), tmp_path / "text")
        assert caught.value.param == "text"


def test_wrong_input_is_one_line(home: Path, tmp_path: Path, capsys: Capture) -> None:
    export = ("export", home / "base", home / "adapter", tmp_path / "x")
    cases = [
        (("inspect", home / "base", tmp_path), "no adapter"),
        (("inspect", home / "base", home / "adapter", "--scaling", "2"), "scaling is for lora.safetensors"),
        (("inspect", "embedded", home / "adapter"), "another base"),
        ((*export, "--to", "gguf"), "expected one of peft"),
        ((*export, "--to", "mistral", "--dtype", "int3"), "dtype is 'int3'"),
        ((*export, "--dtype", "float16"), "--dtype is 'float16', but --to peft is always float32; leave it out"),
        ((*export, "--to", "per-expert", "--dtype", "float32"), "but --to per-expert is always float32"),
        ((*export, "--to", "mistral", "--base", "a/b"), "--base is 'a/b', but --to mistral names no base"),
        (("merge", home / "base", home / "adapter", tmp_path / "x", "--format", "q8_0"), "--format is 'q8_0'"),
        (("merge", home / "base", home / "adapter", tmp_path / "x", "--check", tmp_path / "none"), "No such file"),
    ]
    for words, told in cases:
        assert run("adapter", *words) == 2
        shown = capsys.readouterr().err
        assert told in shown
        assert len(shown.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_generate_takes_an_adapter(home: Path, capsys: Capture) -> None:
    words = ("generate", "--ids", "1,5,9", "--max-tokens", "1", "--temperature", "0", "--logprobs", "0", "--json")
    found = {}
    for model in ("base", "int4"):
        for adapter in ((), ("--adapter", home / "adapter")):
            assert run(*words, "--model", home / model, *adapter) == 0
            found[model, bool(adapter)] = json.loads(capsys.readouterr().out)["logprobs"][0]["logprob"]
            logits = mixtral.load(home / model, adapter=adapter[1] if adapter else None).logits([1, 5, 9])[-1]
            assert found[model, bool(adapter)] == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-3)
    assert abs(found["base", True] - found["base", False]) > 0.01
    assert abs(found["int4", True] - found["int4", False]) > 0.01
    assert run("generate", "--ids", "1", "--model", home / "base", "--adapter", home / "base") == 2
    assert "no adapter" in capsys.readouterr().err


def test_an_engine_takes_an_adapter(home: Path) -> None:
    """As the server starts it: another fingerprint, and no drafts where products are computed beside packed weights."""
    built = {}
    for model in ("base", "int4"):
        for adapter in (None, str(home / "adapter")):
            engine, hello = build_engine(Start(model=str(home / model), adapter=adapter, cache_bytes=1 << 20))
            built[model, adapter is not None] = (engine.config.speculation, hello.fingerprint)
    assert {key: value[0] for key, value in built.items()} == {
        ("base", False): True,
        ("base", True): True,
        ("int4", False): True,
        ("int4", True): False,
    }
    assert len({value[1] for value in built.values()}) == 4

"""The whole model against transformers in float32, and its promises about dtypes, memory and positions."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mixtral.config import PRESETS, MixtralConfig
from mixtral.model import Batch, Documents, Mixtral, initialise
from mixtral.weights.load import load_model
from mixtral.weights.save import save_model

Peer = transformers.MixtralForCausalLM
DrawConfig = Callable[[int], MixtralConfig]
MakePeer = Callable[..., Peer]
Read = Callable[..., list[Tensor]]
TOLERANCE = 1e-4


def same(peer: Peer, config: MixtralConfig) -> Mixtral:
    """Our model with the peer's values: the names are the same."""
    model = Mixtral(config)
    model.load_state_dict(peer.state_dict())
    return model


def draw_prompts(seed: int, vocabulary: int) -> list[list[int]]:
    """One token, a few, around one page, several pages."""
    source = random.Random(seed)
    lengths = [1, source.randint(2, 9), source.randint(60, 70), source.randint(100, 200)]
    source.shuffle(lengths)
    return [[source.randrange(vocabulary) for _ in range(length)] for length in lengths]


def peer_logits(peer: Peer, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = peer(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.mark.parametrize("seed", range(20))
def test_flat_batch_equals_transformers_one_by_one(
    seed: int, draw_config: DrawConfig, make_peer: MakePeer, read: Read
) -> None:
    """A1, A5, A7, A8, B1: random sizes, prompts of mixed length in one flat batch, whole and in chunks."""
    config = draw_config(seed)
    peer = make_peer(config, seed=seed)
    model = same(peer, config)
    prompts = draw_prompts(seed, config.vocab_size)
    expected = [peer_logits(peer, prompt) for prompt in prompts]
    for chunk in (None, 41):
        for found, wanted in zip(read(model, prompts, chunk=chunk), expected, strict=True):
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() < TOLERANCE
    assert min(wanted.std() for wanted in expected) > 0.3


def test_a_long_prompt_equals_transformers(draw_config: DrawConfig, make_peer: MakePeer, read: Read) -> None:
    """B3, B5: 1,100 positions."""
    config = draw_config(3).replace(num_hidden_layers=1)
    peer = make_peer(config)
    prompt = [(7 * i + i // 11) % config.vocab_size for i in range(1100)]
    (found,) = read(same(peer, config), [prompt], chunk=512)
    assert (found - peer_logits(peer, prompt)).abs().max() < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("seed", [2, 11, 17])
def test_padded_transformers_batches_agree_on_real_tokens(
    side: str, seed: int, draw_config: DrawConfig, make_peer: MakePeer, read: Read
) -> None:
    """D7: masks decide; we have no padding at all."""
    config = draw_config(seed)
    peer = make_peer(config, seed=seed)
    prompts = draw_prompts(seed, config.vocab_size)
    width = max(map(len, prompts))
    ids, mask = torch.zeros((len(prompts), width), dtype=torch.int64), torch.zeros((len(prompts), width))
    for row, prompt in enumerate(prompts):
        part = slice(width - len(prompt), width) if side == "left" else slice(len(prompt))
        ids[row, part], mask[row, part] = torch.tensor(prompt), 1
    mask = mask.long()
    with torch.inference_mode():
        theirs = peer(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
    for row, found in enumerate(read(same(peer, config), prompts)):
        assert (found - theirs[row][mask[row].bool()]).abs().max() < TOLERANCE


@pytest.mark.filterwarnings("ignore:.*rope_theta is:UserWarning")  # the sizes are odd on purpose
@pytest.mark.parametrize("layout", ["per-expert", "fused"])
def test_transformers_computes_our_logits_from_our_files(
    layout: Any, draw_config: DrawConfig, make_peer: MakePeer, read: Read, tmp_path: Path
) -> None:
    """C4: what ``save_model`` writes is the same model in transformers and here."""
    config = draw_config(5)
    model = same(make_peer(config), config)
    prompt = draw_prompts(5, config.vocab_size)[-1]
    save_model(model, tmp_path, layout=layout, shard_size_bytes=20_000)
    (expected,) = read(model, [prompt])
    transformers.utils.logging.disable_progress_bar()
    peer = Peer.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert (peer_logits(peer, prompt) - expected).abs().max() < TOLERANCE
    assert torch.equal(read(load_model(tmp_path, device="cpu"), [prompt])[0], expected)


@pytest.mark.parametrize("original", [True, False])
def test_we_compute_the_logits_of_transformers_from_its_files(
    original: bool, draw_config: DrawConfig, make_peer: MakePeer, read: Read, tmp_path: Path
) -> None:
    """C4: per-expert names (the default of ``save_pretrained``) and fused names."""
    config = draw_config(6)
    peer = make_peer(config)
    transformers.utils.logging.disable_progress_bar()
    peer.save_pretrained(tmp_path, save_original_format=original, max_shard_size="20KB")
    prompt = draw_prompts(6, config.vocab_size)[-1]
    model = load_model(tmp_path, device="cpu")
    assert model.config == config
    assert (read(model, [prompt])[0] - peer_logits(peer, prompt)).abs().max() < TOLERANCE


def test_parameter_names_and_shapes_are_those_of_transformers(draw_config: DrawConfig, make_peer: MakePeer) -> None:
    """A8, A9: no bias anywhere, and an embedding and a head of their own."""
    config = draw_config(1)
    theirs = {name: value.shape for name, value in make_peer(config).state_dict().items()}
    model = Mixtral(config)
    assert {name: value.shape for name, value in model.state_dict().items()} == theirs
    assert not [name for name in theirs if "bias" in name]
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize(("lengths", "reaches"), [([5001], True), ([900, 4101], False)])
def test_token_0_reaches_position_5000(lengths: list[int], reaches: bool, draw_config: DrawConfig) -> None:
    """B3: no sliding window. With one layer a window would leave rounding alone, as a document's border does."""
    config = draw_config(4).replace(num_hidden_layers=1, max_position_embeddings=5001)
    model = Mixtral(config)
    initialise(model, seed=0, std=0.2)
    # One token of 5,000 weighs little; make attention loud enough to tell it from rounding.
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.o_proj.weight").mul_(300)
    ids = torch.tensor([(5 * i + i // 3) % config.vocab_size for i in range(5001)])
    last = []
    for first in (1, 2):
        ids[0] = first
        with torch.inference_mode():
            out = model(Batch(ids.clone(), torch.arange(5001), Documents(lengths)))
            last.append(model.logits(out.hidden_TD[-1:])[0])
    difference = (last[0] - last[1]).abs().max()
    assert difference > 2e-4 if reaches else difference < 2e-5


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_positions_continue_over_chunks(chunk: int, tiny_model: Mixtral, read: Read) -> None:
    """B7: any chunking gives the logits of the whole prompt."""
    prompts = [[i * i % 320 for i in range(150)], [3 * i % 320 for i in range(20)], [5]]
    for found, expected in zip(read(tiny_model, prompts, chunk=chunk), read(tiny_model, prompts), strict=True):
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_training_mode_changes_nothing(tiny_model: Mixtral) -> None:
    """A8: no dropout and no jitter."""
    documents = Documents([40])
    batch = Batch(torch.arange(40), documents.positions_T, documents)
    assert torch.equal(tiny_model.train()(batch).hidden_TD, tiny_model.eval()(batch).hidden_TD)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_stays_float32(dtype: torch.dtype, tiny_config: MixtralConfig) -> None:
    """A3."""
    model = Mixtral(tiny_config, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name.endswith("mlp.gate.weight") else dtype)


def test_bfloat16_forward(tiny_config: MixtralConfig, read: Read) -> None:
    """A4, A8: near the float32 model wherever no near-tie flips an expert; logits and routing are float32."""
    wide, narrow = Mixtral(tiny_config), Mixtral(tiny_config, dtype=torch.bfloat16)
    for model in (wide, narrow):
        initialise(model, seed=3, std=0.1)
    documents = Documents([100, 60])
    batch = Batch(torch.arange(160) * 7 % 320, documents.positions_T, documents)
    with torch.inference_mode():
        exact, rough = wide(batch), narrow(batch)
        assert rough.hidden_TD.dtype == torch.bfloat16
        logits = narrow.logits(rough.hidden_TD)
        difference = (logits - wide.logits(exact.hidden_TD)).norm(dim=1) / wide.logits(exact.hidden_TD).norm(dim=1)
    assert logits.dtype == torch.float32
    assert all(route.logits_TE.dtype == route.weights_TA.dtype == torch.float32 for route in rough.routes)
    assert difference.median() < 0.05
    assert torch.isfinite(read(narrow, [[1, 2, 3]] * 2)[1]).all()


@pytest.mark.parametrize(("name", "total"), [("8x7b", 46_702_792_704), ("8x22b", 140_630_071_296)])
def test_meta_device_needs_no_memory(name: str, total: int) -> None:
    """Section 0 of the constants: a model of hundreds of gigabytes is built and counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Mixtral(PRESETS[name], device="meta", dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert not list(model.buffers())


def test_routes_of_every_layer(tiny_model: Mixtral) -> None:
    documents = Documents([5, 4])
    out = tiny_model(Batch(torch.arange(9), documents.positions_T, documents))
    assert [tuple(part.shape) for route in out.routes for part in route] == [(9, 4), (9, 2), (9, 2)] * 2
    assert out.hidden_TD.shape == (9, 64)

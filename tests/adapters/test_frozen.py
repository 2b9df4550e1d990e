"""QLoRA: training over packed weights equals training over the same numbers unpacked, and keeps them packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapting import FORMS, packed_folder
from torch import Tensor

from mixtral.adapters import LoraConfig, attach, expert_bytes, frozen
from mixtral.adapters.factors import TARGETS
from mixtral.adapters.frozen import packed_linear
from mixtral.compiled import compile_model
from mixtral.errors import ConfigError
from mixtral.model import Batch, Documents, Mixtral
from mixtral.ops import head_cross_entropy
from mixtral.quant.encode import encode_rows
from mixtral.quant.modules import PackedExperts, PackedLinear
from mixtral.quant.packed import Blocks
from mixtral.weights import load_model


def trained(model: Mixtral, lora: LoraConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and the gradients of the adapter with values in b."""
    adapter = attach(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.endswith("_b"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    ids = torch.randint(model.config.vocab_size, (50,), generator=generator)
    context = Documents([len(ids)])
    hidden = model(Batch(ids, context.positions_T, context)).hidden_TD
    loss, _ = head_cross_entropy(hidden, model.lm_head.weight, ids.roll(-1), torch.full((len(ids),), 1 / len(ids)))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert not [name for name, grad in grads.items() if grad is None]
    return loss.detach(), {name: grad for name, grad in grads.items() if grad is not None}


@pytest.mark.parametrize("targets", [tuple(TARGETS), ("q",)], ids=["all", "q of the first layer up"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_those_on_unpacked_weights(form: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """The second case: only what lies under all other packed matrices is trained, so gradients pass through these."""
    path = packed_folder(form, tmp_path)
    packed = load_model(path, device="cpu", dtype=torch.float32, reference=True)
    assert any(isinstance(module, PackedExperts) for module in packed.modules())
    assert expert_bytes(packed) <= FORMS[form]
    lora = LoraConfig(rank=3, targets=targets, expert_rank=2)
    loss, found = trained(packed, lora)
    assert expert_bytes(packed) <= FORMS[form]
    wanted_loss, wanted = trained(load_model(path, device="cpu", dtype=torch.float32, decode=True), lora)
    torch.testing.assert_close(loss, wanted_loss, atol=1e-5, rtol=1e-5)
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
        assert wanted[name].norm() > 0


@pytest.mark.parametrize("targets", [tuple(TARGETS), ("q",)])
def test_panels_of_kernels_give_the_same(targets: tuple[str, ...], tmp_path: Path) -> None:
    """A model that was loaded for compiled kernels, but is not on them, has its matrices in another order; and these
    kernels give no gradient, so what is not adapted must not be left to them."""
    path, lora = packed_folder("int4_g32", tmp_path), LoraConfig(rank=3, targets=targets)
    loss, found = trained(load_model(path, device="cpu", dtype=torch.float32), lora)
    wanted_loss, wanted = trained(load_model(path, device="cpu", dtype=torch.float32, reference=True), lora)
    torch.testing.assert_close(loss, wanted_loss, atol=1e-6, rtol=1e-6)
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-7, rtol=1e-4)


def test_bfloat16_gradients_are_near(tmp_path: Path) -> None:
    path = packed_folder("int4_g32", tmp_path)
    lora = LoraConfig(rank=3, targets=tuple(TARGETS))
    _, found = trained(load_model(path, device="cpu", dtype=torch.bfloat16, reference=True), lora)
    _, wanted = trained(load_model(path, device="cpu", dtype=torch.float32, decode=True), lora)
    for name, grad in found.items():
        if "gate.lora" not in name:  # a router's picks may flip
            assert (grad - wanted[name]).norm() <= 0.1 * wanted[name].norm(), name


def test_panels_are_small_and_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward decode the rows anew, a few at a time, and autograd keeps no tensor of them."""
    packed = Blocks("Q8_0", encode_rows(torch.randn(80, 64, generator=torch.Generator().manual_seed(0)), "Q8_0"))
    weight = packed.decode(torch.float32)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    sizes: list[int] = []
    decode_rows = Blocks.decode_rows
    monkeypatch.setattr(frozen, "PANEL_VALUES", 64 * 24)
    monkeypatch.setattr(
        Blocks, "decode_rows", lambda s, start, out: (sizes.append(len(out)), decode_rows(s, start, out))
    )
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: saved.append(value) or value, lambda value: value):
        out = packed_linear(x, packed)
    assert not saved
    assert sizes == [24, 24, 24, 8]
    torch.testing.assert_close(out, x.detach() @ weight.T)
    seed = torch.randn(7, 80, generator=torch.Generator().manual_seed(2))
    out.backward(seed)
    assert sizes == [24, 24, 24, 8] * 2
    assert x.grad is not None
    torch.testing.assert_close(x.grad, seed @ weight)


def test_the_packed_head_comes_back(tmp_path: Path) -> None:
    model = load_model(packed_folder("q8_0", tmp_path), device="cpu", dtype=torch.float32, reference=True)
    head = model.lm_head
    assert isinstance(head, PackedLinear)
    adapter = attach(model, LoraConfig(rank=2))
    assert torch.equal(model.lm_head.weight, head.packed.decode(torch.float32))
    adapter.detach()
    assert model.lm_head is head


def test_compiled_kernels_are_refused(tiny_model: Mixtral) -> None:
    """They have no backward pass: gradients would be missing without a word."""
    with pytest.raises(ConfigError, match="reference=True"):
        attach(compile_model(tiny_model), LoraConfig())

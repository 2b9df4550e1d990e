"""The optimizer: AdamW equals torch's, Muon's updates are near orthogonal, and a state continues exactly."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral.train.config import OptimConfig
from mixtral.train.optim import NormGuard, Optimizer, learning_rate, orthogonalise


class Net(nn.Module):
    """One parameter of each kind."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 6, _weight=torch.randn((7, 6), generator=generator).to(dtype))
        self.norm = nn.RMSNorm(6, dtype=dtype)
        self.q_proj = nn.Linear(6, 8, bias=False, dtype=dtype)
        self.gate_up_proj = nn.Parameter(torch.randn((3, 10, 6), generator=generator).to(dtype))
        with torch.no_grad():
            self.q_proj.weight.copy_(torch.randn((8, 6), generator=generator))


def config(**changes: float) -> OptimConfig:
    return OptimConfig(**({"clip_norm": 1e9} | changes))  # type: ignore[arg-type]


def give_gradients(net: nn.Module, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in net.named_parameters()}
    for name, parameter in net.named_parameters():
        parameter.grad = grads[name].to(parameter.dtype)
    return grads


def train(optimizer: Optimizer, net: nn.Module, seeds: range, rate: float = 0.01) -> None:
    for seed in seeds:
        give_gradients(net, seed)
        optimizer.accumulate()
        optimizer.step(rate)


def snapshot(optimizer: Optimizer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state().items()}


@pytest.mark.parametrize(("name", "decay"), [("embed.weight", 0.1), ("norm.weight", 0.0)])
def test_adamw_is_torchs_with_decay_on_everything_but_norms(name: str, decay: float) -> None:
    net = Net(1)
    theirs = nn.Parameter(net.get_parameter(name).detach().clone())
    peer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    optimizer = Optimizer(net, config(weight_decay=0.1))
    for seed in range(8):
        theirs.grad = give_gradients(net, seed)[name].clone()
        peer.step()
        optimizer.accumulate()
        optimizer.step(0.01)
    torch.testing.assert_close(net.get_parameter(name).detach(), theirs.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (3, 24, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    out = orthogonalise(matrices)
    assert (out.shape, out.dtype) == (matrices.shape, torch.float32)
    values = torch.linalg.svdvals(out)
    if shape[-1] != shape[-2]:  # a square random matrix has singular values too close to 0 for five steps
        assert float(values.min()) > 0.6
    assert float(values.max()) < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    aligned = (out * (u @ vh)).sum((-2, -1)) / min(shape[-2:])
    assert float(aligned.min()) > 0.7


def test_the_first_update_of_a_matrix_is_its_orthogonalised_gradient_scaled() -> None:
    net = Net(1)
    before = net.q_proj.weight.detach().clone()
    optimizer = Optimizer(net, config(weight_decay=0.5))
    grad = give_gradients(net, 4)["q_proj.weight"]
    optimizer.accumulate()
    optimizer.step(0.1)
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(8) * orthogonalise(grad)
    torch.testing.assert_close(net.q_proj.weight.detach(), expected, rtol=0.02, atol=2e-3)


def test_gate_and_up_are_orthogonalised_apart() -> None:
    def gate_after(factor: float) -> Tensor:
        net = Net(1)
        give_gradients(net, 2)
        assert net.gate_up_proj.grad is not None
        net.gate_up_proj.grad[:, 5:] *= factor
        optimizer = Optimizer(net, config())
        optimizer.accumulate()
        optimizer.step(0.1)
        return net.gate_up_proj.detach()

    one, other = gate_after(1), gate_after(-64)
    assert torch.equal(one[:, :5], other[:, :5])
    assert not torch.equal(one[:, 5:], other[:, 5:])


def test_an_expert_that_never_had_tokens_only_decays() -> None:
    net = Net(1)
    before = net.gate_up_proj.detach().clone()
    give_gradients(net, 2)
    assert net.gate_up_proj.grad is not None
    net.gate_up_proj.grad[1] = 0
    optimizer = Optimizer(net, config(weight_decay=0.1))
    optimizer.accumulate()
    optimizer.step(0.1)
    after = net.gate_up_proj.detach()
    torch.testing.assert_close(after[1], before[1] * (1 - 0.1 * 0.1))
    assert torch.isfinite(after).all()
    assert not torch.allclose(after[0], before[0] * 0.99, atol=1e-3)


def test_momentum_moves_an_expert_without_tokens_by_a_full_step_until_it_has_faded() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config(weight_decay=0.1))
    train(optimizer, net, range(1))
    moved = []
    for _ in range(700):
        before = net.gate_up_proj.detach()[1].clone()
        give_gradients(net, 2)
        assert net.gate_up_proj.grad is not None
        net.gate_up_proj.grad[1] = 0
        optimizer.accumulate()
        optimizer.step(0.1)
        moved.append(float((net.gate_up_proj.detach()[1] - before * 0.99).norm()))
    full = 0.1 * 0.2 * math.sqrt(6) * math.sqrt(10)  # gate and up: five singular values near 1 each
    assert moved[:250] == pytest.approx([full] * 250, rel=0.3)
    assert moved[-1] < 1e-3 * full


def test_dropped_gradients_do_not_reach_the_next_step() -> None:
    net, other = Net(1), Net(1)
    dropping, plain = Optimizer(net, config()), Optimizer(other, config())
    give_gradients(net, 5)
    dropping.accumulate()
    dropping.drop_gradients()
    train(dropping, net, range(1))
    train(plain, other, range(1))
    expected = plain.state()
    assert all(torch.equal(value, expected[name]) for name, value in dropping.state().items())


def test_gradients_add_up_and_are_dropped_from_the_model() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config())
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for seed in (5, 6):
        for name, grad in give_gradients(net, seed).items():
            total[name] += grad
        optimizer.accumulate()
    assert all(p.grad is None for p in net.parameters())
    norm = optimizer.step(0.01)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in total.values())), rel=1e-5)
    torch.testing.assert_close(optimizer.state()["first.q_proj.weight"], total["q_proj.weight"])


def test_clipping_scales_all_gradients_by_the_global_norm() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config(clip_norm=0.5))
    grads = {name: grad.clone() for name, grad in give_gradients(net, 7).items()}
    optimizer.accumulate()
    norm = optimizer.step(0.01)
    assert norm > 5
    state = optimizer.state()
    torch.testing.assert_close(state["first.q_proj.weight"], grads["q_proj.weight"] * (0.5 / norm))
    torch.testing.assert_close(state["first.embed.weight"], 0.1 * grads["embed.weight"] * (0.5 / norm))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config())
    train(optimizer, net, range(2))
    before = snapshot(optimizer)
    give_gradients(net, 3)
    assert net.norm.weight.grad is not None
    net.norm.weight.grad[0] = math.nan
    optimizer.accumulate()
    assert math.isnan(optimizer.step(0.01))
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state().items())


def test_a_loaded_state_goes_on_exactly() -> None:
    net, other = Net(1), Net(2)
    straight, resumed = Optimizer(net, config()), Optimizer(other, config())
    train(straight, net, range(3))
    resumed.load(snapshot(straight))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    train(straight, net, range(3, 6))
    train(resumed, other, range(3, 6))
    expected = straight.state()
    assert int(expected["steps"]) == 6
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state().items())


def test_a_state_of_another_model_is_refused() -> None:
    optimizer = Optimizer(Net(1), config())
    state = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"at 'master\.norm\.weight'"):
        optimizer.load({name: value for name, value in state.items() if name != "master.norm.weight"})
    with pytest.raises(ValueError, match=r"at 'first\.embed\.weight'"):
        optimizer.load(state | {"first.embed.weight": torch.zeros(2, 2)})


def test_updates_too_small_for_the_model_are_kept_in_the_masters() -> None:
    net = Net(1, torch.bfloat16)
    optimizer = Optimizer(net, config(weight_decay=0.0))
    start = net.embed.weight.detach().clone()
    for _ in range(200):
        net.embed.weight.grad = torch.ones_like(net.embed.weight)
        optimizer.accumulate()
        optimizer.step(1e-4)
    moved = start.float() - optimizer.masters["embed.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=0.01, atol=1e-4)
    assert torch.equal(net.embed.weight.detach(), optimizer.masters["embed.weight"].bfloat16())


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.2), (3, 0.8), (4, 1.0), (79, 1.0), (80, 1.0), (90, 0.5), (99, 0.05)]
)
def test_the_rate_warms_up_stays_and_decays_to_zero(step: int, expected: float) -> None:
    schedule = OptimConfig(learning_rate=2.0, warmup_steps=4, decay_fraction=0.2)
    assert learning_rate(schedule, step, 100) == pytest.approx(2 * expected)


def test_without_warmup_and_decay_the_rate_is_constant() -> None:
    schedule = OptimConfig(learning_rate=0.5, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate(schedule, step, 10) for step in range(10)} == {0.5}


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.25, 0.5, 0.75, 1.0, 1 - 1 / 7, 1 / 7]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 0.5 + 0.5 * math.cos(math.pi / 7), 0.5 + 0.5 * math.cos(6 * math.pi / 7)]),
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]),
    ],
)
def test_the_schedules_of_fine_tuning(schedule: str, expected: list[float]) -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=3, schedule=schedule)
    assert [learning_rate(config, step, 10) for step in (0, 1, 2, 3, 4, 9)] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 50])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_no_step_has_a_rate_of_zero_or_above_the_peak(schedule: str, warmup: int, steps: int) -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=warmup, schedule=schedule)
    assert all(0 < learning_rate(config, step, steps) <= 1 for step in range(steps))


def test_adamw_alone_updates_matrices_as_torch_does() -> None:
    net = Net(1)
    theirs = nn.Parameter(net.q_proj.weight.detach().clone())
    peer = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = Optimizer(net, OptimConfig(clip_norm=1e9, weight_decay=0.1, optimizer="adamw"))
    for seed in range(4):
        theirs.grad = give_gradients(net, seed)["q_proj.weight"].clone()
        peer.step()
        optimizer.accumulate()
        optimizer.step(0.01)
    torch.testing.assert_close(net.q_proj.weight.detach(), theirs.detach(), rtol=1e-6, atol=1e-6)


def test_only_the_parameters_that_are_given_are_trained_and_never_with_muon() -> None:
    net = Net(1)
    optimizer = Optimizer({"q_proj.lora_a": net.q_proj.weight}, config())
    before = net.embed.weight.detach().clone()
    train(optimizer, net, range(2))
    assert torch.equal(net.embed.weight.detach(), before)
    assert optimizer.state().keys() == {"master.q_proj.lora_a", "first.q_proj.lora_a", "second.q_proj.lora_a", "steps"}


def test_masters_that_are_given_are_exact_where_the_model_is_rounded() -> None:
    exact = {name: value.detach().clone() for name, value in Net(1).named_parameters()}
    net = Net(1, torch.bfloat16)
    optimizer = Optimizer(net, config(), dict(exact))
    assert all(torch.equal(optimizer.masters[name], value) for name, value in exact.items())
    assert torch.equal(net.q_proj.weight.detach(), exact["q_proj.weight"].bfloat16())


def test_masters_that_are_given_are_not_held_twice() -> None:
    given = Taken({name: value.detach().clone() for name, value in Net(1).named_parameters()})
    refs = [weakref.ref(value) for value in given.values()]
    given.on_pop = lambda: sum(ref() is not None for ref in refs)
    Optimizer(Net(1, torch.bfloat16), config(), given)
    assert given.alive == [4, 3, 2, 1]
    assert not given


class Taken(dict[str, Tensor]):
    """Notes how many of its values are still alive when one is taken out."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__(values)
        self.alive: list[int] = []
        self.on_pop: Callable[[], int] = lambda: 0

    def pop(self, name: str, default: Any = None) -> Any:
        self.alive.append(self.on_pop())
        return super().pop(name, default)


def test_averaged_weights_are_the_decayed_mean_and_only_lent_to_the_model() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config(ema=0.5))
    expected = net.norm.weight.detach().clone()
    for step in range(6):
        train(optimizer, net, range(step, step + 1))
        decay = min(0.5, (2 + step) / (11 + step))
        expected = decay * expected + (1 - decay) * net.norm.weight.detach()
    own = net.norm.weight.detach().clone()
    with optimizer.averaged():
        torch.testing.assert_close(net.norm.weight.detach(), expected)
        assert not torch.equal(net.norm.weight.detach(), own)
    assert torch.equal(net.norm.weight.detach(), own)
    other = Optimizer(Net(2), config(ema=0.5))
    other.load(snapshot(optimizer))
    assert torch.equal(other.state()["average.norm.weight"], optimizer.state()["average.norm.weight"])


def test_a_gradient_above_the_limit_changes_nothing() -> None:
    net = Net(1)
    optimizer = Optimizer(net, config(ema=0.9))
    train(optimizer, net, range(2))
    before = snapshot(optimizer)
    give_gradients(net, 3)
    optimizer.accumulate()
    assert optimizer.step(0.01, limit=1e-3) > 1e-3
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state().items())


def test_the_guard_compares_with_the_median_of_the_last_norms() -> None:
    guard = NormGuard(6.0)
    for norm in range(1, NormGuard.FEWEST):
        guard.note(float(norm), skipped=False)
        assert guard.limit() == math.inf
    guard.note(1e9, skipped=False)
    assert guard.limit() == 6 * 10.5
    assert NormGuard(0.0, [1.0] * 50).limit() == math.inf


def test_the_guard_forgets_and_gets_used_to_longer_gradients() -> None:
    guard = NormGuard(6.0, [1.0] * NormGuard.WINDOW)
    skipped = 0
    for _ in range(NormGuard.WINDOW):
        is_long = guard.limit() < 10.0
        guard.note(10.0, skipped=is_long)
        skipped += is_long
    assert (guard.skipped, guard.limit(), len(guard.norms)) == (skipped, 60.0, NormGuard.WINDOW)
    assert skipped == NormGuard.WINDOW // 2
    again = NormGuard(6.0, guard.norms, guard.skipped)
    assert (again.limit(), again.skipped) == (guard.limit(), guard.skipped)

"""Compiled products with weights that are not quantised, norms and the router: against float64, row by row the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral import ops
from mixtral.compiled.views import DenseView, expert_view, matrix_view
from mixtral.config import MixtralConfig
from mixtral.model.mixtral import Linear
from mixtral.model.moe import Experts
from mixtral.ops.native import kernel_levels, module
from mixtral.quant.encode import encode_rows
from mixtral.quant.packed import Blocks
from mixtral.quant.panels import to_panels

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
COUNTS = [*range(1, 10), 15, 16, 17, 31, 33, 64, 129, 500]
SHAPES = [(50, 96), (37, 61), (16, 1100), (5, 7), (1, 33)]


def random(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrix(kind: str, rows: int, columns: int, seed: int = 0) -> tuple[Any, Tensor, Linear]:
    """The view, the weights in float64, and the layer that owns them."""
    layer = Linear(columns, rows, device="cpu", dtype=DTYPES[kind])
    with torch.no_grad():
        layer.weight.copy_(random((rows, columns), seed))
    return matrix_view(layer, DenseView()), layer.weight.detach().double(), layer


def project(x: Tensor, matrices: list[Any], width: int, level: str = "", threads: int = 2, **more: Any) -> Tensor:
    out = torch.full((len(x), width), float("nan"))
    module().project(x.numpy(), matrices, out.numpy(), threads, level=level, **more)
    return out


def of_the_same_order(kind: str, level: str) -> str:
    """A level whose bits another one has: tiles sum bfloat16 in an order of their own."""
    return level if (kind, level) == ("bf16", "amx") else "baseline"


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int], kind: str, level: str) -> None:
    """Within float32 rounding of the exact product of (for bfloat16: rounded) inputs; every number is written."""
    view, weights, _ = matrix(kind, *shape)
    x = random((500, shape[1]), seed=1)
    x[3, 2] = 300.0
    x[5] = 0.0
    inputs = (x.bfloat16() if kind == "bf16" else x).double()
    exact, size = inputs @ weights.T, inputs.abs() @ weights.abs().T + 1e-30
    for count in COUNTS:
        found = project(x[:count], [view], shape[0], level)
        assert ((found - exact[:count]).abs() / size[:count]).max() < 1e-6, count


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_depends_on_nothing_but_itself(shape: tuple[int, int], kind: str) -> None:
    """The same bits alone and among others, on every instruction set and number of threads."""
    view, _, _ = matrix(kind, *shape)
    x = random((129, shape[1]), seed=2)
    for level in kernel_levels():
        expected = project(x, [view], shape[0], of_the_same_order(kind, level))
        assert torch.equal(project(x, [view], shape[0], level, threads=3), expected), level
        for start, stop in ((0, 1), (5, 8), (17, 32), (64, 129)):
            assert torch.equal(project(x[start:stop], [view], shape[0], level, threads=1), expected[start:stop])


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("kind", DTYPES)
def test_side_by_side_with_norm_and_residual(kind: str, level: str) -> None:
    columns, widths = 61, (50, 7, 64)
    parts = [matrix(kind, width, columns, seed) for seed, width in enumerate(widths)]
    x, norm, beside = random((9, columns), 5), random((columns,), 6), random((9, sum(widths)), 7)
    more = {"norm": norm.numpy(), "eps": 1e-5, "residual": beside.numpy()}
    found = project(x, [view for view, _, _ in parts], sum(widths), level, **more)
    normed = ops.rms_norm(x.double(), norm.double(), 1e-5)
    exact = torch.cat([normed @ weights.T for _, weights, _ in parts], 1) + beside
    assert ((found - exact).norm() / exact.norm()).item() < (4e-3 if kind == "bf16" else 1e-6)
    assert torch.equal(
        project(x[4:5], [v for v, _, _ in parts], sum(widths), level, **more | {"residual": beside[4:5].numpy()})[0],
        found[4],
    )


def sum_of_sixteen(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.float32:
    sums = np.zeros(16, np.float32)
    for start in range(0, len(x), 32):
        for odd in (1, 0):
            sums += x[start + odd : start + 32 : 2] * w[start + odd : start + 32 : 2]
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return np.float32(sums[0])


def sum_in_tiles(x: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> np.float32:
    total = np.float32(0)
    for start in range(0, len(x), 32):
        even, odd = np.float32(0), np.float32(0)
        for k in range(start, start + 32, 2):
            even += x[k] * w[k]  # exact: of bfloat16
            odd += x[k + 1] * w[k + 1]
        total += even + odd
    return np.float32(total)


@pytest.mark.parametrize("level", kernel_levels())
def test_bfloat16_as_it_is_defined(level: str) -> None:
    """Against a model of the sums, number by number.

    16 partial ones, the odd column of a pair first, then a tree; in tiles the even and the odd columns of 32 apart.
    """
    view, weights, _ = matrix("bf16", 3, 70)
    x = random((2, 70), seed=8)
    inputs = np.zeros((2, 96), np.float32)
    inputs[:, :70] = x.bfloat16().float().numpy()
    wide = np.zeros((3, 96), np.float32)
    wide[:, :70] = weights.float().numpy()
    expected = np.zeros((2, 3), np.float32)
    for i in range(2):
        for n in range(3):
            expected[i, n] = (sum_in_tiles if level == "amx" else sum_of_sixteen)(inputs[i], wide[n])
    assert np.array_equal(project(x, [view], 3, level).numpy(), expected)


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("kind", DTYPES)
def test_numbers_that_are_not_finite_stay_in_their_row(kind: str, level: str) -> None:
    view, _, _ = matrix(kind, 50, 96)
    x = random((9, 96), seed=4)
    expected = project(x, [view], 50, level)
    x[4, 30] = float("nan")
    found = project(x, [view], 50, level)
    assert bool(found[4].isnan().all())
    rest = [i for i in range(9) if i != 4]
    assert torch.equal(found[rest], expected[rest])


@pytest.mark.parametrize("level", kernel_levels())
def test_norm(level: str) -> None:
    for columns in (1, 15, 16, 61, 4096):
        x, weight = random((5, columns), 1) * 30, random((columns,), 2)
        out = torch.full_like(x, float("nan"))
        module().norm(x.numpy(), weight.numpy(), 1e-6, out.numpy(), level)
        torch.testing.assert_close(out, ops.rms_norm(x.double(), weight.double(), 1e-6).float(), rtol=1e-6, atol=1e-7)


class Mixture:
    """Random experts of odd sizes and a router, in a dtype."""

    def __init__(self, kind: str, *, width: int = 61, hidden: int = 45, experts: int = 5) -> None:
        config = MixtralConfig(
            vocab_size=10,
            hidden_size=width,
            intermediate_size=hidden,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
            num_local_experts=experts,
            num_experts_per_tok=2,
            max_position_embeddings=8,
        )
        self.experts, self.width = Experts(config, device="cpu", dtype=DTYPES[kind]), width
        with torch.no_grad():
            for seed, weight in enumerate(self.experts.parameters()):
                weight.copy_(random(tuple(weight.shape), seed) / weight.shape[-1] ** 0.5)
        self.router, self.norm = random((experts, width), 3), random((width,), 4)
        self.view = expert_view(self.experts, DenseView())

    def run(self, x: Tensor, level: str = "", threads: int = 2) -> tuple[Tensor, ops.Route]:
        rows, count = len(x), len(self.router)
        out, logits = torch.full_like(x, float("nan")), torch.full((rows, count), float("nan"))
        picks, shares = torch.full((rows, 2), -1, dtype=torch.int64), torch.full((rows, 2), float("nan"))
        arguments = (x.numpy(), self.router.numpy(), self.view, out.numpy(), logits.numpy(), picks.numpy())
        module().mixture(
            *arguments, shares.numpy(), threads, norm=self.norm.numpy(), eps=1e-5, residual=x.numpy(), level=level
        )
        return out, ops.Route(logits, picks, shares)

    def expected(self, x: Tensor) -> tuple[Tensor, ops.Route]:
        normed = ops.rms_norm(x.double(), self.norm.double(), 1e-5)
        route = ops.reference.route(normed.float(), self.router, 2)
        weights = [weight.detach().double() for weight in self.experts.parameters()]
        mixed = ops.reference.experts(normed, route.picks_TA, route.weights_TA, *weights)
        return x + mixed, route


@pytest.mark.parametrize("level", kernel_levels())
@pytest.mark.parametrize("kind", DTYPES)
def test_mixture(kind: str, level: str) -> None:
    """Against float64, and a token alone has the same bits and the same routing."""
    layer, x = Mixture(kind), random((77, 61), 9)
    (found, route), (exact, expected) = layer.run(x, level), layer.expected(x)
    assert torch.equal(route.picks_TA, expected.picks_TA)
    torch.testing.assert_close(route.logits_TE, expected.logits_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(route.weights_TA, expected.weights_TA, rtol=1e-5, atol=1e-6)
    assert ((found - exact).norm() / exact.norm()).item() < (8e-3 if kind == "bf16" else 1e-6)
    for t in (0, 40, 76):
        alone, only = layer.run(x[t : t + 1].clone(), level, threads=1)
        assert torch.equal(alone[0], found[t])
        assert all(torch.equal(a[0], b[t]) for a, b in zip(only, route, strict=True))
    assert torch.equal(layer.run(x, of_the_same_order(kind, level))[0], found)


@pytest.mark.parametrize("level", kernel_levels())
def test_experts_of_several_formats(level: str) -> None:
    """Quantised and plain matrices side by side: close to float64, and a token alone has the same bits."""
    weights = [[random((256, 256), 3 * part + e) / 16 for e in range(3)] for part in range(3)]
    blocks = [[Blocks("Q6_K", encode_rows(weight, "Q6_K")) for weight in part] for part in weights]
    plain = [[(part + e) % 2 == 0 for e in range(3)] for part in range(3)]
    kept = [[weight.bfloat16().view(torch.uint8).reshape(-1).numpy() for weight in part] for part in weights]
    panels = [[to_panels(block) for block in part] for part in blocks]
    views = [
        [module().DenseMatrix(0, 256, 256, kept[p][e]) if plain[p][e] else panels[p][e].matrix for e in range(3)]  # type: ignore[union-attr]
        for p in range(3)
    ]
    exact = [
        [weights[p][e].bfloat16().double() if plain[p][e] else blocks[p][e].decode(torch.float64) for e in range(3)]
        for p in range(3)
    ]
    x, picks = random((70, 256), 20), torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [2, 1]] * 14)
    shares, together = torch.rand((70, 2), generator=torch.Generator().manual_seed(1)), module().ExpertSet(*views)
    out, alone = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    module().experts(x.numpy(), picks.numpy(), shares.numpy(), together, out.numpy(), 2, level)
    for t in range(70):
        row = slice(t, t + 1)
        module().experts(
            x[row].numpy(), picks[row].numpy(), shares[row].numpy(), together, alone[row].numpy(), 1, level
        )
    assert torch.equal(alone, out)
    gate_up = torch.stack([torch.cat(pair) for pair in zip(exact[0], exact[1], strict=True)])
    expected = ops.reference.experts(x.double(), picks, shares, gate_up, torch.stack(exact[2]))
    assert ((out - expected).norm() / expected.norm()).item() < 0.03


def test_ties_go_to_the_lower_expert() -> None:
    layer, x = Mixture("f32"), random((3, 61), 9)
    layer.router[:] = layer.router[0]
    layer.router[1] -= 1000 * torch.sign(layer.router[1])
    _, route = layer.run(x)
    for logits, picks in zip(route.logits_TE, route.picks_TA, strict=True):
        assert picks.tolist() == torch.sort(logits, descending=True, stable=True).indices[:2].tolist()
    layer.router[:] = 0.0
    assert layer.run(x)[1].picks_TA.tolist() == [[0, 1]] * 3
    assert layer.run(x)[1].weights_TA.tolist() == [[0.5, 0.5]] * 3


def test_a_token_that_is_not_a_number_spoils_nobody_else() -> None:
    layer, x = Mixture("bf16"), random((9, 61), 9)
    expected, _ = layer.run(x)
    spoilt = x.clone()
    spoilt[4, 3] = float("nan")
    found, route = layer.run(spoilt)
    assert bool(found[4].isnan().all())
    assert set(route.picks_TA[4].tolist()) <= set(range(5))
    rest = [i for i in range(9) if i != 4]
    assert torch.equal(found[rest], expected[rest])


def test_a_view_follows_the_weights() -> None:
    """Weights changed in place are seen at once; another tensor in their place gets a view of its own."""
    _, _, layer = matrix("f32", 8, 16)
    kept, x = DenseView(), random((1, 16), 1)
    before = project(x, [matrix_view(layer, kept)], 8)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(project(x, [matrix_view(layer, kept)], 8), before * 2)
    layer.weight = torch.nn.Parameter(torch.zeros(8, 16))
    assert bool((project(x, [matrix_view(layer, kept)], 8) == 0).all())
    layer.weight.data = torch.ones(8, 16)
    assert bool((project(x, [matrix_view(layer, kept)], 8) != 0).all())


def test_wrong_calls_are_refused() -> None:
    compiled, x = module(), np.zeros((2, 16), np.float32)
    view, _, _ = matrix("f32", 8, 16)
    for data, arguments, words in (
        (np.zeros(9, np.uint8), (0, 8, 16), "data must have 256 bytes"),
        (np.zeros(9, np.uint8), (3, 8, 16), "kind must be"),
        (np.zeros(9, np.uint8), (0, 0, 16), "out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            compiled.DenseMatrix(*arguments, data)
    out = np.zeros((2, 8), np.float32)
    with pytest.raises(ValueError, match="norm must have 16"):
        compiled.project(x, [view], out, 1, norm=np.zeros(15, np.float32))
    with pytest.raises(ValueError, match="residual must be"):
        compiled.project(x, [view], out, 1, residual=np.zeros((1, 8), np.float32))
    with pytest.raises(ValueError, match="x must have 16 columns"):
        compiled.project(np.zeros((2, 15), np.float32), [view], out, 1)
    with pytest.raises(ValueError, match="experts: three lists"):
        compiled.ExpertSet([], [], [])
    with pytest.raises(ValueError, match="gate and up must be"):
        compiled.ExpertSet([view], [view], [view])


def test_numbers_at_odd_addresses_are_refused() -> None:
    """Of plain weights any address is fine: files have tensors where they like."""

    def shifted(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        memory = np.zeros(values.nbytes + 1, np.uint8)[1:]
        memory[:] = values.reshape(-1).view(np.uint8)
        return memory.view(values.dtype).reshape(values.shape)

    rng = np.random.default_rng(0)
    x, w, norm, beside, out = (rng.standard_normal(s).astype(np.float32) for s in ((2, 8), (3, 8), 8, (2, 3), (2, 3)))
    matrix, other = (
        module().DenseMatrix(2, 3, 8, part)
        for part in (w.view(np.uint8).reshape(-1), shifted(w.view(np.uint8).reshape(-1)))
    )
    good = {"x": x, "out": out, "norm": norm, "residual": beside}
    found = []
    for one in (matrix, other):
        module().project(**good, matrices=[one], threads=1, eps=1e-5)
        found.append(out.copy())
    assert np.array_equal(*found)
    for name, values in good.items():
        with pytest.raises(ValueError, match=f"{name} must be aligned to 4 bytes"):
            module().project(**good | {name: shifted(values)}, matrices=[matrix], threads=1, eps=1e-5)

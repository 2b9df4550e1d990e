"""A layer on compiled kernels in which rows of a batch have different adapters, or none.

All rows go through the matrices of the base together, and what an adapter adds is computed for its rows by the same
kernels, whose results depend on their own row alone. So a row has the same bits in any company, and one without an
adapter those of a model without adapters. Rows whose adapter changes router or experts go through these matrix by
matrix.

T tokens, N rows of one adapter or of several, R rank, D width, F expert hidden size, E experts, A experts per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.adapters.factors import EXPERTS, Factors
from mixtral.adapters.frozen import PackedStack, stacks_of
from mixtral.adapters.rows import Rows
from mixtral.compiled.layers import CompiledLayer
from mixtral.compiled.views import DenseView, dense_matrix, multiply
from mixtral.model.batch import Context
from mixtral.model.moe import Experts
from mixtral.ops.reference import swiglu
from mixtral.quant.modules import PackedExperts
from mixtral.quant.panels import Panels

__all__ = ["AdaptedLayer", "LayerPairs"]


class _Pair:
    """A low-rank pair for the kernels, with its scale in b: float32, whatever the base is."""

    def __init__(self, a_RI: Tensor, b_OR: Tensor, scale: float) -> None:
        self._rank, self._out = len(a_RI), len(b_OR)
        self._a = [dense_matrix(a_RI.detach().to("cpu", torch.float32))]
        self._b = [dense_matrix(b_OR.detach().to("cpu", torch.float32) * scale)]

    def __call__(self, x_NI: Tensor) -> Tensor:
        """``scale * b (a x)`` for each row of ``x`` (float32): [N, O]."""
        narrow_NR = multiply(x_NI, self._a, torch.empty((len(x_NI), self._rank)))
        return multiply(narrow_NR, self._b, torch.empty((len(x_NI), self._out)))


class LayerPairs:
    """What an adapter adds in one layer: pairs by target, of experts one for each expert."""

    def __init__(self, factors: Mapping[str, Factors]) -> None:
        self.pairs = {target: _Pair(*pair) for target, pair in factors.items() if target not in EXPERTS}
        self.experts = {
            target: [_Pair(a, b, pair.scale) for a, b in zip(pair.a, pair.b, strict=True)]
            for target, pair in factors.items()
            if target in EXPERTS
        }

    @property
    def mixes(self) -> bool:
        """Whether it changes which experts are chosen, or what they compute."""
        return bool(self.experts) or "router" in self.pairs


class _Matrices:
    """Matrices [E, O, I] by the kernels' views of them: one, or several below each other, of every expert."""

    def __init__(self, shape: tuple[int, int, int], views: Sequence[Sequence[Any]]) -> None:
        self.shape, self._views = shape, views

    def multiply(self, expert: int, x_NI: Tensor, out_NO: Tensor) -> None:
        """As in ``ops.Stacked``."""
        multiply(x_NI, self._views[expert], out_NO)


_Stack = _Matrices | PackedStack
_Group = tuple[LayerPairs, Tensor]  # and its rows


def _dense(weight_EOI: Tensor) -> _Matrices:
    experts, out, width = weight_EOI.shape
    return _Matrices((experts, out, width), [[dense_matrix(weight_OI)] for weight_OI in weight_EOI])


def _stacks(experts: nn.Module, kept: DenseView) -> tuple[_Stack, _Stack]:
    """Gate and up, and down, of the experts of a layer."""
    if isinstance(experts, Experts):
        weights = (experts.gate_up_proj, experts.down_proj)
        dense: tuple[_Stack, _Stack] = kept.of(*weights, make=lambda *both: tuple(map(_dense, both)))
        return dense
    assert isinstance(experts, PackedExperts)
    upper, lower = stacks_of(experts, kernels=True)
    if experts.compiled() is None:
        return upper, lower
    views = [[cast(Panels, one).matrix for one in three] for three in experts.matrices()]
    return _Matrices(upper.shape, [three[:2] for three in views]), _Matrices(
        lower.shape, [three[2:] for three in views]
    )


class AdaptedLayer(CompiledLayer):
    """A ``CompiledLayer`` in the place of another; ``pairs`` by the number of the adapter. Without rows that have one
    of these it does what the other did."""

    def __init__(self, layer: CompiledLayer, pairs: Mapping[int, LayerPairs], rows: Rows) -> None:
        nn.Module.__init__(self)
        self.input_layernorm, self.self_attn = layer.input_layernorm, layer.self_attn
        self.post_attention_layernorm, self.mlp = layer.post_attention_layernorm, layer.mlp
        self._kept, self._own_kept = layer._kept, DenseView()
        self._pairs, self._rows = pairs, rows

    def forward(self, x_TD: Tensor, angles: tuple[Tensor, Tensor], context: Context) -> tuple[Tensor, ops.Route]:
        """As in ``CompiledLayer``."""
        groups = [(self._pairs[number], index) for number, index in self._rows.groups if number in self._pairs]
        if not groups:
            return super().forward(x_TD, angles, context)
        x_TD = x_TD.detach().to(torch.float32).contiguous()
        qkv = self._project(x_TD)
        attention = self.self_attn
        queries = attention.heads * attention.head_dim
        keys = (qkv.shape[1] - queries) // 2
        for pairs, index in groups:
            if not pairs.pairs.keys().isdisjoint("qkv"):
                normed_ND = self.input_layernorm(x_TD[index])
                for target, part in zip("qkv", torch.split(qkv, [queries, keys, keys], -1), strict=True):
                    _add(pairs, target, normed_ND, part, index)
        attended = self._attend(qkv, angles, context)
        x_TD = self._output(attended, x_TD)
        for pairs, index in groups:
            if "o" in pairs.pairs:
                _add(pairs, "o", attended[index], x_TD, index)
        return self._mixed(x_TD, [group for group in groups if group[0].mixes])

    def _mixed(self, x_TD: Tensor, groups: Sequence[_Group]) -> tuple[Tensor, ops.Route]:
        """As ``_mixture``, for rows of which some have an adapter that has a part in it."""
        if not groups:
            return self._mixture(x_TD)
        index = torch.cat([rows for _, rows in groups])
        out_ND, route = self._own_mixture(x_TD[index], groups)
        others = torch.ones(len(x_TD), dtype=torch.bool).index_fill_(0, index, False).nonzero()[:, 0]
        made = [(index, (out_ND, *route))]
        if len(others):
            rest_ND, rest = self._mixture(x_TD[others])
            made.append((others, (rest_ND, *rest)))
        whole = [part.new_empty((len(x_TD), *part.shape[1:])) for part in made[0][1]]
        for rows, parts in made:
            for target, part in zip(whole, parts, strict=True):
                target[rows] = part
        return whole[0], ops.Route(*whole[1:])

    def _own_mixture(self, x_ND: Tensor, groups: Sequence[_Group]) -> tuple[Tensor, ops.Route]:
        """Router and experts for the rows of all groups, one group after the other."""
        normed_ND = self.post_attention_layernorm(x_ND)
        ends = [0]
        for _, rows in groups:
            ends.append(ends[-1] + len(rows))
        router = self.mlp.gate
        weight_ED = [dense_matrix(router.weight.float())]
        logits_NE = multiply(normed_ND, weight_ED, torch.empty((len(x_ND), len(router.weight))))
        for place, (pairs, _) in enumerate(groups):
            some = slice(ends[place], ends[place + 1])
            if "router" in pairs.pairs:
                logits_NE[some] += pairs.pairs["router"](normed_ND[some])
        route = ops.choose(logits_NE, router.per_token)
        out_NAD = x_ND.new_empty((*route.picks_TA.shape, x_ND.shape[1]))
        starts, stacks = torch.tensor(ends), _stacks(self.mlp.experts, self._own_kept)
        for expert in range(len(router.weight)):
            rows, places = (route.picks_TA == expert).nonzero(as_tuple=True)
            if len(rows):
                bounds = torch.searchsorted(rows, starts).tolist()
                out_NAD[rows, places] = _expert(stacks, expert, normed_ND[rows], groups, bounds)
        total_ND = out_NAD[:, 0] * route.weights_TA[:, :1]
        for choice in range(1, router.per_token):
            total_ND += out_NAD[:, choice] * route.weights_TA[:, choice : choice + 1]
        return x_ND + total_ND, route


def _expert(
    stacks: tuple[_Stack, _Stack], expert: int, x_ND: Tensor, groups: Sequence[_Group], bounds: Sequence[int]
) -> Tensor:
    """What an expert makes of rows that are sorted by group: those of group g are ``bounds[g] .. bounds[g + 1]``."""
    for stack, target in zip(stacks, EXPERTS, strict=True):
        if target == "down":
            x_ND = swiglu(x_ND)
        found_NO = torch.empty((len(x_ND), stack.shape[1]))
        stack.multiply(expert, x_ND, found_NO)
        for place, (pairs, _) in enumerate(groups):
            some = slice(bounds[place], bounds[place + 1])
            if target in pairs.experts and some.start < some.stop:
                found_NO[some] += pairs.experts[target][expert](x_ND[some])
        x_ND = found_NO
    return x_ND


def _add(pairs: LayerPairs, target: str, x_NI: Tensor, out_TO: Tensor, index: Tensor) -> None:
    """Add what a pair makes of some rows to these."""
    if target in pairs.pairs:
        out_TO.index_add_(0, index, pairs.pairs[target](x_NI))

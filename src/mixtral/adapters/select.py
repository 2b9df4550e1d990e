"""Expert-specialised fine-tuning (ESFT, arXiv 2407.01906): score the experts on own data, train those that matter.

L layers, E experts, A experts per token. The paper's models have 64 small experts per layer and Mixtral has 8 large
ones, so a comparison with the same number of random experts (``random_like``) belongs to every result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from mixtral import ops
from mixtral.adapters.attached import Attached, check_layers
from mixtral.errors import ConfigError
from mixtral.model.batch import Batch
from mixtral.model.documents import Documents
from mixtral.model.mixtral import Mixtral
from mixtral.model.moe import Experts

__all__ = [
    "Chosen",
    "ChosenExperts",
    "ExpertScores",
    "Selection",
    "attach_experts",
    "check_share",
    "choose",
    "random_like",
    "score_documents",
    "score_experts",
]


@dataclass(frozen=True, slots=True)
class Selection:
    """The experts that are trained: of every layer, their numbers in ascending order."""

    experts: tuple[tuple[int, ...], ...]

    @classmethod
    def from_lists(cls, value: object) -> Selection:
        """The selection that a list of lists of numbers is, as JSON has it.

        Raises:
            ConfigError: it is no such list.
        """
        layers = list(value) if isinstance(value, list | tuple) else [value]
        found = []
        for one in layers:
            numbers = [expert for expert in one if type(expert) is int] if isinstance(one, list | tuple) else []
            if not isinstance(one, list | tuple) or len(numbers) != len(one):
                raise ConfigError(
                    f"experts are {value!s:.80}; expected a list of numbers for every layer", param="experts"
                )
            found.append(tuple(sorted(numbers)))
        return cls(tuple(found))


class ExpertScores:
    """Sums over tokens, from which the scores of all experts follow."""

    def __init__(self) -> None:
        self._counts_LE: Tensor | None = None
        self._gates_LE: Tensor | None = None
        self._tokens = 0.0

    def add(self, routes: Sequence[ops.Route], mask_T: Tensor | None = None) -> None:
        """Add the routing of a batch in all layers; tokens whose mask is 0 do not count."""
        counts, gates, tokens = [], [], 0.0
        for route in routes:
            mask = torch.ones(len(route.picks_TA)) if mask_T is None else mask_T.detach().cpu()
            mask, tokens = mask.double(), float(mask.sum())
            picks, count = route.picks_TA.detach().cpu(), route.logits_TE.shape[-1]
            weights = route.weights_TA.detach().cpu().double() * mask[:, None]
            zeros, flat = torch.zeros(count, dtype=torch.float64), picks.reshape(-1)
            counts.append(zeros.index_add(0, flat, mask.repeat_interleave(picks.shape[1]) / picks.shape[1]))
            gates.append(zeros.index_add(0, flat, weights.reshape(-1)))
        self._counts_LE = torch.stack(counts) if self._counts_LE is None else self._counts_LE + torch.stack(counts)
        self._gates_LE = torch.stack(gates) if self._gates_LE is None else self._gates_LE + torch.stack(gates)
        self._tokens += tokens

    def scores(self, kind: str) -> Tensor:
        """float64 [L, E]; every layer sums to 1.

        "token": the share of the choices that fell on an expert, ``1 / (A n) sum_t [e chosen by t]``. "gate": the mean
        weight of an expert, ``1 / n sum_t g_te``, where the weights of a token's A experts sum to 1.

        Raises:
            ConfigError: the kind is unknown, or no tokens were counted.
        """
        if kind not in ("token", "gate"):
            raise ConfigError(f"kind is {kind!r}; expected 'token' or 'gate'", param="kind")
        found = self._counts_LE if kind == "token" else self._gates_LE
        if found is None or not self._tokens:
            raise ConfigError("no tokens were counted; experts are scored on data")
        return found / self._tokens


@torch.no_grad()
def score_experts(model: Mixtral, batches: Iterable[Batch]) -> ExpertScores:
    """Run the model over batches and count; about 32 sequences of 4,096 tokens are enough for the paper."""
    found = ExpertScores()
    for batch in batches:
        found.add(model(batch).routes)
    return found


def score_documents(model: Mixtral, documents: Iterable[Sequence[int]]) -> ExpertScores:
    """As ``score_experts``, on token ids of documents that do not see each other."""
    contexts = ((ids, Documents([len(ids)], device=model.device)) for ids in documents)
    return score_experts(
        model,
        (Batch(torch.tensor(ids, device=model.device), context.positions_T, context) for ids, context in contexts),
    )


def check_share(share: float) -> None:
    """Refuse what is no share.

    Raises:
        ConfigError: it is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"share is {share!r}; expected above 0 and at most 1", param="share")


def choose(scores_LE: Tensor, share: float) -> Selection:
    """Of every layer the fewest experts whose scores sum to ``share`` or more, highest first, ties to the lower number.

    Raises:
        ConfigError: the share is not above 0 and at most 1, or the scores of a layer do not sum to 1.
    """
    check_share(share)
    off = (scores_LE.sum(-1) - 1).abs()
    if scores_LE.dim() != 2 or not bool((off < 1e-6).all()):
        raise ConfigError("the scores of a layer do not sum to 1; normalise them over the experts, not over the layers")
    chosen = []
    for scores_E in scores_LE:
        order = torch.sort(scores_E, descending=True, stable=True).indices
        sums = scores_E[order].cumsum(0)
        count = min(int((sums < share - 1e-9).sum()) + 1, len(order))
        chosen.append(tuple(sorted(order[:count].tolist())))
    return Selection(tuple(chosen))


def random_like(selection: Selection, experts: int, seed: int) -> Selection:
    """As many experts per layer, drawn at random: the control."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(experts, generator=generator)[: len(layer)].tolist() for layer in selection.experts]
    return Selection(tuple(tuple(sorted(layer)) for layer in drawn))


class ChosenExperts(nn.Module):
    """``Experts`` of which some are trained. Their parameters are views of the stacked ones: a step of an optimizer
    changes the model itself, and no other expert."""

    def __init__(self, base: Experts, chosen: Sequence[int]) -> None:
        super().__init__()
        self.base, self.chosen = base, tuple(chosen)
        for expert in self.chosen:
            self.register_parameter(f"gate_up_{expert}", nn.Parameter(base.gate_up_proj.detach()[expert]))
            self.register_parameter(f"down_{expert}", nn.Parameter(base.down_proj.detach()[expert]))

    def forward(self, x_TD: Tensor, route: ops.Route) -> Tensor:
        """As in ``Experts``; gradients are computed for the chosen ones alone."""
        slices = {
            expert: (self.get_parameter(f"gate_up_{expert}"), self.get_parameter(f"down_{expert}"))
            for expert in self.chosen
        }
        base = self.base
        return ops.experts(x_TD, route.picks_TA, route.weights_TA, base.gate_up_proj, base.down_proj, slices=slices)


class Chosen(Attached):
    """What ``attach_experts`` put into a model. After ``detach`` the model is a plain one with the trained values."""

    def disabled(self) -> NoReturn:
        """Refused: the experts are trained in place, and their old values are gone.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "chosen experts are trained in place, so there is no base to go back to; compute what the reference is "
            "needed for before the training"
        )


def attach_experts(model: Mixtral, selection: Selection) -> Chosen:
    """Make the selected experts trainable and freeze everything else. Gradients and whatever an optimizer keeps then
    exist for these alone, and all others stay as they are, bit for bit.

    Raises:
        ConfigError: the selection does not fit the model, is empty, or the model is on compiled kernels, packed or
            adapted.
    """
    check_layers(model)
    if len(selection.experts) != model.config.num_hidden_layers or not any(selection.experts):
        raise ConfigError(
            f"the selection has {len(selection.experts)} layers and {sum(map(len, selection.experts))} experts; the "
            f"model has {model.config.num_hidden_layers} layers, and at least one expert must be trained"
        )
    names = [f"model.layers.{number}.mlp.experts" for number in range(len(selection.experts))]
    for name, chosen in zip(names, selection.experts, strict=True):
        base = model.get_submodule(name)
        if type(base) is not Experts:
            raise ConfigError(
                f"{name} is a {type(base).__name__}; only dense experts can be trained in place. Load the model with "
                "decode=True, or train a LoRA adapter over packed ones"
            )
        if len(set(chosen)) != len(chosen) or not all(0 <= e < model.config.num_local_experts for e in chosen):
            raise ConfigError(
                f"{name}: experts {chosen} were selected; expected some of 0 to {len(base.down_proj) - 1}"
            )
    attached = Chosen(model)
    for name, chosen in zip(names, selection.experts, strict=True):
        base = model.get_submodule(name)
        if chosen and isinstance(base, Experts):
            attached.replace(name, ChosenExperts(base, chosen))
            attached.names += [f"{name}.{part}_{expert}" for expert in chosen for part in ("gate_up", "down")]
    return attached

"""ESFT: scores that sum to 1 per layer, the smallest sufficient sets, and training that touches no other expert."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtral import ops
from mixtral.adapters import LoraConfig, Selection, attach, attach_experts, choose, random_like, score_experts
from mixtral.adapters.select import ExpertScores
from mixtral.config import MixtralConfig
from mixtral.errors import ConfigError
from mixtral.model import Batch, Documents, Mixtral
from mixtral.ops import head_cross_entropy


def batch_of(config: MixtralConfig, seed: int, count: int = 70) -> Batch:
    ids = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed))
    context = Documents([count])
    return Batch(ids, context.positions_T, context)


def loss_of(model: Mixtral, batch: Batch) -> Tensor:
    hidden = model(batch).hidden_TD
    weights = torch.full((len(hidden),), 1 / len(hidden))
    return head_cross_entropy(hidden, model.lm_head.weight, batch.tokens_T.roll(-1), weights)[0]


def route_of(picks: list[list[int]], weights: list[list[float]], experts: int = 4) -> ops.Route:
    return ops.Route(torch.zeros(len(picks), experts), torch.tensor(picks), torch.tensor(weights))


def test_scores_by_hand() -> None:
    found = ExpertScores()
    found.add([route_of([[0, 1], [1, 2]], [[0.75, 0.25], [0.5, 0.5]]), route_of([[3, 1]] * 2, [[0.9, 0.1]] * 2)])
    found.add([route_of([[0, 3]], [[1.0, 0.0]]), route_of([[0, 1]], [[0.5, 0.5]])], torch.tensor([1]))
    found.add([route_of([[2, 3]], [[0.5, 0.5]])] * 2, torch.tensor([0]))  # padding
    expected = torch.tensor([[2, 2, 1, 1], [1, 3, 0, 2]]) / 6
    torch.testing.assert_close(found.scores("token"), expected.double())
    expected = torch.tensor([[1.75, 0.75, 0.5, 0.0], [0.5, 0.7, 0.0, 1.8]]) / 3
    torch.testing.assert_close(found.scores("gate"), expected.double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["token", "gate"])
def test_scores_of_a_model_sum_to_one_per_layer(tiny_model: Mixtral, kind: str) -> None:
    """And they are those of all tokens, however these are divided into batches."""
    batches = [batch_of(tiny_model.config, seed) for seed in range(3)]
    scores = score_experts(tiny_model, batches).scores(kind)
    assert scores.shape == (2, 4)
    torch.testing.assert_close(scores.sum(1), torch.ones(2, dtype=torch.float64))
    assert (scores.sum(0) - 1).abs().max() > 0.01  # over layers they do not
    one = torch.stack([score_experts(tiny_model, [batch]).scores(kind) for batch in batches])  # type: ignore[arg-type]
    torch.testing.assert_close(scores, one.mean(0))


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.2, ((1,), (0,))),
        (0.4, ((1,), (0, 1))),
        (0.5, ((1, 3), (0, 1))),
        (0.7, ((1, 3), (0, 1, 2))),
        (0.71, ((0, 1, 3), (0, 1, 2))),
        (1.0, ((0, 1, 2, 3), (0, 1, 2, 3))),
    ],
)
def test_the_smallest_set_that_suffices(share: float, expected: tuple[tuple[int, ...], ...]) -> None:
    scores = torch.tensor([[0.2, 0.4, 0.1, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    assert choose(scores, share) == Selection(expected)


def test_scores_that_are_normalised_over_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not sum to 1"):
        choose(torch.tensor([[0.5, 0.1], [0.5, 0.9]]), 0.5)
    for share in (0.0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            choose(torch.full((2, 4), 0.25), share)
    with pytest.raises(ConfigError, match="no tokens"):
        ExpertScores().scores("token")
    with pytest.raises(ConfigError, match="kind"):
        ExpertScores().scores("other")


def test_a_selection_as_json() -> None:
    assert Selection.from_lists([[3, 1], []]) == Selection(((1, 3), ()))
    for wrong in (None, [1], [["1"]], [[True]], {"experts": []}):
        with pytest.raises(ConfigError, match="list of numbers"):
            Selection.from_lists(wrong)


def test_the_random_control_has_as_many(tiny_config: MixtralConfig) -> None:
    selection = Selection(((1,), (0, 2, 3)))
    controls = [random_like(selection, 4, seed) for seed in range(20)]
    assert {tuple(map(len, control.experts)) for control in controls} == {(1, 3)}
    assert len(set(controls)) > 3
    assert controls[3] == random_like(selection, 4, 3)


def test_training_touches_the_selected_slices_alone(tiny_model: Mixtral) -> None:
    """Gradients and optimizer state exist for these; every other number of the model keeps its bits under decay."""
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    selection = Selection(((1,), (0, 2)))
    attached = attach_experts(tiny_model, selection)
    rows = {row.name: row for row in attached.table()}
    assert rows.keys() == {
        *("model.layers.0.mlp.experts.gate_up_1", "model.layers.0.mlp.experts.down_1"),
        *(f"model.layers.1.mlp.experts.{part}_{expert}" for part in ("gate_up", "down") for expert in (0, 2)),
    }
    assert sum(row.numbers for row in rows.values()) == 3 * 3 * 64 * 96
    optimizer = torch.optim.AdamW(attached.parameters(), lr=1e-2, weight_decay=0.5)
    losses = []
    for _ in range(4):
        loss = loss_of(tiny_model, batch_of(tiny_model.config, 0))
        optimizer.zero_grad()
        loss.backward()
        assert {name for name, p in tiny_model.named_parameters() if p.grad is not None} == rows.keys()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert kept == 2 * sum(row.numbers for row in rows.values())
    attached.detach()
    after = tiny_model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        if ".experts." not in name:
            assert torch.equal(after[name], value), name
            continue
        layer = int(name.split(".")[2])
        for expert in range(4):
            same = torch.equal(after[name][expert], value[expert])
            assert same == (expert not in selection.experts[layer]), (name, expert)


def test_gradients_are_those_of_full_training(tiny_model: Mixtral) -> None:
    batch = batch_of(tiny_model.config, 1)
    loss_of(tiny_model, batch).backward()
    full = {name: value.grad for name, value in tiny_model.named_parameters() if value.grad is not None}
    tiny_model.zero_grad()
    attached = attach_experts(tiny_model, Selection(((3, 0), (2,))))
    loss_of(tiny_model, batch).backward()
    for name, parameter in attached.named_parameters():
        module, _, leaf = name.rpartition(".")
        part, expert = leaf.rsplit("_", 1)
        expected = full[f"{module}.{part}_proj"][int(expert)]
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-4)


def test_what_does_not_fit_is_refused(tiny_model: Mixtral) -> None:
    for experts in (((0,),), ((), ()), ((0,), (4,)), ((0, 0), (1,))):
        with pytest.raises(ConfigError):
            attach_experts(tiny_model, Selection(experts))
    attached = attach_experts(tiny_model, Selection(((0,), ())))
    with pytest.raises(ConfigError, match="no base to go back to"):
        attached.disabled()
    attached.detach()
    adapter = attach(tiny_model, LoraConfig(rank=2))
    with pytest.raises(ConfigError, match="only dense experts"):
        attach_experts(tiny_model, Selection(((0,), (1,))))
    adapter.detach()
    attach_experts(tiny_model, Selection(((0,), (1,))))

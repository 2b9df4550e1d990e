"""Float32 master weights under Muon (matrices) and AdamW (embeddings, head, norms, routers), with clipping.

The model computes in its own dtype; after every step its parameters are the masters, rounded. Adapters, and everything
where the configuration says so, are under AdamW alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from mixtral.parallel.matrices import Matrices
from mixtral.parallel.mesh import Mesh, alone
from mixtral.parallel.shards import Shards, local_part
from mixtral.train.config import OptimConfig

__all__ = ["ADAM_BETAS", "ADAM_EPS", "MUON_MOMENTUM", "NormGuard", "Optimizer", "learning_rate", "orthogonalise"]

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8
MUON_MOMENTUM = 0.95
# Quintic Newton-Schulz coefficients of Muon (K. Jordan, 2024, an optimizer for hidden layers in neural networks).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Warm-up, then the schedule (see ``OptimConfig``) to the end of ``steps``; ``step`` counts from 0."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.learning_rate * warmup * _decay(config, step, steps)


def _decay(config: OptimConfig, step: int, steps: int) -> float:
    if config.schedule == "wsd":
        decay_steps = config.decay_fraction * steps
        return min(1.0, (steps - step) / decay_steps) if decay_steps else 1.0
    if config.schedule == "constant":
        return 1.0
    begin = min(config.warmup_steps, steps - 1)
    done = max(0.0, (step - begin) / (steps - begin))
    return 1.0 - done if config.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


class NormGuard:
    """The longest gradient that a step may have: ``factor`` times the median of the last ones, once there are enough.

    Norms of skipped steps count too, so that text of another kind, with longer gradients, is not skipped for ever.
    """

    WINDOW, FEWEST = 100, 20

    def __init__(self, factor: float, norms: Sequence[float] = (), skipped: int = 0) -> None:
        self.factor, self.norms, self.skipped = factor, list(norms)[-self.WINDOW :], skipped

    def limit(self) -> float:
        """Infinite while there are too few norms to compare with, and if ``factor`` is 0."""
        if not self.factor or len(self.norms) < self.FEWEST:
            return math.inf
        return self.factor * statistics.median(self.norms)

    def note(self, norm: float, *, skipped: bool) -> None:
        """Take in the norm of a step."""
        self.norms = [*self.norms, norm][-self.WINDOW :]
        self.skipped += skipped


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring all singular values of every matrix [..., M, N] near 1: five Newton-Schulz steps in bfloat16."""
    x = matrices.to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    a, b, c = _QUINTIC
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return (x.mT if tall else x).float()


def _is_matrix(name: str) -> bool:
    """Whether Muon updates this parameter."""
    return any(part in name for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"))


class Optimizer:
    """Masters and moments of a model. ``state()`` and ``load()`` move all of it; ``step()`` is deterministic.

    ``model`` may also be the parameters to train, by name: those of an adapter, in any model. ``masters`` are exact
    starting values, float32, where the parameters are only their roundings; they are taken out of it one at a time, so
    that they are not all in memory twice. With ``shards`` everything is about this
    rank's parts of the parameters, and ``step()`` is called by all ranks together.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        config: OptimConfig,
        masters: MutableMapping[str, Tensor] | None = None,
        shards: Shards | None = None,
    ) -> None:
        self.config, self.shards = config, shards
        named = model.named_parameters() if isinstance(model, nn.Module) else model.items()
        self.parameters: Mapping[str, nn.Parameter] = dict(named) if shards is None else shards.parts
        self.parts = {name: local_part(parameter) for name, parameter in self.parameters.items()}
        self.uses_muon = isinstance(model, nn.Module) and config.optimizer == "muon"
        self._matrices = {name for name in self.parameters if self.uses_muon and _is_matrix(name)}
        whole = {n: tuple(self.parameters[n].shape) for n in self._matrices} if shards is None else shards.shapes
        mesh = alone() if shards is None else shards.mesh
        self._muon_matrices = Matrices([n for n in self.parameters if n in self._matrices], whole, mesh)
        given = {} if masters is None else masters
        is_rounded = bool(given)
        # Parts are float32: they are their own masters, unless averaged weights are to take their places for a while.
        same = shards is not None and not config.ema
        self.masters = (
            self.parts
            if same
            else {n: given.pop(n, p).to(p.device, torch.float32, copy=True) for n, p in self.parts.items()}
        )
        self._grads: dict[str, Tensor] = {}
        self._first = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self._second = {n: torch.zeros_like(m) for n, m in self.masters.items() if n not in self._matrices}
        self._average = {name: master.clone() for name, master in self.masters.items()} if config.ema else {}
        self.steps = 0
        if is_rounded:
            self.refresh()

    def accumulate(self) -> None:
        """Add the parameters' gradients to the float32 sums, and drop them."""
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            grad = local_part(parameter.grad).float()
            self._grads[name] = self._grads[name].add_(grad) if name in self._grads else grad
            parameter.grad = None

    def add_ranks(self, mesh: Mesh) -> None:
        """Make the gradients those of all ranks, where each of them has the whole model.

        A rank has no gradient of an expert that none of its tokens chose.
        """
        if mesh.is_alone or self.shards is not None:
            return
        found = mesh.sum(torch.tensor([int(name in self._grads) for name in self.parameters])).tolist()
        names = [name for name, ranks in zip(self.parameters, found, strict=True) if ranks]
        grads = {
            name: self._grads[name] if name in self._grads else torch.zeros_like(self.masters[name]) for name in names
        }
        self._grads = {name: mesh.sum(grad) for name, grad in grads.items()}

    def drop_gradients(self) -> None:
        """Forget the gradients that were added up for a step that is not to be."""
        self._grads = {}

    @torch.no_grad()
    def step(self, rate: float, limit: float = math.inf) -> float:
        """Update the masters from the summed gradients and the model from the masters; the norm before clipping.

        A norm that is not finite, or above ``limit``, changes nothing. The gradients are dropped in any case.
        """
        norm = self._norm()
        scale = min(1.0, self.config.clip_norm / (norm + 1e-12)) if math.isfinite(norm) and norm <= limit else 0.0
        if scale:
            self.steps += 1
            for batch in self._muon_matrices.batches():
                wanted = {
                    name: self._momentum(name, self._grads[name] * scale) for name in batch if name in self._grads
                }
                for name, update in self._muon_matrices.apply(orthogonalise, wanted).items():
                    self._change(name, update.mul_(self._factor(name)), rate)
            self._adam([name for name in self._grads if name not in self._matrices], rate, scale)
            # Short runs would otherwise average mostly the weights they began with.
            decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
            for name, average in self._average.items():
                average.lerp_(self.masters[name], 1 - decay)
        self.drop_gradients()
        self.refresh()
        return norm

    def _norm(self) -> float:
        """The length of the whole gradient."""
        if self.shards is None:
            return math.sqrt(sum(float(grad.square().sum()) for grad in self._grads.values()))
        self.shards.add_replicas(self._grads)
        return self.shards.norm(self._grads)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has the averaged weights inside of this, and its own again afterwards."""
        with torch.no_grad():
            self._write(self._average)
        try:
            yield
        finally:
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters into the model's parameters."""
        self._write(self.masters)

    def _write(self, values: Mapping[str, Tensor]) -> None:
        if self.shards is not None:
            self.shards.forget_whole()
        for name, value in values.items():
            self.parts[name].copy_(value)

    def _change(self, name: str, update: Tensor, rate: float) -> None:
        self.masters[name].mul_(1 - rate * self.config.weight_decay).sub_(update, alpha=rate)

    def _momentum(self, name: str, grad: Tensor) -> Tensor:
        momentum = self._first[name].mul_(MUON_MOMENTUM).add_(grad)
        return grad.add(momentum, alpha=MUON_MOMENTUM)

    def _factor(self, name: str) -> float:
        # Makes one learning rate serve both optimizers (Moonlight, arXiv 2502.16982, section 2.2).
        return 0.2 * math.sqrt(max(self._muon_matrices.size(name)))

    def _adam(self, names: Sequence[str], rate: float, scale: float) -> None:
        """AdamW for some parameters, one pass over memory for each; norms do not decay."""
        for is_norm in (False, True):
            some = [name for name in names if name.endswith("norm.weight") == is_norm]
            if not some:
                continue
            grads = [self._grads[name].mul_(scale) for name in some]
            adamw(
                [self.masters[name] for name in some],
                grads,
                [self._first[name] for name in some],
                [self._second[name] for name in some],
                [],
                [torch.full((), self.steps - 1.0, device=grad.device) for grad in grads],
                fused=True,
                amsgrad=False,
                beta1=ADAM_BETAS[0],
                beta2=ADAM_BETAS[1],
                lr=rate,
                weight_decay=0.0 if is_norm else self.config.weight_decay,
                eps=ADAM_EPS,
                maximize=False,
            )

    def state(self) -> dict[str, Tensor]:
        """Everything that continues a run, by name; the tensors themselves, not copies."""
        return {
            **{f"master.{name}": value for name, value in self.masters.items()},
            **{f"first.{name}": value for name, value in self._first.items()},
            **{f"second.{name}": value for name, value in self._second.items()},
            **{f"average.{name}": value for name, value in self._average.items()},
            "steps": torch.tensor([self.steps], dtype=torch.int64),
        }

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of the same model.

        Raises:
            ValueError: names or shapes are not those of this model.
        """
        own = self.state()
        wrong = [name for name in own.keys() | state.keys() if name not in own or name not in state]
        wrong += [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"the state does not fit the model at {min(wrong)!r}")
        for name, value in own.items():
            value.copy_(state[name])
        self.steps = int(state["steps"])
        self.refresh()

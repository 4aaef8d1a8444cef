"""An edit and its schedule, worked out for every step of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit, Target, coefficients
from .schedule import TauSchedule


@dataclass(frozen=True, eq=False)
class CrossStep:
    """Cross-attention at one step, for N targets and conditionings of t tokens.

    moved: M diag(from_source), (N, t, t), or None where no target takes anything from the source.
    own: (N, t), or None where no target keeps anything of its own.
    weight: of the general window; for tokens that other nodes append inside the attention of both branches.
    """

    moved: Tensor | None
    own: Tensor | None
    weight: float


@dataclass(frozen=True, eq=False)
class Plan:
    """All that attention needs to know of an edit; one entry per step of the run.

    cross: None where cross-attention is left alone. self_: weight of the source's self-attention, 0 to 1.
    """

    cross: tuple[CrossStep | None, ...]
    self_: tuple[float, ...]


def conditioning_length(edit: Edit) -> int:
    """Tokens of the paired conditioning: the least common multiple of the prompts' own lengths."""
    return math.lcm(edit.source.prompt.length, *(target.prompt.length for target in edit.targets))


def make_plan(
    edit: Edit, tau: TauSchedule, steps: int, length: int, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Work out the plan for `steps` steps, on the device and in the dtype of the attention's values.

    length: tokens of the conditioning, at least `conditioning_length(edit)`. Each prompt was repeated up to
    that multiple. Tokens beyond it were appended to both branches alike by a later node, so they are shared.
    """
    common = conditioning_length(edit)
    if length < common:
        raise ValueError(f"The conditioning has {length} tokens, but the prompts of the edit need {common}.")
    mapping = torch.stack([_tiled_mapping(edit, target, common, length) for target in edit.targets])
    made: dict[tuple[bytes, bytes], CrossStep | None] = {}
    cross = []
    for step in range(steps):
        progress = step / steps
        table = [_tiled_coefficients(target, tau, progress, common, length) for target in edit.targets]
        from_source, own = (torch.stack(column) for column in zip(*table, strict=True))
        key = (from_source.numpy().tobytes(), own.numpy().tobytes())
        if key not in made:
            weight = tau.cross.weight(progress, tau.fade)
            made[key] = _cross_step(mapping, from_source, own, weight, device, dtype)
        cross.append(made[key])
    return Plan(tuple(cross), tuple(tau.self_weight(step / steps) for step in range(steps)))


def _cross_step(
    mapping: Tensor, from_source: Tensor, own: Tensor, weight: float, device: torch.device, dtype: torch.dtype
) -> CrossStep | None:
    if not from_source.any() and (own == 1.0).all():
        return None
    moved = (mapping * from_source[:, None, :]).to(dtype).to(device) if from_source.any() else None
    return CrossStep(moved, own.to(dtype).to(device) if own.any() else None, weight)


def _tiled_mapping(edit: Edit, target: Target, common: int, length: int) -> Tensor:
    """M for repeated prompts: each source copy gives its share, each of r target copies takes 1/r."""
    rows, columns = common // edit.source.prompt.length, common // target.prompt.length
    tiled = target.mapping.double().repeat(rows, columns) / columns
    mapping = F.pad(tiled, (0, length - common, 0, length - common))
    mapping[range(common, length), range(common, length)] = 1.0
    return mapping


def _tiled_coefficients(
    target: Target, tau: TauSchedule, progress: float, common: int, length: int
) -> tuple[Tensor, Tensor]:
    from_source, own = coefficients(target, tau.cross_weights(target, progress))
    columns = common // target.prompt.length
    weight = tau.cross.weight(progress, tau.fade)
    return (
        F.pad(from_source.repeat(columns), (0, length - common), value=weight),
        F.pad(own.repeat(columns), (0, length - common), value=1.0 - weight),
    )

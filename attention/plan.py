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
    weight: (N,), of the general window; for tokens that other nodes append inside the attention of both
        branches.
    """

    moved: Tensor | None
    own: Tensor | None
    weight: Tensor

    def by_row(self, branch: Tensor) -> CrossStep:
        """With an entry for each row that is a target's, in place of one for each target.

        branch: (r,) the number of each row's target.
        """

        def rows(table: Tensor) -> Tensor:
            return table.index_select(0, branch)

        return CrossStep(
            None if self.moved is None else rows(self.moved),
            None if self.own is None else rows(self.own),
            rows(self.weight),
        )


@dataclass(frozen=True, eq=False)
class Plan:
    """All that attention needs to know of an edit; one entry per step of the run.

    cross: None where cross-attention is left alone.
    self_: weight of the source's self-attention for each target, 0 to 1.
    """

    cross: tuple[CrossStep | None, ...]
    self_: tuple[tuple[float, ...], ...]


def check_words(edit: Edit, tau: TauSchedule) -> None:
    """Raise WordNotFound for a word with a window of its own that is in none of the targets."""
    for phrase, _ in tau.words:
        edit.find(phrase, range(1, edit.branches), asked="words")


def cross_weights(target: Target, tau: TauSchedule, progress: float) -> Tensor:
    """Weight of the cross-attention window for each token of the target, (t,) float64 from 0 to 1."""
    weights = torch.full((target.prompt.length,), tau.cross.weight(progress, tau.fade), dtype=torch.float64)
    for phrase, window in tau.words:
        if target.prompt.contains(phrase):
            weights[list(target.prompt.find(phrase))] = window.weight(progress, tau.fade)
    return weights


def conditioning_length(edit: Edit) -> int:
    """Tokens of the paired conditioning: the least common multiple of the prompts' own lengths."""
    return math.lcm(*(prompt.length for prompt in edit.prompts))


def make_plan(
    edit: Edit, tau: TauSchedule, steps: int, length: int, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Work out the plan for `steps` steps, on the device and in the dtype of the attention's values.

    tau: for the targets that have no schedule of their own.
    length: tokens of the conditioning, at least `conditioning_length(edit)`. Each prompt was repeated up to
    that multiple. Tokens beyond it were appended to both branches alike by a later node, so they are shared.
    """
    common = conditioning_length(edit)
    if length < common:
        raise ValueError(f"The conditioning has {length} tokens, but the prompts of the edit need {common}.")
    mapping = torch.stack([_tiled_mapping(edit, target, common, length) for target in edit.targets])
    schedules = [target.tau or tau for target in edit.targets]
    made: dict[tuple[bytes, ...], CrossStep | None] = {}
    cross = []
    for step in range(steps):
        progress = step / steps
        table = [
            _tiled_coefficients(target, schedule, progress, common, length)
            for target, schedule in zip(edit.targets, schedules, strict=True)
        ]
        from_source, own = (torch.stack(column) for column in zip(*table, strict=True))
        weight = torch.tensor(
            [schedule.cross.weight(progress, schedule.fade) for schedule in schedules], dtype=torch.float64
        )
        key = tuple(part.numpy().tobytes() for part in (from_source, own, weight))
        if key not in made:
            made[key] = _cross_step(mapping, from_source, own, weight, device, dtype)
        cross.append(made[key])
    self_ = tuple(
        tuple(schedule.self_weight(step / steps) for schedule in schedules) for step in range(steps)
    )
    return Plan(tuple(cross), self_)


def _cross_step(
    mapping: Tensor,
    from_source: Tensor,
    own: Tensor,
    weight: Tensor,
    device: torch.device,
    dtype: torch.dtype,
) -> CrossStep | None:
    if not from_source.any() and (own == 1.0).all():
        return None
    moved = (mapping * from_source[:, None, :]).to(dtype).to(device) if from_source.any() else None
    return CrossStep(
        moved, own.to(dtype).to(device) if own.any() else None, weight.to(dtype).to(device)
    )


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
    from_source, own = coefficients(target, cross_weights(target, tau, progress))
    columns = common // target.prompt.length
    weight = tau.cross.weight(progress, tau.fade)
    return (
        F.pad(from_source.repeat(columns), (0, length - common), value=weight),
        F.pad(own.repeat(columns), (0, length - common), value=1.0 - weight),
    )

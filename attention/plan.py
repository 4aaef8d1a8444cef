"""An edit and its schedule, worked out for every step of one run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit, Target, coefficients
from .schedule import TauSchedule
from .taken import CrossStep


@dataclass(frozen=True, eq=False)
class Plan:
    """What cross-attention needs to know of an edit; one entry per step of the run.

    cross: None where cross-attention is left alone.
    """

    cross: tuple[CrossStep | None, ...]


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


def make_plan(edit: Edit, tau: TauSchedule, steps: int, length: int) -> Plan:
    """Work out the plan for `steps` steps, in float64 on the CPU.

    tau: for the targets that have no schedule of their own.
    length: tokens of the conditioning, at least `conditioning_length(edit)`. Each prompt was repeated up to
    that multiple. Tokens beyond it were appended to both branches alike by a later node, so they are shared.

    Raises ValueError for a shorter conditioning.
    """
    common = conditioning_length(edit)
    if length < common:
        raise ValueError(f"The conditioning has {length} tokens, but the prompts of the edit need {common}.")
    mapping = torch.stack([_tiled_mapping(edit, target, common, length) for target in edit.targets])
    plain = edit.without_gain() if any(bool((t.gain != 1.0).any()) for t in edit.targets) else None
    schedules = [target.tau or tau for target in edit.targets]
    made: dict[tuple[bytes, ...], CrossStep | None] = {}
    cross = []
    for progress in (step / steps for step in range(steps)):
        weight = torch.tensor(
            [schedule.cross.weight(progress, schedule.fade) for schedule in schedules], dtype=torch.float64
        )
        tables = [weight]
        for version in (edit, plain) if plain is not None else (edit,):
            targets = zip(version.targets, schedules, strict=True)
            table = [_tiled_coefficients(*target, progress, common, length) for target in targets]
            tables += [torch.stack(column) for column in zip(*table, strict=True)]
        key = tuple(table.numpy().tobytes() for table in tables)
        if key not in made:
            made[key] = _cross_step(mapping, *tables)
        cross.append(made[key])
    return Plan(tuple(cross))


def _cross_step(
    mapping: Tensor, weight: Tensor, from_source: Tensor, own: Tensor, *unscaled: Tensor
) -> CrossStep | None:
    if not from_source.any() and (own == 1.0).all():
        return None
    plain = None
    if unscaled:
        plain = _cross_step(mapping, weight, *unscaled) or CrossStep(None, torch.ones_like(own), weight)
    moved = mapping * from_source[:, None, :] if from_source.any() else None
    return CrossStep(moved, own if own.any() else None, weight, plain)


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

"""An edit and its schedule, worked out for every step of one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .edit import Edit, Target, coefficients
from .schedule import Progress, TauSchedule
from .taken import CrossStep


@dataclass(frozen=True, eq=False)
class Plan:
    """What cross-attention needs to know of an edit; one entry for each of the run's sigmas.

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


class Layout(Protocol):
    """Where the tokens of the prompts stand in the conditionings that the model is given.

    length: tokens of the conditionings, what fills them up included.
    """

    length: int

    def places(self, branch: int, token: int) -> Sequence[int]:
        """Where a token of a branch's prompt stands, all of its copies."""
        ...

    def mapping(self, target: int) -> Tensor:
        """M of a target, by number, for whole conditionings: (length, length)."""
        ...

    def columns(self, target: int, prompt: Tensor, shared: float, own: float) -> Tensor:
        """(length,) from the numbers of its prompt's tokens.

        shared, own: for tokens that are not the prompt's, and which both branches have, or this one alone.
        """
        ...


class Repeated:
    """Each prompt is repeated up to `conditioning_length(edit)`, for cross-attention without positions.

    length: tokens of the conditioning. Tokens beyond that multiple were appended to both branches alike by a
    later node, so they are shared.
    Raises ValueError for a conditioning that is shorter.
    """

    def __init__(self, edit: Edit, length: int):
        self.edit, self.length, self.common = edit, length, conditioning_length(edit)
        if length < self.common:
            raise ValueError(
                f"The conditioning has {length} tokens, but the prompts of the edit need {self.common}."
            )

    def places(self, branch: int, token: int) -> Sequence[int]:
        return range(token, self.common, self.edit.prompts[branch].length)

    def mapping(self, target: int) -> Tensor:
        """Each source copy gives its share, each of r target copies takes 1/r."""
        mapping = self.edit.targets[target].mapping.double()
        rows, columns = (self.common // size for size in mapping.shape)
        appended = self.length - self.common
        return torch.block_diag(mapping.repeat(rows, columns) / columns, torch.eye(appended).double())

    def columns(self, target: int, prompt: Tensor, shared: float, own: float) -> Tensor:
        repeated = prompt.repeat(self.common // len(prompt))
        return F.pad(repeated, (0, self.length - self.common), value=shared)


class Padded:
    """Each prompt stands once in its conditioning, and shorter conditionings are padded to one length.

    lengths: of each branch's conditioning without padding. length: with it. front: whether padding, and what
    fills a conditioning beside its prompt, stands in front. What a conditioning has beside its prompt is
    shared between branches: token by token where all have as many of it (a later node appended them), by
    position else.
    Raises ValueError for a conditioning that is shorter than its prompt.
    """

    def __init__(self, edit: Edit, lengths: Sequence[int], length: int, front: bool = False):
        self.edit, self.length, self.front = edit, length, front
        own = [prompt.length for prompt in edit.prompts]
        for branch, (tokens, prompt) in enumerate(zip(lengths, own, strict=True)):
            if tokens < prompt:
                raise ValueError(
                    f"The conditioning of branch {branch} has {tokens} tokens, but its prompt has {prompt}."
                )
        self.first = [length - size if front else 0 for size in own]
        self.more = [tokens - prompt for tokens, prompt in zip(lengths, own, strict=True)]

    def places(self, branch: int, token: int) -> Sequence[int]:
        return (self.first[branch] + token,)

    def mapping(self, target: int) -> Tensor:
        mapping = torch.zeros(self.length, self.length, dtype=torch.float64)
        values = self.edit.targets[target].mapping.double()
        source, column = self.first[0], self.first[target + 1]
        mapping[source : source + values.shape[0], column : column + values.shape[1]] = values
        for taker, giver in self._shared(target).items():
            mapping[giver, taker] = 1.0
        return mapping

    def columns(self, target: int, prompt: Tensor, shared: float, own: float) -> Tensor:
        columns = torch.full((self.length,), own, dtype=prompt.dtype)
        columns[self.first[target + 1] :][: len(prompt)] = prompt
        columns[list(self._shared(target))] = shared
        return columns

    def _shared(self, target: int) -> dict[int, int]:
        """The target's tokens that stand beside its prompt -> the source's tokens that are the same."""
        given, taken = self._beside(0), self._beside(target + 1)
        if len(set(self.more)) == 1:
            count = self.more[0]
            pairs = slice(-count if self.front else 0, None if self.front else count)
            return dict(zip(taken[pairs], given[pairs], strict=True)) if count else {}
        return {place: place for place in taken if place in set(given)}

    def _beside(self, branch: int) -> list[int]:
        first = self.first[branch]
        prompt = range(first, first + self.edit.prompts[branch].length)
        return [place for place in range(self.length) if place not in prompt]


def make_plan(edit: Edit, tau: TauSchedule, progress: Progress, layout: Layout) -> Plan:
    """Work out the plan for the steps of a run, in float64 on the CPU.

    tau: for the targets that have no schedule of their own.
    """
    mapping = torch.stack([layout.mapping(n) for n in range(len(edit.targets))])
    plain = edit.without_gain() if any(bool((t.gain != 1.0).any()) for t in edit.targets) else None
    schedules = [target.tau or tau for target in edit.targets]
    made: dict[tuple[bytes, ...], CrossStep | None] = {}
    cross = []
    for reached in zip(*(progress(schedule.measure) for schedule in schedules), strict=True):
        at = list(zip(schedules, reached, strict=True))
        weight = torch.tensor(
            [schedule.cross.weight(now, schedule.fade) for schedule, now in at], dtype=torch.float64
        )
        tables = [weight]
        for version in (edit, plain) if plain is not None else (edit,):
            table = [
                _coefficients(layout, n, target, schedule, now)
                for n, (target, (schedule, now)) in enumerate(zip(version.targets, at, strict=True))
            ]
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
    gain = from_source + own if unscaled else None  # w c m + w c (1 - m) + (1 - w) = w c + (1 - w)
    return CrossStep(moved, own if own.any() else None, weight, plain, gain)


def _coefficients(
    layout: Layout, number: int, target: Target, tau: TauSchedule, progress: float
) -> tuple[Tensor, Tensor]:
    from_source, own = coefficients(target, cross_weights(target, tau, progress))
    weight = tau.cross.weight(progress, tau.fade)
    return (
        layout.columns(number, from_source, weight, 0.0),
        layout.columns(number, own, 1.0 - weight, 1.0),
    )

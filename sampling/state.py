"""Edits of the sampler's state: rows of its x, changed in place between its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ..attention.schedule import step_of
from .run import Run


class StateEdit(Protocol):
    """Something that acts on the state of the sampler, not on a prediction."""

    def begin(self, run: Run, noise: Tensor, sampler: Any, denoise_mask: Tensor | None) -> None:
        """Raise ValueError, before the first step, for a run that it cannot act on.

        noise, sampler, denoise_mask: what the run is given.
        """
        ...

    def edit(self, x: Tensor, step: int, run: Run) -> None:
        """Change rows of x in place.

        x (pairs x branches, channels, height, width): the state at run.sigmas[step], in the sampler's space:
        before step number `step`, from 0, or (step = run.steps) the run's result.
        """
        ...


def with_edited_state(function: Callable, run: Run, edits: Sequence[StateEdit]) -> Callable:
    """A sampler function of the host whose state is edited before every model call and at the end.

    Samplers that call the model several times a step have each of those states edited.
    """

    @functools.wraps(function)
    def edited(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        samples = function(_Model(model, run, edits), x, *args, **kwargs)
        for edit in edits:
            edit.edit(samples, run.steps, run)
        return samples

    return edited


class _Model:
    """The model as samplers call it: everything is the wrapped one's, but a call edits x first."""

    def __init__(self, model: Any, run: Run, edits: Sequence[StateEdit]):
        object.__setattr__(self, "_wrapped", (model, run, edits))

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model, run, edits = self._wrapped
        step = step_of(float(sigma.flatten()[0]), run.sigmas)
        for edit in edits:
            edit.edit(x, step, run)
        return model(x, sigma, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped[0], name, value)

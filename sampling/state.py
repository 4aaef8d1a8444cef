"""The sampler's state: rows of its x, which guests of a run change in place between its steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..attention.schedule import step_of
from .run import Run


def with_edited_state(function: Callable, run: Run) -> Callable:
    """A sampler function of the host whose state the run's guests edit before model calls and at the end.

    Samplers that call the model several times a step have each of those states edited.
    """

    @functools.wraps(function)
    def edited(model: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        samples = function(_Model(model, run), x, *args, **kwargs)
        for guest in run.guests:
            guest.step(samples, run.steps)
        return samples

    return edited


class _Model:
    """The model as samplers call it: everything is the wrapped one's, but a call edits x first."""

    def __init__(self, model: Any, run: Run):
        object.__setattr__(self, "_wrapped", (model, run))

    def __call__(self, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        model, run = self._wrapped
        run.known_sigma = float(sigma.flatten()[0])  # reading it waits for the GPU, so the forwards do not
        step = step_of(run.known_sigma, run.sigmas)
        for guest in run.guests:
            guest.step(x, step)
        return model(x, sigma, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped[0], name, value)

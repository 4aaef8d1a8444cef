"""tau: in which part of the run the source's attention is injected."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

MEASURES = ("steps", "percent")
"""How progress is counted. "steps": step i of a run's n has progress i / n. "percent": by the step's noise,
on the model's own noise schedule, of which a run may be a part (the host's `percent_to_sigma`).
"""

Progress = Callable[[str], Sequence[float]]
"""measure -> the progress at each of a run's sigmas, from 0 to 1: where a step begins, and at the end."""


def in_steps(steps: int) -> Progress:
    """The progress of a run of so many steps. What is computed at its end belongs to its last step."""

    def progress(measure: str) -> Sequence[float]:
        if measure != "steps":
            raise ValueError(f"The measure is {measure!r}, but only steps are known here.")
        return [min(step, steps - 1) / steps for step in range(steps + 1)]

    return progress


@dataclass(frozen=True)
class Window:
    """A part of the run: active where start <= progress < end.

    In steps, 0 to 0.8 covers the first 16 of 20.
    Raises ValueError unless 0 <= start <= end <= 1.
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("end", self.end)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"The {name} of a tau window is {value:g}; expected a fraction of the run from 0 to 1."
                )
        if self.end < self.start:
            raise ValueError(f"A tau window ends at {self.end:g}, before its start at {self.start:g}.")

    def weight(self, progress: float, fade: float = 0.0) -> float:
        """How strongly the window acts at `progress`, from 0 to 1.

        With fade f > 0 the weight falls linearly from 1 to 0 over the last f of the run before `end`, and
        rises likewise after `start`; an edge at the run's own start or end does not fade.
        """
        if not self.start <= progress < self.end:
            return 0.0
        if fade <= 0.0:
            return 1.0
        falling = (self.end - progress) / fade if self.end < 1.0 else 1.0
        rising = (progress - self.start) / fade if self.start > 0.0 else 1.0
        return min(1.0, falling, rising)


SELF_MODES = ("map", "mutual", "map in both halves")


@dataclass(frozen=True)
class TauSchedule:
    """When and where the source's attention replaces the target's.

    cross, self_: windows for cross- and self-attention. In the joint attention of transformers: for words
        with the image around them, and, where that is closed, for the image alone.
    fade: width of the windows' soft edges, fraction of the run.
    self_resolution: self-attention is injected where the largest side of the layer's grid is at most this
        fraction of the latent's (0.5: 32 x 32 for a 64 x 64 latent), Hertz et al. 2023, section 4. It means
        nothing on transformers, which have one grid in all layers.
    words: windows for single words or phrases of the target, instead of `cross`.
    self_mode: "map": the target takes the source's self-attention map (Hertz et al. 2023). "mutual": it looks
        at the source, its own queries on the source's keys and values, in all layers from `mutual_layer` on
        and in both halves of guidance (Cao et al. 2023), so that shapes may change and looks stay.
        "map in both halves": the map, in the negative prompt's half of guidance too, as InstructPix2Pix made
        its data (Brooks et al. 2023). Its window, steps i of n with i / (n - 1) < p, ends at p (n - 1) / n.
    mutual_layer: the first layer of mutual self-attention, as a fraction of all layers in their order.
    measure: what windows are fractions of, see `MEASURES`.
    """

    cross: Window = Window(0.0, 0.8)
    self_: Window = Window(0.0, 0.4)
    fade: float = 0.0
    self_resolution: float = 0.5
    words: tuple[tuple[str, Window], ...] = ()
    self_mode: str = "map"
    mutual_layer: float = 0.63
    measure: str = "steps"

    def __post_init__(self) -> None:
        for name in ("fade", "self_resolution", "mutual_layer"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} is {value:g}; expected a number from 0 to 1.")
        if self.self_mode not in SELF_MODES:
            raise ValueError(f"self_mode is {self.self_mode!r}; expected one of {', '.join(SELF_MODES)}.")
        if self.measure not in MEASURES:
            raise ValueError(f"measure is {self.measure!r}; expected one of {', '.join(MEASURES)}.")

    def self_weight(self, progress: float, mode: str = "map") -> float:
        """Weight of the self-attention window, from 0 to 1; 0 if the schedule's mode is another one."""
        return self.self_.weight(progress, self.fade) if mode == self.self_mode else 0.0


_NUMBER = r"((?:\d*\.)?\d+)"
_WINDOW = re.compile(rf"\s*(?:{_NUMBER}\s*-\s*)?{_NUMBER}\s*")


def parse_word_windows(text: str) -> tuple[tuple[str, Window], ...]:
    """Read `word: end` or `word: start-end`, one per line or several separated by commas.

    Raises ValueError that quotes the line and says what was expected.
    """
    lines = filter(None, map(str.strip, text.splitlines()))
    return tuple(window for line in lines for window in _windows(line))


def _windows(line: str) -> Iterator[tuple[str, Window]]:
    """The entries of a line. A phrase may hold commas and colons; its window is behind its last colon."""
    begun: list[str] = []
    for part in line.split(","):
        phrase, colon, window = part.rpartition(":")
        match = _WINDOW.fullmatch(window) if colon else None
        name = ",".join([*begun, phrase]).strip() if match else ""
        if match is None or not name:
            begun.append(part)
            continue
        try:
            yield name, Window(float(match[1] or 0.0), float(match[2]))
        except ValueError as error:
            raise ValueError(f'In the line "{line}": {error}') from None
        begun = []
    if "".join(begun).strip() or len(begun) > 1:
        raise ValueError(
            f'Cannot read the line "{line}"; expected "word: end" or "word: start-end" with '
            'fractions of the run from 0 to 1, like "hat: 0.2-0.6".'
        )


def place_of(sigma: float, sigmas: list[float]) -> int:
    """The place of a model call at `sigma`: the last i with sigmas[i] >= sigma.

    sigmas: the run's list, descending, one more than there are steps; the last one is 0, or noise is left.
    Calls between two entries, as in second-order samplers, belong to the step that they are part of.
    """
    return max(sum(entry >= sigma * (1.0 - 1e-4) for entry in sigmas if entry > 0.0) - 1, 0)


def step_of(sigma: float, sigmas: list[float]) -> int:
    """The step that a model call at `sigma` belongs to: its place, but for calls at the run's end."""
    return min(place_of(sigma, sigmas), max(len(sigmas) - 2, 0))

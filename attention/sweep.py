"""One target at several values of tau, or of a word's scale, as the targets of one edit."""

from __future__ import annotations

from dataclasses import replace

from .edit import GAIN_LIMIT, Edit
from .plan import check_words
from .prompt import split_words
from .schedule import TauSchedule, Window

PARAMETERS = ("cross_end", "self_end", "scale")
LIMITS = (2, 16)
"""Fewest and most values of a sweep."""


def sweep(
    edit: Edit, tau: TauSchedule, count: int, parameter: str, words: str = ""
) -> tuple[Edit, list[str]]:
    """The edit with one target for each of `count` evenly spaced values, and a label for each.

    parameter: "cross_end" or "self_end" go from the window's start to 1, every target with a tau schedule of
    its own that is otherwise `tau`; "scale" goes from -2 to 2, as the scale of `words` (Hertz et al. 2023,
    attention re-weighting), words or phrases separated by commas. Where no words are given, those that were
    re-weighted before are meant, else those that the source does not have.

    Raises ValueError unless the edit has one target, count is 2 to 16 and the parameter is one of these;
    WordNotFound for words, the schedule's too, that are not in the target.
    """
    if len(edit.targets) != 1:
        raise ValueError(
            f"A sweep repeats one target, but the edit has {len(edit.targets)}; give it an edit with one."
        )
    if not LIMITS[0] <= count <= LIMITS[1]:
        raise ValueError(f"count is {count}; expected {LIMITS[0]} to {LIMITS[1]}.")
    if parameter not in PARAMETERS:
        raise ValueError(f"parameter is {parameter!r}; expected one of {', '.join(PARAMETERS)}.")
    check_words(edit, tau)
    (target,) = edit.targets
    if parameter == "scale":
        tokens = _tokens_to_scale(edit, words)
        values = [-GAIN_LIMIT + 2 * GAIN_LIMIT * n / (count - 1) for n in range(count)]
        targets = []
        for value in values:
            gain = target.gain.clone()
            gain[tokens] = value
            targets.append(replace(target, gain=gain, tau=tau))
    else:
        if words.strip():
            raise ValueError(
                f"words are for parameter scale; {parameter} has no use for {words.strip()!r}."
            )
        start = (tau.cross if parameter == "cross_end" else tau.self_).start
        values = [start + (1.0 - start) * n / (count - 1) for n in range(count)]
        windows = [Window(start, value) for value in values]
        schedules = [
            replace(tau, cross=window) if parameter == "cross_end" else replace(tau, self_=window)
            for window in windows
        ]
        targets = [replace(target, tau=schedule) for schedule in schedules]
    return replace(edit, targets=tuple(targets)), [f"{parameter} {value:.3g}" for value in values]


def _tokens_to_scale(edit: Edit, words: str) -> list[int]:
    (target,) = edit.targets
    phrases = split_words(words)
    if phrases:
        return [token for phrase in phrases for token in edit.find(phrase, (1,))[1]]
    weighted = (target.gain != 1.0).nonzero().flatten().tolist()
    if weighted:
        return weighted
    known = {word.text.lower() for word in edit.source.prompt.words}
    changed = [
        token for word in target.prompt.words if word.text.lower() not in known for token in word.tokens
    ]
    if not changed:
        raise ValueError(
            "Nothing to sweep: every word of the target is also in the source. Name the words to scale."
        )
    return changed

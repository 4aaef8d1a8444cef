"""Edits to try the bundled model with: prompt pairs from the demo's scene grammar, in order, none picked."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

KINDS = ("swap", "refine", "re-weight")
CHANGES = {
    "swap": ("object", "color", "object", "place"),
    "refine": ("color", "style", "place", "weather"),
    "re-weight": ("stronger", "weaker"),
}
"""What the edits of a kind change, in turn."""
FIRST = {"swap": 6_000_000, "refine": 6_200_000, "re-weight": 6_400_000}
"""The first scene of each kind; no training saw one."""
SCALES = {"stronger": 2.0, "weaker": 0.0}
WEATHER = {"snow": "snowy", "crowd": "crowded"}


@dataclass(frozen=True)
class Case:
    """An edit. source, target: the scenes that the prompts ask for, alike for a re-weighting.

    change: one of CHANGES. word: of the target, that the edit is about. old: the source's word in its place.
    """

    kind: str
    number: int
    change: str
    source: Any
    target: Any
    word: str
    old: str | None = None

    @property
    def scale(self) -> float:
        """Of the word's map, 1 but in re-weightings."""
        return SCALES.get(self.change, 1.0)

    @property
    def strength(self) -> str | None:
        """What of the scene grows or shrinks, "snow" or "crowd", in edits of weather and re-weightings."""
        return next((name for name, word in WEATHER.items() if word == self.word), None)


def cases(kind: str, count: int) -> Iterator[Case]:
    """The first `count` edits of a kind: of each scene that allows it, the change that is next."""
    from p2p.demo import scenes

    number = 0
    for seed in range(FIRST[kind], FIRST[kind] + 1000 * count):
        change = CHANGES[kind][number % len(CHANGES[kind])]
        made = _changed(scenes.sample(seed), change, kind == "swap", random.Random(seed))
        if made is not None:
            yield Case(kind, number, change, *made)
            number += 1
            if number == count:
                return


def _changed(scene: Any, change: str, swap: bool, r: random.Random) -> tuple | None:
    """Source, target, word, old word; None for a scene that does not allow the change."""
    from p2p.demo import scenes

    if scene.subject is None:
        return None
    if change == "object":
        role = r.choice(["subject", "partner"]) if scene.partner else "subject"
        old = getattr(scene, role)
        (kind,) = (set(k) for k in (scenes.ANIMALS, scenes.VEHICLES, scenes.THINGS) if old in k)
        new = r.choice(sorted(kind - {scene.subject, scene.partner}))
        return scene, replace(scene, **{role: new}), new, old
    if change == "color":
        has = scene.subject_color is not None
        if scene.partner or scene.style == "vintage" or has != swap:
            return None
        color = r.choice([color for color in scenes.COLORS if color != scene.subject_color])
        return scene, replace(scene, subject_color=color), scene.subject, scene.subject if swap else None
    if change == "place":
        if (scene.place is not None) != swap or scene.snow or scene.crowd:
            return None
        place = r.choice([place for place in scenes.PLACES if place != scene.place])
        return scene, replace(scene, place=place), place, scene.place
    if change == "style":
        if scene.style or scene.subject_color or scene.partner_color:
            return None
        style = r.choice([style for style in scenes.STYLES if style != "photo"])
        return scene, replace(scene, style=style), style, None
    if change == "weather":
        places = {"snow": scenes.SNOWY, "crowd": scenes.CROWDED}
        allowed = [name for name, where in places.items() if scene.place in where]
        if scene.snow or scene.crowd or not allowed:
            return None
        name = r.choice(allowed)
        return scene, replace(scene, **{name: 0.6}), WEATHER[name], None
    there = [name for name in WEATHER if getattr(scene, name)]
    return (scene, scene, WEATHER[there[0]], WEATHER[there[0]]) if there else None

"""Which tries are kept: thresholds, then the best of each row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

PUBLISHED = {"clip_sim_image": 0.7, "clip_sim_0": 0.2, "clip_sim_1": 0.2, "clip_sim_dir": 0.2}
"""The least similarities of InstructPix2Pix's code (Brooks et al. 2023, section 3.1.2), of CLIP ViT-L/14."""
BUNDLED = {"clip_sim_image": 0.0, "clip_sim_0": 0.7, "clip_sim_1": 0.7, "clip_sim_dir": 0.5}
"""The same of the bundled CLIP, whose cosines are spread more widely. On held-out scenes 99 % of the right
captions are above their limit and 99 % of others below, 90 % of the right directions and 95 % of others."""


@dataclass(frozen=True)
class Filter:
    """keep: of each row at most so many tries, those with the highest direction.

    least, most: score -> limit, included. A try without the score does not pass.
    """

    keep: int = 4
    least: dict[str, float] = field(default_factory=lambda: dict(PUBLISHED))
    most: dict[str, float] = field(default_factory=dict)

    def reasons(self, values: dict[str, Any]) -> list[str]:
        """Why a try does not pass: the scores that are out of their limits."""
        if values.get("error"):
            return ["error"]
        below = [
            name for name, limit in self.least.items() if not _number(values.get(name), -math.inf) >= limit
        ]
        above = [
            name for name, limit in self.most.items() if not _number(values.get(name), math.inf) <= limit
        ]
        return [*below, *above]

    def best(self, tries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The tries that are kept, best first; equal ones in the order of their ids."""
        passed = [values for values in tries if not self.reasons(values)]
        passed.sort(key=lambda values: (-_number(values.get("clip_sim_dir"), 0.0), values["id"]))
        return passed[: self.keep]

    def kept(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The lines of metadata.jsonl from the journal's rows."""
        for row in rows:
            yield from self.best(row["tries"])


def _number(value: Any, otherwise: float) -> float:
    return otherwise if value is None or math.isnan(value) else value

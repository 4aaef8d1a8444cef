"""From rows to tries: what is drawn for each, and the ids that name them.

Everything follows from the row's own content and the settings, and nothing from its place in the table, the
process, the machine or the time. Running again therefore makes the same tries under the same ids.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..attention.schedule import SELF_MODES
from .table import RANGES, SEEDS, Row

SPARE = 11
"""Bits that drawn seeds leave free: 53 are left, which every reader of JSON keeps exactly."""


@dataclass(frozen=True)
class Settings:
    """How pairs are sampled. Ranges are (low, high); a number is a range of one.

    cross_end, self_end, self_resolution, self_mode: as in tau Scheduler. published_window: self_end is p of
    `published_end`. width, height: px. batch: tries of a row that
    go through the model together; they share their draws and differ in their noise.
    seed: of all draws, 0 to 2^63 - 1. model_sha256: of the checkpoint's file.
    """

    cross_end: tuple[float, float] = (0.8, 0.8)
    self_end: tuple[float, float] = (0.4, 0.4)
    self_resolution: float = 0.5
    self_mode: str = SELF_MODES[0]
    published_window: bool = False
    cfg: tuple[float, float] = (7.5, 7.5)
    steps: int = 50
    sampler: str = "euler"
    scheduler: str = "normal"
    width: int = 512
    height: int = 512
    negative: str = ""
    batch: int = 1
    seed: int = 0
    blend_words: str = ""
    blend_source_words: str = ""
    model: str = ""
    model_sha256: str = ""

    def __post_init__(self) -> None:
        for name, least, most in (("steps", 1, 10_000), ("batch", 1, 4096), ("seed", 0, SEEDS - 1)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {least} to {most}")
        for name in ("width", "height"):
            if getattr(self, name) < 8 or getattr(self, name) % 8:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a multiple of 8 px")
        if not 0.0 <= self.self_resolution <= 1.0:
            raise ValueError(f"self_resolution is {self.self_resolution:g}; expected 0 to 1")
        if self.self_mode not in SELF_MODES:
            raise ValueError(f"self_mode is {self.self_mode!r}; expected one of {', '.join(SELF_MODES)}")

    def of(self, row: Row) -> Settings:
        """These settings with the row's own."""
        return replace(self, **row.options)


INSTRUCTPIX2PIX: dict[str, Any] = {
    "cross_end": (0.0, 0.0),
    "self_end": (0.1, 0.9),
    "self_resolution": 1.0,
    "self_mode": "map in both halves",
    "published_window": True,
    "cfg": (7.5, 15.0),
    "steps": 100,
    "sampler": "euler_ancestral",
    "scheduler": "normal",
}
"""As in dataset_creation/generate_img_dataset.py of InstructPix2Pix's code (Brooks et al. 2023), which copies
self-attention in stable_diffusion/ldm/modules/attention.py."""
PUBLISHED_TRIES = 100
"""Of a row, in the same file."""


def digest(value: Any, letters: int) -> str:
    """A hash of a JSON value in hexadecimal letters, the same on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=letters // 2).hexdigest()


def row_id(row: Row, settings: Settings) -> str:
    """Of a row under its settings, whatever the number of tries."""
    return digest([row.original_prompt, row.edit_prompt, row.edited_prompt, asdict(settings.of(row))], 16)


def expand(row: Row, settings: Settings, tries: int) -> list[dict[str, Any]]:
    """The units of a row: batches of tries that are sampled together. The last may have tries too many.

    Each has `row` (the row's id), `line`, `number` (from 0), `ids` of its tries, `seed`, what was drawn, and
    all else that sampling needs, as a JSON value. A row's own seed is its first unit's; the next count on.
    """
    own = settings.of(row)
    name = row_id(row, settings)
    units = []
    for number in range(-(-tries // own.batch)):
        if "seed" in row.options:
            seed = (own.seed + number) % SEEDS
        else:
            seed = int(digest([own.seed, row.original_prompt, row.edited_prompt, number], 16), 16) >> SPARE
        drawn = _drawn(own, seed)
        values = {**asdict(own), **drawn, "seed": seed}
        prompts = {
            "original_prompt": row.original_prompt,
            "edit_prompt": row.edit_prompt,
            "edited_prompt": row.edited_prompt,
        }
        ids = [digest([prompts, values, item], 24) for item in range(own.batch)]
        units.append(
            {
                "row": name,
                "line": row.line,
                "number": number,
                "ids": ids,
                **prompts,
                **values,
                "more": row.more,
            }
        )
    return units


def _drawn(settings: Settings, seed: int) -> dict[str, float]:
    """A number of each range, uniform, from a unit's seed."""
    r = random.Random(f"draw {seed}")
    drawn = {name: round(r.uniform(*getattr(settings, name)), 4) for name in RANGES}
    if settings.published_window:
        drawn["self_end"] = published_end(drawn["self_end"], settings.steps)
    return drawn


def published_end(p: float, steps: int) -> float:
    """The end of InstructPix2Pix's window, steps i of n with i / (n - 1) < p, for i / n: ceil(p (n - 1)) / n.

    p: 0 to 1, of four digits at most.
    """
    return math.ceil(round(p * (steps - 1), 6)) / steps

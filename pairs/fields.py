"""The columns of a training set of edited pairs, whoever writes it. Imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PROMPTS = ("original_prompt", "edit_prompt", "edited_prompt")
IMAGES = ("original_image_file_name", "edited_image_file_name")
"""The published fields of timbrooks/instructpix2pix-clip-filtered; `datasets` reads files by these names."""

SETTINGS = (
    "id",
    "seed",
    "batch",
    "item",
    "cross_end",
    "self_end",
    "self_resolution",
    "self_mode",
    "cfg",
    "steps",
    "sampler",
    "scheduler",
    "width",
    "height",
    "blend_words",
    "blend_source_words",
    "negative",
    "model",
    "model_sha256",
)
SCORES = (
    "clip_sim_0",
    "clip_sim_1",
    "clip_sim_dir",
    "clip_sim_image",
    "ssim",
    "ssim_inside",
    "ssim_outside",
    "distance_inside",
    "distance_outside",
)
COLUMNS = (*PROMPTS, *IMAGES, *SETTINGS, *SCORES)


def line(values: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A line of metadata.jsonl: every column in its order, None where the value is unknown, then `more`.

    more: a table's further columns; one that has a name of ours is kept as `table_NAME`.
    """
    further = {f"table_{name}" if name in COLUMNS else name: value for name, value in (more or {}).items()}
    return {**{name: values.get(name) for name in COLUMNS}, **further}

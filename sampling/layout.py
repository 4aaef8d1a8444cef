"""What conditionings hold for the items of a batch, laid out for pairs: on all of an item's branches.

The host gives row i of a batch the value number i modulo the number of values. In a paired batch the rows of
an item are its branches, so values that belong to items are repeated over these before the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.utils
import torch
from einops import repeat
from torch import Tensor

from .encode import KEY

PROMPTS = ("cross_attn", "pooled_output", "cross_attn_controlnet", "pooled_output_controlnet")
"""Options that the pair's own conditioning has per branch, and any other one per item."""


def lay_out(conds: dict[str, list[dict]], pairs: int, branches: int) -> None:
    """Lay out masks, ControlNet images, concatenated latents and prompts of several rows; in place.

    conds: of a guider at the beginning of its run, by role; the tensors and ControlNets in them, which are
    the user's values, are left as they are. Entries with a controller's mark keep the rows of their prompts.
    """
    tiled = partial(_tiled, pairs=pairs, branches=branches)
    controls: dict[int, Any] = {}
    for entries in conds.values():
        for entry in entries:
            prompts = () if KEY in entry else PROMPTS
            for name in ("mask", *prompts):
                if _has_rows(entry.get(name), 3 if name == "mask" else 2):
                    entry[name] = tiled(entry[name])
            for name in ("concat_latent_image", "concat_mask"):
                if _has_rows(entry.get(name), 3):
                    items = comfy.utils.resize_to_batch_size(entry[name], pairs)  # as the host does
                    entry[name] = repeat(items, "b ... -> (b n) ...", n=branches)
            if entry.get("control") is not None:
                entry["control"] = _laid_out_control(entry["control"], tiled, controls)


def _tiled(values: Tensor, pairs: int, branches: int) -> Tensor:
    """Value p modulo their number for each pair p, on each of its branches."""
    items = torch.arange(pairs, device=values.device) % values.shape[0]
    return values[items.repeat_interleave(branches)]


def _has_rows(value: Any, dimensions: int) -> bool:
    return torch.is_tensor(value) and value.ndim >= dimensions and value.shape[0] > 1


def _laid_out_control(control: Any, tiled: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Any:
    """A ControlNet, or the chain that it ends, with images for every row; itself where one does for all.

    made: what was made for each; conditionings that share one keep sharing it, and so a model call.
    """
    if id(control) not in made:
        previous = control.previous_controlnet
        before = None if previous is None else _laid_out_control(previous, tiled, made)
        images = control.cond_hint_original
        result = control
        if before is not previous or _has_rows(images, 4):
            result = control.copy()
            result.previous_controlnet = before
            if _has_rows(images, 4):
                count = images.shape[0]
                result.cond_hint_original = tiled(images)
                result.extra_concat_orig = [
                    tiled(comfy.utils.repeat_to_batch_size(extra, count)) if extra.shape[0] > 1 else extra
                    for extra in control.extra_concat_orig
                ]
        made[id(control)] = result
    return made[id(control)]

"""ControlNets beside prompts of unequal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .families import Family
from .run import Lengths


@dataclass(frozen=True, eq=False)
class OneBranchAtATime:
    """In the place of a ControlNet, which reads the text too: each branch goes through it without padding.

    control: the host's ControlNet, or the chain that it ends. texts: tokens of each branch's text.
    """

    control: Any
    texts: Lengths
    family: Family

    def get_control(self, x: Tensor, t: Tensor, cond: dict, chunks: int, options: dict) -> dict | None:
        """As the host's; x: (pairs x branches, ...), of the pair's own conditioning alone."""
        branches = len(self.texts)

        def of_branch(branch: int) -> dict | None:
            rows = {
                name: value[branch::branches]
                if isinstance(value, Tensor) and value.shape[:1] == x.shape[:1]
                else value
                for name, value in cond.items()
            }
            for part, length in zip(self.family.texts, self.texts[branch], strict=True):
                if part.key in rows:
                    first = rows[part.key].shape[part.axis] - length if self.family.padding == "front" else 0
                    rows[part.key] = rows[part.key].narrow(part.axis, first, length)
            return self.control.get_control(x[branch::branches], t[branch::branches], rows, chunks, options)

        found = [one for one in map(of_branch, range(branches)) if one is not None]
        if not found:  # outside of its part of the run
            return None
        return {
            place: [_side_by_side(tensors) for tensors in zip(*(one[place] for one in found), strict=True)]
            for place in found[0]
        }

    def get_instance_for_device(self, device: torch.device) -> OneBranchAtATime:
        """The same on another GPU."""
        return OneBranchAtATime(self.control.get_instance_for_device(device), self.texts, self.family)


def _side_by_side(tensors: tuple) -> Tensor | None:
    """Rows (pair, branch) from one tensor for each branch."""
    return None if tensors[0] is None else torch.stack(tensors, dim=1).flatten(0, 1)


def by_branch(control: Any, texts: Lengths, family: Family) -> Any:
    """A ControlNet for these texts; itself where they have one length.

    Raises ValueError for one with an image for each item of the batch.
    """
    if len(set(texts)) == 1:
        return control
    link = control
    while link is not None:
        if link.cond_hint_original is not None and link.cond_hint_original.shape[0] > 1:
            given = " and ".join(str(sum(lengths)) for lengths in texts)
            raise ValueError(
                f"The prompts of the edit have {given} tokens; a ControlNet with several images needs as "
                "many in source and targets. Give it one image, or add or drop a word."
            )
        link = link.previous_controlnet
    return OneBranchAtATime(control, texts, family)

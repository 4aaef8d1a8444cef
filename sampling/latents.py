"""Pairs as latents: rows of source and targets side by side, and apart again.

Rows are ordered (pair, branch), the branch running fastest: source, target 1 .. N, source, target 1 .. N ...
"""

from __future__ import annotations

import torch
from einops import repeat
from torch import Tensor

PAIRED = "p2p_branches"
"""In a LATENT that is paired: the branches of each pair."""


def paired_latent(latent: dict, branches: int) -> dict:
    """Repeat each item of a LATENT once per branch, with tied `batch_index`: a pair starts from one noise.

    Raises ValueError if it is paired already.
    """
    if PAIRED in latent:
        raise ValueError(
            f"The latent is paired already, {latent[PAIRED]} branches to a pair; an ordinary one is expected."
        )
    return {**repeated_latent(latent, branches), PAIRED: branches}


def repeated_latent(latent: dict, times: int) -> dict:
    """A LATENT with each item `times` times in a row, and the items' numbers in `batch_index`."""
    samples = latent["samples"]
    items = samples.shape[0]
    index = latent.get("batch_index", range(items))
    repeated = {**latent, "samples": repeat(samples, "b ... -> (b n) ...", n=times)}
    repeated["batch_index"] = [number for number in index for _ in range(times)]
    mask = latent.get("noise_mask")
    if mask is not None and mask.ndim > 2:
        repeated["noise_mask"] = repeat(mask, "b ... -> (b n) ...", n=times)
    return repeated


def source_latent(latent: dict, branches: int) -> dict:
    """The sources of a paired LATENT, as an ordinary one; an ordinary LATENT itself.

    Raises ValueError for pairs of another number of branches.
    """
    if PAIRED not in latent:
        return latent
    rows = latent["samples"].shape[0]
    if latent[PAIRED] != branches or rows % branches:
        raise ValueError(
            f"The latent has {rows} rows in pairs of {latent[PAIRED]} branches, but the edit has "
            f"{_described(branches)}. Connect a latent that was paired for the same edit, whole, or an "
            "ordinary one."
        )
    sources = {name: value for name, value in latent.items() if name not in (PAIRED, "batch_index")}
    sources["samples"] = latent["samples"][::branches]
    index = latent.get("batch_index", range(rows))[::branches]
    if list(index) != list(range(len(index))):  # else what the host assumes without it
        sources["batch_index"] = list(index)
    mask = latent.get("noise_mask")
    if mask is not None and mask.ndim > 2 and mask.shape[0] == rows:
        sources["noise_mask"] = mask[::branches]
    return sources


def check_rows(rows: int, branches: int, what: str) -> None:
    """Raise ValueError unless `rows` is a multiple of `branches`; the message says both numbers."""
    if rows == 0 or rows % branches:
        raise ValueError(
            f"{what} has a batch of {rows}, which is not a multiple of the edit's {_described(branches)}. "
            "Put a Paired Latent node between the latent and the sampler, and connect the same edit to it, "
            "to the controller and to Split Branches."
        )


def _described(branches: int) -> str:
    return f"{branches} branches (1 source and {branches - 1} target{'s' if branches > 2 else ''})"


def split_rows(rows: Tensor, branches: int) -> tuple[Tensor, Tensor]:
    """(pairs x branches, ...) -> the sources (pairs, ...) and the targets (pairs x targets, ...)."""
    is_source = torch.arange(rows.shape[0]) % branches == 0
    return rows[is_source], rows[~is_source]


def tie_rows(noise: Tensor, branches: int) -> Tensor:
    """Noise in which every branch of a pair has its source's."""
    return repeat(noise[::branches], "b ... -> (b n) ...", n=branches)

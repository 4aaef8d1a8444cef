"""Where words look: columns of the cross-attention maps, read without building the maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from .inject import Attention
from .plan import Layout
from .taken import CrossStep

Tokens = tuple[tuple[int, ...], ...]
"""The wanted tokens of each branch's prompt, source first; the lists may differ in length."""


@dataclass(frozen=True, eq=False)
class MapStep:
    """What to read at one step. Columns take the place of values, so attention returns the maps' columns.

    first: (B, t, W), read with the source's queries and keys where `shared`, else with the branch's own.
    second: (B, t, W), read with the branch's own queries and keys and added, or None.
    """

    first: Tensor
    second: Tensor | None
    shared: bool

    def to(self, device: torch.device, dtype: torch.dtype) -> MapStep:
        first, second = (
            None if table is None else table.to(dtype).to(device, non_blocking=True)
            for table in (self.first, self.second)
        )
        assert first is not None
        return MapStep(first, second, self.shared)


@dataclass(frozen=True, eq=False)
class MapRows:
    """The rows of a batch whose maps are read: of each pair its branches, source first.

    row, origin, branch: (pairs x B,) the row, its source's row, the number of its branch, 0 for the source.
    """

    row: Tensor
    origin: Tensor
    branch: Tensor


def map_rows(branches: Sequence[int], offsets: Sequence[int], size: int, device: torch.device) -> MapRows:
    """Rows of the chunks of `size` rows, from each of `offsets` on, that tile `branches` (0: the source)."""
    row = [offset + n for offset in offsets for n in range(size)]
    origin = [offset + n - n % len(branches) for offset in offsets for n in range(size)]
    branch = [branches[n % len(branches)] for _ in offsets for n in range(size)]
    return MapRows(*(torch.tensor(x, dtype=torch.long, device=device) for x in (row, origin, branch)))


def token_columns(layout: Layout, tokens: Tokens) -> Tensor:
    """One-hot columns of the wanted tokens, E_t, one for all copies of each: (B, t, W), float64.

    t counts the tokens of the conditionings. Of a prompt that several text encoders read, a word has tokens
    of each of them, and its map is the sum of their columns. Shorter lists are filled up by columns of zeros.
    """
    columns = torch.zeros(len(tokens), layout.length, max(map(len, tokens)), dtype=torch.float64)
    for branch, wanted in enumerate(tokens):
        for w, token in enumerate(wanted):
            columns[branch, list(layout.places(branch, token)), w] = 1.0
    return columns


def map_step(columns: Tensor, cross: CrossStep | None) -> MapStep:
    """What to read where the targets' maps are edited by `cross` (None: not at all), re-weighting left out.

        A* E_t = softmax(Q_s K_s^T / sqrt(d)) M (from_source o E_t) + softmax(Q_t K_t^T / sqrt(d)) (own o E_t)

    with E_t the columns of a target, as in `cross_attention`; the source's map is its own, A_s E_s.
    """
    if cross is not None:
        cross = cross.unscaled or cross
    if cross is None or cross.moved is None:
        if cross is None or cross.own is None:
            return MapStep(columns, None, shared=False)
        own = torch.cat([torch.ones_like(cross.own[:1]), cross.own])
        return MapStep(own[:, :, None] * columns, None, shared=False)
    first = torch.cat([columns[:1], torch.bmm(cross.moved, columns[1:])])
    if cross.own is None:
        return MapStep(first, None, shared=True)
    own = torch.cat([torch.zeros_like(cross.own[:1]), cross.own])
    return MapStep(first, own[:, :, None] * columns, shared=True)


def token_maps(
    attend: Attention, q: Tensor, k: Tensor, *, heads: int, rows: MapRows, step: MapStep, copies: int = 1
) -> Tensor:
    """The wanted tokens' maps, averaged over heads: (pairs x B, n, W), float32.

    attend: plain attention. q (b, n, h d), k (b, L, h d): as in `cross_attention`; keys beyond the `copies`
    of the text take their share of attention and are not read.
    """
    first = _read(
        attend, q, k, heads, rows.origin if step.shared else rows.row, step.first, rows.branch, copies
    )
    if step.second is None:
        return first
    return first + _read(attend, q, k, heads, rows.row, step.second, rows.branch, copies)


def _read(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    heads: int,
    row: Tensor,
    columns: Tensor,
    branch: Tensor,
    copies: int,
) -> Tensor:
    """Columns take the place of values, d at a time: kernels that build no map want a head's width."""
    queries, keys = q.index_select(0, row), k.index_select(0, row)
    width = q.shape[-1] // heads
    values = columns.to(q.dtype).index_select(0, branch).repeat(1, copies, 1)
    values = F.pad(values, (0, -values.shape[2] % width, 0, keys.shape[1] - values.shape[1]))
    read = []
    for part in values.split(width, dim=2):
        out = attend(queries, keys, part.repeat(1, 1, heads))
        read.append(reduce(out.float(), "b n (h d) -> b n d", "mean", h=heads))
    return torch.cat(read, dim=2)[:, :, : columns.shape[2]]

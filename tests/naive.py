"""Prompt-to-Prompt as the paper writes it: maps are materialised, edited column by column, multiplied again.

Slow on purpose, and with nothing of the pack in it: one row of the batch at a time, one token at a time.
Shapes: h heads, n queries (pixels), s source tokens, t target tokens, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def heads_of(x: Tensor, heads: int) -> Tensor:
    """(n, h d) -> (h, n, d)"""
    return torch.stack(x.chunk(heads, dim=-1))


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) for q (n, h d) and k (t, h d): (h, n, t)."""
    q, k = heads_of(q, heads), heads_of(k, heads)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


def weighted_values(attention: Tensor, v: Tensor, heads: int) -> Tensor:
    """(h, n, t) maps times (t, h d) values: (n, h d)."""
    return torch.cat(list(attention @ heads_of(v, heads)), dim=-1)


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """One row's ordinary attention."""
    return weighted_values(attention_map(q, k, heads), v, heads)


def edited_map(
    source: Tensor, own: Tensor, mapping: Tensor, inherits: Tensor, gain: Tensor, weight: Tensor
) -> Tensor:
    """The target's map (h, n, t) after the edit.

    source (h, n, s), own (h, n, t): maps of source and target. mapping (s, t); inherits, gain, weight (t,).
    """
    edited = own.clone()
    for j in range(own.shape[-1]):
        column = own[..., j]
        if inherits[j]:
            column = torch.zeros_like(column)
            for i in mapping[:, j].nonzero().flatten().tolist():
                column = column + mapping[i, j] * source[..., i]
        edited[..., j] = weight[j] * (gain[j] * column) + (1 - weight[j]) * own[..., j]
    return edited


def cross_row(
    q_source: Tensor, k_source: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, *edit: Tensor
) -> Tensor:
    """One target row's cross-attention with the source's maps; `edit`: `edited_map`'s, from `mapping` on."""
    maps = edited_map(attention_map(q_source, k_source, heads), attention_map(q, k, heads), *edit)
    return weighted_values(maps, v, heads)


def self_row(
    q_source: Tensor, k_source: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, weight: float
) -> Tensor:
    """One target row's self-attention with the source's map, mixed with its own by `weight`."""
    maps = weight * attention_map(q_source, k_source, heads) + (1 - weight) * attention_map(q, k, heads)
    return weighted_values(maps, v, heads)

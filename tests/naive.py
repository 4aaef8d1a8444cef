"""Prompt-to-Prompt as the paper writes it: maps are materialised, edited column by column, multiplied again.

Slow on purpose, and with nothing of the pack in it: one row of the batch at a time, one token at a time.
Shapes: h heads, n queries (pixels), s source tokens, t target tokens, d head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Part(NamedTuple):
    """Some tokens of one row and one head: q, k, v (tokens, d)."""

    q: Tensor
    k: Tensor
    v: Tensor


class Joint(NamedTuple):
    """One row and one head of a joint attention, without padding: its text, image and all other tokens."""

    text: Part
    image: Part
    other: Part


def joint_map(q: Tensor, *keys: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) over all keys (tokens, d) behind each other: (n, L)."""
    return torch.softmax(q @ torch.cat(keys).T / math.sqrt(q.shape[-1]), dim=-1)


def joint_plain(q: Tensor, row: Joint) -> Tensor:
    """Ordinary attention of some queries of a row."""
    return joint_map(q, row.text.k, row.image.k, row.other.k) @ torch.cat([part.v for part in row])


def joint_image(source: Joint, own: Joint, weight: float, gain: Tensor) -> Joint:
    """A target with the source's image queries and keys: what each of its tokens gets, in the place of v."""
    taken = own._replace(image=Part(source.image.q, source.image.k, own.image.v))
    image = weight * joint_map(taken.image.q, taken.text.k, taken.image.k, taken.other.k)
    image += (1 - weight) * joint_map(own.image.q, own.text.k, own.image.k, own.other.k)
    values = torch.cat([part.v for part in own])
    text, other = (
        weight * joint_plain(part.q, taken) + (1 - weight) * joint_plain(part.q, own)
        for part in (own.text, own.other)
    )
    return joint_result(own, text, restored_sums(image, gain) @ values, other)


def joint_mutual(source: Joint, own: Joint, weight: float, gain: Tensor) -> Joint:
    """A target whose image queries look at the source's image; result as in `joint_image`."""
    length = len(gain)
    looking = weight * joint_map(own.image.q, own.text.k, source.image.k, own.other.k)
    looking_own = (1 - weight) * joint_map(own.image.q, own.text.k, own.image.k, own.other.k)
    columns = restored_sums(torch.cat([looking, looking_own], dim=1), torch.cat([gain, gain]))
    values = [own.text.v, source.image.v, own.other.v, own.text.v, own.image.v, own.other.v]
    assert columns.shape[1] == 2 * length
    plain = (joint_plain(part.q, own) for part in (own.text, own.other))
    text, other = plain
    return joint_result(own, text, columns @ torch.cat(values), other)


def joint_words(
    source: Joint, own: Joint, mapping: Tensor, share: Tensor, weight: float, gain: Tensor
) -> Joint:
    """A target whose image rows take the source's columns: mapping (s, t), share (t,); result as above."""
    from_source = joint_map(source.image.q, source.text.k, source.image.k, own.other.k)
    edited = joint_map(own.image.q, own.text.k, own.image.k, own.other.k)
    s, t = len(source.text.k), len(own.text.k)
    for j in range(t):
        column = sum(mapping[i, j] * from_source[:, i] for i in range(s))
        edited[:, j] = share[j] * column + (1 - share[j]) * edited[:, j]
    edited[:, t:] = weight * from_source[:, s:] + (1 - weight) * edited[:, t:]
    values = torch.cat([part.v for part in own])
    text, other = (joint_plain(part.q, own) for part in (own.text, own.other))
    return joint_result(own, text, restored_sums(edited, gain) @ values, other)


def joint_result(row: Joint, text: Tensor, image: Tensor, other: Tensor) -> Joint:
    return Joint(*(part._replace(v=v) for part, v in zip(row, (text, image, other), strict=True)))


def restored_sums(edited: Tensor, gain: Tensor) -> Tensor:
    """Columns times their gain, each row then scaled to its old sum; negative columns count as positive."""
    scale = edited.sum(-1) / (edited * gain.abs()).sum(-1)
    return edited * gain * scale[:, None]

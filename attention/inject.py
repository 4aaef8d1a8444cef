"""The method: the source's attention maps, injected into the target's attention without ever being built."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from einops import repeat
from torch import Tensor

from .taken import CrossStep

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (b, n, h d), k (b, L, h d), v (b, L, h d) -> softmax(q k^T / sqrt(d)) v, (b, n, h d)."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a batch are targets.

    target: (r,) their rows. branch: (r,) the number of each one's target, from 0.
    origin: (b,) the row that each row takes queries and keys from: a target's source, else the row itself.
        Rows from b on are known ones that stand behind the batch's (`paired_rows`, known).
    """

    target: Tensor
    branch: Tensor
    origin: Tensor

    def expand(self, parts: int) -> Rows:
        """The same rows after each was split into `parts` consecutive ones (tiled attention)."""
        if parts == 1:
            return self

        def split(rows: Tensor) -> Tensor:
            return (rows[:, None] * parts + torch.arange(parts, device=rows.device)).flatten()

        return Rows(split(self.target), repeat(self.branch, "r -> (r p)", p=parts), split(self.origin))


@dataclass(frozen=True, eq=False)
class SelfStep:
    """Self-attention at one step: the targets that take the source's map, and how much of it.

    weight: (r,), for each of rows.target, or None for all of it.
    """

    rows: Rows
    weight: Tensor | None

    def rows_of(self, x: Tensor) -> Rows:
        """The rows in x, (b, n, h d) or, of tiled attention, (b parts, n / parts, h d)."""
        return self.rows.expand(x.shape[0] // self.rows.origin.shape[0])


Numbers = tuple[list[int], list[int], list[int]]
"""target, branch and origin, as in `Rows`."""


def paired_rows(
    batch: int,
    targets: Sequence[int],
    offsets: Sequence[int],
    size: int,
    device: torch.device,
    taking: Collection[int] | None = None,
    known: bool = False,
) -> Rows:
    """The rows of `paired_numbers` on a device."""
    return as_rows(paired_numbers(batch, targets, offsets, size, taking, known), device)


def as_rows(numbers: Numbers, device: torch.device) -> Rows:
    return Rows(*(torch.tensor(rows, dtype=torch.long, device=device) for rows in numbers))


def paired_numbers(
    batch: int,
    targets: Sequence[int],
    offsets: Sequence[int],
    size: int,
    taking: Collection[int] | None = None,
    known: bool = False,
) -> Numbers:
    """Rows of a model call whose chunks of `size` rows, from `offsets` on, tile (source, targets ...).

    targets: the number of each target of the tile among the edit's.
    taking: those that take from their source, all by default; the rows of the others are left alone.
    known: the chunks tile the targets alone; what their sources give is known and stands behind the batch,
        chunk by chunk and pair by pair.
    """
    origin = list(range(batch))
    target, branch = [], []
    tile = [*([] if known else [None]), *targets]
    for n, offset in enumerate(offsets):
        for row in range(size):
            pair, place = divmod(row, len(tile))
            number = tile[place]
            if number is not None and (taking is None or number in taking):
                target.append(offset + row)
                branch.append(number)
                behind = batch + n * (size // len(tile)) + pair
                origin[offset + row] = behind if known else offset + row - place
    return target, branch, origin


def cross_attention(
    attend: Attention,
    attend_own: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: Rows,
    step: CrossStep,
    copies: int = 1,
    sources: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-attention with the source's maps in the target's rows.

        A* V_t = softmax(Q_s K_s^T / sqrt(d)) M (from_source o V_t) + softmax(Q_t K_t^T / sqrt(d)) (own o V_t)

    Column operations on a map commute to the values, so this is the edited map of Hertz et al. 2023
    (section 3.2: word swap, refinement, re-weighting) times V_t, in at most two ordinary attention calls.

    attend: attention of all these rows, whatever other nodes made of it; called once. Where another node
        replaces attention they are the whole batch.
    attend_own: plain attention, called on the target rows for the second term where there is one.
    q (b, n, h d), k and v (b, L, h d); L holds the conditioning's t tokens `copies` times, and then tokens
    that another node appended inside this attention, which both branches share.
    step: with an entry for each of rows.target (`CrossStep.by_row`).
    sources: the queries and keys that rows.origin speaks of, if they are not q and k themselves.
    """
    origins, origin_keys = sources or (q, k)
    values = v.index_select(0, rows.target)  # (r, L, h d)
    own = None if step.own is None else _own_values(values, step.own, step.weight, copies)
    if step.moved is None:
        kept = own if own is not None else torch.zeros_like(values)
        return attend(q, k, _with_rows(v, rows.target, kept))
    moved = _moved_values(values, step.moved, step.weight, copies)
    out = attend(
        origins.index_select(0, rows.origin),
        origin_keys.index_select(0, rows.origin),
        _with_rows(v, rows.target, moved),
    )
    if own is None:
        return out
    rest = attend_own(q.index_select(0, rows.target), k.index_select(0, rows.target), own)
    return out.index_add(0, rows.target, rest)


def _moved_values(values: Tensor, moved: Tensor, weight: Tensor, copies: int) -> Tensor:
    """M (from_source o V_t) for each copy of the conditioning, and weight o V_t for appended tokens."""
    tokens = moved.shape[1]
    text = torch.bmm(moved, values[:, :tokens])
    return _with_appended(text.repeat(1, copies, 1) if copies > 1 else text, values, weight)


def _own_values(values: Tensor, own: Tensor, weight: Tensor, copies: int) -> Tensor:
    """own o V_t for each copy of the conditioning, and (1 - weight) o V_t for appended tokens."""
    text = own.repeat(1, copies)
    return _with_appended(text[:, :, None] * values[:, : text.shape[1]], values, 1.0 - weight)


def _with_appended(text: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """The text's values, (r, copies t, h d), and behind them the appended tokens', weighted."""
    appended = values[:, text.shape[1] :]
    return torch.cat([text, weight[:, None, None] * appended], dim=1) if appended.shape[1] else text


def self_step(rows: Rows, weights: Sequence[float], dtype: torch.dtype) -> SelfStep:
    """rows: of the targets whose weight is above 0. weights: one for each target, from 0 to 1."""
    if all(weight in (0.0, 1.0) for weight in weights):
        return SelfStep(rows, None)
    table = torch.tensor(weights, dtype=torch.float64).to(dtype)
    table = table.to(rows.branch.device, non_blocking=True)
    return SelfStep(rows, table.index_select(0, rows.branch))


def self_attention(
    attend: Attention,
    attend_own: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    step: SelfStep,
    sources: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Self-attention with the source's map in the target's rows, the values staying the target's own.

        weight softmax(Q_s K_s^T / sqrt(d)) V_t + (1 - weight) softmax(Q_t K_t^T / sqrt(d)) V_t

    Tiled attention, in which another node split each row of q (or of all three) into consecutive parts, takes
    the matching parts of the source. Arguments as in `cross_attention`.
    Source: Hertz et al. 2023, section 4 (self-attention injection); Tumanyan et al. 2023, section 4.
    """
    origins, origin_keys = sources or (q, k)
    out = attend(
        origins.index_select(0, step.rows_of(q).origin),
        origin_keys.index_select(0, step.rows_of(k).origin),
        v,
    )
    return _mixed_with_own(out, attend_own, q, k, v, step)


def _mixed_with_own(
    out: Tensor, attend_own: Attention, q: Tensor, k: Tensor, v: Tensor, step: SelfStep
) -> Tensor:
    """weight out + (1 - weight) softmax(Q_t K_t^T / sqrt(d)) V_t in the targets' rows, out in all others."""
    if step.weight is None:
        return out
    queries, keys = step.rows_of(q), step.rows_of(k)
    own = attend_own(
        q.index_select(0, queries.target), k.index_select(0, keys.target), v.index_select(0, keys.target)
    )
    parts = q.shape[0] // step.rows.origin.shape[0]
    weight = step.weight.repeat_interleave(parts)[:, None, None].to(own.dtype)
    edited = torch.lerp(own, out.index_select(0, queries.target), weight)
    return _with_rows(out, queries.target, edited)


def mutual_self_attention(
    attend: Attention, attend_own: Attention, q: Tensor, k: Tensor, v: Tensor, *, step: SelfStep
) -> Tensor:
    """Self-attention in which the targets look at their source: own queries, the source's keys and values.

        weight softmax(Q_t K_s^T / sqrt(d)) V_s + (1 - weight) softmax(Q_t K_t^T / sqrt(d)) V_t

    Arguments as in `self_attention`. Source: Cao et al. 2023 (MasaCtrl), mutual self-attention control.
    """
    origin = step.rows_of(k).origin
    out = attend(q, k.index_select(0, origin), v.index_select(0, origin))
    return _mixed_with_own(out, attend_own, q, k, v, step)


def _with_rows(x: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """x with other values in some rows. `index_copy` would do it too, but not on every Apple GPU."""
    out = x.clone()
    out[rows] = values
    return out

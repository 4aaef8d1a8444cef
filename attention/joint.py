"""Prompt-to-Prompt where one softmax runs over text and image tokens: the joint attention of transformers.

Shapes: b rows, r rows that are targets, h heads, L tokens (text, image and others), n image tokens, t
tokens of the text, d head width. q, k and v are (b, h, L, d) or (b, L, h d); k and v may have fewer heads
than q. Rows are the first axis and tokens the last but one in both, and in what attention returns,
whichever of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from .inject import Rows
from .taken import CrossStep

Attention = Callable[..., Tensor]
"""q, k, v and, where the call has one, mask -> softmax(q k^T / sqrt(d) + mask) v, any kernel."""

Spans = tuple[slice, ...]


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of text and image lie in q, k and v. All others stay each row's own.

    text: its parts, in the order in which the edit counts their tokens. image: the tokens that are denoised.
    Others are registers, reference images, and tokens that fill the text up. Every slice has a start and a
    stop.
    """

    text: Spans
    image: slice

    def others(self, length: int) -> Spans:
        """What is not image, of `length` tokens in all."""
        ends = (slice(0, self.image.start), slice(self.image.stop, length))
        return tuple(span for span in ends if span.start < span.stop)


Groups = tuple[tuple[Tensor, Spans], ...] | None
"""The rows of a call by the columns of k and v that they keep, or None where all rows keep all."""


def groups_of(
    kept: Sequence[Spans], length: int, device: torch.device, apart: Sequence[bool] | None = None
) -> Groups:
    """Rows that keep the same columns together, so that padding is left out of the softmax exactly.

    kept: for each row of a call the columns of k and v that are not padding. length: L of the call.
    apart: for each row which of two kinds it is, that must not meet in one call: a kernel may round
    differently in a batch of another size, and a source's rows are to be the same whatever its targets do.
    """
    rows: dict[tuple[bool, tuple[tuple[int, int], ...]], list[int]] = {}
    for row, spans in enumerate(kept):
        kind = apart is not None and apart[row]
        rows.setdefault((kind, tuple((span.start, span.stop) for span in spans)), []).append(row)
    whole = all(sum(stop - start for start, stop in ends) == length for _, ends in rows)
    if whole and len({kind for kind, _ in rows}) == 1:
        return None
    return tuple(
        (torch.tensor(group, dtype=torch.long, device=device), tuple(slice(*end) for end in ends))
        for (_, ends), group in rows.items()
    )


@dataclass(frozen=True, eq=False)
class Columns:
    """Which columns of k and v are no padding, for prompts of unequal length.

    own: of all rows with their own text. origin: of all rows with the text of rows.origin. target: of the
    rows of rows.target with their own text. origin_target: of these with the text of rows.origin.
    """

    own: Groups = None
    origin: Groups = None
    target: Groups = None
    origin_target: Groups = None


ALL = Columns()


def columns_of(
    kept: Sequence[Spans], origin: Sequence[int], target: Sequence[int], length: int, device: torch.device
) -> Columns:
    """The columns that each call keeps; made once per forward, from numbers, so that no layer waits for it.

    kept: for each row, and each known one behind the batch, the columns of its own text and of all that is
    not text. origin, target: as in `Rows`, as numbers.
    """

    def groups(rows: Sequence[int]) -> Groups:
        return groups_of([kept[row] for row in rows], length, device)

    origins = [origin[row] for row in target]
    return Columns(groups(range(len(origin))), groups(origin), groups(target), groups(origins))


@dataclass(frozen=True, eq=False)
class Call:
    """The tensors of one attention call. A v (b, L, h, d) beside k (b, L, h d), as SD3's is, becomes as k.

    mask: added to the logits, or boolean, over (q tokens, k tokens), (rows, k tokens) or with rows first and
    these two last, any axis but the last of size 1; None for no mask.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.v.ndim > self.k.ndim:
            object.__setattr__(self, "v", self.v.flatten(2))

    def rows(self, index: Tensor) -> Call:
        mask = self.mask
        if mask is not None and self._mask_has_rows:
            mask = mask.index_select(0, index)
        q, k, v = (x.index_select(0, index) for x in (self.q, self.k, self.v))
        return Call(q, k, v, mask)

    def queries(self, spans: Spans) -> Call:
        mask = self.mask
        if mask is not None and self._mask_has_queries and mask.shape[-2] > 1:
            mask = cut(mask, spans)
        return replace(self, q=cut(self.q, spans), mask=mask)

    def keys(self, spans: Spans) -> Call:
        mask = self.mask if self.mask is None else torch.cat([self.mask[..., span] for span in spans], -1)
        return Call(self.q, cut(self.k, spans), cut(self.v, spans), mask)

    def attend(self, attend: Attention, groups: Groups = None) -> Tensor:
        """The attention of these tensors, with the columns that each row keeps."""
        if groups is None:
            return attend(self.q, self.k, self.v, **({} if self.mask is None else {"mask": self.mask}))
        parts = [self.rows(rows).keys(spans).attend(attend) for rows, spans in groups]
        out = parts[0].new_empty(self.q.shape[0], *parts[0].shape[1:])
        for (rows, _), part in zip(groups, parts, strict=True):
            out[rows] = part
        return out

    @property
    def _mask_has_rows(self) -> bool:
        assert self.mask is not None
        return self.mask.shape[0] == self.q.shape[0] > 1 and (
            self.mask.ndim > 2 or not self._mask_has_queries
        )

    @property
    def _mask_has_queries(self) -> bool:
        assert self.mask is not None
        return self.mask.ndim > 2 or self.mask.shape[0] in (1, self.q.shape[-2])


def cut(x: Tensor, spans: Spans) -> Tensor:
    """Some tokens of x, without a copy where they are one piece."""
    parts = [x[..., span, :] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -2)


@dataclass(frozen=True, eq=False)
class WordStep:
    """How the text's columns in the target's image rows are edited, with an entry for each of rows.target.

    moved: M diag(share), (r, t, t): what each token takes of the source's map; None where no token takes any.
    own: 1 - share, (r, t), or None where nothing is kept, of the image's columns neither.
    weight: (r,), the share of the source in the columns of the image and all other tokens, 0 to 1.
    gain: (r, t), the re-weighting c of each column, or None where no word is re-weighted.
    """

    moved: Tensor | None
    own: Tensor | None
    weight: Tensor
    gain: Tensor | None = None

    def by_row(self, branch: Tensor, like: Tensor) -> WordStep:
        """With an entry for each row that is a target's; branch: (r,) their numbers. like: for the dtype."""

        def of_rows(table: Tensor | None) -> Tensor | None:
            return None if table is None else table.to(like.dtype).to(like.device).index_select(0, branch)

        weight = of_rows(self.weight)
        assert weight is not None
        return WordStep(of_rows(self.moved), of_rows(self.own), weight, of_rows(self.gain))


def word_step(step: CrossStep, share: Tensor) -> WordStep:
    """The edit of cross-attention maps as one of the text's columns in a joint softmax, for N targets.

    share: (N,), of the source in the image's columns because of the self-attention window; the text's window
    takes as much of them where that is more.
    """
    plain = step.unscaled or step
    weight = torch.maximum(step.weight, share)
    moved, own = plain.moved, plain.own
    tables = next(table for table in (own, moved) if table is not None)
    if moved is None and bool(weight.any()):
        moved = tables.new_zeros(*tables.shape[:2], tables.shape[1])
    if own is None and bool((weight < 1.0).any()):
        own = tables.new_zeros(tables.shape[:2])
    return WordStep(moved, None if moved is None else own, weight, step.gain)


def open_targets(step: CrossStep | None) -> frozenset[int]:
    """The targets, from 0, whose text's columns a step edits at all."""
    if step is None:
        return frozenset()
    kept = step.own is not None
    assert step.own is not None or step.moved is not None
    return frozenset(
        n
        for n in range(step.weight.shape[0])
        if step.weight[n] > 0.0
        or (step.moved is not None and bool(step.moved[n].any()))
        or not (kept and bool((step.own[n] == 1.0).all()))  # type: ignore[index]
    )


@dataclass(frozen=True, eq=False)
class Term:
    """A part of the target's edited map, times values: softmax(q k^T / sqrt(d)) [text v_T ; weight v_rest].

    call: of the whole batch. batch, target: its columns for all rows and for the targets alone. text: (r,
    t, t) on the text's values, (r, t), a factor on each, or None for weight. weight: (r,), or None for 1,
    then of the text too.
    """

    call: Call
    batch: Groups
    target: Groups
    text: Tensor | None = None
    weight: Tensor | None = None

    def values(self, v: Tensor, tokens: Tokens) -> Tensor:
        """The values whose ordinary attention is this term of v (r, ..., L, d), the targets' values."""
        if self.weight is None:
            return v
        out = v * _like(self.weight[:, None, None], v)
        if self.text is None:
            return out
        text, table = cut(v, tokens.text), self.text
        moved = _like(table, v) @ text if table.ndim == 3 else _like(table[..., None], v) * text
        return _put(out, tokens.text, moved)

    def of_all(self, attend: Attention, rows: Rows, tokens: Tokens, gain: Tensor | None) -> Tensor:
        """The term in the targets' rows, and ordinary attention in all others."""
        if gain is None and self.weight is None:
            return self.call.attend(attend, self.batch)
        v = self.call.v.clone()
        v[rows.target] = self.values(_gained(v.index_select(0, rows.target), gain, tokens), tokens)
        return replace(self.call, v=v).attend(attend, self.batch)

    def of_targets(
        self, attend: Attention, rows: Rows, tokens: Tokens, queries: Spans | None, values: Callable
    ) -> Tensor:
        """The term in the targets' rows alone, for some queries. values: from the targets' v."""
        call = (self.call if queries is None else self.call.queries(queries)).rows(rows.target)
        return replace(call, v=self.values(values(call.v), tokens)).attend(attend, self.target)


def image_attention(
    attend: Attention,
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    heads: int,
    weight: Tensor | None = None,
    gain: Tensor | None = None,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Joint attention with the source's queries and keys of image tokens in the target's rows.

        A* = softmax([q_T,t ; q_I,s] [k_T,t ; k_I,s]^T / sqrt(d))
        weight A* v_t + (1 - weight) A_t v_t

    All queries of a target see these keys, as published. One call, two for a weight between 0 and 1;
    re-weighting acts on the image's queries alone and adds two. Source: Shin et al., ICCV 2025, image
    projections.

    weight: (r,), or None for 1. gain: as in `WordStep`. heads: of q.
    columns: where prompts have unequal lengths. sources: the queries and keys, (q, k), that rows.origin
    speaks of, if they are not those of the call (`paired_rows`, known).
    """
    terms = image_terms(call, tokens=tokens, rows=rows, weight=weight, columns=columns, sources=sources)
    return _edited(attend, terms, terms, tokens, rows, heads, gain)


def image_terms(
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    weight: Tensor | None = None,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> list[Term]:
    """The terms of `image_attention`."""
    q, k = sources or (call.q, call.k)
    image = (tokens.image,)
    taken = replace(call, q=_from_origin(call.q, q, rows, image), k=_from_origin(call.k, k, rows, image))
    terms = [Term(taken, columns.own, columns.target, weight=weight)]
    return terms if weight is None else [*terms, *own_terms(call, columns, 1 - weight)]


def mutual_attention(
    attend: Attention,
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    heads: int,
    weight: Tensor | None = None,
    gain: Tensor | None = None,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Joint attention in which the target's image queries look at the source's image.

        A* v* = softmax(q_I,t [k_T,t ; k_I,s]^T / sqrt(d)) [v_T,t ; v_I,s]
        weight A* v* + (1 - weight) A_t v_t

    The text's queries are left alone, by a small second call. Arguments as in `image_attention`, but for
    sources: the keys and values, (k, v).
    Source: Cao et al. 2023 (MasaCtrl), mutual self-attention control, on the image's part of a joint softmax.
    """
    terms = mutual_terms(call, tokens=tokens, rows=rows, weight=weight, columns=columns, sources=sources)
    return _edited(attend, terms, own_terms(call, columns), tokens, rows, heads, gain)


def mutual_terms(
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    weight: Tensor | None = None,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> list[Term]:
    """The terms of `mutual_attention`."""
    image = (tokens.image,)
    k, v = sources or (call.k, call.v)
    taken = replace(call, k=_from_origin(call.k, k, rows, image), v=_from_origin(call.v, v, rows, image))
    terms = [Term(taken, columns.own, columns.target, weight=weight)]
    return terms if weight is None else [*terms, *own_terms(call, columns, 1 - weight)]


def word_attention(
    attend: Attention,
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    heads: int,
    step: WordStep,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Joint attention with the source's maps of words, and of the image, in the target's image rows.

        softmax(q_I,s [k_T,s ; k_I,s]^T / sqrt(d)) [M diag(share) v_T,t ; weight v_I,t]
        + softmax(q_I,t [k_T,t ; k_I,t]^T / sqrt(d)) [(1 - share) o v_T,t ; (1 - weight) v_I,t]

    The text's queries are left alone. Two calls where nothing is kept; else three, for there are three
    pairs of keys and values, and the third has the targets' image queries only. Re-weighting doubles the
    calls that have image queries only. Columns of two softmaxes do not sum to one exactly; they are used as
    they are.

    step: what is taken of which token. Other arguments as in `image_attention`.
    Source: Hertz et al. 2023, section 3.2, with the text's columns of a joint softmax as cross-attention
    maps.
    """
    terms = word_terms(call, tokens=tokens, rows=rows, step=step, columns=columns, sources=sources)
    return _edited(attend, terms, own_terms(call, columns), tokens, rows, heads, step.gain)


def word_terms(
    call: Call,
    *,
    tokens: Tokens,
    rows: Rows,
    step: WordStep,
    columns: Columns = ALL,
    sources: tuple[Tensor, Tensor] | None = None,
) -> list[Term]:
    """The terms of `word_attention`."""
    kept = own_terms(call, columns, None if step.own is None else 1 - step.weight, step.own)
    if step.moved is None:
        return kept
    q, k = sources or (call.q, call.k)
    taken = replace(
        call,
        q=_from_origin(call.q, q, rows, (tokens.image,)),
        k=_from_origin(call.k, k, rows, (*tokens.text, tokens.image)),
        mask=call.mask if sources else call.rows(rows.origin).mask,
    )
    source = Term(taken, columns.origin, columns.origin_target, text=step.moved, weight=step.weight)
    return [source] if step.own is None else [source, *kept]


def own_terms(
    call: Call, columns: Columns = ALL, weight: Tensor | None = None, text: Tensor | None = None
) -> list[Term]:
    """Ordinary attention, or as much of it as a target keeps: weight and text as in `Term`."""
    return [Term(call, columns.own, columns.target, text, weight)]


def cross_terms(call: Call, *, rows: Rows, step: CrossStep, columns: Columns = ALL) -> list[Term]:
    """The terms of `inject.cross_attention`, whose keys are the text's alone.

    step: with an entry for each of rows.target.
    """
    kept = own_terms(call, columns, None if step.own is None else 1 - step.weight, step.own)
    if step.moved is None:
        return kept
    taken = call.rows(rows.origin)
    source = Term(taken, columns.origin, columns.origin_target, step.moved, step.weight)
    return [source] if step.own is None else [source, *kept]


def _edited(
    attend: Attention,
    terms: Sequence[Term],
    rest: Sequence[Term],
    tokens: Tokens,
    rows: Rows,
    heads: int,
    gain: Tensor | None,
) -> Tensor:
    """The sum of terms for the targets' image queries, that of `rest` for their others, all else as it is."""
    whole = rest is terms and gain is None
    image = None if whole else (tokens.image,)
    out = terms[0].of_all(attend, rows, tokens, gain)
    if len(terms) > 1 or gain is not None:
        edited = cut(out, image or (slice(None),)).index_select(0, rows.target)
        for term in terms[1:]:
            edited += term.of_targets(attend, rows, tokens, image, lambda v: _gained(v, gain, tokens))
        if gain is not None:
            ratio = _row_sums(attend, terms, tokens, rows, heads, gain).to(edited.dtype)
            edited = _join_heads(_split_heads(edited, heads) * ratio, edited.ndim)
        _put(out, image or (slice(0, out.shape[-2]),), edited, rows.target)
    others = () if whole else tokens.others(out.shape[-2])
    if not others:
        return out
    parts = [term.of_targets(attend, rows, tokens, others, lambda v: v) for term in rest]
    return _put(out, others, sum(parts[1:], parts[0]), rows.target)


def _row_sums(
    attend: Attention,
    terms: Sequence[Term],
    tokens: Tokens,
    rows: Rows,
    heads: int,
    gain: Tensor,
) -> Tensor:
    """What keeps the sums of the map's rows when c_j a_j takes the place of a_j: sum a_j / sum |c_j| a_j.

    (r, h, n, 1), in float32 at least.
    So re-weighting acts as a factor on exp(logit) would: a word takes its share from all others, c = 0
    leaves it out. Indicators of the columns in the place of values, |c| in each head's first number and 1
    in the others, make ordinary attention return both sums. Source: as re-weighting before the softmax,
    ColorCtrl, ICLR 2026.
    """

    def indicators(v: Tensor) -> Tensor:
        ones = v.new_ones(v.shape[0], v.shape[-2], width)
        ones[..., :1] = _gained(ones[..., :1], gain.abs(), tokens)
        return _in_each_head(ones, v)

    q = terms[0].call.q
    width = q.shape[-1] if q.ndim == 4 else q.shape[-1] // heads
    parts = [term.of_targets(attend, rows, tokens, (tokens.image,), indicators) for term in terms]
    sums = _split_heads(sum(parts[1:], parts[0]), heads)
    sums = sums.to(torch.promote_types(sums.dtype, torch.float32))
    return sums[..., 1:2] / sums[..., :1].clamp_min(1e-6)


def read_maps(
    attend: Attention,
    terms: Sequence[Term],
    *,
    tokens: Tokens,
    rows: Rows,
    heads: int,
    wanted: Tensor,
    queries: Spans | None = None,
) -> Tensor:
    """Columns of the targets' edited maps, averaged over heads, no map built: (r, n, W), float32.

        sum over terms of softmax(q k^T / sqrt(d)) E

    E, one-hot on the text's columns, takes the place of the values, so that attention returns columns: one
    call for each term and d of them, for kernels that build no map want a head's width. A column is its share
    of a softmax over all of its row: the image's own columns and the text's others have the rest.

    terms: what the target's image is made of; re-weighting, which stands in no term, is left out.
    wanted: E, (r, t, W), t the tokens of all parts of the text; a column may have several of them, which sums
    them. queries: which of them, all by default.
    """
    q = terms[0].call.q
    width = q.shape[-1] if q.ndim == 4 else q.shape[-1] // heads
    read = []
    for part in F.pad(wanted, (0, -wanted.shape[2] % width)).split(width, dim=2):

        def columns(v: Tensor, part: Tensor = part) -> Tensor:
            values = v.new_zeros(v.shape[0], v.shape[-2], width)
            return _in_each_head(_put(values, tokens.text, part.to(v.dtype)), v)

        found = [term.of_targets(attend, rows, tokens, queries, columns) for term in terms]
        out = sum(found[1:], found[0])
        read.append(reduce(_split_heads(out.float(), heads), "b h n d -> b n d", "mean"))
    return torch.cat(read, dim=2)[:, :, : wanted.shape[2]]


def _from_origin(x: Tensor, origins: Tensor, rows: Rows, spans: Spans) -> Tensor:
    """x with some tokens of the targets' rows as their sources have them."""
    origin, x = rows.origin.index_select(0, rows.target), x.clone()
    for span in spans:
        x[..., span, :][rows.target] = origins[..., span, :].index_select(0, origin)
    return x


def _put(x: Tensor, spans: Spans, values: Tensor, rows: Tensor | None = None) -> Tensor:
    """x, with values written into some of its tokens, of all rows or of some."""
    begin = 0
    for span in spans:
        end = begin + span.stop - span.start
        if rows is None:
            x[..., span, :] = values[..., begin:end, :]
        else:
            x[..., span, :][rows] = values[..., begin:end, :]
        begin = end
    return x


def _gained(v: Tensor, gain: Tensor | None, tokens: Tokens) -> Tensor:
    """v of the targets with c_j on the text's columns."""
    if gain is None:
        return v
    return _put(v.clone(), tokens.text, cut(v, tokens.text) * _like(gain[..., None], v))


def _like(table: Tensor, x: Tensor) -> Tensor:
    """(r, ..) for x (r, L, ..), and (r, 1, ..) for x (r, h, L, ..)."""
    return table if x.ndim == 3 else table[:, None]


def _in_each_head(values: Tensor, like: Tensor) -> Tensor:
    """(r, L, d), the same in each head, laid out as v."""
    if like.ndim == 4:
        return values[:, None].repeat(1, like.shape[1], 1, 1)
    return values.repeat(1, 1, like.shape[-1] // values.shape[-1])


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """What attention returned, in whichever layout, as (b, h, n, d)."""
    return x if x.ndim == 4 else rearrange(x, "b n (h d) -> b h n d", h=heads)


def _join_heads(x: Tensor, axes: int) -> Tensor:
    """(b, h, n, d) in the layout that has so many axes."""
    return x if axes == 4 else rearrange(x, "b h n d -> b n (h d)")

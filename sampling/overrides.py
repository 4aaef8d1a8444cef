"""What is taken and read in one forward of a transformer, by the host's override of its attention.

The override sits in the options of this one forward. A call of attention is known by its place among the
forward's calls and by its shape (`families`); one that the family does not predict is left alone.
"""

from __future__ import annotations

import functools
import importlib
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from ..attention import joint
from ..attention.inject import Rows, cross_attention
from ..attention.joint import Columns, Spans, Tokens, groups_of, open_targets, word_step
from ..attention.taken import CrossStep, Layer, SelfTaken, Taken
from . import families
from .families import Family
from .run import Call, Forward, Group, Reading

OVERRIDE = "optimized_attention_override"
ATTENTION: dict[str, Callable[..., Tensor]] = {
    "words": joint.word_attention,
    "image": joint.image_attention,
    "mutual": joint.mutual_attention,
}
TERMS: dict[str, Callable[..., list[joint.Term]]] = {
    "words": joint.word_terms,
    "image": joint.image_terms,
    "mutual": joint.mutual_terms,
}
"""By kind of edit."""


def fill(
    call: Call, taken: Taken, readings: Sequence[Reading], forward: Forward, network: Any
) -> tuple[dict, list[Layer]]:
    """The transformer_options of a forward, or of a part of it, in whose layers this is taken and read.

    Another node's override is called in the place of the host's attention. The second result is the layers in
    which something was taken, which fills while the forward runs.
    """
    reached: list[Layer] = []
    places = Places.of(call, forward, network)
    previous = forward.options.get(OVERRIDE)
    override = _Override(call, taken, readings, places, previous, reached)
    return {**forward.options, OVERRIDE: override}, reached


@contextmanager
def given(call: Call, options: dict, network: Any) -> Iterator[None]:
    """For the time of a forward: options for the module that passes none, and what padding needs."""
    family = call.run.family
    assert family is not None
    with ExitStack() as stack:
        if family.module is not None:
            stack.enter_context(standing_in(importlib.import_module(family.module), options))
        if is_padded(call):
            if family.pad_token is not None:
                stack.enter_context(_filled_up(call, network, *family.pad_token))
            if family.mean is not None:
                stack.enter_context(_mean_of_own_tokens(call, network, family.mean))
        yield


def is_padded(call: Call) -> bool:
    """Whether the texts of a call's own rows have different lengths."""
    return call.texts is not None and len(set(call.texts)) > 1


@dataclass(frozen=True)
class Places:
    """The sizes by which a forward's calls are known.

    layers: the calls, in order. texts: tokens of each part of the text, padding included. grid: frames, rows
    and columns of the image's tokens.
    """

    family: Family
    layers: tuple[Layer, ...]
    batch: int
    texts: tuple[int, ...]
    grid: tuple[int, int, int]
    multiple: int

    @property
    def image(self) -> int:
        return math.prod(self.grid)

    @classmethod
    def of(cls, call: Call, forward: Forward, network: Any) -> Places:
        family = call.run.family
        assert family is not None
        references = bool(forward.kwargs.get("ref_latents"))
        layers = call.run.once(
            ("layers", references), lambda: families.layers_of(family, network, references)
        )
        multiple = getattr(network, family.multiple) if family.multiple else 1
        texts = family.text_lengths(forward.arguments)
        return cls(family, layers, forward.x.shape[0], texts, family.grid(forward.x), multiple)

    def fits(self, layer: Layer, q: Tensor, k: Tensor) -> bool:
        """Whether a call has the shape of this layer's."""
        sizes = q.shape[-2], k.shape[-2]
        if layer.kind == "features":
            return q.shape[0] != self.batch
        if q.shape[0] != self.batch:
            return False
        if layer.kind == "reference":
            return True
        every, first, image = (
            size + -size % self.multiple for size in (sum(self.texts), self.texts[0], self.image)
        )
        if layer.kind == "joint":
            least = self.family.registers + every + image
            more = "references" in self.family.order
            return sizes[0] == sizes[1] and (sizes[0] == least or (more and sizes[0] > least))
        return sizes == {"self": (image, image), "cross": (image, every), "text": (first, first)}[layer.kind]

    def tokens(self, layer: Layer, length: int) -> Tokens:
        """Where text and image lie in a call; of text alone all is text, and else, but for joint and
        cross-attention, all is image."""
        if layer.kind == "joint":
            return self.family.tokens(self.texts, self.image, length, self.multiple)
        if layer.kind not in ("cross", "text"):
            return Tokens((), slice(0, length))
        texts = self.texts if layer.kind == "cross" else self.texts[:1]
        ends = [sum(texts[: n + 1]) for n in range(len(texts))]
        spans = tuple(slice(end - size, end) for end, size in zip(ends, texts, strict=True))
        return Tokens(spans, slice(0, 0))


class _Override:
    """The override of one forward, or of a part of one.

    previous: another node's. reached: the layers in which something was taken.
    """

    def __init__(
        self,
        call: Call,
        taken: Taken,
        readings: Sequence[Reading],
        places: Places,
        previous: Callable[..., Tensor] | None,
        reached: list[Layer],
    ):
        self.call, self.taken, self.readings, self.places = call, taken, readings, places
        self.previous, self.reached = previous, reached
        self.next = 0
        self.parts = [(frozenset(part.layers), part) for part in taken.self_]

    def __call__(
        self, function: Callable, q: Tensor, k: Tensor, v: Tensor, heads: int, *args: Any, **kwargs: Any
    ) -> Tensor:
        """In the host's form: function is its attention, and whatever else is given goes on to it."""
        inner = function if self.previous is None else functools.partial(self.previous, function)
        layer = self._layer(q, k)
        if layer is None or layer.kind in ("features", "reference"):
            return inner(q, k, v, heads, *args, **kwargs)
        named = {name: value for name, value in kwargs.items() if name != "mask"}
        mask, *more = args or (kwargs.get("mask"),)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
            return inner(q, k, v, heads, mask, *more, **named)

        return self._edited(layer, joint.Call(q, k, v, mask), heads, attend)

    def _layer(self, q: Tensor, k: Tensor) -> Layer | None:
        """Which layer calls: the next one of this shape; None where no other is to come."""
        layers = self.places.layers
        for n in range(self.next, len(layers)):
            if self.places.fits(layers[n], q, k):
                self.next = n + 1
                return layers[n]
        return None

    def _edited(self, layer: Layer, tensors: joint.Call, heads: int, attend: joint.Attention) -> Tensor:
        tokens = self.places.tokens(layer, tensors.k.shape[-2])
        if layer.kind == "cross":
            self._read(layer, tokens, tensors, heads, attend, self._cross_reads)
            return self._cross(layer, tokens, tensors, attend)
        edits = self._edits(layer)
        if layer.kind == "joint":
            reads = functools.partial(self._joint_reads, edits)
            self._read(layer, tokens, tensors, heads, attend, reads)
        if not edits:
            own = self._groups(layer, tokens, tensors, tuple(range(self.call.batch)))
            return tensors.attend(attend, own)
        sources = None
        if any(edit.kind != "mutual" for edit in edits):
            q, k = self.call.part.sources.queries_and_keys(self.call, layer, tensors.q, tensors.k)
            sources = None if q is tensors.q else (q, k)
        first, *others = edits
        out = self._apply(first, layer, tensors, heads, tokens, attend, sources)
        for edit in others:
            rows = edit.rows(self.call)
            out[rows.target] = self._apply_alone(edit, layer, tensors, heads, tokens, attend, sources)
        return out

    def _apply(
        self,
        edit: _Edit,
        layer: Layer,
        tensors: joint.Call,
        heads: int,
        tokens: Tokens,
        attend: joint.Attention,
        sources: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """An edit in the rows of its targets, and ordinary attention in all others."""
        origin, target = edit.numbers(self.call)
        columns = self._columns(layer, tokens, tensors, range(len(origin)), origin, target)
        return edit.attention(
            self.call, attend, tensors, edit.rows(self.call), heads, tokens, columns, sources
        )

    def _apply_alone(
        self,
        edit: _Edit,
        layer: Layer,
        tensors: joint.Call,
        heads: int,
        tokens: Tokens,
        attend: joint.Attention,
        sources: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """An edit's rows alone."""
        origin, target = edit.numbers(self.call)
        rows = edit.rows(self.call)
        alone = Rows(
            torch.arange(len(target), device=rows.target.device),
            rows.branch,
            rows.origin.index_select(0, rows.target),
        )
        origins = [origin[row] for row in target]
        columns = self._columns(layer, tokens, tensors, target, origins, range(len(target)))
        return edit.attention(
            self.call,
            attend,
            tensors.rows(rows.target),
            alone,
            heads,
            tokens,
            columns,
            sources or (tensors.q, tensors.k),
            tensors,
        )

    def _edits(self, layer: Layer) -> tuple[_Edit, ...]:
        """What is taken in a layer that is no cross-attention, each target's rows in one edit at most."""
        call = self.call
        parts = tuple(part for layers, part in self.parts if layer in layers)
        cross = self.taken.cross if layer.kind == "joint" else None
        if not any(part.everywhere or call.own for part in parts) and not (cross and call.own):
            return ()
        self.reached.append(layer)
        taken = tuple((part.kind, part.weights, part.everywhere) for part in parts)
        key = ("edits", call.chunks, call.own, call.part.targets, cross, taken)
        return call.run.once(key, lambda: edits_of(call, cross, parts))

    def _cross(self, layer: Layer, tokens: Tokens, tensors: joint.Call, attend: joint.Attention) -> Tensor:
        """Cross-attention, as in U-Nets, with each row's own columns."""
        call, step = self.call, self.taken.cross
        if step is None or not call.own:
            return tensors.attend(attend, self._groups(layer, tokens, tensors, tuple(range(call.batch))))
        self.reached.append(layer)
        rows, columns = call.rows(), self._cross_columns(layer, tokens, tensors)
        step = call.run.once(
            ("cross", rows, self.taken.cross, tensors.v.dtype),
            lambda: step.to(tensors.v.device, tensors.v.dtype).by_row(rows.branch),
        )
        sources, masked, targets = None, tensors, tensors.rows(rows.target)
        if step.moved is not None:
            sources = call.part.sources.queries_and_keys(call, layer, tensors.q, tensors.k)
            if call.part.sources.in_batch:
                masked = tensors.rows(rows.origin)
        layout = tensors.v.shape[1] if tensors.v.ndim == 4 else None

        def attend_in(rest: joint.Call, groups: joint.Groups) -> Callable[..., Tensor]:
            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                v = v if layout is None else rearrange(v, "b l (h d) -> b h l d", h=layout)
                return replace(rest, q=q, k=k, v=v).attend(attend, groups)

            return attention

        return cross_attention(
            attend_in(masked, columns.own if step.moved is None else columns.origin),
            attend_in(targets, columns.target),
            tensors.q,
            tensors.k,
            tensors.v if layout is None else rearrange(tensors.v, "b h l d -> b l (h d)"),
            rows=rows,
            step=step,
            sources=sources,
        )

    def _cross_columns(self, layer: Layer, tokens: Tokens, tensors: joint.Call) -> Columns:
        target, _, origin = self.call.numbers_in(self.call.own, None)
        return self._columns(layer, tokens, tensors, range(self.call.batch), origin, target)

    def _read(
        self,
        layer: Layer,
        tokens: Tokens,
        tensors: joint.Call,
        heads: int,
        attend: joint.Attention,
        edited: Callable[[Layer, Tokens, joint.Call], Sequence[_Reads]],
    ) -> None:
        """Give a layer's maps to whoever reads them. edited: the rows whose maps are edited."""
        call, (_, height, width) = self.call, self.places.grid
        readings = [reading for reading in self.readings if layer in reading.layers]
        if not readings:
            return
        parts = [*edited(layer, tokens, tensors)]
        parts += self._reads_of_others(layer, tokens, tensors, {n for part in parts for n in part.targets})
        queries = (tokens.image,) if layer.kind == "joint" else None
        for reading in readings:
            columns = self._wanted(reading, tensors.v.dtype)
            maps = tensors.v.new_zeros(call.batch, height * width, columns.shape[2], dtype=torch.float32)
            for part in parts:
                maps[part.rows.target] = joint.read_maps(
                    attend,
                    part.terms,
                    tokens=tokens,
                    rows=part.rows,
                    heads=heads,
                    wanted=columns.index_select(0, part.rows.branch + 1),
                    queries=queries,
                )
            reading.add(call, layer, maps.index_select(0, call.map_rows().row), (height, width))

    def _wanted(self, reading: Reading, dtype: torch.dtype) -> Tensor:
        """The columns to read, (B, t, W)."""
        call = self.call
        key = ("map columns", reading.tokens, call.length, call.texts, call.device, dtype)
        return call.run.once(key, lambda: reading.columns(call).to(dtype).to(call.device))

    def _joint_reads(
        self, edits: Sequence[_Edit], layer: Layer, tokens: Tokens, tensors: joint.Call
    ) -> list[_Reads]:
        """What the targets' images use in joint attention, in the pair's own chunks."""
        call = self.call
        own = call.run.once(
            ("edits read", edits),
            lambda: [replace(edit, chunks=call.own) for edit in edits if call.own[0] in edit.chunks],
        )
        found = []
        for edit in own:
            rows, (origin, target) = edit.rows(call), edit.numbers(call)
            columns = self._columns(layer, tokens, tensors, range(call.batch), origin, target)
            found.append(_Reads(edit.targets, rows, edit.terms(call, tensors, rows, tokens, columns)))
        return found

    def _cross_reads(self, layer: Layer, tokens: Tokens, tensors: joint.Call) -> list[_Reads]:
        """What the targets' images use in cross-attention; its re-weighting left out."""
        call, step = self.call, self.taken.cross
        if step is None:
            return []
        rows = call.rows()
        plain = step.unscaled or step
        by_row = call.run.once(
            ("cross", rows, plain, tensors.v.dtype),
            lambda: plain.to(tensors.v.device, tensors.v.dtype).by_row(rows.branch),
        )
        columns = self._cross_columns(layer, tokens, tensors)
        terms = joint.cross_terms(tensors, rows=rows, step=by_row, columns=columns)
        return [_Reads(call.part.targets, rows, terms)]

    def _reads_of_others(
        self, layer: Layer, tokens: Tokens, tensors: joint.Call, edited: set[int]
    ) -> list[_Reads]:
        """What the images of sources and of targets that are not edited use: their own maps."""
        call = self.call
        branches = call.part.branches
        own = [
            (chunk * call.chunk + row, branches[row % len(branches)] - 1)
            for chunk in call.own
            for row in range(call.chunk)
            if branches[row % len(branches)] - 1 not in edited
        ]
        numbers = [row for row, _ in own]
        rows = call.run.once(
            ("rows read", *_rows_key(call), tuple(numbers)),
            lambda: Rows(
                torch.tensor(numbers, device=call.device),
                torch.tensor([branch for _, branch in own], device=call.device),
                torch.arange(call.batch, device=call.device),
            ),
        )
        groups = self._groups(layer, tokens, tensors, tuple(numbers))
        return [_Reads((), rows, joint.own_terms(tensors, Columns(target=groups)))]

    def _columns(
        self,
        layer: Layer,
        tokens: Tokens,
        tensors: joint.Call,
        own: Sequence[int],
        origin: Sequence[int],
        target: Sequence[int],
    ) -> Columns:
        """The columns that each row keeps. own: the rows of the call; target: their places in it."""

        def groups(rows: Sequence[int]) -> joint.Groups:
            return self._groups(layer, tokens, tensors, tuple(rows))

        return Columns(
            groups(own),
            groups(origin),
            groups([own[place] for place in target]),
            groups([origin[place] for place in target]),
        )

    def _groups(
        self, layer: Layer, tokens: Tokens, tensors: joint.Call, rows: tuple[int, ...]
    ) -> joint.Groups:
        call, family = self.call, self.places.family
        if not is_padded(call) or family.pad_token is not None or not tokens.text:
            return None
        length = tensors.k.shape[-2]
        key = ("columns", layer.kind, call.texts, *_rows_key(call), length, rows)
        front = family.padding == "front"
        is_target = [bool(branch_of(call, row)) for row in range(call.batch)]
        return call.run.once(
            key,
            lambda: groups_of(
                [kept_columns(call, row, tokens, length, front) for row in rows],
                length,
                call.device,
                is_target if len(rows) == call.batch else None,
            ),
        )


def _rows_key(call: Call) -> tuple:
    """Of what a call's rows are."""
    return call.batch, call.chunk, call.own, call.part.targets, call.part.sources.in_batch, call.device


def branch_of(call: Call, row: int) -> int | None:
    """The branch whose text a row has; None of a negative prompt's. Known sources' rows are behind."""
    if row >= call.batch:
        return 0
    chunk, place = divmod(row, call.chunk)
    branches = call.part.branches
    return branches[place % len(branches)] if chunk in call.own else None


def kept_columns(call: Call, row: int, tokens: Tokens, length: int, front: bool) -> Spans:
    """The columns of a row that are no padding, of `length` in all."""
    branch = branch_of(call, row)
    if branch is None or call.texts is None:
        return (slice(0, length),)
    kept, begin = [], 0
    for span, own in zip(tokens.text, call.texts[branch], strict=False):
        pads = slice(span.start, span.stop - own) if front else slice(span.start + own, span.stop)
        if pads.start < pads.stop:
            kept.append(slice(begin, pads.start))
            begin = pads.stop
    return tuple(span for span in (*kept, slice(begin, length)) if span.start < span.stop)


@dataclass(frozen=True, eq=False)
class _Reads:
    """Rows whose maps are read, and what these are made of.

    targets: those among them whose maps are edited. rows: as of targets; the branch of a source is -1.
    """

    targets: Group
    rows: Rows
    terms: Sequence[joint.Term]


@dataclass(frozen=True, eq=False)
class _Edit:
    """What the targets of some chunks take in a call.

    weights: of each target that takes, by number. step: of words, and of mutual attention the re-weighting.
    """

    kind: Literal["words", "image", "mutual"]
    chunks: tuple[int, ...]
    weights: tuple[tuple[int, float], ...]
    step: CrossStep | None = None

    def rows(self, call: Call) -> Rows:
        return call.rows_in(self.chunks, self.targets)

    def numbers(self, call: Call) -> tuple[list[int], list[int]]:
        """The rows' origins, and which are targets, as numbers."""
        target, _, origin = call.numbers_in(self.chunks, self.targets)
        return origin, target

    @property
    def targets(self) -> Group:
        return tuple(number for number, _ in self.weights)

    def attention(
        self,
        call: Call,
        attend: joint.Attention,
        tensors: joint.Call,
        rows: Rows,
        heads: int,
        tokens: Tokens,
        columns: Columns,
        sources: tuple[Tensor, Tensor] | None,
        whole: joint.Call | None = None,
    ) -> Tensor:
        """whole: the call of all rows, where tensors are those of the targets alone."""
        given = self._given(call, tensors, rows, tokens, columns)
        if self.kind == "mutual":
            given["sources"] = None if whole is None else (whole.k, whole.v)
            given["gain"] = self._step(call, rows.branch, tensors.v).gain
        else:
            given["sources"] = sources
        return ATTENTION[self.kind](attend, tensors, heads=heads, **given)

    def terms(
        self, call: Call, tensors: joint.Call, rows: Rows, tokens: Tokens, columns: Columns
    ) -> list[joint.Term]:
        """What the targets' image is made of, in a call with all rows; re-weighting left out."""
        return TERMS[self.kind](tensors, **self._given(call, tensors, rows, tokens, columns))

    def _given(
        self, call: Call, tensors: joint.Call, rows: Rows, tokens: Tokens, columns: Columns
    ) -> dict[str, Any]:
        step = self._step(call, rows.branch, tensors.v)
        given: dict[str, Any] = {"tokens": tokens, "rows": rows, "columns": columns}
        if self.kind == "words":
            return {**given, "step": step}
        return {**given, "weight": None if all(w == 1.0 for _, w in self.weights) else step.weight}

    def _step(self, call: Call, branch: Tensor, like: Tensor) -> joint.WordStep:
        """Tables with an entry for each row that takes."""

        def make() -> joint.WordStep:
            share = torch.zeros(call.run.branches - 1, dtype=torch.float64)
            for number, weight in self.weights:
                share[number] = weight
            gain = None if self.step is None else self.step.gain
            words = joint.WordStep(None, None, share, gain)
            if self.kind == "words":
                assert self.step is not None
                words = word_step(self.step, share)
            return words.by_row(branch, like)

        return call.run.once(("edit", self, *_rows_key(call), like.dtype), make)


def edits_of(call: Call, cross: CrossStep | None, parts: Sequence[SelfTaken]) -> tuple[_Edit, ...]:
    """The edits of a layer: mutual attention where it is open, else words where the text's window is, else
    the source's image. In other conditionings than the pair's own there are no words."""
    opened = open_targets(cross)

    def taken(own: bool) -> dict[str, dict[int, float]]:
        found: dict[str, dict[int, float]] = {}
        for number in call.part.targets:
            here = [(part.kind, part.weights[number]) for part in parts if own or part.everywhere]
            mutual = max((weight for kind, weight in here if kind == "mutual"), default=0.0)
            image = max((weight for kind, weight in here if kind == "map"), default=0.0)
            if mutual:
                found.setdefault("mutual", {})[number] = mutual
            elif own and number in opened:
                found.setdefault("words", {})[number] = image
            elif image:
                found.setdefault("image", {})[number] = image
        return found

    others = tuple(chunk for chunk in range(call.chunks) if chunk not in call.own)
    in_own, in_others = taken(True) if call.own else {}, taken(False) if others else {}
    edits = []
    for kind in ("words", "image", "mutual"):
        step = cross if kind != "image" and cross is not None else None
        gained = kind == "mutual" and step is not None and step.gain is not None
        chunks = [(call.own, in_own.get(kind), step), (others, in_others.get(kind), None)]
        if in_own.get(kind) == in_others.get(kind) and not gained:
            chunks = [((*call.own, *others), in_own.get(kind), None)]
        edits += [_Edit(kind, where, tuple(w.items()), s) for where, w, s in chunks if w]
    return tuple(edits)


@contextmanager
def _filled_up(call: Call, network: Any, path: str, token: str) -> Iterator[None]:
    """Padding behind a prompt gets the token with which the network itself fills up."""

    def fill(module: Any, given: Any, out: Tensor) -> Tensor:
        own = _own_tokens(call, out.shape[1])
        return torch.where(own[..., None], out, getattr(network, token).to(out))

    handle = families.at(network, path).register_forward_hook(fill)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _mean_of_own_tokens(call: Call, network: Any, path: str) -> Iterator[None]:
    """What is a mean over all tokens, of which padding is zero, becomes one over a prompt's own."""

    def scale(module: Any, given: tuple) -> tuple:
        own = _own_tokens(call, call.tokens)
        factor = own.shape[1] / own.sum(1).to(given[0].dtype)
        return (given[0] * factor.reshape(-1, *[1] * (given[0].ndim - 1)), *given[1:])

    handle = families.at(network, path).register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()


def _own_tokens(call: Call, length: int) -> Tensor:
    """(b, length), true where a row's text is no padding, which stands behind it."""

    def make() -> Tensor:
        assert call.texts is not None
        branches = [branch_of(call, row) for row in range(call.batch)]
        sizes = [length if branch is None else call.texts[branch][0] for branch in branches]
        ends = torch.tensor(sizes, device=call.device)
        return torch.arange(length, device=call.device) < ends[:, None]

    return call.run.once(("own tokens", call.texts, *_rows_key(call), length), make)


class _Options(threading.local):
    """The options of the forward that this thread is in."""

    current: dict | None = None


class _StandIn:
    """In the place of a module's attention function: it passes the options of the forward under way on."""

    def __init__(self, function: Callable):
        self.function, self.options, self.users = function, _Options(), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        options = self.options.current
        given = kwargs if options is None else {"transformer_options": options, **kwargs}
        return self.function(*args, **given)


_LOCK = threading.Lock()


@contextmanager
def standing_in(module: Any, options: dict) -> Iterator[None]:
    """For one forward of this thread, a module that calls attention without options gives it these.

    Forwards of other threads may be under way; the last one puts the module's function back.
    """
    with _LOCK:
        if not isinstance(module.optimized_attention, _StandIn):
            module.optimized_attention = _StandIn(module.optimized_attention)
        stand_in = module.optimized_attention
        stand_in.users += 1
    before, stand_in.options.current = stand_in.options.current, options
    try:
        yield
    finally:
        stand_in.options.current = before
        with _LOCK:
            stand_in.users -= 1
            if not stand_in.users and module.optimized_attention is stand_in:
                module.optimized_attention = stand_in.function

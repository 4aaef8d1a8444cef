"""Law 4 for one softmax over text and image, per call, in fp64: rewritten values equal materialised maps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from p2p.attention.inject import paired_rows
from p2p.attention.joint import (
    Call,
    Tokens,
    WordStep,
    columns_of,
    cross_terms,
    image_attention,
    image_terms,
    mutual_attention,
    mutual_terms,
    own_terms,
    read_maps,
    word_attention,
    word_terms,
)
from p2p.attention.taken import CrossStep
from p2p.tests import naive

HEADS, WIDTH, IMAGE = 2, 6, 7
EXACT = {"rtol": 0.0, "atol": 1e-12}
ORDERS = {
    "text first": ("text", "image"),
    "image first": ("image", "text"),
    "registers, text, image": ("other", "text", "image"),
    "text, image, references": ("text", "image", "other"),
    "text, references, image": ("text", "other", "image"),
    "image between two texts": ("text", "image", "text"),
    "image, three texts": ("image", "text", "text", "text"),
}
TEXT = 4
"""Tokens of each part of the text, where prompts have equal lengths."""


@dataclass(frozen=True)
class Layout:
    """How the host lays out one call: whether heads are an axis of q, k, v and of the result."""

    axis: bool
    output_axis: bool
    kv_heads: int = HEADS
    v_axis: bool = False

    def attend(self, q, k, v, mask=None):
        if not self.axis:
            q, k, v = (rearrange(x, "b n (h d) -> b h n d", d=WIDTH) for x in (q, k, v))
        k, v = (x.repeat_interleave(HEADS // self.kv_heads, dim=1) for x in (k, v))
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out if self.output_axis else rearrange(out, "b h n d -> b n (h d)")

    def pack(self, x):
        """(b, h, L, d) as the host has it."""
        return x if self.axis else rearrange(x, "b h n d -> b n (h d)")

    def unpack(self, out):
        return out if self.output_axis else rearrange(out, "b n (h d) -> b h n d", d=WIDTH)


LAYOUTS = {
    "heads an axis": Layout(True, True),
    "heads an axis of q only": Layout(True, False),
    "heads side by side": Layout(False, False),
    "heads an axis of v only": Layout(False, False, v_axis=True),
    "fewer heads of k and v": Layout(True, False, kv_heads=1),
    "fewer heads, side by side": Layout(False, False, kv_heads=1),
}


class Batch:
    """Rows of a call, others and then pairs of a source and its targets; each also as the formula reads it.

    lengths: tokens of each branch's text in each of its parts, padded to the longest `at` the end or the
    front.
    """

    def __init__(
        self, order, layout, targets=1, pairs=1, uncond=0, lengths=(TEXT,), at="end", seed=0, tied=False
    ):
        self.layout, self.targets, self.pairs, self.uncond = layout, targets, pairs, uncond
        self.lengths = [lengths[n % len(lengths)] for n in range(targets + 1)]
        text = max(self.lengths)
        sizes = [{"text": text, "image": IMAGE, "other": 3}[kind] for kind in order]
        spans = [slice(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        self.length, self.parts = sum(sizes), order.count("text")
        self.text = [span for kind, span in zip(order, spans, strict=True) if kind == "text"]
        self.other = [span for kind, span in zip(order, spans, strict=True) if kind == "other"]
        self.tokens = Tokens(tuple(self.text), spans[order.index("image")])
        self.size = uncond + pairs * (targets + 1)
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(self.size, heads, self.length, WIDTH, generator=generator, dtype=torch.float64)
            for heads in (HEADS, layout.kv_heads, layout.kv_heads)
        )
        if tied:
            q, k, v = (x[:1].repeat(self.size, 1, 1, 1) for x in (q, k, v))
        self.full = (q, k, v)
        packed = [layout.pack(x) for x in self.full]
        if layout.v_axis:
            packed[2] = rearrange(v, "b h n d -> b n h d")
        self.call = Call(*packed)
        self.rows = paired_rows(self.size, range(targets), [uncond], pairs * (targets + 1), q.device)
        self.real = [self._real(self.lengths[self.branch(row)], text, at) for row in range(self.size)]
        kept = [
            tuple(self._kept(kind, span, real) for kind, span in zip(order, spans, strict=True))
            for real in self.real
        ]
        self.kept = kept
        self.columns = columns_of(
            kept, self.rows.origin.tolist(), self.rows.target.tolist(), self.length, q.device
        )

    @staticmethod
    def _real(length, text, at):
        return slice(0, length) if at == "end" else slice(text - length, text)

    @staticmethod
    def _kept(kind, span, real):
        return slice(span.start + real.start, span.start + real.stop) if kind == "text" else span

    def branch(self, row):
        return (row - self.uncond) % (self.targets + 1) if row >= self.uncond else 0

    def text_index(self, row):
        """Places in the call of a row's text tokens, padding left out."""
        real = self.real[row]
        return [span.start + n for span in self.text for n in range(real.start, real.stop)]

    def columns_index(self, row):
        """Places among the edit's tokens of a row's text tokens, padding left out."""
        real, text = self.real[row], self.text[0].stop - self.text[0].start
        return [part * text + n for part in range(self.parts) for n in range(real.start, real.stop)]

    def joint(self, row, head):
        """A row and head as the naive formula reads it."""
        shared = head // (HEADS // self.layout.kv_heads)
        q, k, v = (x[row, n] for x, n in zip(self.full, (head, shared, shared), strict=True))
        image, other = self.tokens.image, [n for span in self.other for n in range(span.start, span.stop)]
        return naive.Joint(*(naive.Part(q[n], k[n], v[n]) for n in (self.text_index(row), image, other)))

    def check(self, out, edited):
        """Compare a result with the naive formula on the targets' rows, and plain attention on all others."""
        out = self.layout.unpack(out)
        for row in range(self.size):
            branch = self.branch(row)
            for head in range(HEADS):
                own = self.joint(row, head)
                if branch:
                    expected = edited(self.joint(row - branch, head), own, row)
                else:
                    expected = naive.joint_result(own, *(naive.joint_plain(part.q, own) for part in own))
                found = out[row, head]
                other = [n for span in self.other for n in range(span.start, span.stop)]
                for place, part in zip(
                    (self.text_index(row), self.tokens.image, other), expected, strict=True
                ):
                    torch.testing.assert_close(found[place], part.v, **EXACT)

    def options(self):
        return {"tokens": self.tokens, "rows": self.rows, "heads": HEADS, "columns": self.columns}

    def reads(self):
        return {"tokens": self.tokens, "rows": self.rows, "heads": HEADS}

    def tables(self, seed=1):
        """One M, share and gain for each target of one pair, over the text's tokens with padding."""
        t = self.parts * (self.text[0].stop - self.text[0].start)
        generator = torch.Generator().manual_seed(seed)
        mapping, share, gain = (
            torch.rand(self.targets, *shape, generator=generator, dtype=torch.float64)
            for shape in ((t, t), (t,), (t,))
        )
        for n in range(self.targets):  # padding gives nothing and takes nothing
            mapping[n][:, [j for j in range(t) if j not in self.columns_index(self.uncond + 1 + n)]] = 0
        return mapping, share, 4 * gain - 2

    def full_gain(self, gain, row):
        """One target's gain on the columns that the naive formula has."""
        rest = IMAGE + sum(span.stop - span.start for span in self.other)
        return torch.cat([gain[self.columns_index(row)], gain.new_ones(rest)])


UNEQUAL = {"equal": (TEXT,), "longer target": (3, 5, 4, 3), "longer source": (6, 2, 4)}
everywhere = pytest.mark.parametrize(
    ("order", "layout"),
    [(order, "heads an axis") for order in ORDERS]
    + [("text first", layout) for layout in LAYOUTS]
    + [("image between two texts", "fewer heads, side by side")],
)
rows = pytest.mark.parametrize(
    ("targets", "pairs", "uncond"), [(1, 1, 2), (3, 2, 1)], ids=["1 target", "3, two pairs"]
)
lengths = pytest.mark.parametrize(
    ("lengths", "at"), [("equal", "end"), *((n, at) for n in list(UNEQUAL)[1:] for at in ("end", "front"))]
)


def make(order, layout, targets=1, pairs=1, uncond=0, lengths="equal", at="end", **more):
    return Batch(ORDERS[order], LAYOUTS[layout], targets, pairs, uncond, UNEQUAL[lengths], at, **more)


def of_rows(batch, table):
    return None if table is None else table.index_select(0, batch.rows.branch)


METHODS = {"image": (image_attention, naive.joint_image), "mutual": (mutual_attention, naive.joint_mutual)}


def check_image(batch, method, weights=None, gain=None):
    """One method of the image's part, with a weight and gains for each target."""
    attention, formula = METHODS[method]

    def edited(source, own, row):
        n = batch.branch(row) - 1
        c = torch.ones(batch.targets, batch.parts * 10, dtype=torch.float64) if gain is None else gain
        return formula(source, own, 1.0 if weights is None else float(weights[n]), batch.full_gain(c[n], row))

    out = attention(
        batch.layout.attend,
        batch.call,
        weight=of_rows(batch, weights),
        gain=of_rows(batch, gain),
        **batch.options(),
    )
    batch.check(out, edited)
    return out


def check_words(batch, mapping, share, weights, gain=None, kept=True):
    """kept: whether the targets keep anything of their own; if not, share and weights are 1."""

    def edited(source, own, row):
        n = batch.branch(row) - 1
        origin = row - batch.branch(row)
        columns = batch.columns_index(row)
        part = mapping[n][batch.columns_index(origin)][:, columns]
        c = torch.ones_like(share) if gain is None else gain
        return naive.joint_words(
            source, own, part, share[n][columns], float(weights[n]), batch.full_gain(c[n], row)
        )

    moved = mapping * share[:, None, :]
    step = WordStep(
        of_rows(batch, moved if share.any() or weights.any() else None),
        of_rows(batch, 1 - share if kept else None),
        of_rows(batch, weights),
        of_rows(batch, gain),
    )
    out = word_attention(batch.layout.attend, batch.call, step=step, **batch.options())
    batch.check(out, edited)
    return out


FADED = torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64)


@everywhere
@rows
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("faded", [False, True])
def test_the_image_part_equals_the_materialised_formula(order, layout, targets, pairs, uncond, method, faded):
    batch = make(order, layout, targets, pairs, uncond)
    check_image(batch, method, FADED[:targets] if faded else None)


@everywhere
@rows
@pytest.mark.parametrize("kept", [False, True])
def test_words_equal_the_materialised_formula(order, layout, targets, pairs, uncond, kept):
    batch = make(order, layout, targets, pairs, uncond)
    mapping, share, _ = batch.tables()
    if kept:
        check_words(batch, mapping, share, FADED[:targets])
    else:
        check_words(batch, mapping, torch.ones_like(share), torch.ones(targets).double(), kept=False)


@lengths
@rows
@pytest.mark.parametrize("method", [*METHODS, "words"])
@pytest.mark.parametrize("order", ["text, image, references", "image between two texts"])
def test_padding_takes_no_part(order, targets, pairs, uncond, method, lengths, at):
    batch = make(order, "heads an axis of q only", targets, pairs, uncond, lengths, at)
    mapping, share, gain = batch.tables()
    if method == "words":
        check_words(batch, mapping, share, FADED[:targets], gain)
    else:
        check_image(batch, method, FADED[:targets], gain)


@everywhere
@pytest.mark.parametrize("method", [*METHODS, "words", "all words", "own map"])
@pytest.mark.parametrize("scale", [-1.5, 0.0])
def test_re_weighting_equals_the_materialised_formula_and_keeps_the_sums_of_rows(
    order, layout, method, scale
):
    batch = make(order, layout, targets=2, uncond=1)
    mapping, share, gain = batch.tables()
    gain = gain.clone()
    gain[:, 1] = scale
    one = torch.ones(2, dtype=torch.float64)
    if method == "words":
        check_words(batch, mapping, share, FADED[:2], gain)
    elif method == "all words":
        check_words(batch, mapping, torch.ones_like(share), one, gain, kept=False)
    elif method == "own map":
        check_words(batch, mapping, torch.zeros_like(share), 0 * one, gain)
    else:
        check_image(batch, method, None, gain)
    ones = Call(batch.call.q, batch.call.k, torch.ones_like(batch.call.v))
    out = image_attention(batch.layout.attend, ones, gain=of_rows(batch, gain.abs()), **batch.options())
    torch.testing.assert_close(out, torch.ones_like(out), **EXACT)


def test_a_word_left_out_is_as_if_it_were_not_in_the_prompt():
    batch = make("text first", "heads an axis")
    gain = torch.ones(1, TEXT, dtype=torch.float64)
    gain[:, 2] = 0
    out = image_attention(batch.layout.attend, batch.call, gain=gain, **batch.options())
    kept = [(slice(0, TEXT + IMAGE),), (slice(0, 2), slice(3, TEXT + IMAGE))]
    shorter = columns_of(kept, [0, 0], [1], TEXT + IMAGE, batch.call.q.device)
    expected = image_attention(batch.layout.attend, batch.call, **{**batch.options(), "columns": shorter})
    image = batch.tokens.image
    torch.testing.assert_close(out[1, :, image], expected[1, :, image], **EXACT)


@everywhere
@pytest.mark.parametrize("method", [*METHODS, "words"])
def test_equal_prompts_give_equal_rows(order, layout, method):
    batch = make(order, layout, targets=2, tied=True)
    options = batch.options()
    if method == "words":
        t = batch.parts * TEXT
        moved = torch.eye(t, dtype=torch.float64).repeat(2, 1, 1)
        step = WordStep(moved, None, torch.ones(2, dtype=torch.float64))
        out = word_attention(batch.layout.attend, batch.call, step=step, **options)
        torch.testing.assert_close(out[1:], out[:1].expand_as(out[1:]), **EXACT)
    else:
        out = METHODS[method][0](batch.layout.attend, batch.call, **options)
        torch.testing.assert_close(out, out[:1].expand_as(out), **EXACT)
        assert method == "mutual" or (out == out[:1]).all()  # one call


@everywhere
@pytest.mark.parametrize("method", [*METHODS, "words"])
def test_weight_0_gives_plain_rows_and_the_source_and_other_rows_are_never_touched(order, layout, method):
    batch = make(order, layout, targets=2, uncond=1)
    plain = batch.layout.attend(batch.call.q, batch.call.k, batch.call.v)
    mapping, share, gain = batch.tables()
    for nothing in (True, False):
        weight = torch.tensor([0.0, 0.0] if nothing else [0.4, 1.0], dtype=torch.float64)
        if method == "words":
            share = torch.zeros_like(share) if nothing else share
            step = WordStep(mapping * share[:, None], 1 - share, weight, None if nothing else gain)
            out = word_attention(batch.layout.attend, batch.call, step=step, **batch.options())
        else:
            out = METHODS[method][0](
                batch.layout.attend,
                batch.call,
                weight=weight,
                gain=None if nothing else gain,
                **batch.options(),
            )
        assert (out[:2] == plain[:2]).all()
        torch.testing.assert_close(out[2:], plain[2:], **EXACT) if nothing else None
        assert nothing or not torch.allclose(out[2:], plain[2:], atol=1e-3)
        share = batch.tables()[1]


@pytest.mark.parametrize("method", ["mutual", "words"])
@pytest.mark.parametrize("order", ORDERS)
def test_text_rows_of_a_target_are_its_own(order, method):
    batch = make(order, "heads an axis", targets=2)
    plain = batch.layout.attend(batch.call.q, batch.call.k, batch.call.v)
    mapping, share, gain = batch.tables()
    step = WordStep(mapping, None, torch.ones(2, dtype=torch.float64), gain)
    out = (
        word_attention(batch.layout.attend, batch.call, step=step, **batch.options())
        if method == "words"
        else mutual_attention(batch.layout.attend, batch.call, gain=gain, **batch.options())
    )
    for span in batch.text + batch.other:
        torch.testing.assert_close(out[:, :, span], plain[:, :, span], **EXACT)


@pytest.mark.parametrize("method", ["image", "words"])
@pytest.mark.parametrize("lengths", UNEQUAL)
def test_known_sources_give_what_sources_in_the_batch_give(method, lengths):
    """The targets alone, with what their sources give behind the batch."""
    batch = make("text first", "heads an axis", targets=2, pairs=2, uncond=1, lengths=lengths)
    mapping, share, gain = batch.tables()
    alone = torch.tensor([0, 2, 3, 5, 6])  # without the sources, 1 and 4
    call = batch.call.rows(alone)
    known = tuple(torch.cat([x, y[[1, 4]]]) for x, y in ((call.q, batch.call.q), (call.k, batch.call.k)))
    rows = paired_rows(5, range(2), [1], 4, call.q.device, known=True)
    kept = [batch.kept[row] for row in (*alone.tolist(), 1, 4)]
    columns = columns_of(kept, rows.origin.tolist(), rows.target.tolist(), batch.length, call.q.device)
    options = {"tokens": batch.tokens, "heads": HEADS}
    weight = of_rows(batch, FADED[:2])
    if method == "words":
        step = WordStep(of_rows(batch, mapping), of_rows(batch, 1 - share), weight, of_rows(batch, gain))
        given, function = {"step": step}, word_attention
    else:
        given, function = {"weight": weight, "gain": of_rows(batch, gain)}, image_attention
    out = function(batch.layout.attend, call, rows=rows, columns=columns, sources=known, **given, **options)
    expected = function(batch.layout.attend, batch.call, **given, **batch.options())
    torch.testing.assert_close(out, expected[alone], **EXACT)


class Calls:
    """Attention that remembers how much it did: rows times queries of each call."""

    def __init__(self, attend):
        self.attend, self.sizes = attend, []

    def __call__(self, q, k, v, **mask):
        self.sizes.append((q.shape[0], q.shape[-2], k.shape[-2]))
        return self.attend(q, k, v, **mask)


def test_what_each_method_costs():
    batch = make("text first", "heads side by side", targets=1, uncond=2)
    mapping, share, gain = batch.tables()
    everything, image, text = (4, TEXT + IMAGE), (1, IMAGE), (1, TEXT)
    one = torch.ones(1, dtype=torch.float64)
    cases = [
        (image_attention, {}, [everything]),
        (image_attention, {"weight": one / 2}, [everything, (1, TEXT + IMAGE)]),
        (image_attention, {"gain": gain}, [everything, image, text]),
        (mutual_attention, {}, [everything, text]),
        (word_attention, {"step": WordStep(mapping, None, one)}, [everything, text]),
        (word_attention, {"step": WordStep(mapping, share, one)}, [everything, image, text]),
    ]
    for function, given, expected in cases:
        calls = Calls(batch.layout.attend)
        function(calls, batch.call, **given, **batch.options())
        assert [size[:2] for size in calls.sizes] == expected
        assert {size[2] for size in calls.sizes} == {TEXT + IMAGE}  # no column is sliced out


MASKS = {
    "(q, k)": lambda mask: mask[0],
    "(1, q, k)": lambda mask: mask[:1],
    "(b, 1, k)": lambda mask: mask[:, :1],
    "(b, 1, 1, k)": lambda mask: mask[:, None, :1],
    "(b, q, k)": lambda mask: mask,
    "(b, 1, q, k)": lambda mask: mask[:, None],
}


@pytest.mark.parametrize("shape", MASKS)
@pytest.mark.parametrize("method", [*METHODS, "words"])
@pytest.mark.parametrize("lengths", UNEQUAL)
def test_a_mask_goes_with_its_rows_queries_and_columns(shape, method, lengths):
    """What -inf hides, in each row its own padding and in all rows a column, is as if it were not there."""
    batch = make("text first", "heads an axis", targets=2, uncond=1, lengths=lengths)
    text = batch.text[0].stop
    mask = torch.zeros(batch.size, batch.length, batch.length, dtype=torch.float64)
    if shape.startswith("(b"):
        for row in range(batch.size):
            hidden = [n for n in range(text) if n not in batch.text_index(row)]
            mask[row, :, hidden] = -torch.inf
        mask[:, :, text + 1] = -torch.inf  # and one column of the image
        columns = columns_of(
            [(slice(0, batch.length),)] * batch.size,
            batch.rows.origin.tolist(),
            batch.rows.target.tolist(),
            batch.length,
            batch.call.q.device,
        )
    else:
        mask[:, :, text + 1] = -torch.inf
        columns = batch.columns
    mapping, share, gain = batch.tables()
    given, function = {"weight": FADED[:2], "gain": gain}, METHODS.get(method, (word_attention,))[0]
    if method == "words":
        given = {"step": WordStep(mapping * share[:, None], 1 - share, FADED[:2], gain)}
    call = Call(batch.call.q, batch.call.k, batch.call.v, MASKS[shape](mask))
    options = batch.options()
    out = function(batch.layout.attend, call, **given, **{**options, "columns": columns})
    without = [
        tuple(
            part
            for span in spans
            for part in (
                [span] if span.start != text else [slice(text, text + 1), slice(text + 2, span.stop)]
            )
        )
        for spans in batch.kept
    ]
    columns = columns_of(
        without, batch.rows.origin.tolist(), batch.rows.target.tolist(), batch.length, call.q.device
    )
    expected = function(batch.layout.attend, batch.call, **given, **{**options, "columns": columns})
    for row in range(batch.size):
        torch.testing.assert_close(out[row], expected[row], **EXACT)


def terms_of(batch, method, weights, mapping, share):
    """The terms of one method, and the naive formula of the columns that they make."""
    options = {"tokens": batch.tokens, "rows": batch.rows, "columns": batch.columns}
    if method == "own":
        return own_terms(batch.call, batch.columns), lambda source, own, row: formula(
            naive.joint_image, source, own, 0.0
        )
    if method in METHODS:
        make_terms = {"image": image_terms, "mutual": mutual_terms}[method]
        terms = make_terms(batch.call, weight=of_rows(batch, weights), **options)

        def image(source, own, row):
            weight = 1.0 if weights is None else float(weights[batch.branch(row) - 1])
            return formula(METHODS[method][1], source, own, weight)

        return terms, image
    moved, kept = mapping * share[:, None, :], None if method == "all words" else 1 - share
    weight = torch.ones(batch.targets).double() if weights is None else weights
    step = WordStep(*(of_rows(batch, table) for table in (moved, kept, weight)))

    def words(source, own, row):
        n, columns = batch.branch(row) - 1, batch.columns_index(row)
        part = mapping[n][batch.columns_index(row - n - 1)][:, columns]
        return formula(naive.joint_words, source, own, part, share[n][columns], float(weight[n]))

    return word_terms(batch.call, step=step, **options), words


def formula(method, source, own, *given):
    """The text's columns of the map that a naive formula builds, by one-hot values: (n, t)."""
    text = len(own.text.k)

    def shown(row):
        values = [torch.zeros(len(part.k), text, dtype=torch.float64) for part in row]
        values[0] = torch.eye(len(row.text.k), text, dtype=torch.float64)
        return naive.Joint(*(part._replace(v=v) for part, v in zip(row, values, strict=True)))

    gain = torch.ones(sum(len(part.k) for part in own), dtype=torch.float64)
    return method(shown(source), shown(own), *given, gain).image.v


@everywhere
@pytest.mark.parametrize("method", ["own", *METHODS, "words", "all words"])
@pytest.mark.parametrize("faded", [False, True])
@pytest.mark.parametrize(("lengths", "at"), [("equal", "end"), ("longer target", "front")])
def test_read_maps_are_columns_of_the_materialised_map(order, layout, method, faded, lengths, at):
    batch = make(order, layout, targets=2, uncond=1, lengths=lengths, at=at)
    mapping, share, _ = batch.tables()
    share = torch.ones_like(share) if method == "all words" else share
    terms, columns = terms_of(batch, method, FADED[:2] if faded else None, mapping, share)
    wanted = torch.zeros(2, len(share[0]), WIDTH + 2, dtype=torch.float64)  # more than a head's width
    for n in range(2):
        for w, token in enumerate(batch.columns_index(2 + n)[: WIDTH + 2]):
            wanted[n, token, w] = 1
    options = {"queries": (batch.tokens.image,), "wanted": wanted, **batch.reads()}
    found = read_maps(batch.layout.attend, terms, **options)
    for n, row in enumerate(batch.rows.target.tolist()):
        maps = [columns(batch.joint(1, head), batch.joint(row, head), row) for head in range(HEADS)]
        expected = sum(maps) / HEADS @ wanted[n][batch.columns_index(row)]
        torch.testing.assert_close(found[n].double(), expected, rtol=0, atol=1e-6)


@everywhere
@pytest.mark.parametrize("method", ["own", *METHODS])
@pytest.mark.parametrize(("lengths", "at"), [("equal", "end"), ("longer target", "front")])
def test_words_and_the_rest_of_a_row_have_all_of_its_attention(order, layout, method, lengths, at):
    """One column of all tokens, padding included, which has no share."""
    batch = make(order, layout, targets=2, uncond=1, lengths=lengths, at=at)
    terms, _ = terms_of(batch, method, FADED[:2], *batch.tables()[:2])
    everything = Tokens((slice(0, batch.length),), batch.tokens.image)
    options = batch.reads() | {"tokens": everything}
    wanted = torch.ones(2, batch.length, 1)
    found = read_maps(batch.layout.attend, terms, queries=(everything.image,), wanted=wanted, **options)
    torch.testing.assert_close(found, torch.ones_like(found))


@pytest.mark.parametrize("lengths", UNEQUAL)
@pytest.mark.parametrize("kept", [False, True])
def test_read_maps_of_cross_attention_are_columns_of_the_materialised_map(lengths, kept):
    """Queries of the image, keys of the text alone."""
    batch = make("text first", "heads an axis", targets=2, uncond=1, lengths=lengths)
    text, image = batch.tokens.text, (batch.tokens.image,)
    call = batch.call.keys(text).queries(image)
    columns = columns_of(
        [spans[:1] for spans in batch.kept],
        batch.rows.origin.tolist(),
        batch.rows.target.tolist(),
        text[0].stop,
        call.q.device,
    )
    mapping, share, _ = batch.tables()
    share = share if kept else torch.ones_like(share)
    moved, own = mapping * share[:, None, :], 1 - share if kept else None
    step = CrossStep(of_rows(batch, moved), of_rows(batch, own), of_rows(batch, FADED[:2]))
    terms = cross_terms(call, rows=batch.rows, step=step, columns=columns)
    wanted = torch.eye(text[0].stop, dtype=torch.float64).repeat(2, 1, 1)
    found = read_maps(batch.layout.attend, terms, wanted=wanted, **batch.reads())
    for n, row in enumerate(batch.rows.target.tolist()):
        source, target = batch.columns_index(row - n - 1), batch.columns_index(row)
        expected = torch.zeros(IMAGE, len(target), dtype=torch.float64)
        for head in range(HEADS):
            taken, mine = (
                naive.joint_map(part.image.q, part.text.k)
                for part in (batch.joint(row - n - 1, head), batch.joint(row, head))
            )
            expected += (taken @ moved[n][source][:, target] + (1 - share)[n][target] * mine) / HEADS
        torch.testing.assert_close(found[n][:, target].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "terms"), [("own", 1), ("image", 1), ("words", 2), ("all words", 1)])
@pytest.mark.parametrize("words", [1, WIDTH, WIDTH + 1])
def test_what_reading_maps_costs(method, terms, words):
    """A call for each term and as many columns as a head is wide, of the targets' image queries alone."""
    batch = make("text first", "heads side by side", targets=1, uncond=2)
    mapping, share, _ = batch.tables()
    share = torch.ones_like(share) if method == "all words" else share
    made, _ = terms_of(batch, method, None, mapping, share)
    calls = Calls(batch.layout.attend)
    wanted = torch.ones(1, TEXT, words, dtype=torch.float64)
    options = {"queries": (batch.tokens.image,), "wanted": wanted, **batch.reads()}
    read_maps(calls, made, **options)
    assert calls.sizes == [(1, IMAGE, TEXT + IMAGE)] * (terms * (2 if words > WIDTH else 1))

"""Law 4, per call, in fp64: attention on rewritten values equals the paper's formula on materialised maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from p2p.attention.alignment import MODES
from p2p.attention.edit import Edit, Source
from p2p.attention.inject import Rows, cross_attention, paired_rows, self_attention, self_step
from p2p.attention.plan import Repeated, conditioning_length, cross_weights, make_plan
from p2p.attention.schedule import TauSchedule, Window, in_steps
from p2p.tests import naive
from p2p.tests.prompts import prompt_of

HEADS, WIDTH, PIXELS = 2, 6, 5
EXACT = {"rtol": 0.0, "atol": 1e-12}
WINDOW = 16
"""Tokens per chunk here, instead of 77: the laws do not depend on it, the time does."""


def attend(q, k, v):
    """Ordinary attention, as any of the host's kernels."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=HEADS) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")


def evenly(rows, weight):
    """One weight of the source's self-attention for all targets."""
    return self_step(rows, [weight] * (int(rows.branch.max()) + 1), torch.float64)


class Calls:
    """Attention that remembers what it was called with."""

    def __init__(self):
        self.batches = []

    def __call__(self, q, k, v):
        self.batches.append(q.shape[0])
        return attend(q, k, v)


def make_edit(source, *targets, mode="auto", gains=(), window=WINDOW):
    edit = Edit(Source(prompt_of(source, window)))
    for target in targets:
        edit = edit.with_target(prompt_of(target, window), mode)
    for words, scale in gains:
        edit = edit.reweighted(words, scale)
    return edit


def tensors(rows, length, seed=0, pixels=PIXELS, dtype=torch.float64):
    """q (b, n, h d), k and v (b, L, h d)"""
    generator = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randn(rows, n, HEADS * WIDTH, generator=generator, dtype=torch.float64).to(dtype)

    return draw(pixels), draw(length), draw(length)


def paired_keys(edit, pairs, copies=1, appended=0, seed=0, offset=0, rows=None):
    """Keys and values: row by row as the naive formula reads them, and as the host passes them, in one batch.

    A row's own are its prompt's tokens, once. The batch has them repeated to the common multiple of all
    prompts, and all that `copies` times (beside a negative prompt of more chunks). With `appended` tokens
    behind them, a row's own are what the batch has. Rows that are not the pair's are plain.
    """
    common = conditioning_length(edit)
    lengths = [edit.source.prompt.length, *(target.prompt.length for target in edit.targets)]
    rows = rows if rows is not None else pairs * edit.branches
    own, batch = [], []
    for row in range(rows):
        inside = 0 <= row - offset < pairs * edit.branches
        length = lengths[(row - offset) % edit.branches] if inside else common
        _, k, v = tensors(1, length + appended, seed=seed * 1000 + row)
        prompt = [x[0, :length] for x in (k, v)]
        repeated = [
            torch.cat([a.repeat(common // length, 1), x[0, length:]])
            for a, x in zip(prompt, (k, v), strict=True)
        ]
        own.append(repeated if appended else prompt)
        batch.append([x.repeat(copies, 1) for x in repeated])
    return own, torch.stack([k for k, _ in batch]), torch.stack([v for _, v in batch])


def expected_cross(edit, tau, progress, q, own, offset, pairs):
    """The naive formula for every target row, plain attention for every other."""
    out = []
    for row in range(q.shape[0]):
        k, v = own[row]
        branch = (row - offset) % edit.branches
        if not 0 <= row - offset < pairs * edit.branches or branch == 0:
            out.append(naive.plain(q[row], k, v, HEADS))
            continue
        target = edit.targets[branch - 1]
        weights = cross_weights(target, tau, progress)
        origin = row - branch
        out.append(
            naive.cross_row(
                q[origin],
                own[origin][0],
                q[row],
                k,
                v,
                HEADS,
                target.mapping.double(),
                target.inherits,
                target.gain.double(),
                weights.double(),
            )
        )
    return torch.stack(out)


def injected(edit, tau, step, steps, q, k, v, offset, pairs, length, copies=1):
    """What the pack computes, from a plan made in fp64 for conditionings of `length` tokens."""
    rows = paired_rows(q.shape[0], range(len(edit.targets)), [offset], pairs * edit.branches, q.device)
    cross = make_plan(edit, tau, in_steps(steps), Repeated(edit, length)).cross[step]
    if cross is None:
        return attend(q, k, v)
    step = cross.to(q.device, q.dtype).by_row(rows.branch)
    return cross_attention(attend, attend, q, k, v, rows=rows, step=step, copies=copies)


def check(edit, tau, step=0, steps=10, pairs=1, uncond=0, copies=1, seed=0):
    """Compare one call on `uncond` plain rows and then the pairs' rows."""
    rows = uncond + pairs * edit.branches
    own, k, v = paired_keys(edit, pairs, copies=copies, seed=seed, offset=uncond, rows=rows)
    q, _, _ = tensors(rows, 1, seed=seed + 7)
    found = injected(edit, tau, step, steps, q, k, v, uncond, pairs, conditioning_length(edit), copies)
    expected = expected_cross(edit, tau, step / steps, q, own, uncond, pairs)
    torch.testing.assert_close(found, expected, **EXACT)
    return found, attend(q, k, v)


FULL = TauSchedule(cross=Window(0, 1))
PROMPTS = {
    "same": ("a cat on a mat", "a cat on a mat"),
    "swap": ("a cat on a bi|cycle", "a dog on a bi|cycle"),
    "uneven swap": ("a cat on a mat", "a cro|co|dile on a mat"),
    "uneven swap, fewer": ("a cro|co|dile on a mat", "a cat on a mat"),
    "runs of words": ("a cat on a mat", "a ve|ry big dog on a mat"),
    "added": ("a cat", "draw|ing of a cat at night"),
    "removed": ("draw|ing of a cat at night", "a cat"),
    "several": ("a cat , a hat and a mat", "a dog , a mat and a bi|cycle at night"),
    "nothing in common": ("cat", "bi|cycle dog"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROMPTS)
def test_cross_attention_equals_the_materialised_formula(name, mode):
    found, plain = check(make_edit(*PROMPTS[name], mode=mode), FULL)
    torch.testing.assert_close(found[0], plain[0], **EXACT)  # the source's row
    assert not torch.allclose(found[1], plain[1], atol=1e-3)  # the edit does something


@pytest.mark.parametrize("scale", [-2.0, -1.0, -0.3, 0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize(
    ("name", "word"), [("swap", "dog"), ("added", "drawing"), ("same", "cat"), ("swap", "a, bicycle")]
)
def test_re_weighting_equals_the_materialised_formula(name, word, scale):
    check(make_edit(*PROMPTS[name], gains=[(word, scale)]), FULL)


@pytest.mark.parametrize("fade", [0.3, 1.0])
@pytest.mark.parametrize("step", range(0, 10, 2))
@pytest.mark.parametrize("name", ["swap", "added", "several"])
def test_faded_weights_equal_the_materialised_formula(name, step, fade):
    tau = TauSchedule(cross=Window(0.1, 0.85), fade=fade)
    check(make_edit(*PROMPTS[name], gains=[("a", -1.5)]), tau, step)


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_windows_of_words_equal_the_materialised_formula(step):
    tau = TauSchedule(
        cross=Window(0, 0.8), words=(("dog", Window(0, 0.2)), ("mat", Window(0.4, 1)), ("a#2", Window(0, 0)))
    )
    check(make_edit("a cat on a mat", "a big dog on a mat", gains=[("dog, mat", 2.0)]), tau, step)


@pytest.mark.parametrize("pairs", [1, 3])
@pytest.mark.parametrize("uncond", [0, 2, 9])
def test_several_targets_and_pairs_beside_rows_that_are_not_the_pairs(pairs, uncond):
    edit = make_edit(
        "a cat on a mat", "a dog on a mat", "a cat on a red mat", "bi|cycle", gains=[("red", 2.0)]
    )
    check(edit, TauSchedule(cross=Window(0, 1), fade=0.5), step=7, pairs=pairs, uncond=uncond)


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_a_context_repeated_beside_a_longer_negative_gives_the_same(copies):
    edit = make_edit("a cat on a mat", "a big cro|co|dile on a mat", gains=[("big", -1.0)])
    check(edit, TauSchedule(cross=Window(0, 1), fade=0.5), step=2, uncond=2, copies=copies)


LONG = " ".join(f"w{n}" for n in range(20))


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        (LONG, ["a cat"]),
        ("a cat", [f"{LONG} a"]),
        (f"a cat {LONG}", [f"a dog {LONG} at night"]),
        ("a cat", ["a dog", f"{LONG} a cat", f"{LONG} a cat {LONG}"]),
        (f"a cat {LONG}", ["a dog", f"{LONG} a cat {LONG}"]),
    ],
)
@pytest.mark.parametrize("copies", [1, 2])
def test_prompts_of_different_chunk_counts_equal_each_prompts_own_unrepeated_maps(source, targets, copies):
    tau = TauSchedule(cross=Window(0, 0.9), fade=0.4)
    for step in (0, 6):
        check(make_edit(source, *targets, gains=[("a", 1.5)]), tau, step, copies=copies)


@pytest.mark.parametrize("targets", [["a dog on a mat"], ["a dog", f"{LONG} cat"]])
@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("where", ["conditioning", "attention"])
def test_tokens_that_a_later_node_appended_are_shared(targets, weight, where):
    """Both branches got them, so they pair off one to one, on the general window."""
    edit = make_edit("a cat on a mat", *targets)
    tau = TauSchedule(cross=Window(0, 0.5), fade=0.0 if weight == 1.0 else 1.0)
    assert tau.cross.weight(0.0, tau.fade) == weight
    common, extra = conditioning_length(edit), 4
    own, k, v = paired_keys(edit, 1, appended=extra)
    q, _, _ = tensors(edit.branches, 1, seed=3)
    found = injected(edit, tau, 0, 10, q, k, v, 0, 1, common + (extra if where == "conditioning" else 0))
    for n, target in enumerate(edit.targets, 1):
        rows, columns = common // edit.source.prompt.length, common // target.prompt.length
        mapping = torch.zeros(common + extra, common + extra, dtype=torch.float64)
        for i in range(common):
            for j in range(common):
                mapping[i, j] = target.mapping[i % (common // rows), j % (common // columns)] / columns
        mapping[range(common, common + extra), range(common, common + extra)] = 1
        flat = [
            torch.cat([x.repeat(columns), torch.ones(extra)]).double() for x in (target.inherits, target.gain)
        ]
        weights = torch.full((common + extra,), weight, dtype=torch.float64)
        expected = naive.cross_row(q[0], own[0][0], q[n], *own[n], HEADS, mapping, *flat, weights)
        torch.testing.assert_close(found[n], expected, **EXACT)


words = st.lists(
    st.sampled_from(["a", "cat", "on", "bi|cycle", "e|le|phant", "red", ","]), min_size=1, max_size=9
).map(" ".join)


@given(
    words,
    st.lists(words, min_size=1, max_size=3),
    st.sampled_from(MODES),
    st.floats(-2, 2),
    st.floats(0, 1),
    st.integers(0, 9),
)
@settings(max_examples=50)
def test_any_edit_equals_the_materialised_formula(source, targets, mode, scale, fade, step):
    edit = make_edit(source, *targets, mode=mode, window=6)
    edit = edit.reweighted("cat", scale) if edit.targets[0].prompt.contains("cat") else edit
    tau = TauSchedule(cross=Window(0.1, 0.9), fade=fade)
    rows = edit.branches
    own, k, v = paired_keys(edit, 1)
    q, _, _ = tensors(rows, 1, seed=11)
    found = injected(edit, tau, step, 10, q, k, v, 0, 1, conditioning_length(edit))
    torch.testing.assert_close(found, expected_cross(edit, tau, step / 10, q, own, 0, 1), **EXACT)


# Self-attention


@pytest.mark.parametrize("weight", [1.0, 0.7, 0.1])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("branches", [2, 4])
@pytest.mark.parametrize("uncond", [0, 3])
def test_self_attention_equals_the_materialised_formula(weight, pairs, branches, uncond):
    batch = uncond + pairs * branches
    q, k, v = tensors(batch, PIXELS, seed=5)
    rows = paired_rows(batch, range(branches - 1), [uncond], pairs * branches, q.device)
    found = self_attention(attend, attend, q, k, v, step=evenly(rows, weight))
    for row in range(batch):
        branch = (row - uncond) % branches if row >= uncond else 0
        expected = naive.self_row(
            q[row - branch], k[row - branch], q[row], k[row], v[row], HEADS, weight if branch else 0
        )
        torch.testing.assert_close(found[row], expected, **EXACT)


def test_each_target_takes_as_much_of_the_sources_self_attention_as_its_own_schedule_says():
    q, k, v = tensors(8, PIXELS, seed=5)
    weights = (1.0, 0.0, 0.3)
    rows = paired_rows(8, range(3), [0], 8, q.device, taking=[0, 2])
    found = self_attention(attend, attend, q, k, v, step=self_step(rows, weights, torch.float64))
    for row in range(8):
        branch = row % 4
        weight = weights[branch - 1] if branch else 0.0
        expected = naive.self_row(q[row - branch], k[row - branch], q[row], k[row], v[row], HEADS, weight)
        torch.testing.assert_close(found[row], expected, **EXACT)


def test_targets_on_hard_schedules_of_their_own_need_no_second_call():
    q, k, v = tensors(4, PIXELS)
    previous, own = Calls(), Calls()
    rows = paired_rows(4, range(3), [0], 4, q.device, taking=[0, 2])
    self_attention(previous, own, q, k, v, step=self_step(rows, (1.0, 0.0, 1.0), torch.float64))
    assert (previous.batches, own.batches) == ([4], [])


def test_mistake_of_copying_self_attentions_output_the_targets_own_values_are_weighted():
    """Copying the output would give the target the source's appearance; the map alone gives its layout."""
    q, k, v = tensors(2, PIXELS)
    step = evenly(paired_rows(2, range(1), [0], 2, q.device), 1.0)
    found = self_attention(attend, attend, q, k, v, step=step)
    assert not torch.allclose(found[1], found[0], atol=1e-3)
    scaled = self_attention(attend, attend, q, k, torch.stack([v[0], 3 * v[1]]), step=step)
    torch.testing.assert_close(scaled[1], 3 * found[1], **EXACT)
    torch.testing.assert_close(scaled[0], found[0], **EXACT)


# Rows


def test_chunks_at_several_offsets_tile_source_and_targets():
    rows = paired_rows(14, range(2), [0, 8], 6, torch.device("cpu"))
    assert rows.origin.tolist() == [0, 0, 0, 3, 3, 3, 6, 7, 8, 8, 8, 11, 11, 11]
    assert rows.target.tolist() == [1, 2, 4, 5, 9, 10, 12, 13]
    assert rows.branch.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_mistake_of_editing_both_halves_of_guidance_rows_outside_the_chunks_are_their_own():
    rows = paired_rows(6, range(1), [4], 2, torch.device("cpu"))
    assert rows.origin[:4].tolist() == [0, 1, 2, 3] and rows.target.tolist() == [5]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_that_a_node_split_into_tiles_pair_tile_by_tile(parts):
    """Tiled attention (as HyperTile) makes `parts` consecutive rows of each."""
    q, k, v = tensors(5, parts * 3, pixels=parts * 3)
    rows = paired_rows(5, range(1), [1], 4, q.device)
    tiles = [rearrange(x, "b (p n) c -> (b p) n c", p=parts) for x in (q, k, v)]
    found = rearrange(
        self_attention(attend, attend, *tiles, step=evenly(rows, 0.6)), "(b p) n c -> b p n c", p=parts
    )
    for part in range(parts):
        each = [rearrange(x, "b (p n) c -> b p n c", p=parts)[:, part] for x in (q, k, v)]
        expected = self_attention(attend, attend, *each, step=evenly(rows, 0.6))
        torch.testing.assert_close(found[:, part], expected, **EXACT)


# Manners


def example(dtype=torch.float64, fade=0.5, gain=-0.5):
    edit = make_edit("a cat on a mat", "a big dog on a mat", gains=[("big", gain)])
    q, k, v = tensors(4, WINDOW, dtype=dtype)
    rows = paired_rows(4, range(1), [2], 2, q.device)
    tau = TauSchedule(cross=Window(0, 0.5), fade=fade)
    step = make_plan(edit, tau, in_steps(1), Repeated(edit, WINDOW)).cross[0]
    return q, k, v, rows, step.to(q.device, dtype).by_row(rows.branch)


@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_what_sat_in_the_slot_before_is_called_once_with_the_whole_batch(fade):
    q, k, v, rows, step = example(fade=fade)
    previous, own = Calls(), Calls()
    cross_attention(previous, own, q, k, v, rows=rows, step=step)
    assert previous.batches == [4] and set(own.batches) <= {1}
    previous, own = Calls(), Calls()
    self_attention(previous, own, q, k, v, step=evenly(rows, 1.0 - fade / 2))
    assert previous.batches == [4] and set(own.batches) <= {1}


def test_one_attention_call_is_enough_where_the_target_keeps_nothing_of_its_own():
    edit = make_edit("a cat", "a dog")
    step = make_plan(edit, FULL, in_steps(1), Repeated(edit, WINDOW)).cross[0]
    previous, own = Calls(), Calls()
    q, k, v = tensors(2, WINDOW)
    rows = paired_rows(2, range(1), [0], 2, q.device)
    cross_attention(previous, own, q, k, v, rows=rows, step=step)
    assert (previous.batches, own.batches) == ([2], [])


@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_the_tensors_that_the_host_passes_are_not_modified(fade):
    q, k, v, rows, step = example(fade=fade)
    before = [x.clone() for x in (q, k, v)]
    cross_attention(attend, attend, q, k, v, rows=rows, step=step)
    self_attention(attend, attend, q, k, v, step=evenly(rows, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(before, (q, k, v), strict=True))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-6)]
)
@pytest.mark.parametrize("fade", [0.0, 1.0])
def test_half_precision_stays_in_its_dtype_and_close(dtype, tolerance, fade):
    q, k, v, rows, step = example(dtype, fade)
    exact = [x.double() for x in (q, k, v)]
    found = cross_attention(attend, attend, q, k, v, rows=rows, step=step)
    assert found.dtype == dtype
    wanted = cross_attention(attend, attend, *exact, rows=rows, step=example(fade=fade)[4])
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    found = self_attention(attend, attend, q, k, v, step=evenly(rows, 0.5))
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(),
        self_attention(attend, attend, *exact, step=evenly(rows, 0.5)),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_re_weighting_alone_needs_no_source_map_where_every_word_is_new(scale):
    """refine between prompts that share no word, on windows that exclude everything but one new word."""
    edit = make_edit("cat", "dog", mode="refine", gains=[("dog", scale)])
    check(edit, TauSchedule(cross=Window(0, 0), words=(("dog", Window(0, 1)),)))


# Plans


def test_a_step_outside_every_window_leaves_attention_alone():
    edit = make_edit("a cat", "a dog", gains=[("dog", -2.0)])
    tau = TauSchedule(Window(0.2, 0.5), Window(0.1, 0.3))
    plan = make_plan(edit, tau, in_steps(10), Repeated(edit, WINDOW))
    assert [step is not None for step in plan.cross] == [False] * 2 + [True] * 3 + [False] * 6


def test_a_conditioning_shorter_than_the_prompts_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match="16.*32"):
        Repeated(make_edit("a cat", LONG), WINDOW)


def test_a_step_has_the_dtype_that_attention_runs_in():
    edit = make_edit("a cat", "a big cat", gains=[("big", 2.0)])
    step = make_plan(edit, FULL, in_steps(1), Repeated(edit, WINDOW)).cross[0]
    step = step.to(torch.device("cpu"), torch.bfloat16)
    assert step.unscaled.own.dtype == step.weight.dtype == torch.bfloat16
    assert step.moved.dtype == step.own.dtype == torch.bfloat16


def test_rows_are_a_value():
    rows = paired_rows(2, range(1), [0], 2, torch.device("cpu"))
    assert isinstance(rows, Rows) and rows.expand(1) is rows

"""Words' maps read as narrow attention equal the columns of the materialised, edited maps."""

from __future__ import annotations

import pytest
import torch
from p2p.attention.inject import paired_rows
from p2p.attention.maps import map_rows, map_step, token_columns, token_maps
from p2p.attention.plan import Repeated, conditioning_length, cross_weights, make_plan
from p2p.attention.schedule import TauSchedule, Window, in_steps
from p2p.tests import naive
from p2p.tests.unit.test_inject import HEADS, PIXELS, attend, make_edit, paired_keys, tensors

FULL = TauSchedule(cross=Window(0, 1))
FADED = TauSchedule(cross=Window(0, 0.5), fade=0.5, words=(("big", Window(0, 0.2)),))


def read(edit, tau, step, q, k, pairs, copies, offset, group=None):
    """The pack's maps of all words' tokens, for the pair's rows from `offset` on: (rows, n, W)."""
    length = conditioning_length(edit)
    cross = make_plan(edit, tau, in_steps(10), Repeated(edit, length)).cross[step]
    columns = token_columns(Repeated(edit, length), edit.tokens)
    branches = [0, *(target + 1 for target in (group or range(len(edit.targets))))]
    rows = map_rows(branches, [offset], pairs * len(branches), q.device)
    return token_maps(attend, q, k, heads=HEADS, rows=rows, step=map_step(columns, cross), copies=copies)


def expected(edit, tau, step, q, own, row, branch):
    """One row's maps, averaged over heads, from the naive formula: (n, words' tokens)."""
    if branch == 0:
        maps = naive.attention_map(q[row], own[row][0], HEADS)
    else:
        target = edit.targets[branch - 1]
        maps = naive.edited_map(
            naive.attention_map(q[row - branch], own[row - branch][0], HEADS),
            naive.attention_map(q[row], own[row][0], HEADS),
            target.mapping.double(),
            target.inherits,
            torch.ones_like(target.gain).double(),
            cross_weights(target, tau, step / 10),
        )
    return maps.mean(0)[:, list(edit.tokens[branch])]


@pytest.mark.parametrize("tau", [FULL, FADED])
@pytest.mark.parametrize("step", [0, 1, 3, 7])
@pytest.mark.parametrize("copies", [1, 2])
def test_the_words_maps_are_columns_of_the_edited_maps(tau, step, copies):
    targets = ("a big dog on a mat", "a cro|co|dile on a mat at night")
    edit = make_edit("a cat on a mat", *targets, gains=[("mat", -1.5)])
    uncond, pairs = 2, 2
    rows = uncond + pairs * edit.branches
    own, k, _ = paired_keys(edit, pairs, copies=copies, seed=3, offset=uncond, rows=rows)
    q, _, _ = tensors(rows, 1, seed=7)
    found = read(edit, tau, step, q, k, pairs, copies, uncond)
    assert found.shape == (pairs * edit.branches, PIXELS, max(map(len, edit.tokens)))
    for n, maps in enumerate(found):
        wanted = expected(edit, tau, step, q, own, uncond + n, n % edit.branches)
        torch.testing.assert_close(maps[:, : wanted.shape[1]], wanted.float())
        assert not maps[:, wanted.shape[1] :].any()


def test_prompts_of_different_lengths_are_read_over_all_their_repeats():
    edit = make_edit("a cat", "a dog on a very very very big mat in the snow at night , a hat", window=16)
    assert edit.source.prompt.length != edit.targets[0].prompt.length
    own, k, _ = paired_keys(edit, 1, seed=5)
    q, _, _ = tensors(2, 1, seed=9)
    found = read(edit, FULL, 0, q, k, 1, 1, 0)
    for row in range(2):
        wanted = expected(edit, FULL, 0, q, own, row, row)
        torch.testing.assert_close(found[row][:, : wanted.shape[1]], wanted.float())


def test_keys_that_another_node_appended_take_their_share_and_are_not_read():
    edit = make_edit("a cat", "a dog")
    q, _, _ = tensors(2, 1, seed=9)
    own, k, _ = paired_keys(edit, 1, appended=3, seed=5)
    found = read(edit, TauSchedule(cross=Window(0, 0)), 0, q, k, 1, 1, 0)
    for row in range(2):
        wanted = naive.attention_map(q[row], own[row][0], HEADS).mean(0)[:, list(edit.tokens[row])]
        torch.testing.assert_close(found[row], wanted.float())


def test_a_group_of_the_targets_is_read_under_its_own_numbers():
    edit = make_edit("a cat on a mat", "a dog on a mat", "a cat on a bi|cycle", "a big cat")
    own, k, _ = paired_keys(edit, 1, seed=5)
    q, _, _ = tensors(4, 1, seed=9)
    whole = read(edit, FULL, 0, q, k, 1, 1, 0)
    part = read(edit, FULL, 0, q[[0, 2, 3]], k[[0, 2, 3]], 1, 1, 0, group=(1, 2))
    torch.testing.assert_close(part, whole[[0, 2, 3]])


def test_reading_maps_asks_for_no_more_than_the_words_are_wide():
    """The cost is a narrow attention call: the columns are as many as the tokens that are wanted."""
    edit = make_edit("a cat on a mat", "a dog on a mat")
    columns = token_columns(Repeated(edit, 16), ((2,), (2,)))
    assert columns.shape == (2, 16, 1) and columns.sum() == 2.0


def test_rows_of_targets_and_of_maps_agree():
    rows = paired_rows(8, range(3), [0], 8, torch.device("cpu"))
    maps = map_rows(range(4), [0], 8, torch.device("cpu"))
    assert maps.row[maps.branch > 0].tolist() == rows.target.tolist()
    assert maps.origin.tolist() == rows.origin.tolist()


def test_maps_are_read_with_values_of_a_heads_width_however_many_words_there_are():
    """Kernels that build no map want that; of others PyTorch takes one that builds it."""
    widths = []

    def watching(q, k, v):
        widths.append((q.shape[-1], k.shape[-1], v.shape[-1]))
        return attend(q, k, v)

    edit = make_edit("a cat on a mat in the snow at night by the sea", "a dog")
    q, k, _ = tensors(2, edit.source.prompt.length, seed=9)
    rows = map_rows([0, 1], [0], 2, q.device)
    for words in (1, 3, 12):
        wanted = (edit.tokens[0][:words], edit.tokens[1][:words])
        columns = token_columns(Repeated(edit, edit.source.prompt.length), wanted)
        token_maps(watching, q, k, heads=HEADS, rows=rows, step=map_step(columns, None))
    assert len(set(widths)) == 1 and len(set(widths[0])) == 1 and len(widths) > 3

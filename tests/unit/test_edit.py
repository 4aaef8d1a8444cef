"""Edits: several targets, re-weighting, and the coefficients of the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from p2p.attention.edit import Edit, Source, coefficients
from p2p.attention.prompt import WordNotFound
from p2p.tests.prompts import prompt_of


@pytest.fixture
def edit():
    """Two targets; "dog" is in the first only, "cat" in the second only."""
    made = Edit(Source(prompt_of("a cat on a mat")))
    return made.with_target(prompt_of("a dog on a mat"), "auto").with_target(
        prompt_of("a cat on a rug"), "auto"
    )


def gains(target):
    return {
        target.prompt.words[n].text: float(target.gain[w.tokens[0]])
        for n, w in enumerate(target.prompt.words)
    }


def test_branches_are_the_source_and_every_target(edit):
    assert Edit(edit.source).branches == 1 and edit.branches == 3
    assert [target.text for target in edit.targets] == ["a dog on a mat", "a cat on a rug"]
    assert edit.source.text == "a cat on a mat"


def test_a_target_is_aligned_to_the_source_not_to_another_target(edit):
    alone = Edit(edit.source).with_target(prompt_of("a cat on a rug"), "auto")
    assert torch.equal(edit.targets[1].mapping, alone.targets[0].mapping)


def test_gain_is_one_until_a_word_is_re_weighted(edit):
    assert all((target.gain == 1).all() for target in edit.targets)


@pytest.mark.parametrize("scale", [-2.0, -1.0, 0.0, 0.5, 2.0])
def test_re_weighting_scales_the_tokens_of_the_word_and_no_other(edit, scale):
    target = edit.reweighted("dog", scale).targets[0]
    token = target.prompt.find("dog")[0]
    assert target.gain[token] == scale
    assert (target.gain[[n for n in range(target.prompt.length) if n != token]] == 1).all()


def test_re_weighting_leaves_the_edit_that_it_was_given(edit):
    before = [target.gain.clone() for target in edit.targets]
    edit.reweighted("a", 2.0)
    assert all(torch.equal(a, target.gain) for a, target in zip(before, edit.targets, strict=True))


def test_scales_of_several_calls_multiply(edit):
    assert gains(edit.reweighted("dog", 0.5).reweighted("dog", -2).targets[0])["dog"] == -1


@pytest.mark.parametrize("scales", [(2, 2), (2, -1, 2), (-2, 1.1), (0.5, 2, -2, 1.5)])
def test_scales_whose_product_leaves_the_range_are_refused(edit, scales):
    *before, last = scales
    for scale in before:
        edit = edit.reweighted("dog", scale)
    product = math.prod(before)
    with pytest.raises(ValueError, match=f'"dog" of target 1 has scale {product:g} already; .* -2 to 2'):
        edit.reweighted("dog", last)
    with pytest.raises(ValueError, match='"dog on" of target 1 has scale'):
        edit.reweighted("dog on", last)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=6))
def test_gain_stays_in_its_range_whatever_is_multiplied(scales):
    edit = Edit(Source(prompt_of("a cat"))).with_target(prompt_of("a dog"), "auto")
    for scale in scales:
        try:
            edit = edit.reweighted("dog", scale)
        except ValueError:
            break
    assert edit.targets[0].gain.abs().max() <= 2


def test_target_zero_means_every_target_that_has_the_word(edit):
    scaled = edit.reweighted("dog, rug, on", 2.0, 0)
    assert gains(scaled.targets[0]) == {"a": 1, "dog": 2, "on": 2, "mat": 1}
    assert gains(scaled.targets[1]) == {"a": 1, "cat": 1, "on": 2, "rug": 2}


def test_a_target_can_be_chosen(edit):
    scaled = edit.reweighted("on", 0.0, 2)
    assert gains(scaled.targets[0])["on"] == 1 and gains(scaled.targets[1])["on"] == 0


def test_a_word_of_another_target_than_the_chosen_is_an_error_that_lists_the_words(edit):
    with pytest.raises(WordNotFound, match="a, dog, on, mat"):
        edit.reweighted("rug", 2.0, 1)


def test_a_word_of_the_source_alone_is_an_error_that_says_so(edit):
    only = Edit(edit.source).with_target(prompt_of("a dog on a mat"), "auto")
    with pytest.raises(WordNotFound, match='"cat".* The source has it; name the word of the target'):
        only.reweighted("cat", 2.0)
    with pytest.raises(WordNotFound, match=r"mat\.$"):
        only.reweighted("zebra", 2.0)


@pytest.mark.parametrize(
    ("phrase", "branches", "found"),
    [
        ("mat", (0, 1, 2), {0: (5,), 1: (5,)}),
        ("on a", (1, 2), {1: (3, 4), 2: (3, 4)}),
        ("a#2", (2,), {2: (4,)}),
        ("dog", (2, 1), {1: (2,)}),
    ],
)
def test_a_phrase_is_found_in_each_of_the_branches_that_have_it(edit, phrase, branches, found):
    assert edit.find(phrase, branches) == found


@pytest.mark.parametrize(
    ("phrase", "branches", "message"),
    [
        ("dog", (0,), r'^in words: "dog" .*: a, cat, on, mat\. Target 1 has it; look there\.$'),
        ("mat", (2,), r'^in words: "mat" .*: a, cat, on, rug\. The source has it; look there\.$'),
        ("zebra", (0, 1, 2), r'^in words: "zebra" .*: a, cat, on, mat\. .*: a, dog, on, mat\.$'),
    ],
)
def test_a_phrase_that_no_branch_has_is_an_error_that_says_where_it_is(edit, phrase, branches, message):
    with pytest.raises(WordNotFound, match=message):
        edit.find(phrase, branches, asked="in words", advice="look there")


@pytest.mark.parametrize("scale", [2.1, -2.5, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(edit, scale):
    with pytest.raises(ValueError, match="-2 to 2"):
        edit.reweighted("dog", scale)


@pytest.mark.parametrize("target", [-1, 3])
def test_a_target_that_is_not_there_is_refused_with_the_number_that_are(edit, target):
    with pytest.raises(ValueError, match=f"target is {target}.* 2"):
        edit.reweighted("on", 1.5, target)


def test_no_word_is_refused(edit):
    with pytest.raises(ValueError, match="No word"):
        edit.reweighted(" , ", 1.5)


@given(st.floats(0, 1), st.floats(-2, 2))
def test_coefficients_are_the_blend_of_the_edited_and_the_own_map(weight, scale):
    """w c (m A_s M + (1 - m) A_t) + (1 - w) A_t, for one inherited word and one new word."""
    edit = (
        Edit(Source(prompt_of("a cat")))
        .with_target(prompt_of("a big cat"), "auto")
        .reweighted("big, cat", scale)
    )
    (target,) = edit.targets
    from_source, own = coefficients(target, torch.full((77,), weight))
    _, _, big, cat = range(4)
    assert from_source[big] == 0
    assert own[big] == pytest.approx(weight * scale + 1 - weight, abs=1e-6)
    assert from_source[cat] == pytest.approx(weight * scale, abs=1e-6)
    assert own[cat] == pytest.approx(1 - weight, abs=1e-6)


def test_outside_the_window_nothing_is_edited_the_gain_included(edit):
    target = edit.reweighted("dog", -2).targets[0]
    from_source, own = coefficients(target, torch.zeros(77))
    assert not from_source.any() and (own == 1).all()


def test_the_values_that_scripts_read_are_there(edit):
    for target in edit.targets:
        assert target.mapping.shape == (edit.source.prompt.length, target.prompt.length)
        assert target.inherits.shape == target.gain.shape == (target.prompt.length,)
        assert target.mapping.dtype == target.inherits.dtype == target.gain.dtype == torch.float32

"""The region that a local blend lets change, against a plain reading of the paper's code."""

from __future__ import annotations

import math

import pytest
import torch
from p2p.attention.blend import LocalBlend, Region, Regions, read_blend, region_mask, regions, tokens_of
from p2p.attention.prompt import WordNotFound
from p2p.tests.unit.test_inject import make_edit


def published_mask(maps, columns, threshold, pool):
    """`LocalBlend.get_mask` of the authors' code for one map at the latent's size, pixel by pixel."""
    height, width = maps.shape[-2:]
    total = [[sum(float(maps[c, y, x]) for c in columns) for x in range(width)] for y in range(height)]
    if pool:
        total = [
            [
                max(
                    total[b][a]
                    for b in range(max(0, y - 1), min(height, y + 2))
                    for a in range(max(0, x - 1), min(width, x + 2))
                )
                for x in range(width)
            ]
            for y in range(height)
        ]
    top = max(max(row) for row in total)
    return torch.tensor([[float(value / top > threshold) for value in row] for row in total])


def random_maps(pairs=2, branches=3, tokens=4, height=5, width=7):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(pairs, branches, tokens, height, width, generator=generator) ** 4


TOKENS = ((1, 2, 4, 6), (1, 3, 4, 5), (2, 3, 4, 9))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_one_word_and_its_source_word_give_the_published_mask(threshold):
    maps = random_maps()
    found = Regions((Region(1, (3, 4)), Region(0, (6,))), ())
    mask = region_mask(found, maps, TOKENS, (5, 7), threshold, 0.0)
    for pair in range(2):
        target = published_mask(maps[pair, 1], [1, 2], threshold, True)
        source = published_mask(maps[pair, 0], [3], threshold, True)
        assert torch.equal(mask[pair, 0], ((target + source) > 0).float())


def test_excluded_words_are_taken_out_without_pooling():
    maps = random_maps()
    found = Regions((Region(2, (9,)),), (Region(2, (2,)), Region(0, (1,))))
    mask = region_mask(found, maps, TOKENS, (5, 7), 0.3, 0.0)
    for pair in range(2):
        include = published_mask(maps[pair, 2], [3], 0.3, True)
        exclude = published_mask(maps[pair, 2], [0], 0.3, False) + published_mask(
            maps[pair, 0], [0], 0.3, False
        )
        assert torch.equal(mask[pair, 0], include * (exclude == 0))


def test_without_words_to_include_everything_but_the_excluded_may_change():
    maps = random_maps()
    mask = region_mask(Regions((), (Region(1, (1,)),)), maps, TOKENS, (5, 7), 0.3, 0.0)
    assert torch.equal(mask[0, 0], 1.0 - published_mask(maps[0, 1], [0], 0.3, False))


def test_a_strong_word_does_not_hide_a_weak_one():
    maps = torch.zeros(1, 2, 2, 8, 8)
    maps[0, 1, 0, 1, 1], maps[0, 1, 1, 6, 6] = 1.0, 0.1
    mask = region_mask(Regions((Region(1, (0,)), Region(1, (1,))), ()), maps, ((0, 1),) * 2, (8, 8), 0.3, 0.0)
    assert mask[0, 0, 1, 1] == mask[0, 0, 6, 6] == 1.0


def test_coarse_maps_are_enlarged_to_the_latents_size_whatever_its_shape():
    maps = torch.zeros(1, 2, 1, 4, 6)
    maps[0, 1, 0, 0, 0] = 1.0
    mask = region_mask(Regions((Region(1, (0,)),), ()), maps, ((0,), (0,)), (13, 24), 0.3, 0.0)
    assert mask.shape == (1, 1, 13, 24)
    assert mask[0, 0, 0, 0] == 1.0 and mask[0, 0, -1, -1] == 0.0


def test_softness_is_a_ramp_around_the_threshold():
    values = torch.linspace(0, 1, 101)
    maps = torch.zeros(1, 2, 1, 101, 3)
    maps[0, 1, 0] = values[:, None]
    found = Regions((), (Region(1, (0,)),))  # without pooling
    mask = 1.0 - region_mask(found, maps, ((0,), (0,)), (101, 3), 0.4, 0.2)[0, 0, :, 0]
    expected = torch.tensor([min(1.0, max(0.0, (float(v) - 0.3) / 0.2)) for v in values])
    torch.testing.assert_close(mask, expected, atol=1e-5, rtol=0)


def test_a_word_that_looks_nowhere_has_no_region():
    mask = region_mask(
        Regions((Region(1, (0,)),), ()), torch.zeros(1, 2, 1, 4, 4), ((0,), (0,)), (8, 8), 0.3, 0.0
    )
    assert not mask.any() and all(math.isfinite(v) for v in mask.flatten().tolist())


def test_words_are_found_in_their_prompts():
    edit = make_edit("a cat on a mat", "a dog on a mat", "a big cat")
    found = regions(read_blend("dog, big cat", "cat", "mat", 0.3, 0.2), edit)
    assert found[0] == Regions((Region(0, (2,)), Region(1, (2,))), (Region(0, (5,)), Region(1, (5,))))
    assert found[1] == Regions((Region(0, (2,)), Region(2, (2, 3))), (Region(0, (5,)),))
    assert tokens_of(found, 3) == ((2, 5), (2, 5), (2, 3))


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        (("zebra", "", ""), 'words: "zebra" is not in the prompt "a dog on a mat". Its words are: a, dog'),
        (("dog", "dog", ""), 'source_words: "dog" is not in the prompt "a cat on a mat"'),
        (("dog", "dog", ""), "Target 1 has it; write it in words."),
        (("cat", "", ""), 'words: "cat" is not in the prompt "a dog on a mat"'),
        (("cat", "", ""), "The source has it; write it in source_words."),
        (("dog", "", "zebra"), 'exclude: "zebra" is not in the prompt "a cat on a mat"'),
        (("dog", "", "zebra"), '"zebra" is not in the prompt "a dog on a mat"'),
        (("dog", "zebra", ""), "Its words are: a, cat, on, mat."),
    ],
)
def test_a_word_that_is_not_there_is_an_error_that_lists_the_words(blend, message):
    with pytest.raises(WordNotFound) as error:
        regions(read_blend(*blend, 0.3, 0.2), make_edit("a cat on a mat", "a dog on a mat"))
    assert message in str(error.value)


def test_a_target_that_has_none_of_the_words_is_an_error_that_names_it():
    edit = make_edit("a cat on a mat", "a dog on a mat", "a big cat")
    with pytest.raises(ValueError, match=r'target 2 \("a big cat"\) has none of the words dog'):
        regions(read_blend("dog", "", "", 0.3, 0.2), edit)
    assert regions(read_blend("dog", "cat", "", 0.3, 0.2), edit)[1].include == (Region(0, (2,)),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to go by"),
        ({"exclude": ("cat",)}, "nothing to go by"),
        ({"words": ("cat",), "threshold": 1.5}, "threshold is 1.5; expected a number from 0 to 1"),
        ({"words": ("cat",), "start": -0.1}, "start is -0.1"),
        ({"words": ("cat",), "softness": float("nan")}, "softness is nan"),
        ({"mask": torch.zeros(2, 2)}, r"shape \(2, 2\); expected \(masks, height, width\)"),
    ],
)
def test_bad_numbers_and_nothing_to_go_by_are_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalBlend(**arguments)

"""Second passes of the Paired Sampler: a paired latent goes on, upscaled, with each branch's own rows."""

from __future__ import annotations

import pytest
import torch
from p2p.nodes import AttentionController, PairedLatent

import nodes as host_nodes

from .runs import PART, SOURCE, Settings, assert_close, difference, empty, ksampler, paired_sampler, picture

FIRST, SECOND = Settings(seed=5), Settings(seed=8, denoise=0.5)
UPSCALED = (112, 96)
"""Not a multiple of 16 values in a row's noise, where the host draws by the numbers in batch_index."""


def sampled(studio, edit, latent, s=FIRST, tau=PART):
    """(source, targets, paired) latents of a Paired Sampler."""
    source, targets, _, paired = paired_sampler(studio.model, edit, tau, studio.negative, latent, s)
    return source, targets, paired


def upscaled(latent):
    return host_nodes.LatentUpscale().upscale(latent, "nearest-exact", *UPSCALED, "disabled")[0]


@pytest.mark.parametrize("items", [1, 3])
@pytest.mark.parametrize("targets", [["a cat"], ["a cat", "a dog riding a red car"]])
def test_the_paired_output_has_the_branches_of_each_pair_side_by_side(studio, targets, items):
    edit = studio.edit(SOURCE, *targets)
    source, others, paired = sampled(studio, edit, empty(items))
    for item in range(items):
        rows = paired["samples"][item * edit.branches : (item + 1) * edit.branches]
        assert torch.equal(rows[0], source["samples"][item])
        assert torch.equal(rows[1:], others["samples"][item * len(targets) : (item + 1) * len(targets)])


@pytest.mark.parametrize("items", [1, 3])
def test_a_second_pass_is_the_stock_samplers_with_the_controller(studio, items):
    edit = studio.edit(SOURCE, "a cat", "a dog riding a red car")
    _, _, paired = sampled(studio, edit, empty(items))
    latent = upscaled(paired)
    source, targets, again = sampled(studio, edit, latent, SECOND)
    model, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    rows = ksampler(model, positive, studio.negative, latent, SECOND)
    assert_close(again["samples"], rows)
    assert_close(source["samples"], studio.split(edit, rows)[0])
    assert_close(targets["samples"], studio.split(edit, rows)[1])


@pytest.mark.parametrize("items", [1, 3])
def test_the_source_of_a_second_pass_is_a_plain_second_pass(studio, items):
    edit = studio.edit()
    first = studio.plain(SOURCE, FIRST, empty(items))
    expected = studio.plain(SOURCE, SECOND, upscaled({"samples": first}))
    source, targets, _ = sampled(studio, edit, upscaled(sampled(studio, edit, empty(items))[2]), SECOND)
    assert_close(source["samples"], expected)
    assert source["samples"].shape[0] == targets["samples"].shape[0] == items


def test_the_targets_of_a_second_pass_start_from_their_own_latents(studio):
    edit = studio.edit()
    source, _, paired = sampled(studio, edit, empty())
    own = sampled(studio, edit, paired, SECOND)[1]["samples"]
    assert difference(sampled(studio, edit, source, SECOND)[1]["samples"], own) > 1e-2
    still = Settings(denoise=0.0)
    assert torch.equal(sampled(studio, edit, paired, still)[1]["samples"], paired["samples"][1::2])


def test_a_paired_latent_of_the_stock_route_goes_on_into_a_paired_sampler(studio):
    edit = studio.edit()
    latent = PairedLatent.execute(picture(2), edit).args[0]
    for found, expected in zip(
        sampled(studio, edit, latent, SECOND), sampled(studio, edit, picture(2), SECOND), strict=True
    ):
        assert_close(found["samples"], expected["samples"])


def test_masks_and_numbers_of_a_paired_latent_stay_with_their_rows(studio):
    edit = studio.edit()
    masks = torch.zeros(2, 1, 64, 64)
    masks[1] = 1.0
    latent = {**picture(2), "noise_mask": masks, "batch_index": [4, 7]}
    source, targets, paired = sampled(studio, edit, PairedLatent.execute(latent, edit).args[0], SECOND)
    plain = studio.plain(SOURCE, SECOND, latent)
    assert_close(source["samples"], plain)
    assert_close(source["samples"][:1], latent["samples"][:1])
    assert (list(source["batch_index"]), list(targets["batch_index"])) == ([4, 7], [4, 7])
    assert paired["noise_mask"].shape[0] == 4 and torch.equal(source["noise_mask"], masks)


@pytest.mark.parametrize("keep", [slice(0, 1), slice(0, 3)])
def test_a_part_of_a_pair_is_an_error(studio, keep):
    paired = sampled(studio, studio.edit(), empty(2))[2]
    with pytest.raises(ValueError, match=r"rows in pairs of 2 branches.*whole"):
        sampled(studio, studio.edit(), {**paired, "samples": paired["samples"][keep]})


def test_pairs_of_another_edit_are_an_error(studio):
    paired = sampled(studio, studio.edit(), empty(3))[2]
    with pytest.raises(ValueError, match="6 rows in pairs of 2 branches, but the edit has 3"):
        sampled(studio, studio.edit(SOURCE, "a cat", "a dog"), paired)


def test_a_latent_is_not_paired_twice(studio):
    paired = PairedLatent.execute(empty(), studio.edit()).args[0]
    with pytest.raises(ValueError, match="paired already, 2 branches"):
        PairedLatent.execute(paired, studio.edit())

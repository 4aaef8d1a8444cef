"""Attention maps of whole runs: equal to materialised ones, of the right run, and free where nobody asks."""

from __future__ import annotations

import gc
import weakref

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from p2p.attention.plan import cross_weights
from p2p.attention.word_maps import nearest
from p2p.nodes import AttentionController, PairedLatent, PairedSampler
from p2p.nodes.maps import AttentionMaps
from p2p.sampling import attentions
from p2p.sampling.maps import MapsHandle
from p2p.tests import naive
from p2p.tests.host.runs import (
    EMPTY,
    PART,
    STOCK,
    WAYS,
    Settings,
    assert_close,
    empty,
    ksampler,
    paired_sampler,
    sigmas_of,
)

SOURCE = "a cat riding a bicycle"
TARGETS = ("a dog riding a car", "a cat riding a red boat at night")


class Witness:
    """Materialises every block's cross-attention maps, from the tensors that the layers project.

    An attn2 patch, which the host calls with what queries and keys are made of, in every block.
    """

    def __init__(self, model):
        self.network = model.get_model_object("diffusion_model")
        self.maps: dict[tuple, list] = {}

    def __call__(self, n, context, value, extra_options):
        name, number = extra_options["block"][:2]
        modules = {
            "input": self.network.input_blocks,
            "middle": [self.network.middle_block],
            "output": self.network.output_blocks,
        }[name][number]
        (layer,) = [m for m in modules if type(m) is host_attention.SpatialTransformer]
        attn = layer.transformer_blocks[extra_options["block_index"]].attn2
        q, k = attn.to_q(n), attn.to_k(context)
        sigma = float(extra_options["sigmas"][0])
        rows = q.shape[0] // len(extra_options["cond_or_uncond"])
        for chunk, index in enumerate(extra_options["cond_or_uncond"]):
            if index == 0:
                own = slice(chunk * rows, (chunk + 1) * rows)
                maps = [
                    naive.attention_map(*row, attn.heads) for row in zip(q[own], k[own], strict=True)
                ]
                self.maps.setdefault((sigma, tuple(extra_options["activations_shape"][-2:])), []).append(maps)
        return n, context, value

    def __deepcopy__(self, memo):
        return self

    def on(self, model):
        model = model.clone()
        model.set_model_attn2_patch(self)
        return model


def word_maps(edit, tau, witness, sigmas, branch, tokens, pairs=1):
    """Materialised, edited, averaged over heads, layers and steps, per grid: {(h, w): (pairs, h, w)}."""
    found: dict[tuple, list] = {}
    for (sigma, grid), layers in witness.maps.items():
        step = [n for n, value in enumerate(sigmas) if abs(value - sigma) < 1e-4 * value][0]
        for rows in layers:
            for pair in range(pairs):
                source, own = rows[pair * edit.branches], rows[pair * edit.branches + branch]
                if branch:
                    target = edit.targets[branch - 1]
                    weights = cross_weights(target, tau, step / (len(sigmas) - 1)).float()
                    own = naive.edited_map(
                        source, own, target.mapping, target.inherits, torch.ones_like(target.gain), weights
                    )
                found.setdefault((grid, pair), []).append(own[..., list(tokens)].sum(-1).mean(0))
    grids = {grid for grid, _ in found}
    return {
        grid: torch.stack([torch.stack(found[grid, pair]).mean(0).view(grid) for pair in range(pairs)])
        for grid in grids
    }


@pytest.mark.parametrize("way", WAYS)
def test_maps_of_a_run_are_the_materialised_edited_ones(studio, way):
    edit = studio.edit(SOURCE, *TARGETS).reweighted("boat", 1.7)
    witness, settings, latent = Witness(studio.model), Settings(), empty(2, 16, 8)
    sampled, handle = run(studio, edit, PART, way, latent, settings, witness.on(studio.model))
    maps = handle.maps_of(sampled)
    assert maps.progress == (0.0, 0.25, 0.5, 0.75) and maps.size == (16, 8) and maps.blend is None
    sigmas = sigmas_of(studio.model, settings).tolist()
    for branch, words in enumerate(["cat", "car", "red boat"]):
        labels, phrases = maps.phrases(branch, words)
        assert labels == [words]
        expected = word_maps(edit, PART, witness, sigmas, branch, phrases[0], pairs=2)
        for factor in maps.by_scale:
            found = maps.of(branch, phrases, factor, 0.0, 1.0)[:, 0]
            torch.testing.assert_close(found, expected[tuple(found.shape[-2:])], rtol=1e-4, atol=1e-5)


KEPT = []
"""Models that the host's cache of outputs would keep."""


@pytest.fixture(autouse=True, scope="module")
def no_models_left():
    yield
    KEPT.clear()


def run(studio, edit, tau, way, latent, settings, model=None, wanted=True):
    """Sample with maps: (samples, handle)."""
    model = model or studio.model
    if way == "P2PSampler":
        output = paired_sampler(model, edit, tau, studio.negative, latent, settings)
        assert output[2].wanted is False
        output[2].wanted = wanted
        KEPT.append(model)
        return output[0]["samples"], output[2]
    controlled, positive, handle = AttentionController.execute(model, edit, tau).args
    handle.wanted = wanted
    KEPT.append(controlled)
    rows = STOCK[way](
        controlled, positive, studio.negative, PairedLatent.execute(latent, edit).args[0], settings
    )
    return rows, handle


@pytest.mark.parametrize("way", WAYS)
def test_maps_change_nothing_of_the_run(studio, way):
    edit = studio.edit(SOURCE, *TARGETS)
    with_maps, _ = run(studio, edit, PART, way, empty(), Settings())
    without, _ = run(studio, edit, PART, way, empty(), Settings(), wanted=False)
    assert torch.equal(with_maps, without)


@pytest.mark.parametrize("way", WAYS)
def test_maps_that_are_asked_for_after_a_run_without_them_are_those_of_that_run(studio, way):
    """The host does not sample again when a node for maps is added to a graph."""
    edit = studio.edit(SOURCE, *TARGETS)
    before, handle = run(studio, edit, PART, way, empty(), Settings(), wanted=False)
    first = handle.maps_of(before)
    expected_samples, wanted = run(studio, edit, PART, way, empty(), Settings(), wanted=True)
    for factor, maps in wanted.maps_of(expected_samples).by_scale.items():
        assert_close(torch.stack(first.by_scale[factor]), torch.stack(maps))


def test_nobody_asks_nothing_is_read(studio, monkeypatch):
    monkeypatch.setattr(attentions, "token_maps", None)  # would raise if it were called
    studio.paired(studio.edit(SOURCE, *TARGETS), PART)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_maps_are_wanted_when_that_output_is_wired_in_the_prompt(studio, output):
    class Hidden:
        unique_id = "7"
        prompt = {
            "7": {"class_type": "P2PAttentionController", "inputs": {"tau": ["3", 0]}},
            "8": {"class_type": "KSampler", "inputs": {"model": ["7", 0], "positive": ["7", 1]}},
            "9": {"class_type": "P2PAttentionMaps", "inputs": {"maps": ["7", output], "branch": 0}},
        }

    for node in (AttentionController, PairedSampler):
        wired = type(node.__name__, (node,), {"hidden": Hidden})
        edit = studio.edit()
        if node is AttentionController:
            handle = wired.execute(studio.model, edit, EMPTY).args[2]
        else:
            arguments = (empty(), 1, 1, 1.0, "euler", "normal", 1.0)
            handle = wired.execute(studio.model, edit, EMPTY, studio.negative, *arguments).args[2]
        assert handle.wanted is (output == 2)


def test_each_of_two_passes_has_its_own_maps(studio):
    """As a hires-fix: one controller, two samplers."""
    edit = studio.edit(SOURCE, *TARGETS)
    controlled, positive, handle = AttentionController.execute(studio.model, edit, PART).args
    handle.wanted = True
    rows = PairedLatent.execute(empty(), edit).args[0]
    first = ksampler(controlled, positive, studio.negative, rows, Settings())
    large = {**rows, "samples": torch.nn.functional.interpolate(first, (16, 16))}
    second = ksampler(controlled, positive, studio.negative, large, Settings(denoise=0.5))
    assert handle.maps_of(first).size == (8, 8) and handle.maps_of(second).size == (16, 16)
    assert handle.maps_of(torch.ones(1, 4, 5, 5)).size == (16, 16)  # not of either: the latest
    with pytest.raises(ValueError, match="samples is an empty latent"):
        handle.maps_of(empty()["samples"])


@pytest.mark.parametrize("wanted", [False, True])
def test_a_controlled_model_goes_with_its_last_user(studio, wanted):
    """Memory is given back at once, not when Python next looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        controlled, positive, handle = AttentionController.execute(studio.model, studio.edit(), PART).args
        handle.wanted = wanted
        rows = PairedLatent.execute(empty(), studio.edit()).args[0]
        ksampler(controlled, positive, studio.negative, rows, Settings())
        alive = weakref.ref(controlled)
        del controlled, positive
        assert alive() is None  # the maps output keeps no model
        if wanted:
            assert handle.maps_of(empty()["samples"] + 1).progress == (0.0, 0.25, 0.5, 0.75)
        else:
            with pytest.raises(ValueError, match="its model is no longer in memory"):
                handle.maps_of(empty()["samples"] + 1)
    finally:
        gc.enable()


def test_the_output_tells_the_hosts_cache_what_it_holds(studio):
    rows, handle = run(studio, studio.edit(SOURCE, *TARGETS), PART, "KSampler", empty(), Settings())
    maps = handle.maps_of(rows)
    held = [x for steps in maps.by_scale.values() for x in steps]
    assert handle.get_ram_usage() == rows.nbytes + sum(x.nbytes for x in held) > 0


def test_no_run_yet_is_an_error_that_says_what_to_connect():
    with pytest.raises(ValueError, match="No run has been made with this controller yet"):
        MapsHandle().maps_of(torch.zeros(1, 4, 8, 8))


@pytest.fixture(scope="module")
def sampled(studio):
    """A latent of two pairs with its maps."""
    edit = studio.edit(SOURCE, "a dog and a dog riding a car")
    rows, handle = run(studio, edit, PART, "KSampler", empty(2, 8, 16), Settings())
    return {"samples": rows}, handle


class TestNode:
    """The Attention Maps node."""

    def test_every_word_has_a_picture_with_the_word_on_it(self, sampled):
        latent, handle = sampled
        for branch, words in ((0, 5), (1, 8)):
            pictures, mask = AttentionMaps.execute(handle, latent, "", branch).args
            assert pictures.shape[0] == 2 * words and pictures.shape[2:] == (128, 3)
            assert pictures.shape[1] > 64  # the word stands above the map
            assert (pictures[0, :4] > 0.9).any() and pictures.min() >= 0 and pictures.max() <= 1
            assert mask.shape == (2, 64, 128) and mask.amax((1, 2)).tolist() == [1.0, 1.0]

    def test_words_and_phrases_are_chosen(self, sampled):
        latent, handle = sampled
        pictures, _ = AttentionMaps.execute(handle, latent, "dog#2, riding a car", 1).args
        assert pictures.shape[0] == 4
        both, _ = AttentionMaps.execute(handle, latent, "dog", 1).args
        assert not torch.equal(both[0], pictures[0])

    def test_layers_and_steps_are_chosen(self, sampled):
        latent, handle = sampled
        default = AttentionMaps.execute(handle, latent, "cat", 0).args[0]
        for options in ({"layers": "half"}, {"layers": "all"}, {"end": 0.5}, {"start": 0.5}):
            chosen = AttentionMaps.execute(handle, latent, "cat", 0, **options).args[0]
            assert chosen.shape == default.shape
        first, last = (
            AttentionMaps.execute(handle, latent, "cat", 0, start=a, end=b).args[0]
            for a, b in ((0, 0.5), (0.5, 1))
        )
        assert not torch.equal(first, last)

    @pytest.mark.parametrize(("rows", "row"), [(1, 0), (2, 0), (4, 1), (2, 0)])
    def test_an_image_lies_under_the_map(self, sampled, rows, row):
        latent, handle = sampled
        image = torch.zeros(rows, 40, 80, 3)
        image[row] = 1.0
        over, _ = AttentionMaps.execute(handle, latent, "car", 1, image).args
        dark, _ = AttentionMaps.execute(handle, latent, "car", 1, torch.zeros(1, 40, 80, 3)).args
        assert over.shape[2] == 80 and (over[0] - dark[0]).max() > 0.3
        if rows > 1:
            assert torch.equal(over[1], dark[1])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"words": "zebra"}, '"zebra" is not in the prompt'),
            ({"words": "dog#3"}, "there is no #3"),
            ({"layers": "tenth"}, "layers is 'tenth'; expected one of quarter, half"),
            ({"branch": 2}, "branch is 2, but the edit has branches 0 (source) to 1"),
            ({"layers": "eighth"}, "no attention layers at 1/8 of the latent's sides; it has 1/2"),
            ({"start": 0.8, "end": 0.9}, "No step of the run lies from 0.8 to 0.9"),
            ({"image": torch.zeros(3, 8, 8, 3)}, "There are 3 images for 2 pairs of 2 branches"),
        ],
    )
    def test_what_is_not_there_is_an_error(self, sampled, arguments, message):
        latent, handle = sampled
        with pytest.raises(ValueError) as error:
            AttentionMaps.execute(handle, latent, **{"words": "dog", "branch": 1, **arguments})
        assert message in str(error.value)

    def test_an_empty_part_of_the_run_is_refused_before_anything_runs(self):
        assert AttentionMaps.validate_inputs(start=0.5, end=0.5) == (
            "start is 0.5 and end is 0.5; expected start below end."
        )
        assert AttentionMaps.validate_inputs(start=0.0, end=1.0) is True


@pytest.mark.parametrize(
    ("factors", "expected"),
    [([1, 2], 2), ([1, 2, 4, 8], 4), ([2, 4], 4), ([8, 16], 8), ([1], 1), ([2, 8], 2)],
)
def test_the_layers_nearest_a_quarter_of_the_latents_sides_are_read(factors, expected):
    assert nearest(factors) == expected

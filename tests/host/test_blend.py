"""Local blend: the target is the source outside the region, whatever the run; the region is the paper's."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from p2p.attention.blend import Region, read_blend
from p2p.attention.schedule import TauSchedule
from p2p.nodes import AttentionController, PairedLatent
from p2p.nodes.control import LocalBlendNode
from p2p.sampling.encode import start_edit
from p2p.sampling.maps import MapsHandle
from p2p.sampling.sampler import sample_pairs
from p2p.tests.host.runs import (
    EDITED,
    EULER,
    HOST_WARNINGS,
    PART,
    SAMPLERS,
    STOCK,
    WAYS,
    Settings,
    assert_close,
    difference,
    empty,
    paired_sampler,
    picture,
    sampler_custom,
    sigmas_of,
)
from p2p.tests.host.test_maps import Witness, word_maps
from p2p.tests.unit.test_blend import published_mask

SOURCE, TARGET = "a cat riding a bicycle", "a cat riding a car"
NOWHERE = read_blend("car", "bicycle", "", 1.0, 0.3)
EVERYWHERE = read_blend("car", "", "", 0.0, 0.0)
SOMEWHERE = read_blend("car", "bicycle", "cat", 0.6, 0.2)


def blended(studio, edit, blend, settings=None, latent=None, way="KSampler"):
    """A paired run with a local blend: (sources, targets)."""
    model, tau, settings, latent = studio.model, PART, settings or Settings(), latent or empty()
    if way == "P2PSampler":
        output = paired_sampler(model, edit, tau, studio.negative, latent, settings, blend=blend)
        return output[0]["samples"], output[1]["samples"]
    controlled, positive = AttentionController.execute(model, edit, tau, blend).args[:2]
    paired = PairedLatent.execute(latent, edit).args[0]
    return studio.split(edit, STOCK[way](controlled, positive, studio.negative, paired, settings))


@pytest.fixture(scope="module")
def edit(studio):
    return studio.edit(SOURCE, TARGET, "a dog riding a red car")


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_region_gives_the_source(studio, edit, way):
    sources, targets = blended(studio, edit, NOWHERE, latent=empty(2), way=way)
    assert torch.equal(targets, sources.repeat_interleave(2, 0))


@pytest.mark.parametrize("way", WAYS)
def test_a_full_region_gives_the_run_without_blend(studio, edit, way):
    latent = empty(2)
    for found, expected in zip(
        blended(studio, edit, EVERYWHERE, latent=latent, way=way),
        studio.paired(edit, PART, latent=latent, way=way),
        strict=True,
    ):
        assert_close(found, expected)


@pytest.mark.parametrize("sampler", [pytest.param(name, marks=HOST_WARNINGS) for name in SAMPLERS])
def test_every_sampler_keeps_the_source_and_stays_on_it_outside_the_region(studio, edit, sampler):
    settings = Settings(sampler=sampler, cfg=1.5 if "cfg_pp" in sampler else 4.0)
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:6, 3:7] = 1.0
    sources, targets = blended(studio, edit, read_blend("", "", "", 0.3, 0.2, 0.0, mask), settings)
    if sampler != "dpm_adaptive":  # whose steps depend on the whole batch
        plain, free = studio.paired(edit, PART, settings)
        assert torch.equal(sources, plain)
        assert difference(targets, free) > EDITED
    outside = mask[0] == 0
    assert torch.equal(targets[:, :, outside], sources.expand_as(targets)[:, :, outside])
    assert difference(targets[:, :, ~outside], sources.expand_as(targets)[:, :, ~outside]) > EDITED
    sources, targets = blended(studio, edit, read_blend("", "", "", 0.3, 0.0, 0.0, mask * 0), settings)
    assert torch.equal(targets, sources.expand_as(targets))


def test_from_the_start_on_every_state_equals_the_sources_outside_the_region(studio, edit):
    """The blend acts on the sampler's state and not only on the result."""
    states = []

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for n in range(len(sigmas) - 1):
            denoised = model(x, sigmas[n].expand(x.shape[0]), **extra_args)
            states.append((x[0].clone(), x[1].clone()))
            x = x + (x - denoised) / sigmas[n] * (sigmas[n + 1] - sigmas[n])
        return x

    mask = torch.zeros(1, 8, 8)
    mask[:, :, :4] = 1.0
    blend = read_blend("", "", "", 0.3, 0.5, 0.0, mask)
    model, positive = AttentionController.execute(studio.model, edit, PART, blend).args[:2]
    latent, settings = PairedLatent.execute(empty(), edit).args[0], Settings(steps=4)
    sampler = comfy.samplers.KSAMPLER(euler)
    sampler_custom(model, positive, studio.negative, latent, settings, sampler)
    equal = [torch.equal(source[..., 4:], target[..., 4:]) for source, target in states]
    assert equal == [True, False, False, True]  # one noise; steps 0 and 1; blended after step 2, at 0.5


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (8, 24)])
def test_a_run_agrees_with_a_naive_blend_on_materialised_maps(studio, size):
    """Step by step: Euler, maps of all steps so far from the layers' own tensors, the paper's mask."""
    edit, settings = studio.edit(SOURCE, TARGET), Settings(steps=5)
    found = [
        Region(1, edit.targets[0].prompt.find("car")),
        Region(0, edit.source.prompt.find("bicycle")),
    ]
    threshold, start = 0.6, 0.2
    witness, sigmas = Witness(studio.model), sigmas_of(studio.model, settings).tolist()
    latent = {"samples": torch.zeros(1, 4, *size)}

    def naive_blend(x):
        mask = torch.zeros(size)
        for region in found:
            maps = word_maps(edit, PART, witness, sigmas, region.branch, region.tokens)
            (half,) = [m for grid, m in maps.items() if grid[0] * 2 == size[0]]
            pooled = torch.nn.functional.max_pool2d(half[:, None], 3, 1, 1)
            large = torch.nn.functional.interpolate(pooled, size, mode="bilinear")[0]
            mask = torch.maximum(mask, published_mask(large, [0], threshold, pool=False))
        return torch.stack([x[0], x[0] + mask * (x[1] - x[0])]), mask

    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        steps = len(sigmas) - 1
        for n in range(steps):
            denoised = model(x, sigmas[n].expand(x.shape[0]), **extra_args)
            x = x + (x - denoised) / sigmas[n] * (sigmas[n + 1] - sigmas[n])
            if n / steps >= start or n == steps - 1:
                x, masks[n] = naive_blend(x)
        return x

    masks: dict = {}
    model, positive = AttentionController.execute(witness.on(studio.model), edit, PART).args[:2]
    paired = PairedLatent.execute(latent, edit).args[0]
    expected = sampler_custom(
        model, positive, studio.negative, paired, settings, comfy.samplers.KSAMPLER(euler)
    )
    blend = read_blend("car", "bicycle", "", threshold, start)
    sources, targets = blended(studio, edit, blend, settings, latent)
    assert 0 < masks[4].mean() < 1
    assert_close(targets, expected[1:])
    assert_close(sources, expected[:1])


def test_the_run_is_edited_within_the_region_and_only_there(studio, edit):
    handle = MapsHandle(wanted=True)
    settings = {"latent": empty(2, 16, 16), "seed": 5, "steps": 4, "cfg": 4.0, **EULER}
    sources, targets, _ = (
        latent["samples"]
        for latent in sample_pairs(
            studio.model, edit, PART, negative=studio.negative, **settings, blend=SOMEWHERE, maps=handle
        )
    )
    mask = handle.maps_of(sources).blend
    assert mask.shape == (2, 2, 16, 16) and 0 < mask.mean() < 1
    for pair in range(2):
        for target in range(2):
            outside = mask[pair, target] == 0
            row = targets[2 * pair + target]
            assert torch.equal(row[:, outside], sources[pair][:, outside])
            assert difference(row[:, ~outside], sources[pair][:, ~outside]) > EDITED


@pytest.mark.parametrize("way", WAYS)
def test_pairs_of_a_batch_have_regions_of_their_own(studio, edit, way):
    both = blended(studio, edit, SOMEWHERE, latent=empty(2), way=way)
    one = blended(studio, edit, SOMEWHERE, latent=empty(1), way=way)
    assert_close(both[0][:1], one[0])
    assert_close(both[1][:2], one[1])


def test_the_source_is_the_same_bit_for_bit_with_any_blend(studio, edit):
    plain, _ = studio.paired(edit, PART)
    for blend in (NOWHERE, EVERYWHERE, SOMEWHERE):
        assert torch.equal(blended(studio, edit, blend)[0], plain)


def test_words_and_a_mask_must_both_allow_it(studio, edit):
    left = torch.zeros(1, 64, 64)
    left[:, :, :32] = 1.0
    sources, targets = blended(studio, edit, read_blend("car", "", "", 0.0, 0.2, 0.0, left))
    assert torch.equal(targets[..., 5:], sources.expand_as(targets)[..., 5:])
    assert difference(targets[..., :4], sources.expand_as(targets)[..., :4]) > EDITED


def test_masks_may_be_one_for_each_pair(studio, edit):
    masks = torch.stack([torch.zeros(8, 8), torch.ones(8, 8)])
    sources, targets = blended(studio, edit, read_blend("", "", "", 0.3, 0.2, 0.0, masks), latent=empty(2))
    assert torch.equal(targets[:2], sources[:1].expand(2, -1, -1, -1))
    assert difference(targets[2:], sources[1:].expand(2, -1, -1, -1)) > EDITED


def test_a_wrong_number_of_masks_is_an_error_before_the_model_is_called(studio, edit, monkeypatch):
    monkeypatch.setattr(studio.model.model, "apply_model", None)
    blend = read_blend("", "", "", 0.3, 0.9, 0.0, torch.ones(3, 8, 8))
    with pytest.raises(ValueError, match="3 masks.*2 pairs.*1 or 2"):
        blended(studio, edit, blend, latent=empty(2))


def test_a_later_start_lets_the_target_move_further(studio):
    one = studio.edit(SOURCE, TARGET)
    free = studio.paired(one, PART, Settings(steps=8))[1]
    early, late = (
        blended(studio, one, read_blend("car", "bicycle", "", 0.6, start), Settings(steps=8))[1]
        for start in (0.0, 1.0)
    )
    assert difference(early, late) > EDITED and difference(late, free) > EDITED


@pytest.mark.parametrize("denoise", [0.5, 1.0])
def test_img2img_and_second_passes_blend_too(studio, edit, denoise):
    settings = Settings(denoise=denoise)
    sources, targets = blended(studio, edit, NOWHERE, settings, picture(1, 16, 16))
    assert torch.equal(targets, sources.expand_as(targets))
    assert_close(sources, studio.plain(SOURCE, settings, picture(1, 16, 16)))


def test_an_inpainting_mask_and_a_blend_work_together(studio, edit):
    mask = torch.zeros(1, 8, 8)
    mask[:, 4:] = 1.0
    latent = {**picture(), "noise_mask": mask}
    sources, targets = blended(studio, edit, NOWHERE, latent=latent)
    assert torch.equal(targets, sources.expand_as(targets))


def test_a_conditioning_that_covers_a_part_of_the_picture_cannot_say_where_words_look(studio, edit):
    model, positive = AttentionController.execute(studio.model, edit, PART, SOMEWHERE).args[:2]
    positive = [[cond, {**options, "area": (4, 4, 0, 0)}] for cond, options in positive]
    paired = PairedLatent.execute(empty(), edit).args[0]
    with pytest.raises(ValueError, match="Local Blend found no attention maps of the whole image"):
        STOCK["KSampler"](model, positive, studio.negative, paired, Settings())


def test_a_sampler_without_a_state_to_edit_is_an_error(studio, edit):
    class Own(comfy.samplers.Sampler):
        def sample(self, model_wrap, sigmas, extra_args, callback, noise, *args, **kwargs):
            return noise

    model, positive = AttentionController.execute(studio.model, edit, PART, SOMEWHERE).args[:2]
    paired = PairedLatent.execute(empty(), edit).args[0]
    with pytest.raises(ValueError, match="The sampler Own does not step through a state"):
        sampler_custom(model, positive, studio.negative, paired, Settings(), Own())


def test_wrong_words_are_errors_before_sampling(studio, edit):
    for widget in ("words", "source_words", "exclude"):
        given = {"words": "car", "source_words": "", "exclude": "", widget: "zebra"}
        blend = LocalBlendNode.execute(**given, threshold=0.3, start=0.2).args[0]
        with pytest.raises(ValueError, match=f'^Local Blend, {widget}: "zebra" is not in the prompt'):
            AttentionController.execute(studio.model, edit, PART, blend)
    with pytest.raises(ValueError, match="nothing to go by"):
        LocalBlendNode.execute(" , ", "", "cat", 0.3, 0.2)




SWAPS = [
    ("dog", "cat", "a {} on a beach"),
    ("penguin", "duck", "a {} in a field"),
    ("castle", "house", "a {} in a field"),
    ("cake", "tree", "a {} in a desert"),
    ("boat", "car", "a {} on a street"),
    ("elephant", "dog", "a {} in a forest"),
    ("tree", "castle", "a {} on a mountain"),
    ("car", "bicycle", "a cat riding a {}"),
    ("duck", "penguin", "a {} on a crowded beach"),
    ("house", "cake", "a {} on a snowy street"),
]


@pytest.mark.parametrize("seed", range(len(SWAPS)))
def test_pictures_equal_the_source_outside_the_region_as_far_as_the_decoder_lets_them(demo_model, seed):
    """The bundled model, at its own size. What the decoder carries over the rim is measured, not guessed."""
    model, clip, vae = demo_model
    new, old, prompt = SWAPS[seed]
    edit = start_edit(clip, prompt.format(old), prompt.format(new), "auto")
    handle = MapsHandle(wanted=True)
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    settings = {"latent": empty(1, 16, 16), "seed": seed, "steps": 10, "cfg": 4.0, **EULER}
    blend = read_blend(new, old, "", 0.7, 0.2)
    source, target, _ = (
        latent["samples"]
        for latent in sample_pairs(
            model, edit, TauSchedule(), negative=negative, **settings, blend=blend, maps=handle
        )
    )
    mask = handle.maps_of(source).blend[0, 0]
    assert 0.02 < mask.mean() < 0.98
    assert torch.equal(source[..., mask == 0], target[..., mask == 0])
    assert difference(target[..., mask == 1], source[..., mask == 1]) > EDITED
    # The same region filled with noise instead: the decoder's reach, from as strong a change.
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(seed)) * source.std()
    before, after, reached = vae.decode(torch.cat([source, target, torch.where(mask == 0, source, noise)]))
    outside = torch.nn.functional.interpolate(mask[None, None], before.shape[:2])[0, 0] == 0
    change, reach = ((other - before).abs()[outside] for other in (after, reached))
    assert change.mean() <= reach.mean() and change.mean() < 0.03

"""Inversion of a picture, and edits of it: against plain loops, and what must hold on every run."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from p2p.nodes import AttentionController, InvertImage
from p2p.sampling.controller import control
from p2p.sampling.invert import invert
from p2p.sampling.trajectory import FIRST_ORDER
from p2p.tests.host.runs import (
    EDITED,
    EMPTY,
    FULL,
    HOST_WARNINGS,
    PART,
    SAMPLERS,
    SOURCE,
    STOCK,
    TARGET,
    Settings,
    assert_close,
    difference,
    empty,
    ksampler,
    paired_sampler,
    picture,
    sampler_custom,
    sigmas_of,
)

pytestmark = HOST_WARNINGS

STEPS = 4
WAYS = ["P2PSampler", "KSampler", "SamplerCustom"]
FROM_NOISE = Settings(steps=STEPS, cfg=1.0, advanced={"disable_noise": True})


@pytest.fixture(scope="module")
def trajectory(studio):
    """Of a latent with something in it, under the source prompt."""
    with torch.inference_mode():
        return invert(studio.model, studio.encode(SOURCE), picture(), STEPS, "normal")[0]


def edited(studio, trajectory, tau=FULL, settings=None, latent=None, way="P2PSampler", edit=None, model=None):
    """A paired run on a trajectory: (source, target)."""
    edit, latent, settings = edit or studio.edit(), latent or picture(), settings or Settings()
    model = model or studio.model
    if way == "P2PSampler":
        source, targets, *_ = paired_sampler(
            model, edit, tau, studio.negative, latent, settings, trajectory=trajectory
        )
        return source["samples"], targets["samples"]
    model, positive = AttentionController.execute(model, edit, tau, trajectory=trajectory).args[:2]
    rows = STOCK[way](model, positive, studio.negative, studio.rows(edit, latent), settings)
    return studio.split(edit, rows)


# Inversion


def ddim_inversion(model, conditionings, latent, sigmas, predicts="v"):
    """DDIM inversion as the papers' code has it: latents z of unit variance, alpha_bar, the network itself.

        z' = sqrt(a') (z - sqrt(1 - a) eps) / sqrt(a) + sqrt(1 - a') eps,    eps at (z, the noisier timestep)

    The bundled model predicts v: eps = sqrt(a') v + sqrt(1 - a') z. conditionings: (weight, CONDITIONING).
    """
    z, path = latent.clone(), [latent.clone()]
    upwards = list(reversed(sigmas))
    for lower, upper in zip(upwards, upwards[1:], strict=False):
        a, a_next = 1 / (1 + lower**2), 1 / (1 + upper**2)
        timestep = model.model_sampling.timestep(torch.tensor([upper])).float()
        out = sum(
            weight * model.diffusion_model(z, timestep, conditioning[0][0].expand(len(z), -1, -1))
            for weight, conditioning in conditionings
        )
        eps = math.sqrt(a_next) * out + math.sqrt(1 - a_next) * z if predicts == "v" else out
        clean = (z - math.sqrt(1 - a) * eps) / math.sqrt(a)
        z = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
        path.append(z * math.sqrt(1 + upper**2))
    return path[::-1]


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_inversion_is_the_published_ddim_inversion(studio, scheduler):
    latent = picture(2)
    found, noise = invert(studio.model, studio.encode(SOURCE), latent, STEPS, scheduler)
    sigmas = sigmas_of(studio.model, Settings(steps=STEPS, scheduler=scheduler)).tolist()
    expected = ddim_inversion(studio.model.model, [(1.0, studio.encode(SOURCE))], latent["samples"], sigmas)
    assert list(found.sigmas) == sigmas and len(found.latents) == STEPS + 1
    for one, other in zip(found.latents, expected, strict=True):
        assert_close(one, other, 1e-4)
    assert torch.equal(found.latents[-1], latent["samples"])
    assert_close(noise["samples"], found.latents[0], 1e-6)


def test_refined_inversion_is_the_inverse_of_a_sampling_step(studio):
    found, _ = invert(studio.model, studio.encode(SOURCE), picture(), STEPS, "normal", refinement=40)
    for step in range(STEPS):
        advanced = {"disable_noise": True, "start_step": step, "last_step": step + 1}
        settings = Settings(steps=STEPS, cfg=1.0, advanced=advanced)
        latent = {"samples": found.latents[step]}
        landed = ksampler(studio.model, studio.encode(SOURCE), studio.negative, latent, settings)
        assert_close(landed, found.latents[step + 1], 5e-3)


def test_inversion_with_guidance_uses_the_negative_prompt(studio):
    positive, negative = studio.encode(SOURCE), studio.encode("a dog")
    found, _ = invert(studio.model, positive, picture(), STEPS, "normal", cfg=3.0, negative=negative)
    guided = [(3.0, positive), (-2.0, negative)]
    expected = ddim_inversion(studio.model.model, guided, picture()["samples"], found.sigmas)
    for one, other in zip(found.latents, expected, strict=True):
        assert_close(one, other, 1e-4)


@pytest.mark.parametrize("zsnr", [False, True])
def test_models_that_predict_noise_and_schedules_down_to_no_signal(studio, zsnr):
    """The bundled network predicts v; as one that predicts noise it is a bad model of the same formulas."""
    model = ModelSamplingDiscrete().patch(studio.model, "eps", zsnr)[0]
    found, _ = invert(model, studio.encode(SOURCE), picture(), STEPS, "normal")
    assert (found.sigmas[0] > 1000) == zsnr
    seen = model.get_model_object("model_sampling")
    network = SimpleNamespace(model_sampling=seen, diffusion_model=studio.model.model.diffusion_model)
    conditionings = [(1.0, studio.encode(SOURCE))]
    expected = ddim_inversion(network, conditionings, picture()["samples"], found.sigmas, "eps")
    for one, other in zip(found.latents, expected, strict=True):
        assert_close(one, other, 1e-3)


@pytest.fixture(scope="module")
def scene(studio, demo_model):
    """The bundled picture and its caption: (latent, decoded, caption)."""
    from p2p.demo.picture import CAPTION, load_picture

    vae = demo_model[2]
    with torch.inference_mode():
        latent = vae.encode(load_picture())
        return latent, vae.decode(latent), CAPTION


def psnr(found, expected):
    return -10 * math.log10(float(((found - expected) ** 2).mean()))


@pytest.mark.parametrize(("refinement", "floor"), [(0, 30.0), (1, 40.0), (5, 55.0)])
def test_a_picture_comes_back_without_guidance(studio, demo_model, scene, refinement, floor):
    """Reconstruction without editing, in dB over the decoded pixels, in 20 steps."""
    latent, expected, caption = scene
    positive = studio.encode(caption)
    _, noise = invert(studio.model, positive, {"samples": latent}, 20, "normal", refinement=refinement)
    back = ksampler(studio.model, positive, studio.negative, noise, replace(FROM_NOISE, steps=20))
    assert psnr(demo_model[2].decode(back), expected) >= floor


# Direct inversion


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [Settings(), Settings(cfg=9.0, sampler="ddim", seed=3)], ids=str)
def test_the_source_is_the_picture_whatever_the_edit_the_guidance_and_the_seed(
    studio, trajectory, way, settings
):
    source, target = edited(studio, trajectory, PART, settings, way=way)
    assert_close(source, picture()["samples"], 1e-6)
    assert difference(target, source) > EDITED


@pytest.mark.parametrize("sampler", ["euler", "ddim", "euler_cfg_pp"])
def test_the_source_is_on_the_trajectory_at_every_step(studio, trajectory, sampler):
    seen = []
    settings = Settings(sampler=sampler)
    model, positive = control(studio.model, studio.edit(), PART, trajectory=trajectory)

    def look(apply, given):
        seen.append(given["input"].clone())
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(look)
    ksampler(model, positive, studio.negative, studio.rows(studio.edit(), picture()), settings)
    assert len(seen) == STEPS
    for x, latent in zip(seen, trajectory.latents, strict=False):
        assert torch.equal(x[0], latent[0])
    assert torch.equal(seen[0][1], trajectory.latents[0][0])


def test_a_run_equals_single_steps_from_stored_latents(studio, trajectory):
    """One step of a plain pair at a time; the source's latent comes from the stored ones."""
    edit, settings = studio.edit(), Settings()
    model, positive = control(studio.model, edit, FULL)
    target = trajectory.latents[0]
    for step in range(STEPS):
        pair = {"samples": torch.cat([trajectory.latents[step], target])}
        advanced = {"disable_noise": True, "start_step": step, "last_step": step + 1}
        one = replace(settings, advanced=advanced)
        target = ksampler(model, positive, studio.negative, pair, one)[1:]
    assert_close(edited(studio, trajectory)[1], target)


def test_without_an_edit_the_target_goes_its_own_way_from_the_same_noise(studio, trajectory):
    settings = Settings(advanced={"disable_noise": True})
    _, target = edited(studio, trajectory, EMPTY)
    noise = {"samples": trajectory.latents[0]}
    assert_close(target, ksampler(studio.model, studio.encode(TARGET), studio.negative, noise, settings))


def test_a_batch_of_pictures_equals_the_pictures_one_by_one(studio):
    together, _ = invert(studio.model, studio.encode(SOURCE), picture(2), STEPS, "normal")
    edit = studio.edit(SOURCE, TARGET, "a cat")
    _, targets = edited(studio, together, PART, latent=picture(2), edit=edit)
    for n in range(2):
        latent = {"samples": picture(2)["samples"][n : n + 1]}
        alone, _ = invert(studio.model, studio.encode(SOURCE), latent, STEPS, "normal")
        for one, whole in zip(alone.latents, together.latents, strict=True):
            assert_close(one, whole[n : n + 1])
        assert_close(edited(studio, alone, PART, latent=latent, edit=edit)[1], targets[2 * n : 2 * n + 2])


def test_denoise_below_1_begins_later_on_the_trajectory(studio):
    long, _ = invert(studio.model, studio.encode(SOURCE), picture(), 2 * STEPS, "normal")
    source, target = edited(studio, long, FULL, Settings(denoise=0.5))
    begun = replace(long, latents=long.latents[STEPS:], sigmas=long.sigmas[STEPS:])
    assert torch.equal(target, edited(studio, begun, FULL, Settings(denoise=0.5))[1])
    assert_close(source, picture()["samples"], 1e-6)


@pytest.mark.parametrize("split", [1, 3])
def test_a_run_in_two_parts_equals_one(studio, trajectory, split):
    edit = studio.edit()
    tau = replace(FULL, cross=FULL.cross, self_=FULL.self_)
    model, positive = control(studio.model, edit, tau, trajectory=trajectory)
    rows = studio.rows(edit, empty())
    first = Settings(advanced={"last_step": split})
    rows = {**rows, "samples": ksampler(model, positive, studio.negative, rows, first)}
    second = Settings(advanced={"start_step": split, "disable_noise": True})
    whole = torch.cat(edited(studio, trajectory, tau))
    assert_close(ksampler(model, positive, studio.negative, rows, second), whole, 1e-5)


def test_runs_leave_the_trajectory_as_it_was(studio, trajectory):
    before = [latent.clone() for latent in trajectory.latents]
    first = edited(studio, trajectory, PART)
    again = edited(studio, trajectory, PART)
    assert all(map(torch.equal, trajectory.latents, before))
    assert all(map(torch.equal, first, again))
    assert all(latent.device.type == "cpu" for latent in trajectory.latents)


def test_the_trajectory_has_the_latents_dtype_and_is_computed_in_full_precision(studio):
    latent = {"samples": picture()["samples"].half()}
    found, noise = invert(studio.model, studio.encode(SOURCE), latent, 2, "normal")
    full, expected = invert(
        studio.model, studio.encode(SOURCE), {"samples": latent["samples"].float()}, 2, "normal"
    )
    assert torch.equal(noise["samples"], expected["samples"])
    for one, other in zip(found.latents, full.latents, strict=True):
        assert one.dtype == torch.float16 and torch.equal(one, other.half())


# Negative-prompt inversion


def test_with_negative_prompt_inversion_guidance_does_not_move_the_source(studio):
    found, noise = invert(
        studio.model, studio.encode(SOURCE), picture(), STEPS, "normal", reconstruction="negative prompt"
    )
    source, target = edited(studio, found, EMPTY, Settings(cfg=6.0))
    assert_close(source, ksampler(studio.model, studio.encode(SOURCE), studio.negative, noise, FROM_NOISE))
    guided = replace(FROM_NOISE, cfg=6.0)
    assert_close(target, ksampler(studio.model, studio.encode(TARGET), studio.negative, noise, guided))
    assert difference(edited(studio, found, FULL, Settings(cfg=6.0))[1], target) > EDITED


def test_negative_prompt_inversion_beside_prompts_of_other_lengths(studio):
    long = SOURCE + ", " + ", ".join(["a red castle on a beach"] * 14)
    found, noise = invert(
        studio.model, studio.encode(long), picture(), STEPS, "normal", reconstruction="negative prompt"
    )
    source, target = edited(studio, found, EMPTY, edit=studio.edit(long, "a cat"))
    assert_close(source, ksampler(studio.model, studio.encode(long), studio.negative, noise, FROM_NOISE))
    guided = replace(FROM_NOISE, cfg=4.0)
    assert_close(target, ksampler(studio.model, studio.encode("a cat"), studio.negative, noise, guided))


# What cannot be


def behaviour(studio, name):
    """(deterministic, one model call at each sigma, next state depends on the latest alone) of a sampler."""
    sigmas = sigmas_of(studio.model, Settings())[: STEPS + 1]
    other = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    assert len(sigmas) == STEPS + 1

    def run(seed=1, scale=1.0, replaced=None):
        sampler, calls = comfy.samplers.sampler_object(name), []
        function = sampler.sampler_function

        @functools.wraps(function)
        def watched(model, x, *args, **kwargs):
            class Watched:
                def __getattr__(self, attribute):
                    return getattr(model, attribute)

                def __call__(self, x, sigma, **kwargs):
                    calls.append(float(sigma[0]))
                    if len(calls) - 1 == replaced:
                        x.copy_(other * sigma[0])
                    return model(x, sigma, **kwargs)

            return function(Watched(), x, *args, **kwargs)

        sampler.sampler_function = watched
        latent = {"samples": scale * picture()["samples"]}
        positive, settings = studio.encode(SOURCE), Settings(seed=seed)
        output = custom.SamplerCustom.execute(
            studio.model, False, seed, settings.cfg, positive, studio.negative, sampler, sigmas, latent
        )
        return output.args[0]["samples"], calls

    first, calls = run()
    each_sigma = len(calls) == STEPS and all(map(math.isclose, calls, sigmas.tolist()))
    alone = each_sigma and torch.equal(run(replaced=2)[0], run(scale=0.5, replaced=2)[0])
    return torch.equal(first, run(seed=2)[0]), each_sigma, alone


@pytest.mark.parametrize("name", SAMPLERS)
def test_exactly_the_samplers_that_are_deterministic_and_first_order_follow_a_trajectory(
    studio, trajectory, name
):
    if all(behaviour(studio, name)):
        source, _ = edited(studio, trajectory, settings=Settings(sampler=name))
        assert_close(source, picture()["samples"], 1e-6)
    else:
        with pytest.raises(ValueError, match=r"sampler \w+ cannot follow.*euler, ddim or euler_cfg_pp"):
            edited(studio, trajectory, settings=Settings(sampler=name))


@pytest.mark.parametrize("name", sorted(FIRST_ORDER))
def test_options_that_add_noise_keep_a_sampler_from_following(studio, trajectory, name):
    edit, option = studio.edit(), FIRST_ORDER[name]
    model, positive = control(studio.model, edit, PART, trajectory=trajectory)
    for value in () if option is None else (0.0, 0.7):
        sampler = comfy.samplers.ksampler(name.removeprefix("sample_"), {option: value})
        run = functools.partial(
            sampler_custom,
            model,
            positive,
            studio.negative,
            studio.rows(edit, picture()),
            Settings(),
            sampler,
        )
        if value == 0.0:
            assert_close(run()[:1], picture()["samples"], 1e-6)
        else:
            with pytest.raises(ValueError, match=f"unless its {option} is 0"):
                run()


@pytest.mark.parametrize(
    ("settings", "latent", "message"),
    [
        (Settings(steps=6), picture(), "trajectory has 4 steps.* run has 6 steps"),
        (Settings(scheduler="karras"), picture(), "4 steps of scheduler normal .* scheduler karras"),
        (Settings(denoise=0.5), picture(), "trajectory has 4 steps.* run has 4 steps"),
        (Settings(), picture(1, 8, 16), "trajectory has latents of 8 x 8.* run's are of 16 x 8"),
        (Settings(), picture(3), "trajectory has a batch of 1.* run has 3 pairs"),
        (Settings(), {**picture(), "noise_mask": torch.ones(1, 8, 8)}, "exclude each other"),
    ],
    ids=["steps", "scheduler", "denoise", "size", "batch", "mask"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_does_not_fit_the_trajectory_says_both_sides(
    studio, trajectory, settings, latent, message, way
):
    model = studio.model.clone()
    model.set_model_unet_function_wrapper(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        edited(studio, trajectory, settings=settings, latent=latent, way=way, model=model)


def test_another_model_says_both_sides_and_clones_are_no_other_model(studio, trajectory):
    from p2p.demo.loader import load_demo_model

    other = load_demo_model()[0]
    with pytest.raises(ValueError, match=r"inverted with a model of class \w+.* run's model is another \w+"):
        control(other, studio.edit(), PART, trajectory=trajectory)
    control(studio.model.clone(), studio.edit(), PART, trajectory=trajectory)
    found, _ = invert(other, studio.encode(SOURCE), picture(), 2, "normal")
    del other
    control(studio.model, studio.edit(), PART, trajectory=found)  # the same model, loaded again


def test_what_cannot_be_inverted_is_refused(studio):
    positive = studio.encode(SOURCE)
    controlled, paired = control(studio.model, studio.edit(), PART)

    def run(model=studio.model, positive=positive, latent=None, **given):
        invert(model, positive, latent or picture(), 2, "normal", **given)

    with pytest.raises(ValueError, match="from before"):
        run(model=controlled)
    with pytest.raises(ValueError, match="source prompt's own conditioning"):
        run(positive=paired)
    with pytest.raises(ValueError, match="cfg is 3"):
        run(cfg=3.0)
    with pytest.raises(ValueError, match=r"shape \(1, 16, 8, 8\).*\(batch, 4, height, width\)"):
        run(latent={"samples": torch.ones(1, 16, 8, 8)})
    with pytest.raises(ValueError, match="empty"):
        run(latent=empty())
    with pytest.raises(ValueError, match="noise mask"):
        run(latent={**picture(), "noise_mask": torch.ones(1, 8, 8)})


def test_the_node_shows_progress(studio, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "latent_preview.prepare_callback", lambda model, steps: lambda *given: shown.append(given[0])
    )
    InvertImage.execute(studio.model, studio.encode(SOURCE), picture(), 3, "normal", refinement=2)
    assert shown == [0, 1, 2]

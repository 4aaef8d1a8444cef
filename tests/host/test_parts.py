"""A run in parts, with tau in percent of the noise schedule: each part goes on where the one before ended."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_base
import comfy.model_sampling
import comfy.samplers
import pytest
import torch
from comfy.model_base import ModelType
from comfy_extras import nodes_custom_sampler as custom
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, ModelSamplingSD3
from p2p.attention.blend import LocalBlend
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AttentionController, PairedLatent
from p2p.sampling.controller import control
from p2p.sampling.run import percent_of
from p2p.tests.host import test_transformers_laws as transformers
from p2p.tests.host.runs import (
    EDITED,
    SOURCE,
    TARGET,
    Settings,
    assert_close,
    difference,
    empty,
    ksampler,
    sigmas_of,
)
from p2p.tests.host.transformers import latent

S = Settings(steps=6)
CUTS = [(2,), (3,), (5,), (1, 4)]
PERCENT = TauSchedule(Window(0, 0.6), Window(0.1, 0.4), self_resolution=1.0, measure="percent")
SCHEDULES = {
    "windows": PERCENT,
    "faded": replace(PERCENT, fade=0.3),
    "words": replace(PERCENT, words=(("dog", Window(0.2, 0.5)), ("red car", Window(0, 0.9)))),
    "mutual": replace(PERCENT, self_mode="mutual", mutual_layer=0.0),
}
in_parts = pytest.mark.parametrize("cuts", CUTS, ids=str)


def ends(cuts, steps):
    return list(zip((0, *cuts), (*cuts, steps), strict=True))


def part_of(first, last, s=S):
    """The settings of KSampler (Advanced) for a part of the steps."""
    more = {"disable_noise": first > 0, "start_step": first, "last_step": last}
    return replace(s, advanced={**more, "force_full_denoise": last == s.steps})


def advanced(controlled, positive, negative, paired, cuts, s=S):
    """KSampler (Advanced), once for each part."""
    for first, last in ends(cuts, s.steps):
        rows = ksampler(controlled, positive, negative, paired, part_of(first, last, s))
        paired = {**paired, "samples": rows}
    return paired["samples"]


def split(controlled, positive, negative, paired, cuts, s=S):
    """SplitSigmas and SamplerCustom, once for each part."""
    sigmas = sigmas_of(controlled, s)
    for first, last in ends(cuts, s.steps):
        part = sigmas[first : last + 1]
        sampler = comfy.samplers.sampler_object(s.sampler)
        output = custom.SamplerCustom.execute(
            controlled, first == 0, s.seed, s.cfg, positive, negative, sampler, part, paired
        )
        paired = output.args[0]
    return paired["samples"]


@in_parts
@pytest.mark.parametrize("way", [advanced, split])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_in_parts_is_the_undivided_one(studio, schedule, way, cuts):
    edit = studio.edit(SOURCE, TARGET, "a cat riding a dog").reweighted("red", 1.5, 1)
    model, positive = AttentionController.execute(studio.model, edit, SCHEDULES[schedule]).args[:2]
    paired = PairedLatent.execute(empty(2), edit).args[0]
    whole = way(model, positive, studio.negative, paired, ())
    assert_close(way(model, positive, studio.negative, paired, cuts), whole, 1e-4)


def test_counted_in_steps_each_part_begins_its_windows_anew(studio):
    """So that the law can fail."""
    edit = studio.edit()
    steps = replace(PERCENT, measure="steps")
    model, positive = AttentionController.execute(studio.model, edit, steps).args[:2]
    paired = PairedLatent.execute(empty(), edit).args[0]
    whole = advanced(model, positive, studio.negative, paired, ())
    assert difference(advanced(model, positive, studio.negative, paired, (3,)), whole) > EDITED


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpm_fast", "ddim", "euler_cfg_pp"])
def test_samplers_without_memory_lose_nothing_at_a_cut(studio, sampler):
    edit, s = studio.edit(), replace(S, sampler=sampler)
    model, positive = AttentionController.execute(studio.model, edit, PERCENT).args[:2]
    paired = PairedLatent.execute(empty(), edit).args[0]
    plain = studio.encode(SOURCE)
    lost = difference(
        advanced(studio.model, plain, studio.negative, empty(), (3,), s),
        advanced(studio.model, plain, studio.negative, empty(), (), s),
    )
    whole = advanced(model, positive, studio.negative, paired, (), s)
    parts = advanced(model, positive, studio.negative, paired, (3,), s)
    assert difference(parts, whole) <= max(5 * lost, 1e-4)


@in_parts
def test_each_part_may_have_a_controller_and_an_edit_of_its_own(studio, cuts):
    edits = [studio.edit() for _ in range(len(cuts) + 1)]
    models = [AttentionController.execute(studio.model, edit, PERCENT).args[:2] for edit in edits]
    edit = studio.edit()
    paired = PairedLatent.execute(empty(), edit).args[0]
    whole = advanced(models[0][0], models[0][1], studio.negative, paired, ())
    for (model, positive), (first, last) in zip(models, ends(cuts, S.steps), strict=True):
        rows = ksampler(model, positive, studio.negative, paired, part_of(first, last))
        paired = {**paired, "samples": rows}
    assert_close(paired["samples"], whole, 1e-4)


@in_parts
def test_a_blend_inside_a_mask_begins_where_it_would_in_the_undivided_run(studio, cuts):
    mask = torch.zeros(1, 8, 8)
    mask[:, :, 4:] = 1.0
    edit = studio.edit()
    model, positive = control(studio.model, edit, PERCENT, blend=LocalBlend(mask=mask, start=0.5))
    paired = PairedLatent.execute(empty(), edit).args[0]
    whole = advanced(model, positive, studio.negative, paired, ())
    assert_close(advanced(model, positive, studio.negative, paired, cuts), whole, 1e-4)
    unblended, positive = control(studio.model, edit, PERCENT)
    assert difference(advanced(unblended, positive, studio.negative, paired, ()), whole) > 1e-3


def test_a_part_whose_windows_are_over_is_a_plain_run(studio, caplog):
    edit = studio.edit()
    tau = TauSchedule(Window(0, 0.1), Window(0, 0.1), measure="percent")
    late = Settings(steps=4, denoise=0.5)
    source, target = studio.paired(edit, tau, late, {"samples": torch.ones(1, 4, 8, 8)})
    assert_close(source, studio.plain(SOURCE, late, {"samples": torch.ones(1, 4, 8, 8)}))
    assert_close(target, studio.plain(TARGET, late, {"samples": torch.ones(1, 4, 8, 8)}))


def test_a_pair_whose_noise_is_not_gone_yet_is_not_said_to_be_unchanged(studio, caplog):
    edit = studio.edit()
    model, positive = AttentionController.execute(studio.model, edit, PERCENT).args[:2]
    paired = PairedLatent.execute(empty(), edit).args[0]
    ksampler(model, positive, studio.negative, paired, part_of(0, 1))
    assert not [record for record in caplog.records if "did not happen" in record.message]


@pytest.mark.parametrize("name", ["Flux", "SD3", "Z-Image", "Qwen-Image", "Wan 2.1"])
@pytest.mark.parametrize("shift", [None, 5.0])
def test_transformers_in_parts(name, shift):
    pair = transformers.pair_of(name, transformers.build(name))
    model = pair.model
    if shift is not None:
        flux = name == "Flux"
        node = (ModelSamplingFlux if flux else ModelSamplingSD3)()
        (model,) = node.patch(model, shift, 0.5, 512, 512) if flux else node.patch(model, shift)
    s = replace(S, scheduler="simple", cfg=2.0)
    controlled, positive = control(model, pair.edit, PERCENT)
    paired = {"samples": torch.zeros_like(latent(name, 3)), "batch_index": [0] * 3}
    whole = advanced(controlled, positive, pair.negative, paired, (), s)
    for cuts in CUTS:
        assert_close(advanced(controlled, positive, pair.negative, paired, cuts, s), whole, 1e-4)


@pytest.mark.parametrize("kind", ["EPS", "V_PREDICTION", "EDM", "FLOW", "FLUX", "V_PREDICTION_CONTINUOUS"])
def test_a_percent_is_the_hosts_own(kind):
    class Config:
        sampling_settings = {}

    sampling = comfy.model_base.model_sampling(Config(), ModelType[kind])
    for percent in (0.01, 0.2, 0.25, 0.5, 0.8, 0.99):
        sigma = float(sampling.percent_to_sigma(percent))
        assert percent_of(sigma, sampling.percent_to_sigma) == pytest.approx(percent, abs=2e-5)
    assert percent_of(1e6, sampling.percent_to_sigma) == 0.0


@pytest.mark.parametrize(("scheduler", "covered"), [("normal", 16), ("karras", 12)])
def test_what_the_page_on_tau_says_of_percent(scheduler, covered):
    class Config:
        sampling_settings = {}

    sampling = comfy.model_base.model_sampling(Config(), ModelType.EPS)
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 20).tolist()
    window = Window(0.0, 0.8)
    assert sum(window.weight(percent_of(s, sampling.percent_to_sigma)) for s in sigmas[:-1]) == covered

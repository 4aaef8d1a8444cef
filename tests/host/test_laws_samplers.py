"""Laws 1, 2 and 3 on every sampler and every scheduler that the host lists."""

from __future__ import annotations

import inspect

import comfy.samplers
import pytest
import torch
from comfy_extras import nodes_advanced_samplers, nodes_custom_sampler
from p2p.sampling.controller import control
from p2p.tests.host.runs import (
    EDITED,
    EMPTY,
    FULL,
    HOST_WARNINGS,
    PART,
    SAMPLERS,
    SCHEDULERS,
    SOURCE,
    TARGET,
    Settings,
    assert_close,
    difference,
    empty,
    picture,
    sampler_custom,
)

pytestmark = HOST_WARNINGS

ONE_RUN_IS_NOT_ITS_PART_OF_A_BATCH = {
    "dpm_adaptive": "chooses its step sizes from the error of the whole batch: in the host itself a row of "
    "a batch differs from a run of its own, and what changes one row moves the steps of all",
}
"""Samplers that cannot keep laws 2 and 3 row by row; they keep law 1, and law 2 against the host's batch."""

BY_ROW = [name for name in SAMPLERS if name not in ONE_RUN_IS_NOT_ITS_PART_OF_A_BATCH]


def draws_noise(name):
    """Whether a sampler can draw noise for its steps, so that the rows of a plain batch differ in it."""
    return (
        "noise_sampler" in inspect.signature(comfy.samplers.sampler_object(name).sampler_function).parameters
    )


settings = [pytest.param(Settings(sampler=name), id=name) for name in SAMPLERS]
by_row = [pytest.param(Settings(sampler=name), id=name) for name in BY_ROW]
by_row += [pytest.param(Settings(scheduler=name), id=f"scheduler {name}") for name in SCHEDULERS]
by_row += [
    pytest.param(Settings(sampler="dpmpp_sde", scheduler=name), id=f"dpmpp_sde, scheduler {name}")
    for name in SCHEDULERS
]
deterministic = [pytest.param(Settings(sampler=name), id=name) for name in SAMPLERS if not draws_noise(name)]


@pytest.mark.parametrize("tau", [PART, FULL], ids=["part", "full"])
@pytest.mark.parametrize("settings", settings)
def test_law_1_target_prompt_equal_to_source_prompt_gives_equal_images(studio, settings, tau):
    source, target = studio.paired(studio.edit(SOURCE, SOURCE), tau, settings)
    assert_close(target, source)


@pytest.mark.parametrize("settings", by_row)
def test_law_2_with_tau_empty_both_branches_are_plain_runs_of_their_prompts(studio, settings):
    source, target = studio.paired(studio.edit().reweighted("red", -2.0), EMPTY, settings)
    assert_close(source, studio.plain(SOURCE, settings))
    assert_close(target, studio.plain(TARGET, settings))


@pytest.mark.parametrize("settings", by_row)
def test_law_2_the_source_is_a_plain_run_of_its_prompt_whatever_the_edit(studio, settings):
    source, _ = studio.paired(studio.edit().reweighted("red", -2.0), FULL, settings)
    assert_close(source, studio.plain(SOURCE, settings))


@pytest.mark.parametrize("settings", deterministic)
def test_law_2_with_tau_empty_the_pair_is_the_hosts_own_batch_bit_for_bit(studio, settings):
    source, target = studio.paired(studio.edit(), EMPTY, settings)
    plain = studio.plain_batch([SOURCE, TARGET], settings, empty())
    assert torch.equal(torch.cat([source, target]), plain)


@pytest.mark.parametrize("settings", by_row)
def test_law_3_no_tau_edit_or_gain_changes_a_bit_of_the_source(studio, settings):
    edit, other = studio.edit().reweighted("red", 2.0), studio.edit(SOURCE, "children drawing of a castle")
    source, target = studio.paired(edit, EMPTY, settings)
    for changed_edit, tau in ((edit, FULL), (edit, PART), (other, PART)):
        changed_source, changed_target = studio.paired(changed_edit, tau, settings)
        assert torch.equal(changed_source, source)
        assert difference(changed_target, target) > EDITED


@pytest.mark.parametrize("sigma", [0.0, 5.0])
@pytest.mark.parametrize("name", SAMPLERS)
def test_with_a_single_sigma_both_branches_are_what_the_host_makes_of_it(studio, name, sigma):
    sampler, sigmas = comfy.samplers.sampler_object(name), torch.tensor([sigma])

    def sample(model, positive, latent):
        node = nodes_custom_sampler.SamplerCustom
        return node.execute(model, True, 1, 4.0, positive, studio.negative, sampler, sigmas, latent).args[0]

    try:
        plain = sample(studio.model, studio.encode(SOURCE), picture())["samples"]
    except Exception as error:
        pytest.skip(f"The host's sampler fails: {error!r}")
    edit = studio.edit(SOURCE, SOURCE)
    model, positive = control(studio.model, edit, PART)
    rows = sample(model, positive, studio.rows(edit, picture()))["samples"]
    assert_close(rows, plain.repeat(2, 1, 1, 1))


@pytest.mark.parametrize("name", ONE_RUN_IS_NOT_ITS_PART_OF_A_BATCH)
def test_samplers_that_look_at_the_whole_batch_do_so_without_this_pack_too(studio, name):
    """The exceptions are the host's: a row of a plain batch is not the plain run of its prompt."""
    settings = Settings(sampler=name)
    rows = studio.plain_batch([SOURCE, TARGET], settings, empty())
    assert difference(rows[:1], studio.plain(SOURCE, settings)) > 1e-6


# Sampler nodes of SamplerCustom

UNTIED = {
    "SamplerLCMUpscale": "draws its noise with torch.randn_like in its own loop and takes no noise sampler",
}
"""Sampler nodes whose noise nobody can tie: source and target get different noise."""


def sampler_nodes():
    for module in (nodes_custom_sampler, nodes_advanced_samplers):
        for name, node in vars(module).items():
            if name.startswith("Sampler") and hasattr(node, "define_schema"):
                outputs = node.define_schema().outputs
                if outputs[0].io_type == "SAMPLER":
                    yield pytest.param(node, id=name)


def make_sampler(node, model):
    """The node's sampler, with the default of each input."""
    values = {}
    for given in node.define_schema().inputs:
        if given.io_type == "MODEL":
            values[given.id] = model
        elif given.io_type == "COMBO":
            values[given.id] = given.default or given.options[0]
        else:
            values[given.id] = given.default or 0
    return node.execute(**values).args[0]


def run_node(studio, node, edit, tau):
    controlled, positive = control(studio.model, edit, tau)
    sampler = make_sampler(node, studio.model)
    rows = studio.rows(edit, empty())
    samples = sampler_custom(controlled, positive, studio.negative, rows, Settings(), sampler)
    return studio.split(edit, samples)


@pytest.mark.parametrize("node", [node for node in sampler_nodes() if node.id not in UNTIED])
def test_law_1_on_every_sampler_node(studio, node):
    source, target = run_node(studio, node, studio.edit(SOURCE, SOURCE), PART)
    assert_close(target, source)


@pytest.mark.parametrize("node", [node for node in sampler_nodes() if node.id not in UNTIED])
def test_law_3_on_every_sampler_node(studio, node):
    if node.__name__ == "SamplerDPMAdaptative":
        pytest.skip(ONE_RUN_IS_NOT_ITS_PART_OF_A_BATCH["dpm_adaptive"])
    source, _ = run_node(studio, node, studio.edit(), EMPTY)
    assert torch.equal(run_node(studio, node, studio.edit(), FULL)[0], source)


@pytest.mark.parametrize("node", [node for node in sampler_nodes() if node.id in UNTIED])
def test_sampler_nodes_named_as_untied_are(studio, node):
    source, target = run_node(studio, node, studio.edit(SOURCE, SOURCE), FULL)
    assert difference(target, source) > EDITED


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2"])
def test_samplers_with_churn_are_untied(studio, name):
    """They draw its noise for every row, in their own loops."""
    edit = studio.edit(SOURCE, SOURCE)
    model, positive = control(studio.model, edit, FULL)
    sampler = comfy.samplers.ksampler(name, {"s_churn": 2.0})
    rows = sampler_custom(model, positive, studio.negative, studio.rows(edit, empty()), Settings(), sampler)
    assert difference(rows[1:], rows[:1]) > EDITED


# Samplers of other packs, which are not of the host's modules


class StripedNoiseSampler:
    """Noise of another kind than the host's: the same in all columns of an image."""

    def __init__(self, x, seed=None):
        self.x, self.generator = x, torch.Generator().manual_seed(seed or 0)

    def __call__(self, sigma, sigma_next):
        rows = torch.randn((*self.x.shape[:-1], 1), generator=self.generator)
        return rows.expand(self.x.shape).to(self.x)


def make_noise_sampler(x, seed):
    return StripedNoiseSampler(x, seed=seed)


@torch.no_grad()
def sample_striped(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Euler's steps, each to zero noise and back up to the next level."""
    seed = extra_args.get("seed")
    noise_sampler = StripedNoiseSampler(x, seed=seed) if noise_sampler is None else noise_sampler
    ones = x.new_ones([x.shape[0]])
    for n in range(len(sigmas) - 1):
        x = model(x, sigmas[n] * ones, **extra_args) + sigmas[n + 1] * noise_sampler(sigmas[n], sigmas[n + 1])
    return x


def sample_by_a_function(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    noise_sampler = noise_sampler or make_noise_sampler(x, extra_args.get("seed"))
    return sample_striped(model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_through_another(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
    return sample_striped(model, x, sigmas, extra_args, callback, disable, **options)


KINDS = {"striped": StripedNoiseSampler}


def sample_of_a_table(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    noise_sampler = noise_sampler or KINDS["striped"](x, extra_args.get("seed"))
    return sample_striped(model, x, sigmas, extra_args, callback, disable, noise_sampler)


@pytest.mark.parametrize("function", [sample_striped, sample_by_a_function, sample_through_another])
def test_samplers_of_other_packs_keep_their_own_kind_of_noise_tied(studio, function, caplog):
    """Law 2: source and targets are plain runs, with the pack's noise; law 1: source and target share it."""
    sampler = comfy.samplers.KSAMPLER(function)
    plain = sampler_custom(
        studio.model, studio.encode(SOURCE), studio.negative, empty(), Settings(), sampler
    )
    for edit, tau in ((studio.edit(), EMPTY), (studio.edit(SOURCE, SOURCE), FULL)):
        model, positive = control(studio.model, edit, tau)
        latent = studio.rows(edit, empty())
        rows = sampler_custom(model, positive, studio.negative, latent, Settings(), sampler)
        assert_close(rows[:1], plain)
    assert_close(rows[1:], rows[:1])
    assert sampler.sampler_function is function and not caplog.records


def test_a_sampler_whose_noise_cannot_be_tied_gets_gaussian_noise_and_says_so(studio, caplog):
    edit, sampler = studio.edit(SOURCE, SOURCE), comfy.samplers.KSAMPLER(sample_of_a_table)
    model, positive = control(studio.model, edit, FULL)
    latent = studio.rows(edit, empty())
    rows = sampler_custom(model, positive, studio.negative, latent, Settings(), sampler)
    assert_close(rows[1:], rows[:1])
    assert "sample_of_a_table makes noise in a way that cannot be tied" in caplog.text

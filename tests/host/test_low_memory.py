"""Several targets where memory is short: the run goes through the model in parts, and comes out the same."""

from __future__ import annotations

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from p2p.attention.blend import read_blend
from p2p.nodes import AttentionController, PairedLatent, PairedSampler
from p2p.sampling.controller import control
from p2p.sampling.forward import fitting_groups
from p2p.sampling.maps import MapsHandle
from p2p.sampling.reuse import CACHE
from p2p.sampling.run import Run
from p2p.sampling.sampler import sample_pairs
from p2p.tests.host.beside.models import ImagePrompt
from p2p.tests.host.runs import (
    EULER,
    PART,
    STOCK,
    WAYS,
    Settings,
    assert_close,
    difference,
    empty,
    in_graph,
    ksampler,
    paired_sampler,
    picture,
)

TARGETS = ("a dog riding a bicycle", "a cat riding a car", "a red cat riding a boat at night")


@pytest.fixture
def short_of_memory(monkeypatch):
    """The host's estimate says that this many rows fit, and no more."""

    def allow(rows: int) -> None:
        monkeypatch.setattr(
            "comfy.model_base.BaseModel.memory_required",
            lambda self, shape, **_: 1e18 if shape[0] > rows else 1.0,
        )

    return allow


@pytest.fixture
def out_of_memory(monkeypatch):
    """The device holds this many rows of a forward, and raises the host's exception for more."""

    def allow(rows: int, error: type = comfy.model_management.OOM_EXCEPTION) -> list[int]:
        forward, refused = UNetModel._forward, []

        def limited(self, x, timesteps, context, y, control, *args, **kwargs):
            if x.shape[0] > rows:
                if control is not None:
                    for lists in control.values():
                        lists.clear()  # as a forward that failed half-way leaves it
                refused.append(x.shape[0])
                raise error("out of memory")
            return forward(self, x, timesteps, context, y, control, *args, **kwargs)

        monkeypatch.setattr(UNetModel, "_forward", limited)
        return refused

    return allow


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pairs", [1, 2])
def test_a_run_that_does_not_fit_is_split_by_targets_with_the_same_result(
    studio, forwards, short_of_memory, way, pairs
):
    edit = studio.edit("a cat riding a bicycle", *TARGETS).reweighted("boat", 1.5)
    whole = studio.paired(edit, PART, latent=empty(pairs), way=way)
    assert set(forwards) == {2 * 4 * pairs}
    forwards.clear()
    short_of_memory(3 * pairs)
    parts = studio.paired(edit, PART, latent=empty(pairs), way=way)
    assert set(forwards) == {3 * pairs, 2 * pairs}  # cond and uncond apart: source with two targets, with one
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected)


def test_one_target_at_a_time_is_the_least(studio, forwards, short_of_memory):
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    whole = studio.paired(edit, PART)
    forwards.clear()
    short_of_memory(0)
    parts = studio.paired(edit, PART)
    assert set(forwards) == {2}
    assert_close(parts[1], whole[1])


@pytest.mark.parametrize("rows", [4, 6])
def test_memory_that_runs_out_in_mid_run_splits_the_rest_of_it(studio, forwards, out_of_memory, rows):
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    whole = studio.paired(edit, PART)
    refused = out_of_memory(rows)
    parts = studio.paired(edit, PART)
    assert refused == [8]  # once, not at every step
    assert_close(parts[0], whole[0])
    assert_close(parts[1], whole[1])


def test_memory_too_small_for_one_target_is_the_hosts_own_error(studio, out_of_memory):
    out_of_memory(3)  # a source and a target, cond and uncond, are four
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        studio.paired(studio.edit("a cat riding a bicycle", *TARGETS), PART)


@pytest.mark.parametrize("source", ["host", "model"])
def test_free_memory_is_what_the_host_asks_for(studio, forwards, monkeypatch, source):
    """Hosts that keep models in a GPU's spare memory have a model tell how much is free."""
    required = BaseModel.memory_required
    need = {rows: required(studio.model.model, [rows, 4, 8, 8]) for rows in (2, 3, 4)}
    free = lambda *_: (need[3] + need[4]) / 2  # noqa: E731
    if source == "host":
        monkeypatch.setattr("comfy.model_management.get_free_memory", free)
    else:
        monkeypatch.setattr("comfy.model_management.get_free_memory", lambda *_: 0)
        monkeypatch.setattr(type(studio.model), "get_free_memory", lambda self, device: free(), raising=False)
    run = Run([1.0, 0.0], (4, 4, 8, 8), 4, ())
    studio.model.model.current_patcher = studio.model
    assert fitting_groups(studio.model.model, torch.zeros(4, 4, 8, 8), run) == ((0, 1), (2,))


def test_an_accelerators_own_error_splits_the_run_where_the_host_knows_it(studio, out_of_memory, monkeypatch):
    class AcceleratorError(RuntimeError):
        pass

    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    whole = studio.paired(edit, PART)
    refused = out_of_memory(4, AcceleratorError)
    with pytest.raises(AcceleratorError):
        studio.paired(edit, PART)
    monkeypatch.setattr(
        "comfy.model_management.is_oom", lambda e: isinstance(e, AcceleratorError), raising=False
    )
    refused.clear()
    parts = studio.paired(edit, PART)
    assert refused == [8]
    assert_close(parts[1], whole[1])


def test_a_replaced_attention_sees_the_whole_batch(studio, forwards, short_of_memory):
    """Its function may go by the batch's rows, so the host's own estimate and errors decide."""
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    model, replacer = studio.model.clone(), ImagePrompt()
    replacer.on(model)
    whole = studio.paired(edit, PART, model=model)
    forwards.clear()
    short_of_memory(3)
    found = studio.paired(edit, PART, model=model)
    assert set(forwards) == {4}  # cond and uncond apart
    assert_close(found[1], whole[1])


def test_a_replaced_attention_that_runs_out_of_memory_is_the_hosts_own_error(studio, out_of_memory):
    model = studio.model.clone()
    ImagePrompt().on(model)
    refused = out_of_memory(6)
    with pytest.raises(comfy.model_management.OOM_EXCEPTION):
        studio.paired(studio.edit("a cat riding a bicycle", *TARGETS), PART, model=model)
    assert refused == [8]


def test_all_groups_draw_the_same_random_numbers(studio, out_of_memory):
    """As one forward of the whole batch would, and what follows goes on from there."""
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    model = studio.model.clone()
    model.set_model_output_block_patch(lambda h, hsp, options: (h + 0.2 * torch.randn(h.shape[1:]), hsp))

    def sample():
        torch.manual_seed(3)
        return *studio.paired(edit, PART, model=model), torch.rand(4)

    whole = sample()
    out_of_memory(4)
    for found, expected in zip(sample(), whole, strict=True):
        assert_close(found, expected)


def test_maps_and_local_blend_of_a_run_in_parts_are_those_of_the_whole(studio, short_of_memory):
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    blend = read_blend("dog, car, boat", "bicycle", "", 0.5, 0.2)

    def sample():
        maps = MapsHandle(wanted=True)
        settings = {"latent": empty(2), "seed": 5, "steps": 4, "cfg": 4.0, **EULER}
        latents = sample_pairs(
            studio.model, edit, PART, negative=studio.negative, **settings, blend=blend, maps=maps
        )
        return [latent["samples"] for latent in latents], maps.maps_of(latents[0]["samples"])

    (whole, whole_maps) = sample()
    short_of_memory(2)
    (parts, parts_maps) = sample()
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected)
    for factor, expected in whole_maps.by_scale.items():
        assert_close(torch.stack(parts_maps.by_scale[factor]), torch.stack(expected))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("when", [0, 3])
def test_law_10_memory_that_runs_out_inside_a_forward_leaves_the_same_images_maps_and_blend(
    studio, monkeypatch, way, when
):
    """At the network's last layer, when all others have been computed and read; in forward number `when`."""
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    blend = read_blend("dog, car, boat", "bicycle", "", 0.5, 0.2)

    def sample():
        if way == "P2PSampler":
            optional = {"blend": blend, "node": in_graph(PairedSampler, "1")}
            maps = MapsHandle(wanted=True)
            monkeypatch.setattr("p2p.nodes.sample.MapsHandle", lambda wanted: maps)
            source, targets, *_ = paired_sampler(
                studio.model, edit, PART, studio.negative, empty(2), Settings(), **optional
            )
            return [source["samples"], targets["samples"]], maps.maps_of(source["samples"])
        maps = MapsHandle(wanted=True)
        controlled, positive = control(studio.model, edit, PART, blend=blend, maps=maps)
        rows = STOCK[way](controlled, positive, studio.negative, studio.rows(edit, empty(2)), Settings())
        return studio.split(edit, rows), maps.maps_of(rows)

    whole, whole_maps = sample()
    seen = []

    def run_out(module, given):
        seen.append(given[0].shape[0])
        if len(seen) == when + 1:
            raise comfy.model_management.OOM_EXCEPTION("out of memory")

    handle = studio.model.model.diffusion_model.out.register_forward_pre_hook(run_out)
    try:
        parts, parts_maps = sample()
    finally:
        handle.remove()
    assert len(set(seen)) > 1, "no forward was split"
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected, 1e-4)
    for scale, expected in whole_maps.by_scale.items():
        assert_close(torch.stack(parts_maps.by_scale[scale]), torch.stack(expected), 1e-4)
    assert_close(parts_maps.blend, whole_maps.blend)


def test_law_10_what_is_kept_of_the_sources_is_right_after_memory_ran_out(studio):
    """A forward that failed half-way keeps nothing; the next edit of the source is that of a fresh run."""
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    further = studio.edit("a cat riding a bicycle", "a cat riding a red car")
    negative, failed = studio.negative, []
    expected = paired_sampler(studio.model, further, PART, negative, empty(), Settings())

    def run_out(module, given):
        if not failed:
            failed.append(True)
            raise comfy.model_management.OOM_EXCEPTION("out of memory")

    handle = studio.model.model.diffusion_model.out.register_forward_pre_hook(run_out)
    try:
        paired_sampler(studio.model, edit, PART, negative, empty(), Settings(), reuse_gb=1.0)
    finally:
        handle.remove()
    found = paired_sampler(studio.model, further, PART, negative, empty(), Settings(), reuse_gb=1.0)
    CACHE.clear()
    assert failed
    for one, other in zip(found[:2], expected[:2], strict=True):
        assert_close(one["samples"], other["samples"], 1e-4)


def test_a_controlnets_residuals_are_split_with_the_rows(studio, out_of_memory):
    """A forward takes the residuals out of their lists, so a second try needs lists of its own."""

    class Residuals(comfy.controlnet.ControlBase):
        """As a ControlNet: a residual of its own for each row."""

        def get_control(self, x, *_):
            rows = torch.arange(x.shape[0], dtype=torch.float32)[:, None, None, None]
            return {"output": [], "middle": [rows.expand(-1, 128, *(side // 2 for side in x.shape[2:]))]}

    edit = studio.edit("a cat riding a bicycle", *TARGETS)

    def sample():
        model, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
        positive = [[cond, {**options, "control": Residuals()}] for cond, options in positive]
        negative = [[cond, {**options, "control": Residuals()}] for cond, options in studio.negative]
        latent = PairedLatent.execute(picture(), edit).args[0]
        return ksampler(model, positive, negative, latent, Settings())

    whole = sample()
    plain = torch.cat(studio.paired(edit, PART, latent=picture()))
    assert difference(whole, plain) > 0.1
    out_of_memory(4)
    assert_close(sample(), whole)

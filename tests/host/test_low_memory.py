"""Several targets where memory is short: the run goes through the model in parts, and comes out the same."""

from __future__ import annotations

import comfy.controlnet
import comfy.model_management
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from p2p.attention.blend import read_blend
from p2p.nodes import AttentionController, PairedLatent
from p2p.sampling.maps import MapsHandle
from p2p.sampling.sampler import sample_pairs
from p2p.tests.host.runs import PART, WAYS, Settings, assert_close, difference, empty, ksampler, picture

TARGETS = ("a dog riding a bicycle", "a cat riding a car", "a red cat riding a boat at night")


@pytest.fixture
def calls(monkeypatch):
    """Rows of every forward of the U-Net."""
    rows: list[int] = []
    forward = UNetModel._forward

    def counting(self, x, *args, **kwargs):
        rows.append(x.shape[0])
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "_forward", counting)
    return rows


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

    def allow(rows: int) -> list[int]:
        forward, refused = UNetModel._forward, []

        def limited(self, x, timesteps, context, y, control, *args, **kwargs):
            if x.shape[0] > rows:
                if control is not None:
                    for lists in control.values():
                        lists.clear()  # as a forward that failed half-way leaves it
                refused.append(x.shape[0])
                raise comfy.model_management.OOM_EXCEPTION("out of memory")
            return forward(self, x, timesteps, context, y, control, *args, **kwargs)

        monkeypatch.setattr(UNetModel, "_forward", limited)
        return refused

    return allow


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pairs", [1, 2])
def test_a_run_that_does_not_fit_is_split_by_targets_with_the_same_result(
    studio, calls, short_of_memory, way, pairs
):
    edit = studio.edit("a cat riding a bicycle", *TARGETS).reweighted("boat", 1.5)
    whole = studio.paired(edit, PART, latent=empty(pairs), way=way)
    assert set(calls) == {2 * 4 * pairs}
    calls.clear()
    short_of_memory(3 * pairs)
    parts = studio.paired(edit, PART, latent=empty(pairs), way=way)
    assert set(calls) == {3 * pairs, 2 * pairs}  # cond and uncond apart: source with two targets, with one
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected)


def test_one_target_at_a_time_is_the_least(studio, calls, short_of_memory):
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    whole = studio.paired(edit, PART)
    calls.clear()
    short_of_memory(0)
    parts = studio.paired(edit, PART)
    assert set(calls) == {2}
    assert_close(parts[1], whole[1])


@pytest.mark.parametrize("rows", [4, 6])
def test_memory_that_runs_out_in_mid_run_splits_the_rest_of_it(studio, calls, out_of_memory, rows):
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


def test_maps_and_local_blend_of_a_run_in_parts_are_those_of_the_whole(studio, short_of_memory):
    edit = studio.edit("a cat riding a bicycle", *TARGETS)
    blend = read_blend("dog, car, boat", "bicycle", "", 0.5, 0.2)

    def sample():
        maps = MapsHandle(wanted=True)
        arguments = (empty(2), 5, 4, 4.0, "euler", "normal", 1.0)
        latents = sample_pairs(studio.model, edit, PART, studio.negative, *arguments, blend, None, maps)
        return [latent["samples"] for latent in latents], maps.maps_of(latents[0]["samples"])

    (whole, whole_maps) = sample()
    short_of_memory(2)
    (parts, parts_maps) = sample()
    for found, expected in zip(parts, whole, strict=True):
        assert_close(found, expected)
    for factor, expected in whole_maps.by_factor.items():
        assert_close(parts_maps.by_factor[factor], expected)


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

"""Law 11 on the device itself: no layer waits for it, and a step reads sigma and nothing else."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from statistics import mean

import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from edits import SOURCE, Variant
from p2p.attention.blend import LocalBlend
from p2p.attention.schedule import parse_word_windows
from p2p.sampling.controller import plug_and_play
from p2p.sampling.maps import shown_layers
from p2p.sampling.network import layers_of
from p2p.sampling.reuse import CACHE
from p2p.sampling.trajectory import ModelIdentity, Trajectory
from p2p.tests.gpu.lab import FULL, PART, STEPS, TARGET
from waits import no_waits

REFINED = "a watercolor of a cat riding a bicycle"


def variant(lab, case):
    edit = lab.edit(SOURCE, TARGET)
    if case == "refine":
        edit = lab.edit(SOURCE, REFINED)
    if case == "several targets":
        edit = lab.edit(SOURCE, TARGET, REFINED, "a dog riding a bicycle")
    if case == "re-weight":
        edit = edit.reweighted("red", -1.5)
    if case == "Plug-and-Play":
        return Variant(*plug_and_play(lab.model.patcher, edit, 1.0, 1.0), edit.branches)
    tau = {
        "faded": PART,
        "word windows": replace(FULL, words=parse_word_windows("car: 0, red: 0.5-1")),
        "mutual": replace(FULL, self_mode="mutual"),
    }.get(case, FULL)
    side = lab.size // 8
    parts = {
        "words' blend": {"blend": LocalBlend(words=("car",), source_words=("bicycle",), start=0.0)},
        "mask's blend": {"blend": LocalBlend(mask=torch.eye(8)[None], start=0.0)},
        "maps": {"maps": True},
        "kept sources": {"reuse": 64.0},
        "trajectory": {"trajectory": trajectory(lab, side) if case == "trajectory" else None},
    }.get(case, {})
    return lab.ours(edit, tau, **parts)


def trajectory(lab, side):
    sampling = lab.model.patcher.get_model_object("model_sampling")
    sigmas = tuple(comfy.samplers.calculate_sigmas(sampling, "normal", STEPS).tolist())
    latents = tuple(torch.randn(1, 4, side, side) for _ in sigmas)
    return Trajectory(latents, sigmas, ModelIdentity.of(lab.model.patcher))


CASES = [
    "swap",
    "refine",
    "re-weight",
    "faded",
    "word windows",
    "several targets",
    "mutual",
    "Plug-and-Play",
    "words' blend",
    "mask's blend",
    "maps",
    "kept sources",
    "trajectory",
]


class Layers:
    """Around the network alone: from a run's second forward on nothing in it may wait for the device."""

    def __init__(self, device):
        self.device, self.forwards = device, 0

    def __call__(self, executor, *args, **kwargs):
        self.forwards += 1
        with no_waits(self.device) if self.forwards > 1 else nullcontext():
            return executor(*args, **kwargs)


@pytest.mark.parametrize("case", CASES)
def test_no_layer_waits_and_a_step_reads_sigma_alone(lab, case):
    CACHE.clear()
    one, layers = variant(lab, case), Layers(lab.device)
    one.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "layers", layers)
    lab.sample(one)
    assert layers.forwards == STEPS
    plain = lab.plain(lab.edit(SOURCE, TARGET))
    found = mean(lab.reads(one, lab.size, STEPS)) - mean(lab.reads(plain, lab.size, STEPS))
    assert 0 < found <= allowed(lab, case)
    assert layers.forwards == 2 * STEPS
    CACHE.clear()


def allowed(lab, case):
    """Reads of a step: its sigma; with a kept source also whether its rows are the same.

    Maps of a step go to host memory when the next one has ended, once for each size of theirs.
    """
    layers = layers_of(lab.model.patcher.get_model_object("diffusion_model"))
    maps = len({layer.scale for layer in shown_layers(layers)})
    return 1 + {"kept sources": 1, "maps": maps}.get(case, 0)


@pytest.mark.parametrize("read", [float, lambda x: x.nonzero(), lambda x: torch.equal(x, x + 1)])
def test_the_test_can_fail(lab, read):
    x = torch.ones(1, device=lab.device)
    with pytest.raises(RuntimeError), no_waits(lab.device):
        read(x)

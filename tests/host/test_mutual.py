"""Mutual self-attention (MasaCtrl): against stored keys and values, and what must hold on every run."""

from __future__ import annotations

from dataclasses import replace

import comfy.samplers
import pytest
import torch
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import TauScheduler
from p2p.sampling.controller import control
from p2p.sampling.invert import invert
from p2p.sampling.network import layers_of, of_kind
from p2p.sampling.sampler import sample_pairs
from p2p.tests.host.checkpoints import FAMILIES, load, network_of
from p2p.tests.host.runs import (
    EDITED,
    SOURCE,
    TARGET,
    WAYS,
    Settings,
    Studio,
    assert_close,
    difference,
    empty,
    ksampler,
    picture,
)

STEPS = 4
MUTUAL = TauSchedule(Window(0, 0), Window(0.25, 1), self_mode="mutual")
WHOLE = replace(MUTUAL, self_=Window(0, 1), mutual_layer=0.0)
SCHEDULES = {
    "published": MUTUAL,
    "every layer": WHOLE,
    "last layer": replace(MUTUAL, mutual_layer=0.9),
    "ends early": replace(WHOLE, self_=Window(0, 0.5)),
    "faded": replace(WHOLE, self_=Window(0, 0.9), fade=0.6),
}


class Stored:
    """The source's keys and values of self-attention, kept in a run of its own and given to the target's.

    One row for each half of guidance, one step at a time, by materialised maps; layers in their order.
    """

    def __init__(self, model, layers, first, sigmas, tau):
        self.model, self.first, self.sigmas, self.tau = model.clone(), first, sigmas.tolist(), tau
        self.order = {layer: n for n, layer in enumerate(layers)}
        self.kept, self.replay = {}, False
        for name in ("input", "middle", "output"):
            for n in range(12):
                self.model.set_model_attn1_replace(self.attention, name, n)
        self.model.set_model_unet_function_wrapper(self.begin)

    def begin(self, apply, given):
        sigma = float(given["timestep"][0])
        self.step = min(range(len(self.sigmas)), key=lambda n: abs(self.sigmas[n] - sigma))
        self.halves = given["cond_or_uncond"]
        return apply(given["input"], given["timestep"], **given["c"])

    def attention(self, q, k, v, options):
        layer = self.order[(*options["block"], options["block_index"])]
        weight = self.tau.self_.weight(self.step / STEPS, self.tau.fade) if layer >= self.first else 0.0
        out = []
        for row, half in enumerate(self.halves):
            place = (layer, self.step, half)
            own = _attend(q[row], k[row], v[row], options["n_heads"])
            if not self.replay:
                self.kept[place] = k[row].clone(), v[row].clone()
            else:
                own = (1 - weight) * own + weight * _attend(q[row], *self.kept[place], options["n_heads"])
            out.append(own)
        return torch.stack(out)


def _attend(q, k, v, heads):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
    return (
        (torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v).transpose(0, 1).flatten(1)
    )


def sigmas_of(model):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)


def blocks_of(network):
    """Transformer blocks in the order in which the network runs them."""
    return [layer.block for layer in of_kind(layers_of(network), "self")]


@pytest.mark.parametrize("tau", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_run_equals_stored_keys_and_values(studio, tau):
    layers = blocks_of(studio.model.get_model_object("diffusion_model"))
    settings = Settings(steps=STEPS)
    assert len(layers) == 7
    first = {0.63: 4, 0.0: 0, 0.9: 6}[tau.mutual_layer]
    stored = Stored(studio.model, layers, first, sigmas_of(studio.model), tau)
    expected = []
    for text in (SOURCE, TARGET):
        positive = studio.encode(text)
        expected.append(ksampler(stored.model, positive, studio.negative, empty(), settings))
        stored.replay = True
    for found, one in zip(studio.paired(studio.edit(), tau, settings), expected, strict=True):
        assert_close(found, one)
    assert difference(expected[1], studio.plain(TARGET, settings)) > EDITED / 2


def test_layer_10_of_sd15_and_its_counterpart_in_sdxl_are_the_first_by_default():
    for name, first, layers in (("SD1.5", 10, 16), ("SDXL", 44, 70)):
        blocks = blocks_of(network_of(name))
        assert len(blocks) == layers and round(MUTUAL.mutual_layer * layers) == first
        assert {block[0] for block in blocks[first:]} == {"output"}
        if name == "SD1.5":
            assert blocks[first:] == [("output", n, 0) for n in range(6, 12)]


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_on_real_layouts_a_run_equals_stored_keys_and_values(name, tmp_path):
    studio = Studio(*load(tmp_path / "model.ckpt", FAMILIES[name]))
    layers = blocks_of(studio.model.get_model_object("diffusion_model"))
    settings = Settings(steps=STEPS, advanced={"last_step": 2})
    first = {"SD1.5": 10, "SDXL": 44}[name]
    tau = replace(MUTUAL, self_=Window(0, 1))
    stored = Stored(studio.model, layers, first, sigmas_of(studio.model), tau)
    controlled, positive = control(studio.model, studio.edit(), tau)
    rows = studio.rows(studio.edit(), empty())
    found = ksampler(controlled, positive, studio.negative, rows, settings).split(1)
    for one, text in zip(found, (SOURCE, TARGET), strict=True):
        positive = studio.encode(text)
        assert_close(one, ksampler(stored.model, positive, studio.negative, empty(), settings), 1e-5)
        stored.replay = True
    plain = ksampler(studio.model, studio.encode(TARGET), studio.negative, empty(), settings)
    assert difference(found[1], plain) > 1e-4  # random weights, of which these layers move little


@pytest.mark.parametrize("way", WAYS)
def test_equal_prompts_give_equal_images_and_the_source_is_a_plain_run(studio, way):
    source, target = studio.paired(studio.edit(SOURCE, SOURCE), WHOLE, way=way)
    assert_close(target, source)
    assert_close(source, studio.plain(SOURCE))
    assert torch.equal(studio.paired(studio.edit(), WHOLE, way=way)[0], source)


def test_conditionings_in_one_call_or_in_two_give_the_same(studio, monkeypatch):
    together = studio.paired(studio.edit(), WHOLE)
    monkeypatch.setattr("comfy.model_base.BaseModel.memory_required", lambda *_, **__: 1e30)
    for one, other in zip(studio.paired(studio.edit(), WHOLE), together, strict=True):
        assert_close(one, other)


def test_targets_with_modes_of_their_own_are_as_alone(studio):
    """Maps for one target and mutual attention for the other, of the same source and in one run."""
    maps = TauSchedule(Window(0, 0), Window(0, 1), self_resolution=1.0)
    edit = studio.edit(SOURCE, TARGET, "a cat")
    both = replace(edit, targets=(replace(edit.targets[0], tau=maps), replace(edit.targets[1], tau=WHOLE)))
    _, targets = studio.paired(both, MUTUAL)
    assert_close(targets[:1], studio.paired(studio.edit(SOURCE, TARGET), maps)[1])
    assert_close(targets[1:], studio.paired(studio.edit(SOURCE, "a cat"), WHOLE)[1])


def test_from_a_trajectory_the_target_looks_at_the_picture(studio):
    trajectory, _ = invert(studio.model, studio.encode(SOURCE), picture(), STEPS, "normal")
    source, target = (
        latent["samples"]
        for latent in sample_pairs(
            studio.model,
            studio.edit(),
            WHOLE,
            negative=studio.negative,
            latent=picture(),
            seed=0,
            steps=STEPS,
            cfg=4.0,
            sampler_name="euler",
            scheduler="normal",
            trajectory=trajectory,
        )[:2]
    )
    assert_close(source, picture()["samples"], 1e-6)
    assert difference(target, source) > EDITED


def test_the_node_has_the_mode_and_its_first_layer(studio):
    given = (0.0, 0.0, 0.25, 1.0, 0.0, 0.5, "")
    assert TauScheduler.execute(*given).args[0] == replace(MUTUAL, self_mode="map")
    assert TauScheduler.execute(*given, self_mode="mutual", mutual_layer=0.9).args[0] == replace(
        MUTUAL, mutual_layer=0.9
    )
    with pytest.raises(ValueError, match="self_mode is 'none'; expected one of map, mutual"):
        TauSchedule(self_mode="none")
    with pytest.raises(ValueError, match="mutual_layer is 2"):
        TauSchedule(mutual_layer=2.0)

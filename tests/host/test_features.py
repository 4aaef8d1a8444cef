"""Plug-and-Play: against stored features and attention, and what must hold on every run."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.samplers
import pytest
import torch
from p2p.attention.edit import Edit
from p2p.nodes import AttentionController, FeatureInjection
from p2p.sampling.controller import plug_and_play
from p2p.sampling.invert import invert
from p2p.sampling.network import layers_of
from p2p.sampling.plug_and_play import feature_layers
from p2p.tests.host.checkpoints import FAMILIES, load, network_of
from p2p.tests.host.runs import (
    EDITED,
    FULL,
    HOST_WARNINGS,
    SOURCE,
    STOCK,
    TARGET,
    Settings,
    Studio,
    assert_close,
    difference,
    empty,
    ksampler,
    picture,
)

pytestmark = HOST_WARNINGS

STEPS = 4


def injected(studio, edit, ends=(0.8, 0.5), settings=None, latent=None, way="KSampler", **given):
    """A Plug-and-Play run: (source, targets)."""
    negative = given.pop("negative", studio.negative)
    model, positive = plug_and_play(given.pop("model", studio.model), edit, *ends, **given)
    rows = studio.rows(edit, latent or empty())
    samples = STOCK[way](model, positive, negative, rows, settings or Settings(steps=STEPS))
    return studio.split(edit, samples)


class Stored:
    """What the published code keeps of a source's run, and gives to a target's: one row, one step at a time.

    Output blocks from `number` on: the features of the first one's residual block, and queries and keys of
    self-attention, for each half of guidance.
    """

    def __init__(self, model, number, sigmas, ends):
        self.model, self.number, self.sigmas, self.ends = model.clone(), number, sigmas.tolist(), ends
        self.kept, self.replay = {}, False
        for n in range(number, 12):
            self.model.set_model_attn1_replace(self.attention, "output", n)
        self.model.set_model_unet_function_wrapper(self.begin)

    def begin(self, apply, given):
        self.step = min(
            range(len(self.sigmas)), key=lambda n: abs(self.sigmas[n] - float(given["timestep"][0]))
        )
        self.halves = given["cond_or_uncond"]
        return apply(given["input"], given["timestep"], **given["c"])

    def each(self, key, values, end):
        """values: one row for each half, which are stored, or replaced by what was stored."""
        out = []
        for half, value in zip(self.halves, values, strict=True):
            place = (self.step, half, *key)
            if not self.replay:
                self.kept[place] = value.clone()
            out.append(self.kept[place] if self.replay and self.step < end * STEPS else value)
        return torch.stack(out)

    def attention(self, q, k, v, options):
        q = self.each(("q", options["block"], options["block_index"]), q, self.ends[1])
        k = self.each(("k", options["block"], options["block_index"]), k, self.ends[1])
        q, k, v = (x.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
        maps = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        return (maps @ v).transpose(1, 2).flatten(2)

    def run(self, sample):
        """The result of `sample(model)` with hooks on the residual block."""
        network = self.model.get_model_object("diffusion_model")
        residual = network.output_blocks[self.number][0].out_layers
        handle = residual.register_forward_hook(lambda _, __, out: self.each(("f",), out, self.ends[0]))
        try:
            return sample(self.model)
        finally:
            handle.remove()
            self.replay = True


def naive(model, number, sample, sigmas, texts, ends):
    """Source and target of a run of one row each: the source's is stored and given to the target's."""
    stored = Stored(model, number, sigmas, ends)
    return [stored.run(lambda model, text=text: sample(model, text)) for text in texts]


@pytest.mark.parametrize("ends", [(0.8, 0.5), (1.0, 0.0), (0.0, 1.0), (0.25, 1.0)], ids=str)
def test_a_run_equals_stored_features_and_attention(studio, ends):
    settings = Settings(steps=STEPS)
    sigmas = comfy.samplers.calculate_sigmas(studio.model.get_model_object("model_sampling"), "normal", STEPS)

    def sample(model, text):
        return ksampler(model, studio.encode(text), studio.negative, empty(), settings)

    source, target = injected(studio, studio.edit(), ends)
    expected = naive(studio.model, 1, sample, sigmas, (SOURCE, TARGET), ends)
    assert_close(source, expected[0])
    assert_close(target, expected[1])
    assert_close(source, studio.plain(SOURCE, settings))
    assert difference(target, studio.plain(TARGET, settings)) > EDITED


PUBLISHED = {"SD1.5": 4, "SD2.0": 4, "SDXL": 1, "SDXL refiner": 4, "SSD-1B": 1, "KOALA 700M": 1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_layers_are_the_published_ones_and_those_of_their_resolution(name):
    """Block 4 of SD1.x is the second of its level, which has a quarter of the latent's sides."""
    layers = layers_of(network_of(name))
    number, injected = feature_layers(layers)
    assert number == PUBLISHED[name]
    decoder = [layer for layer in layers if layer.kind == "self" and layer.block[0] == "output"]
    assert list(injected) == [layer for layer in decoder if layer.block[1] >= number]
    assert {layer.scale for layer in injected if layer.block[1] == number} == {4}
    if name == "SD1.5":
        assert [layer.block[1] for layer in injected] == [4, 5, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("name", ["SD1.5", "SDXL"])
def test_on_real_layouts_a_run_equals_stored_features_and_attention(name, tmp_path):
    studio = Studio(*load(tmp_path / "model.ckpt", FAMILIES[name]))
    sampling = studio.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", STEPS)
    settings = Settings(steps=STEPS, advanced={"last_step": 2})

    def sample(model, text):
        return ksampler(model, studio.encode(text), studio.negative, empty(), settings)

    found = injected(studio, studio.edit(), (0.25, 0.5), settings)
    expected = naive(studio.model, PUBLISHED[name], sample, sigmas, (SOURCE, TARGET), (0.25, 0.5))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, 1e-4)
    plain = ksampler(studio.model, studio.encode(TARGET), studio.negative, empty(), settings)
    assert difference(found[1], plain) > 1e-3


# What holds on every run


@pytest.mark.parametrize("way", STOCK)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m_sde"])
def test_equal_prompts_give_equal_images_and_the_source_is_a_plain_run(studio, way, sampler):
    settings = Settings(steps=STEPS, sampler=sampler)
    source, target = injected(studio, studio.edit(SOURCE, SOURCE), settings=settings, way=way)
    assert_close(target, source)
    assert_close(source, studio.plain(SOURCE, settings))
    assert torch.equal(injected(studio, studio.edit(), settings=settings, way=way)[0], source)


def test_nothing_injected_gives_plain_runs(studio):
    source, target = injected(studio, studio.edit(), (0.0, 0.0))
    assert_close(source, studio.plain(SOURCE))
    assert_close(target, studio.plain(TARGET))


def test_every_target_takes_from_its_own_source(studio):
    texts = [TARGET, "children drawing of a castle"]
    together = injected(studio, studio.edit(SOURCE, *texts), latent=empty(2))[1]
    for n, text in enumerate(texts):
        alone = injected(studio, studio.edit(SOURCE, text), latent=empty(2))[1]
        for item in range(2):
            assert_close(together[2 * item + n], alone[item])


def test_conditionings_in_one_call_or_in_two_give_the_same(studio, monkeypatch):
    together = injected(studio, studio.edit())
    monkeypatch.setattr("comfy.model_base.BaseModel.memory_required", lambda *_, **__: 1e30)
    for one, other in zip(injected(studio, studio.edit()), together, strict=True):
        assert_close(one, other)


def test_from_a_trajectory_the_source_is_the_picture(studio):
    trajectory, _ = invert(studio.model, studio.encode(SOURCE), picture(), STEPS, "normal")
    source, target = injected(studio, studio.edit(), trajectory=trajectory, latent=picture())
    assert_close(source, picture()["samples"], 1e-6)
    assert difference(target, source) > EDITED


def test_from_a_trajectory_under_the_empty_prompt_the_features_are_those_without_guidance(studio):
    """As published: inverted and denoised under the empty prompt, whatever the negative prompt is."""
    nothing, negative = studio.encode(""), studio.encode("a dog on a beach")
    trajectory, noise = invert(studio.model, nothing, picture(), STEPS, "normal", refinement=30)
    given = {"trajectory": trajectory, "latent": picture(), "negative": negative}
    source, target = injected(studio, studio.edit(), source_conditioning=nothing, **given)
    assert_close(source, picture()["samples"], 1e-6)
    settings = Settings(steps=STEPS, advanced={"disable_noise": True})

    def sample(model, text):
        return ksampler(model, studio.encode(text), negative if text else nothing, noise, settings)

    # The source's own run, both halves under the empty prompt, stays on the path; the target's follows.
    sigmas = torch.tensor(trajectory.sigmas)
    assert_close(target, naive(studio.model, 1, sample, sigmas, ("", TARGET), (0.8, 0.5))[1], 0.05)
    assert difference(injected(studio, studio.edit(), **given)[1], target) > 0.1


@pytest.mark.parametrize("ends", ["normally", "interrupted"])
def test_no_hook_outlives_a_run(studio, ends):
    network = studio.model.get_model_object("diffusion_model")

    def hooks():
        return [len(module._forward_hooks) for module in network.modules()]

    before, model = hooks(), studio.model.clone()
    seen = []

    def watch(apply, given):
        out = apply(given["input"], given["timestep"], **given["c"])
        seen.append(hooks())
        return out

    def stop(q, k, v, options):
        assert sum(hooks()) == sum(before) + 1
        raise InterruptedError

    model.set_model_unet_function_wrapper(watch)
    if ends == "interrupted":
        model.set_model_attn2_replace(stop, "output", 3)
        with pytest.raises(InterruptedError):
            injected(studio, studio.edit(), model=model)
    else:
        injected(studio, studio.edit(), model=model)
        assert seen == [before] * STEPS
    assert hooks() == before
    plain = studio.plain(SOURCE, Settings(), empty())
    assert torch.equal(plain, studio.plain(SOURCE, Settings(), empty()))


# What cannot be


def test_a_model_whose_insides_cannot_be_reached_is_an_error(studio, monkeypatch):
    """A compiled model runs its blocks without PyTorch's hooks."""
    monkeypatch.setattr(
        torch.nn.Module, "register_forward_hook", lambda self, hook: SimpleNamespace(remove=lambda: None)
    )
    with pytest.raises(ValueError, match="compiled"):
        injected(studio, studio.edit())
    injected(studio, studio.edit(), (0.0, 0.5))


def test_what_does_not_fit_together_is_refused(studio):
    edit = studio.edit()
    with pytest.raises(ValueError, match="source_conditioning is for the source of a trajectory"):
        plug_and_play(studio.model, edit, 0.8, 0.5, source_conditioning=studio.negative)
    with pytest.raises(ValueError, match="Target 1 .* re-weighted"):
        plug_and_play(studio.model, edit.reweighted("dog", 2.0), 0.8, 0.5)
    model, _ = plug_and_play(studio.model, edit, 0.8, 0.5)
    with pytest.raises(ValueError, match="already"):
        AttentionController.execute(model, edit, FULL)
    with pytest.raises(ValueError, match="positive conditioning does not"):
        ksampler(model, studio.encode(SOURCE), studio.negative, studio.rows(edit, empty()), Settings())


def test_the_node_gives_model_and_positive(studio):
    edit: Edit = studio.edit()
    model, positive, _ = FeatureInjection.execute(studio.model, edit, 0.8, 0.5).args
    rows = studio.rows(edit, empty())
    found = ksampler(model, positive, studio.negative, rows, Settings(steps=STEPS))
    for one, other in zip(studio.split(edit, found), injected(studio, edit), strict=True):
        assert torch.equal(one, other)

"""Other nodes' patches on the same model, before or after the controller: they still do what they do."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from p2p.sampling.controller import control
from p2p.tests.host.runs import (
    EMPTY,
    FULL,
    PART,
    SOURCE,
    TARGET,
    Settings,
    assert_close,
    difference,
    empty,
    ksampler,
)

BLOCKS = [("input", 1), ("input", 3), ("middle", 0), ("output", 0), ("output", 2)]
"""Some of the U-Net's transformer blocks; not all, so that patched and unpatched ones meet."""


class ImagePrompt:
    """An attn2 replacer as IP-Adapter's: the text's attention, plus attention to an image's tokens."""

    def __init__(self, scale=0.7):
        self.scale, self.batches = scale, []

    def __deepcopy__(self, memo):
        return self  # some hosts copy what is attached to a model

    def __call__(self, q, k, v, extra_options):
        self.batches.append((q.shape[0], len(extra_options["cond_or_uncond"])))
        heads = extra_options["n_heads"]
        text = host_attention.optimized_attention(q, k, v, heads, transformer_options=extra_options)
        generator = torch.Generator().manual_seed(q.shape[-1])
        image_k, image_v = (torch.randn(1, 4, q.shape[-1], generator=generator).to(q) for _ in range(2))
        rows = q.shape[0] // len(extra_options["cond_or_uncond"])
        wanted = [1.0 - index for index in extra_options["cond_or_uncond"] for _ in range(rows)]  # cond only
        image = host_attention.optimized_attention(
            q, image_k.expand(q.shape[0], -1, -1), image_v.expand(q.shape[0], -1, -1), heads
        )
        return text + self.scale * torch.tensor(wanted).to(q)[:, None, None] * image

    def on(self, model, with_depth=False):
        model = model.clone()
        for name, number in BLOCKS:
            model.set_model_attn2_replace(self, name, number, 0 if with_depth else None)
        return model


class Additive:
    """An attn1 and attn2 patch that shifts keys and values, as hypernetworks do."""

    def __call__(self, q, k, v, extra_options):
        return q, k * 1.1, v + 0.05

    def on(self, model):
        model = model.clone()
        model.set_model_attn1_patch(self)
        model.set_model_attn2_patch(self)
        return model


class Appended:
    """An attn2 patch that appends tokens of its own to the text's, as some style nodes do."""

    def __call__(self, q, k, v, extra_options):
        generator = torch.Generator().manual_seed(3)
        extra = torch.randn(1, 4, k.shape[-1], generator=generator).to(k).expand(k.shape[0], -1, -1)
        return q, torch.cat([k, extra], 1), torch.cat([v, extra], 1)

    def on(self, model):
        model = model.clone()
        model.set_model_attn2_patch(self)
        return model


class OutputPatch:
    """Patches on attention's output and on the blocks' features, as FreeU's."""

    def on(self, model):
        model = model.clone()
        model.set_model_attn2_output_patch(lambda n, extra_options: n * 0.9)
        model.set_model_output_block_patch(lambda h, hsp, options: (h * 1.05, hsp))
        return model


PATCHES = {
    "image prompt": lambda model: ImagePrompt().on(model),
    "image prompt, by depth": lambda model: ImagePrompt().on(model, with_depth=True),
    "keys and values": lambda model: Additive().on(model),
    "appended tokens": lambda model: Appended().on(model),
    "outputs": lambda model: OutputPatch().on(model),
}
patches = pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES.keys())


SETTINGS = Settings()


def run(studio, edit, tau, patch, order, settings=SETTINGS):
    model = patch(studio.model) if order == "before" else studio.model
    controlled, positive = control(model, edit, tau)
    controlled = patch(controlled) if order == "after" else controlled
    samples = ksampler(controlled, positive, studio.negative, studio.rows(edit, empty()), settings)
    return studio.split(edit, samples)


@patches
@pytest.mark.parametrize("order", ["before", "after"])
def test_law_1_beside_other_patches(studio, patch, order):
    source, target = run(studio, studio.edit(SOURCE, SOURCE), PART, patch, order)
    assert_close(target, source)


@patches
@pytest.mark.parametrize("order", ["before", "after"])
def test_law_2_beside_other_patches(studio, patch, order):
    source, target = run(studio, studio.edit(), EMPTY, patch, order)
    for found, text in ((source, SOURCE), (target, TARGET)):
        plain = studio.plain(text, Settings(), empty(), patch(studio.model))
        assert_close(found, plain)
        assert difference(plain, studio.plain(text)) > 1e-3  # the patch does something


@patches
def test_law_3_beside_other_patches(studio, patch):
    source, target = run(studio, studio.edit(), EMPTY, patch, "before")
    again, edited = run(studio, studio.edit(), FULL, patch, "before")
    assert torch.equal(source, again)
    assert difference(edited, target) > 1e-3


@patches
def test_the_order_of_nodes_does_not_matter(studio, patch):
    before = run(studio, studio.edit(), PART, patch, "before")
    after = run(studio, studio.edit(), PART, patch, "after")
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("tau", [EMPTY, PART, FULL], ids=["empty", "part", "full"])
def test_what_sits_in_the_slot_is_called_once_per_block_and_model_call_with_the_whole_batch(studio, tau):
    replacer = ImagePrompt()
    run(studio, studio.edit(), tau, replacer.on, "before", Settings(steps=3))
    assert replacer.batches == [(4, 2)] * len(BLOCKS) * 3


def test_an_override_of_attention_sees_every_attention_call(studio):
    """Overrides travel in transformer_options; rewritten calls pass through them as all others."""

    def counted(tau):
        calls = []

        def override(function, *args, **kwargs):
            calls.append(args[0].shape[0])
            return function(*args, **kwargs)

        def patch(model):
            model = model.clone()
            model.model_options["transformer_options"]["optimized_attention_override"] = override
            return model

        samples = run(studio, studio.edit(), tau, patch, "after")
        return calls, samples

    plain_calls, _ = counted(EMPTY)
    for tau in (FULL, PART):
        calls, samples = counted(tau)
        assert calls.count(4) == plain_calls.count(4) == len(plain_calls)  # whole batches: as without an edit
        assert set(calls) <= {4, 1}  # and the targets' own rows where both maps are needed
        expected = run(studio, studio.edit(), tau, lambda model: model, "after")
        assert all(torch.equal(a, b) for a, b in zip(samples, expected, strict=True))


def test_an_override_decides_what_attention_is(studio):
    def patch(model):
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = (
            lambda function, q, k, v, heads, *args, **kwargs: function(q * 0.5, k, v, heads, *args, **kwargs)
        )
        return model

    source, target = run(studio, studio.edit(SOURCE, SOURCE), FULL, patch, "before")
    assert_close(target, source)
    assert_close(source, studio.plain(SOURCE, Settings(), empty(), patch(studio.model)))
    assert difference(source, studio.plain(SOURCE)) > 1e-3


def test_every_kernel_of_the_host_gives_the_same_edit(studio, monkeypatch):
    expected = run(studio, studio.edit(), PART, lambda model: model, "before")
    for kernel in ("attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"):
        monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, kernel))
        found = run(studio, studio.edit(), PART, lambda model: model, "before")
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)

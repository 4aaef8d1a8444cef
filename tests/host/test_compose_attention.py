"""Other nodes' attention beside an edit: which calls reach it, and what is refused."""

from __future__ import annotations

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AttentionController
from p2p.sampling.attentions import grid_fraction
from p2p.tests.host.beside import Neighbour as Node
from p2p.tests.host.beside import paired, refused, stock, works
from p2p.tests.host.beside.models import ImagePrompt, with_context_windows, with_patches
from p2p.tests.host.runs import (
    EMPTY,
    FULL,
    PART,
    Settings,
    assert_close,
    empty,
    ksampler,
)

NOTHING = Node("Runs", "nothing")


def beside(change, **fields):
    return Node("Attention and features", "this test's", model=with_patches(change), **fields)


@pytest.mark.parametrize("tau", [EMPTY, PART, FULL], ids=["empty", "part", "full"])
def test_what_sits_in_the_slot_is_called_once_per_block_and_model_call_with_the_whole_batch(studio, tau):
    replacer = ImagePrompt()
    paired(studio, beside(replacer.on), studio.edit(), tau, "before")
    assert replacer.batches == [(4, 2)] * len(replacer.BLOCKS) * 3


def test_an_override_of_attention_sees_every_attention_call(studio):
    """Overrides travel in transformer_options; rewritten calls pass through them as all others."""

    def counted(tau):
        calls = []

        def override(function, *args, **kwargs):
            calls.append(args[0].shape[0])
            return function(*args, **kwargs)

        def patch(model):
            model.model_options["transformer_options"]["optimized_attention_override"] = override

        samples = paired(studio, beside(patch), studio.edit(), tau, "after")
        return calls, samples

    plain_calls, _ = counted(EMPTY)
    for tau in (FULL, PART):
        calls, samples = counted(tau)
        assert calls.count(4) == plain_calls.count(4) == len(plain_calls)  # whole batches: as without an edit
        assert set(calls) <= {4, 1}  # and the targets' own rows where both maps are needed
        expected = paired(studio, NOTHING, studio.edit(), tau, "before")
        assert all(torch.equal(a, b) for a, b in zip(samples, expected, strict=True))


@works(
    "Attention and features",
    "SDPA, split, sub-quadratic and basic attention",
    holds=("same prompt", "tau empty", "source"),
    note="The same edit with every one; xformers, flash and sage stand in the same place.",
)
@pytest.mark.parametrize(
    "kernel", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"]
)
def test_every_kernel_of_the_host_gives_the_same_edit(studio, monkeypatch, kernel):
    expected = paired(studio, NOTHING, studio.edit(), PART, "before")
    monkeypatch.setattr(host_attention, "optimized_attention", getattr(host_attention, kernel))
    for one, other in zip(paired(studio, NOTHING, studio.edit(), PART, "before"), expected, strict=True):
        assert_close(one, other)


@refused(
    "Attention and features",
    "TomePatchModel and self_resolution above 0.5",
    note="Keep `self_resolution` at 0.5, where layers with merged pixels are left alone.",
)
@pytest.mark.parametrize("ratio", [0.3, 0.9])
def test_merged_pixels_in_an_injected_layer_are_refused(studio, ratio):
    node = Node(
        "Attention and features",
        "ToMe",
        model=lambda studio, model: stock(
            "comfy_extras.nodes_tomesd", "TomePatchModel", model=model, ratio=ratio
        ),
    )
    with pytest.raises(ValueError, match=r"merges pixels.*self_resolution"):
        paired(studio, node, studio.edit(), FULL, "after")


def tiles_in_one_call(model):
    """Left and right half of the picture as rows of one model call, as tiled diffusion does."""

    def wrapper(apply, given):
        halves = torch.cat(given["input"].chunk(2, dim=-1))
        conds = {
            name: torch.cat([value, value]) if torch.is_tensor(value) else value
            for name, value in given["c"].items()
        }
        return torch.cat(apply(halves, given["timestep"].repeat(2), **conds).chunk(2), dim=-1)

    model.set_model_unet_function_wrapper(wrapper)


@refused(
    "Attention and features",
    "Several tiles in one model call",
    origin="stand-in for TiledDiffusion with a larger tile batch",
    note="Set its tile batch size to 1.",
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_model_call_with_other_rows_than_the_batchs_is_refused(studio, order):
    with pytest.raises(ValueError, match="8 rows where 2 conditionings of 2 latents"):
        paired(studio, beside(tiles_in_one_call, size=(1, 8, 16)), studio.edit(), PART, order)


@refused(
    "Runs",
    "ContextWindowsManual",
    note="It is for videos: it computes a batch in overlapping parts.",
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_context_windows_are_refused_before_sampling(studio, order):
    with pytest.raises(ValueError, match="Context Windows"):
        paired(studio, beside(with_context_windows(3)), studio.edit(), PART, order)


# The grid of a layer is the one that it has, not the one that the latent's size suggests


@pytest.mark.parametrize(
    ("latent", "factor", "fraction"),
    [((64, 64), 2, 0.5), ((13, 9), 2, 0.5), ((13, 9), 4, 0.25), ((97, 33), 8, 0.125), ((1, 5), 1, 1.0)],
    ids=str,
)
def test_sides_that_were_halved_rounding_up_are_their_power_of_two(latent, factor, fraction):
    assert grid_fraction([-(-side // factor) for side in latent], latent) == fraction


@pytest.mark.parametrize(
    ("grid", "fraction"), [((11, 11), 11 / 16), ((10, 16), 1.0), ((12, 6), 0.75)], ids=str
)
def test_resized_grids_have_the_fraction_that_they_have(grid, fraction):
    assert grid_fraction(grid, (16, 16)) == fraction


@pytest.mark.parametrize(("factor", "injected"), [(2.0, True), (1.5, False)], ids=str)
def test_layers_that_deep_shrink_shrinks_to_half_are_within_a_cap_of_a_half(studio, factor, injected):
    """The second last output block then has a grid of 8 x 8 or 11 x 11 for a latent of 16 x 16."""
    edit, queries = studio.edit(), []

    def look(q, k, v, extra_options):
        queries.append(q)
        return host_attention.optimized_attention(q, k, v, extra_options["n_heads"])

    model = stock(
        "comfy_extras.nodes_model_downscale",
        "PatchModelAddDownscale",
        model=studio.model,
        block_number=1,
        downscale_factor=factor,
        start_percent=0.0,
        end_percent=1.0,
        downscale_after_skip=False,
        downscale_method="bicubic",
        upscale_method="bicubic",
    )
    model.set_model_attn1_replace(look, "output", 2)
    tau = TauSchedule(Window(0, 0), Window(0, 1), self_resolution=0.5)
    controlled, positive = AttentionController.execute(model, edit, tau).args[:2]
    rows = studio.rows(edit, empty(1, 16, 16))
    ksampler(controlled, positive, studio.negative, rows, Settings(steps=2))
    source, target = queries[-1][-2:]  # the positive's rows
    assert torch.equal(source, target) == injected

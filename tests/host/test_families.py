"""The laws on the real block layouts of the model families, at small widths with random weights."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from p2p.attention.schedule import TauSchedule, Window
from p2p.sampling.controller import cross_attention_blocks
from p2p.sampling.encode import start_edit
from p2p.sampling.sampler import sample_pairs
from p2p.tests.host.runs import assert_close, difference

import nodes

COMMON = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_linear_in_transformer": True,
}
FOUR_LEVELS = {"num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4]}
THREE_LEVELS = {"num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4]}
SD = FOUR_LEVELS | {
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "adm_in_channels": None,
}
POOLED = {"adm_in_channels": 2816, "num_classes": "sequential", "context_dim": 2048}
HEADS = {"num_heads": 8, "num_head_channels": -1, "model_channels": 32, "use_linear_in_transformer": False}
FAMILIES = {
    "SD15": SD | HEADS | {"context_dim": 768},
    "SD20": SD | {"context_dim": 1024},
    "SDXL": THREE_LEVELS
    | POOLED
    | {
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
    },
    "SDXLRefiner": FOUR_LEVELS
    | POOLED
    | {
        "transformer_depth": [0, 0, 4, 4, 4, 4, 0, 0],
        "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        "transformer_depth_middle": 4,
        "context_dim": 1280,
        "adm_in_channels": 2560,
    },
    "SSD1B": THREE_LEVELS
    | POOLED
    | {
        "transformer_depth": [0, 0, 2, 2, 4, 4],
        "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4],
        "transformer_depth_middle": -1,
    },
}
TOLERANCE = 1e-4
NOTHING = TauSchedule(Window(0.0, 0.0), Window(0.0, 0.0))
EVERYTHING = TauSchedule(Window(0.0, 1.0), Window(0.0, 1.0), self_resolution=1.0)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(MODEL, width of its text conditioning)."""
    layout = COMMON | FAMILIES[request.param]
    config = getattr(comfy.supported_models, request.param)(layout)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        if parameter.ndim > 1:
            scale = 0.6 * parameter[0].numel() ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        else:
            parameter.data = torch.ones_like(parameter)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, cpu, cpu), layout["context_dim"]


def encode(width, seed):
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, 1280, generator=generator)
    return [[torch.randn(1, 77, width, generator=generator), {"pooled_output": pooled}]]


def pair(clip, width, target):
    edit = start_edit(clip, "a cat on a beach", target, "auto")
    conditioning = encode(width, 1 if target == edit.source.text else 2)
    targets = (replace(edit.targets[0], conditioning=conditioning),)
    return replace(edit, source=replace(edit.source, conditioning=encode(width, 1)), targets=targets)


def paired(family, edit, tau):
    model, width = family
    latent = {"samples": torch.zeros(1, 4, 16, 24)}
    sources, targets = sample_pairs(
        model, edit, tau, encode(width, 3), latent, 1, 2, 5.0, "euler", "normal", 1.0
    )
    return sources["samples"], targets["samples"]


def plain(family, conditioning):
    model, width = family
    latent = {"samples": torch.zeros(1, 4, 16, 24)}
    return nodes.common_ksampler(model, 1, 2, 5.0, "euler", "normal", conditioning, encode(width, 3), latent)[
        0
    ]["samples"]


def test_every_cross_attention_of_the_model_is_found(family):
    network = family[0].get_model_object("diffusion_model")
    layers = [name for name, _ in network.named_modules() if name.endswith(".attn2")]
    assert len(cross_attention_blocks(network)) == len(layers) > 0


def test_law_1_equal_prompts_give_equal_images(family, demo_model):
    source, target = paired(family, pair(demo_model[1], family[1], "a cat on a beach"), EVERYTHING)
    assert_close(target, source, TOLERANCE)


def test_laws_2_and_3_branches_are_plain_runs_and_the_source_stays_one(family, demo_model):
    edit = pair(demo_model[1], family[1], "a watercolor of a dog on a beach")
    source, target = paired(family, edit, NOTHING)
    assert_close(source, plain(family, edit.source.conditioning), TOLERANCE)
    assert_close(target, plain(family, edit.targets[0].conditioning), TOLERANCE)
    edited_source, edited_target = paired(family, edit, EVERYTHING)
    assert torch.equal(edited_source, source)
    assert difference(edited_target, target) > 10 * TOLERANCE

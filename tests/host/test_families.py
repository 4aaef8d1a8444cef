"""The laws on every model family, loaded by ComfyUI from checkpoint files with the family's block layout."""

from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.supported_models
import pytest
import torch
from comfy_extras.nodes_ip2p import InstructPixToPixConditioning
from p2p.nodes import AttentionController
from p2p.sampling.network import layers_of, of_kind
from p2p.tests.conftest import ROOT
from p2p.tests.host.checkpoints import COMMON, FAMILIES, SDXL_VARIANT, load
from p2p.tests.host.runs import EMPTY, FULL, Settings, Studio, assert_close, difference, ksampler

import nodes as host_nodes

SOURCE = "a cat on a beach"
TARGETS = [SOURCE, "a watercolor of a red dog on a beach, (snow:1.3)"]
SETTINGS = Settings(steps=2)
TOLERANCE = 1e-4
CONCATENATED = [name for name, family in FAMILIES.items() if family.channels > 4]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: Any) -> tuple[Any, Studio]:
    """What the checkpoint should be taken for, and a studio with the host's MODEL and CLIP."""
    expected = FAMILIES[request.param]
    path = tmp_path_factory.mktemp("checkpoints") / "model.ckpt"
    with torch.inference_mode():
        return expected, Studio(*load(path, expected))


@pytest.fixture(scope="module")
def empty_tau(family):
    """A paired run in which nothing is injected: (source, targets)."""
    with torch.inference_mode():
        studio = family[1]
        return studio.paired(studio.edit(SOURCE, *TARGETS), EMPTY, SETTINGS)


def test_the_host_takes_the_checkpoint_for_its_family(family):
    expected, studio = family
    model = studio.model.model
    assert type(model.model_config).__name__ == expected.config
    assert type(model).__name__ == expected.model
    assert model.model_type.name == expected.prediction
    assert model.model_config.unet_config["in_channels"] == expected.channels


def test_every_cross_attention_of_the_model_is_found(family):
    network = family[1].model.get_model_object("diffusion_model")
    layers = [name for name, _ in network.named_modules() if name.endswith(".attn2")]
    found = layers_of(network)
    assert len(of_kind(found, "cross")) == len(of_kind(found, "self")) == len(layers) > 0


def test_law_2_with_tau_empty_all_branches_are_plain_runs(family, empty_tau):
    """Each with its own prompt, pooled output and size embedding."""
    _, studio = family
    source, targets = empty_tau
    for row, text in zip((source, *targets.split(1)), (SOURCE, *TARGETS), strict=True):
        plain = studio.plain(text, SETTINGS)
        assert_close(row, plain, max(TOLERANCE, 2 * rounding(studio, text, plain)))


def rounding(studio, text, plain):
    """How far a row of a plain batch of as many rows is from the plain run of its prompt, in the host itself.

    Some processors round a product of matrices otherwise for more rows, and zero-terminal-SNR models make
    much of it.
    """
    rows = {"samples": torch.zeros(1 + len(TARGETS), 4, 8, 8), "batch_index": [0] * (1 + len(TARGETS))}
    batch = ksampler(studio.model, studio.encode(text), studio.negative, rows, SETTINGS)
    return difference(batch[:1], plain)


def test_laws_1_and_3_equal_prompts_give_equal_images_and_the_source_never_changes(family, empty_tau):
    _, studio = family
    source, (same, edited) = studio.paired(studio.edit(SOURCE, *TARGETS), FULL, SETTINGS)
    assert torch.equal(source, empty_tau[0])
    assert_close(same[None], source, TOLERANCE)
    assert difference(edited[None], empty_tau[1][1:]) > 10 * TOLERANCE
    assert difference(edited[None], source) > 10 * TOLERANCE


# Models that see an image beside the latent


def images(count=2):
    return torch.rand(count, 64, 64, 3, generator=torch.Generator().manual_seed(3))


def masks(count=2):
    mask = torch.zeros(count, 64, 64)
    for n in range(count):
        mask[n, :, 16 * n : 16 * n + 24] = 1.0
    return mask


def with_images(expected, positive, negative, vae, pixels, mask):
    """The stock node for the family's kind of image: (positive, negative, LATENT)."""
    if expected.channels == 8:
        return InstructPixToPixConditioning.execute(positive, negative, pixels, vae).args
    return host_nodes.InpaintModelConditioning().encode(positive, negative, pixels, vae, mask, True)


@pytest.mark.parametrize("family", CONCATENATED, indirect=True)
def test_law_6_every_pair_of_a_batch_sees_its_own_image(family, demo_model):
    """The host gives image i to row i; the rows of a paired batch are several to an image.

    The Paired Sampler makes its own positive, which sees what the negative does.
    """
    expected, studio = family
    vae, settings = demo_model[2], Settings(steps=1)
    edit = studio.edit(SOURCE, TARGETS[1])

    def pairs(tau):
        controlled, positive = AttentionController.execute(studio.model, edit, tau).args[:2]
        *conditionings, latent = with_images(expected, positive, studio.negative, vae, images(), masks())
        return studio.split(edit, ksampler(controlled, *conditionings, studio.rows(edit, latent), settings))

    sources, targets = pairs(EMPTY)
    for n in range(2):
        for found, text in ((sources[n], SOURCE), (targets[n], TARGETS[1])):
            *conditionings, latent = with_images(
                expected, studio.encode(text), studio.negative, vae, images()[n : n + 1], masks()[n : n + 1]
            )
            plain = ksampler(studio.model, *conditionings, {**latent, "batch_index": [n]}, settings)
            assert_close(found[None], plain, TOLERANCE)
    again, edited = pairs(FULL)
    assert torch.equal(again, sources)
    assert difference(edited, targets) > 10 * TOLERANCE

    _, negative, latent = with_images(expected, studio.negative, studio.negative, vae, images(), masks())
    found = studio.paired(edit, FULL, settings, latent, "P2PSampler", negative=negative)
    assert_close(found[0], sources, TOLERANCE)
    assert_close(found[1], edited, TOLERANCE)


# Models without attention to text that the pack can reach


UNSUPPORTED = {
    "StageC": (
        "Stable_Cascade_C",
        {
            "stable_cascade_stage": "c",
            "c_cond": 64,
            "c_hidden": [64, 64],
            "nhead": [2, 2],
            "blocks": [[1, 1], [1, 1]],
        },
    ),
    "UNetModel": (
        "SVD_img2vid",
        {
            **COMMON,
            "in_channels": 8,
            "model_channels": 64,
            "num_res_blocks": [1],
            "channel_mult": [1],
            "transformer_depth": [1],
            "transformer_depth_output": [1, 1],
            "transformer_depth_middle": 1,
            "context_dim": 64,
            "adm_in_channels": 768,
            "num_classes": "sequential",
            "use_linear_in_transformer": True,
            "use_temporal_attention": True,
            "use_temporal_resblock": True,
            "extra_ff_mix_layer": True,
            "use_spatial_context": True,
            "merge_strategy": "learned_with_images",
            "video_kernel_size": [3, 1, 1],
        },
    ),
}


@pytest.mark.parametrize(("config", "layout"), UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_any_other_model_is_an_error_that_names_its_class_before_sampling(studio, config, layout):
    made = getattr(comfy.supported_models, config)(layout)
    made.set_inference_dtype(torch.float32, None)
    network = made.get_model({}, "", device=torch.device("cpu"))
    cpu = torch.device("cpu")
    model = comfy.model_patcher.ModelPatcher(network, cpu, cpu)
    name = type(network.diffusion_model).__name__
    with pytest.raises(ValueError, match=f"class {name} is not supported.*SD1.x, SD2.x, SDXL"):
        AttentionController.execute(model, studio.edit(), EMPTY)
    with pytest.raises(ValueError, match=f"class {name} is not supported"):
        studio.paired(studio.edit(), EMPTY, way="P2PSampler", model=model)


def test_the_page_of_models_lists_every_family_that_is_tested():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    section = page.partition("\n## U-Nets")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert [row[0].split(" (")[0] for row in rows] == list(FAMILIES)
    for row, family in zip(rows, FAMILIES.values(), strict=True):
        assert row[1].split(",")[0].upper() == {"V_PREDICTION": "V"}.get(family.prediction, family.prediction)
        assert ("first half" in row[3]) == (family.unet is SDXL_VARIANT)
        assert (f"{family.channels} input channels" in row[3]) == (family.channels > 4)

"""What holds beside other nodes on transformers: each law for each of them, on each of its families."""

from __future__ import annotations

import functools
from dataclasses import replace

import comfy.ldm.modules.attention as host_attention
import pytest
import torch
from p2p.attention.schedule import TauSchedule, Window
from p2p.nodes import AttentionController
from p2p.tests.host.beside import (
    OF_TRANSFORMERS,
    TRANSFORMERS,
    Beside,
    Neighbour,
    by_paired_sampler,
    equal_prompts_give_equal_images,
    paired,
    refused,
    stock,
    tau_empty_gives_plain_runs,
    the_source_never_changes,
    without,
    works,
)
from p2p.tests.host.beside.models import with_context_windows, with_patches
from p2p.tests.host.beside.transformers import AS_LONG, SIMPLE, Tiny, control_net, controlled, styled
from p2p.tests.host.runs import (
    EMPTY,
    FULL,
    HOST_WARNINGS,
    PART,
    SOURCE,
    TARGET,
    assert_close,
    difference,
    ksampler,
)
from p2p.tests.host.transformers import KNOWN

pytestmark = HOST_WARNINGS
NOTHING = Neighbour(TRANSFORMERS, "nothing", settings=SIMPLE)
several = pytest.mark.parametrize("family", ["Flux", "SD3", "Qwen-Image"])

DIFFERENT = 1e-3
"""What differs by more than this fraction of the largest value was changed."""


@pytest.fixture(scope="module")
def beside_of():
    """The runs of each family."""
    made = functools.cache(lambda family: Beside(Tiny(family)))
    yield made
    made.cache_clear()


@pytest.fixture
def beside(beside_of, family):
    return beside_of(family)


def beside_each(law: str | None = None) -> pytest.MarkDecorator:
    """Every neighbour that a law is said to hold with, on each of its families."""
    cases = [
        pytest.param(family, neighbour, id=f"{name}, {family}")
        for name, neighbour in OF_TRANSFORMERS.items()
        if law is None or law in neighbour.entry.holds
        for family in neighbour.families
        if family in KNOWN
    ]
    return pytest.mark.parametrize(("family", "neighbour"), cases)


@beside_each("same prompt")
def test_law_1_equal_prompts_give_equal_images(beside, neighbour: Neighbour):
    equal_prompts_give_equal_images(beside, neighbour)


@beside_each("tau empty")
def test_law_2_tau_empty_gives_plain_runs(beside, neighbour: Neighbour):
    tau_empty_gives_plain_runs(beside, neighbour)


@beside_each("source")
def test_law_3_the_source_never_changes(beside, neighbour: Neighbour):
    the_source_never_changes(beside, neighbour)


@beside_each()
def test_the_edit_still_acts(beside, neighbour: Neighbour):
    _, target = beside.paired(neighbour, (neighbour.target,), EMPTY)
    _, edited = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert difference(edited, target) > DIFFERENT


@beside_each("acts")
def test_the_other_node_still_acts(beside, neighbour: Neighbour):
    found, expected = beside.plain(neighbour, SOURCE), without(beside.studio, neighbour, SOURCE)
    assert difference(found, expected) > DIFFERENT


@beside_each("order")
def test_the_order_of_nodes_does_not_matter(beside, neighbour: Neighbour):
    before, after = (
        beside.paired(neighbour, (neighbour.target,), neighbour.tau, order) for order in ("before", "after")
    )
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@beside_each("Paired Sampler")
def test_the_paired_sampler_gives_the_same_pair(beside, neighbour: Neighbour):
    edit = beside.studio.edit(SOURCE, neighbour.target)
    found = by_paired_sampler(beside.studio, neighbour, edit, neighbour.tau)
    expected = beside.paired(neighbour, (neighbour.target,), neighbour.tau)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def beside_this(change, **fields):
    """A node that clones the model and changes the clone."""
    return replace(NOTHING, model=with_patches(change), **fields)


@works(
    TRANSFORMERS,
    "TorchCompileModel",
    origin="ComfyUI, on Flux",
    holds=("same prompt", "tau empty", "source", "order"),
    note="The edited run is the uncompiled one's. Tested with the backend `eager`, which traces and runs the "
    "model without generating code. A change of tau inside the run is traced anew.",
)
@pytest.mark.parametrize("family", ["Flux"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_gives_the_same_pair(beside, order):
    def compiled(_studio, model):
        return stock("comfy_extras.nodes_torch_compile", "TorchCompileModel", model=model, backend="eager")

    edit = beside.studio.edit(SOURCE, TARGET)
    expected = paired(beside.studio, NOTHING, edit, FULL, order)
    found = paired(beside.studio, replace(NOTHING, model=compiled), edit, FULL, order)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@works(
    TRANSFORMERS,
    "SDPA, split, sub-quadratic and basic attention",
    origin="ComfyUI, on Flux, SD3, Qwen-Image",
    holds=("same prompt", "tau empty", "source"),
    note="The same edit with every one; xformers, flash and sage stand in the same place.",
)
@several
@pytest.mark.parametrize(
    "kernel", ["attention_basic", "attention_split", "attention_sub_quad", "attention_pytorch"]
)
def test_every_kernel_of_the_host_gives_the_same_edit(beside, kernel):
    attention = getattr(host_attention, kernel).__wrapped__

    def other_kernel(model):
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda function, *args, **more: attention(*args, **more)

    edit = beside.studio.edit(SOURCE, TARGET)
    expected = paired(beside.studio, NOTHING, edit, PART, "before")
    found = paired(beside.studio, beside_this(other_kernel), edit, PART, "after")
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@refused(
    TRANSFORMERS, "Context Windows", note="They are for videos: a batch is computed in overlapping parts."
)
@pytest.mark.parametrize("family", ["Wan 2.1"])
def test_context_windows_are_refused_before_sampling(beside):
    with pytest.raises(ValueError, match="Context Windows"):
        edit = beside.studio.edit(SOURCE, TARGET)
        paired(beside.studio, beside_this(with_context_windows(2)), edit, PART, "before")


@refused(
    TRANSFORMERS,
    "ControlNet with several images, prompts of unequal length",
    note="Give it one image, or write prompts of as many tokens.",
)
@pytest.mark.parametrize("family", ["Qwen-Image"])
def test_a_control_net_of_several_images_wants_prompts_of_one_length(beside):
    node = replace(NOTHING, **controlled(control_net, count=2), size=(2, 8, 8))
    with pytest.raises(ValueError, match="have 7 and 8 tokens; a ControlNet with several images needs"):
        paired(beside.studio, node, beside.studio.edit(SOURCE, TARGET), PART, "before")


@refused(
    TRANSFORMERS,
    "StyleModelApply (Redux) with attn_bias, prompts of unequal length",
    note="Its mask is made for one length of text. Use `multiply`, or write prompts of as many tokens.",
)
@pytest.mark.parametrize("family", ["Flux"])
def test_a_mask_over_text_and_image_wants_prompts_of_one_length(beside):
    node = replace(NOTHING, positive=styled(0.3, "attn_bias"))
    with pytest.raises(ValueError, match="encoded into different shapes of attention_mask"):
        paired(beside.studio, node, beside.studio.edit(SOURCE, TARGET), PART, "before")


@pytest.mark.parametrize("family", ["Flux", "Qwen-Image"])
def test_a_reference_image_of_each_branch_is_its_own(beside):
    """What one entry of the positive output is given belongs to that branch alone."""
    studio = beside.studio

    def with_image(conditioning, seed):
        noise = torch.randn(studio.empty()["samples"].shape, generator=torch.Generator().manual_seed(seed))
        return stock(
            "comfy_extras.nodes_edit_model",
            "ReferenceLatent",
            conditioning=conditioning,
            latent={"samples": noise},
        )

    edit = studio.edit(SOURCE, TARGET)

    def run(tau):
        model, positive = AttentionController.execute(studio.model, edit, tau).args[:2]
        own = [entry for n, entry in enumerate(positive) for entry in with_image([entry], n)]
        return ksampler(model, own, studio.negative, studio.rows(edit, studio.empty()), SIMPLE)

    rows = run(EMPTY)
    for branch, text in enumerate((SOURCE, TARGET)):
        positive = with_image(studio.encode(text), branch)
        expected = ksampler(studio.model, positive, studio.negative, studio.empty(), SIMPLE)
        assert_close(rows[branch : branch + 1], expected)
    edited = run(PART)
    assert torch.equal(edited[0], rows[0]) and difference(edited[1], rows[1]) > DIFFERENT


@pytest.mark.parametrize("family", ["Flux", "SD3"])
@pytest.mark.parametrize("kind", ["cross", "self_"])
def test_a_window_of_a_fifth_of_four_steps_is_one_step(beside, kind):
    def target(end):
        tau = replace(TauSchedule(Window(0, 0), Window(0, 0)), **{kind: Window(0, end)})
        node = replace(NOTHING, name="four steps", settings=replace(SIMPLE, steps=4))
        return beside.paired(node, (AS_LONG,), tau)[1]

    one = target(0.2)
    assert torch.equal(one, target(0.25)) and torch.equal(one, target(0.01))
    assert difference(one, target(0.0)) > DIFFERENT
    assert difference(one, target(0.26)) > DIFFERENT

"""Runs under other conditions, graphs of several samplers, and graphs that cannot work."""

from __future__ import annotations

import comfy.model_management
import comfy_extras.nodes_post_processing
import pytest
import torch
from p2p.nodes import AttentionController
from p2p.sampling.conditioning import lay_out, seeing_images_of
from p2p.tests.host.beside import (
    NEIGHBOURS,
    graphs,
    models,
    paired,
    plain,
    refused,
    stock,
    stock_outputs,
    works,
)
from p2p.tests.host.runs import (
    EMPTY,
    FULL,
    PART,
    SOURCE,
    TARGET,
    Settings,
    Studio,
    assert_close,
    difference,
    empty,
    ksampler,
    paired_sampler,
    picture,
    sampler_custom_advanced,
)

assert comfy_extras.nodes_post_processing  # before nodes_latent; on some hosts they import each other
SHORT = Settings(steps=3)
ALL_LAWS = ("same prompt", "tau empty", "source")


# Runs


@works(
    "Runs",
    "TorchCompileModel",
    holds=("same prompt", "tau empty", "source", "order"),
    note="The edited run is the uncompiled one's. Tested with the backend `eager`, which traces and runs the "
    "model without generating code. A change of tau inside the run is traced anew.",
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_gives_the_same_pair(studio, order):
    def compiled(model):
        return stock("comfy_extras.nodes_torch_compile", "TorchCompileModel", model=model, backend="eager")

    edit, tau = studio.edit(), FULL
    model = compiled(studio.model) if order == "before" else studio.model
    controlled, positive = AttentionController.execute(model, edit, tau).args[:2]
    controlled = compiled(controlled) if order == "after" else controlled
    samples = ksampler(controlled, positive, studio.negative, studio.rows(edit, empty()), Settings(steps=2))
    expected = studio.paired(edit, tau, Settings(steps=2))
    for found, one in zip(studio.split(edit, samples), expected, strict=True):
        assert_close(found, one)


def in_low_memory(monkeypatch, model):
    """Weights move only when they are used, and a call holds one conditioning; what each call saw."""
    load = comfy.model_management.LoadedModel.model_load
    monkeypatch.setattr(
        comfy.model_management.LoadedModel, "model_load", lambda self, *_, **__: load(self, 1024)
    )
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    seen = []

    def note(apply, given):
        offloaded = any(getattr(module, "comfy_cast_weights", False) for module in model.model.modules())
        seen.append((offloaded, len(given["cond_or_uncond"])))
        return apply(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(note)
    return seen


@works(
    "Runs",
    "--lowvram",
    holds=ALL_LAWS,
    note="Weights partly offloaded, a LoRA patched in as they are used, positive and negative in calls of "
    "their own.",
)
def test_low_memory_gives_the_same_pair(studio, monkeypatch):
    edit = studio.edit()
    expected = paired(studio, NEIGHBOURS["LoraLoaderModelOnly"], edit, PART, "before")
    model = models.lora_model_only(studio, studio.model)
    controlled, positive = AttentionController.execute(model, edit, PART).args[:2]
    comfy.model_management.unload_all_models()
    controlled.unpatch_model(controlled.offload_device)  # or what is loaded already stays
    with monkeypatch.context() as patch:
        seen = in_low_memory(patch, controlled)
        samples = ksampler(controlled, positive, studio.negative, studio.rows(edit, empty()), SHORT)
    comfy.model_management.unload_all_models()
    assert set(seen) == {(True, 1)}
    for found, one in zip(studio.split(edit, samples), expected, strict=True):
        assert_close(found, one)


def test_a_batch_in_parts_runs_with_patches_made_for_the_whole_batch(studio, monkeypatch):
    """GLIGEN's patch holds boxes for every row of the batch; parts of it come where memory is short."""
    edit = studio.edit(SOURCE, TARGET, "a castle on a red car", "a dog")
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    positive, rows = graphs.boxes(studio, positive), studio.rows(edit, empty(2))
    expected = ksampler(controlled, positive, studio.negative, rows, SHORT)
    monkeypatch.setattr(
        "comfy.model_base.BaseModel.memory_required", lambda self, shape, **_: 1e18 * (shape[0] > 4)
    )
    assert_close(ksampler(controlled, positive, studio.negative, rows, SHORT), expected)


@works("Runs", "Interrupt in mid-run", holds=ALL_LAWS, note="The next run is as if nothing had happened.")
@pytest.mark.parametrize("way", ["KSampler", "P2PSampler"])
def test_an_interrupted_run_can_be_repeated(studio, way):
    calls = []

    def stop_third(apply, given):
        calls.append(1)
        if len(calls) == 3:
            comfy.model_management.interrupt_current_processing(True)
        return apply(given["input"], given["timestep"], **given["c"])

    model = studio.model.clone()
    model.set_model_unet_function_wrapper(stop_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        studio.paired(studio.edit(), PART, Settings(), way=way, model=model)
    comfy.model_management.interrupt_current_processing(False)
    again = studio.paired(studio.edit(), PART, Settings(), way=way, model=model)
    expected = studio.paired(studio.edit(), PART, Settings())
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@works(
    "Runs", "One MODEL in several controllers", holds=ALL_LAWS, note="Each has its own edit, in any order."
)
def test_one_model_in_two_controllers(studio):
    edits = [studio.edit(), studio.edit("a castle", "a red castle", "a blue castle")]
    controllers = [AttentionController.execute(studio.model, edit, PART).args[:2] for edit in edits]
    for n in (0, 1, 0):
        samples = ksampler(*controllers[n], studio.negative, studio.rows(edits[n], empty()), SHORT)
        expected = studio.paired(edits[n], PART, SHORT)
        assert all(torch.equal(a, b) for a, b in zip(studio.split(edits[n], samples), expected, strict=True))


@refused(
    "Runs",
    "A controller on a controlled model",
    note="*Add Target* puts several targets into one controller.",
)
def test_controllers_in_a_chain_are_refused(studio):
    controlled = AttentionController.execute(studio.model, studio.edit(), PART).args[0]
    with pytest.raises(ValueError, match="already comes from"):
        AttentionController.execute(controlled, studio.edit(), PART)
    with pytest.raises(ValueError, match="already comes from"):
        studio.paired(studio.edit(), PART, way="P2PSampler", model=controlled)


# Latents


@works(
    "Latents",
    "Paired Sampler, then a second pass (hires fix)",
    holds=ALL_LAWS,
    note="Its *paired* output, upscaled, goes into another *Paired Sampler* or, with the model and positive "
    "of *Attention Controller*, into a stock sampler.",
)
@pytest.mark.parametrize("targets", [(TARGET,), (TARGET, "a castle")], ids=["one target", "two targets"])
def test_a_second_pass_after_the_paired_sampler(studio, targets):
    edit, s = studio.edit(SOURCE, *targets), SHORT
    first = paired_sampler(studio.model, edit, PART, studio.negative, empty(), s)[3]
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    second = Settings(steps=3, denoise=0.5, seed=s.seed + 1)
    found = ksampler(controlled, positive, studio.negative, graphs.upscaled(first), second)
    twice = paired(studio, NEIGHBOURS["LatentUpscaleBy and a second pass (hires fix)"], edit, PART, "before")
    assert all(torch.equal(a, b) for a, b in zip(studio.split(edit, found), twice, strict=True))


@refused(
    "Latents",
    "LatentFromBatch or RebatchLatents after Paired Latent",
    note="A pair that is torn apart: cut or split the batch before *Paired Latent*.",
)
def test_a_torn_pair_is_refused(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    rows = stock("nodes", "LatentFromBatch", samples=studio.rows(edit, empty(2)), batch_index=0, length=3)
    with pytest.raises(ValueError, match="batch of 3.*multiple of the edit's 2 branches"):
        ksampler(controlled, positive, studio.negative, rows, SHORT)


@works(
    "Latents",
    "RepeatLatentBatch after Paired Latent",
    holds=ALL_LAWS,
    note="Each copy gets noise of its own.",
)
def test_repeating_a_paired_latent_gives_further_pairs(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    rows = stock("nodes", "RepeatLatentBatch", samples=studio.rows(edit, empty()), amount=2)
    samples = ksampler(controlled, positive, studio.negative, rows, SHORT)
    expected = studio.paired(edit, PART, SHORT, empty(2))
    assert all(torch.equal(a, b) for a, b in zip(studio.split(edit, samples), expected, strict=True))


@works(
    "Latents",
    "A batch where both sides of the latent are odd",
    holds=("same prompt", "source", "Paired Sampler"),
    fails=("tau empty",),
    note="ComfyUI draws the noise of such a batch differently once a batch index is set, as *Paired Latent* "
    "does: other noise than without pairs, but one for each pair. *Paired Sampler* has the plain batch's.",
)
def test_the_paired_sampler_starts_a_batch_from_a_plain_batchs_noise_at_any_size(studio):
    latent = empty(3, 5, 7)
    source, target = studio.paired(studio.edit(), EMPTY, SHORT, latent, way="P2PSampler")
    assert_close(source, studio.plain(SOURCE, SHORT, latent))
    assert_close(target, studio.plain(TARGET, SHORT, latent))


# Conditionings


def lora_on_both(studio):
    """MODEL and CLIP out of LoraLoader, as they go into *Prompt Pair* and the controller."""
    model, clip = stock_outputs(
        "nodes",
        "LoraLoader",
        model=studio.model,
        clip=studio.clip,
        lora_name=graphs.files.lora(studio),
        strength_model=0.8,
        strength_clip=0.8,
    )
    return Studio(model, clip)


def hooks_on_clip(studio):
    """A LoRA on CLIP that fades at half of the run: the prompts are encoded once for each half."""
    hooks = graphs.lora_hooks(studio, strength_clip=0.8)
    clip = stock(
        "comfy_extras.nodes_hooks",
        "SetClipHooks",
        clip=studio.clip,
        schedule_clip=True,
        apply_to_conds=True,
        hooks=hooks,
    )
    return Studio(studio.model, clip)


@works(
    "Weights",
    "LoraLoader on MODEL and CLIP",
    holds=(*ALL_LAWS, "acts"),
    note="*Prompt Pair* takes the CLIP that it gives.",
)
@works(
    "Conditioning",
    "SetClipHooks with keyframes",
    holds=(*ALL_LAWS, "acts"),
    note="*Prompt Pair* takes the CLIP that it gives; it encodes source and target once per keyframe.",
)
@pytest.mark.parametrize("make", [lora_on_both, hooks_on_clip])
def test_prompts_encoded_by_a_changed_clip(studio, make):
    other = make(studio)
    source, target = other.paired(other.edit(SOURCE, SOURCE), PART, SHORT)
    assert_close(target, source)
    source, target = other.paired(other.edit(), EMPTY, SHORT)
    assert_close(source, other.plain(SOURCE, SHORT))
    assert_close(target, other.plain(TARGET, SHORT))
    again, edited = other.paired(other.edit(), PART, SHORT)
    assert torch.equal(again, source) and difference(edited, target) > 1e-3
    assert difference(source, studio.plain(SOURCE, SHORT)) > 1e-3


@refused(
    "Conditioning",
    "ConditioningConcat on the controller's positive",
    note='ComfyUI\'s node cannot join one row to several ("Sizes of tensors must match"), and neither can '
    "*Apply Style Model*. Write the text into source and target prompt.",
)
def test_concatenation_to_the_pair_fails_in_the_hosts_node(studio):
    positive = AttentionController.execute(studio.model, studio.edit(), PART).args[1]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        stock("nodes", "ConditioningConcat", conditioning_to=positive, conditioning_from=graphs.other(studio))


@refused(
    "Conditioning",
    "Another positive than the controller's",
    note="Also the result of *ConditioningAverage* with the controller's positive as `conditioning_from`.",
)
def test_another_positive_is_refused(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    average = stock(
        "nodes",
        "ConditioningAverage",
        conditioning_to=graphs.other(studio),
        conditioning_from=positive,
        conditioning_to_strength=0.5,
    )
    foreign = AttentionController.execute(studio.model, edit, PART).args[1]
    for given in (average, foreign, studio.encode(SOURCE)):
        with pytest.raises(ValueError, match="Connect that controller's positive output"):
            ksampler(controlled, given, studio.negative, studio.rows(edit, empty()), SHORT)


@refused("Conditioning", "The controller's positive as negative")
def test_the_positive_in_the_negative_input_is_refused(studio):
    edit = studio.edit()
    controlled, positive = AttentionController.execute(studio.model, edit, PART).args[:2]
    rows = studio.rows(edit, empty())
    with pytest.raises(ValueError, match="negative input"):
        ksampler(controlled, positive, positive, rows, SHORT)
    for own in (positive, studio.encode(SOURCE)):
        guider = stock(
            "comfy_extras.nodes_perpneg",
            "PerpNegGuider",
            model=controlled,
            positive=own,
            negative=studio.negative,
            empty_conditioning=positive,
            cfg=4.0,
            neg_scale=1.0,
        )
        with pytest.raises(ValueError, match="negative input"):
            sampler_custom_advanced(controlled, own, studio.negative, rows, SHORT, guider)


@refused(
    "Guidance",
    "TemporalScoreRescaling",
    note="ComfyUI's node takes no batches, and a pair is one.",
)
def test_temporal_score_rescaling_takes_no_batch(studio):
    model = stock(
        "comfy_extras.nodes_eps", "TemporalScoreRescaling", model=studio.model, tsr_k=0.9, tsr_sigma=1.0
    )
    with pytest.raises(RuntimeError, match="ambiguous"):
        studio.plain(SOURCE, SHORT, empty(2), model)
    with pytest.raises(RuntimeError, match="ambiguous"):
        studio.paired(studio.edit(), PART, SHORT, model=model)


# What the layout of conditionings leaves alone


def test_laying_out_changes_neither_the_users_tensors_nor_their_control_nets(studio):
    net = stock("nodes", "ControlNetLoader", control_net_name=graphs.files.control_net(studio))
    net.set_cond_hint(torch.rand(3, 3, 64, 64), extra_concat=[torch.rand(2, 1, 64, 64)])
    chained = net.copy().set_cond_hint(torch.rand(1, 3, 64, 64)).set_previous_controlnet(net)
    mask, latents = torch.rand(3, 8, 8), picture(2)["samples"]
    options = {"control": chained, "mask": mask, "concat_latent_image": latents}
    conds = {"positive": [dict(options)], "negative": [dict(options)]}
    lay_out(conds, 4, 3)
    (one,), (other,) = conds.values()
    assert net.cond_hint_original.shape[0] == 3 and chained.previous_controlnet is net and mask.shape[0] == 3
    assert one["control"] is other["control"]  # one model call for both
    images = one["control"].previous_controlnet.cond_hint_original
    items = [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert torch.equal(images, net.cond_hint_original[items])
    (extra,) = one["control"].previous_controlnet.extra_concat_orig
    assert torch.equal(extra, net.extra_concat_orig[0][[0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0]])
    assert one["control"].cond_hint_original is chained.cond_hint_original  # one image for all rows
    assert torch.equal(one["mask"], mask[items])
    assert torch.equal(one["concat_latent_image"], latents[[0] * 6 + [1] * 6])


def test_the_pair_takes_from_its_negatives_what_the_model_sees_and_nothing_else():
    cond, image = torch.zeros(1, 77, 8), torch.zeros(1, 4, 8, 8)
    first, second, boxes = object(), object(), object()
    own = {"area": (4, 4, 0, 0), "mask": image, "strength": 0.5, "start_percent": 0.3, "hooks": object()}
    negative = [
        [cond, {"pooled_output": cond, "gligen": boxes}],
        [cond, {**own, "control": first, "control_apply_to_uncond": True}],
        [cond, {**own, "control": second, "concat_latent_image": image, "concat_mask": image}],
    ]
    ((same, options),) = seeing_images_of(negative, [[cond, {"pooled_output": image}]])
    assert same is cond and options.pop("pooled_output") is image
    assert options.pop("control") is first and options.pop("control_apply_to_uncond") is True
    assert options.pop("gligen") is boxes
    assert options.pop("concat_latent_image") is options.pop("concat_mask") is image
    assert options == {}


def test_a_single_image_or_mask_is_left_as_it_is(studio):
    net = stock("nodes", "ControlNetLoader", control_net_name=graphs.files.control_net(studio))
    net.set_cond_hint(torch.rand(1, 3, 64, 64))
    entry = {"control": net, "mask": torch.rand(1, 8, 8), "cross_attn": torch.rand(1, 77, 8)}
    conds = {"positive": [dict(entry)]}
    lay_out(conds, 2, 2)
    assert all(conds["positive"][0][name] is value for name, value in entry.items())


def test_the_image_of_a_control_net_is_seen(studio):
    """So that the tests with an image per item can fail."""
    node = NEIGHBOURS["A ControlNet image per item of the batch"]
    rows = plain(studio, node, SOURCE)
    same = NEIGHBOURS["ControlNetApplyAdvanced"]
    assert (
        difference(rows[1:2], plain(studio, type(node)(**{**vars(same), "size": (3, 8, 8)}), SOURCE)[1:2])
        > 1e-2
    )

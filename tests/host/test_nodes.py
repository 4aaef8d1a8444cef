"""The nodes: their public names, what they return, and what they say when something is wrong."""

from __future__ import annotations

import copy
import gc
import weakref
from inspect import signature

import latent_preview
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.sd import CLIP
from p2p.attention.prompt import WordNotFound
from p2p.attention.schedule import TauSchedule, Window
from p2p.drawing.grid import comparison_grid
from p2p.nodes import (
    NODES,
    AddTarget,
    AttentionController,
    AttentionMaps,
    ComparisonGrid,
    DemoModel,
    FeatureInjection,
    InvertImage,
    PairedLatent,
    PairedSampler,
    PromptPair,
    SplitBranches,
    TauScheduler,
    TokenReweight,
)
from p2p.nodes.maps import images_of
from p2p.tests.host.runs import EMPTY, FULL, PART, SOURCE, TARGET, Settings, empty, ksampler, picture
from p2p.tests.interface import INTERFACE, interface_of


def schema_of(node_id):
    (schema,) = [node.define_schema() for node in NODES if node.define_schema().node_id == node_id]
    return schema


def test_every_node_has_an_interface_that_workflows_can_rely_on():
    assert {node.GET_SCHEMA().node_id for node in NODES} == set(INTERFACE)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_inputs_and_outputs_keep_their_names_types_order_and_defaults(node):
    assert interface_of(node.GET_NODE_INFO_V1()) == INTERFACE[node.GET_SCHEMA().node_id]


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_every_node_is_in_the_packs_category_under_a_name_for_people(node):
    schema = node.define_schema()
    assert schema.category == "prompt-to-prompt"
    assert schema.node_id.startswith("P2P") and not schema.display_name.startswith("P2P")
    assert schema.description
    schema.validate()


def test_ranges_of_the_widgets_are_those_of_the_values():
    scale = next(entry for entry in schema_of("P2PTokenReweight").inputs if entry.id == "scale")
    assert (scale.min, scale.max) == (-2.0, 2.0)
    for entry in schema_of("P2PTauScheduler").inputs:
        if entry.io_type == "FLOAT":
            assert (entry.min, entry.max) == (0.0, 1.0)
    mode = next(entry for entry in schema_of("P2PPromptPair").inputs if entry.id == "mode")
    assert list(mode.options) == ["auto", "swap", "refine"]


# Prompt Pair, Token Reweight, tau Scheduler


def test_prompt_pair_makes_an_edit_and_shows_its_alignment(studio):
    output = PromptPair.execute(studio.clip, "a cat on a mat", "a dog on a red mat", "auto")
    edit = output.args[0]
    assert edit.source.text == "a cat on a mat"
    assert [target.text for target in edit.targets] == ["a dog on a red mat"]
    (shown,) = output.ui["alignment"]
    assert [word["text"] for word in shown["target"]["words"]] == ["a", "dog", "on", "a", "red", "mat"]
    assert {"source": (1,), "target": (1,), "swapped": True} in shown["pairings"]
    assert shown["new"] == (4,) and shown["removed"] == ()


@pytest.mark.parametrize(
    ("source", "target", "role"), [("", "a", "source"), ("a", " \n", "target"), ("", "", "source")]
)
def test_an_empty_prompt_is_an_error_that_says_which(studio, source, target, role):
    with pytest.raises(ValueError, match=f"{role} prompt is empty"):
        PromptPair.execute(studio.clip, source, target, "auto")
    if role == "target":
        assert "The target prompt is empty" in AddTarget.validate_inputs(target=target)
        with pytest.raises(ValueError, match="target prompt is empty"):
            AddTarget.execute(studio.clip, studio.edit(), target, "auto")


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.__name__)
def test_a_failed_validation_is_told_once(node):
    """The host repeats it for every input that validation names."""
    named = list(signature(node.validate_inputs).parameters) if "validate_inputs" in vars(node) else []
    assert len(named) <= 1 or (node, named) == (AttentionMaps, ["start", "end"])


def test_validation_leaves_inputs_that_come_over_links_for_later():
    assert AddTarget.validate_inputs(target=None) is True
    assert TokenReweight.validate_inputs(words=None) is True
    assert TauScheduler.validate_inputs(words=None) is True


def test_token_reweight_gives_a_new_edit_and_leaves_the_old(studio):
    edit = studio.edit()
    gain = edit.targets[0].gain.clone()
    scaled = TokenReweight.execute(edit, "red", -1.5, 0).args[0]
    assert torch.equal(edit.targets[0].gain, gain)
    token = edit.targets[0].prompt.find("red")[0]
    assert scaled.targets[0].gain[token] == -1.5


def test_re_weighting_a_word_that_is_not_there_lists_the_prompts_words(studio):
    with pytest.raises(WordNotFound, match='"castle".*a, dog, riding, red, car'):
        TokenReweight.execute(studio.edit(), "castle", 1.0, 0)


def test_re_weighting_nothing_is_an_error_at_validation():
    assert "No word" in TokenReweight.validate_inputs(words=" , \n")


def test_tau_scheduler_makes_the_windows_that_it_shows():
    tau = TauScheduler.execute(0.1, 0.8, 0.2, 0.4, 0.3, 0.25, "hat: 0.2-0.6\nred hair: 0.5").args[0]
    assert tau == TauSchedule(
        Window(0.1, 0.8),
        Window(0.2, 0.4),
        0.3,
        0.25,
        (("hat", Window(0.2, 0.6)), ("red hair", Window(0, 0.5))),
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"cross_start": 0.8, "cross_end": 0.2}, "cross_end is 0.2, before cross_start at 0.8"),
        ({"self_start": 0.5, "self_end": 0.4}, "self_end is 0.4, before self_start at 0.5"),
        ({"cross_start": 0.9, "cross_end": 0.0}, "cross_end is 0, before cross_start at 0.9"),
        ({"words": "hat 0.3"}, 'Cannot read the line "hat 0.3"'),
        ({"words": "hat: 0.6-0.2"}, 'In the line "hat: 0.6-0.2"'),
        ({"words": "hat: 1.5"}, 'In the line "hat: 1.5"'),
        ({"self_mode": "none"}, "self_mode is 'none'; expected one of map, mutual"),
    ],
)
def test_a_tau_window_that_cannot_be_is_an_error_that_names_its_inputs(inputs, message):
    given = dict.fromkeys(("cross_start", "self_start", "fade", "self_resolution"), 0.0)
    with pytest.raises(ValueError) as error:
        TauScheduler.execute(**{**given, "cross_end": 1.0, "self_end": 1.0, "words": "", **inputs})
    assert message in str(error.value)
    if "words" in inputs:
        assert message in TauScheduler.validate_inputs(words=inputs["words"])


@pytest.mark.parametrize(
    ("node", "choice"),
    [
        (PairedSampler, "sampler_name"),
        (PairedSampler, "scheduler"),
        (InvertImage, "scheduler"),
        (InvertImage, "reconstruction"),
        (PromptPair, "mode"),
        (AddTarget, "mode"),
    ],
)
def test_a_choice_that_is_not_there_is_an_error_that_names_it(studio, node, choice):
    """Some hosts do not compare choices themselves."""
    names = signature(node.execute).parameters
    given = {
        "model": studio.model,
        "clip": studio.clip,
        "edit": studio.edit(),
        "tau": EMPTY,
        "source": SOURCE,
        "target": TARGET,
        "positive": studio.negative,
        "negative": studio.negative,
        "latent": picture(),
        "seed": 1,
        "steps": 1,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
        choice: "magic",
    }
    with pytest.raises(ValueError, match=f"{choice} is 'magic'; expected one of "):
        node.execute(**{name: value for name, value in given.items() if name in names})


class OtherClip:
    """A clip whose encodings are changed."""

    def __init__(self, clip, change):
        self.clip, self.change, self.tokenizer = clip, change, clip.tokenizer

    def tokenize(self, *given, **options):
        return self.clip.tokenize(*given, **options)

    def encode_from_tokens_scheduled(self, tokens):
        return self.change(self.clip.encode_from_tokens_scheduled(tokens))


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        (lambda entries: entries, True),
        (lambda entries: [[cond + 1e-3 * torch.randn_like(cond), more] for cond, more in entries], True),
        (lambda entries: [[cond + 0.1 * torch.randn_like(cond), more] for cond, more in entries], False),
        (lambda entries: [[torch.cat([cond, cond], -1), more] for cond, more in entries], False),
        (lambda entries: [*entries, *entries], False),
    ],
    ids=["the same", "rounded", "other weights", "another width", "scheduled"],
)
def test_a_further_target_needs_the_sources_text_encoder(studio, change, fits):
    clip = OtherClip(studio.clip, change)
    if fits:
        assert len(AddTarget.execute(clip, studio.edit(), "a castle", "auto").args[0].targets) == 2
    else:
        with pytest.raises(ValueError, match="clip is not the one that encoded the source prompt"):
            AddTarget.execute(clip, studio.edit(), "a castle", "auto")


@pytest.fixture
def encodings(monkeypatch):
    """How often the host encoded anything."""
    count, encode = [], CLIP.encode_from_tokens_scheduled

    def counted(*given, **options):
        count.append(given)
        return encode(*given, **options)

    monkeypatch.setattr(CLIP, "encode_from_tokens_scheduled", counted)
    return count


def lora(clip, strength):
    clip = clip.clone()
    name, weight = next((n, w) for n, w in clip.cond_stage_model.state_dict().items() if "fc1.weight" in n)
    assert clip.add_patches({name: ("diff", (torch.randn_like(weight),))}, strength)
    return clip


def skipping(clip):
    clip = clip.clone()
    clip.clip_layer(-2)
    return clip


@pytest.mark.parametrize(
    ("change", "fits", "encoded"),
    [
        (lambda clip: clip, True, 1),
        (lambda clip: clip.clone(), True, 1),
        (lambda clip: lora(clip, 0.0), True, 2),  # known by another name, and the same
        (lambda clip: lora(clip, 1.0), False, 1),
        (skipping, False, 1),
    ],
    ids=["the same", "a clone", "a LoRA of no strength", "a LoRA", "clip skip"],
)
def test_a_further_target_encodes_the_source_again_only_for_a_clip_that_may_be_another(
    studio, encodings, change, fits, encoded
):
    edit = studio.edit()
    clip = change(studio.clip)
    encodings.clear()
    if fits:
        assert len(AddTarget.execute(clip, edit, "a castle", "auto").args[0].targets) == 2
    else:
        with pytest.raises(ValueError, match="clip is not the one that encoded the source prompt"):
            AddTarget.execute(clip, edit, "a castle", "auto")
    assert len(encodings) == encoded


def test_a_further_target_takes_a_clone_of_a_patched_clip(studio):
    patched = lora(studio.clip, 1.0)
    edit = PromptPair.execute(patched, "a cat", "a dog", "auto").args[0]
    assert AddTarget.execute(patched.clone(), edit, "a castle", "auto").args[0].branches == 3


def test_an_edit_keeps_no_text_encoder_alive(studio):
    clip = studio.clip.clone()
    clip.tokenizer = copy.copy(clip.tokenizer)
    tokenizer, patcher = weakref.ref(clip.tokenizer), weakref.ref(clip.patcher)
    edit = PromptPair.execute(clip, "a cat", "a dog", "auto").args[0]
    del clip
    gc.collect()
    assert tokenizer() is None and patcher() is None
    assert AddTarget.execute(studio.clip, edit, "a castle", "auto").args[0].branches == 3


# Attention Controller


def test_a_word_of_tau_that_no_target_has_lists_the_words(studio):
    tau = TauSchedule(words=(("castle", Window(0, 1)),))
    with pytest.raises(WordNotFound, match="a, dog, riding, red, car"):
        AttentionController.execute(studio.model, studio.edit(), tau)


@pytest.mark.parametrize("node", [AttentionController, FeatureInjection])
@pytest.mark.parametrize("wired", [(), (0,), (1,), (0, 1), (2,), (0, 1, 2), (1, 2)])
def test_a_positive_in_use_without_its_model_is_an_error_at_the_node(studio, node, wired):
    class Hidden:
        unique_id = "7"
        prompt = {
            "5": {"class_type": "CheckpointLoaderSimple", "inputs": {}},
            "7": {"class_type": node.define_schema().node_id, "inputs": {"model": ["5", 0]}},
            "9": {"class_type": "Other", "inputs": {f"input_{n}": ["7", n] for n in wired}},
        }

    in_graph = type(node.__name__, (node,), {"hidden": Hidden})
    arguments = (EMPTY,) if node is AttentionController else (0.5, 0.5)
    if 1 in wired and 0 not in wired:
        with pytest.raises(ValueError, match="positive is connected, but its model is not"):
            in_graph.execute(studio.model, studio.edit(), *arguments)
    else:
        in_graph.execute(studio.model, studio.edit(), *arguments)


class NoTextModel(torch.nn.Module):
    """A diffusion model without cross-attention to text."""


def unet_without_text():
    depths = {"transformer_depth": [0], "transformer_depth_output": [0, 0], "transformer_depth_middle": -1}
    return UNetModel(32, 4, 32, 4, [1], channel_mult=(1,), num_heads=1, **depths)


@pytest.mark.parametrize("make", [NoTextModel, unet_without_text])
def test_an_unsupported_model_is_an_error_that_names_its_class_and_what_is_supported(studio, make):
    other = studio.model.clone()
    module = make()
    other.add_object_patch("diffusion_model", module)
    with pytest.raises(ValueError, match=f"{type(module).__name__}.*SD1.x, SD2.x, SDXL"):
        AttentionController.execute(other, studio.edit(), EMPTY)


def test_positive_has_a_row_for_each_branch(studio):
    edit = studio.edit(SOURCE, TARGET, "a castle")
    _, positive = AttentionController.execute(studio.model, edit, EMPTY).args[:2]
    ((tensor, _),) = positive
    for row, text in zip(tensor, (SOURCE, TARGET, "a castle"), strict=True):
        assert torch.equal(row, studio.encode(text)[0][0][0])


# Latents and images


@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("items", [1, 2])
def test_split_branches_is_the_inverse_of_paired_latent(studio, targets, items):
    edit = studio.edit(SOURCE, *["a castle"] * targets)
    latent = picture(items)
    paired = PairedLatent.execute(latent, edit).args[0]
    rows = paired["samples"]
    assert rows.shape[0] == items * (1 + targets)
    sources, copies = SplitBranches.execute(rows, edit).args
    assert torch.equal(sources, latent["samples"])
    assert torch.equal(copies, latent["samples"].repeat_interleave(targets, 0))
    assert paired["batch_index"] == [n for n in range(items) for _ in range(1 + targets)]


def test_paired_latent_leaves_its_input_and_keeps_what_else_came_with_it(studio):
    latent = {**picture(2), "noise_mask": torch.ones(2, 1, 64, 64), "batch_index": [4, 7], "other": "kept"}
    before = dict(latent)
    paired = PairedLatent.execute(latent, studio.edit()).args[0]
    assert latent.keys() == before.keys() and all(latent[key] is before[key] for key in before)
    assert paired["batch_index"] == [4, 4, 7, 7] and paired["other"] == "kept"
    assert paired["noise_mask"].shape[0] == 4


@pytest.mark.parametrize(("rows", "branches"), [(3, 2), (1, 2), (4, 3)])
def test_a_batch_that_is_no_multiple_of_the_branches_is_an_error_that_says_both_numbers(
    studio, rows, branches
):
    edit = studio.edit(SOURCE, *["a castle"] * (branches - 1))
    with pytest.raises(ValueError, match=f"batch of {rows}.*{branches} branches.*same edit"):
        SplitBranches.execute(torch.zeros(rows, 8, 8, 3), edit)
    model, positive = AttentionController.execute(studio.model, edit, FULL).args[:2]
    with pytest.raises(ValueError, match=f"batch of {rows}.*{branches} branches.*Paired Latent.*same edit"):
        ksampler(model, positive, studio.negative, empty(rows), Settings())


# Paired Sampler


def test_paired_sampler_leaves_its_inputs_and_keeps_what_came_with_the_latent(studio):
    latent = {**picture(2), "noise_mask": torch.ones(2, 1, 8, 8), "other": "kept"}
    before, negative = dict(latent), [list(entry) for entry in studio.negative]
    samples, edit = latent["samples"].clone(), studio.edit(SOURCE, TARGET, "a castle")
    output = PairedSampler.execute(
        studio.model, edit, PART, studio.negative, latent, 1, 3, 4.0, "euler", "normal", 1.0
    )
    source, targets = output.args[:2]
    assert all(latent[key] is before[key] for key in before) and torch.equal(latent["samples"], samples)
    assert [list(entry) for entry in studio.negative] == negative
    assert source["samples"].shape[0] == 2 and targets["samples"].shape[0] == 4
    assert source["other"] == targets["other"] == "kept"
    assert source["noise_mask"].shape[0] == 2 and targets["noise_mask"].shape[0] == 4


def test_the_preview_shows_the_branches_of_the_first_pair_side_by_side_at_every_step(studio, monkeypatch):
    shown = []

    def prepare(model, steps):
        return lambda step, x0, x, total: shown.append((step, x0.clone(), x.shape[0], total))

    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    edit = studio.edit(SOURCE, TARGET, "a castle")
    output = PairedSampler.execute(
        studio.model, edit, PART, studio.negative, empty(2, 8, 16), 1, 3, 4.0, "euler", "normal", 1.0
    )
    assert [step for step, *_ in shown] == [0, 1, 2]
    assert all(x0.shape == (1, 4, 8, 48) and rows == 6 and total == 3 for _, x0, rows, total in shown)
    last = shown[-1][1]  # euler's last step goes all the way to x0
    torch.testing.assert_close(last[..., :16], output.args[0]["samples"][:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last[..., 32:], output.args[1]["samples"][1:2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("denoise", [0.0, 0.4])
def test_little_or_no_denoise_is_as_in_ksampler(studio, denoise):
    settings = Settings(denoise=denoise)
    source, _ = studio.paired(studio.edit(), PART, settings, picture(), way="P2PSampler")
    assert torch.allclose(source, studio.plain(SOURCE, settings, picture()), atol=1e-4)


# Comparison Grid


def test_a_line_of_labels_is_the_label_of_an_image():
    images = torch.rand(3, 32, 48, 3)
    grid = ComparisonGrid.execute(images, 2, "one\n\nthree").args[0]
    assert torch.equal(grid, comparison_grid(images, ["one", "", "three"], 2))


def test_further_batches_follow_and_are_scaled_to_the_first():
    images = torch.rand(4, 1, 1, 3).expand(4, 32, 48, 3)
    large = torch.rand(4, 1, 1, 3).copy_(images[:, :1, :1]).expand(4, 64, 96, 3)
    grid = ComparisonGrid.execute(images[:2], 2, "", images_2=large[2:3], images_4=images[3:]).args[0]
    assert torch.allclose(grid, comparison_grid(images, [], 2), atol=1e-6)


# Attention Maps


@pytest.mark.parametrize(
    ("count", "branch", "expected"),
    [
        (1, 0, [0, 0]),
        (2, 0, [0, 1]),
        (2, 2, [0, 1]),  # as many as there are pairs are this branch's, whichever they show
        (6, 0, [0, 3]),
        (6, 2, [2, 5]),
        (4, 1, [0, 2]),
        (4, 2, [1, 3]),
    ],
)
def test_images_of_a_branch_are_found_by_their_number(count, branch, expected):
    images = torch.arange(count)[:, None, None, None].expand(count, 4, 4, 3)
    assert images_of(images, 2, branch, 3)[:, 0, 0, 0].tolist() == expected


@pytest.mark.parametrize(("count", "branch"), [(4, 0), (3, 1), (5, 2), (8, 0)])
def test_another_number_of_images_is_an_error_that_says_the_numbers(count, branch):
    with pytest.raises(ValueError, match=f"{count} images for 2 pairs of 3 branches; expected 1, 2"):
        images_of(torch.zeros(count, 4, 4, 3), 2, branch, 3)


# Load Demo Model


def test_the_demo_model_comes_as_the_hosts_own_values():
    model, clip, vae, picture = DemoModel.execute().args
    assert (
        type(model).__name__ == "ModelPatcher"
        and type(clip).__name__ == "CLIP"
        and type(vae).__name__ == "VAE"
    )
    assert picture.shape == (1, 128, 128, 3) and 0.0 <= picture.min() < picture.max() <= 1.0

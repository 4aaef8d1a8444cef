"""The nodes: their public names, what they return, and what they say when something is wrong."""

from __future__ import annotations

from inspect import signature

import latent_preview
import pytest
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from p2p.attention.prompt import WordNotFound
from p2p.attention.schedule import TauSchedule, Window
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
from p2p.tests.host.runs import EMPTY, FULL, PART, SOURCE, TARGET, Settings, empty, ksampler, picture

# Names that shared workflows depend on: (inputs in order), (outputs in order), each a name and a type.
# A later version may add optional inputs and further outputs; none of these may go, move or change.
INTERFACE = {
    "P2PPromptPair": (
        [("clip", "CLIP"), ("source", "STRING"), ("target", "STRING"), ("mode", "COMBO")],
        [("edit", "P2P_EDIT")],
    ),
    "P2PAddTarget": (
        [("clip", "CLIP"), ("edit", "P2P_EDIT"), ("target", "STRING"), ("mode", "COMBO")],
        [("edit", "P2P_EDIT")],
    ),
    "P2PTokenReweight": (
        [("edit", "P2P_EDIT"), ("words", "STRING"), ("scale", "FLOAT"), ("target", "INT")],
        [("edit", "P2P_EDIT")],
    ),
    "P2PTauScheduler": (
        [
            ("cross_start", "FLOAT"),
            ("cross_end", "FLOAT"),
            ("self_start", "FLOAT"),
            ("self_end", "FLOAT"),
            ("fade", "FLOAT"),
            ("self_resolution", "FLOAT"),
            ("words", "STRING"),
        ],
        [("tau", "P2P_TAU")],
    ),
    "P2PAttentionController": (
        [("model", "MODEL"), ("edit", "P2P_EDIT"), ("tau", "P2P_TAU")],
        [("model", "MODEL"), ("positive", "CONDITIONING")],
    ),
    "P2PPairedLatent": ([("latent", "LATENT"), ("edit", "P2P_EDIT")], [("latent", "LATENT")]),
    "P2PSampler": (
        [
            ("model", "MODEL"),
            ("edit", "P2P_EDIT"),
            ("tau", "P2P_TAU"),
            ("negative", "CONDITIONING"),
            ("latent", "LATENT"),
            ("seed", "INT"),
            ("steps", "INT"),
            ("cfg", "FLOAT"),
            ("sampler_name", "COMBO"),
            ("scheduler", "COMBO"),
            ("denoise", "FLOAT"),
        ],
        [("source", "LATENT"), ("targets", "LATENT")],
    ),
    "P2PSplitBranches": (
        [("images", "IMAGE"), ("edit", "P2P_EDIT")],
        [("source", "IMAGE"), ("targets", "IMAGE")],
    ),
    "P2PComparisonGrid": (
        [("images", "IMAGE"), ("labels", "STRING"), ("columns", "INT")]
        + [(f"images_{n}", "IMAGE") for n in (2, 3, 4)],
        [("image", "IMAGE")],
    ),
    "P2PInvert": (
        [
            ("model", "MODEL"),
            ("positive", "CONDITIONING"),
            ("latent", "LATENT"),
            ("steps", "INT"),
            ("scheduler", "COMBO"),
        ],
        [("trajectory", "P2P_TRAJECTORY"), ("noise", "LATENT")],
    ),
    "P2PFeatureInjection": (
        [("model", "MODEL"), ("edit", "P2P_EDIT"), ("feature_end", "FLOAT"), ("attention_end", "FLOAT")],
        [("model", "MODEL"), ("positive", "CONDITIONING"), ("maps", "P2P_MAPS")],
    ),
    "P2PSavePairs": (
        [("edit", "P2P_EDIT"), ("source", "IMAGE"), ("targets", "IMAGE"), ("filename_prefix", "STRING")],
        [],
    ),
    "P2PDemoModel": ([], [("model", "MODEL"), ("clip", "CLIP"), ("vae", "VAE")]),
}
DEFAULTS = {
    "P2PPromptPair": {"mode": "auto"},
    "P2PTokenReweight": {"scale": 1.0, "target": 0},
    "P2PTauScheduler": {
        "cross_start": 0.0,
        "cross_end": 0.8,
        "self_start": 0.0,
        "self_end": 0.4,
        "fade": 0.0,
        "self_resolution": 0.5,
    },
    "P2PFeatureInjection": {"feature_end": 0.8, "attention_end": 0.5},
}


def schema_of(node_id):
    (schema,) = [node.define_schema() for node in NODES if node.define_schema().node_id == node_id]
    return schema


@pytest.mark.parametrize("node_id", INTERFACE)
def test_inputs_keep_their_names_types_and_order(node_id):
    given = [(entry.id, entry.io_type, entry.optional) for entry in schema_of(node_id).inputs or []]
    inputs = INTERFACE[node_id][0]
    assert [(name, kind) for name, kind, _ in given if (name, kind) in inputs] == inputs
    assert all(optional for name, kind, optional in given if (name, kind) not in inputs)


@pytest.mark.parametrize("node_id", INTERFACE)
def test_outputs_keep_their_names_types_and_order(node_id):
    given = [(output.display_name or output.id, output.io_type) for output in schema_of(node_id).outputs]
    outputs = INTERFACE[node_id][1]
    assert given[: len(outputs)] == outputs


@pytest.mark.parametrize(("node_id", "values"), DEFAULTS.items())
def test_widgets_keep_their_defaults(node_id, values):
    given = {entry.id: entry.default for entry in schema_of(node_id).inputs if entry.id in values}
    assert given == values


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


def solid(count, height=32, width=48):
    """Images of one colour each, red from 0.1 up; letters and paper are grey."""
    images = torch.zeros(count, height, width, 3)
    images[..., 0] = (torch.arange(1, count + 1) / 10)[:, None, None]
    return images


def grid_of(images, labels="", columns=2):
    return ComparisonGrid.execute(images, columns, labels).args[0]


def place_of(grid, value):
    """Rows and columns that the image of this red covers."""
    where = (grid[0] - torch.tensor([value, 0, 0])).abs().amax(-1) < 1e-6
    return where.any(1).nonzero().flatten(), where.any(0).nonzero().flatten()


def test_further_batches_follow_and_are_scaled_to_the_first():
    reds = [solid(n, *size) for n, size in ((2, (32, 48)), (3, (64, 96)), (5, (32, 48)))]
    further = {"images_2": reds[1][2:], "images_4": reds[2][4:]}
    grid = ComparisonGrid.execute(reds[0], 2, "", **further).args[0]
    assert torch.allclose(grid, grid_of(solid(5)[[0, 1, 2, 4]]), atol=1e-6)


@pytest.mark.parametrize("labelled", ["none", "columns", "each"])
@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (1, 4), (2, 2), (3, 2), (4, 2), (5, 3), (3, 1), (7, 4), (2, 5)]
)
def test_images_stand_in_columns_row_by_row_also_when_the_last_row_is_short(count, columns, labelled):
    used = min(count, columns)
    number = {"none": 0, "columns": used, "each": count}[labelled]
    grid = grid_of(solid(count), "\n".join(f"label {n}" for n in range(number)), columns)
    assert grid.ndim == 4 and grid.shape[0] == 1 and grid.shape[3] == 3 and grid.dtype == torch.float32
    assert grid.min() >= 0 and grid.max() <= 1
    places = [place_of(grid, (n + 1) / 10) for n in range(count)]
    for n, (rows, across) in enumerate(places):
        assert (len(rows), len(across)) == (32, 48)
        if n % used:
            assert across[0] > places[n - 1][1][-1] and torch.equal(rows, places[n - 1][0])
        elif n:
            assert rows[0] > places[n - 1][0][-1] and torch.equal(across, places[0][1])


def test_labels_are_written_above_their_images():
    plain, labelled = grid_of(solid(3)), grid_of(solid(3), "one\ntwo\nthree")
    assert labelled.shape[1] > plain.shape[1] and labelled.shape[2] == plain.shape[2]
    for value in (0.1, 0.2, 0.3):
        rows, across = place_of(labelled, value)
        head = labelled[0, max(int(rows[0]) - 12, 0) : int(rows[0]), across]
        assert (head < 0.5).any()  # letters


def test_a_label_per_column_stands_over_the_first_row_only():
    grid = grid_of(solid(4), "left\nright")
    first, second = place_of(grid, 0.1)[0], place_of(grid, 0.3)[0]
    assert (grid[0, : int(first[0])] < 0.5).any()
    assert not (grid[0, int(first[-1]) + 1 : int(second[0])] < 0.5).any()


def test_an_empty_line_labels_nothing():
    grid = grid_of(solid(2), "\nright")
    rows, across = place_of(grid, 0.1)
    assert (grid[0, : int(rows[0]), across] == 1).all()


def test_a_long_label_is_wrapped_and_widens_nothing():
    plain, labelled = (
        grid_of(solid(2)),
        grid_of(solid(2), "\n".join(["a very long label of many words " * 3] * 2)),
    )
    assert labelled.shape[2] == plain.shape[2] and labelled.shape[1] > plain.shape[1] + 30


@pytest.mark.parametrize("labels", ["one", "one\ntwo\nthree"])
def test_another_number_of_labels_is_an_error_that_says_the_numbers(labels):
    with pytest.raises(ValueError, match=f"{len(labels.splitlines())} labels for 4 images in 2 columns"):
        grid_of(solid(4), labels)


def test_the_grid_leaves_the_images_that_it_was_given():
    images = solid(3)
    before = images.clone()
    grid_of(images, "a\nb\nc")
    assert torch.equal(images, before)


def test_transparency_is_left_out():
    assert grid_of(torch.rand(2, 8, 8, 4)).shape[3] == 3


# Load Demo Model


def test_the_demo_model_comes_as_the_hosts_own_values():
    model, clip, vae, picture = DemoModel.execute().args
    assert (
        type(model).__name__ == "ModelPatcher"
        and type(clip).__name__ == "CLIP"
        and type(vae).__name__ == "VAE"
    )
    assert picture.shape == (1, 128, 128, 3) and 0.0 <= picture.min() < picture.max() <= 1.0

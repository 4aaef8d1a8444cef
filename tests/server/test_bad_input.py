"""Bad input through a real server: refused with the reason before anything runs, or ended with it."""

import copy
import json

import pytest
import requests
from p2p.tools.browser import rejection
from p2p.tools.graphs import node, paired, stock
from p2p.tools.server import failure

SOURCE = "a cat riding a bicycle"
TARGET = "a cat riding a car"

SHOWN = {
    "grid": node("P2PComparisonGrid", images=["decode", 0], labels="", columns=2),
    "save": node("PreviewImage", images=["grid", 0]),
}
PAIRED = {
    **paired(SOURCE, TARGET, side=64, steps=1),
    **SHOWN,
    "reweight": node("P2PTokenReweight", edit=["prompts", 0], words="cat", scale=1.0, target=0),
}
PAIRED["sample"]["inputs"]["edit"] = ["reweight", 0]
STOCK = {
    **stock(node("P2PAttentionController", tau=["tau", 0]), SOURCE, TARGET, side=64, steps=1),
    **SHOWN,
}


def changed(graph, node, **inputs):
    graph = copy.deepcopy(graph)
    graph[node]["inputs"].update(inputs)
    return graph


def queue(server, graph):
    # Not through json=, which would refuse NaN itself.
    return requests.post(f"{server.url}/prompt", data=json.dumps({"prompt": graph}), timeout=60)


def refusal(server, graph):
    """The server's reason for not taking a graph; asserts that it did not take it."""
    answer = queue(server, graph)
    assert answer.status_code == 400, answer.text
    assert answer.json()["node_errors"], answer.text
    return rejection(answer.json())


def run_error(server, graph):
    """The message of the node that fails; asserts that the graph is taken and one fails."""
    answer = queue(server, graph)
    assert answer.status_code == 200, answer.text
    message = failure(server.wait(answer.json()["prompt_id"]))
    assert message is not None
    return message


def reason(server, graph):
    """Why a graph is refused or fails."""
    answer = queue(server, graph)
    return rejection(answer.json()) if answer.status_code == 400 else run_error(server, graph)


def assert_says(message, *parts):
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize("graph", [PAIRED, STOCK], ids=["Paired Sampler", "stock KSampler"])
def test_the_graphs_that_the_cases_spoil_run(server, graph):
    answer = queue(server, graph)
    assert answer.status_code == 200, answer.text
    assert failure(server.wait(answer.json()["prompt_id"])) is None


NAN = float("nan")


@pytest.mark.parametrize(
    ("node", "inputs", "says"),
    [
        ("reweight", {"scale": 3.0}, ["scale", "3.0", "2.0"]),
        ("reweight", {"scale": -2.5}, ["scale", "-2.5", "-2.0"]),
        ("reweight", {"scale": "strong"}, ["scale", "strong"]),
        ("reweight", {"target": -1}, ["target", "-1", "0"]),
        ("tau", {"cross_start": -0.1}, ["cross_start", "-0.1", "0.0"]),
        ("tau", {"cross_end": 1.5}, ["cross_end", "1.5", "1.0"]),
        ("tau", {"self_start": 2.0}, ["self_start", "2.0", "1.0"]),
        ("tau", {"self_end": 20.0}, ["self_end", "20.0", "1.0"]),
        ("tau", {"fade": 1.1}, ["fade", "1.1", "1.0"]),
        ("tau", {"self_resolution": -1.0}, ["self_resolution", "-1.0", "0.0"]),
        ("tau", {"words": "car: 1.5"}, ["car: 1.5", "0 to 1"]),
        ("tau", {"words": "car: -0.5"}, ["car: -0.5"]),
        ("sample", {"steps": 0}, ["steps", "0", "1"]),
        ("sample", {"cfg": -1.0}, ["cfg", "-1.0", "0.0"]),
        ("sample", {"denoise": 1.5}, ["denoise", "1.5", "1.0"]),
        ("sample", {"seed": -1}, ["seed", "-1", "0"]),
        ("grid", {"columns": 0}, ["columns", "0", "1"]),
    ],
)
def test_numbers_outside_their_range_are_refused(server, node, inputs, says):
    assert_says(refusal(server, changed(PAIRED, node, **inputs)), *says)


@pytest.mark.parametrize(
    ("node", "inputs", "says"),
    [
        ("prompts", {"mode": "blend"}, ["mode", "blend", "auto", "swap", "refine"]),
        ("sample", {"sampler_name": "magic"}, ["sampler_name", "magic"]),
        ("sample", {"scheduler": "magic"}, ["scheduler", "magic"]),
    ],
)
def test_unknown_choices_are_named(server, node, inputs, says):
    # Some hosts leave the check of choices to the nodes.
    assert_says(reason(server, changed(PAIRED, node, **inputs)), *says)


@pytest.mark.parametrize(
    ("node", "name"),
    [("reweight", "scale"), ("tau", "cross_end"), ("tau", "fade"), ("tau", "self_resolution")],
)
def test_numbers_that_are_none_are_named(server, node, name):
    assert_says(reason(server, changed(PAIRED, node, **{name: NAN})), name, "nan")


@pytest.mark.parametrize("text", ["", "   ", "\n\t"], ids=["empty", "spaces", "lines"])
@pytest.mark.parametrize("prompt", ["source", "target"])
def test_an_empty_prompt_is_an_error_that_says_which(server, prompt, text):
    message = run_error(server, changed(PAIRED, "prompts", **{prompt: text}))
    assert_says(message, "P2PPromptPair", f"The {prompt} prompt is empty")


def test_an_empty_further_target_is_refused(server):
    graph = changed(PAIRED, "reweight", edit=["more", 0])
    graph["more"] = node("P2PAddTarget", clip=["model", 1], edit=["prompts", 0], target=" ", mode="auto")
    assert_says(refusal(server, graph), "P2PAddTarget", "target - The target prompt is empty")


@pytest.mark.parametrize(
    ("node", "inputs", "says"),
    [
        ("tau", {"words": "car 0.3"}, 'words - Cannot read the line "car 0.3"'),
        ("reweight", {"words": " "}, "words - No word"),
        ("tau", {"cross_start": -0.1}, "cross_start"),
    ],
)
def test_a_refusal_is_told_once_with_the_inputs_name(server, node, inputs, says):
    message = refusal(server, changed(PAIRED, node, **inputs))
    assert_says(message, says)
    assert message.count(f"node {node} (") == 1


@pytest.mark.parametrize("text", ["", " ", " , "])
def test_reweighting_no_word_is_refused(server, text):
    assert_says(refusal(server, changed(PAIRED, "reweight", words=text)), "word")


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"cross_start": 0.8, "cross_end": 0.5}, ["cross_end is 0.5, before cross_start at 0.8"]),
        ({"self_start": 0.6, "self_end": 0.4}, ["self_end is 0.4, before self_start at 0.6"]),
        ({"words": "car: 0.9-0.3"}, ["car: 0.9-0.3", "before"]),
    ],
)
def test_a_tau_window_that_ends_before_it_starts_is_an_error(server, inputs, says):
    assert_says(reason(server, changed(PAIRED, "tau", **inputs)), "P2PTauScheduler", *says)


def test_windows_on_one_line_are_apart_by_commas(server):
    answer = queue(server, changed(PAIRED, "tau", words="car: 0.3, cat: 0.1-0.6,"))
    assert failure(server.wait(answer.json()["prompt_id"])) is None


def test_a_positive_in_use_without_its_model_is_an_error(server):
    graph = changed(STOCK, "sample", model=["model", 0])
    assert_says(run_error(server, graph), "P2PAttentionController", "its model is not")


@pytest.mark.parametrize("line", ["car = 0.3", "car", "car: soon", "0.3", ": 0.3"])
def test_a_line_of_word_windows_that_cannot_be_read_is_refused(server, line):
    assert_says(refusal(server, changed(PAIRED, "tau", words=f"cat: 0.5\n{line}")), line, "expected")


@pytest.mark.parametrize(
    ("node", "inputs", "says"),
    [
        ("sample", {"edit": ["tau", 0]}, ["edit", "P2P_TAU", "P2P_EDIT"]),
        ("sample", {"tau": ["prompts", 0]}, ["tau", "P2P_EDIT", "P2P_TAU"]),
        ("reweight", {"edit": ["latent", 0]}, ["edit", "LATENT", "P2P_EDIT"]),
    ],
)
def test_links_of_the_wrong_type_are_refused(server, node, inputs, says):
    assert_says(refusal(server, changed(PAIRED, node, **inputs)), *says)


@pytest.mark.parametrize("node", ["prompts", "reweight", "tau", "sample", "grid"])
def test_a_missing_input_is_refused_by_name(server, node):
    graph = copy.deepcopy(PAIRED)
    name = {"prompts": "clip", "reweight": "edit", "tau": "cross_end", "sample": "tau", "grid": "images"}[
        node
    ]
    del graph[node]["inputs"][name]
    assert_says(refusal(server, graph), name, "missing")


@pytest.mark.parametrize("word", ["dog", "bicycle", "ca", "cat#2"])
def test_reweighting_a_word_that_is_not_in_the_prompt_lists_its_words(server, word):
    message = run_error(server, changed(PAIRED, "reweight", words=word))
    assert_says(message, "P2PTokenReweight", word.split("#")[0])
    if "#" not in word:
        assert_says(message, "a, cat, riding, car")


def test_a_window_for_a_word_that_is_not_in_the_prompt_lists_its_words(server):
    message = run_error(server, changed(PAIRED, "tau", words="hat: 0.3"))
    assert_says(message, "tau Scheduler, words", "hat", "a, cat, riding, car")


def test_reweighting_a_target_that_is_not_there_says_how_many_there_are(server):
    assert_says(run_error(server, changed(PAIRED, "reweight", target=2)), "P2PTokenReweight", "2", "1")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_latent_that_does_not_fit_the_branches_names_both_numbers(server, rows):
    graph = changed(changed(STOCK, "latent", batch_size=rows), "sample", latent_image=["latent", 0])
    assert_says(run_error(server, graph), "KSampler", str(rows), "2", "Paired Latent")


def test_images_that_do_not_fit_the_branches_name_both_numbers(server):
    graph = changed(changed(STOCK, "latent", batch_size=3), "decode", samples=["latent", 0])
    graph["split"] = node("P2PSplitBranches", images=["decode", 0], edit=["prompts", 0])
    graph = changed(graph, "grid", images=["split", 1])
    assert_says(run_error(server, graph), "P2PSplitBranches", "3", "2")


def test_labels_that_do_not_fit_the_images_name_both_numbers(server):
    graph = changed(PAIRED, "grid", labels="one\ntwo\nthree")
    assert_says(run_error(server, graph), "P2PComparisonGrid", "3", "1")


@pytest.mark.parametrize(
    ("graph", "user"), [(PAIRED, "sample"), (STOCK, "control")], ids=["sampler", "controller"]
)
def test_an_unsupported_model_is_named_with_what_is_supported(server, graph, user):
    graph = changed(graph, user, model=["other", 0])
    graph["other"] = node("TestCascadeModel")
    assert_says(run_error(server, graph), "StageC", "SD1", "SDXL", "Flux")


@pytest.mark.parametrize("prompt", ["source", "target"])
def test_an_empty_prompt_that_comes_by_a_link_ends_in_the_same_reason(server, prompt):
    graph = changed(PAIRED, "prompts", **{prompt: ["text", 0]})
    graph["text"] = node("PrimitiveString", value=" ")
    assert_says(run_error(server, graph), "P2PPromptPair", prompt, "empty")


def test_a_tau_window_that_comes_by_a_link_ends_in_the_same_reason(server):
    graph = changed(PAIRED, "tau", cross_start=0.5, cross_end=["number", 0])
    graph["number"] = node("PrimitiveFloat", value=0.25)
    assert_says(run_error(server, graph), "P2PTauScheduler", "0.5", "0.25", "before")


def test_the_server_still_works_after_all_of_this(server):
    answer = queue(server, changed(PAIRED, "sample", seed=2))
    assert failure(server.wait(answer.json()["prompt_id"])) is None

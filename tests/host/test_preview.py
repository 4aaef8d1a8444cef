"""The alignment that the page shows while prompts are written is the one that sampling will use."""

import json
import logging

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from p2p.attention.alignment import MODES
from p2p.nodes import PromptPair
from p2p.nodes.page import BODY, CHARACTERS, FIELDS, alignment_data, answer
from p2p.sampling.encode import start_edit
from p2p.sampling.preview import KEPT, Readers, preview
from p2p.tests.host.test_streams import MADE

MESSY = [
    "a cat riding a bicycle",
    "a (cat:1.2) riding ((a red)) bicycle, [night]",
    "1girl, red hair, looking_at_viewer, saber \\(fate\\)",
    "un chat \u00e0 v\u00e9lo, \uace0\uc591\uc774, \u732b\u3001\U0001f408",
    "don't, cat's  12345 -- ...",
    " ".join(["a big", "dog"] * 60),
]
WORDS = ["a", "cat", "red", ",", "(hat:1.3)", "BREAK", "1girl", "\n"]
PROMPTS = st.sampled_from(MESSY) | st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join)


def asked(**fields):
    return answer(json.dumps(fields).encode())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PROMPTS, PROMPTS, st.sampled_from(["auto", "swap", "refine"]))
def test_the_preview_is_what_the_node_finds(demo_model, source, target, mode):
    if not source.strip() or not target.strip():
        return
    edit = start_edit(demo_model[1], source, target, mode)
    shown = alignment_data(*edit.prompts, edit.targets[0].alignment)
    assert asked(source=source, target=target, mode=mode) == shown


@pytest.mark.parametrize("family", ["Flux", "SD3", "Qwen-Image", "Z-Image", "Lumina 2", "Wan", "HunyuanDiT"])
def test_the_preview_reads_as_the_text_encoder_of_the_last_run_does(family):
    source, target = "\u4e00\u53ea\u732b, a (big:1.2) cat", "\u4e00\u53ea\u72d7, a (small:0.5) cat"
    ran = PromptPair.execute(MADE[family](), source, target, "auto").ui["alignment"][0]
    shown = asked(source=source, target=target, encoder=ran["encoder"])
    assert {**shown, "encoder": ran["encoder"]} == ran
    assert ("plain text" in shown["description"]) == (family in ("Qwen-Image", "Z-Image"))


def test_tokenizers_of_many_text_encoders_are_not_all_kept():
    readers = Readers()
    names = [readers.remember(MADE[family]()) for family in MADE]
    assert len({*names}) > KEPT and len({id(readers.get(name)) for name in names}) == KEPT + 1
    assert [word.text for word in preview("a cat", "a dog", "auto", "no such")[0].words] == ["a", "cat"]


@pytest.mark.parametrize("host", ["this", "later"])
def test_a_textual_inversion_is_one_word_though_no_file_is_read(caplog, request, host):
    if host == "later":
        request.getfixturevalue("later_textual_inversions")
    with caplog.at_level(logging.WARNING):
        source, target, alignment = preview("a cat", "a cat, (embedding:ugly.pt, hat:1.2)", "auto")
    assert [word.text for word in target.words] == ["a", "cat", ",", "embedding:ugly.pt", ",", "hat"]
    assert [len(word.tokens) for word in target.words] == [1] * 6
    assert not caplog.records


BODIES = st.one_of(
    st.binary(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.fixed_dictionaries(
        {name: st.text() | st.integers() for name in ("source", "target")},
        optional={"mode": st.text() | st.just("swap"), "file": st.text()},
    ),
)


@settings(max_examples=150, deadline=None)
@given(BODIES)
@example({"source": "(" * CHARACTERS, "target": "a"})
@example({"source": "a", "target": "(" * CHARACTERS})
@example({"source": "\ud800", "target": "a"})
@example({"source": "embedding:", "target": "embedding:,"})
@example({"source": "embedding:../../etc/passwd", "target": "embedding:/etc/passwd"})
@example({"source": "a\0b", "target": "\u200b"})
@example({"source": "1" * CHARACTERS, "target": "2" * CHARACTERS})
@example(b"[" * BODY)
def test_every_request_is_answered_or_refused_with_a_reason(body):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    try:
        data = answer(body)
    except ValueError as reason:
        assert str(reason).strip()
    else:
        assert set(json.loads(body)) <= set(FIELDS)
        json.dumps(data, allow_nan=False)


@pytest.mark.parametrize("field", ["source", "target"])
def test_long_prompts_are_refused(field):
    texts = {"source": "a", "target": "a"}
    with pytest.raises(ValueError, match=f"{field} has 10000 characters.*{CHARACTERS}"):
        asked(**{**texts, field: "a" * 10_000})
    assert asked(**{**texts, field: "a " * (CHARACTERS // 4)})


def test_parentheses_nested_too_deeply_are_refused():
    with pytest.raises(ValueError, match="nested"):
        asked(source="(" * 1500 + "a" + ")" * 1500, target="a")


@settings(max_examples=150, deadline=None)
@given(PROMPTS.filter(str.strip), PROMPTS.filter(str.strip), st.sampled_from(MODES))
def test_the_edits_of_the_page_hold_every_word_once_under_its_kind(source, target, mode):
    data = asked(source=source, target=target, mode=mode)
    kinds = {"source": {}, "target": {}}
    for pairing in data["pairings"]:
        for side in kinds:
            kinds[side] |= dict.fromkeys(pairing[side], "swapped" if pairing["swapped"] else "shared")
    kinds["source"] |= dict.fromkeys(data["removed"], "removed")
    kinds["target"] |= dict.fromkeys(data["new"], "new")
    for side, expected in kinds.items():
        found = [(word, edit["kind"]) for edit in data["edits"] for word in edit[side]]
        assert sorted(found) == sorted(expected.items())
        assert len(found) == len(data[side]["words"])
    firsts = [edit["target"][0] for edit in data["edits"] if edit["target"]]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("a cat", "a cat", [("shared", [0, 1], [0, 1])]),
        ("big red hat", "hat", [("removed", [0, 1], []), ("shared", [2], [0])]),
        (
            "a cat with a hat on a mat",
            "a cat on a red mat",
            [
                ("shared", [0, 1], [0, 1]),
                ("removed", [2, 3, 4], []),
                ("shared", [5, 6], [2, 3]),
                ("new", [], [4]),
                ("shared", [7], [5]),
            ],
        ),
        (
            "hat, red dog, cat",
            "cat, blue cat, hat",
            [
                ("shared", [5, 1], [0, 1]),
                ("swapped", [2, 3], [2, 3]),
                ("shared", [4, 0], [4, 5]),
            ],
        ),
    ],
)
def test_the_edits_of_the_page_stand_where_the_target_has_them(source, target, expected):
    found = asked(source=source, target=target)["edits"]
    assert [(edit["kind"], [*edit["source"]], [*edit["target"]]) for edit in found] == expected


def test_words_that_only_separate_tags_are_marked():
    words = asked(source="cat,, dog\u3001 (red:1.2) !", target="a")["source"]["words"]
    assert [word["comma"] for word in words] == [word["text"][0] in ",\u3001" for word in words]
    assert sum(word["comma"] for word in words) == 2

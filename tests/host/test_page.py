"""What the page says about the nodes: tooltips, help, and both in every language."""

import json
import re
from dataclasses import make_dataclass

import pytest
from p2p.nodes import NODES, types
from p2p.tests.conftest import ROOT

LANGUAGES = ("ko", "ja", "zh")  # besides English, which the nodes themselves and web/docs/NODE.md are in
SCHEMAS = {schema.node_id: schema for schema in (node.GET_SCHEMA() for node in NODES)}
every_node = pytest.mark.parametrize("node", SCHEMAS)
every_language = pytest.mark.parametrize("language", LANGUAGES)


def read(language, name):
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


def placeholders(text):
    return sorted(re.findall(r"\{\w+\}", text))


@every_node
def test_every_input_has_a_tooltip(node):
    assert all(entry.tooltip for entry in SCHEMAS[node].inputs or [])


@every_language
def test_every_node_input_and_output_is_translated_and_nothing_else(language):
    expected = {
        node: {
            "display_name": True,
            "description": True,
            "inputs": {entry.id: {"name": True, "tooltip": True} for entry in (schema.inputs or [])},
            "outputs": {
                str(n): {"name": True, **({"tooltip": True} if entry.tooltip else {})}
                for n, entry in enumerate(schema.outputs or [])
            },
        }
        for node, schema in SCHEMAS.items()
    }
    expected = {
        node: {key: value for key, value in entry.items() if value} for node, entry in expected.items()
    }

    def shape(value):
        return {key: shape(entry) for key, entry in value.items()} if isinstance(value, dict) else bool(value)

    assert shape(read(language, "nodeDefs.json")) == expected


@every_language
def test_translated_tooltips_hold_no_sign_that_the_page_would_replace(language):
    for node, texts in read(language, "nodeDefs.json").items():
        for name, entry in texts.get("inputs", {}).items():
            assert not set("{}|@") & set(entry["tooltip"]), (node, name)


@every_language
def test_every_text_of_the_pictures_is_translated_and_nothing_else(language):
    english, translated = (read(each, "main.json")["promptToPrompt"] for each in ("en", language))
    assert translated.keys() == english.keys()
    for key, text in english.items():
        assert placeholders(translated[key]) == placeholders(text), key


def test_the_pictures_ask_for_texts_that_there_are():
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "web" / "js").glob("*.js"))
    known = read("en", "main.json")["promptToPrompt"]
    asked = set(re.findall(r'\btext\("([\w.]+)"', scripts))
    assert asked <= known.keys()
    composed = {f"{side}.{kind}" for side in ("source", "target") for kind in ("shared", "swapped")}
    composed |= {"source.removed", "target.new", "source", "target", "token", "tokens", "self", "mutual"}
    composed |= {f"{window}.{edge}" for window in ("cross", "self", "word") for edge in ("start", "end")}
    assert asked | composed == known.keys()


def help_page(node, language):
    folder = ROOT / "web" / "docs"
    return folder / f"{node}.md" if language == "en" else folder / node / f"{language}.md"


@every_node
@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_help_explains_every_input_and_shows_pictures_that_there_are(node, language):
    page = help_page(node, language)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("# ")
    missing = [entry.id for entry in SCHEMAS[node].inputs or [] if not re.search(rf"\b{entry.id}\b", text)]
    assert not missing
    for image in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
        assert (ROOT / "web" / "docs" / image).is_file(), image  # relative to it in every language


def test_help_is_of_nodes_that_there_are():
    folder = ROOT / "web" / "docs"
    pages = {path.stem for path in folder.glob("*.md")}
    assert pages == set(SCHEMAS)
    assert {path.name for path in folder.iterdir() if path.is_dir()} - {"pictures"} == set(SCHEMAS)


@pytest.mark.parametrize("words", ["prompt to prompt", "masactrl", "plug and play"])
def test_nodes_are_found_under_other_names_on_hosts_that_search_them(words):
    if not hasattr(next(iter(SCHEMAS.values())), "search_aliases"):
        pytest.skip("this host knows no other names of nodes")
    assert [node for node, schema in SCHEMAS.items() if words in schema.search_aliases]


@pytest.mark.parametrize("known", [False, True])
def test_other_names_are_given_to_hosts_that_take_them(monkeypatch, known):
    schema = make_dataclass("Schema", ["node_id", "search_aliases"] if known else ["node_id"])
    monkeypatch.setattr(types.io, "Schema", schema)
    given = schema(node_id="P2PSampler", **types.also_called("paired sampler"))
    assert not known or "paired sampler" in given.search_aliases

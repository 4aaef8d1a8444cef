"""What the Comfy Registry asks of a pack, as its `comfy node validate` and its documentation state it."""

import re

import pytest
from p2p.tests.conftest import ROOT
from PIL import Image

tomllib = pytest.importorskip("tomllib")


@pytest.fixture(scope="module")
def pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_name_is_one_that_the_registry_takes(pyproject):
    name = pyproject["project"]["name"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-_.][a-z0-9]+)*", name) and len(name) < 100
    assert "comfyui" not in name


def test_the_version_is_semantic_and_in_the_changelog(pyproject):
    version = pyproject["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{version}]" in changelog


def test_the_licence_is_a_file_of_the_pack(pyproject):
    assert (ROOT / pyproject["project"]["license"]["file"]).read_text(encoding="utf-8").strip()


def test_the_pack_installs_nothing(pyproject):
    assert pyproject["project"]["dependencies"] == []
    assert not (ROOT / "requirements.txt").exists() and not (ROOT / "install.py").exists()


def test_the_registry_is_told_what_it_is_and_for_which_comfyui(pyproject):
    comfy = pyproject["tool"]["comfy"]
    assert comfy["DisplayName"] and pyproject["project"]["description"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])


def test_who_publishes_it_is_told_together_with_its_address_or_not_at_all(pyproject):
    comfy, address = pyproject["tool"]["comfy"], pyproject["project"]["urls"].get("Repository")
    if not address:
        assert not {"PublisherId", "Icon", "Banner"} & set(comfy)
        return
    assert comfy["PublisherId"]
    raw = address.replace("https://github.com", "https://raw.githubusercontent.com")
    for key in ("Icon", "Banner"):
        assert comfy[key] == f"{raw}/main/docs/{key.lower()}.png"


def test_the_icon_is_square_and_small_and_the_banner_wide():
    icon, banner = (Image.open(ROOT / "docs" / f"{name}.png") for name in ("icon", "banner"))
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21


def test_nothing_of_the_pack_runs_code_that_the_registry_refuses():
    """Its checks forbid eval, exec and installing packages at run time."""
    rooms = ("attention", "sampling", "drawing", "nodes", "demo/loader.py", "__init__.py")
    files = [
        path for room in rooms for path in ((ROOT / room).rglob("*.py") if "." not in room else [ROOT / room])
    ]
    assert len(files) > 20
    for path in files:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<!\.)\b(eval|exec)\(|\bsubprocess\b|\bpip\b|os\.system", text), path

"""The pack as a real server presents it: its nodes, its templates."""

import pytest
from p2p.tests.conftest import ROOT
from p2p.tools.server import PACK

# Input ids in order and output types with their names, as shared workflows rely on them. Optional inputs and
# last outputs may be missing as long as the nodes that they belong to are.
INTERFACE = {
    "P2PPromptPair": ("clip source target mode", "edit:P2P_EDIT"),
    "P2PTokenReweight": ("edit words scale target", "edit:P2P_EDIT"),
    "P2PTauScheduler": (
        "cross_start cross_end self_start self_end fade self_resolution words [self_mode] [mutual_layer]",
        "tau:P2P_TAU",
    ),
    "P2PAttentionController": (
        "model edit tau [blend] [trajectory] [reuse_gb]",
        "model:MODEL positive:CONDITIONING [maps:P2P_MAPS]",
    ),
    "P2PPairedLatent": ("latent edit", "latent:LATENT"),
    "P2PSampler": (
        "model edit tau negative latent seed steps cfg sampler_name scheduler denoise "
        "[blend] [trajectory] [reuse_gb]",
        "source:LATENT targets:LATENT [maps:P2P_MAPS] [paired:LATENT]",
    ),
    "P2PSplitBranches": ("images edit", "source:IMAGE targets:IMAGE"),
    "P2PComparisonGrid": ("images [labels] columns [images_2] [images_3] [images_4]", "image:IMAGE"),
    "P2PInvert": (
        "model positive latent steps scheduler [cfg] [refinement] [reconstruction] [negative]",
        "trajectory:P2P_TRAJECTORY noise:LATENT",
    ),
    "P2PFeatureInjection": (
        "model edit feature_end attention_end [trajectory] [source_conditioning]",
        "model:MODEL positive:CONDITIONING maps:P2P_MAPS",
    ),
    "P2PSavePairs": ("edit source targets filename_prefix [instruction]", ""),
    "P2PDemoModel": ("", "model:MODEL clip:CLIP vae:VAE [picture:IMAGE]"),
}
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def nodes(server):
    return server.get("/object_info").json()


def split(described, present):
    """The names in order; those in brackets only if present."""
    return [name.strip("[]") for name in described.split() if name[0] != "[" or name.strip("[]") in present]


@pytest.mark.parametrize("node", INTERFACE)
def test_inputs_have_the_ids_that_workflows_rely_on(nodes, node):
    order = nodes[node]["input_order"]
    required, optional = order.get("required", []), order.get("optional", [])
    expected = split(INTERFACE[node][0], required + optional)
    assert required == [name for name in expected if name in required]
    assert optional == [name for name in expected if name in optional]
    assert len(expected) == len(required) + len(optional)


@pytest.mark.parametrize("node", INTERFACE)
def test_outputs_have_the_types_and_order_that_workflows_rely_on(nodes, node):
    found = [
        f"{name}:{kind}" for name, kind in zip(nodes[node]["output_name"], nodes[node]["output"], strict=True)
    ]
    assert [name.casefold() for name in found] == [
        name.casefold() for name in split(INTERFACE[node][1], found)
    ]


@pytest.mark.parametrize("node", INTERFACE)
def test_nodes_are_found_in_the_packs_category_and_explain_themselves(nodes, node):
    assert nodes[node]["category"] == PACK
    assert nodes[node]["display_name"]
    assert nodes[node]["description"]


def test_every_workflow_is_listed_as_a_template(server):
    assert sorted(server.get("/api/workflow_templates").json()[PACK]) == WORKFLOWS


@pytest.mark.parametrize("name", WORKFLOWS)
def test_templates_are_served_with_a_thumbnail(server, name):
    template = server.get(f"/api/workflow_templates/{PACK}/{name}.json")
    assert template.status_code == 200 and template.json()["nodes"]
    thumbnail = server.get(f"/api/workflow_templates/{PACK}/{name}.jpg")
    assert thumbnail.status_code == 200 and thumbnail.headers["Content-Type"] == "image/jpeg"

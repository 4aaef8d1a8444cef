"""The pack as a real server presents it: its nodes, its templates."""

import pytest
from p2p.tests.conftest import ROOT
from p2p.tests.interface import INTERFACE, interface_of
from p2p.tools.server import PACK

WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def nodes(server):
    return server.get("/object_info").json()


@pytest.mark.parametrize("node", INTERFACE)
def test_inputs_and_outputs_are_served_as_workflows_rely_on_them(nodes, node):
    assert interface_of(nodes[node]) == INTERFACE[node]


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

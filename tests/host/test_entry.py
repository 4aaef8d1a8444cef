"""The pack's entry point, as the host and scripts without a server call it."""

import json
import subprocess
import sys
from types import ModuleType

import pytest
from p2p.nodes import NODES
from p2p.nodes.page import ROUTE, register
from p2p.tests.conftest import ROOT

LOAD = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from tests.conftest import load_pack  # takes the folder off the path again
from p2p.tools.env import import_host
import_host("--cpu")
sys.modules["server"] = None  # `import server` raises
import p2p
nodes = asyncio.run(asyncio.run(p2p.comfy_entrypoint()).get_node_list())
print(json.dumps([node.GET_SCHEMA().node_id for node in nodes]))
"""


def test_the_pack_loads_where_the_hosts_server_cannot_be_imported():
    done = subprocess.run([sys.executable, "-c", LOAD, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [node.GET_SCHEMA().node_id for node in NODES]


class Routes(dict):
    def post(self, path):
        return lambda handler: self.setdefault(path, handler)


@pytest.mark.parametrize("known", ["the class", "its instance", "neither"])
def test_the_route_is_added_to_a_server_that_runs(monkeypatch, known):
    module, routes = ModuleType("server"), Routes()
    if known != "neither":
        module.PromptServer = type("PromptServer", (), {})
    if known == "its instance":
        module.PromptServer.instance = type("Server", (), {"routes": routes})
    monkeypatch.setitem(sys.modules, "server", module)
    register()
    assert list(routes) == ([ROUTE] if known == "its instance" else [])

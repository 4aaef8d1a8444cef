"""The file names of Save Pairs on the page, where patterns are replaced before a graph is queued."""

import re

import pytest
from p2p.tools.browser import open_editor

QUEUED = """async (prefix) => {
  app.graph.clear();
  const latent = LiteGraph.createNode('EmptyLatentImage');
  const save = LiteGraph.createNode('P2PSavePairs');
  app.graph.add(latent); app.graph.add(save);
  latent.title = 'Size';
  latent.widgets.find((widget) => widget.name === 'width').value = 640;
  save.widgets.find((widget) => widget.name === 'filename_prefix').value = prefix;
  const { output } = await app.graphToPrompt();
  return [output[save.id].inputs.filename_prefix, save.widgets[0].value];
}"""


@pytest.fixture(scope="module")
def editor(server):
    with open_editor(server) as editor:
        yield editor


@pytest.mark.parametrize(
    ("prefix", "queued"),
    [
        ("pairs/pair", "pairs/pair"),
        ("%date:yyyy-MM-dd%/pair", r"\d{4}-\d{2}-\d{2}/pair"),
        ("pairs/%Size.width%", "pairs/640"),
        ("%width%x%height%/%year%", "%width%x%height%/%year%"),  # the server knows these
    ],
)
def test_patterns_become_what_they_stand_for_and_stay_in_the_widget(editor, prefix, queued):
    name, widget = editor.page.evaluate(QUEUED, prefix)
    assert re.fullmatch(queued, name)
    assert widget == prefix

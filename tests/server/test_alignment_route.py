"""The route of the pack on a real server: it aligns two prompts and refuses everything else with a reason."""

import pytest
import requests

ROUTE = "/prompt-to-prompt/alignment"


@pytest.fixture(scope="module", autouse=True)
def log_before(server):
    """Lines of the log that other tests' requests left."""
    return len(server.lines)


def post(server, **options):
    return requests.post(f"{server.url}/api{ROUTE}", timeout=60, **options)


def test_two_prompts_are_aligned(server):
    answer = post(server, json={"source": "a cat", "target": "a red dog"})
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("application/json")
    assert [word["text"] for word in answer.json()["target"]["words"]] == ["a", "red", "dog"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b"[" * 60_000, "JSON"),
        (b"[]", "fields"),
        (b'{"source": "a cat"}', "target"),
        (b'{"source": "a cat", "target": ["a dog"]}', "target"),
        (b'{"source": "a cat", "target": " "}', "target prompt is empty"),
        (b'{"source": "a cat", "target": "a dog", "mode": "best"}', "mode"),
        (b'{"source": "a cat", "target": "a dog", "path": "/etc/passwd"}', "fields"),
        (b'{"source": "\\ud800", "target": "a dog"}', "source"),
        (b'{"source": "' + b"a" * 10_000 + b'", "target": "a dog"}', "10000 characters"),
        (b'{"source": "' + b"a" * 1_000_000 + b'", "target": "a dog"}', "bytes"),
    ],
)
def test_anything_else_is_refused_with_a_reason(server, body, says):
    answer = post(server, data=body)
    assert answer.status_code == 400
    assert says in answer.json()["error"]
    assert "Traceback" not in answer.text and "/" not in answer.json()["error"]


def test_other_methods_are_not_allowed(server):
    assert requests.get(f"{server.url}/api{ROUTE}", timeout=60).status_code in (404, 405)


def test_nothing_of_this_reached_the_log(server, log_before):
    assert not any("alignment" in line or "page.py" in line for line in server.lines[log_before:])

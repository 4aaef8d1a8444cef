"""docs/compatibility.md says what the tests show."""

from __future__ import annotations

from p2p.tests.compatibility import PAGE, page


def test_the_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "Run: .venv/bin/python tests/compatibility.py"

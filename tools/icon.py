"""Draws what the Comfy Registry shows: docs/icon.png from docs/icon.svg, and docs/banner.png around it.

python -m tools.icon
"""

from __future__ import annotations

import base64
from pathlib import Path

from playwright.sync_api import sync_playwright

from .browser import FLAGS
from .env import ROOT, find_browser

ICON = ROOT / "docs" / "icon.svg"
ICON_SIZE = (400, 400)  # px, the largest that the registry takes
BANNER_SIZE = (1260, 540)  # px, 21:9 as the registry shows it

ICON_PAGE = '<style>body {{ margin: 0 }} img {{ width: 100vw; display: block }}</style><img src="{icon}">'
BANNER_PAGE = """<style>
  body {{ margin: 0; height: 100vh; display: flex; align-items: center; gap: 56px; padding: 0 64px;
    box-sizing: border-box; background: #1d2430; color: #eef2f7; font: 30px/1.4 system-ui, sans-serif; }}
  h1 {{ font-size: 56px; line-height: 1.1; margin: 16px 0; white-space: nowrap; }}
  .icon {{ width: 130px; margin-left: -16px; }}
  .picture {{ height: 400px; border-radius: 14px; }}
</style>
<div><img class="icon" src="{icon}"><h1>Prompt-to-Prompt</h1>Change a word,<br>keep the picture.</div>
<img class="picture" src="{picture}">"""


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def main() -> None:
    icon = data_url(ICON, "image/svg+xml")
    picture = data_url(ROOT / "workflows" / "word_swap.jpg", "image/jpeg")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=FLAGS)
        for name, (width, height), html in (
            ("icon", ICON_SIZE, ICON_PAGE),
            ("banner", BANNER_SIZE, BANNER_PAGE),
        ):
            page = chromium.new_page(viewport={"width": width, "height": height})
            page.set_content(html.format(icon=icon, picture=picture))
            path = ICON.with_name(f"{name}.png")
            page.screenshot(path=path, omit_background=True)
            print(f"wrote {path.relative_to(ROOT)}")
        chromium.close()


if __name__ == "__main__":
    main()

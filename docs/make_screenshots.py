"""Pictures of the page for docs/ui.md, from a page that is really served. Needs playwright and Debian's chromium.

    python docs/make_screenshots.py            writes docs/images/ui-*.png, each below 150 KB
    python docs/make_screenshots.py ui-decode  only that one
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

from hasten.ui.engine import Engine
from hasten.ui.server import Address, Site
from hasten.ui.server.surroundings import prepared

IMAGES = Path(__file__).resolve().parent / "images"
MOST = 150_000
"""Bytes of a picture."""

DEMO = {"kind": "compare", "model": "tiny-video", "prompt": "a seven moving left, slowly", "recipes": ["balanced", "fast:student=false", "fastest"]}
CLIP = {"kind": "generate", "model": "tiny-video", "prompt": "a three moving up, quickly", "recipe": "balanced"}
DRAFTED = {
    "kind": "decode", "model": "tiny-lm", "prompt": "def push(self, item):\n    self.items.append(item)\n\ndef pop(self", "recipe": "look-up-or-draft:every=true",
    "length": 96,
}  # fmt: skip
OTHER = {"kind": "compare", "model": "tiny-image", "prompt": "a seven", "recipes": ["balanced"], "steps": 4}
"""In place of the page's own first comparison, where no picture shows one."""

SHOTS = {
    "ui-compare": ("Compare", DEMO, 1280, 1120, "light"), "ui-phone": ("Compare", DEMO, 390, 844, "light"),
    "ui-dark": ("Generate", CLIP, 1280, 900, "dark"), "ui-decode": ("Text", DRAFTED, 1280, 1240, "light"),
}  # fmt: skip
"""Name -> tab, what was made in it, width, height, colours."""

RESULTS = {"Compare": "#compare-player video", "Generate": "#generate-result video", "Text": "#text-result .hv-exact"}
"""Tab -> what is there when its result is."""

PATIENT = 300_000


def main() -> int:
    wanted = {name: shot for name, shot in SHOTS.items() if name in sys.argv[1:] or not sys.argv[1:]}
    chromium = shutil.which("chromium")
    if chromium is None:
        print("No chromium here. Install it: apt-get install chromium", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as home, prepared(Path(home) / "web", offline=True), Engine(home) as engine:
        made = [shot[1] for shot in wanted.values()]
        for asked in (DEMO if DEMO in made else OTHER, *(each for each in (CLIP, DRAFTED) if each in made)):
            job = engine.wait(engine.submit(asked).id, 1800)
            assert job.state == "done", job.error
        with Site(engine, Address(port=0)) as site:
            shoot(site.url, chromium, wanted)
    return 0


def shoot(url: str, chromium: str, wanted: dict[str, Any]) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (tab, _, width, height, scheme) in wanted.items():
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce")
            context.set_default_timeout(PATIENT)
            page = context.new_page()
            page.goto(url)
            page.get_by_role("tab", name=tab, exact=True).click()
            page.locator(RESULTS[tab]).first.wait_for()
            settle(page)
            save(page.screenshot(), IMAGES / f"{name}.png")
            context.close()
        browser.close()


def settle(page: Any) -> None:
    """Clips in their middle, where something is to be seen."""
    page.wait_for_timeout(3000)
    page.evaluate("document.querySelectorAll('video').forEach((clip) => { clip.pause(); clip.currentTime = clip.duration / 2; })")
    page.wait_for_timeout(1500)


def save(png: bytes, file: Path) -> None:
    """Few colours are enough for a page, and small enough for a repository."""
    picture = Image.open(io.BytesIO(png)).convert("RGB").quantize(colors=96, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    picture.save(file, optimize=True)
    size = file.stat().st_size
    assert size <= MOST, f"{file.name} has {size:,} bytes, at most {MOST:,}"
    print(f"{file.name}: {size:,} bytes")


if __name__ == "__main__":
    raise SystemExit(main())

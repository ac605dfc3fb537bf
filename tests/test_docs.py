"""The docs keep to what `docs/run_blocks.py` can check. The blocks themselves run in .ci/run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_blocks = script("run_blocks")
FILES = run_blocks.default_files()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_blocks_have_a_language_and_compile(file: Path) -> None:
    for block in run_blocks.blocks_of(file):
        assert block.language in run_blocks.CODE + run_blocks.PLAIN, f"{block}: unknown language {block.language!r}"
        if block.language == "python":
            compile(block.code, str(block), "exec")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_links_resolve(file: Path) -> None:
    for target in LINK.findall(file.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith(("http://", "https://", "mailto:")):
            continue
        linked = (file.parent / path).resolve() if path else file
        assert linked.exists(), f"{file.name} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{file.name} links to {target}; the headings there are {sorted(anchors)}"


def test_every_page_is_linked_from_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md does not link {page.name}"


def test_blocks_run_in_order_and_marks_are_honoured(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\na = 1\n```\n<!-- not run: needs a GPU -->\n```python\n1 / 0\n```\n"
        "```python\nassert a == 1\n```\n```bash\ntrue\n```\n```python\nraise ValueError('x')\n```\n"
    )
    ran, skipped, failed = run_blocks.run_file(page)
    assert (ran, skipped) == (4, 1)
    assert failed == ["page.md:15: ValueError: x"]

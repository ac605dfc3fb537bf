"""The wheel, the wheel built from the sdist, and the editable install each run from a folder of their own.

Each goes into a new virtual environment that sees this environment's dependencies through a path entry.
(A path entry added by a .pth file does not process further .pth files, so an editable hasten in this
environment cannot fill in for what a wheel lacks.)
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent

SMOKE = """
import importlib, json, pathlib, sys, tomllib
import hasten
from hasten.pipelines import tiny_models

packages = json.loads(sys.argv[1])
for name in packages:
    importlib.import_module(name)
bundled = pathlib.Path(tiny_models.__file__).parent / "bundled"
print(json.dumps({
    "origin": str(pathlib.Path(hasten.__file__).resolve()),
    "bundled": sorted(str(file.relative_to(bundled)) for file in bundled.rglob("*") if file.is_file()),
    "leaked": [name for name in ("caching", "pipelines", "samplers", "ui") if importlib.util.find_spec(name)],
}))
"""


def run(*command: str | Path, cwd: Path) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def tracked_copy(target: Path) -> Path:
    """The committed and changed files of this checkout, links as links: what a fresh clone would hold."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, listed):
        source, copy = ROOT / name, target / name
        if source.is_symlink() or source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    return target


def install(folder: Path, *what: str | Path) -> Path:
    """A virtual environment with `what` and this environment's dependencies; returns its interpreter."""
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", *what, cwd=folder.parent)
    # Only now: pip would otherwise take the hasten of this environment for an installed one.
    where = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    (Path(where) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout")
    return tracked_copy(tmp_path_factory.mktemp("clone"))


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that `python -m build` makes from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, source, cwd=folder)
    return folder


def smoke(python: Path, cwd: Path) -> dict[str, object]:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found: dict[str, object] = json.loads(run(python, "-c", SMOKE, json.dumps(packages), cwd=cwd))
    here = ROOT / "pipelines" / "bundled"
    expected = sorted(str(file.relative_to(here)) for file in here.rglob("*") if file.is_file())
    assert found["bundled"] == expected and expected, "the bundled models are not all there"
    assert found["leaked"] == []
    rows = json.loads(run(python, "-m", "hasten", "recipes", "--json", "-", cwd=cwd))["rows"]
    assert {"balanced", "fast"} <= {row["recipe"] for row in rows}
    return found


@pytest.mark.parametrize("kind", ["wheel from the tree", "wheel from the sdist", "editable"])
def test_install_runs_elsewhere(kind: str, source: Path, dist: Path, tmp_path: Path) -> None:
    what = {
        "wheel from the tree": lambda: [tracked_copy(tmp_path / "clone")],
        "wheel from the sdist": lambda: [next(dist.glob("*.whl"))],
        "editable": lambda: ["-e", source],
    }[kind]()
    python = install(tmp_path / "environment", *what)
    origin = Path(str(smoke(python, tmp_path)["origin"]))
    assert origin.is_relative_to(source if kind == "editable" else tmp_path / "environment")


def test_sdist_has_what_a_packager_needs(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "constraints.txt", "pyproject.toml"} <= names
    assert {"tests/test_layout.py", "caching/__init__.py", "hasten/__init__.py"} <= names

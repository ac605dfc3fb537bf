"""The tree, the links in hasten/ and the tables in pyproject.toml agree, and imports point one way only."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name.removeprefix("hasten."): ROOT / path for name, path in SETUPTOOLS["package-dir"].items() if "." in name}

LEVEL = {"samplers": set[str](), "caching": set[str](), "sparse_attn": set[str]()}
MAY_IMPORT = LEVEL | {
    "core": set(),
    "pipelines": set(LEVEL),
    "distill": {*LEVEL, "pipelines"},
    "ui": {*LEVEL, "pipelines", "distill"},
    "cli": {*LEVEL, "pipelines", "distill", "ui"},
}
"""Room -> the rooms it may import besides itself and hasten's core. `core` is hasten/*.py, `cli` is hasten/cli/."""

ONLY_IN = {
    "gradio": {"ui"},
    "triton": {"sparse_attn/kernels"},
    "diffusers": {"pipelines", "distill"},
    "transformers": {"pipelines", "distill"},
    "imageio": {"pipelines"},
    "av": {"pipelines"},
}
"""Third party -> the only folders that may import it. (hasten.cli asks for versions through importlib.metadata.)"""

SLOW_TO_IMPORT = {"torch", "diffusers", "transformers", "gradio", "peft", "accelerate"}


def room_files(room: str) -> list[Path]:
    if room == "core":
        # __init__ and __main__ are the public face: they name upper rooms, lazily or for type checkers only.
        return [file for file in sorted((ROOT / "hasten").glob("*.py")) if not file.stem.startswith("__")]
    return sorted((ROOT / "hasten" / "cli" if room == "cli" else FOLDERS[room]).rglob("*.py"))


def package_of(file: Path, room: str) -> str:
    """Dotted name of the package that `file` belongs to."""
    base = ROOT if room in ("core", "cli") else FOLDERS[room].parent
    parts = file.parent.relative_to(base).parts
    return ".".join(parts if parts[:1] == ("hasten",) else ("hasten", *parts))


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Every module that the code in `tree` names in an import statement or an `import_module("...")` call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (str(arg.value) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def test_every_package_is_listed() -> None:
    found = {"hasten"} | {package_of(file, "cli") for file in room_files("cli")}
    for room in FOLDERS:
        found |= {package_of(file, room) for file in room_files(room)}
    assert found == set(SETUPTOOLS["packages"]), "a package that is not listed is missing from the wheel, silently"


def test_every_package_has_a_docstring() -> None:
    for package in SETUPTOOLS["packages"]:
        file = ROOT / package.replace(".", "/") / "__init__.py"
        assert file.is_file(), f"{package} has no __init__.py"
        assert ast.get_docstring(parse(file)), f"{package}/__init__.py does not say what the folder is for"


@pytest.mark.parametrize("room", FOLDERS)
def test_link_points_at_folder(room: str) -> None:
    link = ROOT / "hasten" / room
    if not link.is_symlink() and link.is_file():
        pytest.skip("checked out without symbolic links; use an editable install")
    assert link.resolve() == FOLDERS[room].resolve()


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_down(room: str) -> None:
    for file in room_files(room):
        for name in imports(parse(file), package_of(file, room)):
            top, *rest = name.split(".")
            assert top not in FOLDERS, f"{file}: import hasten.{name}, not {name}"
            target = rest[0] if top == "hasten" and rest else ""
            if target in MAY_IMPORT and target != room:
                assert target in MAY_IMPORT[room], f"{file}: {room} may not import {name}"


@pytest.mark.parametrize("third_party", ONLY_IN)
def test_third_parties_stay_in_their_folders(third_party: str) -> None:
    allowed = [ROOT / folder for folder in ONLY_IN[third_party]]
    for room in MAY_IMPORT:
        for file in room_files(room):
            if any(file.resolve().is_relative_to(folder) for folder in allowed):
                continue
            for name in imports(parse(file), package_of(file, room)):
                assert name.split(".")[0] != third_party, f"{file}: {third_party} belongs in {ONLY_IN[third_party]}"


def test_command_line_imports_slow_packages_lazily() -> None:
    upper = {f"hasten.{room}" for room in FOLDERS}
    for file in room_files("cli"):
        for node in parse(file).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for name in imports(node, package_of(file, "cli")):
                slow = name.split(".")[0] in SLOW_TO_IMPORT or ".".join(name.split(".")[:2]) in upper
                assert not slow, f"{file}: import {name} inside the function that needs it"


def test_planted_faults_are_found() -> None:
    code = "from ..pipelines import x\nimport samplers\nimportlib.import_module('hasten.ui')\nfrom . import y"
    assert set(imports(ast.parse(code), "hasten.caching")) == {
        "hasten.pipelines", "hasten.pipelines.x", "samplers", "hasten.ui", "hasten.caching", "hasten.caching.y",
    }  # fmt: skip

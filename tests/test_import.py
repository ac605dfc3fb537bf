"""`import hasten` is cheap, and every public name is there."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FunctionType

import pytest

import hasten

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "diffusers", "transformers", "gradio", "accelerate", "peft", "numpy", "imageio", "av"}

PROBE = """
import json, sys, time
start = time.perf_counter()
import hasten
print(json.dumps([time.perf_counter() - start, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def probe() -> tuple[float, list[str]]:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, modules = json.loads(done.stdout)
    return seconds, modules


def test_import_is_cheap() -> None:
    runs = [probe() for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in runs) < 0.5
    assert HEAVY.isdisjoint(runs[0][1])


def test_all_is_sorted_and_complete() -> None:
    assert hasten.__all__ == sorted(hasten.__all__)
    assert set(hasten._HOME) | {"__version__"} == set(hasten.__all__)


@pytest.mark.parametrize("name", hasten.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(hasten, name) is not None
    assert name in dir(hasten)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'acelerate'"):
        hasten.acelerate  # noqa: B018


def test_recipe_stays_a_function_when_its_namesake_module_is_imported() -> None:
    import hasten.recipe

    assert isinstance(hasten.recipe, FunctionType)
    assert sys.modules["hasten.recipe"].Recipe is hasten.Recipe


def test_version_is_the_one_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert hasten.__version__ == project["version"]


def test_folders_do_not_leak_as_top_level_modules() -> None:
    code = "import hasten.caching, hasten.samplers, sys; print([m for m in ('caching', 'samplers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

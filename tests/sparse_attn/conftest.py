"""Tests of Triton kernels (test_kernels_*.py) run in Triton's interpreter, each file in a process of its own.

Triton decides when a kernel is defined whether it is compiled or interpreted, for a whole process, so the variable
cannot be set here: other tests of the same run compile kernels. `TRITON_INTERPRET=1 pytest FILE` runs a file directly.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = os.environ.get("TRITON_INTERPRET") == "1"
NOT_INTERPRETED = ("test_kernels_compile", "test_kernels_gpu")


class Interpreter(pytest.Item):
    """All tests of one file with one marker expression, in a process with TRITON_INTERPRET=1."""

    marks = "not slow and not gpu"

    def runtest(self) -> None:
        if importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", self.marks, str(self.path)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        root = self.config.rootpath
        done = subprocess.run(command, check=False, env=environment, cwd=root, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(done.stdout + done.stderr, pytrace=False)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"{self.path.name} in Triton's interpreter"


class Interpreted(pytest.File):
    """A file of kernel tests, as one test (and one more for its slow tests)."""

    def collect(self) -> Iterator[Interpreter]:
        yield Interpreter.from_parent(self, name="in_interpreter")
        if "mark.slow" in self.path.read_text(encoding="utf-8"):
            slow = Interpreter.from_parent(self, name="slow_in_interpreter")
            slow.marks = "slow"
            slow.add_marker("slow")
            yield slow


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> Interpreted | None:
    name = module_path.stem
    if HERE or not name.startswith("test_kernels_") or name.startswith(NOT_INTERPRETED):
        return None
    return Interpreted.from_parent(parent, path=module_path)

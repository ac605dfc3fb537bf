"""What every check of the conformance suite shares."""

from __future__ import annotations

import pytest

from tests.conformance.loop import NAMES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `name` runs on every class."""
    if "name" in metafunc.fixturenames and not any(
        "name" in str(mark.args[0]) for mark in metafunc.definition.iter_markers("parametrize")
    ):
        metafunc.parametrize("name", NAMES)

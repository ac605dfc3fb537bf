"""The contract, over every part of every family."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pipelines.decode_kv.kv_contract import FamilyContract, PolicyContract, parts, policies


class TestParts(FamilyContract):
    @pytest.fixture(params=parts())
    def part(self, request: Any) -> Any:
        return request.param


class TestPolicies(PolicyContract):
    @pytest.fixture(params=policies())
    def part(self, request: Any) -> Any:
        return request.param

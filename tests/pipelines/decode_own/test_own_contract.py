"""The contract of all drafters, for those that are made of the model itself."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from hasten.pipelines.decode_own.cascade import Cascade
from hasten.pipelines.decode_own.own_model import OwnModel
from hasten.samplers.decode.protocols import Drafter
from hasten.samplers.drafters.look_up import LookUp
from hasten.samplers.drafters_own.medusa import Medusa
from hasten.samplers.drafters_own.prompts import Prompts
from hasten.samplers.drafters_own.skip import Layers
from hasten.samplers.drafters_own.speculative_jacobi import SpeculativeJacobi
from tests.contract_draft import DraftContract
from tests.pipelines.decode_own.own_contract import heads, prompt_tokens


@cache
def folder() -> tuple[str, Any]:
    """Students that nobody trained, and what keeps their folder while the tests run."""
    kept = tempfile.TemporaryDirectory()
    prompt_tokens(heads(Path(kept.name)))
    return kept.name, kept


class TestMedusa(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return Medusa(path=folder()[0], nodes=nodes)


class TestPrompts(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return Prompts(path=folder()[0], nodes=nodes, drafts=3)


class TestOwnModel(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return OwnModel(skip=Layers(first=2), nodes=nodes)


class TestCascade(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return Cascade(first=LookUp(nodes=4, width=1), middle=OwnModel(skip=Layers(first=2)), nodes=max(2, nodes))


class TestJacobi(DraftContract):
    def make(self, nodes: int) -> Drafter:
        return SpeculativeJacobi(nodes=nodes)

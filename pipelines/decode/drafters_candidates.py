"""transformers' own candidate generators as drafters: assisted, prompt look-up, multi-token prediction, DFlash."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from hasten.errors import RefusedError
from hasten.samplers.decode.proposal import Proposal, chain, nothing
from hasten.samplers.decode.protocols import Context, Drafter, DrafterState, Facts, Outcome, Prefill


class Candidates(Drafter):
    """Chains of one of transformers' candidate generators, one generator for each row.

    which: "prompt-lookup" (its own prompt look-up), "assisted" (a small model, a whole `generate` for each proposal), "mtp" (the
    model's own multi-token prediction layers, where its checkpoint has them). model: of "assisted", a bundled name or a folder.
    `Candidates.of(make)` takes any other one, such as DFlash's. nodes: tokens of a chain. longest: tokens that prompt look-up
    compares.

    Their tokens are the most probable ones, so they are points, whatever logits come with them: verifying such a token against
    the law of those logits, as transformers does with one of its generators, gives other texts than the model's.

    Generators that read the model's hidden states take one row; they are refused for more.
    """

    kind: ClassVar[str] = "candidates"
    which: Literal["prompt-lookup", "assisted", "mtp", "given"] = "prompt-lookup"
    model: str = Field("tiny-draft", min_length=1)
    nodes: int = Field(10, ge=1)
    longest: int = Field(2, ge=1)
    _make: Any = PrivateAttr(default=None)
    _hidden: frozenset[str] = PrivateAttr(default=frozenset())

    @classmethod
    def of(cls, make: Callable[[Any, Any], Any], hidden: tuple[int, ...] = (), **settings: Any) -> Self:
        """The drafter made of any `CandidateGenerator`: make(model, generation_config) builds one for a row. hidden: indices of
        the model's `hidden_states` that it reads (of DFlash: `target_layer_ids`, each plus one)."""
        found = cls(which="given", **settings)
        found._make, found._hidden = make, frozenset(f"hidden:{index}" for index in hidden)
        return found

    @property
    def shape(self) -> Literal["tree", "chain"]:
        return "chain"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # depends on the generator
        return frozenset({"hidden:-1"}) if self.which == "mtp" else self._hidden

    def start(self, facts: Facts) -> DrafterState:
        if self.which == "given" and self._make is None:
            raise RefusedError("candidates: which='given' has no generator. Make it in Python with Candidates.of(make).")
        return _CandidatesState(self, facts)


class _CandidatesState(DrafterState):
    """generators: one for each row that was asked for drafts. hidden: what the model's layers said of tokens that the generator has
    not seen, pieces [1, n, H] by index."""

    def __init__(self, drafter: Candidates, facts: Facts) -> None:
        self.drafter, self.facts = drafter, facts
        self.config = copy.deepcopy(facts.host.generation_config)
        self.config.update(do_sample=False, max_length=1 << 30, max_new_tokens=None, min_length=0, num_return_sequences=1)
        self.generators: list[Any] = []
        self.reads = False
        self.small: Any = None
        self.hidden: dict[int, list[Tensor]] = {}
        self.last: Proposal | None = None
        self.count: list[int] = []

    def begin(self, prefill: Prefill, context: Context) -> None:
        self.generators = [None for _ in context.texts]
        if self.drafter.which == "assisted":
            self.small = self._opened()  # whether it can draft is said at once
        if self.drafter.which in ("mtp", "given"):
            self.generators = [self._made(text) for text in context.texts]
            self.reads = any(each.requires_model_outputs for each in self.generators)
        if self.reads and len(self.generators) > 1:
            raise RefusedError(
                f"{type(self.generators[0]).__name__} reads the hidden states of one text, and there are {len(self.generators)}. Generate"
                " them one by one, or draft with another recipe."
            )
        self._keep(prefill.hidden, prefill.ids.shape[1])

    def _made(self, text: list[int]) -> Any:
        from transformers.generation import candidate_generator as theirs

        host, drafter = self.facts.host, self.drafter
        if drafter.which == "prompt-lookup":
            return theirs.PromptLookupCandidateGenerator(None, drafter.nodes, drafter.longest, max_length=1 << 30)
        if drafter.which == "mtp":
            return theirs.MTPCandidateGenerator(host, self.config, {})
        if drafter.which == "given":
            return drafter._make(host, self.config)
        ids = torch.tensor([text], device=self.facts.device)
        return theirs.AssistedCandidateGenerator(ids, self.small, self.config, {"attention_mask": torch.ones_like(ids)})

    def _opened(self) -> Any:
        """The assistant; it is opened once in a session."""
        from hasten.pipelines.decode.small_drafts import check, opened

        name = f"candidates:{self.drafter.model}"
        if name not in self.facts.kept:
            self.facts.kept[name] = opened(self.drafter.model, self.facts)
        check(self.facts.kept[name], self.facts)
        return self.facts.kept[name]

    def propose(self, context: Context, nodes: int) -> Proposal:
        drafts = [
            self._row(row, text, min(nodes, room - 1)) if active else []
            for row, (text, room, active) in enumerate(zip(context.texts, context.room, context.active, strict=True))
        ]
        self.count = [len(each) for each in drafts]
        most = max(self.count)
        if not most:
            self.last = None
            return nothing(context.last)
        tokens = torch.tensor([each + [0] * (most - len(each)) for each in drafts], device=context.last.device)
        here = torch.arange(most, device=tokens.device) < torch.tensor(self.count, device=tokens.device)[:, None]
        self.last = chain(context.last, tokens, here, f"transformers-{self.drafter.which}")
        return self.last

    def _row(self, row: int, text: list[int], most: int) -> list[int]:
        if most < 1:
            return []
        generator = self.generators[row]
        if generator is None:
            generator = self.generators[row] = self._made(text)
        for name, value in (("num_assistant_tokens", most), ("num_output_tokens", most), ("main_model_max_length", len(text) + most + 1)):
            if hasattr(generator, name):
                setattr(generator, name, value)
        ids = torch.tensor([text], device=self.facts.device)
        with torch.no_grad():
            found, _ = generator.get_candidates(ids, **self._outputs(ids))
        drafts: list[int] = found[0, len(text) :].tolist()
        return drafts[:most]

    def _outputs(self, ids: Tensor) -> dict[str, Any]:
        """What transformers' loop hands to generators that read the model's outputs: all since they were last asked."""
        if not self.reads:
            return {}
        hidden = {index: torch.cat(pieces, 1) for index, pieces in self.hidden.items()}
        fresh = next(iter(hidden.values())).shape[1]
        known = {"position_ids": torch.arange(ids.shape[1], device=ids.device)[None], "attention_mask": torch.ones_like(ids)}
        outputs = SimpleNamespace(hidden_states=hidden)
        self.hidden = {}
        return {"model_kwargs": known, "model_outputs": outputs, "is_first_iteration": False, "n_last_matches": fresh - 1}

    def _keep(self, hidden: dict[str, Tensor], count: int) -> None:
        """Keep the first `count` tokens' hidden states, [1, n, H]."""
        for name, each in hidden.items() if self.reads else ():
            self.hidden.setdefault(int(name.removeprefix("hidden:")), []).append(each[:, :count])

    def observe(self, outcome: Outcome, context: Context) -> None:
        if self.reads:
            path = outcome.verdict.path.clamp(min=0)[..., None]
            read = {name: each.gather(1, path.expand(-1, -1, each.shape[-1])) for name, each in outcome.hidden.items()}
            self._keep(read, outcome.lengths[0])
        if outcome.proposal is not self.last:
            return
        for row, (text, length) in enumerate(zip(context.texts, outcome.lengths, strict=True)):
            if self.count[row] and context.active[row]:
                ids = torch.tensor([text], device=self.facts.device)
                scores = outcome.logits[row : row + 1, : self.count[row] + 1]
                self.generators[row].update_candidate_strategy(ids, scores, min(length - 1, self.count[row]))

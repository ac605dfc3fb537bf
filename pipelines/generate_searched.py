"""What `hasten generate --search` adds to a request: how many noises of each prompt are tried, and who chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hasten.errors import UsageError, nearest
from hasten.pipelines.judge import parse_prompt
from hasten.pipelines.noise_search import Searched, search_noise, steps_of, strategy
from hasten.pipelines.verifiers import VERIFIERS, Verifier, local_verifier
from hasten.samplers.noise_search import NoiseSearch


@dataclass(frozen=True, slots=True)
class NoiseChoice:
    """how: "random", "zero-order" or "paths". name: of the verifier, for the reader. candidates: the cost, in whole runs."""

    how: str
    name: str
    verifier: Verifier
    candidates: int

    @classmethod
    def named(cls, how: str, verifier: str, candidates: int) -> NoiseChoice:
        """From names. Raises `UsageError` for a search or a verifier that there is not."""
        known = NoiseSearch.members()
        if how not in known:
            raise UsageError(f"There is no search {how!r}; allowed: {', '.join(known)}.{nearest(how, known)}")
        judge = VERIFIERS[verifier] if verifier in VERIFIERS else local_verifier(verifier)
        return cls(how, verifier, judge, candidates)

    def check(self, pipe: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> None:
        """Raises `UsageError`, before any work, for a search that so few runs do not make or prompts that its verifier cannot read."""
        if self.name == "digits":
            for prompt in prompts:
                parse_prompt(prompt)
        steps = steps_of(pipe, call)
        try:
            strategy(self.how, self.candidates * steps, steps)
        except UsageError as error:
            raise UsageError(f"--candidates {self.candidates} runs of {steps} steps are {self.candidates * steps} evaluations. {error}") from None

    def best_of(self, pipe: Any, prompt: str, seed: int, call: Mapping[str, Any]) -> Searched:
        """Search for one prompt. One candidate at a time: each is then what its seed gives alone, caches and all, and the
        memory is that of one run."""
        call = {key: value for key, value in call.items() if key != "output_type"}
        return search_noise(
            pipe, prompt, self.verifier, how=self.how, budget=self.candidates * steps_of(pipe, call), seed=seed, batch=1, **call
        )  # fmt: skip

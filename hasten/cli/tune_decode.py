"""`hasten tune --budget lossless`: the fastest way of drafting for a causal language model on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.cli.output import Output
from hasten.cli.places import writable
from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.pipelines.tune.decode_result import DecodeTuned

COLUMNS = {
    "recipe": "composition", "tokens_per_forward": "tokens/forward", "drafts": "drafts/forward", "speedup_processor": "speed-up, processor",
    "speedup": "wall", "exact_match": "same text", "n": "texts", "note": "note",
}  # fmt: skip
OWN_PROMPTS = 12
"""Of each kind, where the user names none."""


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """What is tuned. prompts: file, None for code and prose of our own. call: max_new_tokens and do_sample. recipes: drafts
    that are tried besides, as `hasten bench decode` names them. unfit: options that have no meaning here, by name; None and empty ones were not given."""

    model: str
    seconds: float
    out: Path
    prompts: Path | None
    call: Mapping[str, Any]
    batch: int
    recipes: Sequence[str]
    device: str | None
    dtype: str | None
    unfit: Mapping[str, Any]
    keep: bool = True

    def run(self, output: Output) -> DecodeTuned:
        """Check, open the model, search, and show what was found."""
        from hasten.pipelines.bench.decode_ways import way
        from hasten.pipelines.loading import silence
        from hasten.pipelines.text_models.loading import open_text
        from hasten.pipelines.tune.decode_run import DecodeJob, tune_decode

        self._check()
        silence()
        with writable(self.out.absolute().parent):
            model, tokenizer = open_text(self.model, None, self.device, self.dtype)
            new, sampled = int(self.call.get("max_new_tokens", 64)), bool(self.call.get("do_sample", False))
            job = DecodeJob(self._rows(tokenizer), self.seconds, self.batch, new, sampled, [way(each).named() for each in self.recipes])
            found = tune_decode(model, tokenizer, job, name=self.model, out=self.out, keep=self.keep, say=output.note)
        for where, title in (("tuning", "On the tuning prompts"), ("held out", "On held-out prompts")):
            if part := [row for row in found.rows() if row["where"] == where]:
                output.say(f"\n{title}")
                output.table(part, COLUMNS)
        output.say("")
        for sentence in found.sentences():
            output.say(sentence)
        if found.recipe is not None:
            output.say(f"The recipe is in {self.out}: hasten.accelerate(model, {str(self.out)!r})")
        output.finish(
            found.rows(), budget="lossless", best=found.best and found.best.name, spent=found.spent, notes=found.why, clock=found.clock,
            given_up=[{"recipe": name, "why": why} for name, why in found.given_up], recipe=found.recipe and found.recipe.model_dump(),
        )  # fmt: skip
        return found

    def _check(self) -> None:
        for name, value in self.unfit.items():
            if value:
                raise UsageError(f"--{name} has no meaning for --budget lossless, which is for causal language models. Leave it out.")
        if others := sorted(set(self.call) - {"max_new_tokens", "do_sample"}):
            raise UsageError(f"--call {others[0]}: --budget lossless knows max_new_tokens and do_sample. Leave the others out.")

    def _rows(self, tokenizer: Any) -> list[list[int]]:
        """The prompts, kinds of our own mixed."""
        from hasten.cli.prompts import collect
        from hasten.pipelines.bench import decode_texts

        if self.prompts is not None:
            return decode_texts.of_files(tokenizer, [item.text for item in collect([], self.prompts, 0)]).prompts
        kinds = [make(tokenizer, OWN_PROMPTS).prompts for make in (decode_texts.code, decode_texts.prose)]
        # by pairs, so that both kinds are among those that are held out
        return [row for first in range(0, OWN_PROMPTS, 2) for kind in kinds for row in kind[first : first + 2]]

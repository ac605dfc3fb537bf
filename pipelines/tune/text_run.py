"""`hasten.tune` for texts: from a masked language model, some prompts, a budget and some minutes to a recipe that was checked."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hasten.atomic import atomic_write
from hasten.budget import Budget
from hasten.errors import HastenError, RefusedError, UsageError
from hasten.pipelines import list_tasks, tiny_models
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.pipelines.text.arguments import ALIASES, whole
from hasten.pipelines.text.diffusion import TextDiffusionPipeline
from hasten.pipelines.tune import fingerprint, kept
from hasten.pipelines.tune.text_goal import TextGoal
from hasten.pipelines.tune.text_result import TextTuned, text_stamped
from hasten.pipelines.tune.text_space import TextSpace
from hasten.pipelines.tune.text_study import TextStudy, TextTrial
from hasten.pipelines.tune.text_trials import Right, TextBench
from hasten.pipelines.tune.text_verify import (
    TextVerdict,
    is_fewer,
    is_single,
    losses,
    text_finalists,
    text_verified,
)

SEARCHING = 0.6
"""Share of the time that goes into sequential decoding and trials; the rest belongs to held-out prompts and controls."""

VERIFYING = 0.95
"""Share of the time after which nothing new begins."""

TUNING, HELD = 0.12, 0.2
"""Shares of the time for sequential decoding of tuning prompts, at most `MOST` of them, and of held-out ones."""

MOST, FEWEST = 96, 4
"""Tuning prompts at most, and prompts of each kind at least."""

LOOKS, MORE = 3, 2
"""Trials of a kind that meet the held-out prompts as a control, and further ones beside the first that keeps the budget: what was
faster on the tuning prompts need not be."""

CALL = ("max_new_tokens", "cfg_scale", "eos_penalty", "min_new_tokens")
"""Arguments of `generate` that say what is to be written; the others say how, which is what is searched."""


@dataclass(frozen=True, slots=True)
class TextJob:
    """What is tuned for what. prompts: every third tunes, the others are held out. call: of `CALL`. batch: texts at once."""

    goal: TextGoal
    prompts: tuple[str, ...]
    seconds: float
    call: dict[str, Any] = field(default_factory=dict)
    batch: int = 8
    model: str = ""
    right: Right | None = None
    seed: int = 0

    def split(self, tuning: int, held: int) -> tuple[list[str], list[str]]:
        """(tuning prompts, held-out ones), at most so many of each."""
        others = [prompt for number, prompt in enumerate(self.prompts) if number % 3]
        return list(self.prompts[::3][:tuning]), others[:held]


def tune_text(
    pipe: TextDiffusionPipeline, prompts: Sequence[str | tuple[str, int]], budget: str | Budget, *, seconds: float = 600.0,
    study: str | Path = "hasten-study", out: str | Path | None = None, model: str = "", call: dict[str, Any] | None = None,
    batch: int = 8, right: Right | None = None, seed: int = 0, keep: bool = True, say: Any = lambda text: None,
) -> TextTuned:  # fmt: skip
    """Search the fastest composition of commit rule, blocks, end, cache, reviser and drafts that keeps `budget` on `prompts`.

    prompts: at least twelve different ones, better hundreds: every third tunes, the others are held out and decide. Seeds are
    not used: the most probable tokens are written. budget: `"exact_match>=0.99"` or `"99%"`: so many texts must be those of
    sequential decoding, token by token. call: `CALL`, those of a bundled model by themselves. batch: texts at once, which is
    what speed is measured with. right: (prompt, answer) -> is it right?, for reporting accuracy; list tasks know by themselves.
    The rest as in `hasten.tune`.

    Raises `UsageError` for what cannot be searched, `ResumeError` where the folder has a study of something else.
    """
    if not isinstance(pipe, TextDiffusionPipeline):
        raise RefusedError(
            f"Texts are tuned on a TextDiffusionPipeline, got {type(pipe).__name__}. For a masked language model that is loaded, pass"
            " hasten.TextDiffusionPipeline(model, tokenizer)."
        )
    texts = tuple(dict.fromkeys(prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts))
    if len(texts) < 3 * FEWEST:
        raise UsageError(f"Tuning texts needs at least {3 * FEWEST} different prompts, two in three of them held out, got {len(texts)}.")
    if batch < 1:
        raise UsageError(f"batch is a number of texts, got {batch}.")
    job = TextJob(TextGoal.read(budget), texts, seconds, _call(pipe, call or {}), batch, model, right or _list_tasks(texts), seed)
    found = TextTuning(pipe, job, Path(study), say).run()
    if out is not None and found.recipe is not None:
        atomic_write(Path(out), found.recipe.to_yaml().encode())
        say(f"The recipe is in {out}.")
    if keep and found.recipe is not None:
        say(kept.keep_for_budgets(found.recipe))
    return found


class TextTuning:
    """One tuning from its first text to the stamp."""

    def __init__(self, pipe: TextDiffusionPipeline, job: TextJob, folder: Path, say: Any) -> None:
        self.pipe, self.job, self.say = pipe, job, say
        self.began = time.monotonic()
        self.known = fingerprint.of_text(pipe.model, pipe.tokenizer) | {"length": job.call["max_new_tokens"]}
        identity = self.known | {
            "model": job.model, "call": job.call, "prompts": list(job.prompts), "budget": str(job.goal), "batch": job.batch,
        }  # fmt: skip
        self.study = TextStudy(folder, job.goal, identity, job.seed)

    def run(self) -> TextTuned:
        """Search, then let held-out prompts decide."""
        job = self.job
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a trial has to say is in its outcome
            try:
                tuning, held = job.split(*self._affordable())
                self.say(f"Sequential decoding of {len(tuning)} tuning prompts; {len(held)} others are held out.")
                bench = TextBench(self.pipe, tuning, job.call, job.batch, job.right)
                self.study.search(bench, self._space(), SEARCHING * job.seconds - self._used(), self._told)
            finally:
                self.study.close()
            found = TextTuned(job.goal, self.study.trials(), self.study.given_up(), plain_seconds=bench.seconds)
            self._verify(found, held, bench)
        found.spent = self._used()
        return found

    def _affordable(self) -> tuple[int, int]:
        """Tuning and held-out prompts for whose sequential decoding the time is enough. Raises `UsageError` where it is not
        enough for the fewest."""
        if "held" in self.study.study.user_attrs:  # an earlier process has settled on them
            return self.study.settled("tuning", FEWEST), self.study.settled("held", FEWEST)
        first = TextBench(self.pipe, self.job.prompts[: self.job.batch], self.job.call, self.job.batch)
        began = time.monotonic()
        first.floor()
        each = (time.monotonic() - began) / len(first.prompts)
        if 2 * FEWEST * each > self.job.seconds / 4:
            raise UsageError(
                f"{self.job.seconds:.0f} s are too short: sequential decoding of one text takes {each:.1f} s here, and"
                f" {2 * FEWEST} of them may take a quarter of the time. Give at least {8 * FEWEST * each:.0f} s."
            )
        counts = [max(FEWEST, int(share * self.job.seconds / each)) for share in (TUNING, HELD)]
        return self.study.settled("tuning", min(MOST, counts[0])), self.study.settled("held", counts[1])

    def _space(self) -> TextSpace:
        host = self.pipe.host
        return TextSpace(self.known["length"], host.facts.block, host.caches, self._fits("learned-filter"))

    def _fits(self, name: str) -> bool:
        try:
            self.pipe.fitted(find_recipe(name))
        except HastenError:
            return False
        return True

    def _used(self) -> float:
        return time.monotonic() - self.began

    def _told(self, trial: TextTrial) -> None:
        measured = trial.measured
        what = f"{measured.speedup:.2f}x, {measured.work:.0%} of the work, {measured.same} of {len(measured.outcomes)} texts" if measured.outcomes else ""
        self.say(f"{trial.number + 1}. {measured.name}: {'; '.join(part for part in (what, measured.why) if part)}")

    # --- at the end -------------------------------------------------------------------------------

    def _verify(self, found: TextTuned, prompts: Sequence[str], tuning: TextBench) -> None:
        goal, job = found.goal, self.job
        ready = text_finalists(found.trials, goal)
        if not ready:
            found.why.append(f"Nothing that was tried is faster and keeps {goal} on the tuning prompts. Allow more time, or a wider budget.")
            return
        self.say(f"{len(ready)} compositions keep {goal} on the tuning prompts; the fastest meet {len(prompts)} others.")
        held = TextBench(self.pipe, prompts, job.call, job.batch, job.right)
        found.verdicts = text_verified(held, ready, goal, self._over, 1, self._verdict)
        found.control = self._control(found, held, "fewer_steps", [trial for trial in ready if is_fewer(trial.recipe)])
        found.single = self._control(found, held, "single", [trial for trial in ready if is_single(trial.recipe)])
        met = {verdict.trial.number for verdict in found.verdicts}
        others = [trial for trial in ready if trial.number not in met][: 0 if self._over() else MORE]
        found.verdicts += text_verified(held, others, goal, self._over, MORE, self._verdict, len(met))
        holding = [verdict for verdict in found.verdicts if verdict.holds(goal)]
        if not holding:
            found.why.append(f"No composition kept {goal} on {len(prompts)} held-out prompts in time. Allow more time, or a wider budget.")
            return
        found.best = max(holding, key=lambda verdict: verdict.measured.speedup)
        if not self._over():
            found.floor = held.floor()
        found.interactions = losses(tuning, found.best.trial.recipe, self._over)
        found.recipe = text_stamped(found.best, goal, self.known, job.model)

    def _control(self, found: TextTuned, held: TextBench, role: str, trials: Sequence[TextTrial]) -> TextVerdict | None:
        """The fastest of at most `LOOKS` `trials` that keeps the budget; its verdict is one of `found.verdicts`."""
        known = {verdict.trial.number: verdict for verdict in found.verdicts}
        for trial in trials[:LOOKS]:
            if trial.number not in known:
                if self._over():
                    found.late[role] = f"{trial.measured.name}, {trial.measured.speedup:.2f}x on the tuning prompts"
                    return None
                found.verdicts += text_verified(held, [trial], found.goal, self._over, 1, self._verdict, len(found.verdicts))
                known[trial.number] = found.verdicts[-1]
            if known[trial.number].holds(found.goal):
                return known[trial.number]
        return None

    def _over(self) -> bool:
        return self._used() > VERIFYING * self.job.seconds

    def _verdict(self, verdict: TextVerdict) -> None:
        measured = verdict.measured
        speed = f"{measured.speedup:.2f}x, " if measured.outcomes else ""
        self.say(f"Held out: {measured.name}: {speed}{measured.same} of {len(measured.outcomes)} texts{'; ' if measured.why else ''}{measured.why}")


def _call(pipe: TextDiffusionPipeline, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments of every generation, with what a bundled model is usually asked for."""
    found = tiny_models.call_defaults(pipe.model) | {ALIASES.get(name, name): value for name, value in given.items()}
    if others := sorted(set(found) - set(CALL)):
        raise UsageError(f"{', '.join(others)}: tuning finds out how texts are written; of a call it takes {', '.join(CALL)} alone.")
    if found.get("max_new_tokens") is None:
        raise UsageError("Say how long texts get: call={'max_new_tokens': 128}, or --call max_new_tokens=128.")
    whole("max_new_tokens", found["max_new_tokens"], 1, pipe.limits.max_tokens)
    return found | {"temperature": 0.0}


def _list_tasks(prompts: Sequence[str]) -> Right | None:
    """What knows right answers, where all prompts are questions of the list tasks."""
    asked = {prompt: list_tasks.read(prompt) for prompt in prompts}
    if None in asked.values():
        return None
    return lambda prompt, answer: bool((question := asked[prompt]) and question.right(answer))

"""`hasten generate --search`: what the options mean, and what the reader is told of a search over starting noises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError

if TYPE_CHECKING:
    from hasten.cli.output import Output
    from hasten.pipelines.generate import Result
    from hasten.pipelines.generate_searched import NoiseChoice
    from hasten.pipelines.session import Session
    from hasten.recipe import Recipe

COLUMNS = {"number": "candidate", "seed": "seed", "parent": "from", "level": "looked at", "score": "score", "best": "best"}


def noise_choice(model: str, how: str | None, verifier: str | None, candidates: int) -> NoiseChoice | None:
    """What the options ask for; None without `--search`. Raises `UsageError` for options that do not go together."""
    if how is None:
        if verifier is not None:
            raise UsageError(f"--verifier {verifier} chooses between noises, and none are searched. Add --search random.")
        return None
    from hasten.pipelines.generate_searched import NoiseChoice
    from hasten.pipelines.tiny_models import names

    if verifier is None and model not in names():
        raise UsageError(
            "Say who chooses: --verifier sharpness, or a function of (frames, prompt) of your own as --verifier module:function."
            " The judge of handwritten digits is the default for bundled models only."
        )
    return NoiseChoice.named(how, verifier or "digits", candidates)


def default_recipe(choice: NoiseChoice | None) -> str:
    """Paths walk with a solver of their own, in parts that a recipe takes for whole runs."""
    return "plain" if choice is not None and choice.how == "paths" else "balanced"


def check_recipe(choice: NoiseChoice | None, recipe: Recipe) -> None:
    """Raises `UsageError` where the search leaves the recipe nothing to act on."""
    if choice is not None and choice.how == "paths" and recipe.axes:
        raise UsageError(
            f"--search paths walks with a solver of its own, in parts, so recipe {recipe.name or 'custom'} would take parts for"
            " whole runs. Leave --recipe out, or search random or zero-order."
        )


def searched_row(choice: NoiseChoice, result: Result, session: Session) -> dict[str, Any]:
    """What the search came to: each candidate's score, and what all of them cost together."""
    assert result.searched is not None
    found, report = result.searched, session.report()
    return {
        "how": choice.how,
        "verifier": choice.name,
        "best": found.best.number,
        "score": found.best.score,
        "steps": found.nfe,
        "nfe": math.fsum(report.of(run).nfe for run in result.runs),
        "runs": len(result.runs),
        "candidates": [
            {"number": one.number, "seed": one.seed, "parent": one.parent, "level": one.level, "score": one.score}
            for one in found.candidates
        ],
    }


def say_search(out: Output, row: dict[str, Any], session: Session) -> None:
    """The same for people, and one line of it in the report."""
    candidates = row["candidates"]
    out.table([one | {"best": "best" if one["number"] == row["best"] else None} for one in candidates], COLUMNS)
    scores = sorted((one["score"] for one in candidates), reverse=True)
    words = (
        f"{row['how']} over {len(candidates)} candidates by {row['verifier']}: best {scores[0]:.4g}, median"
        f" {scores[len(scores) // 2]:.4g}, first {candidates[0]['score']:.4g}; {row['nfe']:.4g} evaluations of the network in all"
    )
    session.trace.facts["searched"] = words
    out.say(f"Searched {words}.")

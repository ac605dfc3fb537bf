"""`hasten recipes`: what there is, from which paper, with which knobs, and where it was measured."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.output import JsonOption, Output

if TYPE_CHECKING:
    from hasten.pipelines.recipes import Entry
    from hasten.recipe import Recipe

COLUMNS = {
    "recipe": "recipe",
    "acts_on": "acts on",
    "parts": "parts",
    "status": "status",
    "paper": "paper",
    "summary": "what it does",
}
MEASURED = {
    "model": "model",
    "recipe": "recipe",
    "workload": "on",
    "hardware": "hardware",
    "speedup": "speed-up",
    "psnr_median": "PSNR dB",
    "exact_match": "exact match",
}


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="One recipe, or a YAML file, in full.")
    ] = None,
    json: JsonOption = None,
) -> None:
    """List the recipes, or show one: what it acts on, paper, parts, knobs, YAML, status, where measured."""
    out = Output("recipes", json)
    with out.open():
        from hasten.pipelines.recipes import catalogue
        from hasten.pipelines.recipes import recipe as find_recipe

        entries = {entry.name: entry for entry in catalogue()}
        if name is None:
            rows = [_row(entry.recipe, entry) for entry in entries.values()]
            out.table(rows, COLUMNS)
            out.say(
                "\nOne of them in full: hasten recipes NAME. Several together: NAME+NAME, on different axes."
            )
        else:
            chosen = find_recipe(name)
            entry = entries.get(chosen.name)
            rows = [_row(chosen, entry) | {"yaml": chosen.to_yaml(), "measured": measured(chosen.name)}]
            _show(out, chosen, entry, rows[0]["measured"])
        out.finish(rows)


def _row(recipe: Recipe, entry: Entry | None) -> dict[str, Any]:
    from hasten.pipelines.recipes import acts_on

    return {
        "recipe": recipe.name,
        "acts_on": acts_on(recipe),
        "paper": recipe.paper,
        "parts": parts(recipe),
        "status": entry.status if entry else "your own",
        "summary": entry.summary if entry else "",
        "knobs": list(entry.knobs) if entry else [],
    }


def parts(recipe: Recipe) -> str:
    """The axes and their parts in a few words: `reuse: network, rule drift, forecast hold`."""
    from hasten.part import Part

    words = []
    for axis, part in recipe.axes.items():
        inner = {field: getattr(part, field) for field in type(part).model_fields}
        named = [f"{field} {value.kind}" for field, value in inner.items() if isinstance(value, Part)]
        words.append(f"{axis}: {', '.join([part.kind, *named])}")
    return "; ".join(words) or "none"


def _show(out: Output, recipe: Recipe, entry: Entry | None, where: list[dict[str, Any]]) -> None:
    from hasten.pipelines.recipes import acts_on

    out.say(recipe.name or "(unnamed)")
    if entry is not None:
        out.say(f"  {entry.summary}")
    facts = {
        "paper": recipe.paper or "none",
        "acts on": ", ".join(recipe.models) or acts_on(recipe),
        "parts": parts(recipe),
        "status": entry.status if entry else "your own",
        "knobs": _knobs(entry),
        "try": _how_to_try(recipe, acts_on(recipe)),
    }
    for key, value in facts.items():
        out.say(f"  {key + ':':9}{value}")
    if where:
        out.say("  measured:")
        out.table(where, MEASURED)
    else:
        out.say("  measured: not yet")
    out.say("\nAs YAML, for --recipe FILE:\n")
    out.say(recipe.to_yaml())


def _how_to_try(recipe: Recipe, on: str) -> str:
    name = recipe.name or "FILE"
    if on == "language models":
        return f'hasten.accelerate(model, "{name}") in Python'
    return f"hasten {'generate' if on == 'text diffusion' else 'compare'} MODEL --prompt TEXT --recipe {name}"


def _knobs(entry: Entry | None) -> str:
    if entry is None or not entry.knobs:
        return "none; change parts with --set"
    return f"{', '.join(entry.knobs)}; set them as in {entry.name}:{entry.knobs[0]}"


def measured(name: str) -> list[dict[str, Any]]:
    """Timed rows of the repository's benchmark results that are about the recipe `name`, or, without any, about it together
    with others; none in an installation."""
    import hasten

    assert hasten.__file__ is not None
    folder = Path(hasten.__file__).parent.parent / "benchmarks" / "results"
    alone: list[dict[str, Any]] = []
    together: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*/*.json")):
        try:
            rows = json_module.loads(file.read_text(encoding="utf-8")).get("rows", [])
        except (OSError, ValueError, AttributeError):
            continue
        for row in rows:
            if not isinstance(row, dict) or row.get("speedup") is None or row.get("control") == "oracle":
                continue
            parts = [part.strip().partition(":")[0] for part in str(row.get("recipe", "")).split("+")]
            if name in parts:
                (alone if parts == [name] else together).append({"hardware": file.parent.name, "file": file.name} | row)
    return alone or together

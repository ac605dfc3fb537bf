"""A request as Python that runs as it stands, and as YAML that the command line takes and the page restores from."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hasten.errors import UsageError
from hasten.ui.engine.models import Card, Models
from hasten.ui.engine.outputs import Outputs
from hasten.ui.engine.recipes import FOLDER, TRAINED, absolute, named, recipe_of
from hasten.ui.engine.request import (
    Compare,
    Decode,
    Generate,
    Picture,
    Request,
    Shape,
    Text,
    Train,
    Tune,
    to_json,
)


def python(ask: Request, models: Models, outputs: Outputs) -> str:
    """A program that makes the same result."""
    card = models.card(ask.model)
    makes = {"generate": _generate, "compare": _compare, "text": _text, "decode": _decode, "tune": _tune, "train": _train}
    if ask.kind not in makes:
        raise UsageError(f"There is nothing to export of a job of kind {ask.kind}.")
    body: list[str] = makes[ask.kind](ask, card, models, outputs)  # type: ignore[operator]
    return "\n".join([f'"""Written by hasten {_version()}: {ask.kind} with {card.id}."""', "", *body, ""])


def yaml(ask: Request, models: Models, outputs: Outputs) -> str:
    """The recipe, which `--recipe FILE` takes; in its head the command, and the whole request for `restore`."""
    head = [f"# hasten {_version()}", f"# {command(ask, models)}", f"# hasten-request: {_ascii(ask)}"]
    if isinstance(ask, Generate | Text | Decode):
        return "\n".join(head) + "\n" + absolute(recipe_of(ask.recipe, outputs.trained(), models.drafting())).to_yaml()
    if isinstance(ask, Compare):
        parts = [absolute(recipe_of(text, outputs.trained())).to_yaml() for text in ask.recipes]
        return "\n".join(head) + "\n" + parts[0] + "".join(_commented(part) for part in parts[1:])
    return "\n".join(head) + "\nversion: 1\n"


def command(ask: Request, models: Models) -> str:
    """The command line that does the same with the YAML in recipe.yaml."""
    if isinstance(ask, Decode):
        return "hasten jobs submit recipe.yaml --wait"
    model = ask.model if models.card(ask.model).where != "folder" else models.source(ask.model)
    words = ["hasten", {"text": "generate"}.get(ask.kind, ask.kind), model]
    if isinstance(ask, Generate | Compare | Text):
        words += ["--prompt", ask.prompt]
    if isinstance(ask, Shape):
        shape = {"steps": ask.steps, "guidance": ask.guidance, "width": ask.width, "height": ask.height, "frames": ask.frames}
        words += [word for key, value in shape.items() if value is not None for word in (f"--{key}", str(value))]
    if isinstance(ask, Generate | Compare | Text | Tune):
        words += ["--seed", str(ask.seed)]
    if isinstance(ask, Picture) and ask.negative and ask.kind == "generate":
        words += ["--negative-prompt", ask.negative]
    if isinstance(ask, Text) and ask.length is not None:
        words += ["--call", f"max_new_tokens={ask.length}"]
    if isinstance(ask, Generate | Text | Compare):
        words += ["--recipe", "recipe.yaml"]
    if isinstance(ask, Tune):
        words = ["hasten", "tune", "--model", model, "--prompts", "prompts.txt", "--budget", ask.budget, "--time", f"{ask.seconds:.0f}s", *words[3:]]
    if isinstance(ask, Train):
        words = ["hasten", "train", ask.method, "--model", model, "--out", "student"]
    return shlex.join(words).replace("\n", " ")


# --- the programs -------------------------------------------------------------------------------------------


def _generate(ask: Generate, card: Card, models: Models, outputs: Outputs) -> list[str]:
    recipe, recipe_lines = _recipe(ask.recipe, outputs)
    return [
        "import torch", "", "import hasten", *_recipe_imports([ask.recipe]), "from hasten.pipelines import media",
        "from hasten.pipelines.generate import Prompt, Request, frames_of, plan", "",
        *recipe_lines,
        *_opened(ask, card, models),
        *_tiled(ask),
        f"prompt = {ask.prompt!r}",
        f"call = plan(pipe, Request((Prompt(prompt, {ask.seed}),){_shape(ask)}))",
        f"with hasten.accelerate(pipe, {recipe}) as run:",
        f'    output = pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed({ask.seed}), **call)',
        "print(run.report())",
        "frames = frames_of(output)  # float32 (frames, height, width, channels) in [0, 1]",
        'media.save(frames, "result.mp4" if len(frames) > 1 else "result.png", fps=8)',
    ]  # fmt: skip


def _compare(ask: Compare, card: Card, models: Models, outputs: Outputs) -> list[str]:
    made = [_recipe(text, outputs, f"recipe_{number}") for number, text in enumerate(ask.recipes, 1)]
    return [
        "import hasten", *_recipe_imports(ask.recipes), "from hasten.pipelines.generate import Prompt, Request, plan", "",
        *(line for _, lines in made for line in lines),
        *_opened(ask, card, models),
        *_tiled(ask),
        f"prompt = {ask.prompt!r}",
        f"call = plan(pipe, Request((Prompt(prompt, {ask.seed}),){_shape(ask)}))",
        'call.pop("output_type")  # compare sets it itself',
        f"rows = hasten.compare(pipe, [{', '.join(name for name, _ in made)}], [prompt], [{ask.seed}], repeats={ask.repeats}, **call)",
        "for row in rows:",
        "    print(row)",
    ]  # fmt: skip


def _text(ask: Text, card: Card, models: Models, outputs: Outputs) -> list[str]:
    recipe, recipe_lines = _recipe(ask.recipe, outputs)
    length = ask.length or card.call.get("max_new_tokens")
    return [
        "import torch", "", "import hasten", *_recipe_imports([ask.recipe]), "",
        *recipe_lines,
        f"pipe = hasten.load({_place(card, models)!r})",
        f"with hasten.accelerate(pipe, {recipe}) as run:",
        f"    made = pipe.generate(prompts={ask.prompt!r}, generator=torch.Generator().manual_seed({ask.seed}),",
        f"                         {f'max_new_tokens={length}' if length else ''})",
        "print(made.texts[0])",
        "print(run.report())",
    ]  # fmt: skip


def _decode(ask: Decode, card: Card, models: Models, outputs: Outputs) -> list[str]:
    recipe, recipe_lines = _recipe(ask.recipe, outputs, folders=models.drafting())
    drawn = f"do_sample=True, temperature={ask.temperature!r}, top_k={ask.top_k or 0}" if ask.temperature else "do_sample=False"
    drafted = [
        f"with hasten.accelerate(model, {recipe}) as run:", "    made = model.generate(**call)", "print(run.report())",
    ]  # fmt: skip
    compared = ["print('the same tokens as plain decoding:', made.equal(plain))"]
    return [
        "import torch", "", "import hasten", *_recipe_imports([ask.recipe], FOLDER in ask.recipe),
        "from hasten.pipelines.text_models.loading import open_text", "",
        *recipe_lines,
        f"model, tokenizer = open_text({_place(card, models)!r})",
        f"inputs = tokenizer([{ask.prompt!r}], return_tensors='pt').to(model.device)",
        "call = {name: inputs[name] for name in ('input_ids', 'attention_mask')}",
        f"call |= dict(max_new_tokens={ask.length}, {drawn})",
        f"torch.manual_seed({ask.seed})",
        *(["made = model.generate(**call)"] if ask.recipe == "plain" else ["plain = model.generate(**call)", *drafted, *compared] if not ask.temperature else drafted),
        "print(tokenizer.decode(made[0]))",
    ]  # fmt: skip


def _tune(ask: Tune, card: Card, models: Models, outputs: Outputs) -> list[str]:
    shape = {"num_inference_steps": ask.steps, "guidance_scale": ask.guidance, "width": ask.width, "height": ask.height, "num_frames": ask.frames}
    return [
        "import hasten", "",
        *_opened(ask, card, models),
        f"prompts = {list(ask.prompts)!r}",
        f"found = hasten.tune(pipe, prompts, {ask.budget!r}, seconds={ask.seconds!r}, out='recipe.yaml', model={ask.model!r},",
        f"                    call={ {key: value for key, value in shape.items() if value is not None}!r}, seed={ask.seed}, say=print)",
        "for sentence in found.sentences():",
        "    print(sentence)",
    ]  # fmt: skip


def _train(ask: Train, card: Card, models: Models, outputs: Outputs) -> list[str]:
    given: dict[str, Any] = {"model": _place(card, models), **ask.settings}
    if ask.prompts:
        given["data.prompts"] = list(ask.prompts)
    return [
        "from pathlib import Path", "", "from hasten.distill.train_config import load_config", "from hasten.distill.training import train", "",
        f"config = load_config({ask.method!r}, None, {given!r})",
        "train(config, Path('student'), say=print)",
    ]  # fmt: skip


# --- their parts --------------------------------------------------------------------------------------------


def _opened(ask: Picture | Tune, card: Card, models: Models) -> list[str]:
    """The line that opens the pipeline."""
    lora = f", lora={str(models.lora(ask.lora))!r}" if isinstance(ask, Picture) and ask.lora is not None else ""
    if card.where == "bundled" and not lora:
        return [f"pipe = hasten.load({card.id!r})"]
    return ["from hasten.pipelines.loading import open_pipeline", "", f"pipe = open_pipeline({_place(card, models)!r}{lora}, quiet=True)"]


def _tiled(ask: Picture) -> list[str]:
    return ["pipe.vae.enable_tiling()"] if ask.decoding == "tiles" else []


def _place(card: Card, models: Models) -> str:
    """What Python opens: a bundled name, a folder, or the hub's id of a remote one."""
    return models.source(card.id) if card.where == "folder" else card.id


def _recipe(text: str, outputs: Outputs, name: str = "recipe", folders: Mapping[str, Path] | None = None) -> tuple[str, list[str]]:
    """(expression, lines before it). A name stays a name, unless it names a folder by id; YAML stands in the program."""
    if TRAINED.fullmatch(text):
        return repr(str(outputs.trained().get(text.partition(":")[2], ""))), []
    if "\n" not in text and ": " not in text and FOLDER not in text:
        return repr(text), []
    lines = absolute(recipe_of(text, outputs.trained(), folders)).to_yaml()
    return name, [f'{name} = from_yaml("""', *lines.replace("\\", "\\\\").replace('"""', '\\"\\"\\"').splitlines(), f'""", {named(text)!r})', ""]


def _recipe_imports(texts: Any, always: bool = False) -> list[str]:
    """`from_yaml`, where YAML stands in the program; the parts that it may name are imported with the recipes."""
    wanted = always or any(("\n" in text or ": " in text) and not TRAINED.fullmatch(text) for text in texts)
    return ["import hasten.pipelines.recipes  # noqa: F401  the parts that YAML may name", "from hasten.recipe import from_yaml"] if wanted else []


def _shape(ask: Picture) -> str:
    """Arguments of `Request` that were given."""
    values = {
        "negative_prompt": ask.negative or None, "steps": ask.steps, "height": ask.height, "width": ask.width, "frames": ask.frames,
        "guidance": ask.guidance,
    }  # fmt: skip
    return "".join(f", {key}={value!r}" for key, value in values.items() if value is not None)


def _commented(part: str) -> str:
    return "\n" + "".join(f"# {line}\n" for line in part.splitlines())


def _ascii(ask: Request) -> str:
    """One line of JSON."""
    import json

    return json.dumps(json.loads(to_json(ask)))


def _version() -> str:
    from hasten import __version__

    return __version__

"""A student's model card: what it is, how it compares with its teacher, and how anybody samples it.

Numbers of the card are passed in: whoever measured them says them. Shapes: none of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from hasten.pipelines.lora import FILE, METADATA

Rows = Sequence[Mapping[str, object]]

AGAINST = "## Against the teacher"
"""Heading above the measured table."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a card says. base: the teacher as one loads it; pipeline: its class; site: the network's name in it. sampler: as
    `sampler.describe`, None for a student that is sampled as its teacher. table: measured rows with the same keys, teacher
    against student. training: plain facts. files: name -> sha256. licence: of the base, as the hub spells it.

    takes: names of the arguments of the pipeline's call. loads: "pipeline", "network" or "peft": who can load the adapter;
    "network_folder" for a student that is a whole network, of class `network`.
    """

    name: str
    base: str
    pipeline: str
    network: str
    site: str
    loads: str
    takes: tuple[str, ...]
    sampler: Mapping[str, Any] | None
    licence: str | None = None
    table: Rows = ()
    training: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    base_bundled: bool = False

    def text(self) -> str:
        """The card as Markdown with the head that the hub reads."""
        parts = [self._head(), f"# {self.name}\n", self._summary(), self._table(), "## Use\n", self._with_hasten(), self._plain()]
        parts += [_facts("Training", self.training), self._files()]
        return "\n".join(part for part in parts if part) + "\n"

    def _head(self) -> str:
        full = self.loads == "network_folder"
        head: dict[str, Any] = {"base_model": self.base, "base_model_relation": "finetune" if full else "adapter"}
        head |= {"library_name": "diffusers"} | ({"license": self.licence} if self.licence else {})
        head["tags"] = ["distillation", "few-step", *([] if full else ["lora"]), "hasten"]
        return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n"

    def _summary(self) -> str:
        kind = "A whole network" if self.loads == "network_folder" else "A LoRA"
        calls = f" It needs {self._calls}, without guidance." if self.sampler else ""
        licence = "" if self.licence else " The licence of the base model was not given; it applies to this student, too."
        return f"{kind} distilled from {self.base} (`{self.pipeline}`).{calls}{licence}\n"

    @property
    def _calls(self) -> str:
        assert self.sampler is not None
        count = int(self.sampler["call"].get("num_inference_steps", len(self._levels)))
        chunks = f" for each chunk of {self.sampler['chunk']} latent frames" if "chunk" in self.sampler else ""
        return f"{count} call{'s' if count > 1 else ''} of the network{chunks}"

    @property
    def _levels(self) -> list[float]:
        assert self.sampler is not None
        return list(self.sampler.get("sigmas") or self.sampler["timesteps"])

    def _table(self) -> str:
        return f"{AGAINST}\n\n{table(self.table)}"

    def _with_hasten(self) -> str:
        if self.loads == "network_folder":
            return ""
        return f"""With hasten, which sets everything and takes it off again:
```bash
hasten generate {self.base} --prompt "..." --recipe FOLDER/recipe.yaml
```
"""

    def _plain(self) -> str:
        if self.loads == "timed":
            return "No other program loads it: the adapter's strength follows the time, and an ordinary LoRA's does not.\n"
        if self.sampler and "chunk" in self.sampler:
            return "Plain diffusers loads the adapter, but has no loop that makes a clip chunk after chunk on kept keys and values.\n"
        return f"In plain diffusers:\n```python\n{self.code()}```\n"

    def code(self) -> str:
        """Lines that sample the student in plain diffusers. FOLDER is to be replaced by where the files are."""
        opening = f'pipe = {self.pipeline}.from_pretrained("{self.base}")'
        if self.base_bundled:
            opening = f'pipe = hasten.load("{self.base}")'
        lines = ["import hasten" if self.base_bundled else f"from diffusers import {self.pipeline}", *self._imports(), "", opening]
        return "\n".join([*lines, *self._loading(), *self._sampling()]) + "\n"

    def _imports(self) -> list[str]:
        found = [f"from diffusers import {self.sampler['scheduler']}"] if self.sampler else []
        if self.loads == "network_folder":
            found.append(f"from diffusers import {self.network}")
        if self.loads == "peft":
            found = ["import json", *found, "from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict"]
            found += ["from safetensors import safe_open"]
        return found

    def _loading(self) -> list[str]:
        network = f"pipe.{self.site}"
        if self.loads == "pipeline":
            return ['pipe.load_lora_weights("FOLDER")']
        if self.loads == "network":
            return [f'{network}.load_lora_adapter("FOLDER", prefix="{self.site}")']
        if self.loads == "network_folder":
            return [f'{network} = {self.network}.from_pretrained("FOLDER/{self.site}")']
        return [
            f"# {self.pipeline} has no way to load a LoRA, so peft does it",
            f'with safe_open("FOLDER/{FILE}", "pt") as file:',
            f'    weights = {{name.removeprefix("{self.site}."): file.get_tensor(name) for name in file.keys()}}',
            f'    told = json.loads(file.metadata()["{METADATA}"])',
            f'config = LoraConfig(**{{name.removeprefix("{self.site}."): value for name, value in told.items()}})',
            f"inject_adapter_in_model(config, {network}, state_dict=weights)",
            f"set_peft_model_state_dict({network}, weights)",
        ]

    def _sampling(self) -> list[str]:
        if self.sampler is None:
            return ['result = pipe("...")']
        kind, config, levels = self.sampler["scheduler"], self.sampler["config"], self._levels
        lines = [f"pipe.scheduler = {kind}({', '.join(f'{key}={value!r}' for key, value in config.items())})"]
        name = "sigmas" if "sigmas" in self.sampler else "timesteps"
        call = dict(self.sampler["call"])
        if name in self.takes:
            call |= {name: levels}
            if name == "timesteps":
                call.pop("num_inference_steps", None)
        else:
            lines += [
                f"levels = {levels!r}  # {self.pipeline} takes none, so the scheduler is told them",
                "given = pipe.scheduler.set_timesteps",
                f"pipe.scheduler.set_timesteps = lambda steps=None, device=None, **_: given({name}=levels, device=device)",
            ]
        return [*lines, f'result = pipe("...", {", ".join(f"{key}={value!r}" for key, value in call.items())})']

    def _files(self) -> str:
        if not self.files:
            return ""
        return "## Files\n\n" + "\n".join(f"- `{name}` sha256 `{digest}`" for name, digest in self.files.items()) + "\n"


def table(rows: Rows) -> str:
    """Measured rows as Markdown, or that there are none."""
    if not rows:
        return "Not measured yet: nothing is claimed. `hasten bench distill --student` measures students of the bundled models.\n"
    keys = list(rows[0])
    lines = [f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}"]
    return "\n".join(lines + [f"| {' | '.join(_said(row.get(key)) for key in keys)} |" for row in rows]) + "\n"


def measured(text: str, rows: Rows) -> str:
    """A card with this table in place of the one it has. Raises `ValueError` for a text that has none."""
    before, _, rest = text.partition(f"{AGAINST}\n")
    after = rest.index("\n## ")
    return f"{before}{AGAINST}\n\n{table(rows)}{rest[after:]}"


def _facts(title: str, facts: Mapping[str, object]) -> str:
    if not facts:
        return ""
    return f"## {title}\n\n" + "\n".join(f"- {key}: {_said(value)}" for key, value in facts.items()) + "\n"


def _said(value: object) -> str:
    """A value in a table: numbers short, nothing that would end the cell."""
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")

"""What `hasten train METHOD --help` says beyond its options: every key of the configuration, what it is when not said, what it means."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

import typer
import yaml
from pydantic import BaseModel
from typer.core import TyperCommand

WIDTH = 100


class MethodCommand(TyperCommand):
    """A command named after a method, whose help lists the method's keys. Methods are imported for it, and only for it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The usual help, and the keys below it."""
        super().format_help(ctx, formatter)
        typer.echo(keys(str(self.name)))


def keys(method: str) -> str:
    """The configuration of a training by `method`, in words."""
    from hasten.distill.loop.settings import TrainSettings
    from hasten.distill.method import Method
    from hasten.distill.methods import load_all
    from hasten.distill.train_config import ALIASES, DataConfig, StudentConfig

    load_all()
    member = Method.members()[method]
    sections: dict[str, type[BaseModel]] = {"method": member, "student": StudentConfig, "data": DataConfig, "train": TrainSettings}
    lines = ["Keys, for --set and for the file of --config, with what they are when not said:", ""]
    for section, part in sections.items():
        given = " ".join(f"{name}={_said(field)}" for name, field in part.model_fields.items())
        lines += [_wrapped(f"{section}.", given or "(none)"), ""]
    for section, part in sections.items():
        lines += [f"{section}.*", *(textwrap.indent(text, "  ") + "\n" for text in _meaning(part))]
    names = ", ".join(f"--{name} ({ours})" for name, ours in ALIASES.items())
    return "\n".join([*lines, _wrapped("Names of other trainers:", names)])


def _said(field: Any) -> str:
    """A default as --set would take it."""
    value = field.get_default(call_default_factory=True)
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    plain = list(plain) if isinstance(plain, tuple) else plain
    return str(yaml.safe_dump(plain, default_flow_style=True, width=10_000)).removesuffix("\n...\n").strip()


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(f"{head} {text}", WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _meaning(part: type[BaseModel]) -> Iterator[str]:
    """What the classes that brought the keys say of them, the first one first."""
    from hasten.distill.method import Method

    for each in reversed(part.__mro__):
        if issubclass(each, BaseModel) and each.model_fields and each is not Method and "__doc__" in vars(each) and each.__doc__:
            yield inspect.cleandoc(each.__doc__)

"""Parts: the frozen, serialisable pieces recipes are made of.

A part stores its arguments as given (so it can be printed, compared and searched) and makes running
state with `start()`. A family (`Rule`, `Forecast`, ...) is an abstract subclass; a member names itself
with `kind`, which is how YAML says which one is meant.
"""

from __future__ import annotations

import typing
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer

from hasten.errors import RecipeError, nearest

P = TypeVar("P", bound="Part")


class Part(BaseModel):
    """Base of all parts: frozen, strict about unknown keys, told apart by `kind`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    kind: ClassVar[str] = ""
    """Name in YAML; unique within the family. Families leave it empty."""

    @classmethod
    def members(cls) -> dict[str, type[Part]]:
        """kind -> class for every concrete part of this family that has been imported."""
        return {child.kind: child for child in (cls, *_descendants(cls)) if child.kind}

    @model_serializer(mode="plain")
    def _as_dict(self) -> dict[str, Any]:
        head: dict[str, Any] = {"kind": self.kind} if self.kind else {}
        return head | {name: _plain(getattr(self, name)) for name in type(self).model_fields}


def parse(cls: type[P], data: Any, where: str, path: str = "") -> P:
    """Build a `cls` (or the member of its family that `kind` names) from plain YAML data.

    where: what is being read, for messages ("recipe.yaml", "--set"). path: dotted key of `data` within it.
    Raises `RecipeError` naming the key, what was got, what is allowed and the nearest valid name.
    """
    if isinstance(data, cls):
        return data
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: {path or 'the recipe'} must be a mapping of keys, got {data!r}.")
    fields = dict(data)
    member = _member(cls, fields, where, path)
    for key in fields:
        if key not in member.model_fields:
            raise RecipeError(
                f"{where}: unknown key {_join(path, str(key))!r};"
                f" allowed here: {', '.join(member.model_fields)}.{nearest(str(key), member.model_fields)}"
            )
    for key, value in fields.items():
        inner, several = _part_in(member.model_fields[key].annotation)
        if inner is not None and several and isinstance(value, list | tuple):
            fields[key] = tuple(
                parse(inner, item, where, _join(path, f"{key}.{number}")) for number, item in enumerate(value)
            )
        elif inner is not None and not several and value is not None:
            fields[key] = parse(inner, value, where, _join(path, key))
    try:
        return typing.cast(P, member(**fields))
    except ValidationError as error:
        first = error.errors()[0]
        name = _join(path, ".".join(str(key) for key in first["loc"])) or "the recipe"
        message = first["msg"].removeprefix("Value error, ")
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise RecipeError(f"{where}: {name}: {message}{got}.") from None


def _member(cls: type[Part], fields: dict[str, Any], where: str, path: str) -> type[Part]:
    """The class that `fields["kind"]` names within the family `cls`; takes `kind` out of `fields`."""
    members = cls.members()
    if not members:
        return cls
    kind = fields.pop("kind", cls.kind or None)
    if isinstance(kind, str) and kind in members:
        return members[kind]
    raise RecipeError(
        f"{where}: {_join(path, 'kind')} = {kind!r} is not a {cls.__name__.lower()};"
        f" allowed: {', '.join(sorted(members))}.{nearest(str(kind), members)}"
    )


def _part_in(annotation: Any) -> tuple[type[Part] | None, bool]:
    """The Part class inside `X`, `X | None` or `tuple[X, ...]`, else None; and whether it is the tuple."""
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Part):
            return candidate, typing.get_origin(annotation) is tuple
    return None, False


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.model_dump()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _descendants(cls: type[Part]) -> list[type[Part]]:
    found: list[type[Part]] = []
    for child in cls.__subclasses__():
        found += [child, *_descendants(child)]
    return found

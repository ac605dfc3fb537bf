"""`KEY=VALUE` options."""

from __future__ import annotations

from typing import Any

from hasten.errors import UsageError


def assignments(texts: list[str], option: str) -> dict[str, Any]:
    """`["a.b=1", "c=x"]` as `{"a.b": 1, "c": "x"}`; values are read as YAML, so numbers and lists are themselves."""
    import yaml

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(
                f"{option} {text!r}: write KEY=VALUE, for example {option} reuse.rule.limit=0.1."
            )
        try:
            found[key.strip()] = yaml.safe_load(value[:10_000])
        except yaml.YAMLError:
            found[key.strip()] = value
    return found

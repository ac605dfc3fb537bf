"""What a server is told, and what of a recipe is told to any of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any, NoReturn

from hasten.caching.decode.codec_numbers import Fp8
from hasten.caching.decode.kept import KeptCache
from hasten.errors import RefusedError
from hasten.pipelines import tiny_models
from hasten.pipelines.recipes import recipe as find_recipe
from hasten.recipe import Drafting, Recipe
from hasten.samplers.decode.pace import Average, Goodput, Steady
from hasten.samplers.decode.verify_lossy import Lossy

AXES = frozenset({"draft", "verify", "pace", "kv"})


def place(model: str) -> str:
    """The folder of a bundled model, else the name or folder as it is."""
    return str(tiny_models.path(model)) if model in tiny_models.names() else model


@dataclass(frozen=True, slots=True)
class Served:
    """Settings of one server. config: its arguments by name, for its Python interface. argv: the command that starts it.
    notes: what is otherwise there, a sentence each."""

    server: str
    config: dict[str, Any]
    argv: list[str]
    notes: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command, quoted for a shell."""
        return shlex.join(self.argv)


@dataclass(slots=True)
class Asked:
    """One recipe on its way to `server`: its parts, and the notes that the translation makes."""

    server: str
    recipe: Recipe
    model: str
    lengths: dict[int, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, server: str, recipe: Any, model: str, lengths: dict[int, int] | None) -> Asked:
        """Raises `RefusedError` for a recipe with axes that no server has."""
        asked = cls(server, find_recipe(recipe), model, dict(lengths or {}))
        others = [axis for axis in asked.recipe.axes if axis not in AXES]
        if others:
            asked.refuse(f"it sets {' and '.join(others)}, and servers take drafts and the form of their cache alone")
        return asked

    @property
    def draft(self) -> Drafting | None:
        return self.recipe.draft

    def refuse(self, why: str, instead: str = "") -> NoReturn:
        """Raises `RefusedError`. why: the reason; instead: what to do."""
        name = f"Recipe {self.recipe.name!r}" if self.recipe.name else "The recipe"
        raise RefusedError(f"{name} cannot be handed over to {self.server}: {why}.{' ' + instead if instead else ''}")

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)

    # --- what all servers are told alike ----------------------------------------------------------

    def check_verifier(self) -> str:
        """The verifier's kind, "lossless" where none is named; refuses those that accept more than the model's law."""
        verify = self.recipe.verify
        if isinstance(verify, Lossy):
            self.refuse(
                f"verify {verify.kind!r} accepts drafts that the model would not write, and a server of many users is expected to"
                " write the model's own texts",
                "Leave `verify` out: the server then keeps the model's law.",
            )
        return "lossless" if verify is None else verify.kind

    def tokens(self, most: int) -> int:
        """Drafts of a request in each round: the most of the measured lengths, else what the pace says."""
        pace = self.recipe.pace
        if self.lengths:
            return min(most, max(self.lengths.values()))
        if isinstance(pace, Steady):
            return most if pace.nodes is None else min(most, pace.nodes)
        if isinstance(pace, Goodput | Average) or (pace is None and self.draft is not None):
            kind = "goodput" if pace is None else pace.kind
            self.note(
                f"hasten's pace {kind!r} measures how many drafts pay; the server always takes {most}. Give the measured lengths"
                " (--measured), and measure again there."
            )
        return most

    def cache_dtype(self, fp8: str) -> str:
        """The server's type of keys and values, "" for its own. fp8: what it calls eight-bit floats."""
        kv = self.recipe.kv
        if kv is None:
            return ""
        if not isinstance(kv, KeptCache):
            self.refuse(f"its cache {kv.kind!r} is for texts that are written in any order")
        if kv.amount is not None or kv.prompt is not None or kv.lazy is not None:
            self.refuse(
                "it leaves tokens out of the cache, and the server's blocks of keys hold the same tokens for all heads and layers,"
                " until a request is over",
                "Take it without `kv`, or stay with hasten for that model.",
            )
        if kv.shared is not None:
            self.note(f"Shared prefixes need no setting: {self.server} keeps and shares the blocks of equal beginnings by itself.")
        if kv.codec is None:
            return ""
        if not isinstance(kv.codec, Fp8):
            self.refuse(f"its cache is packed as {kv.codec.kind!r}, which the server does not have", "fp8-kv has a counterpart.")
        self.note("The server packs all keys and values in eight bits, the newest, too; hasten leaves those as they are.")
        return fp8

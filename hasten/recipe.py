"""Recipes: which part acts on which axis. A paper is a function that returns one (`pipelines/recipes/`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, PrivateAttr, model_validator

from hasten.errors import RecipeError
from hasten.part import Part, parse
from hasten.stamp import Stamp

MAX_YAML_BYTES = 256 * 1024
"""A recipe from a stranger may not be larger than this."""

MAX_YAML_DEPTH = 32
OPENING = (
    yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken, yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken,
)  # fmt: skip
CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class Axis(Part):
    """Base of the parts that stand directly on a recipe's axis."""

    def joined(self, other: Axis) -> Axis | None:
        """One part that does what both say, for `a | b`; None where this kind of part cannot say it, which is usual.

        Raises `RecipeError` with the reason where it could, but both say the same thing differently.
        """
        return None


class Sampler(Axis):
    """Axis `sampler`: which solver walks the path, on how many steps."""


class Guidance(Axis):
    """Axis `guidance`: which branches of classifier-free guidance are evaluated."""

    optional: ClassVar[bool] = False
    """Is it for hosts with guidance, and nothing to be told of on others? The report says so in a line."""


class ReusePolicy(Axis):
    """Axis `reuse`: which evaluations of the network, or of its blocks, are replaced by earlier ones."""

    leaves_out: ClassVar[bool] = False
    """Are parts of evaluations left out with nothing in their place? Then that is how it shows that it did something."""


class Attention(Axis):
    """Axis `attention`: which key blocks a query block reads."""


class KVPolicy(Axis):
    """Axis `kv`: which tokens are computed again, and which keys and values are kept from earlier evaluations."""


class Commit(Axis):
    """Axis `commit`: which of a text's open slots are written after an evaluation."""


class Revise(Axis):
    """Axis `revise`: which written slots are taken back or replaced."""


class Blocks(Axis):
    """Axis `blocks`: which part of a text is worked on, and when the text is over."""


class Drafting(Axis):
    """Axis `draft`: what is proposed for the next tokens of a causal language model."""


class Verify(Axis):
    """Axis `verify`: how drafts of several tokens are checked in one evaluation."""


class Pacing(Axis):
    """Axis `pace`: how many tokens are proposed at a time."""


class FromFile(Axis):
    """Base of the parts that read a file: a relative path starts at the folder of the recipe's file, where it came from one."""

    path: str = Field(min_length=1)
    _folder: Path = PrivateAttr(default_factory=Path)

    @property
    def place(self) -> Path:
        """Where to look. The recipe's own folder is not written out with the recipe: it says nothing to others."""
        return self._folder / (Path(self.path).expanduser() if self.path.startswith("~/") else Path(self.path))

    def beside(self, folder: Path) -> Self:
        """The same, with relative paths that start at `folder`."""
        found = self.model_copy()
        found._folder = folder
        return found


class Adapter(FromFile):
    """Axis `adapter`: a LoRA, or quantised weights, on the network while the recipe is on the host: those of a student.

    path: the name of a student that comes with hasten; or a .safetensors file in diffusers' names or of quantised weights, or
    a folder that has one, and a relative one starts at the folder of the recipe's file, where it came from a file. scale:
    factor on what a LoRA changes; 1 for quantised weights. calls, in place of a path: the student that comes with hasten for
    the very model it is used on, and evaluates the network so often; the recipe's `reuse` is for models that have none.
    """

    path: str = ""
    calls: int | None = Field(None, ge=1)
    scale: float = 1.0

    @model_validator(mode="after")
    def _one_place(self) -> Adapter:
        if bool(self.path) == (self.calls is not None):
            raise RecipeError(f"adapter needs either path or calls, got path {self.path!r} and calls {self.calls}.")
        return self

    def beside(self, folder: Path) -> Self:
        """The same, with a relative path that starts at `folder`; without a path, what it is."""
        return super().beside(folder) if self.path else self


class Runtime(Axis):
    """Axis `runtime`: how the same numbers are computed (compilation, precision, offload)."""


class Recipe(Part):
    """A frozen composition of parts, at most one per axis.

    `a | b` joins recipes with disjoint axes; the same axis in both raises `RecipeError`, unless its two parts act on
    different things and make one (`Axis.joined`). `paper`, `models` and `tuned` describe, they do not act.
    """

    kind: ClassVar[str] = ""
    version: Literal[1] = 1
    name: str = ""
    paper: str = ""
    models: tuple[str, ...] = ()
    tuned: Stamp | None = None
    sampler: Sampler | None = None
    guidance: Guidance | None = None
    reuse: ReusePolicy | None = None
    attention: Attention | None = None
    kv: KVPolicy | None = None
    commit: Commit | None = None
    revise: Revise | None = None
    blocks: Blocks | None = None
    draft: Drafting | None = None
    verify: Verify | None = None
    pace: Pacing | None = None
    adapter: Adapter | None = None
    runtime: Runtime | None = None

    @property
    def axes(self) -> dict[str, Axis]:
        """The axes that are occupied, in declaration order."""
        parts = {name: getattr(self, name) for name in AXES}
        return {name: part for name, part in parts.items() if part is not None}

    def __or__(self, other: Recipe) -> Recipe:
        axes = self.axes | other.axes
        for axis in self.axes:
            if axis in other.axes:
                axes[axis] = self._both(other, axis)
        names = [name for name in (self.name, other.name) if name]
        papers = [paper for paper in (self.paper, other.paper) if paper]
        return Recipe(
            name="+".join(names), paper="; ".join(papers), models=self.models or other.models, **axes
        )

    def _both(self, other: Recipe, axis: str) -> Axis:
        """The part of an axis that both recipes set; `RecipeError` where there is none that does what both say."""
        mine, theirs = self.axes[axis], other.axes[axis]
        reason = "a recipe has one part per axis. Drop it from one of them."
        try:
            if part := mine.joined(theirs) or theirs.joined(mine):
                return part
        except RecipeError as error:
            reason = str(error)
        raise RecipeError(f"Both recipes set {axis} ({self.name or 'left'!r} and {other.name or 'right'!r}); {reason}")

    def replace(self, assignments: dict[str, Any], where: str = "--set") -> Recipe:
        """A copy with dotted keys changed, for example `{"reuse.rule.threshold": 0.1}`."""
        data = self.model_dump() | {"tuned": None}  # what was measured was another recipe
        for dotted, value in assignments.items():
            *path, last = dotted.split(".")
            inner = data
            for key in path:
                inner = inner.get(key) if isinstance(inner, dict) else None  # type: ignore[assignment]
            if not isinstance(inner, dict):
                raise RecipeError(f"{where}: there is no {dotted!r} in recipe {self.name!r}; its axes: {list(self.axes)}.")
            inner[last] = value
        return parse(Recipe, data, where)._beside(self)

    def _beside(self, before: Recipe) -> Recipe:
        """The same recipe with its files looked for where those of `before` are."""
        files: dict[str, FromFile] = {}
        for axis, part in self.axes.items():
            old = getattr(before, axis)
            if isinstance(part, FromFile) and isinstance(old, FromFile):
                files[axis] = part.beside(old._folder)
        return self.model_copy(update=files) if files else self

    def to_yaml(self) -> str:
        """The serialised form; `from_yaml` gives an equal recipe back."""
        data = {key: value for key, value in self.model_dump().items() if value not in (None, "", [])}
        return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))


AXES = (
    "sampler", "guidance", "reuse", "attention", "kv", "commit", "revise", "blocks", "draft", "verify", "pace", "adapter",
    "runtime",
)  # fmt: skip


def from_yaml(text: str, where: str = "recipe") -> Recipe:
    """Read a recipe from YAML text with the safe loader, within a size limit and without aliases.

    The parts it names must have been imported; `hasten.recipe(...)` sees to that.
    """
    if len(text.encode(errors="surrogatepass")) > MAX_YAML_BYTES:
        raise RecipeError(f"{where}: a recipe may have at most {MAX_YAML_BYTES // 1024} KiB, got {len(text) // 1024}.")
    try:
        _scan(text, where)
        data = yaml.safe_load(text)
    except RecipeError:
        raise
    except (yaml.YAMLError, RecursionError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # PyYAML lets what int(), datetime() and its own look-ups raise escape.
        line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RecipeError(f"{where}: not valid YAML ({line}).") from None
    return parse(Recipe, data, where)


def _scan(text: str, where: str) -> None:
    """Refuse aliases (they multiply) and deep nesting (PyYAML's time grows with its square) before anything is built."""
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken | yaml.AnchorToken):
            raise RecipeError(f"{where}: YAML anchors and aliases are not allowed in recipes. Write the value out.")
        depth += isinstance(token, OPENING) - isinstance(token, CLOSING)
        if depth > MAX_YAML_DEPTH:
            raise RecipeError(f"{where}: nested deeper than {MAX_YAML_DEPTH} levels; recipes need fewer than ten.")


def read(path: Path) -> Recipe:
    """Read a recipe file, whose own files are looked for beside it; a missing one is a `RecipeError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"Cannot read recipe {path}: {getattr(error, 'strerror', None) or error}.") from None
    found = from_yaml(text, where=str(path))
    files = {axis: part.beside(path.parent) for axis, part in found.axes.items() if isinstance(part, FromFile)}
    return found.model_copy(update=files) if files else found

"""Where results go: one file, or a folder with one file per prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hasten.cli.output import check_writable
from hasten.errors import UsageError, nearest

SUFFIXES = (".mp4", ".gif", ".png")


@dataclass(frozen=True, slots=True)
class Places:
    """Names the file of each result: `file` if there is one, else one per prompt in `folder`."""

    folder: Path
    file: Path | None = None

    @classmethod
    def of(cls, output: Path, prompts: int) -> Places:
        """What `--output` means for a request of `prompts` prompts. `UsageError` for what cannot be written."""
        if output.is_dir() or not output.suffix:
            return cls(output)
        if output.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"--output {output}: the suffix {output.suffix!r} is unknown; allowed: {', '.join(SUFFIXES)}, or a folder"
                f" without a suffix.{nearest(output.suffix, SUFFIXES)}"
            )
        if prompts > 1:
            raise UsageError(
                f"--output {output} is one file, but there are {prompts} prompts. Name a folder."
            )
        return cls(output.parent, output)

    def check(self, video: bool) -> None:
        """Refuse a video format for a model that makes images."""
        if self.file is not None and not video and self.file.suffix.lower() != ".png":
            raise UsageError(f"--output {self.file}: this model makes images. Name a .png file, or a folder.")

    def name(self, index: int, seed: int, video: bool) -> Path:
        """The file of prompt number `index`."""
        return self.file or self.folder / f"{index:03d}-{seed}{'.mp4' if video else '.png'}"


@contextmanager
def writable(*folders: Path) -> Iterator[None]:
    """Prove that files can be put into `folders`, making them; those still empty at the end are removed again."""
    made = [path for folder in folders for path in (folder, *folder.parents) if not path.exists()]
    try:
        for folder in folders:
            check_writable(folder)
        yield
    finally:
        for folder in made:  # the deepest first
            with suppress(OSError):
                folder.rmdir()  # fails, as it should, when something is in it

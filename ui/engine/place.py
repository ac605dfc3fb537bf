"""Where an engine keeps its things. Plain values, so that a worker's process can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hasten.errors import OutputError
from hasten.ui.engine.limits import Limits


@dataclass(frozen=True, slots=True)
class Place:
    """home: of all of hasten (`HASTEN_HOME`); what is the page's lies below `home/ui`. models, loras: folders to look for models
    and LoRAs in, None for none. offline: nothing may be fetched. device, dtype: of models that are not bundled, None for the
    best there is."""

    home: Path
    models: Path | None = None
    loras: Path | None = None
    offline: bool = False
    limits: Limits = field(default_factory=Limits)
    device: str | None = None
    dtype: str | None = None

    @property
    def folder(self) -> Path:
        return self.home / "ui"

    @property
    def jobs(self) -> Path:
        """The SQLite file."""
        return self.folder / "jobs.sqlite"

    @property
    def outputs(self) -> Path:
        """A folder for each result."""
        return self.folder / "outputs"

    @property
    def previews(self) -> Path:
        """Pictures of running jobs, and the maps they are made by."""
        return self.folder / "previews"

    @property
    def latents(self) -> Path:
        """What runs that failed behind their loop had denoised."""
        return self.folder / "latents"

    @property
    def work(self) -> Path:
        """Studies and trainings, which are gone on with."""
        return self.folder / "work"

    def make(self) -> None:
        """Make the folders, for this user alone. Raises `OutputError`."""
        try:
            for folder in (self.folder, self.outputs, self.previews, self.latents, self.work):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"Cannot make the folder {self.folder}: {error.strerror}. Set HASTEN_HOME to one that can be written.") from error


def usual_home() -> Path:
    """`HASTEN_HOME`, or hasten's part of the user's cache folder."""
    from hasten.pipelines.tune.kept import folder

    return folder().parent

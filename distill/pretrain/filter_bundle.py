"""Put trained filters among a bundled model's files: their checksums into its card."""

from __future__ import annotations

import json
from pathlib import Path

from hasten.atomic import atomic_write
from hasten.errors import UsageError
from hasten.pipelines.text.filters import FILES
from hasten.pipelines.tiny_models import sha256


def note_filters(folder: Path) -> list[str]:
    """Write the sha256 of every filter in `folder` into its `hasten.json`; their names. `UsageError` without a card."""
    file = Path(folder) / "hasten.json"
    if not file.is_file():
        raise UsageError(f"{folder} has no hasten.json. Bundle the model first (hasten.distill.pretrain.text_bundle).")
    card, found = json.loads(file.read_text()), [name for name in FILES.values() if (Path(folder) / name).is_file()]
    kept = {name: digest for name, digest in card["sha256"].items() if name not in FILES.values()}
    card["sha256"] = {**kept, **{name: sha256(Path(folder) / name) for name in found}}
    atomic_write(file, json.dumps(card, indent=1) + "\n")
    return found

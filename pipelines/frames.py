"""The frames of pictures and clips, as they are read for training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image, ImageOps, ImageSequence

CLIPS = (".mp4",)
"""What PyAV reads; everything else is Pillow's."""


def frames(file: Path) -> Iterator[Image.Image]:
    """All frames in RGB, one after the other, whatever their rate.

    What is transparent becomes white; a picture is turned as its camera says. Raises what the decoders raise for a broken
    file, and `ValueError` for a clip without pictures.
    """
    if file.suffix.lower() in CLIPS:
        with av.open(str(file)) as opened:
            if not opened.streams.video:
                raise ValueError("no pictures in it")
            for frame in opened.decode(video=0):
                yield frame.to_image()
        return
    with Image.open(file) as picture:
        for still in ImageSequence.Iterator(picture):
            turned = ImageOps.exif_transpose(still)
            if turned.mode in ("RGBA", "LA", "PA") or "transparency" in turned.info:
                over = turned.convert("RGBA")
                turned = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
            yield turned.convert("RGB")

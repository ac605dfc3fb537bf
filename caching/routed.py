"""Routed width: the heads, channels and tokens that a student was trained to run at each time, and no others."""

from __future__ import annotations

from typing import ClassVar

from hasten.recipe import FromFile, ReusePolicy


class RoutedReuse(ReusePolicy, FromFile):
    """Run what the routers in a file open (DyDiT, arXiv 2410.03456; `hasten train dydit` writes such a file).

    path: of the routers, `routers.safetensors` beside the student's adapter. What is shut is not computed: weights are
    sliced, tokens gathered. Everything is chosen by the time that the network is told.
    """

    kind: ClassVar[str] = "routed"
    leaves_out: ClassVar[bool] = True

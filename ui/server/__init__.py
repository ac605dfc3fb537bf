"""Who may reach the page, and how it is served: the door in front of Gradio, a thin `/v1`, one web server around both.

    with Engine() as engine, Site(engine) as site:      # 127.0.0.1, and a free port from 7860 on
        print(site.url)

`address`: where it listens, and what is refused there. `guard`: checks on every request and headers on every answer. `openai`,
`openai_ask`: `/v1/images/generations` and `/v1/videos` on the engine's own jobs. `site`: the web server, started and stopped.
`surroundings`: temporary files and environment of a process that serves.
"""

from __future__ import annotations

from hasten.ui.server.address import Address
from hasten.ui.server.guard import Guard
from hasten.ui.server.site import Site

__all__ = ["Address", "Guard", "Site"]

"""The page: tabs on the engine and the views. Gradio is a view of the engine's jobs here, never their queue.

    with Engine() as engine:
        build(engine).launch(**launch_options(engine))

`app`: the tabs together. `tabs`: one file for each. `watch`: submitting, following, stopping and re-attaching to a job.
`settings`: the controls of a request. `speed`: the slider between fidelity and speed. `results`: what jobs gave, as the
data of views. `sentences`: the little HTML that no view is. `api`: named endpoints. `first`: the comparison that a new page shows.
"""

from __future__ import annotations

from hasten.ui.page.app import build, launch_options

__all__ = ["build", "launch_options"]

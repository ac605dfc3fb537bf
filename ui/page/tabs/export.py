"""Export: any result's settings as a program and as a recipe, both of which run as they stand."""

from __future__ import annotations

import time
from typing import Any

import gradio as gr
from gradio.components import Component

from hasten.errors import HastenError
from hasten.ui.engine import Engine
from hasten.ui.page.results import Shelf, title
from hasten.ui.page.sentences import said
from hasten.ui.page.watch import HIDDEN
from hasten.ui.views.component import shown

LISTED = 40
"""Results to choose from."""

EMPTY = "Nothing to export yet: whatever you generate, compare, tune or train can be taken along from here."


class ExportTab:
    """A result is chosen here, or by the Export button of another tab."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.shelf = engine, Shelf(engine)
        self.which = gr.Dropdown(self.choices(), value=None, label="Which result", elem_id="export-which")
        self.words = shown(said(EMPTY))
        with gr.Row(equal_height=False, elem_classes="sides"):
            with gr.Column(min_width=320):
                self.python = gr.Code("", language="python", label="Python", interactive=False, buttons=["copy", "download"], elem_id="export-python", lines=12, max_lines=28)
            with gr.Column(min_width=320):
                self.yaml = gr.Code("", language="yaml", label="Recipe as YAML", interactive=False, buttons=["copy", "download"], elem_id="export-yaml", lines=12, max_lines=28)
        self.which.input(self.chosen, [self.which], self.outputs, queue=False, **HIDDEN)

    @property
    def outputs(self) -> list[Component]:
        """All that `look` and `chosen` update."""
        return [self.which, self.words, self.python, self.yaml]

    # --- handlers ---------------------------------------------------------------------------------

    def choices(self) -> list[tuple[str, str]]:
        """(label, id) of results, newest first."""
        return [
            (f"{title(found['request'])}, {time.strftime('%d %b %H:%M', time.localtime(found.get('made', 0)))}", found["id"])
            for found in self.engine.outputs.list(LISTED)
        ]

    def look(self, output: str | None) -> tuple[Any, ...]:
        """When the tab is opened: the chosen result, else the newest."""
        found = self.choices()
        have = {name for _, name in found}
        chosen = output if output in have else found[0][1] if found else None
        return self._updates(found, chosen)

    def chosen(self, output: str | None) -> tuple[Any, ...]:
        """A result by its id."""
        return self._updates(self.choices(), output)

    def _updates(self, found: list[tuple[str, str]], output: str | None) -> tuple[Any, ...]:
        choice = gr.update(choices=found, value=output)
        if not output:
            return choice, said(EMPTY), "", ""
        try:
            request = self.shelf.result(output)["request"]
            python, yaml = self.engine.python(request), self.engine.yaml(request)
        except HastenError as error:
            return choice, said(str(error), "warning"), "", ""
        return choice, said("Save it as a file and run it: python FILE.py, or give the recipe to hasten with --recipe FILE.yaml."), python, yaml

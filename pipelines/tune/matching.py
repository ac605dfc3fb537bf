"""Which of the kept recipes a budget's session works with: asked again at each call, by the steps and the size it asks for."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.errors import HastenError
from hasten.pipelines.asked import STEPS, hear
from hasten.pipelines.session import Session
from hasten.pipelines.tune.kept import told_of
from hasten.recipe import Recipe
from hasten.session import Attachment
from hasten.stamp import Stamp


def differences(stamp: Stamp, asked: dict[str, int]) -> list[str]:
    """What a call asks for otherwise than the plain run of `stamp` did, a phrase each."""
    there = dict(stamp.asked) or ({} if stamp.steps is None else {STEPS: stamp.steps})
    return [
        f"{name} {asked.get(name, 'of its own')} (tuned at {value})" for name, value in there.items() if asked.get(name) != value
    ]


class Matching:
    """Keeps a session on the fastest of `ready` (fastest first) that was tuned for what a call asks, else on `online`.

    Hosts that do not check their inputs are not heard; there a recipe tuned for something else is told when the run begins.
    """

    def __init__(self, session: Session, ready: Sequence[Recipe], online: Recipe) -> None:
        self.session, self.ready, self.online, self.now = session, ready, online, ready[0]
        self._hold = Attachment()
        if hear(self._hold, session.host, self.heard):
            session.on_close.append(self._hold.restore)

    def heard(self, asked: dict[str, int]) -> None:
        """A call begins. What cannot be put on gives way to the online controller, and says so."""
        if self.session.drafting:
            return
        others = {number: differences(recipe.tuned, asked) for number, recipe in enumerate(self.ready) if recipe.tuned is not None}
        fit = next((self.ready[number] for number, found in others.items() if not found), None)
        if fit is None:
            told = f"this call asks for {' and '.join(others[0])}, so the online controller is at work (hasten tune makes a recipe for it)"
        else:
            told = told_of(fit)
        try:
            self._take(fit or self.online)
        except HastenError as error:
            told = f"the tuned recipe cannot be used ({str(error).rstrip('.')}), so the online controller is at work"
            self._take(self.online)
        self.session.trace.facts["budget"] = told
        if self.now is self.online:
            self.session.note(f"Budget: {told}.")

    def _take(self, recipe: Recipe) -> None:
        if recipe is not self.now:
            self.session.change(recipe)
            self.now = recipe

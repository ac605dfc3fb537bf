"""What goes wrong slowly: said once in words, and a row in the log.

The alarms look at the numbers that methods log. They are functions of the log alone, so that a resumed training, which
reads its earlier rows, says what it would have said.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from hasten.distill.loop.direction import TURN

FAST, SLOW = 0.9, 0.99
"""Decays of the averages that are compared."""

PATIENCE = 100
"""Steps before anything is said of what has grown: early numbers mean little. The lowest average is one of half as many, since
the first numbers of a loss that is let in slowly (a tangent's warm-up) are small for another reason."""

APART = {"loss": 10.0, "gap": 4.0}
"""Number -> how many times its lowest slow average its fast average may be. A loss that has grown ten times has been lost; a
critic that falls behind the student lets `gap` grow, where it should fall to the noise of the critic."""

LARGE = 10.0
"""Fast average of `tangent` above which a student has come apart: its end moves by so many sizes of the data in a radian, of which
the whole way from noise to data has 1.6. In a training of tiny-image that went well it is 0.2 to 0.4; where the learning rate was 40
times as high it passed 10 at step 40, and numbers ceased to be finite at step 99."""

BACK = -0.5
"""Slow average of a tangent's cosine with those before it, below which it is said to flip. Where g' = -r g + noise, the cosine of g'
with the running mean is about -r sqrt((1 - k^2) / (1 - k^2 r^2)) for `direction.KEEP` = k: -0.5 means that r = 0.8 of a tangent comes
back as the next one with the other sign. Steepest descent on a parabola does so at 9/10 of the rate at which it diverges. Tangents
that have nothing to do with each other come nowhere near: even of one number alone the slow average is within 0.07 of 0, and a
sketch's own error is 0.125."""

WORDS = {
    "loss": "The loss is {ratio:.0f} times what it was at its best (step {step}): the training comes apart. Lower train.lr, or"
    " go back to an earlier checkpoint.",
    "gap": "Critic and teacher are {ratio:.0f} times as far apart as they were (step {step}): the critic does not keep up with"
    " the student. Raise method.ratio or train.role_lr.critic, or lower train.lr.",
    "tangent": "The student's end moves by {value:.0f} sizes of the data in a radian (step {step}), where it should stand still: the"
    " training comes apart. Lower train.lr, or take method.tangent = 0.05 if the teacher was never made smooth in time.",
    "turning": "Tangents turn back: the mean cosine of each with those before it is {value:.2f} (step {step}), so that steps go too far."
    " Lower train.lr, or raise train.batch.",
    "recall": "The student's samples cover {value:.0%} of the data's variety, where they covered {best:.0%} (step {step}): they"
    " become alike. Lower train.lr, or stop at an earlier checkpoint.",
}

LOST = 0.5
"""Share of the best recall below which samples are said to become alike."""


class Health:
    """Alarms of one training. earlier: rows of its log before this start."""

    def __init__(self, earlier: Iterable[Mapping[str, float]] = ()) -> None:
        self._fast: dict[str, float] = {}
        self._slow: dict[str, float] = {}
        self._best: dict[str, float] = {}
        self._seen: dict[str, int] = {}
        self._said: set[str] = set()
        for row in earlier:
            self._said |= {name.removeprefix("alarm.") for name in row if name.startswith("alarm.")}
            self._see(row)

    def look(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """`alarm.NAME` -> 1 for what is wrong for the first time; each is warned about, too."""
        row = {name: float(f"{value:.6g}") for name, value in row.items()}  # as it stands in the log
        self._see(row)
        found = {}
        for name, words in self._wrong(step, row).items():
            if name not in self._said:
                self._said.add(name)
                found[f"alarm.{name}"] = 1.0
                warnings.warn(f"hasten: {words}", stacklevel=4)
        return found

    def _see(self, row: Mapping[str, float]) -> None:
        for name in APART:
            if name in row:
                value = abs(row[name])
                self._seen[name] = self._seen.get(name, 0) + 1
                self._follow(name, value)
                if self._seen[name] >= PATIENCE // 2:
                    slow = self._slow[name] / (1 - SLOW ** self._seen[name])
                    self._best[name] = min(self._best.get(name, slow), slow)
        for name in ("tangent", TURN):
            if name in row:
                self._follow(name, row[name])
        if "recall" in row:
            self._best["recall"] = max(self._best.get("recall", 0.0), row["recall"])

    def _follow(self, name: str, value: float) -> None:
        self._fast[name] = FAST * self._fast.get(name, 0.0) + (1 - FAST) * value
        self._slow[name] = SLOW * self._slow.get(name, 0.0) + (1 - SLOW) * value

    def _wrong(self, step: int, row: Mapping[str, float]) -> dict[str, str]:
        words = {}
        for name, most in APART.items():
            best = self._best.get(name, 0.0)
            if name in row and step >= PATIENCE and best > 0 and self._fast[name] > most * best:
                words[name] = WORDS[name].format(ratio=self._fast[name] / best, step=step)
        if "tangent" in row and self._fast["tangent"] > LARGE:
            words["tangent"] = WORDS["tangent"].format(value=self._fast["tangent"], step=step)
        if TURN in row and self._slow[TURN] < BACK:
            words["turning"] = WORDS["turning"].format(value=self._slow[TURN], step=step)
        if "recall" in row and row["recall"] < LOST * self._best["recall"]:
            words["recall"] = WORDS["recall"].format(value=row["recall"], best=self._best["recall"], step=step)
        return words

"""Whether a drafted text is the model's own, in words that say no more than is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hasten.ui.views.markup import text

SIGNS = {"same": "✓", "law": "✓", "differs": "≠", "lossy": "!", "plain": "–"}
"""Verdict -> its sign."""


def exact(about: Mapping[str, Any]) -> str:
    """HTML for the inside of a view; "" where nothing is known yet. about: `verdict`, `headline` and `sentence` of `Exactness`."""
    verdict = str(about.get("verdict") or "")
    if verdict not in SIGNS:
        return ""
    return (
        f'<div class="hv-exact hv-exact-{verdict}" role="group" aria-label="Exactness"><h3><span aria-hidden="true">{SIGNS[verdict]}</span> '
        f'{text(about.get("headline", ""))}</h3><p>{text(about.get("sentence", ""))}</p></div>'
    )

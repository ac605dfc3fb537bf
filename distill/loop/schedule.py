"""How a learning rate goes over a training."""

from __future__ import annotations


def learning_rate(step: int, steps: int, warmup: int, cooldown: float) -> float:
    """Factor in (0, 1]: linear warm-up, plateau, linear fall to zero over the last `cooldown` of the steps."""
    rise = (step + 1) / warmup if step < warmup else 1.0
    return min(rise, 1.0, (steps - step) / max(1.0, steps * cooldown))

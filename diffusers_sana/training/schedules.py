"""How far a run is through its budget of steps and minutes, and the learning rate that follows from it."""

import math


def budget_used(step: int, minutes: float, max_steps: int, max_minutes: float | None) -> float:
    """The larger fraction of the two budgets that is used up; 1 or more ends the run."""
    by_steps = step / max_steps
    return by_steps if max_minutes is None else max(by_steps, minutes / max_minutes)


def learning_rate_factor(step: int, used: float, schedule: str, warmup_steps: int) -> float:
    """What the peak learning rate is multiplied with at `step` (counted from 0), `used` of the budget gone."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "constant":
        return warmup
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, used)))

"""Durations with units, and learning rates as pure functions of the epoch."""

import math
import re

from phyla.errors import InputError


def n_steps(duration: str, *, steps_per_epoch: int, batch_size: int, total_steps: int) -> int:
    """Return the steps of a duration such as "20 epochs", "5000 steps", "1000000 images" or "5 %".

    Raises
    ------
    InputError
        The text is not one number and one unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(step|epoch|image)?(s?)(%?)\s*", str(duration))
    if not match or bool(match[2]) == bool(match[4]) or (match[3] and not match[2]):
        raise InputError(f"duration {duration!r} is not a number and a unit",
                         "for example '20 epochs', '500 steps', '5 %'")
    value, unit = float(match[1]), match[2] or "%"
    per_unit = {"step": 1.0, "epoch": float(steps_per_epoch), "image": 1 / batch_size, "%": total_steps / 100}
    return round(value * per_unit[unit])


def cosine(epoch: float, *, n_epochs: int, lr: float, floor: float = 0.0) -> float:
    """Return floor + (lr - floor) (1 + cos(pi epoch / n_epochs)) / 2: half a cosine from ``lr`` to ``floor``."""
    return floor + 0.5 * (lr - floor) * (1 + math.cos(math.pi * min(epoch / n_epochs, 1.0)))


def step_decay(epoch: float, *, lr: float, milestones: tuple[int, ...], decay: float = 0.1) -> float:
    """Return lr * decay ** (number of ``milestones`` strictly below ``epoch``)."""
    return lr * decay ** sum(milestone < epoch for milestone in milestones)


def learning_rate(epoch: int, *, lr: float, drop_epoch: int, drop_every: int, decay: float) -> float:
    """Return ``lr``, times ``decay`` at ``drop_epoch``, counted from 0, and again every ``drop_every`` epochs after it.

    Super-AND and TSUC, as released: 120 and 40, where the papers' text has the first drop at 80.
    """
    return lr if epoch < drop_epoch else lr * decay ** (1 + (epoch - drop_epoch) // drop_every)


def staircase(epoch: int, *, start: float, rise: float, every: int) -> float:
    """Return start + rise * floor(epoch / every)."""
    return start + rise * (epoch // every)


def warm_up(step: int, *, steps: int) -> float:
    """Return the factor, rising from 1/steps to 1, that a warm-up of ``steps`` steps puts on the learning rate."""
    return min(1.0, (step + 1) / steps) if steps else 1.0

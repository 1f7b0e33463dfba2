"""Lengths of time, and windows of steps, as a config writes them."""

import re

from tljax.errors import UserError

CLOCK = {"second": 1, "minute": 60, "hour": 3600}
LONGEST = 1000  # steps of a window: a trace holds every operation of each


def seconds(value: str, field: str) -> float:
    """Returns the seconds in `"90 seconds"`, `"10 minutes"` or `"1 hour"`, 0 for "" and "0". Raises UserError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(second|minute|hour)s?\s*", value)
    if not match and value not in ("", "0"):
        raise UserError(f"config.{field} = {value!r}: expected 'n seconds', 'n minutes' or 'n hours', or '' for never")
    return float(match[1]) * CLOCK[match[2]] if match else 0.0


def window(value: str, field: str) -> tuple[int, int] | None:
    """Returns the first and the last step of `"steps:100-110"`, None for "". Raises UserError for other texts."""
    if not value:
        return None
    match = re.fullmatch(r"\s*steps:(\d{1,12})(?:-(\d{1,12}))?\s*", value)
    if not match:
        raise UserError(f"config.{field} = {value!r}: expected 'steps:FIRST-LAST', as 'steps:100-110'")
    first, last = int(match[1]), int(match[2] or match[1])
    if not 1 <= first <= last:
        raise UserError(f"config.{field} = {value!r}: expected 1 <= first <= last")
    if last - first >= LONGEST:
        raise UserError(f"config.{field} = {value!r}: {last - first + 1} steps; a trace takes at most {LONGEST}")
    return first, last

"""What a search draws a field's value from, as a call: `axes({"optim.lr": "loguniform(1e-4, 1e-1)"})`."""

import dataclasses
import math

from tljax.config import call
from tljax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Numbers from `low` to `high`, both included: equally likely, or their logarithms; whole ones alone."""

    low: float
    high: float
    log: bool
    whole: bool

    def __str__(self) -> str:
        if self.whole:
            return f"integers({self.low}, {self.high}{', log=True' if self.log else ''})"
        return f"{'loguniform' if self.log else 'uniform'}({self.low!r}, {self.high!r})"

    def at(self, share: float) -> float:
        """The value below which a share, 0 to 1, of the draws lies (a whole one: with all that is equal to it)."""
        low, high = self.low, self.high + 1 if self.whole else self.high
        if self.log:
            value = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
        else:
            value = low + share * (high - low)
        value = math.floor(value) if self.whole else value
        return min(max(value, self.low), self.high)  # what rounding has carried past an end


def uniform(low: float, high: float) -> Distribution:
    """Any number from `low` to `high`."""
    return _checked("uniform", low, high, False, False)


def loguniform(low: float, high: float) -> Distribution:
    """Numbers whose logarithm is uniform: as many from 0.001 to 0.01 as from 0.01 to 0.1."""
    return _checked("loguniform", low, high, True, False)


def integers(low: int, high: int, log: bool = False) -> Distribution:
    """Whole numbers from `low` to `high`, both included."""
    return _checked("integers", low, high, log, True)


def _checked(name: str, low: float, high: float, log: bool, whole: bool) -> Distribution:
    given = f"{name}({low!r}, {high!r})"
    number = lambda value: isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number(low) or not number(high) or not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"distribution {given}: expected two {'whole ' if whole else ''}numbers")
    if not isinstance(log, bool):
        raise UserError(f"distribution {name}(log={log!r}): expected True or False")
    if not low < high:
        raise UserError(f"distribution {given}: expected low < high")
    if log and not low > 0:
        raise UserError(f"distribution {given}: expected low > 0, as its logarithm is drawn")
    return Distribution(low, high, log, whole) if whole else Distribution(float(low), float(high), log, whole)


DISTRIBUTIONS = {f.__name__: f for f in (uniform, loguniform, integers)}


def parse(text: str) -> Distribution:
    """The distribution that a config's text calls. Raises UserError for unknown names and arguments."""
    return call(text, DISTRIBUTIONS, "distribution")


def fits(distribution: Distribution, value) -> bool:
    """Whether a field that has this value can have those drawn: a whole number can stand for any other."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, float) or (whole and distribution.whole)

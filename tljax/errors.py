"""Mistakes of the user: one clear line, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable

LONGEST = 10_000  # characters of an error


class UserError(Exception):
    """Bad input. Its text is one line: what was found, where, what was expected, the nearest name."""

    def __init__(self, text: str):
        # Names that a file holds may have line breaks, control characters for the terminal, or any length.
        line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))
        super().__init__(line if len(line) <= LONGEST else f"{line[:LONGEST]} …")


class Diverged(UserError):
    """The loss is not finite."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Returns `"; nearest: a, b"` for the valid names closest to `name`, or `""` if none is close."""
    close = difflib.get_close_matches(str(name), [str(n) for n in names], n=count, cutoff=0.5)
    return f"; nearest: {', '.join(close)}" if close else ""


def unknown(kind: str, name: str, names: Iterable[str]) -> UserError:
    """The error for a name that does not exist, with the nearest ones or, failing that, all of them."""
    names = sorted(str(n) for n in names)
    return UserError(f"unknown {kind} {name!r}{nearest(name, names) or '; there are: ' + ', '.join(names)}")


def listing(names: Iterable[str], first: int = 10) -> str:
    """The first `first` names and the count of the others: `a, b, c and 12 more`."""
    names = [str(name) for name in names]
    more = len(names) - first
    return ", ".join(names[:first]) + (f" and {more} more" if more > 0 else "")

"""Patterns: how rules name parameters by their paths."""

import functools
import re

from tljax.errors import UserError


@functools.cache
def pattern_regex(pattern: str) -> re.Pattern:
    """Compiles a rule's pattern.

    A glob over the path: `*` stays within one key, `**` spans keys, `{bn,norm}` is either, and naming a node
    names all below it (`block3` is `block3/**`). A leading `**/` also matches at the root. `re:…` is a regular
    expression for the whole path; `!…` matches what the rest does not; `A & B` what both match. Raises UserError
    where it is malformed.
    """
    try:
        return re.compile(_expression(pattern))
    except re.error as error:
        raise UserError(f"pattern {pattern!r} is no regular expression: {error}") from None


BELOW = "(?:/.*)?"


def _expression(pattern: str) -> str:
    parts = pattern.split(" & ")
    if len(parts) > 1:
        return "".join(rf"(?=(?:{_expression(part)})\Z)" for part in parts) + ".*"
    if pattern.startswith("!"):
        return rf"(?!(?:{_expression(pattern[1:])})\Z).*"
    if pattern.startswith("re:"):
        return pattern[3:]
    glob = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
    glob = re.sub(r"\\\{(.*?)\\\}", lambda m: f"(?:{m[1].replace(',', '|')})", glob.replace(r"\?", "[^/]"))
    return glob + BELOW


def under(prefix: str, pattern: str) -> str:
    """The pattern that matches `prefix/PATH` where `pattern` matches `PATH`."""
    if " & " in pattern:
        return " & ".join(under(prefix, part) for part in pattern.split(" & "))
    if pattern.startswith(("!", "re:")):
        return f"re:{_expression(prefix).removesuffix(BELOW)}/(?:{_expression(pattern)})"
    return f"{prefix}/{pattern}"


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern covers the whole path."""
    return pattern_regex(pattern).fullmatch(path) is not None


def exactly(pattern: str, path: str) -> bool:
    """Whether the pattern names this very node: unlike a rule's, that of a node does not name all below it."""
    pattern_regex(pattern)
    return re.fullmatch(_expression(pattern).removesuffix(BELOW), path) is not None

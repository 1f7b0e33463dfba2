"""Conversion tables read backwards: what a naming calls our leaves, and the constants that its files hold beside them.

Regular expressions are enumerated rather than inverted: all names that a row's pattern can match, for as many blocks
as the model has, go through the table itself, and those that lead to a leaf of the model are that leaf's.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tljax.errors import UserError, listing
from tljax.weights import matcher, transforms
from tljax.weights.matcher import Part, Row

_TOKEN = re.compile(
    r"(?P<number>\\d\+)|(?P<word>\\w\+)|(?P<suffix>\\w\*)|(?P<digits>\\d\*)|(?P<digit>\\d)|\[(?P<set>[^\]]+)\]"
    r"|(?P<any>\.[*+])|(?P<open>\((?:\?:)?)|(?P<close>\))|(?P<either>\|)|(?P<maybe>\?\??)|\\(?P<escaped>\W)|(?P<plain>[\w/:-])"
)


class Constant(NamedTuple):
    """An array that follows from another: the ends of both names, and the function from that one."""

    name: str
    beside: str
    of: Callable[[np.ndarray], np.ndarray]


def _window_index(table: np.ndarray) -> np.ndarray:
    """Which row of a Swin table each pair of a window's places takes (Liu et al. 2021), all pairs as one axis."""
    window = (round(len(table) ** 0.5) + 1) // 2
    places = np.indices((window, window)).reshape(2, -1)
    apart = places[:, :, None] - places[:, None] + window - 1
    return (apart[0] * (2 * window - 1) + apart[1]).ravel()


CONSTANTS = {
    # No batch has been counted here: with a momentum, as all these norms have one, the count serves nothing.
    "count": Constant("num_batches_tracked", "running_var", lambda var: np.zeros((), np.int64)),
    "window_index": Constant("relative_position_index", "relative_position_bias_table", _window_index),
    # DINOv2's token for patches that are hidden in pre-training.
    "mask_token": Constant("mask_token", "cls_token", lambda token: np.zeros_like(token[0])),
}


class Names(NamedTuple):
    """What a file in a naming holds: its names with what each is made of, and {constant: (name beside, function)}."""

    parts: dict[str, tuple[Part, ...]]
    constants: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]]


def names(table: Sequence[Row], leaves: Collection[str], naming: str = "") -> Names:
    """What the table calls `leaves` ("params/stem/conv/kernel"). Raises UserError for leaves that it cannot name."""
    highest = len({leaf.split("/")[1] for leaf in leaves})  # stages, so no more blocks than that
    words = list(dict.fromkeys(word for leaf in leaves for word in leaf.split("/")))
    found: dict[tuple[str, ...], tuple[str, tuple, tuple[Part, ...]]] = {}
    for pattern, target, how in table:
        if target is None:
            continue
        compiled, several = re.compile(pattern), target if isinstance(target, tuple) else (target,)
        for name in matching(pattern, highest, words):
            match = compiled.fullmatch(name)
            ours = tuple(one(match) if callable(one) else one and match.expand(one) for one in several)
            if not all(leaf in leaves for leaf in ours):
                continue
            # A block may be counted beyond the end of the level before: its own level is the highest.
            numbers = tuple(int(group) for group in match.groups() if group.isdigit())
            if ours not in found or numbers > found[ours][1]:
                parts = tuple(Part(leaf, how, i, len(ours)) for i, leaf in enumerate(ours))
                found[ours] = (name, numbers, parts)
    whole = _once(found, naming)
    unnamed = sorted(set(leaves) - {part.leaf for parts in whole.values() for part in parts})
    if unnamed:
        raise UserError(f"the naming {naming!r} has no name for {listing(map(matcher.path_of, unnamed))}")
    return Names(whole, _constants(table, whole))


def _once(found: Mapping[tuple[str, ...], tuple[str, tuple, tuple[Part, ...]]], naming: str) -> dict:
    """{name: its parts}; of two rows for one leaf the first holds."""
    whole, taken = {}, set()
    for ours, (name, _, parts) in found.items():
        if name in whole:
            raise UserError(f"the naming {naming!r} calls both {listing(ours)} and another leaf {name!r}")
        if not taken & set(ours):
            whole[name] = parts
            taken |= set(ours)
    return whole


def _constants(table: Sequence[Row], names: Collection[str]) -> dict:
    found = {}
    for how, constant in CONSTANTS.items():
        if not any(target is None and row == how for _, target, row in table):
            continue
        beside = {n.removesuffix(constant.beside) + constant.name: n for n in names if n.endswith(constant.beside)}
        for name, parts in matcher.targets(beside, table).items():
            if parts and parts[0].leaf is None and parts[0].transform == how:
                found[name] = (beside[name], constant.of)
    return found


def made(parts: Sequence[Part], leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array of a file from the leaves that it holds."""
    pieces = [transforms.undo(part.transform, leaves[part.leaf]) for part in parts]
    return np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))


def matching(pattern: str, highest: int, words: Sequence[str] = ()) -> Iterator[str]:
    r"""All names that a pattern matches, the regular expression's first choices first.

    r"\d+" stands for the numbers from 0 to `highest`, r"\w+" for one of `words`. Knows groups, alternatives, sets,
    ? and ??, and of .* and r"\w*" the empty text; raises ValueError for what else there is in regular expressions.
    """
    tokens = []
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if not token:
            raise ValueError(f"the pattern {pattern!r} cannot be read backwards from {pattern[at:]!r}")
        tokens.append((token.lastgroup, token[token.lastgroup]))
        at = token.end()
    tree, rest = _alternatives(tokens, 0, highest, list(words))
    if rest < len(tokens):
        raise ValueError(f"the pattern {pattern!r} closes a group too many")
    yield from dict.fromkeys(_written(tree))


# A tree is a list of alternatives, each a list of items; an item is a list of texts or a tree.


def _alternatives(tokens: list, at: int, highest: int, words: list[str]) -> tuple[tuple, int]:
    found: list[list] = [[]]
    while at < len(tokens) and tokens[at][0] != "close":
        kind, text = tokens[at]
        at += 1
        if kind == "either":
            found.append([])
            continue
        if kind == "maybe":
            last = found[-1].pop()
            choices = list(_written(last)) if isinstance(last, tuple) else last
            found[-1].append(["", *choices] if text == "??" else [*choices, ""])
        elif kind == "open":
            inner, at = _alternatives(tokens, at, highest, words)
            found[-1].append(inner)
            at += 1  # the closing bracket
        else:
            found[-1].append(_texts(kind, text, highest, words))
    return tuple(found), at


def _texts(kind: str, text: str, highest: int, words: list[str]) -> list[str]:
    if kind == "number":
        return [str(n) for n in range(highest + 1)]
    if kind == "word":
        return words
    if kind == "any":  # which texts, nobody knows: none, or an optional group without them
        return [""] * (text == ".*")
    if kind == "suffix":
        return [""]
    if kind in ("digit", "digits"):
        return [""] * (kind == "digits") + list("0123456789")
    if kind == "set":
        spread = re.sub(r"(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), text)
        return list(spread)
    return [text]


def _written(tree: tuple) -> Iterator[str]:
    for items in tree:
        choices = [list(_written(item)) if isinstance(item, tuple) else item for item in items]
        yield from map("".join, itertools.product(*choices))

"""Writes weights in another naming: `python -m tljax.convert SRC DST --naming=torchvision`."""

from tljax import command

FORMATS = ("safetensors",)
USAGE = {
    "description": __doc__,
    "config": False,
    "to": f"format of DST: {', '.join(FORMATS)} (the default)",
    "naming": "how its tensors are called: torchvision, timm, transformers, google, … (default: tljax)",
    "model": "the network that SRC is of (default: as its card or its names tell)",
    "rest": "SRC DST",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tljax import errors, weights
from tljax.errors import UserError, listing
from tljax.report import text
from tljax.report.console import Console, quiet_libraries
from tljax.weights import cards, inverse, lazy, lookalike, matcher, runs, safetensors

OWN = "tljax"


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was read and what was written: names in the source that were left out, constants that were added."""

    model: str
    source_naming: str
    naming: str
    written: tuple[str, ...]
    left_out: tuple[str, ...]
    constants: tuple[str, ...]
    card: weights.Card
    size: int  # bytes


def convert(source: str, target: str | Path, naming: str = OWN, model: str = "") -> Converted:
    """Writes all leaves of `source`, in the types that it has, to a safetensors file in `naming`.

    model: "" where the card or the names tell. Raises UserError for a source that does not fit the model, a naming
    that has no name for a leaf, and a target that exists; there is never half a file.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a file that ends in .safetensors")
    if target.exists():
        raise UserError(f"{target} exists: delete it, or give another name")
    if not target.parent.is_dir():
        raise UserError(f"cannot write {target}: there is no folder {target.parent}")
    _check(naming, model)
    card = weights.card(source, model)
    path, arrays = weights.opened(card)
    shapes = lazy.shapes(arrays)
    if not (model or card.model):
        model = _recognised(shapes, path)
        card = weights.card(source, model)  # whose preprocessing is assumed
    model = model or card.model
    _check(naming, model)
    weights.check(card, model, ())
    source_naming, table = weights.table(card, model, list(shapes))
    result, leaves = _fit(shapes, table, model, source_naming, path)

    read = {leaf: _reader(arrays, *result.pairs[leaf]) for leaf in leaves}
    content, constants = _content(read, lookalike.tables(model)[naming], naming)
    told = cards.to_header(card)
    if runs.is_run(path):
        told |= {"tljax.classes": json.dumps(runs.classes(path))}
    # Hugging Face's readers ask for the format.
    size = safetensors.write(target, content, told | ({} if naming == OWN else {"format": "pt"}))
    left_out = tuple(name for name in result.ignored if name not in constants)
    return Converted(model, source_naming, naming, tuple(content), left_out, tuple(constants), card, size)


def _check(naming: str, model: str) -> None:
    """Raises UserError for a naming that no model has, or not this one."""
    from tljax import models

    if not model:
        known = {source for name in models.names() for source in lookalike.tables(name)}
        if naming not in known:
            raise errors.unknown("naming", naming, known)
    elif naming not in lookalike.tables(model):
        has = listing(sorted(lookalike.tables(model)))
        near = errors.nearest(naming, lookalike.tables(model))
        raise UserError(f"the model {model} has no naming {naming!r}{near}; it has: {has}")


def _recognised(shapes: Mapping[str, tuple[int, ...]], path: Path) -> str:
    found = lookalike.find(shapes, "")
    if not found:
        raise UserError(f"the keys of {path} look like those of no model here: say which it is of, --model=…")
    return found[0]


def _fit(shapes: Mapping[str, tuple], table: tuple, model: str, naming: str, path: Path) -> tuple[matcher.Fit, list]:
    """How the names pair up, and the leaves that are there; classes, positions and channels are as the file has them.

    A file without a head has none afterwards.
    """
    from tljax import models

    leaves = {p: tuple(leaf.shape) for p, leaf in matcher.flatten(models.shapes(models.create(model, 2))).items()}
    first = matcher.fit(shapes, table, leaves)
    headless = not any(leaf.startswith("params/head/") for leaf in first.pairs)
    free = {f"params/{position}": (0,) for position in models.positions(model)}
    for leaf, (found, expected) in first.misshaped.items():
        of_head = leaf.startswith("params/head/") and matcher.differ_only(found, expected, (len(expected) - 1,))
        of_image = matcher.differ_only(found, expected, (2,)) and leaf == models.stem(model)
        if of_head or of_image or matcher.differ_only(found, expected, free.get(leaf, ())):
            leaves[leaf] = found
    result = matcher.fit(shapes, table, leaves, reset=("head",) if headless else ())
    if result.problems:
        raise matcher.mismatch(result, str(path), model, naming, table)
    return result, [leaf for leaf in leaves if leaf in result.pairs]


def _reader(arrays: Mapping[str, np.ndarray], name: str, part: matcher.Part) -> Callable[[], np.ndarray]:
    return lambda: part.cut(arrays[name])


class _Leaves(Mapping):
    """The leaves, each read when it is asked for."""

    def __init__(self, read: Mapping[str, Callable[[], np.ndarray]]):
        self._read = read

    def __getitem__(self, leaf: str) -> np.ndarray:
        return self._read[leaf]()

    def __iter__(self):
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _content(read: Mapping[str, Callable], table: tuple, naming: str) -> tuple[dict[str, Callable], list[str]]:
    """{name in the file: the function that makes its array}, and the names of constants."""
    if naming == OWN:
        return dict(read), []
    names, leaves = inverse.names(table, read, naming), _Leaves(read)
    content = {name: (lambda parts=parts: inverse.made(parts, leaves)) for name, parts in names.parts.items()}
    for name, (beside, of) in names.constants.items():
        content[name] = lambda beside=beside, of=of: of(content[beside]())
    return content, list(names.constants)


def main(argv: list[str]) -> int:
    """Writes the weights SRC (a catalogue name, a file, hf:org/name, package:…, a run's folder) to the file DST."""
    flags = command.from_command_line(argv, **USAGE)
    if len(flags.rest) != 2:
        raise UserError(f"expected SRC and DST, found {len(flags.rest)} names: {listing(flags.rest) or 'none'}")
    if (flags.to or FORMATS[0]) not in FORMATS:
        raise errors.unknown("format", flags.to, FORMATS)
    quiet_libraries()
    source, target = flags.rest
    done, console = convert(source, target, flags.naming or OWN, flags.model), Console()
    count = len(done.written) - len(done.constants)
    console.print(
        f"{done.model}: {count} tensors in {done.naming} naming, {text.size(done.size)}, in {target} (from "
        f"{done.source_naming} naming)"
    )
    if done.constants:
        console.print(f"and {len(done.constants)} constants that its readers ask for: {listing(done.constants, 3)}")
    if done.left_out:
        console.print(f"left out of {source}: {len(done.left_out)}: {listing(done.left_out, 3)}")
    console.print(f"licence: {done.card.licence}; {done.card.origin}")
    return 0


if __name__ == "__main__":
    command.run(main)

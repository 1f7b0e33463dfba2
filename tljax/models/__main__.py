"""What there is: `python -m tljax.models` lists all networks, `python -m tljax.models 'vit*' resnet50` some."""

from tljax import command

USAGE = {
    "description": __doc__,
    "config": False,
    "rest": "names or patterns of networks, as 'vit*' (default: all)",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

from tljax import errors, models
from tljax.errors import listing
from tljax.models.counts import counts
from tljax.plan import matches
from tljax.report import text
from tljax.report.console import Console, quiet_libraries
from tljax.weights import CARDS

CLASSES = 1000
HEADINGS = ("parameters", "GFLOP", "size", "stages")


def main(argv: list[str]) -> int:
    """Prints a row a network: parameters, GFLOP of a forward pass, input size, stages, weights in the catalogue."""
    flags = command.from_command_line(argv, **USAGE)
    quiet_libraries()
    chosen, console = select(flags.rest), Console()
    width = max(map(len, chosen))
    console.print(line("model", HEADINGS, "weights", width), style="bold")
    for name in chosen:  # each as soon as it is counted: all of them take a while
        model = models.create(name, CLASSES)
        found = counts(model)
        cells = (text.thousands(found.parameters), f"{found.flops / 1e9:.2f}", str(model.size), str(len(model.stages)))
        console.print(line(name, cells, listing([card.name for card in cards(name)], 1), width))
    console.print(
        f"\nwith {CLASSES} classes; GFLOP: 10^9 operations of a forward pass of one image of that size, a multiply-add "
        "counting as two"
    )
    for card in (card for name in chosen for card in cards(name)):
        top1 = "" if card.top1 is None else f", top-1 {card.top1:.1f} %"
        licence = f"{card.licence} ({card.note})" if card.note else card.licence
        console.print(f"weights {card.name}: {licence}, {card.trained_on}{top1}; {card.source}; {card.origin}")
    return 0


def select(patterns: list[str]) -> list[str]:
    """The names that a pattern matches, in the order of `models.names`. Raises UserError for one without a match."""
    names = models.names()
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise errors.unknown("model", pattern, names)
    return [name for name in names if not patterns or any(matches(pattern, name) for pattern in patterns)]


def cards(name: str) -> list:
    """The catalogue's weights for a model."""
    return [card for card in CARDS.values() if card.model == name]


def line(name: str, cells: tuple[str, ...], last: str, width: int) -> str:
    """One line of the table; numbers are aligned right."""
    widths = (11, 7, 4, 6)
    return "  ".join([f"{name:<{width}}", *(f"{cell:>{w}}" for cell, w in zip(cells, widths)), last]).rstrip()


if __name__ == "__main__":
    command.run(main)

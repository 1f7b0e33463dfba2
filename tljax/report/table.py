"""The plan's table: one layout, for the terminal with colours and for plan.txt without."""

import re
import textwrap
from collections.abc import Mapping, Sequence

from rich.text import Text

from tljax.report import text

WIDTH = 100
COLUMNS = (  # key, heading, how a cell is written; the first column is aligned left, numbers right
    ("stage", "stage", str),
    ("parameters", "parameters", text.thousands),
    ("trainable", "trainable", text.thousands),
    ("multiplier", "multiplier", lambda v: _multiplier(v)),
    ("decay", "decay", str),
    ("norm", "norm", str),
    ("optimizer_bytes", "optimizer", text.size),
)
RIGHT = {"parameters", "trainable", "multiplier", "optimizer_bytes"}


class PlanTable:
    """The laid out table: `str(table)` is plain text, rich prints it with colours (frozen stages dimmed)."""

    def __init__(self, lines: Sequence[tuple[str, str]]):
        self.lines = list(lines)  # (line, rich style)

    def __str__(self) -> str:
        return "\n".join(line for line, _ in self.lines)

    def __rich__(self) -> Text:
        lines = [Text(line, style) for line, style in self.lines]
        return Text("\n", no_wrap=True, overflow="ignore").join(lines)


def plan_table(rows: Sequence[Mapping], totals: Mapping, rules: Sequence) -> PlanTable:
    """Lays out a plan in at most 100 columns.

    rows: one a stage: stage, parameters, trainable, multiplier (a number or text such as "0.1–1"), decay
    ("yes" | "no" | "some"), norm ("moving" | "stored" | "-"), optimizer_bytes; totals: parameters, trainable,
    optimizer_bytes, and anything else as a line `key: value`; rules: (pattern, multiplier, leaves) or dicts.
    """
    cells = [[_cell(row, key, write) for key, _, write in COLUMNS] for row in rows]
    total = {"stage": "total", "multiplier": "", **totals}
    share = totals["trainable"] / totals["parameters"] if totals.get("parameters") else None
    foot = [_cell(total, key, write) if key in total else "" for key, _, write in COLUMNS]
    head = [heading for _, heading, _ in COLUMNS]
    widths = [max(len(line[i]) for line in [head, foot, *cells]) for i in range(len(COLUMNS))]
    widths[0] = min(widths[0], 30)  # a user's own model may have longer names than fit
    rule = ("  ".join("─" * w for w in widths), "dim")
    lines = [(_line(head, widths), "bold"), rule]
    for row, line in zip(rows, cells):
        lines.append((_line(line, widths), "" if row["trainable"] else "dim"))
    lines += [rule, (_line(foot, widths), "bold")]
    if share is not None:
        lines.append((f"{text.percent(share)} of the parameters train", ""))
    extra = {k: v for k, v in totals.items() if k not in {key for key, _, _ in COLUMNS} and v is not None}
    lines += [(line, "") for k, v in extra.items() for line in _wrapped(f"{k.replace('_', ' ')}: {v}")]
    if rules:
        first, *rest = _rules(rules)
        lines += [("", ""), (first, "bold"), *((line, "") for line in rest)]
    return PlanTable(lines)


def _rules(rules: Sequence) -> list[str]:
    """The rules in their order: multiplier, leaves, pattern (broken after `|`, `,` or a space where it is too long)."""
    rules = [_rule(r) for r in rules]
    values = max(len("multiplier"), *(len(value) for _, value, _ in rules))
    counts = max(len("leaves"), *(len(leaves) for _, _, leaves in rules))
    lines = []
    for pattern, value, leaves in rules:
        first, *rest = _broken(pattern, WIDTH - values - counts - 4)
        lines.append(f"{value:>{values}}  {leaves:>{counts}}  {first}")
        lines += [" " * (values + counts + 4) + part for part in rest]
    return [f"{'multiplier':>{values}}  {'leaves':>{counts}}  rule (the first that matches decides)", *lines]


def _rule(rule) -> tuple[str, str, str]:
    if isinstance(rule, Mapping):
        rule = rule["pattern"], rule["multiplier"], rule["leaves"]
    pattern, value, leaves = rule
    return str(pattern), _multiplier(value), text.thousands(leaves)


def _broken(pattern: str, width: int) -> list[str]:
    lines = [""]
    for piece in re.findall(r"[^|, ]+[|, ]?|[|, ]", pattern):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return [part for line in lines for part in textwrap.wrap(line, width, break_on_hyphens=False) or [""]]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    out = []
    for (key, _, _), cell, width in zip(COLUMNS, cells, widths):
        cell = cell if len(cell) <= width else cell[: width - 1] + "…"
        out.append(f"{cell:>{width}}" if key in RIGHT else f"{cell:<{width}}")
    return "  ".join(out).rstrip()


def _cell(row: Mapping, key: str, write) -> str:
    value = row.get(key)
    return "-" if value is None else write(value)


def _multiplier(value) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _wrapped(line: str, width: int = WIDTH) -> list[str]:
    return textwrap.wrap(line, width, break_on_hyphens=False) or [""]

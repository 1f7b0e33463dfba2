"""report.html of a sweep: what was tried, what came of it, what is the best, on one page that needs no network."""

import math
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ml_collections import ConfigDict

from tljax import grid
from tljax.distributions import Distribution
from tljax.grid import NUMBERS, REPEATS, STREAMS, names
from tljax.report import ranking, sweep_curves, sweep_pictures, text
from tljax.report.page import _e, _grid, _picture, _section, document
from tljax.report.ranking import Metric, Paired, Ranked, Setting
from tljax.report.sweep_view import View, figure, named
from tljax.workdir import Workdir

RANKED, LISTED = 60, 400  # rows of the ranking, and of the list of members
SHARE = 0.05  # of a running sweep's time, that drawing may take
REPEATED = (
    "Lines are means over repeats, dots the repeats; the band is the 95 % interval of the mean, from three repeats on. "
    "Ringed: the best on val. A cross on the edge: a repeat has diverged. "
)
ELIMINATED = "Who was eliminated has the figures of his last rung. "
OTHERS = "Where settings differ in further axes the best on val is shown. "
HOW = {"vmap": "at once", "map": "in turn, in one step", "sequence": "one run after another"}
CURVES = {  # of the axes that every such sweep has: file, title
    "optim.lr": ("learning_rates.png", "Learning rates"), "data.limit": ("learning_curves.png", "Learning curves"),
}  # fmt: skip


class Page:
    """The page and the pictures of a sweep; `write` makes them anew from the rows that there are."""

    def __init__(self, folder: Workdir, config: ConfigDict):
        self.folder, self.config = folder, config
        self.next = 0.0  # when it is worth drawing again

    def write(self, rows: Sequence[dict], planned: int, last: bool = True) -> None:
        """Writes `report.html` and its pictures; while the sweep goes on only if it has not just done so.

        The pictures are PNG files and, at the end, PDF ones too. Nothing is written as long as there are no rows.
        """
        begun = time.monotonic()
        if not rows or (begun < self.next and not last):
            return
        view = View(rows, self.config)
        drawn = [_picture(self.folder.path, *told) for told in self.pictures(view, last)]
        self.folder.write("report.html", document(self.config.name, [*parts(view, planned, drawn, self.folder.path)]))
        ended = time.monotonic()
        self.next = ended + (ended - begun) / SHARE

    def pictures(self, view: View, vector: bool = True) -> list[tuple[str, str, str]]:
        """Draws what the axes allow; returns (file, title, caption) of each."""
        found = []

        def draw(name: str, title: str, caption: str, make: Callable, *what) -> None:
            drawn = self.folder.path / f".drawn{self.folder.mark}-{name}"
            make(view, *what, drawn, vector)
            for suffix in (".pdf", ".png") if vector else (".png",):  # whole, whoever else draws or reads
                drawn.with_suffix(suffix).replace((self.folder.path / name).with_suffix(suffix))
            found.append((name, title, caption))

        halved = any(row["status"].startswith("eliminated") for row in view.rows)
        for x in view.numeric[:3]:
            caption = REPEATED + (ELIMINATED if halved else "") + (OTHERS if len(view.axes) > 2 else "")
            name, title = CURVES.get(x, (f"over_{re.sub('[^a-zA-Z0-9]+', '_', x)}.png", _title(named(x))))
            draw(name, title, caption, sweep_curves.curves, x)
        for x, y in view.pairs():
            caption = "Means over repeats; the best on val is framed. A cross: a repeat has diverged. "
            draw("heat_map.png", _title(f"{named(y)} × {named(x)}"), caption + (OTHERS if len(view.axes) > 2 else ""),
                 sweep_pictures.heat_map, x, y)  # fmt: skip
        if any(str(view.metric) in point for row in view.rows for point in row["curve"]):
            caption = "The best setting of each line above: thin the repeats, thick their mean."
            draw("training_curves.png", "Training", caption, sweep_pictures.training_curves)
        caption = "Settings by their mean on val: dots are repeats, the bar is the 95 % interval of the mean."
        draw("ranking.png", "Order", caption, sweep_pictures.order)
        return found


def parts(view: View, planned: int, drawn: list[str], path) -> list[str]:
    """The parts of the page, `drawn` among them."""
    axes = ", ".join(grid.told(view.config.sweep))
    left = planned - len(view.rows)
    state = f"{len(view.rows):,} of {text.counted(planned, 'member')} have ended"
    state += ", the others are to come" if left > 0 else ""
    head = f'<header><h1>{_e(view.config.name)}</h1><p class="lead">{_e(f"{state} · {axes}")}</p></header>'
    return [
        head, _cards(view, planned), *drawn[:-1], _ranking(view, drawn[-1:]), _best(view, path), _unfinished(view),
        _axes(view), _groups(view), _members(view),
    ]  # fmt: skip


def spread(setting: Setting, metric: Metric) -> str:
    """Mean ± standard deviation over the repeats: `84.6 ± 0.7 %`."""
    scores = list(setting.scores(*metric).values())
    if not scores:
        return "-"
    mean = sum(scores) / len(scores)
    if len(scores) < 2:
        return figure(mean, metric)
    sd = math.sqrt(sum((v - mean) ** 2 for v in scores) / (len(scores) - 1))
    if metric.sign > 0:
        return f"{100 * mean:.1f} ± {100 * sd:.1f} %"
    return f"{mean:.3f} ± {sd:.3f}"


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = (0,)) -> str:
    """A table of escaped cells; the columns `words` are text, the others numbers."""
    kind = lambda i: "" if i in words else ' class="n"'
    line = lambda tag, cells: "".join(f"<{tag}{kind(i)}>{cell}</{tag}>" for i, cell in enumerate(cells))
    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{line("th", map(_e, head))}</tr>{body}</table></div>'


def _cards(view: View, planned: int) -> str:
    main, small = [], []
    if view.ranked and not math.isnan(view.ranked[0].value):
        best, runs = view.ranked[0].setting, view.ranked[0].setting.rows
        over = f"mean ± standard deviation of {len(runs)}" if len(runs) > 1 else "one run"
        main.append((spread(best, view.metric), f"{view.metric} of the best", f"{view.said(best)}; {over}"))
        if best.scores(*view.told):
            main.append((spread(best, view.told), f"{view.told} of it", "test has chosen nothing"))
    seconds = sum(row["seconds"] or 0 for row in view.rows)
    small.append((f"{len(view.rows):,} of {planned:,}", "members have ended", ""))
    groups = {row["group"] for row in view.rows if row.get("group") is not None}
    if groups:
        small.append((f"{len(groups):,}", "groups, each with one compiled step", ""))
    each = f"{text.duration(seconds / len(view.rows))} a member"
    small.append((text.duration(seconds), f"to train and evaluate, {each}", ""))
    ends = Counter(row["status"].split(" at ")[0] for row in view.rows)
    small += [(f"{count:,}", end, "") for end, count in ends.items() if end != "finished"]
    return _grid(main, "") + _grid(small, "small")


def _ranking(view: View, picture: list[str]) -> str:
    """The settings in their order, each with a test against the best."""
    metric, told = view.metric, view.told
    tests = [t for rank in view.ranked for t in (rank.val, rank.test) if t]
    tested = sum(rank.val is not None and rank.val.p is not None for rank in view.ranked)
    head = ["", "setting", "n", str(metric), "difference", "p", str(told), "difference", "p"]
    rows = []
    for place, rank in enumerate(view.ranked[:RANKED], 1):
        name = _e(view.said(rank.setting)) + _ended(rank)
        cells = [_e(spread(rank.setting, metric)), *_compared(rank.val, metric)]
        cells += [_e(spread(rank.setting, told)), *_compared(rank.test, told)]
        rows.append([str(place), name, str(len(rank.setting.rows)), *cells])
    table = _columns(head, rows, (1,))
    more = len(view.ranked) - RANKED
    said = [f"{more:,} more are in sweep.csv."] if more > 0 else []
    said += [
        f"Chosen by the mean of {metric} over repeats; figures of test choose nothing. Means ± standard deviations; "
        "n is the number of repeats. Who has a diverged repeat is last."
    ]
    if tested:
        said.append(
            "Each setting is compared with the best by a two-sided paired t-test of the differences, paired by seed "
            f"and fold; p is corrected for {text.counted(tested, 'comparison')} (Holm)."
        )
        if any(test.corrected for test in tests):
            said.append(
                "Training sets of folds overlap: repeats of one fold count once, and the variance of the mean is "
                "(1/n + n_val/n_train) s² (Nadeau and Bengio 2003)."
            )
        said.append("The best on val was picked for being the best: its difference on test is the fairer one.")
    elif len(view.ranked) > 1:
        said.append(f"Too few repeats for a test: it takes {ranking.FEW} pairs of equal seeds or folds.")
    note = f'<p class="note">{_e(" ".join(said))}</p>'
    return "".join(picture) + _section("Ranking", table + note)


def _ended(rank: Ranked) -> str:
    ends = Counter(row["status"].split(" at ")[0] for row in rank.setting.rows)
    odd = [f"{count} {end}" for end, count in ends.items() if end != "finished"]
    return f' <span class="bad">{_e(", ".join(odd))}</span>' if odd else ""


def _compared(test: Paired | None, metric: Metric) -> list[str]:
    """[difference, p] as cells."""
    if test is None or not test.n:
        return ["", ""]
    of = f"{100 * test.difference:+.1f}" if metric.sign > 0 else f"{test.difference:+.3f}"
    if test.p is None:
        return [_e(of), f"too few ({test.n})"]
    return [_e(of), "&lt; 0.001" if test.p < 0.001 else f"{test.p:.3f}"]


def _best(view: View, path) -> str:
    file = path / "best.py"
    if not view.ranked or math.isnan(view.ranked[0].value) or not file.exists():
        return _section("The best config", f'<p class="missing">No member has a {_e(view.metric)} yet.</p>')
    said = ", ".join(f"{field} = {value!r}" for field, value in view.ranked[0].setting.fields.items())
    command = f"python -m tljax.train --config={file}"
    note = f'<p class="note">{_e(said or "There is one setting.")}</p>'
    return _section("The best config", f"<pre>{_e(command)}</pre>{note}")


def _unfinished(view: View) -> str:
    odd = [row for row in view.rows if row["status"] != "finished"]
    if not odd:
        return ""
    found = {row["number"]: setting for setting in view.settings for row in setting.rows}
    rows = [
        [str(row["number"]), _e(view.said(found[row["number"]])), _e(_repeat(row)), _e(row["status"])]
        for row in odd[:LISTED]
    ]
    table = _columns(["member", "setting", "repeat", "how it ended"], rows, (1, 2, 3))
    return _section("Not finished", f'<div class="scroll">{table}</div>')


def _repeat(row: dict) -> str:
    return ", ".join(f"{name} {row['fields'][name]}" for name in REPEATS if name in row["fields"])


def _axes(view: View) -> str:
    rows = []
    for axis, values in grid.space(view.config).axes.items():
        fields = [name for name in names(axis) if not name.startswith("#")]
        kind = "groups"
        if fields == ["strategy"]:
            kind = "groups, one for each set of parameters that train"
        elif all(field in NUMBERS for field in fields):
            kind = "numbers: in one compiled step"
        elif all(field in NUMBERS + STREAMS for field in fields):
            kind = "seeds and subsets: in one compiled step on kept features"
        if isinstance(values, Distribution):
            rows.append([_e(axis), "any", _e(str(values)), _e(kind)])
            continue
        labels = [i for i, name in enumerate(names(axis)) if name.startswith("#")]
        short = lambda value, labels=labels: " ".join(str(value[i]) for i in labels) if labels else str(value)
        written = ", ".join(map(short, values))
        rows.append([_e(axis.replace("#", "")), str(len(values)), _e(written), _e(kind)])
    return _section("Axes", _columns(["axis", "values", "", ""], rows, (0, 2, 3)))


def _groups(view: View) -> str:
    groups: dict[int, list[dict]] = {}
    for row in view.rows:
        groups.setdefault(row.get("group"), []).append(row)
    if None in groups:
        return ""
    found = {row["number"]: setting for setting in view.settings for row in setting.rows}
    cells = []
    for rows in groups.values():
        common = [
            name for name in view.axes
            if len({repr(found[row["number"]].fields.get(name)) for row in rows}) == 1 and name in rows[0]["fields"]
        ]  # fmt: skip
        said = ", ".join(view.written(name)[repr(rows[0]["fields"][name])] for name in common)
        seconds = sum(row["seconds"] for row in rows)
        kept = f"features in {rows[0]['kept']}" if rows[0]["kept"] else "photographs, each step anew"
        how = HOW.get(rows[0]["how"], rows[0]["how"])
        cells.append([_e(said or "all"), f"{len(rows):,}", _e(how), _e(kept), _e(text.duration(seconds))])
    return _section("Groups", _columns(["in common", "members", "in the step", "on", "time"], cells, (0, 2, 3)))


def _members(view: View) -> str:
    found = {row["number"]: setting for setting in view.settings for row in setting.rows}
    rows = []
    for row in view.rows[:LISTED]:
        figures = [figure((row[m.split] or {}).get(m.name, math.nan), m) for m in (view.metric, view.told)]
        best = (row["best"] or {}).get("epoch")
        cells = [_repeat(row), row.get("n_train", "-"), row["status"], text.number(row["epochs"])]
        cells += ["-" if best is None else text.number(best), *figures, text.duration(row["seconds"])]
        rows.append([str(row["number"]), _e(view.said(found[row["number"]])), *map(_e, cells)])
    head = ["member", "setting", "repeat", "n_train", "ended", "epochs", "best epoch"]
    head += [str(view.metric), str(view.told), "time"]
    more = len(view.rows) - LISTED
    note = "All figures: " + ", ".join(f'<a href="{name}">{name}</a>' for name in ("sweep.csv", "curves.jsonl")) + "."
    note = f'<p class="note">{f"{more:,} more are in the table. " if more > 0 else ""}{note}</p>'
    table = f'<div class="scroll">{_columns(head, rows, (1, 2, 4))}</div>'
    return _section("Members", f"<details><summary>{len(view.rows):,} in all</summary>{table}{note}</details>")

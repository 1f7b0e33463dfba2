"""The pictures of a sweep, as PNG and, for papers, as PDF: heat map, training curves, ranking."""

import io
import math

import numpy as np

from tljax.report import ranking, text
from tljax.report.pictures import GREY, INK, PALE, _colours, _figure, _saved, _short
from tljax.report.ranking import Metric, Ranked, Setting
from tljax.report.sweep_view import View, named

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow that white paper swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8c6d31")
MARKERS = "osD^vPX<"
PANEL = 4.3  # inches wide: a picture of two panels is legible at the width of a page, and one at that of a column
PLACES = 24  # settings of the ranking


def save(drawing, path, vector: bool):
    """Writes a Figure as PNG at `path` and, if `vector`, beside it as PDF; returns it."""
    from etils import epath

    if vector:
        buffer = io.BytesIO()
        drawing.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": "tljax"})
        epath.Path(path).with_suffix(".pdf").write_bytes(buffer.getvalue())
    return _saved(drawing, path)


def legend(drawing, ax, title: str) -> None:
    """The names of a panel's lines below the picture, which grows for them."""
    handles, labels = ax.get_legend_handles_labels()
    labels = [label for label in labels if label]
    if not labels:
        return
    width = drawing.get_figwidth()
    columns = max(1, min(len(labels), int(width * 12 / (max(map(len, labels)) + 6))))
    lines = math.ceil(len(labels) / columns)
    drawing.set_figheight(drawing.get_figheight() + 0.22 * lines)
    made = drawing.legend(handles, labels, loc="outside lower center", ncols=columns, title=title, fontsize=9,
                          title_fontsize=9, frameon=False)  # fmt: skip
    for entry in made.get_texts():
        entry.set_parse_math(False)


def colour(i: int) -> str:
    """The colour of the i-th line; of the many that come after the last colour, grey."""
    return COLOURS[i] if i < len(COLOURS) else "#b8c0c8"


def called(metric: Metric) -> str:
    """A figure's name, and its unit, above a panel."""
    names = {"nll": "negative log-likelihood", "accuracy": "accuracy, %", "macro_f1": "macro F1, %"}
    return f"{metric.split} {names.get(metric.name, metric.name)}"


def panels_of(view: View) -> list[Metric]:
    """The figures that there are."""
    return [m for m in (view.metric, view.told) if any(s.scores(*m) for s in view.settings)] or [view.metric]


def percent(axis, metric: Metric) -> None:
    """Writes shares along an axis as per cent; the panel's title has the unit."""
    if metric.sign > 0:
        axis.set_major_formatter(lambda v, _: f"{100 * v:.4g}")


def near(values: list[float], metric: Metric) -> tuple[float, float]:
    """(lowest, highest) of figures that a picture has to show: what is far worse than most leaves it."""
    values = [v for v in values if math.isfinite(v)]
    low, high = min(values), max(values)
    if metric.sign < 0 and high > low:
        high = min(high, low + 4 * (float(np.median(values)) - low) + 1e-6)
    return low, high


# ---- two axes


def heat_map(view: View, x: str, y: str, path, vector: bool = False):
    """Draws the means over two axes, with their numbers, on val and on test; returns the Figure.

    In each cell the best on val of the settings that differ in further axes. Grey: none has ended; with a cross: one
    of them has diverged.
    """
    xs, ys, panels = view.axes[x], view.axes[y], panels_of(view)
    cells = {
        (i, j): view.best(s for s in view.settings if (s.fields.get(y), s.fields.get(x)) == (b, a))
        for i, b in enumerate(ys) for j, a in enumerate(xs)
    }  # fmt: skip
    names = [_short(name, 34) for name in view.written(y).values()]
    cell = 0.62 if len(xs) <= 10 else 0.5
    wide, high = max(2.2, cell * len(xs)), max(0.9, 0.36 * len(ys))
    with _figure(len(panels) * wide + 0.085 * max(map(len, names)) + 1.4, high + 1.5) as drawing:
        axes = drawing.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, metric in zip(axes, panels):
            _cells(ax, cells, metric)
            ax.set_xticks(range(len(xs)), view.written(x).values(), rotation=45 if len(xs) > 5 else 0, fontsize=8.5,
                          ha="right" if len(xs) > 5 else "center", rotation_mode="anchor" if len(xs) > 5 else None,
                          parse_math=False)  # fmt: skip
            ax.set_yticks(range(len(ys)), names, fontsize=8.5, parse_math=False)
            ax.set_xlabel(named(x))
            ax.set_title(called(metric), fontsize=10)
            best = next((at for at, s in cells.items() if s and view.ranked and s is view.ranked[0].setting), None)
            if best and not math.isnan(view.ranked[0].value):
                from matplotlib.patches import Rectangle

                ax.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, ec=INK, lw=2, zorder=5,
                                       clip_on=False))  # fmt: skip
        axes[0].set_ylabel(named(y))
        return save(drawing, path, vector)


def _cells(ax, cells: dict[tuple[int, int], Setting | None], metric: Metric) -> None:
    """Colour by value, the better the darker; outliers at the bad end share its colour."""
    grid = np.full(np.max(list(cells), 0) + 1, np.nan)
    for at, setting in cells.items():
        grid[at] = ranking.value(setting, metric) if setting else math.nan
    good = np.sort(grid[np.isfinite(grid)]) if metric.sign > 0 else -np.sort(-grid[np.isfinite(grid)])
    low, high = (good[len(good) // 10], good[-1]) if len(good) else (0.0, 1.0)
    shade = np.clip((grid - low) / ((high - low) or 1), 0, 1)
    ax.imshow(np.ma.masked_invalid(0.05 + 0.7 * shade), cmap=_colours(), vmin=0, vmax=1, aspect="auto")
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    for (i, j), value in np.ndenumerate(grid):
        said = "×" if cells[i, j] and cells[i, j].failed else ""
        if math.isfinite(value):
            said = f"{100 * value:.1f}" if metric.sign > 0 else f"{value:.3f}" if value < 1 else f"{value:.2f}"
        ax.text(j, i, said, ha="center", va="center", fontsize=8.5, color="white" if shade[i, j] > 0.6 else INK)


# ---- in time, and in order


def training_curves(view: View, path, vector: bool = False):
    """Draws the metric on val during training for the best setting of each line; returns the Figure.

    Thin: its repeats. Thick: their mean, where they were evaluated at the same places.
    """
    groups = {name: setting for name, setting in view.groups().items() if setting}
    unit = "step" if len({round(view.photographs(s), 1) for s in groups.values()}) > 1 else "epoch"
    metric = view.metric
    with _figure(PANEL * 1.35, 3.4) as drawing:
        ax = drawing.subplots()
        shown = []
        for i, (name, setting) in enumerate(groups.items()):
            each = [
                [(p[unit], p[str(metric)]) for p in row["curve"] if math.isfinite(p.get(str(metric)) or math.nan)]
                for row in setting.rows
            ]
            each = [np.array(points) for points in each if points]
            style = {"color": colour(i)}
            for points in each if len(each) > 1 else ():
                ax.plot(*points.T, lw=0.7, alpha=0.35, **style)
            alike = [p for p in each if len(p) == max(map(len, each)) and np.allclose(p[:, 0], each[0][: len(p), 0])]
            if alike:
                mean = np.mean(alike, 0)
                best = view.said(setting) if len(view.axes) > 1 or not name else name
                ax.plot(*mean.T, lw=1.8, marker=MARKERS[i % len(MARKERS)] if len(mean) < 30 else None, ms=4,
                        mec="white", mew=0.5, label=best, **style)  # fmt: skip
                shown += [value for points in alike for value in points[:, 1]]
        ax.set_xlabel(unit)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_title(f"{called(metric)} in training, the best of each", fontsize=10)
        percent(ax.yaxis, metric)
        if not shown:
            ax.text(0.5, 0.5, "no evaluations", transform=ax.transAxes, ha="center", color=GREY)
        elif metric.sign < 0:
            low, high = min(shown), np.quantile(shown, 0.97)
            ax.set_ylim(max(0, low - 0.06 * (high - low)), high + 0.05 * (high - low) + 1e-9)
        legend(drawing, ax, "")
        return save(drawing, path, vector)


def order(view: View, path, vector: bool = False):
    """Draws the settings from best to worst, each repeat a dot, the mean with its 95 % interval; returns the Figure."""
    ranks, panels = view.ranked[:PLACES], panels_of(view)
    names = [_short(view.said(rank.setting), 64) for rank in ranks]
    width = len(panels) * 2.9 + 0.085 * max(map(len, names))
    with _figure(width, 0.9 + 0.27 * max(len(ranks), 2)) as drawing:
        axes = drawing.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for ax, metric in zip(axes, panels):
            for place, rank in enumerate(ranks):
                _row(ax, place, rank, metric)
            ax.set_ylim(len(ranks) - 0.4, -0.6)
            ax.set_yticks(range(len(ranks)), names, fontsize=8, parse_math=False)
            ax.grid(axis="y", visible=False)
            _range(ax, [rank.setting for rank in ranks], metric)
            ax.set_title(called(metric), fontsize=10)
        return save(drawing, path, vector)


def _row(ax, place: int, rank: Ranked, metric: Metric) -> None:
    scores = list(rank.setting.scores(*metric).values())
    tone = COLOURS[1] if place == 0 else COLOURS[0]
    if not scores:
        ax.text(0.5, place, "diverged" if rank.setting.failed else "-", transform=ax.get_yaxis_transform(), fontsize=8,
                color=GREY, va="center")  # fmt: skip
        return
    mean, half = rank.setting.interval(*metric)
    ax.axhline(place, color=PALE, lw=0.7, zorder=0)
    ax.plot(scores, [place] * len(scores), "o", ms=3.2, mew=0, alpha=0.4, color=tone)
    if math.isfinite(half):
        ax.plot([mean - half, mean + half], [place, place], color=tone, lw=1.6)
    ax.plot([mean], [place], "D", ms=5, mec="white", mew=0.6, color=tone)


def _range(ax, settings: list[Setting], metric: Metric) -> None:
    values = [v for s in settings for v in s.scores(*metric).values()]
    percent(ax.xaxis, metric)
    if values:
        low, high = near(values, metric)
        room = 0.07 * ((high - low) or abs(high) or 1)
        ax.set_xlim(low - room, high + room)


def caption(repeats: int) -> str:
    """What dots and bands are, for so many repeats."""
    if repeats < 2:
        return "One run a point: there is no band, as nothing was repeated."
    band = " The band is the 95 % interval of the mean (Student)." if repeats >= ranking.FEW else ""
    return f"Lines are means of up to {text.counted(repeats, 'repeat')}, dots the repeats.{band}"

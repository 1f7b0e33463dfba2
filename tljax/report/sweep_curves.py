"""A sweep's figures over one of its axes: learning-rate curves, learning curves over the number of photographs."""

import math
from collections.abc import Callable

import numpy as np

from tljax.report.pictures import GREY, INK, _figure
from tljax.report.ranking import Metric, Setting
from tljax.report.sweep_pictures import MARKERS, PANEL, called, colour, legend, near, panels_of, percent, save
from tljax.report.sweep_view import Point, View, figure, named, numeric

SCATTER = 12  # more values of an axis than these were drawn at random: points, no line


def curves(view: View, x: str, path, vector: bool = False):
    """Draws the figures on val and test over an axis, a line for each value of another; returns the Figure.

    Means over repeats, each repeat a dot, the band the 95 % interval of the mean. Of settings that differ in further
    axes the best on val is shown. Over `data.limit` the abscissa is the number of training photographs.
    """
    line = view.lines(x)
    names = view.written(line) if line else {"": ""}
    of = {repr(v): v for v in view.axes[line]} if line else {"": None}
    found = {key: view.curve(x, line, of[key]) for key in names}
    place, name = _abscissa(view, x, [point for points in found.values() for point in points])
    panels = panels_of(view)
    with _figure(PANEL * len(panels), 3.5) as drawing:
        axes = drawing.subplots(1, len(panels), squeeze=False)[0]
        for ax, metric in zip(axes, panels):
            for i, (key, points) in enumerate(found.items()):
                at = sorted(((place(p), p.setting) for p in points), key=lambda pair: pair[0])
                _line(ax, at, metric, i, names[key], len(view.axes[x]) > SCATTER)
            ax.set_xlabel(name)
            every = [p for points in found.values() for p in points]
            _finish(ax, metric, [p.setting for p in every])
            _ticks(ax, x, sorted({place(p) for p in every}))
            _mark(ax, view, every, place, metric)
        legend(drawing, axes[0], named(line) if line else "")
        return save(drawing, path, vector)


def _abscissa(view: View, x: str, points: list[Point]) -> tuple[Callable, str]:
    """(point -> where it stands, the axis' name)."""
    if x == "data.limit" and all(view.photographs(p.setting) > 0 for p in points):
        return lambda p: view.photographs(p.setting), named("n_train")
    numbers = numeric(view.axes[x])
    unit = view.axes[x][0].split()[-1] if isinstance(view.axes[x][0], str) else ""
    return lambda p: numbers[repr(p.x)], f"{named(x)}{f', {unit}' if unit else ''}"


def _line(ax, points: list[tuple[float, Setting]], metric: Metric, i: int, label: str, scattered: bool) -> None:
    """One line: means, the dots of repeats, the band, and a cross on the edge where repeats have diverged."""
    style = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)]}
    x, means, halves, gone = [], [], [], []
    for at, setting in points:
        scores = list(setting.scores(*metric).values())
        if setting.failed:
            gone.append(at)
        if scores:
            mean, half = setting.interval(*metric)
            x.append(at), means.append(mean), halves.append(half)
        if len(scores) > 1:
            ax.plot([at] * len(scores), scores, ls="none", marker="o", ms=2.6, mew=0, alpha=0.4, color=style["color"])
    x, means, halves = map(np.array, (x, means, halves))
    ax.plot(x, means, lw=1.7, ms=4.2, mec="white", mew=0.5, ls="none" if scattered else "-", label=label, **style)
    if len(x) > 1 and np.isfinite(halves).any():
        low, high = means - halves, means + halves
        if metric.sign > 0:
            low, high = np.clip((low, high), 0, 1)
        ax.fill_between(x, low, high, color=style["color"], alpha=0.1, lw=0)
        ax.plot(x, low, x, high, color=style["color"], alpha=0.35, lw=0.6)
    elif len(x) and np.isfinite(halves).all():
        ax.errorbar(x, means, halves, color=style["color"], lw=1.2, capsize=3, ls="none")
    if len(x) == 1:  # nothing to connect it with: a level for the other lines
        ax.axhline(means[0], color=style["color"], lw=1, ls=(0, (2, 3)), zorder=1)
    edge = 0.02 if metric.sign > 0 else 0.98
    if gone:
        ax.plot(gone, [edge] * len(gone), "x", ms=6, mew=1.6, color=style["color"], clip_on=False,
                transform=ax.get_xaxis_transform(), zorder=6)  # fmt: skip


def _mark(ax, view: View, points: list[Point], place: Callable, metric: Metric) -> None:
    """Rings the setting that is the best on val, in both panels."""
    if not view.ranked or math.isnan(view.ranked[0].value):
        return
    best = view.ranked[0].setting
    scores = list(best.scores(*metric).values())
    for at in [place(point) for point in points if point.setting is best and scores]:
        mean, low = float(np.mean(scores)), metric.sign < 0
        ax.plot([at], [mean], "o", ms=11, mfc="none", mec=INK, mew=1.5, zorder=7)
        share = ax.transAxes.inverted().transform(ax.transData.transform((at, mean)))[0]
        said = figure(mean, metric)
        ax.annotate(
            f"best on val: {said}" if metric.split == "val" else said, (at, mean), (0, -13 if low else 11),
            textcoords="offset points", ha="right" if share > 0.75 else "left" if share < 0.25 else "center",
            va="top" if low else "bottom", fontsize=8.5, color=INK, annotation_clip=False, zorder=8,
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.75},
        )  # fmt: skip


def _finish(ax, metric: Metric, settings: list[Setting]) -> None:
    """Names the panel, and keeps it to where the figures are."""
    ax.set_title(called(metric), fontsize=10)
    percent(ax.yaxis, metric)
    values = [v for s in settings for v in s.scores(*metric).values()]
    if not values:
        ax.text(0.5, 0.5, "no figures yet", transform=ax.transAxes, ha="center", color=GREY)
        return
    low, high = near(values, metric)
    room = (high - low) or abs(high) * 0.1 or 0.1
    bottom, top = (low - 0.24 * room, high + 0.1 * room) if metric.sign < 0 else (low - 0.08 * room, high + 0.2 * room)
    if metric.sign > 0 and high <= 1:
        top = min(top, 1.02 + 0.06 * room)
    ax.set_ylim(max(bottom, 0), top)


def _ticks(ax, x: str, at: list[float]) -> None:
    """A logarithmic abscissa for rates and wide spans; the values themselves are ticks where there is room."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

    if not at:
        return
    spans = at[0] > 0 and (x == "optim.lr" or at[-1] >= 8 * at[0])
    if spans:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
    if len(at) <= SCATTER:
        stands = np.log(at) if spans else np.array(at)
        room, kept = 0.08 * (stands[-1] - stands[0]), [len(at) - 1]
        for i in reversed(range(len(at) - 1)):  # from the end: the largest value has its tick
            if stands[kept[-1]] - stands[i] >= room:
                kept.append(i)
        write = (lambda v: f"{v:,.0f}") if x == "data.limit" else (lambda v: f"{v:.2g}" if v < 1 else f"{v:g}")
        ax.xaxis.set_major_locator(FixedLocator([at[i] for i in kept]))
        ax.xaxis.set_major_formatter(FixedFormatter([write(at[i]) for i in kept]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.tick_params(axis="x", labelsize=8.5)
    if len(at) == 1:
        ax.set_xlim(at[0] * 0.5, at[0] * 1.5) if at[0] else ax.set_xlim(-1, 1)

"""The pictures of a run: curves, confusion matrix, worst mistakes (matplotlib, imported when needed)."""

import contextlib
import io
import math

import numpy as np

from tljax.report import text

INK, GREY, PALE = "#1f2933", "#7b8794", "#e4e7eb"
TRAIN, VAL, BAD, GOOD = "#2f6db5", "#d9691e", "#c0392b", "#23825a"
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.labelcolor": INK, "axes.edgecolor": GREY, "axes.linewidth": 0.8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "grid.color": PALE,
    "grid.linewidth": 0.7, "text.color": INK, "xtick.color": GREY, "ytick.color": GREY,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "legend.edgecolor": "white", "legend.framealpha": 0.85,
    "figure.facecolor": "white", "savefig.bbox": "tight", "savefig.pad_inches": 0.12,
}  # fmt: skip
TILES, TILE_COLUMNS = 24, 6
NUMBERED = 24  # up to so many classes the cells of a confusion matrix have room for a number


def curves(rows, path, best_step: int | None = None):
    """Draws loss, accuracy and learning rate over the run, the best evaluation marked; returns the Figure.

    rows: the dicts of metrics.jsonl; best_step: the step of the best evaluation, by default the one
    with the highest val/accuracy (the first of equals).
    """
    unit = "epoch" if rows and all("epoch" in row for row in rows) else "step"
    panels = [("loss", "loss"), ("accuracy", "accuracy")]
    panels += [("learning rate", "lr")] if _series(rows, unit, "lr")[0].size else []
    best = _best(rows, best_step)
    with _figure(12.4, 3.7) as figure:
        axes = figure.subplots(1, len(panels), width_ratios=[1, 1, 0.8][: len(panels)])
        for ax, (title, key) in zip(axes, panels):
            ax.set_title(title)
            ax.set_xlabel(unit)
            ax.xaxis.get_major_locator().set_params(integer=True)
            if key == "lr":
                ax.plot(*_series(rows, unit, key), color=INK, lw=1.6)
                ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
                ax.set_ylim(bottom=0)
            else:
                _panel(ax, rows, unit, key, best)
        return _saved(figure, path)


def _panel(ax, rows, unit, key, best):
    """One of loss and accuracy, for training and val."""
    x, y = _series(rows, unit, f"train/{key}")
    if x.size:
        long = x.size > 40
        if long:
            ax.plot(x, y, color=TRAIN, lw=0.8, alpha=0.3)
        ax.plot(x, _smooth(y) if long else y, color=TRAIN, lw=1.8, label="train, smoothed" if long else "train")
    x, y = _series(rows, unit, f"val/{key}")
    if not x.size and key == "loss":
        x, y = _series(rows, unit, "val/nll")
    if x.size:
        ax.plot(x, y, color=VAL, lw=1.8, marker="o", ms=3.5, label="val")
    if best is not None and x.size:
        at = best[unit]
        ax.axvline(at, color=GREY, lw=0.9, ls=(0, (4, 3)), zorder=1)
        value = y[np.argmin(np.abs(x - at))]
        said = f"{100 * value:.1f} %" if key == "accuracy" else f"{value:.3f}"
        name = f"best, step {best['step']:,}: {said}"
        ax.plot([at], [value], "o", ms=8, mfc="white", mec=VAL, mew=2, zorder=5, label=name)
    if key == "accuracy":
        ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        ax.set_ylim(top=min(1.0, ax.get_ylim()[1]) if ax.get_ylim()[1] <= 1 else 1.005)
    else:
        ax.set_ylim(bottom=0)
    if ax.lines:
        ax.legend(loc="upper right" if key == "loss" else "lower right", fontsize=9)


def _series(rows, unit, key):
    found = [(row[unit], row[key]) for row in rows if row.get(key) is not None and math.isfinite(row[key])]
    x, y = np.array(found, float).reshape(-1, 2).T
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Centred mean over a tenth of the points; the window narrows towards the ends, not to bias them."""
    sums, index = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    half = np.minimum(max(1, len(y) // 20), np.minimum(index, len(y) - 1 - index))
    return (sums[index + half + 1] - sums[index - half]) / (2 * half + 1)


def _best(rows, best_step):
    found = [row for row in rows if row.get("val/accuracy") is not None]
    if best_step is not None:
        found = [row for row in rows if row["step"] == best_step and any(k.startswith("val/") for k in row)]
    return max(found, key=lambda row: row.get("val/accuracy") or 0, default=None)


def confusion(matrix, classes, path, title: str = ""):
    """Draws a confusion matrix, rows normalised for the colour, counts in the cells; returns the Figure.

    matrix: counts [label, guess]; rows without examples are grey. Up to 24 classes the cells hold counts.
    """
    matrix = np.asarray(matrix)
    count, totals = len(classes), matrix.sum(axis=1)
    shares = np.where(totals[:, None] > 0, matrix / np.maximum(totals, 1)[:, None], np.nan)
    side = float(np.clip(0.45 * count, 2.4, 12))
    font = float(np.clip(0.62 * 72 * side / count, 3.5, 10))
    margin = 0.9 + max(len(_short(name)) for name in classes) * font * 0.009  # inches that names take
    with _figure(side + margin + 1.5, side + margin + 0.5) as figure:
        ax = figure.subplots()
        colours = _colours()
        drawn = ax.imshow(np.ma.masked_invalid(shares), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        names = [_short(name) for name in classes]
        rows = [f"{name} ({total:,})" for name, total in zip(names, totals)]
        ax.set_xticks(range(count), names, rotation=90, fontsize=font, parse_math=False)
        ax.set_yticks(range(count), rows, fontsize=font, parse_math=False)
        ax.tick_params(length=0)
        ax.set_xlabel("guess")
        ax.set_ylabel("label (examples)")
        right = np.trace(matrix)
        done = f"{right:,} of {totals.sum():,} right"
        done += f" ({text.percent(right / totals.sum())})" if totals.sum() else ""
        ax.set_title(f"{title}: {done}" if title else done, parse_math=False)
        ax.grid(False)
        ax.spines[:].set(visible=count > 60, color=PALE)
        if count <= 60:
            ax.set_xticks(np.arange(count + 1) - 0.5, minor=True)
            ax.set_yticks(np.arange(count + 1) - 0.5, minor=True)
            ax.grid(which="minor", color="white" if count > NUMBERED else PALE, lw=0.6)
            ax.tick_params(which="minor", length=0)
        if count <= NUMBERED:
            for i, j in zip(*np.nonzero(matrix)):
                ax.text(
                    j, i, f"{matrix[i, j]:,}", ha="center", va="center", fontsize=min(font, 9),
                    color="white" if shares[i, j] > 0.45 else INK, fontweight="bold" if i == j else "normal",
                )  # fmt: skip
        bar = figure.colorbar(
            drawn, ax=ax, fraction=0.04, aspect=max(22, 4.5 * side), pad=0.02, ticks=[0, 0.25, 0.5, 0.75, 1]
        )
        bar.ax.set_yticklabels(["0 %", "25 %", "50 %", "75 %", "100 %"], fontsize=8)
        bar.outline.set_visible(False)
        bar.set_label("share of the label's examples", fontsize=9)
        return _saved(figure, path)


def mistakes(items, path, total: int | None = None):
    """Draws the most confident wrong guesses, at most 24, label and guess under each; returns the Figure.

    items: dicts image (uint8 [height, width, 3]), label, guess, confidence (0..1), name. With none it
    says so. total: how many wrong guesses there are, where items holds only some.
    """
    wrong = sorted((i for i in items if i["label"] != i["guess"]), key=lambda i: -i["confidence"])
    shown = wrong[:TILES]
    if not shown:
        with _figure(7, 2) as figure:
            said = "No mistakes: every guess is right."
            figure.text(0.5, 0.5, said, ha="center", va="center", fontsize=14, color=GOOD)
            return _saved(figure, path)
    columns = min(TILE_COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    tile, gap, caption, title = 2.1, 0.12, 0.7, 0.4  # inches
    width, height = max(columns * (tile + gap) - gap, 3), lines * (tile + caption) + title
    with _figure(width, height, layout=None) as figure:
        for place, item in enumerate(shown):
            line, column = divmod(place, columns)
            left, bottom = column * (tile + gap), height - title - line * (tile + caption) - tile
            _tile(figure.add_axes((left / width, bottom / height, tile / width, tile / height)), item)
        total = len(wrong) if total is None else total
        count = f"the {len(shown)} most confident of {total:,}" if total > len(shown) else f"all {len(shown)}"
        figure.text(0, 1, f"Wrong guesses, {count}", va="top", fontsize=12, fontweight="bold")
        return _saved(figure, path, dpi=110)


def _tile(ax, item):
    image = np.asarray(item["image"])
    height, width = image.shape[:2]
    side = max(height, width)
    ax.imshow(image, cmap="gray", interpolation="antialiased")
    # A square window on a photograph of any shape: nothing is cropped, and the grid stays even.
    ax.set_xlim((width - side) / 2 - 0.5, (width + side) / 2 - 0.5)
    ax.set_ylim((height + side) / 2 - 0.5, (height - side) / 2 - 0.5)
    ax.set_facecolor("#f1f3f5")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    below = dict(transform=ax.transAxes, va="top", ha="left", fontsize=8.5, parse_math=False)
    ax.text(0, -0.03, f"is {_short(item['label'], 22)}", color=GOOD, **below)
    ax.text(0, -0.12, f"guess {_short(item['guess'], 18)}, {100 * item['confidence']:.0f} %", color=BAD, **below)
    name = str(item.get("name", ""))
    below["fontsize"] = 6.5
    ax.text(0, -0.215, name if len(name) <= 34 else "…" + name[-33:], color=GREY, **below)


def costs(estimates, path):
    """Draws FLOPs, of the compiler and of theory, against the trainable share; returns the Figure.

    estimates: `tljax.cost.Estimate`s.
    """
    most, theory = (max(getattr(e, name) for e in estimates) or 1 for name in ("flops", "theory"))
    with _figure(6.4, 4.2) as figure:
        ax = figure.subplots()
        ax.set_title("cost of a step against what trains")
        ax.set_xlabel("trainable share of the parameters, %")
        ax.set_ylabel("FLOPs, % of the costliest")
        shares = [100 * e.trainable for e in estimates]
        ax.scatter(shares, [100 * e.theory / theory for e in estimates], s=64, facecolors="none", edgecolors=GREY,
                   label="theory")  # fmt: skip
        ax.scatter(shares, [100 * e.flops / most for e in estimates], s=26, color=TRAIN, label="compiler estimate")
        for share, e in zip(shares, estimates):
            ax.annotate(_short(e.strategy), (share, 100 * e.flops / most), (6, -11), textcoords="offset points",
                        ha="right" if share > 60 else "left", color=INK, fontsize=8)  # fmt: skip
        ax.set_ylim(0, 108)
        ax.legend(loc="lower right")
        return _saved(figure, path)


def _short(name, length: int = 28) -> str:
    name = str(name)
    return name if len(name) <= length else name[: length - 1] + "…"


def _colours():
    from matplotlib.colors import LinearSegmentedColormap

    # Steep at the start: one photograph in fifty must still be seen as a mistake.
    nodes = [(0, "#ffffff"), (0.02, "#e6eff8"), (0.2, "#a9c9e8"), (0.6, TRAIN), (1, "#163f73")]
    return LinearSegmentedColormap.from_list("share", nodes).with_extremes(bad=PALE)


@contextlib.contextmanager
def _figure(width: float, height: float, layout: str | None = "constrained"):
    """A Figure without pyplot: nothing global is left behind, and no display is asked for."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        yield Figure(figsize=(width, height), layout=layout)


def _saved(figure, path, dpi=150):
    from etils import epath

    buffer = io.BytesIO()  # a workdir may lie in a bucket, where matplotlib cannot write
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "tljax"})
    epath.Path(path).write_bytes(buffer.getvalue())
    return figure

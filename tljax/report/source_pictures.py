"""The pictures of a source task: what was forgotten, and the path between loaded and trained weights."""

from tljax.report.pictures import GREY, INK, TRAIN, VAL, _figure, _saved


def forgetting(found: dict, path):
    """Draws the source task's figures before and after, and how far the features moved; returns the Figure.

    found: as `tljax.forgetting.measure` returns it.
    """
    before, after, stages = found["before"], found["after"], found["stages"]
    shares = [
        (name, before[key], after[key])
        for key, name in (("accuracy", "top-1"), ("top5", "top-5"), ("agreement", "agreement"))
        if key in after
    ]
    names = list(stages)
    with _figure(4.2 + max(4.5, 0.36 * len(names)), 3.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[3.4, max(4.5, 0.36 * len(names))])
        left.set_title("source task, under the loaded head")
        for i, (_, first, second) in enumerate(shares):
            for at, value, colour, label in ((-0.2, first, GREY, "before"), (0.2, second, TRAIN, "after")):
                left.bar(i + at, 100 * value, 0.36, color=colour, label=label if not i else None)
                left.text(i + at, 100 * value + 1.5, f"{100 * value:.0f}", ha="center", fontsize=8.5, color=INK)
        left.set_xticks(range(len(shares)), [name for name, _, _ in shares])
        left.set_ylabel(f"% of {found['labelled'] or found['examples']:,} photographs")
        left.set_ylim(0, 118)
        left.set_yticks(range(0, 101, 20))
        left.grid(axis="x", visible=False)
        left.legend(loc="upper center", ncols=2, fontsize=9)
        places = range(len(names))
        number = lambda key: [float("nan") if stages[n][key] is None else stages[n][key] for n in names]
        right.set_title("displacement of the features behind each stage")
        right.bar(places, number("relative_l2"), 0.62, color=VAL, alpha=0.85, label="relative L2")
        right.plot(places, number("cka"), color=TRAIN, lw=1.6, marker="o", ms=4, label="linear CKA")
        right.set_xticks(places, names, rotation=90 if len(names) > 8 else 0, fontsize=9, parse_math=False)
        right.set_ylim(0, 1.22 * max(1.0, *(v for v in number("relative_l2") if v == v)))
        right.grid(axis="x", visible=False)
        right.legend(loc="upper left", ncols=2, fontsize=9)
        return _saved(figure, path)


def wise_ft(found: dict, path):
    """Draws the target's accuracy and NLL against the source's along the path of alphas; returns the Figure.

    found: as `tljax.wise_ft.measure` returns it. Without a source task alpha is the abscissa; without its labels the
    agreement with the loaded network and the KL divergence from it.
    """
    with _figure(11.6, 4.4) as figure:
        axes = figure.subplots(1, 2)
        for ax, metric in zip(axes, ("accuracy", "nll")):
            _path(ax, found, metric)
        axes[0].legend(loc="best", fontsize=9)
        figure.suptitle("Weights between loaded (α = 0) and trained (α = 1)", x=0.01, ha="left", fontweight="bold")
        return _saved(figure, path)


def _path(ax, found: dict, metric: str):
    """One panel: the target's metric against the source's, a point an alpha, the best one by val ringed."""
    points, best, about = found["path"], found["best"], found["source"]
    share = metric == "accuracy"
    scale, unit = (100, ", %") if share else (1, "")
    name = "accuracy" if share else "negative log-likelihood"
    alphas = [point["alpha"] for point in points]
    x, label = alphas, "α"
    if about and about["labelled"]:
        x = [scale * point["source"][metric] for point in points]
        label = f"source {name}{unit} ({about['labelled']:,} photographs)"
    elif about:
        x = [scale * point["source"]["agreement" if share else "kl"] for point in points]
        what = "guesses as the loaded network" if share else "KL from the loaded network"
        label = f"source: {what}{unit} ({about['examples']:,} photographs)"
    ringed = False
    for split, colour in (("test", TRAIN), ("val", VAL)):
        if split not in points[0]:
            continue
        y = [scale * point[split][metric] for point in points]
        ax.plot(x, y, color=colour, lw=1.6, marker="o", ms=5, label=split)
        for alpha, at, value in zip(alphas, x, y) if about else ():
            ax.annotate(f"{alpha:g}", (at, value), (6, 5), textcoords="offset points", fontsize=8, color=colour)
        if best and not ringed:
            i, ringed = alphas.index(best["alpha"]), True
            ring = f"best α by {best['metric']}"
            ax.plot([x[i]], [y[i]], "o", ms=11, mfc="none", mec=INK, mew=1.6, zorder=5, ls="none", label=ring)
    ax.set_title(name)
    ax.set_xlabel(label)
    ax.set_ylabel(f"target {name}{unit}")
    ax.margins(0.12)

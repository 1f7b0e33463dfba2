import csv
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_up import DEPTHS, RATES, rows, sweep
from PIL import Image
from test_page import Page

from tljax import grid
from tljax.report import sweep_curves, sweep_page, sweep_pictures, sweep_table
from tljax.report.sweep_view import View, brief, numeric
from tljax.workdir import Workdir


@pytest.fixture
def page(tmp_path):
    """`page(config, rows, planned)` writes a sweep's tables and page; returns what the page says."""

    def write(config, found, planned=None):
        folder = Workdir(tmp_path)
        sweep_table.write(folder, found)
        configs_of = {member.number: member.config for member in grid.members(config)}
        sweep_table.best(folder, found, config.metric, lambda row: configs_of[row["number"]])
        sweep_page.Page(folder, config).write(found, planned or len(found))
        return Page((tmp_path / "report.html").read_text())

    return write


def test_the_page_of_rates_by_depth(page, tmp_path):
    config = sweep({"strategy": DEPTHS[:3], "optim.lr": RATES[2:6], "seed": range(3)}, name="a <b> sweep")
    found = rows(config, diverged=(0,))
    shown = page(config, found[:-3], planned=40)
    said = shown.said
    for text in ("33 of 40 members have ended", "the others are to come", "a <b> sweep", "diverged at step 17",
                 "1 diverged", "Holm", "python -m tljax.train --config=", "partial(last=1)",
                 "figures of test choose nothing"):  # fmt: skip
        assert text in said, text
    view = View(found[:-3], config)
    best = view.ranked[0].setting
    values = [row["val"]["nll"] for row in best.rows]
    assert f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" in said
    files = ("learning_rates", "heat_map", "training_curves", "ranking")
    for name in files:
        assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG"
    sources = [v for tag, key, v in shown.attributes if (tag, key) == ("img", "src")]
    assert len(sources) == 4
    assert all(v.startswith("data:image/png;base64,") for v in sources)
    assert "script" not in shown.tags
    hrefs = {v for _, key, v in shown.attributes if key == "href"}
    assert hrefs == {"sweep.csv", "curves.jsonl"}


def test_the_table_has_what_a_reader_asks_for(tmp_path):
    config = sweep({"optim.lr": (0.01, 0.02), "data.limit": (5, 0)})
    sweep_table.write(Workdir(tmp_path), rows(config))
    (row, *_) = csv.DictReader((tmp_path / "sweep.csv").open())
    for name in ("strategy", "weights", "seed", "optim.lr", "optim.weight_decay", "data.limit", "data.val", "n_train",
                 "n_val", "n_test", "status", "best_epoch", "val/nll", "test/accuracy", "seconds"):  # fmt: skip
        assert row[name] != "", name
    assert row["n_train"] == "70"


def test_curves_are_means_of_the_best(tmp_path):
    """Over the rate, by strategy, at the better of two decays on val; recomputed from the rows."""
    config = sweep({"strategy": DEPTHS[:2], "optim.lr": RATES[2:5], "optim.weight_decay": (0.0, 0.1), "seed": range(3)})
    found = rows(config)
    figure = sweep_curves.curves(View(found, config), "optim.lr", tmp_path / "c.png")
    val, test = figure.axes
    for strategy, label in zip(DEPTHS, ("frozen", "partial(last=1, body=0.03)")):
        for ax, split, name in ((val, "val", "nll"), (test, "test", "accuracy")):
            (line,) = [line for line in ax.lines if line.get_label() == label]
            truth = []
            for rate in RATES[2:5]:
                each = {}
                for row in found:
                    if (row["fields"]["strategy"], row["fields"]["optim.lr"]) == (strategy, rate):
                        each.setdefault(row["fields"]["optim.weight_decay"], []).append(row)
                best = min(each.values(), key=lambda same: np.mean([row["val"]["nll"] for row in same]))
                truth.append(np.mean([row[split][name] for row in best]))
            np.testing.assert_allclose(line.get_xdata(), RATES[2:5])
            np.testing.assert_allclose(line.get_ydata(), truth)
    assert val.get_xscale() == "log"


def test_learning_curves_are_over_photographs(tmp_path):
    config = sweep({"data.limit": (5, 0, 25), "seed": range(3)})
    figure = sweep_curves.curves(View(rows(config), config), "data.limit", tmp_path / "c.png")
    means = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 3 and line.get_linestyle() == "-"]
    np.testing.assert_allclose(means[0].get_xdata(), [70, 350, 675])
    assert figure.axes[0].get_xlabel() == "training photographs"


def test_cells_of_the_heat_map(tmp_path):
    config = sweep({"strategy": DEPTHS, "optim.lr": RATES[:3], "seed": range(2)})
    found = rows(config, diverged=(0,))
    view = View(found, config)
    assert view.pairs() == [("optim.lr", "strategy")]
    figure = sweep_pictures.heat_map(view, "optim.lr", "strategy", tmp_path / "h.png")
    cells = [text.get_text() for text in figure.axes[1].texts]
    truth = []
    for strategy in DEPTHS:
        for rate in RATES[:3]:
            same = [r for r in found if (r["fields"]["strategy"], r["fields"]["optim.lr"]) == (strategy, rate)]
            whole = all(row["test"] for row in same)
            truth.append(f"{100 * np.mean([row['test']['accuracy'] for row in same]):.1f}" if whole else "×")
    assert cells == truth


def test_what_is_written_is_short_and_differs():
    assert brief(DEPTHS) == ["frozen", "partial(last=1)", "partial(last=2)", "partial(last=4)"]
    assert brief(["partial(last=2)", "full(body=0.03)"]) == ["partial(last=2)", "full(body=0.03)"]
    assert brief(["frozen()", "frozen_norms(frozen())"]) == ["frozen()", "frozen_norms(frozen())"]
    assert brief(["", "a" * 50 + "1", "a" * 50 + "2"])[1] != brief(["", "a" * 50 + "1", "a" * 50 + "2"])[2]
    assert numeric(["5 epochs", "10 epochs"]) == {"'5 epochs'": 5.0, "'10 epochs'": 10.0}
    assert numeric(["5 epochs", "10 steps"]) is None
    assert numeric([True, False]) is None


def test_a_running_sweep_is_drawn_seldom(tmp_path):
    config = sweep({"seed": range(4)})
    found, written = rows(config), sweep_page.Page(Workdir(tmp_path), config)
    written.write([], 4, last=False)
    assert not (tmp_path / "report.html").exists()
    written.write(found[:2], 4, last=False)
    first = (tmp_path / "report.html").read_text()
    assert "2 of 4 members" in first
    assert not list(tmp_path.glob("*.pdf"))
    written.write(found[:3], 4, last=False)
    assert (tmp_path / "report.html").read_text() == first
    written.write(found, 4)
    assert "4 of 4 members" in (tmp_path / "report.html").read_text()


AXES = {
    "optim.lr": st.sampled_from([(0.1,), (0.01, 0.1), (0.0, 0.1, 1.0), RATES]),
    "strategy": st.sampled_from([DEPTHS, DEPTHS[:2]]),
    "data.limit": st.sampled_from([(0,), (5, 0), (5, 10, 25)]),
    "label_smoothing": st.sampled_from([(0.0, 0.1), (0.05, 0.1, 0.2)]),
    "norm_stats": st.sampled_from([("plan", "frozen", "batch")]),
    "augment.flip": st.sampled_from([(True, False)]),
    "augment.crop_ratio": st.sampled_from([((0.75, 1.3), (1.0, 1.0))]),
    "train_for": st.sampled_from([("5 steps", "10 steps"), ("5 steps", "10 epochs")]),
    "seed": st.sampled_from([range(1), range(2), range(3)]),
    "data.val": st.sampled_from([("fold:1/3", "fold:2/3", "fold:3/3"), ("split", "fraction:0.2")]),
    "#kind, #depth, weights": st.sampled_from([(("a $x_", 1, "w1"), ("b", 1, "w2"), ("a $x_", 2, "w3"))]),
}


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
@given(st.data())
def test_the_page_makes_sense_of_any_axes(tmp_path_factory, data):
    chosen = data.draw(st.lists(st.sampled_from(list(AXES)), min_size=1, max_size=4, unique=True))
    metric = data.draw(st.sampled_from(["val/nll", "val/accuracy", "val/macro_f1"]))
    config = sweep({name: data.draw(AXES[name]) for name in chosen}, metric=metric)
    found = rows(config, test=data.draw(st.booleans()))
    broken = data.draw(st.sets(st.integers(0, len(found) - 1), max_size=4))
    found = rows(config, test=found[0]["test"] is not None, diverged=broken)
    part = found[: data.draw(st.integers(1, len(found)))]
    folder = tmp_path_factory.mktemp("sweep")
    sweep_page.Page(Workdir(folder), config).write(part, len(found), last=False)
    said = Page((folder / "report.html").read_text()).said
    assert f"{len(part):,} of {len(found):,} member" in said
    assert "nan" not in said.replace("nancy", "")
    for file in folder.glob("*.png"):
        with Image.open(file) as image:
            image.load()
            assert max(image.size) < 3500
    view = View(part, config)
    assert sum(len(setting.rows) for setting in view.settings) == len(part)
    assert math.isnan(view.ranked[0].value) == all(s.failed for s in view.settings)

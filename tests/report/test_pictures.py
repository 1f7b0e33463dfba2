import math

import numpy as np
import pytest
from PIL import Image

from tljax.report import pictures


def metrics_rows():
    rows = [
        {"step": s, "epoch": s / 10, "train/loss": 3 / s, "train/accuracy": s / 60, "lr": 1e-3 * (1 - s / 60)}
        for s in range(1, 61)
    ]
    rows += [
        {"step": s, "epoch": s / 10, "val/loss": 2 / s, "val/accuracy": a}
        for s, a in ((10, 0.3), (20, 0.5), (30, 0.8), (40, 0.7), (50, 0.8), (60, 0.6))
    ]
    return sorted(rows, key=lambda row: row["step"])


def items(count, rng, **more):
    return [
        {"image": rng.integers(0, 255, (20 + i % 5, 30, 3), np.uint8), "label": "a", "guess": "b",
         "confidence": i / count, "name": f"photo{i}.jpg", **more}
        for i in range(count)
    ]  # fmt: skip


def pixels(path) -> np.ndarray:
    """The picture, decoded by another library; raises if it is no whole PNG."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        found = np.asarray(image.convert("RGB"))
    assert found.std() > 1  # not an empty sheet
    return found


def line(ax, label):
    (found,) = [one for one in ax.lines if one.get_label().startswith(label)]
    return np.array(found.get_data())


def test_curves_show_the_rows_and_mark_the_best(tmp_path):
    figure = pictures.curves(metrics_rows(), tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")
    loss, accuracy, rate = figure.axes
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["loss", "accuracy", "learning rate"]
    np.testing.assert_allclose(line(accuracy, "val"), [[1, 2, 3, 4, 5, 6], [0.3, 0.5, 0.8, 0.7, 0.8, 0.6]])
    np.testing.assert_allclose(loss.lines[0].get_ydata(), [3 / s for s in range(1, 61)])  # unsmoothed, pale
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [1e-3 * (1 - s / 60) for s in range(1, 61)])
    np.testing.assert_allclose(line(accuracy, "best"), [[3], [0.8]])  # the first of two equals
    np.testing.assert_allclose(line(loss, "best"), [[3], [2 / 30]])
    chosen = pictures.curves(metrics_rows(), tmp_path / "curves.png", best_step=50)
    np.testing.assert_allclose(line(chosen.axes[1], "best, step 50"), [[5], [0.8]])


def test_smoothed_curve_is_a_centred_mean():
    y = np.random.default_rng(0).normal(size=50)
    smooth = pictures._smooth(y)
    assert smooth[0] == pytest.approx(y[0])
    assert smooth[1] == pytest.approx(y[:3].mean())
    assert smooth[20] == pytest.approx(y[18:23].mean())
    np.testing.assert_allclose(pictures._smooth(np.arange(50.0)), np.arange(50.0))  # a line stays a line


@pytest.mark.parametrize(
    "rows",
    [[], [{"step": 5, "train/loss": 1.0, "train/accuracy": 0.5}], [{"step": 5, "val/nll": 1.0,
     "val/accuracy": 1}],
     [{"step": 1, "epoch": 0.1, "train/loss": math.nan, "train/accuracy": None, "lr": 0.0}]],
)  # fmt: skip
def test_curves_of_short_runs(rows, tmp_path):
    pictures.curves(rows, tmp_path / "curves.png")
    pixels(tmp_path / "curves.png")


@pytest.mark.parametrize("count", [2, 14, 40, 100])
def test_confusion(count, tmp_path):
    rng = np.random.default_rng(count)
    matrix = rng.integers(0, 4, (count, count)) + 20 * np.eye(count, dtype=int)
    matrix[1] = 0
    names = [f"class $x_{i}$ <b>" for i in range(count)]  # must not be read as formulae
    figure = pictures.confusion(matrix, names, tmp_path / "c.png", title="test")
    found = pixels(tmp_path / "c.png")
    assert max(found.shape) < 2600
    ax = figure.axes[0]
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown[0], matrix[0] / matrix[0].sum())
    assert shown[1].mask.all()  # no examples: neither right nor wrong
    numbers = [t.get_text() for t in ax.texts]
    assert numbers == ([str(n) for n in matrix.ravel() if n] if count <= 24 else [])
    assert [t.get_text() for t in ax.get_xticklabels()] == names
    assert ax.get_yticklabels()[0].get_text() == f"{names[0]} ({matrix[0].sum()})"
    right = matrix.trace() / matrix.sum()
    assert f"{matrix.trace():,} of {matrix.sum():,} right ({100 * right:.1f} %)" in ax.get_title(loc="left")


def test_confusion_of_nothing(tmp_path):
    pictures.confusion(np.zeros((3, 3), int), ["a", "b", "c"], tmp_path / "c.png")
    pixels(tmp_path / "c.png")


@pytest.mark.parametrize("count", [1, 7, 40])
def test_mistakes_are_the_most_confident_wrong_ones(count, tmp_path):
    rng = np.random.default_rng(0)
    right = items(3, rng, guess="a", name="right.jpg", confidence=1.0)
    figure = pictures.mistakes(right + items(count, rng), tmp_path / "m.png")
    pixels(tmp_path / "m.png")
    assert len(figure.axes) == min(count, 24)
    names = [ax.texts[-1].get_text() for ax in figure.axes]
    assert names == [f"photo{i}.jpg" for i in range(count)][::-1][:24]
    assert all("right" not in name for name in names)
    first = figure.axes[0]
    assert [t.get_text() for t in first.texts[:2]] == ["is a", f"guess b, {100 * (count - 1) / count:.0f} %"]
    for ax in figure.axes:  # whatever the photograph's shape: whole, in a square
        assert abs(np.diff(ax.get_xlim())[0]) == abs(np.diff(ax.get_ylim())[0])


def test_no_mistakes_says_so(tmp_path):
    figure = pictures.mistakes([], tmp_path / "m.png")
    pixels(tmp_path / "m.png")
    assert "No mistakes" in figure.texts[0].get_text()


def test_grey_photographs(tmp_path):
    rng = np.random.default_rng(0)
    figure = pictures.mistakes(items(2, rng, image=rng.integers(0, 255, (9, 9), np.uint8)), tmp_path / "m.png")
    assert len(figure.axes) == 2


def test_no_global_state(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    pictures.confusion(np.eye(2, dtype=int), ["a", "b"], tmp_path / "c.png")
    assert dict(matplotlib.rcParams) == before

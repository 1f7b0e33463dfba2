"""The figures against loops by hand and, where it is installed, scikit-learn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax.errors import UserError
from tljax.report import metrics

CLASSES = ("a", "b", "c", "d", "e")
COARSE = ("x", "x", "y", "y", "z")


def sample(seed=0, n=200, absent=()):
    rng = np.random.default_rng(seed)
    labels = rng.choice([i for i in range(5) if i not in absent], n)
    logits = rng.normal(size=(n, 5)) * 2
    logits[np.arange(n), labels] += 1.5
    return logits, labels


def by_hand(logits, labels, coarse):
    """Everything again, one example at a time, with Python's own arithmetic."""
    n, count = logits.shape
    confusion = [[0] * count for _ in range(count)]
    nll = right = right_coarse = 0
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.tolist(), labels.tolist()):
        top = max(row)
        total = math.fsum(math.exp(v - top) for v in row)
        p = [math.exp(v - top) / total for v in row]
        guess = max(range(count), key=lambda i: p[i])
        confusion[label][guess] += 1
        nll -= math.log(p[label])
        right += guess == label
        right_coarse += coarse[guess] == coarse[label]
        for m in range(15):
            if m / 15 < p[guess] <= (m + 1) / 15:
                bins[m].append((p[guess], guess == label))
    ece = 0
    for found in bins:
        if found:
            confidence = sum(c for c, _ in found) / len(found)
            accuracy = sum(r for _, r in found) / len(found)
            ece += len(found) / n * abs(accuracy - confidence)
    f1 = []
    for i in range(count):
        tp = confusion[i][i]
        fp = sum(confusion[j][i] for j in range(count)) - tp
        fn = sum(confusion[i]) - tp
        if tp + fp + fn:
            f1.append(2 * tp / (2 * tp + fp + fn))
    per_class = [confusion[i][i] / sum(confusion[i]) if sum(confusion[i]) else None for i in range(count)]
    return {
        "accuracy": right / n, "coarse_accuracy": right_coarse / n, "nll": nll / n, "ece": ece,
        "macro_f1": sum(f1) / len(f1), "confusion": confusion, "per_class": per_class,
    }  # fmt: skip


@pytest.mark.parametrize("absent", [(), (1,), (0, 4)])
def test_equals_the_loop_by_hand(absent):
    logits, labels = sample(len(absent), absent=absent)
    found = metrics.classification(logits, labels, CLASSES, COARSE)
    truth = by_hand(logits, labels, COARSE)
    for key in ("accuracy", "coarse_accuracy", "nll", "ece", "macro_f1"):
        assert found[key] == pytest.approx(truth[key], abs=1e-12), key
    assert found["confusion"] == truth["confusion"]
    assert list(found["per_class"]) == list(CLASSES)
    assert list(found["per_class"].values()) == pytest.approx(truth["per_class"])
    assert [found["per_class"][CLASSES[i]] for i in absent] == [None] * len(absent)
    assert found["examples"] == 200


@pytest.mark.parametrize("absent", [(), (1,), (0, 4)])
def test_equals_scikit_learn(absent):
    reference = pytest.importorskip("sklearn.metrics")
    logits, labels = sample(len(absent), absent=absent)
    if absent:  # a class in neither labels nor guesses, which scikit-learn leaves out of the mean
        logits[:, absent[0]] = -20
    found = metrics.classification(logits, labels, CLASSES)
    guesses = logits.argmax(1)
    assert found["macro_f1"] == pytest.approx(reference.f1_score(labels, guesses, average="macro"))
    assert found["nll"] == pytest.approx(
        reference.log_loss(labels, metrics.softmax(logits), labels=range(len(CLASSES)))
    )
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(labels, guesses))
    assert found["confusion"] == reference.confusion_matrix(labels, guesses, labels=range(5)).tolist()


def test_result_is_json():
    logits, labels = sample(absent=(2,))
    found = metrics.classification(logits.astype(np.float32), labels.astype(np.int32), CLASSES, COARSE)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert "coarse_accuracy" not in metrics.classification(logits, labels, CLASSES)


def test_huge_logits_and_perfect_guesses():
    found = metrics.classification(np.array([[1e4, -1e4], [-1e4, 1e4]]), [0, 1], ("a", "b"))
    assert found["accuracy"] == 1
    assert found["nll"] == 0
    assert found["ece"] == 0
    assert found["macro_f1"] == 1
    found = metrics.classification(np.array([[1e4, -1e4]]), [1], ("a", "b"))
    assert found["nll"] == 2e4
    assert found["ece"] == 1
    assert found["macro_f1"] == 0


def test_uniform_confidence_falls_into_the_bin_that_it_closes():
    # Confidence exactly 1/3 = 5/15 belongs to (4/15, 5/15]; alone in a bin, the error is |accuracy - 1/3|.
    found = metrics.classification(np.zeros((4, 3)), [0, 0, 1, 2], ("a", "b", "c"))
    assert found["ece"] == pytest.approx(0.5 - 1 / 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 7), st.floats(-50, 50))
def test_laws(seed, n, count, shift):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(n, count)) * 3, rng.integers(0, count, n)
    names = [str(i) for i in range(count)]
    found = metrics.classification(logits, labels, names, names)
    assert found["coarse_accuracy"] == found["accuracy"]  # a coarse class each: the same question
    assert np.sum(found["confusion"]) == n
    assert 0 <= found["ece"] <= 1
    assert found["nll"] >= 0
    moved = metrics.classification(logits + shift, labels, names, names)
    assert moved["nll"] == pytest.approx(found["nll"], abs=1e-9)
    one = metrics.classification(logits, labels, names, ["all"] * count)
    assert one["coarse_accuracy"] == 1


def test_bad_input_is_named():
    with pytest.raises(UserError, match="1 of 2 examples are not finite"):
        metrics.classification(np.array([[np.nan, 0], [0, 1]]), [0, 1], ("a", "b"))
    with pytest.raises(ValueError, match="for 3 classes"):
        metrics.classification(np.zeros((2, 2)), [0, 1], ("a", "b", "c"))
    with pytest.raises(ValueError, match="expected 0 to 1"):
        metrics.classification(np.zeros((2, 2)), [0, 2], ("a", "b"))
    with pytest.raises(ValueError, match="coarse names"):
        metrics.classification(np.zeros((2, 2)), [0, 1], ("a", "b"), ("x",))

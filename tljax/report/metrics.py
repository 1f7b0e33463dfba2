"""The figures of a classifier from its logits, in numpy: what summary.json holds for a split."""

import numpy as np

from tljax.errors import UserError


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities [..., classes] in float64, exact for logits of any size."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities [..., classes] in float64."""
    return np.exp(log_softmax(logits))


def confusion_matrix(labels: np.ndarray, guesses: np.ndarray, count: int) -> np.ndarray:
    """Counts [label, guess], int64 [count, count]."""
    cells = np.bincount(np.asarray(labels) * count + np.asarray(guesses), minlength=count * count)
    return cells.reshape(count, count)


def interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The interval, of 95 % by default, of a share of which `hits` of `total` were seen (Wilson 1927)."""
    share, spread = hits / total, z**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return max(0.0, middle - half), min(1.0, middle + half)


def macro_f1(confusion: np.ndarray) -> float:
    """Unweighted mean of the classes' F1, over the classes that occur among labels or guesses.

    A class that occurs in neither has no F1 and is left out, as scikit-learn's `f1_score(average="macro")`
    does without `labels=`. A class that is only ever guessed, or never hit, counts as 0.
    """
    hits = np.diag(confusion)
    occurs = confusion.sum(axis=0) + confusion.sum(axis=1)  # 2·TP + FP + FN
    present = occurs > 0
    return float(np.mean(2.0 * hits[present] / occurs[present]))


def sign(metric: str) -> int:
    """1 for a figure of which more is better, -1 where less is; `metric` may begin with a split, as `val/nll`."""
    return -1 if metric.rpartition("/")[2] in ("nll", "ece") else 1


def better(metric: str, value: float, best: dict | None) -> bool:
    """Whether a figure is better than the `value` of the best so far; equals are not."""
    return best is None or sign(metric) * value > sign(metric) * best["value"]


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over equal-width bins ((m-1)/bins, m/bins] (Guo et al. 2017, eq. 3)."""
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    # A bin's sum of (correct - confidence) is its size times (its accuracy - its mean confidence).
    gap = np.bincount(which, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def classification(logits, labels, classes, coarse=None) -> dict:
    """Accuracy, per_class accuracy, macro F1, nll (nats), ece and the confusion counts of one split.

    logits: [examples, classes]; labels: int [examples]; classes: names; coarse: the coarse class name of each
    class or None. The result is plain Python values (JSON). A class without labels has per_class None.
    `coarse_accuracy`: how often the coarse class of the guess is that of the label.
    Raises UserError for logits that are not finite, ValueError for shapes that do not fit.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    count = len(classes)
    if logits.ndim != 2 or logits.shape[1] != count or labels.shape != logits.shape[:1] or not len(labels):
        raise ValueError(f"logits {logits.shape} and labels {labels.shape} for {count} classes")
    if labels.min() < 0 or labels.max() >= count:
        raise ValueError(f"labels from {labels.min()} to {labels.max()}, expected 0 to {count - 1}")
    if coarse is not None and len(coarse) != count:
        raise ValueError(f"{len(coarse)} coarse names for {count} classes")
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise UserError(f"logits of {bad} of {len(labels)} examples are not finite: the model has diverged")
    labels = labels.astype(np.int64)
    log_p = log_softmax(logits)
    guesses = logits.argmax(axis=1)
    correct = guesses == labels
    confusion = confusion_matrix(labels, guesses, count)
    totals = confusion.sum(axis=1)
    result = {
        "examples": len(labels),
        "accuracy": float(correct.mean()),
        "macro_f1": macro_f1(confusion),
        "nll": float(-log_p[np.arange(len(labels)), labels].mean()),
        "ece": calibration_error(np.exp(log_p.max(axis=1)), correct),
    }
    if coarse is not None:
        groups = np.unique(np.asarray(coarse, dtype=str), return_inverse=True)[1]
        result["coarse_accuracy"] = float((groups[guesses] == groups[labels]).mean())
    result["per_class"] = {
        str(name): float(confusion[i, i] / totals[i]) if totals[i] else None for i, name in enumerate(classes)
    }
    result["confusion"] = confusion.tolist()
    return result

"""Fractions, folds and limits: partitions, stratified, and never a test photograph among them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax.data import splits
from tljax.errors import UserError

LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=80).map(np.array)


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, n=st.integers(2, 6), seed=st.integers(0, 1000))
def test_folds_partition_and_are_stratified(labels, n, seed):
    fold = splits.folds(labels, n, seed)
    assert fold.shape == labels.shape
    assert ((fold >= 0) & (fold < n)).all()
    sizes = np.bincount(fold, minlength=n)
    assert sizes.max() - sizes.min() <= 1
    for label in set(labels):
        within = np.bincount(fold[labels == label], minlength=n)
        assert within.max() - within.min() <= 1
    np.testing.assert_array_equal(fold, splits.folds(labels, n, seed))


@settings(max_examples=60, deadline=None)
@given(labels=LABELS, part=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_fractions_are_stratified_and_leave_something(labels, part, seed):
    taken = splits.fraction(labels, part, seed)
    for label in set(labels):
        count, total = taken[labels == label].sum(), (labels == label).sum()
        assert count < total
        assert abs(count - part * total) <= 1
        assert count >= 1 or total == 1


@settings(max_examples=30, deadline=None)
@given(labels=LABELS, limit=st.integers(1, 9))
def test_a_smaller_limit_takes_a_subset(labels, limit):
    few, more = splits.first_of_each(labels, limit, 0), splits.first_of_each(labels, limit + 3, 0)
    assert not (few & ~more).any()
    for label in set(labels):
        assert few[labels == label].sum() == min(limit, (labels == label).sum())


def test_seeds_draw_differently():
    labels = np.repeat(np.arange(3), 20)
    assert (splits.folds(labels, 5, 0) != splits.folds(labels, 5, 1)).any()
    assert (splits.fraction(labels, 0.3, 0) != splits.fraction(labels, 0.3, 1)).any()
    # Classes are drawn independently of each other.
    by_class = splits.fraction(labels, 0.5, 0).reshape(3, 20)
    assert (by_class[0] != by_class[1]).any()


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("split", ("split",)),
        ("none", ("none",)),
        ("fold:2/5", ("fold", 2, 5)),
        (" fraction:.1", ("fraction", 0.1)),
    ],
)
def test_specifications(spec, expected):
    assert splits.parse("val", spec, ("split", "none", "fold", "fraction")) == expected


@pytest.mark.parametrize(
    ("field", "spec", "message"),
    [
        ("val", "fold:0/5", "k from 1 to n"),
        ("val", "fold:6/5", "k from 1 to n"),
        ("val", "fold:1/1", "n >= 2"),
        ("val", "fold:2", 'data.val=\'fold:2\': expected "split", "fold:2/5"'),
        ("val", "fraction:0", "between 0 and 1"),
        ("val", "fraction:1.5", "between 0 and 1"),
        ("val", "fraction:-0.1", "expected"),
        ("val", "", "expected"),
        ("test", "none", 'expected "split" or "fraction:0.2"'),
        ("test", "fold:1/5", 'expected "split" or "fraction:0.2"'),
    ],
)
def test_malformed_specifications(field, spec, message):
    allowed = ("split", "none", "fold", "fraction") if field == "val" else ("split", "fraction")
    with pytest.raises(UserError, match=message):
        splits.parse(field, spec, allowed)


def unique(rows, **kw):
    keys, labels, where = zip(*rows)
    return splits.unique(list(keys), np.array(labels), np.array(where), [f"row{i}" for i in range(len(rows))], **kw)


def test_repeated_photographs():
    kept, lines = unique(
        [
            ("a", 0, "train"),
            ("a", 0, "train"),
            ("b", 1, "train"),
            ("b", 1, "test"),
            ("c", 1, "val"),
            ("c", 1, "train"),
        ]
    )
    assert kept.tolist() == [True, False, False, True, True, False]
    assert lines == [
        "repeated photographs dropped from train, where test has them too: 1",
        "repeated photographs dropped within train: 1",
        "repeated photographs dropped from train, where val has them too: 1",
    ]


def test_one_photograph_with_two_labels():
    rows = [("a", 0, "train"), ("a", 1, "test"), ("b", 1, "train")]
    with pytest.raises(UserError, match=r"occur with different labels: 1 \(row0 = row1\)"):
        unique(rows)
    kept, lines = unique(rows, skip=True)
    assert kept.tolist() == [False, False, True]
    assert lines == ["photographs with different labels skipped: 1"]

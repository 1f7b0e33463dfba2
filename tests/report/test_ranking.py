import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import DEPTHS, rows, sweep
from scipy import stats

from tljax.report import ranking


def scores(values, val="split", fold_seed=0):
    return {(val, fold_seed, seed): value for seed, value in enumerate(values)}


def folds(values, k, repeats=1):
    keys = [(f"fold:{i}/{k}", seed, 0) for seed in range(repeats) for i in range(1, k + 1)]
    return dict(zip(keys, values, strict=True))


@pytest.mark.parametrize("n", [3, 4, 10])
def test_paired_is_scipys(n):
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found = ranking.paired(scores(a), scores(b))
    truth = stats.ttest_rel(a, b)
    assert found.n == n
    assert not found.corrected
    assert found.difference == pytest.approx((a - b).mean())
    assert found.p == pytest.approx(truth.pvalue, rel=1e-9)


@pytest.mark.parametrize(("k", "repeats"), [(5, 1), (5, 2), (10, 3)])
def test_folds_are_corrected_by_hand(k, repeats):
    """t of r times k folds, Bouckaert & Frank 2004, eq. 3: n_test / n_train = 1 / (k - 1)."""
    a, b = np.random.default_rng(k).normal(size=(2, k * repeats))
    found = ranking.paired(folds(a, k, repeats), folds(b, k, repeats))
    n, d = k * repeats, a - b
    variance = sum((x - d.mean()) ** 2 for x in d) / (n - 1)
    t = d.mean() / math.sqrt((1 / n + 1 / (k - 1)) * variance)
    assert found.corrected
    assert found.p == pytest.approx(2 * (1 - stats.t(n - 1).cdf(abs(t))), rel=1e-6)
    assert found.p > stats.ttest_rel(a, b).pvalue
    mean, half = ranking.interval(folds(a, k, repeats))
    assert mean == pytest.approx(a.mean())
    corrected = math.sqrt((1 / n + 1 / (k - 1)) * a.var(ddof=1))
    assert half == pytest.approx(stats.t(n - 1).ppf(0.975) * corrected)


def test_seeds_of_one_fold_are_no_more_divisions():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 3))
    keyed = lambda x: {(f"fold:{i + 1}/5", 0, seed): x[i, seed] for i in range(5) for seed in range(3)}
    found, truth = ranking.paired(keyed(a), keyed(b)), ranking.paired(folds(a.mean(1), 5), folds(b.mean(1), 5))
    assert found == (5, pytest.approx(truth.difference), pytest.approx(truth.p), True)


def test_drawn_fractions_are_corrected_and_seeds_on_one_division_are_not():
    drawn = lambda values: {("fraction:0.2", seed, 0): v for seed, v in enumerate(values)}
    assert ranking.overlap(list(drawn(range(4)))) == pytest.approx(0.25)
    assert ranking.overlap(list(scores(range(4), "fold:1/5"))) == 0
    assert ranking.overlap([("split", seed, seed) for seed in range(4)]) == 0  # other subsets of one train split


def test_interval_is_students():
    values = np.random.default_rng(1).normal(size=6)
    mean, half = ranking.interval(scores(values))
    low, high = stats.t.interval(0.95, 5, values.mean(), stats.sem(values))
    assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))


def test_few_and_equal_pairs():
    assert ranking.paired(scores([1, 2]), scores([2, 4])) == (2, -1.5, None, False)
    assert ranking.paired({}, scores([1]))[0::2] == (0, None)
    assert ranking.paired(scores([1, 2, 3]), scores([1, 2, 3])).p == 1.0
    assert ranking.paired(scores([1, 2, 3]), scores([0, 1, 2])).p == 0.0
    assert math.isnan(ranking.interval(scores([1, 2]))[1])
    assert math.isnan(ranking.interval({})[0])


def test_holm_by_hand():
    assert ranking.holm([0.01, 0.04, 0.03, None, 0.005]) == [0.03, 0.06, 0.06, None, 0.02]
    assert ranking.holm([0.6, 0.5]) == [1.0, 1.0]
    assert ranking.holm([]) == []


FIGURES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=12)


@settings(max_examples=60, deadline=None)
@given(FIGURES, st.randoms(use_true_random=False), st.floats(0.1, 10), st.floats(-3, 3))
def test_p_knows_no_order_no_unit_and_no_side(pairs, random, scale, shift):
    a, b = (scores(side) for side in zip(*pairs))
    p = ranking.paired(a, b).p
    keys = list(a)
    random.shuffle(keys)
    renamed = dict(zip(a, keys))  # the same seeds permuted in both
    close = lambda found: found == pytest.approx(p, rel=1e-4, abs=1e-6)
    differences = np.array([a[key] - b[key] for key in a])
    if differences.std() < 1e-6:  # rounding is all there is
        return
    assert close(ranking.paired({renamed[k]: v for k, v in a.items()}, {renamed[k]: v for k, v in b.items()}).p)
    assert close(ranking.paired(b, a).p)
    change = lambda x: {key: scale * value + shift for key, value in x.items()}
    assert close(ranking.paired(change(a), change(b)).p)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=12), st.randoms(use_true_random=False))
def test_holm_lies_between_p_and_bonferroni_and_knows_no_order(values, random):
    found, count = ranking.holm(values), sum(p is not None for p in values)
    for p, corrected in zip(values, found):
        assert (p is None) == (corrected is None)
        assert p is None or p <= corrected <= min(1.0, count * p) + 1e-12
    order = list(range(len(values)))
    random.shuffle(order)
    assert ranking.holm([values[i] for i in order]) == [found[i] for i in order]


def test_the_ranking_is_by_val_and_who_diverged_is_last():
    config = sweep({"strategy": DEPTHS, "optim.lr": (0.01, 0.02), "seed": range(3)})
    found = rows(config, diverged=(4,))
    ranks = ranking.ranked(ranking.settings(found), config.metric)
    assert len(ranks) == 8
    means = [np.mean([row["val"]["nll"] for row in rank.setting.rows if row["val"]]) for rank in ranks]
    assert means[:7] == sorted(means[:7])
    assert ranks[7].setting is next(s for s in (r.setting for r in ranks) if s.failed)
    assert (ranks[7].val.n, ranks[7].val.p) == (2, None)
    assert ranks[0].val is None
    best = ranks[0].setting
    tests = [stats.ttest_rel([row["test"]["accuracy"] for row in rank.setting.rows],
                             [row["test"]["accuracy"] for row in best.rows]).pvalue for rank in ranks[1:7]]  # fmt: skip
    assert [rank.test.p for rank in ranks[1:7]] == pytest.approx(ranking.holm(tests))
    assert ranks[1].val.difference == pytest.approx(means[1] - means[0])
    # Test chooses nothing: with other test figures the order is the same.
    for row in found:
        if row["test"]:
            row["test"] = {name: -value for name, value in row["test"].items()}
    again = ranking.ranked(ranking.settings(found), config.metric)
    assert [rank.setting.fields for rank in again] == [rank.setting.fields for rank in ranks]


def test_without_val_there_is_no_best():
    config = sweep({"seed": range(2)})
    found = [row | {"val": None} for row in rows(config)]
    (rank,) = ranking.ranked(ranking.settings(found), config.metric)
    assert math.isnan(rank.value)
    assert ranking.ranked([], config.metric) == []

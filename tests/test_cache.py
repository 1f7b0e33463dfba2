"""The feature cache: what it gives is what the frozen prefix would have given, and nothing stale is ever used."""

import copy
import dataclasses
import errno
import os
import re
import shutil
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed, rows
from tiny import get_config

from tljax import cache, claims, data, ending, evaluate, experiment, loop, phases, train
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.workdir import Workdir

# The same operations, fused otherwise.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def params(path) -> dict[str, np.ndarray]:
    _, layout, found, stats, _ = evaluate.restore(Workdir(path), "last")
    leaves = jax.tree_util.tree_leaves_with_path(layout.to_host({"params": found, "stats": stats}))
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in leaves}


def run(tiny, path, **fields):
    assert train.main(changed(tiny, path, **fields)) == 0
    return path


def assert_same(path, other) -> None:
    assert [sorted(r) for r in rows(path)] == [sorted(r) for r in rows(other)]
    for a, b in zip(rows(path), rows(other)):
        np.testing.assert_allclose(list(a.values()), list(b.values()), **CLOSE)
    mine, others = params(path), params(other)
    assert mine.keys() == others.keys()
    for name, value in mine.items():
        np.testing.assert_allclose(value, others[name], **CLOSE, err_msg=name)
    for split in ("val", "test"):
        a, b = (Workdir(p).summary()[split] for p in (path, other))
        assert a["confusion"] == b["confusion"]
        np.testing.assert_allclose(a["nll"], b["nll"], **CLOSE)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures and pages have tests of their own, and take longer than these runs."""
    for name in ("curves", "confusion", "mistakes"):
        monkeypatch.setattr(ending.pictures, name, lambda *_, **__: None)
    monkeypatch.setattr(ending, "page", lambda workdir: None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Where features are kept on disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "tljax" / "features"


@pytest.fixture
def counted(monkeypatch):
    """The (split's length, view) of all features that were computed, in order."""
    found, parts = [], cache.FeatureCache._parts

    def count(self, split, view, order):
        found.append((len(split), view))
        return parts(self, split, view, order)

    monkeypatch.setattr(cache.FeatureCache, "_parts", count)
    return found


FIELDS = {
    "cache_views": 2, "ema": 0.9, "drop_rate": 0.3, "augment_mixup": 0.4, "augment_mix_at": "features",
    "train_for": "16 steps",
}  # fmt: skip


def test_a_cached_run_is_the_uncached_one(tiny, tmp_path, counted, capsys):
    """Where a phase thaws a stage, the cut moves."""
    fields = FIELDS | {"optim_accumulate": 2, "batch_size": 16}
    fields["phases"] = "phases(('8 steps', frozen()), ('rest', partial(last=2)))"
    plain = run(tiny, tmp_path / "off", cache="off", **fields)
    assert counted == []
    kept = run(tiny, tmp_path / "memory", cache="memory", **fields)
    # Each phase's own cut: two views of the 24 photographs, from that of its first epoch (5 of the second's) on, the 9
    # of val and, at the end, the 13 of test.
    assert counted == [(24, 0), (24, 1), (9, None)] + [(24, 1), (24, 0), (9, None), (13, None)]
    said = capsys.readouterr().out
    assert "before head" in said
    assert "before block2" in said
    assert_same(plain, kept)


def test_every_form_of_the_step_takes_features(tiny, tmp_path):
    fields = {"cache_views": 2, "strategy": "partial(last=2)", "train_for": "8 steps"}
    plain = run(tiny, tmp_path / "off", cache="off", **fields)
    kept = run(tiny, tmp_path / "pmap", cache="memory", parallel_mode="pmap", **fields)
    assert_same(plain, kept)
    changes = {"augment_cutmix": 1.0, "augment_mix_at": "features", "strategy": "frozen()"}
    with pytest.raises(UserError, match=r"CutMix cuts boxes out of maps .* features here are \[.*\]"):
        run(tiny, tmp_path / "cutmix", cache="memory", cache_views=2, **changes)


def test_without_random_augmentation_each_photograph_is_looked_at_once(tiny, tmp_path, counted):
    fields = {"augment_crop_min_scale": 1.0, "augment_flip": False, "strategy": "frozen()"}
    plain = run(tiny, tmp_path / "off", cache="off", **fields)
    kept = run(tiny, tmp_path / "auto", **fields)
    assert counted == [(24, 0), (9, None), (13, None)]
    assert_same(plain, kept)
    told = Workdir(kept).summary()["cache"]
    assert (told["cut"], told["where"], told["views"]) == ("head", "memory", 1)
    assert told["bytes"] == (24 + 9 + 13) * 128 * 4
    cost = lambda path: Workdir(path).summary()["flops_per_step"]
    assert cost(kept) < cost(plain) / 20  # only the head is left of the step


def built(photos, **fields):
    """(experiment, layout, phase, params, stats, dataset) of the tiny experiment with two views on disk."""
    config = get_config()
    config.update({"cache_views": 2, "cache": "disk", "strategy": "frozen()"} | fields)
    config.data.source = f"folder:{photos}"
    dataset = data.load(config.data)
    exp = experiment.build(config, len(dataset.classes))
    phase = exp.in_time(len(dataset.train))[0]
    return exp, Layout(config.parallel, config.batch_size), phase, *exp.load()[:2], dataset


@pytest.fixture(scope="module")
def ready(photos):
    return built(photos)


def test_features_on_disk_are_used_until_something_that_they_depend_on_changes(photos, tmp_path, home, counted):
    own, said = shutil.copytree(photos, tmp_path / "photos"), []

    def computed(**fields):
        *start, dataset = built(own, **fields)
        counted.clear()
        kept = cache.FeatureCache(*start, "disk", said.append)
        for split, view in ((dataset.train, 0), (dataset.train, 1), (dataset.val, None)):
            assert kept(split, view).shape == (len(split), 128)
        return counted.copy()

    whole = [(24, 0), (24, 1), (9, None)]
    assert computed() == whole
    names = ("killed", "at-work", f"here-{claims.mark()}1", f"here-{claims.mark()}")
    left, other, killed, mine = (next(home.iterdir()) / f".{name}.tmp" for name in names)
    for file in (left, other, killed, mine):
        file.touch()
    os.utime(left, (0, 0))
    os.utime(mine, (0, 0))  # the clock has jumped
    assert len(list(home.rglob("*.npy"))) == 3
    assert computed(label_smoothing=0.0, train_for="9 steps", optim={"lr": 0.3}) == []
    assert computed(image_size=24) == whole
    assert computed(augment={"color_jitter": 0.3}) == whole[:2]
    assert computed(seed=1) == whole  # the random weights of the prefix are others
    assert computed() == []

    # A photograph with other pixels under the same name.
    shutil.move(own / "train" / "red" / "red1.png", own / "val" / "red" / "red0.png")
    assert computed() == [(23, 0), (23, 1), (9, None)]

    # What is damaged is noticed, and made anew.
    file = max(home.rglob("*view1*.npy"), key=lambda f: f.stat().st_mtime)
    spoilt = bytearray(file.read_bytes())
    spoilt[-5] ^= 1
    file.write_bytes(spoilt)
    assert said == []
    assert computed() == [(23, 1)]
    assert said == [f"feature cache: {file} is damaged and computed anew"]
    assert set(home.rglob(".*")) == {other, mine}


@pytest.mark.parametrize("where", ["memory", pytest.param("disk", marks=pytest.mark.slow)])
def test_a_cached_run_resumes_exactly(tiny, tmp_path, home, monkeypatch, where):
    fields = {"cache": where, **FIELDS}
    whole = run(tiny, tmp_path / "whole", **fields)
    assess, calls = loop.assess, []

    def dies(run, step, state):
        if step == 8 and not calls:
            calls.append(step)
            run.keeper.checkpoints.wait()  # a process that ends takes its threads with it
            raise KeyboardInterrupt
        return assess(run, step, state)

    monkeypatch.setattr(loop, "assess", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "cut", **fields)
    cut = run(tiny, tmp_path / "cut", **fields)
    assert rows(cut) == rows(whole)
    mine, others = params(cut), params(whole)
    assert all(mine[name].tobytes() == others[name].tobytes() for name in others)


def test_a_signal_while_features_are_computed_ends_the_run_at_once(tiny, tmp_path, home, monkeypatch, capsys):
    place = Layout.place_batch

    def signalled(self, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return place(self, batch)

    fields = {"cache": "disk", "cache_views": 2, "train_for": "9 steps"}
    with monkeypatch.context() as m:
        m.setattr(Layout, "place_batch", signalled)
        assert train.main(changed(tiny, tmp_path / "run", **fields)) == 143
    assert "stopped by SIGTERM while features were computed" in " ".join(capsys.readouterr().out.split())
    assert not list(home.rglob("*.*"))
    run(tiny, tmp_path / "run", **fields)


def test_features_are_computed_as_far_as_they_are_asked_for(ready):
    """And are, whoever asks, the same to the last bit: their batches are those of the order."""
    exp, layout, phase, params, stats, dataset = ready
    part, whole = (cache.FeatureCache(exp, layout, phase, params, stats, "memory") for _ in range(2))
    order = np.random.default_rng(0).permutation(24)
    growing, other = (kept.growing(dataset.train, 1, order) for kept in (part, whole))
    row = 128 * 4
    assert part.nbytes == 0
    for place, batches in ((order[3], 1), (order[7], 1), (order[0], 1), (order[8], 2), (order[12], 2)):
        assert growing[place].any()
        assert part.nbytes == batches * 8 * row
    assert growing[order[9]].tobytes() == np.asarray(other)[order[9]].tobytes()
    assert whole.nbytes == 24 * row
    expected = cache.FeatureCache(exp, layout, phase, params, stats, "memory")(dataset.train, 1)
    np.testing.assert_allclose(part(dataset.train, 1), expected, **CLOSE)
    assert part.nbytes == 24 * row


def test_a_signal_between_steps_that_wait_for_features_saves(tiny, tmp_path, monkeypatch, capsys):
    """The run then ends as one that was never stopped."""
    fields = {"cache": "memory", "cache_views": 2, "train_for": "9 steps", "eval_every": "9 steps"}
    whole = run(tiny, tmp_path / "whole", **fields)
    add, calls = cache.Growing._add, []

    def signalled(self, *part):
        add(self, *part)
        calls.append(1)
        if len(calls) == 4:  # the second view's first part; its next finds the signal
            os.kill(os.getpid(), signal.SIGTERM)
            self.parts.throw(cache.Interrupted)

    with monkeypatch.context() as m:
        m.setattr(cache.Growing, "_add", signalled)
        assert train.main(changed(tiny, tmp_path / "run", **fields)) == 143
    assert "stopped by SIGTERM at step 3, saved" in capsys.readouterr().out
    run(tiny, tmp_path / "run", **fields)
    assert rows(tmp_path / "run") == rows(whole)


def test_a_view_is_the_same_whoever_asks(ready):
    """The examples of the stream of training, sorted back, are the views."""
    exp, *_, dataset = ready
    common = {"batch_size": 8, "size": 32, "augment": exp.config.augment}
    stream = list(data.train_batches(dataset.train, seed=5, stop_step=9, views=2, **common))
    images = np.concatenate([batch["image"] for batch in stream])
    for epoch in range(3):
        found = np.empty_like(images[:24])
        places = [data.pipeline.order(24, 5)(j)[1] for j in range(24 * epoch, 24 * epoch + 24)]
        assert sorted(places) == list(range(24))
        found[places] = images[24 * epoch : 24 * epoch + 24]
        view = np.concatenate([b["image"] for b in data.view_batches(dataset.train, epoch % 2, **common)])
        np.testing.assert_array_equal(found, view)
    first, second = (
        np.concatenate([b["image"] for b in data.view_batches(dataset.train, v, **common)]) for v in (0, 1)
    )
    assert (first != second).any((1, 2, 3)).all()


def test_processes_that_build_one_cache_do_not_meet(ready, home):
    exp, layout, phase, params, stats, dataset = ready
    caches = [cache.FeatureCache(exp, layout, phase, params, stats, "disk") for _ in range(3)]
    found = [None] * 3

    def build(i):
        found[i] = caches[i](dataset.train, 1)

    threads = [threading.Thread(target=build, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(home.rglob("*"))) == 2  # the folder and one file
    images = np.concatenate(
        [b["image"] for b in data.view_batches(dataset.train, 1, batch_size=8, size=32, augment=exp.config.augment)]
    )
    variables = {"params": params, "batch_stats": stats}
    p = exp.preprocessing
    x = (images.astype(np.float32) / 255 - np.array(p.mean, np.float32)) / np.array(p.std, np.float32)
    expected = exp.model.apply(variables, x, stop="head")
    for features in found:
        assert isinstance(features, np.memmap)
        np.testing.assert_allclose(features, expected[:24], **CLOSE)


def test_bfloat16_features_come_back_from_disk_as_they_were(photos, home):
    *start, dataset = built(photos, dtype="bfloat16", strategy="partial(last=2)")
    kept, stored, again = (cache.FeatureCache(*start, where)(dataset.val) for where in ("memory", "disk", "disk"))
    assert kept.dtype == stored.dtype == again.dtype == jnp.bfloat16
    assert kept.tobytes() == np.asarray(stored).tobytes() == np.asarray(again).tobytes()


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"cache": "memory"}, "config.cache = 'memory' is impossible: each epoch draws new augmented views"),
        ({"cache": "disk", "cache_views": 2, "augment_mixup": 0.2}, "is impossible: mixup and CutMix mix images"),
        ({"cache": "ram"}, "config.cache = 'ram': expected one of auto, off, memory, disk"),
        ({"cache_limit": "4 apples"}, "config.cache_limit = '4 apples': expected a number of KB, MB, GB, TB"),
        ({"cache_views": -1}, "config.cache_views = -1: expected at least 0"),
        ({"cache": "disk", "cache_views": 2, "cache_folder": __file__}, "cannot be used"),
    ],
)
def test_what_cannot_be_kept_is_told_in_one_line(tiny, tmp_path, fields, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        train.main(changed(tiny, tmp_path / "run", **fields))
    assert "\n" not in str(error.value)


def test_a_full_disk_is_told_and_leaves_nothing_half_written(ready, home, monkeypatch):
    exp, layout, phase, params, stats, dataset = ready

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot be used \(No space left on device\)"):
        cache.FeatureCache(exp, layout, phase, params, stats, "disk")(dataset.train, 0)
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_the_choice_says_why(ready):
    exp, _, phase, *_ = ready
    examples = {"train": 24, "val": 9, "test": 13}
    choose = lambda **fields: _choose(exp, phase, examples, **fields)
    assert choose(cache="auto")[0] == "memory"
    # Two views of 24, once 9 and 13.
    assert choose(cache="auto")[1].startswith("70 × 128 float32 before head, 35.0 KiB, in memory, 2 views")
    assert choose(cache="auto", cache_limit="0 KB")[0] == ""
    assert choose(cache="auto", cache_views=8) == ("", "off: 8 views for 192 looks, none would be used again")
    assert choose(cache="memory", cache_views=8)[0] == "memory"  # asked for by name, it is kept all the same
    assert choose(cache="off")[0] == ""
    moves = phase._replace(plan=experiment.build(_changed(exp.config, strategy="full()"), 3).plans[0][1])
    assert cache.choose(exp, moves, examples) == ("", "off: nothing is frozen from the input on")


def _choose(exp, phase, examples, **fields):
    return cache.choose(dataclasses.replace(exp, config=_changed(exp.config, **fields)), phase, examples)


def _changed(config, **fields):
    config = copy.deepcopy(config)
    config.update(fields)
    return config


def test_the_cut_follows_from_the_plan():
    """Adapters end the prefix where they lie, and so do statistics that move."""
    config = get_config()
    cut = lambda **fields: experiment.build(_changed(config, **fields), 3).plans[-1][1].cut
    assert cut(strategy="frozen()") == "head"
    assert cut(strategy="partial(last=2)") == "block2"
    assert cut(strategy="surgical('block2')") == "block2"
    assert cut(strategy="lora(rank=2, targets='block3/**')") == "block3"
    assert cut(norm_stats="batch") is None
    assert cut(strategy="full()") is None


def test_needed_views_are_those_of_the_epochs_that_are_left():
    config = get_config()
    config.cache_views = 3
    phase = phases.Phase(None, 0, 30, {})  # 30 steps of 8 over 24 photographs: 10 epochs
    assert cache.needed(config, phase, 24) == [0, 1, 2]
    assert cache.needed(config, phase, 24, start=3) == [1, 2, 0]
    assert cache.needed(config, phase, 24, start=27) == [0]
    assert cache.needed(config, phases.Phase(None, 3, 6, {}), 24) == [1]
    assert cache.needed(config, phases.Phase(None, 4, 7, {}), 24) == [1, 2]  # across the ends of epochs

"""The stream of batches: what it may and what it must not depend on."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import data
from tljax.data.table import Table
from tljax.errors import UserError

SIZE = 8
AUGMENT = {"crop_min_scale": 0.3, "flip": True, "color_jitter": 0.2, "randaugment": (1, 5.0)}


def split_of(n: int, bad: dict | None = None) -> data.Split:
    """n noise images of different sizes; the label is the image's number."""
    rng = np.random.default_rng(n)
    images = [rng.integers(0, 256, (9 + i % 3, 12, 3), dtype=np.uint8) for i in range(n)]
    for at, content in (bad or {}).items():
        images[at] = content
    names = [f"photo{i}.jpg" for i in range(n)]
    table = Table(images, list(range(n)), names, np.full(n, "train"))
    return data.Split(table, np.arange(n), np.arange(n))


def train(split, stop_step, batch_size=4, seed=0, augment=AUGMENT, **kw):
    return list(
        data.train_batches(
            split, batch_size=batch_size, seed=seed, stop_step=stop_step, size=SIZE, augment=augment, **kw
        )
    )


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(1, 9),
    local=st.integers(1, 3),
    processes=st.integers(1, 3),
    start=st.integers(0, 6),
    threads=st.integers(0, 3),
)
def test_batches_depend_on_seed_and_step_alone(n, local, processes, start, threads):
    split, batch, stop = split_of(n), local * processes, 7
    whole = train(split, stop, batch, threads=1)
    parts = [
        train(split, stop, batch, start_step=start, threads=threads, process=(i, processes)) for i in range(processes)
    ]
    assert all(len(part) == stop - start for part in parts)
    for step, expected in enumerate(whole[start:]):
        for key in ("image", "label"):
            np.testing.assert_array_equal(np.concatenate([p[step][key] for p in parts]), expected[key])


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 12), batch=st.integers(1, 7), epochs=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_each_photograph_comes_once_an_epoch(n, batch, epochs, seed):
    steps = -(-epochs * n // batch)
    batches = train(split_of(n), steps, batch, seed, augment={"crop_min_scale": 1.0, "flip": False}, threads=0)
    labels = np.concatenate([b["label"] for b in batches])
    assert len(labels) == steps * batch  # nothing dropped at an epoch's end
    for epoch in range(epochs):
        assert sorted(labels[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_epochs_and_seeds_differ_in_order_and_in_pixels():
    split = split_of(30)
    labels = np.concatenate([b["label"] for b in train(split, 15)])
    assert (labels[:30] != labels[30:]).any()
    assert (labels != np.concatenate([b["label"] for b in train(split, 15, seed=1)])).any()
    one = split_of(1)
    first, second = train(one, 2, batch_size=1)
    assert (first["image"] != second["image"]).any()


def test_shapes_and_types():
    (batch,) = train(split_of(5), 1, process=(1, 2))
    assert batch["image"].shape == (2, SIZE, SIZE, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].shape == (2,)
    assert batch["label"].dtype == np.int32


def test_without_random_crop_training_sees_the_evaluation_crop():
    split = split_of(6)
    kw = {"size": SIZE, "crop": 0.8, "batch_size": 6}
    (plain,) = data.train_batches(split, seed=0, stop_step=1, augment={"crop_min_scale": 1.0, "flip": False}, **kw)
    (expected,) = data.eval_batches(split, **kw)
    order = plain["label"]
    np.testing.assert_array_equal(plain["image"], expected["image"][order])


@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 11), local=st.integers(1, 4), processes=st.integers(1, 3), threads=st.integers(0, 2))
def test_evaluation_sees_every_photograph_exactly_once(n, local, processes, threads):
    split = split_of(n)
    parts = [
        list(data.eval_batches(split, batch_size=local * processes, size=SIZE, threads=threads, process=(i, processes)))
        for i in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    batches = [{key: np.concatenate([b[key] for b in step]) for key in step[0]} for step in zip(*parts)]
    assert all(len(b["mask"]) == local * processes for b in batches)
    if not n:
        assert not batches
        return
    every = {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}
    real = every["mask"] == 1
    assert set(every["mask"]) <= {0.0, 1.0}
    np.testing.assert_array_equal(every["index"][real], np.arange(n))
    np.testing.assert_array_equal(every["label"][real], split.labels)
    assert (every["index"][~real] == -1).all()
    assert not every["image"][~real].any()


@pytest.mark.parametrize("stop_early", [False, True])
def test_no_thread_survives_the_iterator(stop_early):
    before = set(threading.enumerate())
    batches = data.train_batches(split_of(20), batch_size=2, seed=0, stop_step=50, size=SIZE, threads=3)
    for _ in batches:
        if stop_early:
            batches.close()
    for _ in range(100):
        if set(threading.enumerate()) <= before:
            return
        time.sleep(0.02)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_is_no_image_stops_with_its_name(threads):
    split = split_of(6, bad={3: b"hello"})
    with pytest.raises(UserError, match=r"^photo3.jpg: 5 bytes that are no image .*on_bad='skip'") as caught:
        train(split, 3, threads=threads)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"^photo3.jpg: "):
        list(data.eval_batches(split, batch_size=4, size=SIZE, threads=threads))


def test_no_steps_no_batches():
    assert train(split_of(3), 5, start_step=5) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augment": {"crop_min_scale": 0.0}}, "crop_min_scale is 0.0"),
        ({"augment": {"crop_ratio": (2.0, 1.0)}}, "crop_ratio is"),
        ({"augment": {"color_jitter": -1.0}}, "color_jitter is -1.0"),
        ({"augment": {"randaugment": (2,)}}, "randaugment is"),
        ({"augment": {"randaugment": (2, 11)}}, "randaugment is"),
        ({"interpolation": "bicubik"}, "unknown interpolation 'bicubik'; nearest: bicubic"),
        ({"process": (0, 3)}, "batch size 4 cannot be divided among 3 processes"),
    ],
)
def test_wrong_settings_are_named_at_once(wrong, message):
    kw = {"batch_size": 4, "seed": 0, "stop_step": 1, "size": SIZE} | wrong
    with pytest.raises(UserError, match=message):
        data.train_batches(split_of(3), **kw)  # the call, before the first batch


def test_empty_train_split():
    with pytest.raises(UserError, match="train split is empty"):
        train(split_of(0), 1)

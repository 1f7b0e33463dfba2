"""Mixing on the device: the laws of mixup and CutMix, under jit and under pmap."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import data
from tljax.errors import UserError

MODES = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.4, "cutmix": 1.0}}


def batch(n=8, classes=5):
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.normal(size=(n, 12, 10, 3)), jnp.float32)
    # Every example its own class as far as they go, so a target tells whose share it is.
    return images, data.soft_targets(jnp.arange(n) % classes, classes)


mix = jax.jit(data.mix, static_argnames=("mixup", "cutmix"))


def test_soft_targets_by_hand():
    found = data.soft_targets(jnp.array([2, 0]), 4, 0.1)
    np.testing.assert_allclose(found, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], rtol=1e-6)
    np.testing.assert_array_equal(data.soft_targets(jnp.array([1]), 3), [[0, 1, 0]])


@pytest.mark.parametrize("mode", MODES)
def test_targets_sum_to_one_and_batch_means_stay(mode):
    images, targets = batch()
    for seed in range(4):
        mixed, soft = mix(jax.random.key(seed), images, targets, **MODES[mode])
        np.testing.assert_allclose(soft.sum(-1), 1, atol=1e-6)
        # Partners exchange what they give away: sums over a pair are conserved, pixel by pixel.
        pairs = lambda x: np.asarray(x).reshape(-1, 2, *x.shape[1:]).sum(1)
        np.testing.assert_allclose(pairs(mixed), pairs(images), atol=1e-5)
        np.testing.assert_allclose(pairs(soft), pairs(targets), atol=1e-6)


def test_mixup_weighs_images_as_targets():
    images, targets = batch()
    mixed, soft = mix(jax.random.key(3), images, targets, mixup=0.4)
    weight = float(soft[0, 0])
    assert 0 < weight < 1
    partner = np.asarray(images)[np.arange(8) ^ 1]
    np.testing.assert_allclose(mixed, weight * np.asarray(images) + (1 - weight) * partner, atol=1e-5)


def test_cutmix_area_is_the_label_weight():
    images, targets = batch()
    weights = []
    for seed in range(8):
        mixed, soft = mix(jax.random.key(seed), images, targets, cutmix=1.0)
        partner = np.asarray(images)[np.arange(8) ^ 1]
        taken = (np.asarray(mixed) == partner).all(-1)  # [batch, h, w]
        kept = (np.asarray(mixed) == np.asarray(images)).all(-1)
        assert (taken ^ kept).all()
        assert (taken == taken[0]).all()
        rows, columns = np.flatnonzero(taken[0].any(1)), np.flatnonzero(taken[0].any(0))
        assert taken[0].sum() == len(rows) * len(columns)  # a rectangle
        np.testing.assert_allclose(soft[np.arange(8), np.arange(8) % 5], kept.mean((1, 2)), atol=1e-6)
        weights.append(float(soft[0, 0]))
    assert len(set(weights)) > 3


def test_both_uses_each_of_them():
    images, targets = batch()
    kinds = set()
    for seed in range(16):
        mixed, _ = mix(jax.random.key(seed), images, targets, mixup=0.4, cutmix=1.0)
        partner = np.asarray(images)[np.arange(8) ^ 1]
        pure = (np.asarray(mixed) == np.asarray(images)) | (np.asarray(mixed) == partner)
        kinds.add(bool(pure.all()))
    assert kinds == {True, False}


def test_lambda_follows_beta():
    # E[lambda] = 1/2 and Var = 1 / (4 (2 alpha + 1)) for Beta(alpha, alpha).
    images, targets = batch(2, 2)
    keys = jax.random.split(jax.random.key(0), 2000)
    weight = jax.vmap(lambda key: data.mix(key, images, targets, mixup=0.5)[1][0, 0])(keys)
    assert abs(float(weight.mean()) - 0.5) < 0.03
    assert abs(float(weight.var()) - 1 / 8) < 0.01


def test_off_changes_nothing_and_odd_batches_are_refused():
    images, targets = batch()
    same, soft = data.mix(jax.random.key(0), images, targets)
    assert same is images
    assert soft is targets
    with pytest.raises(UserError, match="a batch of 7 a device is odd"):
        data.mix(jax.random.key(0), images[:7], targets[:7], mixup=1.0)


def test_division_among_devices_changes_nothing():
    mode = "both"
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip("needs four devices")
    images, targets = batch()
    key = jax.random.key(5)
    expected = mix(key, images, targets, **MODES[mode])
    sharding = jax.sharding.NamedSharding(jax.sharding.Mesh(devices, "data"), jax.sharding.PartitionSpec("data"))
    placed = jax.device_put((images, targets), sharding)
    compiled = mix.lower(key, *placed, **MODES[mode]).compile()
    for found, wanted in zip(compiled(key, *placed), expected):
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    # Partners are on the same device: no image travels.
    text = compiled.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), (images, targets))
    per_device = jax.pmap(lambda k, x, t: data.mix(k, x, t, **MODES[mode]), in_axes=(None, 0, 0), devices=devices)
    for found, wanted in zip(per_device(key, *parts), expected):
        np.testing.assert_allclose(found.reshape(wanted.shape), wanted, atol=1e-6)

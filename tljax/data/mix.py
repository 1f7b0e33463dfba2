"""What happens to images and labels on the device: soft targets, mixup, CutMix."""

import jax
import jax.numpy as jnp

from tljax.errors import UserError


def soft_targets(labels: jax.Array, classes: int, smoothing: float = 0.0) -> jax.Array:
    """float32 [batch, classes]: one-hot labels, of which `smoothing` is spread evenly over all classes.

    Label smoothing as in Szegedy et al. 2016.
    """
    return jax.nn.one_hot(labels, classes, dtype=jnp.float32) * (1 - smoothing) + smoothing / classes


def mix(
    key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float = 0.0, cutmix: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Mixes example i with i ^ 1. images: float [batch, h, w, c]; targets: [batch, classes], rows sum to 1.

    Mixup takes features of any rank as well (manifold mixup, Verma et al. 2019), CutMix needs maps.

    mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) with the alpha of their Beta(alpha, alpha), 0 =
    off; with both a coin decides for each batch. One lambda, and one box, a batch, as in both papers.
    Partners are neighbours so that no image crosses a device, and nothing depends on how the batch is
    divided: give every device the same key. Raises UserError for an odd batch, and for CutMix of what is no map.
    """
    if not mixup and not cutmix:
        return images, targets
    if images.shape[0] % 2:
        raise UserError(f"mixup and CutMix pair neighbours: a batch of {images.shape[0]} a device is odd")
    coin_key, mixup_key, cutmix_key = jax.random.split(key, 3)
    keep = jnp.ones(())  # the weight of the example itself: one number or, with CutMix, pixel by pixel
    if cutmix and images.ndim != 4:
        raise UserError(f"CutMix cuts boxes out of maps [batch, h, w, c], and features here are {list(images.shape)}")
    if mixup:
        keep *= jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        outside = 1.0 - _box(cutmix_key, *images.shape[1:3], cutmix)
        keep = jnp.where(jax.random.bernoulli(coin_key), outside, keep) if mixup else outside
    part = keep.mean()
    keep = (keep[None, :, :, None] if cutmix else keep).astype(images.dtype)
    mixed = images * keep + _partner(images) * (1 - keep)
    return mixed, targets * part + _partner(targets) * (1 - part)


def _partner(x: jax.Array) -> jax.Array:
    # A reversal inside pairs, not a gather: the compiler sees that it needs no other device's examples.
    return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def _box(key: jax.Array, height: int, width: int, alpha: float) -> jax.Array:
    """0 and 1 [height, width]: a box of 1 − lambda of the area around a uniform centre, cut off outside."""
    lam_key, y_key, x_key = jax.random.split(key, 3)
    side = jnp.sqrt(1 - jax.random.beta(lam_key, alpha, alpha))

    def inside(length, centre_key):
        centre = jax.random.randint(centre_key, (), 0, length)
        half = jnp.floor(side * length).astype(jnp.int32) // 2
        at = jnp.arange(length)
        return (at >= centre - half) & (at < centre + half)

    return (inside(height, y_key)[:, None] & inside(width, x_key)[None, :]).astype(jnp.float32)

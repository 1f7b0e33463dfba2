"""Scaled dot-product attention (Vaswani et al. 2017), fused where the device has a kernel for it."""

import jax
import jax.numpy as jnp


def attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None, causal: bool = False):
    """What queries gather from values, the shares in float32: arrays [..., tokens, heads, size] -> the same.

    bias: added to the scores [..., heads, queries, keys]. causal: a token sees itself and those before it only.
    """
    if bias is None and fusible(query):
        try:
            return _fused(query, key, value, causal)
        except (NotImplementedError, RuntimeError, ValueError):  # an older GPU or cuDNN, or one that is not there
            pass
    tokens = query.shape[-3]
    query, key, value = (x.swapaxes(-3, -2) for x in (query, key, value))
    scores = jnp.matmul(query * query.shape[-1] ** -0.5, key.swapaxes(-2, -1), preferred_element_type=jnp.float32)
    if causal:
        scores = scores + jnp.where(jnp.tril(jnp.ones((tokens, tokens), bool)), 0, -jnp.inf)
    scores = scores if bias is None else scores + bias
    return (jax.nn.softmax(scores).astype(value.dtype) @ value).swapaxes(-3, -2)


def fusible(query: jax.Array) -> bool:
    """Whether cuDNN may have a fused kernel: on a GPU, for 16-bit numbers and heads of up to 128 in eights.

    It never holds the scores, [heads, queries, keys] an example. On a CPU JAX's own unfused form is the slower one.
    """
    size = query.shape[-1]
    return jax.default_backend() == "gpu" and query.dtype.itemsize == 2 and size <= 128 and size % 8 == 0


def _fused(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    flat = lambda x: x.reshape(-1, *x.shape[-3:])
    x = jax.nn.dot_product_attention(*map(flat, (query, key, value)), is_causal=causal, implementation="cudnn")
    return x.reshape(query.shape)

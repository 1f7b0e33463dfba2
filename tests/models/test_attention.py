"""Attention against numpy, and its fused form, as far as a machine without a GPU can tell, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tljax import models
from tljax.models import attention


def expected(query, key, value, bias=0.0, causal=False):
    """One query at a time."""
    out = np.zeros(query.shape)
    for place in np.ndindex(query.shape[:-1]):
        *outer, at, head = place
        row = tuple(outer)
        scores = np.array([query[place] @ key[(*row, other, head)] for other in range(key.shape[-3])])
        scores = (
            scores / np.sqrt(query.shape[-1]) + np.broadcast_to(bias, (query.shape[-2], *[key.shape[-3]] * 2))[head, at]
        )
        last = at + 1 if causal else len(scores)
        shares = np.exp(scores[:last] - scores[:last].max())
        for other, share in enumerate(shares / shares.sum()):
            out[place] += share * value[(*row, other, head)]
    return out


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, 3, 5, 2, 8)).astype(np.float32) for _ in range(3)]  # two outer dimensions


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_the_weighted_mean_of_the_values(arrays, causal):
    np.testing.assert_allclose(attention.attend(*arrays, causal=causal), expected(*arrays, causal=causal), atol=1e-5)


def test_a_bias_is_added_to_the_scores(arrays):
    bias = np.random.default_rng(1).normal(size=(2, 5, 5)).astype(np.float32)
    np.testing.assert_allclose(attention.attend(*arrays, bias), expected(*arrays, bias), atol=1e-5)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """JAX says that there is one; cuDNN's kernel is replaced by XLA's with the same arguments. Gives the calls."""
    calls, original = [], jax.nn.dot_product_attention

    def counted(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        assert {x.dtype for x in args} == {jnp.dtype(jnp.bfloat16)}
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", counted)
    return calls


@pytest.mark.parametrize("causal", [False, True])
def test_the_fused_form_gives_the_same(arrays, on_a_gpu, causal):
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    found = attention.attend(*half, causal=causal)
    assert on_a_gpu == [(6, 5, 2, 8)]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), expected(*arrays, causal=causal), atol=0.05)


def test_it_is_used_only_where_there_is_a_kernel(arrays, on_a_gpu):
    """Not for float32, with a bias, or for heads of an odd size; a vision transformer in bfloat16 does."""
    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    attention.attend(*arrays)
    attention.attend(*half, jnp.zeros((2, 5, 5)))
    attention.attend(*(x[..., :7] for x in half))
    assert on_a_gpu == []
    model = models.create("vit_mini", 3, dtype=jnp.bfloat16)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 32, 32, 3)))
    assert on_a_gpu == [(2, 17, 2, 16)] * 6


def test_a_machine_whose_kernel_fails_uses_the_plain_form(arrays, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("cuDNN is not detected.")

    half = [jnp.asarray(x, jnp.bfloat16) for x in arrays]
    plain = attention.attend(*half)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fails)
    np.testing.assert_array_equal(attention.attend(*half), plain)

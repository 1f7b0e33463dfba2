"""The forms of a convolution are one function, whatever the backend; norms and dropout by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax.models import layers


def by_hand(x, kernel, stride, pads, groups):
    """Convolution in float64, one output pixel at a time."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    kernel = np.asarray(kernel, np.float64)
    kh, kw, per_group, out = kernel.shape
    rows, columns = (x.shape[1] - kh) // stride + 1, (x.shape[2] - kw) // stride + 1
    result = np.zeros((len(x), rows, columns, out))
    for row in range(rows):
        for column in range(columns):
            window = x[:, row * stride : row * stride + kh, column * stride : column * stride + kw]
            for o in range(out):
                first = o // (out // groups) * per_group
                part = window[..., first : first + per_group]
                result[:, row, column, o] = (part * kernel[..., o]).sum((1, 2, 3))
    return result


def same(size, kernel, stride):
    """TensorFlow's SAME: the output has ceil(size / stride) pixels; an odd pixel of padding goes behind."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, dtype=np.float32)) for shape in shapes]


@settings(deadline=None, max_examples=12)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    kind=st.sampled_from(["full", "grouped", "depthwise"]),
    padding=st.sampled_from(["SAME", "symmetric"]),
)
def test_convolve_by_hand(height, width, kernel, stride, kind, padding):
    groups = {"full": 1, "grouped": 2, "depthwise": 4}[kind]
    x, k = drawn(0, (2, height, width, 4), (kernel, kernel, 4 // groups, 4))
    pads = [same(n, kernel, stride) if padding == "SAME" else (kernel // 2,) * 2 for n in (height, width)]
    got = layers.convolve(x, k, stride, padding if padding == "SAME" else kernel // 2, groups)
    np.testing.assert_allclose(got, by_hand(x, k, stride, pads, groups), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "size"), [(3, 1, 7), (3, 2, 8), (5, 2, 7), (5, 1, 4)])
def test_depthwise_forms_agree(kernel, stride, size):
    x, k, g = drawn(1, (2, size, size, 6), (kernel, kernel, 1, 6), (2, -(-size // stride), -(-size // stride), 6))
    pads = [same(size, kernel, stride)] * 2
    for ours, plain in zip(
        jax.vjp(lambda x, k: layers.depthwise_conv(x, k, stride, pads), x, k)[1](g),
        jax.vjp(lambda x, k: layers.plain_conv(x, k, stride, pads, 6), x, k)[1](g),
    ):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("groups", "inputs", "outputs"), [(2, 80, 40), (6, 48, 96), (16, 128, 64)])
def test_grouped_forms_agree(groups, inputs, outputs):
    x, k, g = drawn(1, (2, 7, 7, inputs), (3, 3, inputs // groups, outputs), (2, 4, 4, outputs))
    pads = [(1, 1)] * 2
    for ours, plain in zip(
        jax.vjp(lambda x, k: layers.grouped_conv(x, k, 2, pads, groups), x, k)[1](g),
        jax.vjp(lambda x, k: layers.plain_conv(x, k, 2, pads, groups), x, k)[1](g),
    ):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width", "pads"), [(5, 7, 1), (2, 3, 1), (4, 5, 0)])
def test_large_depthwise_form_agrees(height, width, pads):
    """Both gradients, also one alone; images smaller than the kernel, too."""
    pads = [(pads, pads)] * 2
    x, k = drawn(5, (2, height, width, 6), (3, 3, 1, 6))
    ours = lambda x, k: layers.large_depthwise_conv(x, k, pads)
    plain = lambda x, k: layers.plain_conv(x, k, 1, pads, 6)
    (g,) = drawn(6, plain(x, k).shape)
    np.testing.assert_allclose(ours(x, k), plain(x, k), rtol=0, atol=1e-4)
    for expected, got in zip(jax.vjp(plain, x, k)[1](g), jax.vjp(ours, x, k)[1](g)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    for i in (0, 1):
        loss = lambda form: lambda x, k: (form(x, k) * g).sum()
        np.testing.assert_allclose(jax.grad(loss(ours), i)(x, k), jax.grad(loss(plain), i)(x, k), rtol=0, atol=1e-4)
    # Per example, as a Fisher information needs it.
    one = lambda x, g: jax.grad(lambda k: (ours(x[None], k)[0] * g).sum())(k)
    np.testing.assert_allclose(jax.vmap(one)(x, g).sum(0), jax.vjp(plain, x, k)[1](g)[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("argument", [0, 1])
def test_large_depthwise_form_forms_no_gradient_that_nobody_asked_for(argument):
    x, k = drawn(7, (2, 9, 9, 6), (7, 7, 1, 6))
    jaxpr = jax.make_jaxpr(jax.grad(lambda *a: layers.convolve(*a, padding=3, groups=6).sum(), argument))(x, k)
    assert ("scan[" in str(jaxpr)) == (argument == 1)
    assert (" rev[" in str(jaxpr)) == (argument == 0)


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise_forms_agree(stride):
    x, k, g = drawn(2, (2, 5, 6, 3), (1, 1, 3, 7), (2, -(-5 // stride), 6 // stride, 7))
    for ours, plain in zip(
        jax.vjp(lambda x, k: layers.pointwise_conv(x, k, stride), x, k)[1](g),
        jax.vjp(lambda x, k: layers.plain_conv(x, k, stride, [(0, 0)] * 2, 1), x, k)[1](g),
    ):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 8), (7, 8)])
@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_form_follows_the_platform(size, groups, platform):
    """Forward and backward: no convolution on CPU, nothing but convolutions elsewhere."""
    x, k = drawn(3, (2, 6, 6, 8), (size, size, 8 // groups, 8))

    def gradient(x, k):
        return jax.grad(lambda x, k: layers.convolve(x, k, groups=groups).sum(), (0, 1))(x, k)

    text = jax.jit(gradient).trace(x, k).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.convolution" in text) == (platform != "cpu")
    assert ("stablehlo.dot_general" in text) == (platform == "cpu" and size == 1)
    assert ("stablehlo.slice" in text) == (platform == "cpu" and size > 1)


def test_gradient_of_one_argument_needs_no_other():
    """With the kernel frozen only the input's gradient is computed, and the other way round."""
    x, k = drawn(4, (2, 8, 8, 16), (1, 1, 16, 16))

    def flops(argument):
        loss = lambda x, k: (layers.convolve(x, k) ** 2).sum()
        return jax.jit(jax.grad(loss, argument)).lower(x, k).compile().cost_analysis()["flops"]

    product = 2 * 2 * 8 * 8 * 16 * 16
    assert product * 2 <= flops(0) < product * 2.5
    assert product * 2 <= flops(1) < product * 2.5
    assert product * 3 <= flops((0, 1)) < product * 3.5


@pytest.mark.parametrize(("size", "groups"), [(1, 1), (3, 4)])
def test_vmap_over_kernels(size, groups):
    """Sweeps map over trainable kernels with one shared input."""
    x, ks = drawn(5, (2, 5, 5, 4), (3, size, size, 4 // groups, 4))
    one = lambda k: layers.convolve(x, k, groups=groups)
    np.testing.assert_allclose(jax.vmap(one)(ks), jnp.stack([one(k) for k in ks]), rtol=0, atol=1e-5)


def test_batch_norm_by_hand():
    x, scale, bias, mean, var = (np.asarray(a) for a in drawn(6, (4, 3, 3, 5), *[(5,)] * 4))
    x, var = 3 * x + 100, var**2 + 1  # far from zero: a naive E[x^2] - E[x]^2 would lose three digits
    norm = layers.BatchNorm(layers.Common(epsilon=1e-3, momentum=0.9))
    mean = mean + 99
    state = {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}

    got = norm.apply(state, x, frozenset())
    np.testing.assert_allclose(got, (x - mean) / np.sqrt(var + 1e-3) * scale + bias, rtol=0, atol=2e-4)

    # A module without a name is at the root, whose path is empty.
    got, moved = norm.apply(state, x, frozenset({""}), mutable=["batch_stats"])
    wide = x.astype(np.float64)
    now, spread = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    np.testing.assert_allclose(got, (wide - now) / np.sqrt(spread + 1e-3) * scale + bias, rtol=0, atol=2e-4)
    count = 4 * 3 * 3
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.9 * mean + 0.1 * now, rtol=1e-5)
    unbiased = spread * count / (count - 1)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.9 * var + 0.1 * unbiased, rtol=1e-4)


def test_group_norm_by_hand():
    x, scale, bias = (np.asarray(a) for a in drawn(7, (2, 3, 3, 8), (8,), (8,)))
    got = layers.GroupNorm(layers.Common(epsilon=1e-5)).apply({"params": {"scale": scale, "bias": bias}}, x, None)
    for group in (slice(0, 4), slice(4, 8)):
        for example in range(2):
            part = x[example, :, :, group]
            expected = (part - part.mean()) / np.sqrt(part.var() + 1e-5) * scale[group] + bias[group]
            np.testing.assert_allclose(got[example, :, :, group], expected, rtol=0, atol=1e-5)


def test_layer_norm_and_rms_norm_by_hand():
    x, scale, bias = (np.asarray(a, np.float64) for a in drawn(8, (2, 5, 8), (8,), (8,)))
    x = 3 * x + 20
    common, live = layers.Common(epsilon=1e-3), frozenset()
    got = layers.LayerNorm(common).apply({"params": {"scale": scale, "bias": bias}}, x, live)
    rms = layers.RMSNorm(common).apply({"params": {"scale": scale}}, x, live)
    for example, token in np.ndindex(2, 5):
        one = x[example, token]
        expected = (one - one.mean()) / np.sqrt(one.var() + 1e-3) * scale + bias
        np.testing.assert_allclose(got[example, token], expected, rtol=0, atol=1e-4)
        expected = one / np.sqrt((one**2).sum() / 8 + 1e-3) * scale
        np.testing.assert_allclose(rms[example, token], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms", "group"])
def test_norms_without_statistics_are_the_same_whatever_is_live(kind):
    (x,) = drawn(9, (2, 3, 3, 8))
    norm = layers.norm(layers.Common(norm=kind), "norm")
    state = norm.init(jax.random.key(0), x, frozenset())
    assert set(state) == {"params"}
    got, moved = norm.apply(state, x, frozenset({"", "norm"}), mutable=["batch_stats"])
    np.testing.assert_array_equal(got, norm.apply(state, x, frozenset()))
    assert not moved.get("batch_stats")
    half = layers.norm(layers.Common(norm=kind, dtype=jnp.bfloat16), "norm").apply(state, x, frozenset())
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), got, rtol=0, atol=0.03)


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_by_hand(use_bias):
    x, kernel, bias = drawn(10, (2, 3, 4), (4, 5), (5,))
    params = {"kernel": kernel, "bias": bias} if use_bias else {"kernel": kernel}
    dense = layers.Dense(layers.Common(), 5, use_bias)
    expected = np.zeros((2, 3, 5))
    for i, j, out in np.ndindex(2, 3, 5):
        expected[i, j, out] = sum(float(x[i, j, k]) * float(kernel[k, out]) for k in range(4))
        expected[i, j, out] += float(bias[out]) if use_bias else 0
    np.testing.assert_allclose(dense.apply({"params": params}, x), expected, rtol=0, atol=1e-5)
    assert jax.tree.map(jnp.shape, dense.init(jax.random.key(0), x)["params"]) == jax.tree.map(jnp.shape, params)
    assert (
        layers.Dense(layers.Common(dtype=jnp.bfloat16), 5).init_with_output(jax.random.key(0), x)[0].dtype == "bfloat16"
    )


def test_dropout_drops_its_share_and_keeps_the_mean():
    head = layers.Head(layers.Common(), classes=2000, drop_rate=0.25)
    # The identity as weights: each logit is one input, dropped or scaled.
    state = {"params": {"kernel": np.eye(2000, dtype=np.float32), "bias": np.zeros(2000, np.float32)}}
    got = head.apply(state, np.ones((4, 2000), np.float32), frozenset({""}), rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(got).round(5)) == {np.float32(0), np.float32(4 / 3).round(5)}
    assert abs((np.asarray(got) == 0).mean() - 0.25) < 0.02
    assert (head.apply(state, np.ones((4, 2000), np.float32), frozenset()) == 1).all()

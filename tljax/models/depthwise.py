"""Depthwise convolutions for XLA's CPU backend: sums of shifted slices instead of convolutions."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

Pads = Sequence[tuple[int, int]]


def depthwise_conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Depthwise convolution as a sum over the kernel's taps of shifted x times a weight per channel."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    (kh, kw), (batch, height, width, channels) = kernel.shape[:2], x.shape
    last_row, last_column = (height - kh) // stride * stride, (width - kw) // stride * stride
    total = None
    for row in range(kh):
        for column in range(kw):
            shifted = lax.slice(
                x,
                (0, row, column, 0),
                (batch, row + last_row + 1, column + last_column + 1, channels),
                (1, stride, stride, 1),
            )
            # Up to 49 terms: added in float32 whatever the compute dtype, as a convolution would.
            term = shifted.astype(jnp.float32) * kernel[row, column, 0].astype(jnp.float32)
            total = term if total is None else total + term
    return total.astype(x.dtype)


def large_depthwise_conv(x: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """`depthwise_conv` of stride 1 whose gradients compile and run several times faster where the kernel is large.

    The transposed sum has a term a tap, and XLA computes its operands anew for each. Instead the gradient of x is
    a convolution itself, with the kernel turned round, and that of the kernel a loop over the kernel's rows.
    """
    # As a function of its own it is traced and lowered once for all blocks of a shape: there are dozens of terms.
    return _traced_once(x, kernel, tuple(map(tuple, pads)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _large(x, kernel, pads):
    return depthwise_conv(x, kernel, 1, pads)


def _forward(x, kernel, pads):
    # What is not differentiated has no gradient, not one that is thrown away: the other operand is not kept.
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return depthwise_conv(x.value, kernel.value, 1, pads), kept


def _backward(pads, kept, g):
    x, kernel = kept
    if isinstance(g, SymbolicZero):
        return None, None
    of_x = of_kernel = None
    if kernel is not None:
        other = [(k - 1 - low, k - 1 - high) for k, (low, high) in zip(kernel.shape, pads)]
        of_x = depthwise_conv(g, kernel[::-1, ::-1], 1, other)
    if x is not None:
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows, columns = (whole - part + 1 for whole, part in zip(x.shape[1:3], g.shape[1:3]))
        g = g.astype(jnp.float32)

        def of_row(_, row):
            part = lax.dynamic_slice_in_dim(x, row, g.shape[1], axis=1).astype(jnp.float32)
            return None, jnp.stack([(part[:, :, c : c + g.shape[2]] * g).sum((0, 1, 2)) for c in range(columns)])

        of_kernel = lax.scan(of_row, None, jnp.arange(rows))[1][:, :, None].astype(x.dtype)
    return of_x, of_kernel


_large.defvjp(_forward, _backward, symbolic_zeros=True)
_traced_once = jax.jit(_large, static_argnums=2)

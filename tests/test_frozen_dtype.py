"""Which leaves a function only ever casts, found in its trace."""

import jax
import jax.numpy as jnp
import pytest

from tljax import config as configs
from tljax import frozen_dtype
from tljax.errors import UserError
from tljax.frozen_dtype import cast_alone

TREE = {name: jax.ShapeDtypeStruct((4, 4), jnp.float32) for name in ("kernel", "other")}
bf16 = lambda x: x.astype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda t: bf16(t["kernel"]) @ bf16(t["kernel"]) + bf16(t["other"] + 1), {"kernel"}),
        (lambda t: bf16(t["kernel"].T[None, :2]) + bf16(t["other"].T)[:2], {"kernel", "other"}),  # rearranged
        (lambda t: bf16(t["kernel"].T) + t["kernel"].reshape(2, 8)[0, 0], set()),
        (lambda t: bf16(t["kernel"]) + bf16(t["kernel"] * 2), set()),  # cast, and used
        (lambda t: (bf16(t["kernel"]).sum(), t["kernel"]), set()),  # cast, and a result
        (lambda t: jax.jit(lambda k: bf16(k).sum())(t["kernel"]), {"kernel"}),
        (lambda t: jax.jit(lambda k: k)(t["kernel"]), set()),
        (lambda t: jax.checkpoint(lambda k: jnp.sin(bf16(k)))(t["kernel"]), {"kernel"}),
        (lambda t: jax.lax.cond(t["other"][0, 0] > 0, lambda k: bf16(k) * 2, bf16, t["kernel"]), {"kernel"}),
        (lambda t: jax.lax.cond(t["other"][0, 0] > 0, lambda k: bf16(k * 2), bf16, t["kernel"]), set()),
        (lambda t: jax.lax.scan(lambda c, k: (c, bf16(k)), 0, t["kernel"])[1], set()),  # not followed, hence left
        (lambda t: t["kernel"].astype(jnp.float16), set()),
        (lambda t: jax.grad(lambda x: (bf16(t["kernel"]) @ bf16(x)).sum().astype(jnp.float32))(t["other"]),
         {"kernel", "other"}),
    ],
)  # fmt: skip
def test_what_a_function_only_casts(function, found):
    assert cast_alone(function, TREE, "bfloat16") == found


def test_what_is_of_the_dtype_already_or_no_float_is_left():
    tree = {"done": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "whole": jax.ShapeDtypeStruct((2,), jnp.int32)}
    assert cast_alone(lambda t: bf16(t["done"]) + bf16(t["whole"]), tree, "bfloat16") == frozenset()


def test_another_dtype_than_the_computation_s_is_refused():
    config = configs.base()
    config.parallel.frozen_dtype = "bfloat16"
    with pytest.raises(UserError, match=r"frozen_dtype = 'bfloat16' needs config.dtype = 'bfloat16', not 'float32'"):
        frozen_dtype.check(config)
    config.dtype = "bfloat16"
    frozen_dtype.check(config)
    config.parallel.frozen_dtype = "int8"
    with pytest.raises(UserError, match=r"config.parallel.frozen_dtype = 'int8': expected one of "):
        configs.check(config)

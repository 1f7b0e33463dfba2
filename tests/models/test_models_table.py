"""`python -m tljax.models`: counts against published ones and the compiler's, and what the table says."""

import jax
import jax.numpy as jnp
import pytest
from conftest import command

from tljax import models
from tljax.errors import UserError
from tljax.models import __main__ as listing
from tljax.models.counts import counts, flops


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    # As torchvision publishes them with its weights (`num_params` and `_ops`, in 10^9).
    [
        ("resnet18", 11689512, 1.814),
        ("resnet50", 25557032, 4.089),
        ("densenet121", 7978856, 2.834),
        ("efficientnet_b0", 5288548, 0.386),
        ("convnext_tiny", 28589128, 4.456),
        ("swin_tiny", 28288354, 4.491),
        ("vit_base_patch16", 86567656, 17.564),
    ],
)
def test_counts_are_the_published_ones(name, parameters, multiply_adds):
    found = counts(models.create(name, 1000))
    assert found.parameters == parameters
    assert found.flops / 2e9 == pytest.approx(multiply_adds, rel=0.01)


def test_counts_follow_the_image_and_the_classes():
    small, large = (counts(models.create("resnet_tiny", classes), size) for classes, size in ((3, 32), (7, 64)))
    features = 4 * 32
    assert large.parameters - small.parameters == 4 * (features + 1)
    head = 2 * features
    assert large.flops - 7 * head == 4 * (small.flops - 3 * head)


def test_products_in_loops_and_calls_by_hand():
    def f(x):
        x = jax.jit(lambda x: jax.nn.relu(x @ x))(x)  # 2 * 8^3
        x, _ = jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=5)  # five times that
        return jax.lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)  # at most twice

    assert flops(jax.make_jaxpr(f)(jnp.ones((8, 8))).jaxpr) == 2 * 8**3 * (1 + 5 + 2)


def test_the_table(capsys):
    assert listing.main(["efficientnet_{lite0,tiny}", "resnet18"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "parameters", "GFLOP", "size", "stages", "weights"]
    assert rows[0].split() == ["efficientnet_lite0", "4,652,008", "0.77", "224", "19", "efficientnet_lite0"]
    assert rows[1].split()[0] == "efficientnet_tiny"
    assert rows[2].split() == ["resnet18", "11,689,512", "3.63", "224", "10", "resnet18.a1_in1k", "and", "1", "more"]
    # Aligned right, whatever the name's length.
    assert len({row.index(row.split()[4]) + len(row.split()[4]) for row in rows[:3]}) == 1
    weights, _, last = [row for row in rows if row.startswith("weights ")]
    assert last.startswith("weights resnet18.tv_in1k: BSD-3-Clause, ")
    assert weights.startswith(
        "weights efficientnet_lite0: Apache-2.0, ImageNet-1k (ILSVRC 2012), top-1 75.1 %; package:"
    )


def test_patterns():
    assert listing.select([]) == list(models.names())
    assert listing.select(["vit_mini", "resnet1*"]) == ["resnet18", "resnet101", "resnet152", "vit_mini"]
    with pytest.raises(UserError, match=r"unknown model 'resnet5'; nearest: resnet50"):
        listing.select(["resnet18", "resnet5"])


def test_as_a_command():
    process = command("tljax.models", "resnet5*", "swim*")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert out == ""
    assert err.startswith("error: unknown model 'swim*'")
    assert len(err.splitlines()) == 1

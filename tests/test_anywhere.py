"""The plan on the trees of other libraries: the examples of docs/anywhere.md, run as they stand, and plain pytrees."""

import dataclasses
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tljax
from tljax import optim
from tljax import plan as plans
from tljax.errors import UserError

TEXT = (Path(__file__).parent.parent / "docs" / "anywhere.md").read_text()
SHARED, *_ = re.findall(r"```python\n(.*?)```", TEXT, re.S)
EXAMPLES = dict(re.findall(r"^## ([\w ]+)$.*?```python\n(.*?)```", TEXT, re.S | re.M))
NEEDS = {"Haiku": "haiku", "Equinox": "equinox"}  # of the extra parity


def run(name: str, change=lambda code: code) -> dict:
    """What an example defines, after its last line."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    defined = {}
    for code in (SHARED, change(EXAMPLES[name])):
        exec(compile(code, "anywhere.md", "exec"), defined)
    return defined


def arrays(tree) -> dict[str, np.ndarray]:
    """{path: array} of the leaves that are arrays, found by jax's own flattening."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
    return {name(keys): np.asarray(leaf) for keys, leaf in leaves if isinstance(leaf, jax.Array)}


def test_there_is_an_example_for_each():
    assert list(EXAMPLES) == ["Flax Linen", "Flax NNX", "Haiku", "Equinox"]


@pytest.mark.parametrize(
    ("name", "trains"),
    [
        ("Flax Linen", {"encoder/bias", "head/bias", "head/kernel"}),
        ("Flax NNX", {"layers/1/bias", "layers/1/kernel", "head/bias", "head/kernel"}),
        ("Haiku", {"encoder/~/linear_1/b", "head/b", "head/w"}),
        ("Equinox", {"encoder/layers/1/bias", "encoder/layers/1/weight", "head/bias", "head/weight"}),
    ],
)
def test_an_example_trains_what_its_rules_say_and_nothing_else(name, trains):
    found = run(name)
    before, after = arrays(found["before"]), arrays(found["after"])
    assert before.keys() == after.keys() == {leaf.path for leaf in found["plan"].leaves}
    assert {path for path in before if before[path].tobytes() != after[path].tobytes()} == trains
    assert found["leaks"] == ()
    assert found["losses"][-1] < found["losses"][0]
    assert jax.tree.structure(found["before"]) == jax.tree.structure(found["after"])
    # Adam's two moments for what trains, and for nothing else.
    moments = sum(x.size for x in jax.tree.leaves(found["state"]) if x.ndim)
    assert moments == 2 * sum(before[path].size for path in trains)


@pytest.mark.parametrize("name", ["Flax Linen", "Flax NNX", "Haiku", "Equinox"])
def test_the_lint_catches_a_norm_over_all_gradients_in_each(name):
    """The same step, with everything differentiated and a norm over it logged."""

    grad = "eqx.filter_value_and_grad" if name == "Equinox" else "jax.value_and_grad"

    def change(code):
        if name == "Haiku":
            code = code.replace("jax.lax.stop_gradient(frozen)", "frozen")
            return code.replace("state, value\n", "state, value + optax.tree.norm(grads)\n")
        code = code.replace("loss = lambda trainable:", "loss = lambda trainable, frozen:")
        code = code.replace("def loss(trainable):", "def loss(trainable, frozen):").replace(
            "value, grads = jax.value_and_grad(loss)(trainable)",
            f"value, (grads, others) = {grad}(lambda both: loss(*both))((trainable, frozen))",
        )
        return code.replace("state, value\n", "state, value + optax.tree.norm(others)\n")

    leaks = run(name, change)["leaks"]
    assert leaks
    assert all("gradient of frozen" in str(leak) for leak in leaks)
    plan = run(name)["plan"]
    frozen = {leaf.path for leaf in plan.leaves if not leaf.multiplier}
    assert {leaf for leak in leaks for leaf in leak.leaves} == frozen


# ---- plain containers


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    scale: jax.Array
    activation: object = jax.nn.relu
    rate: float = 0.5
    name: str = dataclasses.field(default="layer", metadata={"static": True})


jax.tree_util.register_dataclass(Layer, ["kernel", "scale", "activation", "rate"], ["name"])

TREE = {
    "towers": [Pair(jnp.ones((2, 3)), jnp.zeros(3)), Pair(2 * jnp.ones((2, 3)), jnp.zeros(3))],
    "middle": Layer(jnp.ones((3, 3)), jnp.ones(3)),
    "head": (jnp.ones((3, 2)), {0: jnp.zeros(2)}),
    "key": jax.random.key(0),
    "table": jnp.arange(4),
}
RULES = [("table", 0), ("towers/1", 0.5), ("middle/scale", 0.25), ("head", 1), ("**", 0)]


def test_lists_tuples_named_tuples_and_dataclasses_are_named_by_their_keys():
    plan = plans.build(RULES, TREE)
    assert {leaf.path: leaf.multiplier for leaf in plan.leaves} == {
        "head/0": 1, "head/1/0": 1, "middle/kernel": 0, "middle/scale": 0.25, "table": 0, "towers/0/bias": 0,
        "towers/0/kernel": 0, "towers/1/bias": 0.5, "towers/1/kernel": 0.5,
    }  # fmt: skip
    assert {leaf.path for leaf in plan.leaves if leaf.decay} == {"head/0", "middle/kernel", "towers/0/kernel",
                                                                 "towers/1/kernel"}  # fmt: skip
    trainable, frozen = plan.split(TREE)
    assert arrays(trainable).keys() == {leaf.path for leaf in plan.trainable}
    assert (frozen["middle"].activation, frozen["middle"].rate) == (jax.nn.relu, 0.5)
    assert trainable["middle"].activation is None
    merged = plan.merge(trainable, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(TREE)
    assert all(a is b for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(TREE)))
    assert len(plan.frozen_digests(TREE, {})) == 4


def test_freeze_serves_them():
    params = {k: v for k, v in TREE.items() if k in ("towers", "head")}
    plan = plans.build([("towers/0", 0), ("towers/1", 0.5), ("head", 1)], params)
    tx = optim.freeze(optax.sgd(1.0), plan)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    assert {p: float(u.ravel()[0]) for p, u in arrays(updates).items()} == {
        "towers/0/kernel": 0, "towers/0/bias": 0, "towers/1/kernel": -0.5, "towers/1/bias": -0.5, "head/0": -1,
        "head/1/0": -1,
    }  # fmt: skip


def test_freeze_serves_a_module_that_can_be_called():
    """Optax takes a tree that can be called for a function of the parameters."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, 2, 8, depth=1, key=jax.random.key(0))
    plan = plans.build([("layers/0", 0), ("layers/1/bias", 0.5), ("**", 1)], model)
    tx = optim.freeze(optax.sgd(1.0), plan)
    params = eqx.filter(model, eqx.is_array)
    grads = eqx.filter_grad(lambda model: jnp.square(jax.vmap(model)(jnp.ones((3, 4)))).sum())(model)
    updates, _ = tx.update(grads, tx.init(params), params)
    moved, grads = arrays(updates), arrays(grads)
    assert moved.keys() == grads.keys() == {leaf.path for leaf in plan.leaves}
    for leaf in plan.leaves:
        np.testing.assert_array_equal(moved[leaf.path], -leaf.multiplier * grads[leaf.path])
    assert jnp.any(grads["layers/0/weight"] != 0)


def test_the_lint_takes_modules_with_functions_in_them():
    plan = plans.build(RULES, TREE)
    trainable, frozen = plan.split(TREE)

    def loss(trainable, frozen, batch):
        tree = plan.merge(trainable, frozen)
        for pair in tree["towers"]:
            batch = batch @ (pair.kernel @ pair.kernel.T)
        batch = (
            tree["middle"].activation(batch @ tree["towers"][1].kernel @ tree["middle"].kernel) * tree["middle"].rate
        )
        return jnp.square(batch * tree["middle"].scale @ tree["head"][0] + tree["head"][1][0]).mean()

    def right(trainable, frozen, batch):
        grads = jax.grad(loss)(trainable, frozen, batch)
        return jax.tree.map(lambda p, g: p - g, trainable, grads), plan.merge(trainable, frozen)

    batch = jnp.ones((5, 2))
    assert tljax.lint(right, plan, trainable, frozen, batch) == ()

    def wrong(trainable, frozen, batch):
        new, whole = right(trainable, frozen, batch)
        towers = [whole["towers"][0]._replace(kernel=0.99 * whole["towers"][0].kernel), whole["towers"][1]]
        return new, whole | {"towers": towers}

    (finding,) = tljax.lint(wrong, plan, trainable, frozen, batch)
    assert finding.leaves == ("towers/0/kernel",)


@pytest.mark.parametrize(
    ("rules", "tree", "message"),
    [
        ([("**", 1)], TREE, r"no gradient exists for table \(int32\)"),
        ([("middle/activation", 0), ("table", 0), ("**", 1)], TREE, "rule 'middle/activation' matches no parameter"),
        (
            [("**", 1)],
            {"a/b": {"c": jnp.ones(1)}, "a": {"b": {"c": jnp.ones(1)}}},
            "several leaves have the path a/b/c",
        ),
    ],
)
def test_what_no_plan_can_be_made_of(rules, tree, message):
    with pytest.raises(UserError, match=message):
        plans.build(rules, tree)


def test_another_container_is_refused():
    plan = plans.build(RULES, TREE)
    with pytest.raises(UserError, match="other containers"):
        plan.split(TREE | {"head": list(TREE["head"])})

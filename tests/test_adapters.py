"""Adapters against the algebra written out in numpy, against plain weights, and through files and runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import changed
from flax import linen as nn

from tljax import adapters, command, cost, experiment, models, plan, strategies, train
from tljax.adapters import IA3, Bottleneck, Lora, Prompts, adapt, files, merge
from tljax.adapters.__main__ import main as adapters_main
from tljax.errors import UserError
from tljax.evaluate import restore
from tljax.workdir import Workdir

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 32, 32, 3)), jnp.float32)


def filled(tree, name, seed=1):
    """The tree with random numbers in the adapter `name`, which is the identity when it is new."""
    rng = np.random.default_rng(seed)
    draw = lambda path, leaf: (
        jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype) if f"/{name}/" in path else leaf
    )
    return jax.tree.unflatten(jax.tree.structure(tree), [draw(p, x) for p, x in plan.flat(tree).items()])


class Net(nn.Module):
    """One of each linear layer of flax, attention included, with strides, biases and paddings."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), 2, padding="SAME", name="conv")(x)
        x = nn.Conv(8, (3, 3), padding="VALID", use_bias=False, feature_group_count=8, name="depthwise")(nn.gelu(x))
        x = nn.Conv(12, (2, 3), (2, 1), padding=((1, 0), (0, 2)), kernel_dilation=(1, 2), name="odd")(nn.gelu(x))
        x = x.reshape(x.shape[0], -1, 12)
        x = nn.MultiHeadDotProductAttention(num_heads=3, name="attn")(x)
        return nn.Dense(5, name="out")(x.mean(1))


def by_hand(kernel, a, b, scale):
    """kernel + scale · A B, by einsum over the matrices that the kernel is made of."""
    rank = a.shape[-1]
    low = np.einsum("ir,ro->io", np.asarray(a).reshape(-1, rank), np.asarray(b).reshape(rank, -1))
    return np.asarray(kernel) + scale * low.reshape(kernel.shape)


def test_lora_is_its_low_rank_matrices_added_to_the_weights():
    model = Net()
    adapted = adapt(model, [Lora("lora", "**", rank=3, alpha=6)], IMAGES)
    # Of attention the projections, of the convolutions all but the depthwise one.
    attention = ("attn/query", "attn/key", "attn/value", "attn/out")
    assert set(adapted.sites["lora"]) == {"conv", "odd", "out", *attention}
    params = filled(adapted.init(jax.random.key(0), IMAGES)["params"], "lora")
    assert params["attn"]["out"]["lora"]["a"].shape == (3, 4, 3)
    assert params["attn"]["query"]["lora"]["b"].shape == (3, 3, 4)
    assert params["odd"]["lora"]["a"].shape == (2, 3, 8, 3)
    whole = jax.tree.map(lambda x: x, params)
    for path in adapted.sites["lora"]:
        node = whole
        for key in path.split("/"):
            node = node[key]
        low = node.pop("lora")
        node["kernel"] = by_hand(node["kernel"], low["a"], low["b"], 2.0)
    expected = model.apply({"params": whole}, IMAGES)
    found = adapted.apply({"params": params}, IMAGES)
    assert float(jnp.abs(found - adapted.using().apply({"params": params}, IMAGES)).max()) > 0.1  # it does something
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
    merged = merge(adapted, params)
    assert jax.tree.structure(merged) == jax.tree.structure(whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), merged, whole)


def test_ia3_scales_outputs_and_inputs():
    model = Net()
    chosen = IA3("ia3", "{conv,depthwise,attn/key,attn/value}", inputs="{odd,out}")
    adapted = adapt(model, [chosen], IMAGES)
    assert set(adapted.sites["ia3"]) == {"conv", "depthwise", "odd", "attn/key", "attn/value", "out"}
    params = filled(adapted.init(jax.random.key(0), IMAGES)["params"], "ia3")
    whole = adapters.plain(adapted, params)

    def at(tree, path):
        for key in path.split("/"):
            tree = tree[key]
        return tree

    scale = lambda path: np.asarray(at(params, path)["ia3"]["scale"])
    for path in ("conv", "depthwise", "attn/key", "attn/value"):
        node = at(whole, path)
        node["kernel"] = np.asarray(node["kernel"]) * scale(path)
        if "bias" in node:
            node["bias"] = np.asarray(node["bias"]) * scale(path)
    whole["odd"]["kernel"] = np.einsum("hwio,i->hwio", whole["odd"]["kernel"], scale("odd")[:, 0])
    whole["out"]["kernel"] = np.einsum("io,i->io", whole["out"]["kernel"], scale("out")[:, 0])
    expected = model.apply({"params": whole}, IMAGES)
    np.testing.assert_allclose(adapted.apply({"params": params}, IMAGES), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply({"params": merge(adapted, params)}, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_a_bottleneck_is_a_residual_network_behind_its_module():
    model = Net()
    adapted = adapt(model, [Bottleneck("side", "{conv,out}", width=2)], IMAGES)
    params = filled(adapted.init(jax.random.key(0), IMAGES)["params"], "side")
    own = adapters.plain(adapted, params)

    def behind(x, p):
        gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x + gelu(x @ p["down"]["kernel"] + p["down"]["bias"]) @ p["up"]["kernel"] + p["up"]["bias"]

    # By hand: what each module gives is caught, and replaced.
    def intercept(call, args, kwargs, context):
        name = "/".join(context.module.path)
        y = call(*args, **kwargs)
        return behind(y, params[name]["side"]) if name in ("conv", "out") else y

    with nn.intercept_methods(intercept):
        expected = model.apply({"params": own}, IMAGES)
    np.testing.assert_allclose(adapted.apply({"params": params}, IMAGES), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="adapter 'side': Bottleneck is no linear map of weights"):
        merge(adapted, params)


class Blocks(nn.Module):
    """Residual attention blocks over tokens."""

    stages = ("embed", "block1", "block2", "block3", "head")

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(12, name="embed")(x.reshape(x.shape[0], 64, -1))
        for name in self.stages[1:-1]:
            x = Block(name=name)(x)
        return nn.Dense(5, name="head")(x.mean(1))


class Block(nn.Module):
    """One of them."""

    @nn.compact
    def __call__(self, x):
        return x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(nn.LayerNorm(name="norm")(x))


@pytest.mark.parametrize("deep", [True, False])
def test_prompts_are_tokens_that_blocks_see(deep):
    model = Blocks()
    adapted = adapt(model, [Prompts("prompts", "block*", tokens=3, deep=deep)], IMAGES)
    params = filled(adapted.init(jax.random.key(0), IMAGES)["params"], "prompts")
    assert [name for name in params if "prompts" in params[name]] == (
        ["block1", "block2", "block3"] if deep else ["block1"]
    )
    own = adapters.plain(adapted, params)
    x = nn.Dense(12).apply({"params": own["embed"]}, IMAGES.reshape(4, 64, -1))
    tokens = lambda name: jnp.tile(params[name]["prompts"]["tokens"][None], (4, 1, 1))
    block = lambda name, x: Block().apply({"params": own[name]}, x)
    if deep:
        for name in ("block1", "block2", "block3"):
            x = block(name, jnp.concatenate([tokens(name), x], 1))[:, 3:]
    else:
        x = jnp.concatenate([tokens("block1"), x], 1)
        for name in ("block1", "block2", "block3"):
            x = block(name, x)
        x = x[:, 3:]
    expected = nn.Dense(5).apply({"params": own["head"]}, x.mean(1))
    np.testing.assert_allclose(adapted.apply({"params": params}, IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kind", [Lora("x", "**"), IA3("x", "**"), Bottleneck("x", "*")], ids=lambda a: type(a).__name__
)
@pytest.mark.parametrize("name", ["efficientnet_tiny", "resnet_tiny"])
def test_a_new_adapter_is_the_identity_and_changes_no_leaf_of_the_model(name, kind):
    model = models.create(name, 3)
    adapted = adapt(model, [kind], IMAGES)
    alone, both = (models.initialise(m, jax.random.key(3), 32) for m in (model, adapted))
    assert adapted.stages == model.stages
    own = plan.flat(adapters.plain(adapted, both["params"]))
    assert {p: v.tobytes() for p, v in own.items()} == {p: v.tobytes() for p, v in plan.flat(alone["params"]).items()}
    assert not any(path.startswith("head") and "/x/" in path for path in plan.paths(both["params"]))
    np.testing.assert_array_equal(adapted.apply(both, IMAGES), model.apply(alone, IMAGES))


@pytest.mark.parametrize(
    ("strategy", "trains"),
    [
        ("lora(rank=2, targets='**/attn/{query,value}')", {"lora": 6 * 2 * 2}),
        ("ia3(targets='**/attn/{key,value}', inputs='**/mlp/fc2')", {"ia3": 6 * 3}),
        ("bottleneck(width=2, targets='**/mlp')", {"bottleneck": 6 * 4}),
        ("prompts(tokens=2)", {"prompts": 6}),
        ("prompts(tokens=2, deep=False)", {"prompts": 1}),
    ],
)
def test_the_papers_forms_on_a_transformer(strategy, trains):
    """Their leaves and the head's train, and each of them has a gradient (LoRA's A from the second step on)."""
    chosen, model = strategies.parse(strategy), models.create("vit_mini", 3)
    adapted = adapt(model, strategies.adapters_of(chosen), IMAGES)
    params = models.initialise(adapted, jax.random.key(0), 32)["params"]
    made = plan.build(chosen(model.stages), params, stages=model.stages)
    (name, count) = trains.popitem()
    own = [leaf.path for leaf in made.trainable if f"/{name}/" in leaf.path]
    assert len(own) == count
    assert {leaf.path for leaf in made.trainable} == {*own, "head/kernel", "head/bias"}
    trainable, frozen = made.split(filled(params, name))
    loss = lambda t: jnp.square(adapted.apply({"params": made.merge(t, frozen)}, IMAGES)).mean()
    gradient = plan.flat(jax.jit(jax.grad(loss))(trainable))
    assert set(gradient) == {leaf.path for leaf in made.trainable}
    assert all(float(jnp.abs(g).max()) > 0 for g in gradient.values())


def test_adapters_stack_and_are_switched_by_name():
    model = models.create("efficientnet_tiny", 3)
    adapted = adapt(
        model, [Lora("cats", "**", rank=2), IA3("dogs", "block*/*conv"), Lora("birds", "block2/**")], IMAGES
    )
    variables = models.initialise(adapted, jax.random.key(0), 32)
    for name in adapted.sites:
        variables["params"] = filled(variables["params"], name, seed=len(name))
    logits = {}
    for active in ((), ("cats",), ("dogs",), ("cats", "dogs"), ("cats", "dogs", "birds")):
        chosen = adapted.using(*active)
        logits[active] = chosen.apply(variables, IMAGES)
        folded = {**variables, "params": merge(chosen, variables["params"])}
        np.testing.assert_allclose(model.apply(folded, IMAGES), logits[active], rtol=2e-4, atol=2e-5)
    for one in logits:
        for other in logits:
            assert one == other or float(jnp.abs(logits[one] - logits[other]).max()) > 1e-3
    with pytest.raises(UserError, match=r"unknown adapter 'cat'.*cats"):
        adapted.using("cat")


class One(nn.Module):
    """A dense layer in a model."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="only")(x)


def test_dropout_of_lora_is_on_in_live_stages_with_a_key_and_keeps_the_mean():
    model = models.create("resnet_tiny", 3)
    adapted = adapt(model, [Lora("lora", "block1/**", rank=2, dropout=0.5)], IMAGES)
    variables = models.initialise(adapted, jax.random.key(0), 32)
    variables["params"] = filled(variables["params"], "lora")
    run = lambda key, live: adapted.apply(
        variables, IMAGES, live=frozenset(live), stop="block2", rngs={"dropout": key} if key is not None else {}
    )
    keys = jax.random.split(jax.random.key(5), 1024)
    still = run(None, ())
    np.testing.assert_array_equal(run(keys[0], ("block2",)), still)
    assert float(jnp.abs(run(keys[0], ("block1",)) - still).max()) > 0.01
    # Through a linear module alone the mean over masks is the value without dropout.
    one = adapt(One(), [Lora("lora", "only", rank=2, dropout=0.5)], IMAGES)
    params = filled(one.init(jax.random.key(0), IMAGES)["params"], "lora")
    masked = jax.vmap(lambda key: one.apply({"params": params}, IMAGES[:, :2, :2], rngs={"dropout": key}))(keys)
    plainly = one.apply({"params": params}, IMAGES[:, :2, :2])
    error = np.asarray(masked).std(0).mean() / 32
    np.testing.assert_allclose(np.asarray(masked).mean(0), plainly, atol=6 * error)
    assert error > 0.005


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Lora("lora", "**/quary"), r"adapter 'lora': targets '\*\*/quary' match no dense layer or ungrouped"),
        (Lora("lora", "depthwise"), "match no dense layer or ungrouped convolution"),
        (Lora("lora", "convv"), "match no .*; nearest: conv"),
        (Lora("kernel", "conv"), "adapter 'kernel': 'conv' has parameters of that name already"),
        (Prompts("p", "conv"), "match no module from tokens"),
    ],
)
def test_what_cannot_be_adapted_is_said(adapter, message):
    with pytest.raises(UserError, match=message):
        adapt(Net(), [adapter], IMAGES)


def test_standardised_kernels_take_no_adapters_that_fold_into_them():
    """Standardising undoes a factor and mixes what is added: the merged network would be another."""
    model = models.create("resnetv2_tiny", 3)
    for adapter in (Lora("lora", "**/conv*"), IA3("ia3", "**/conv*")):
        with pytest.raises(UserError, match="match no"):
            adapt(model, (adapter,), jnp.zeros((1, 32, 32, 3)))


def test_two_adapters_of_one_name_are_refused():
    with pytest.raises(UserError, match="two adapters are called 'lora'"):
        adapt(Net(), [Lora("lora", "conv"), Lora("lora", "out")], IMAGES)


# ---- cost


def shapes_of_products(jaxpr) -> list[tuple]:
    """The shapes of the results of all matrix products and convolutions in a program, inner ones included."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            found.append(eqn.outvars[0].aval.shape)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    found += shapes_of_products(inner)
    return found


WIDTH = 320


class Wide(nn.Module):
    """Four equal dense blocks and a 3×3 convolution, of sizes that no activation has."""

    stages = ("stem", "block1", "block2", "block3", "block4", "head")

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(WIDTH, (3, 3), name="stem")(x))
        for name in self.stages[1:-1]:
            x = x + nn.relu(nn.Dense(WIDTH, name=name)(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def test_the_gradient_of_a_full_size_weight_is_never_formed():
    def program(strategy):
        chosen, model = strategies.parse(strategy), Wide()
        found = strategies.adapters_of(chosen)
        model = adapt(model, found, IMAGES) if found else model
        params = jax.eval_shape(model.init, jax.random.key(0), IMAGES)["params"]
        made = plan.build(chosen(Wide.stages), params, stages=Wide.stages)
        loss = lambda t, f, x: jnp.square(model.apply({"params": made.merge(t, f)}, x)).mean()
        grad, (trainable, frozen) = jax.jit(jax.grad(loss)), made.split(params)
        traced = grad.trace(trainable, frozen, jnp.zeros((16, 32, 32, 3)))
        return shapes_of_products(traced.jaxpr), cost_of(traced.lower().compile())

    def cost_of(compiled):
        analysis = compiled.cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    whole, flops_whole = program("full()")
    low, flops_low = program("lora(rank=2)")
    dense, conv = (WIDTH, WIDTH), [3, 3, 3, WIDTH]
    assert dense in whole
    assert dense not in low
    assert conv in map(sorted, whole)
    assert conv not in map(sorted, low)
    # Forward and back through the activations (the images need no gradient), and three passes of what is low-rank.
    pixels = 16 * 32 * 32
    expected = pixels * (4 * 4 * WIDTH**2 + 2 * 27 * WIDTH + 3 * (4 * 2 * 2 * 2 * WIDTH + 2 * 2 * (27 + WIDTH)))
    assert flops_low == pytest.approx(expected, rel=0.05)
    assert flops_low < 0.72 * flops_whole


def test_lora_is_compared_with_other_strategies_by_cost(tiny):
    config = command.from_command_line(tiny, "").config
    found, _ = cost.compare(config, 3, cost.strategies_of("frozen,lora:rank=2,ia3,full"))
    share = {e.strategy: e.trainable for e in found}
    assert list(share) == ["frozen()", "lora(rank=2)", "ia3()", "full()"]
    assert share["frozen()"] < share["ia3()"] < share["lora(rank=2)"] < share["full()"] == 1
    state = {e.strategy: e.optimizer for e in found}
    exp = experiment.build(config, 3)
    assert state["full()"] >= 2 * 4 * sum(leaf.size for leaf in exp.plans[0][1].leaves)


# ---- runs and files


@pytest.fixture(scope="module")
def lora_run(tiny, tmp_path_factory):
    """A finished run: the head for 8 steps, then LoRA too."""
    path = tmp_path_factory.mktemp("runs") / "lora"
    lora = "lora(rank=2, dropout=0.1, targets='block*/**')"
    argv = changed(tiny, path, train_for="16 steps", phases=f"lp_ft(head='6 steps', then={lora})", ema=0.5)
    assert train.main(argv) == 0
    return path


def everything(workdir):
    """(model, values by path, logits of IMAGES, notes) of a run's last checkpoint."""
    exp, layout, params, stats, _ = restore(Workdir(workdir))
    params, stats = layout.to_host((params, stats))
    return (
        exp,
        plan.flat({"params": params, "batch_stats": stats}),
        exp.model.apply({"params": params, "batch_stats": stats}, IMAGES),
    )


def test_a_run_trains_the_adapters_and_proves_the_rest(lora_run):
    summary = Workdir(lora_run).summary()
    exp, values, _ = everything(lora_run)
    assert "lora(rank=2" in summary["strategy"]
    started = exp.load()
    started = plan.flat({"params": started[0], "batch_stats": started[1]})
    moved = {path for path in values if not np.array_equal(values[path], started[path])}
    assert moved == {p for p in values if "/lora/" in p or p.startswith("params/head/")}
    assert summary["frozen"]["values"] == sum(v.size for p, v in values.items() if p not in moved)


def test_adapters_alone_are_saved_loaded_and_go_only_onto_their_base(lora_run, tiny, tmp_path):
    file = tmp_path / "one.safetensors"
    assert adapters_main([f"--workdir={lora_run}", f"--save={file}"]) == 0
    exp, values, logits = everything(lora_run)
    kept = files.read(file)
    assert set(kept.values) == {p for p in values if "/lora/" in p or p.startswith("params/head/")}
    assert file.stat().st_size < sum(v.nbytes for v in kept.values.values()) + 8000
    # Onto the base by hand: the numbers of the run again.
    base = dict(zip(("params", "batch_stats"), exp.load()[:2]))
    names = plan.paths(base)
    again = jax.tree.unflatten(jax.tree.structure(base), [kept.values.get(p, v) for p, v in plan.flat(base).items()])
    assert list(names) == list(plan.flat(base))
    np.testing.assert_array_equal(exp.model.apply(again, IMAGES), logits)

    def config(*more):
        return command.from_command_line([*tiny, *more], "").config

    stacked = f"lora(rank=1, name='second', targets='block1/**', rest=stored('{file}'))"
    exp2 = experiment.build(config(f"--config.strategy={stacked}"), 3)
    params, stats, _ = exp2.load()
    now = plan.flat({"params": params, "batch_stats": stats})
    for path in (p for p in values if "/lora/" in p):
        np.testing.assert_array_equal(now[path], values[path])
    multipliers = {leaf.path: leaf.multiplier for leaf in exp2.plans[0][1].leaves}
    assert {m for p, m in multipliers.items() if "/lora/" in p} == {0.0}
    assert {m for p, m in multipliers.items() if "/second/" in p} == {1.0}
    with pytest.raises(
        UserError, match=f"adapters in {re.escape(str(file))} are of the base [0-9a-f]{{16}}, these weights"
    ):
        experiment.build(config(f"--config.strategy={stacked}", "--config.seed=1"), 3).load()
    other = tmp_path / "other.safetensors"
    files.write(other, {"a": np.ones(2)}, {})
    with pytest.raises(UserError, match="holds no adapters of tljax"):
        files.read(other)
    with pytest.raises(UserError, match="does not exist"):
        files.read(tmp_path / "absent.safetensors")


def test_merged_weights_are_plain_weights_that_load(lora_run, tiny, tmp_path):
    file = tmp_path / "merged.safetensors"
    assert adapters_main([f"--workdir={lora_run}", f"--merge={file}"]) == 0
    _, _, logits = everything(lora_run)
    config = command.from_command_line([*tiny, f"--config.weights={file}", "--config.reset=()"], "").config
    exp = experiment.build(config, 3)
    params, stats, report = exp.load()
    assert not report.reset
    np.testing.assert_allclose(
        exp.model.apply({"params": params, "batch_stats": stats}, IMAGES), logits, rtol=1e-4, atol=1e-5
    )


def test_the_command_says_what_is_missing(trained, tmp_path):
    with pytest.raises(UserError, match="has no adapters: its strategy is 'partial"):
        adapters_main([f"--workdir={trained}", f"--save={tmp_path / 'x.safetensors'}"])
    with pytest.raises(UserError, match="expected --workdir"):
        adapters_main([f"--workdir={trained}"])

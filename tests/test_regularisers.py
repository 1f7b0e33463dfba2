"""What holds weights to the loaded ones: gradients by hand and by differences, runs under every way of running."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
import source_task
from conftest import changed

import tljax
from tljax import evaluate, fisher, regularisers, train
from tljax import plan as plans
from tljax.checkpoint import Checkpoints
from tljax.errors import UserError
from tljax.workdir import Workdir

RNG = np.random.default_rng(0)
PARAMS = {
    "stem": {"kernel": RNG.normal(size=(4, 3)), "bias": RNG.normal(size=3)},
    "body": {"kernel": RNG.normal(size=(3, 3))},
    "head": {"kernel": RNG.normal(size=(3, 2)), "bias": RNG.normal(size=2)},
}
PARAMS = jax.tree.map(lambda x: x.astype(np.float32), PARAMS)
ALL = set(plans.paths(PARAMS))


def test_the_gradient_is_that_of_the_penalty_by_finite_differences():
    given = regularisers.l2_sp({"**/bias": 0.5, "**": 2.0}, new=0.25)
    penalty = regularisers.resolve(given, PARAMS, ALL, reset=("head",))
    weights = jax.tree.map(lambda w: w + RNG.normal(size=w.shape).astype(np.float32), PARAMS)
    value, gradient = penalty(weights, penalty.anchor(PARAMS))

    def by_hand(weights):
        total = 0.0
        for path, w, w0 in zip(plans.paths(PARAMS), jax.tree.leaves(weights), jax.tree.leaves(PARAMS)):
            strength = 0.25 if path.startswith("head") else 0.5 if path.endswith("bias") else 2.0
            total += 0.5 * strength * np.sum((w - (0 if path.startswith("head") else w0)).astype(np.float64) ** 2)
        return total

    assert float(value) == pytest.approx(by_hand(weights), rel=1e-5)
    leaves, structure = jax.tree.flatten(weights)
    for i, g in enumerate(jax.tree.leaves(gradient)):
        for at in np.ndindex(g.shape):
            ends = []
            for step in (1e-3, -1e-3):
                moved = [leaf.astype(np.float64) for leaf in leaves]
                moved[i][at] += step
                ends.append(by_hand(structure.unflatten(moved)))
            assert float(g[at]) == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-4, abs=1e-6)


def test_an_anchor_has_what_trains_and_was_loaded_and_no_more():
    plan = plans.build([("stem", 0), ("**", 1)], PARAMS)
    trained = {leaf.path for leaf in plan.trainable}
    penalty = regularisers.resolve(regularisers.l2_sp(1.0), PARAMS, trained, reset=("head",))
    assert plans.paths(penalty.anchor(PARAMS)) == ("params/body/kernel",)
    _, gradient = penalty(plan.split(PARAMS)[0], penalty.anchor(PARAMS))
    assert set(plans.paths(gradient)) == trained
    weighed = regularisers.resolve(regularisers.ewc(1.0, batches=1), PARAMS, trained, reset=("head",))
    assert plans.paths(weighed.anchor(PARAMS, PARAMS)) == ("fisher/body/kernel", "params/body/kernel")
    assert "9 values held to the loaded ones; their anchor takes 72 B" in weighed.said(PARAMS)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("l2sp(0.1)", "unknown regulariser 'l2sp'; nearest: l2_sp"),
        ("l2_sp(-1)", r"l2_sp\(strength=-1\): expected a number, 0 or more"),
        ("l2_sp(0)", "l2_sp: no strength above 0"),
        ("l2_sp({'bdy': 1, '**': 0.1})", "config.regulariser: rule 'bdy' matches no parameter; nearest: body"),
        ("l2_sp({'body': 1})", "config.regulariser: no pattern matches head/bias"),
        ("l2_sp({'**': 1, 'body': 2})", "'body' decides nothing"),
        ("ewc(labels='none')", "expected 'model' or 'data'"),
        ("ewc(batches=0)", "expected a whole number above 0"),
        ("ewc(fisher=1)", "unexpected keyword argument"),
    ],
)
def test_mistakes(given, line):
    with pytest.raises(UserError, match=line):
        regularisers.resolve(regularisers.parse(given), PARAMS, ALL)


def test_ones_own_loop_with_freeze():
    """SGD by hand in numpy: w ← w − lr · (g + s · (w − w₀)) where it trains, w elsewhere."""
    plan = plans.build([("body", 0), ("head", 1), ("stem", 0.1)], PARAMS)
    penalty = regularisers.resolve(regularisers.l2_sp(0.7), PARAMS, {leaf.path for leaf in plan.trainable})
    tx = tljax.freeze(optax.chain(regularisers.pull(penalty, penalty.anchor(PARAMS)), optax.sgd(0.1)), plan)
    params, state = PARAMS, tx.init(PARAMS)
    hand = {p: w.astype(np.float64) for p, w in zip(plans.paths(PARAMS), jax.tree.leaves(PARAMS))}
    for step in range(4):
        grads = jax.tree.map(lambda w, s=step: np.cos(w + s), params)
        updates, state = tx.update(grads, state, params)
        for leaf, w0 in zip(plan.leaves, jax.tree.leaves(PARAMS)):
            w = hand[leaf.path]
            hand[leaf.path] = w - leaf.multiplier * 0.1 * (np.cos(w + step) + 0.7 * (w - w0))
        params = optax.apply_updates(params, updates)
    for path, w in zip(plans.paths(params), jax.tree.leaves(params)):
        np.testing.assert_allclose(w, hand[path], rtol=1e-4, atol=1e-5, err_msg=path)


# ---- the Fisher information


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


LINEAR = {"kernel": RNG.normal(size=(4, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)}
X = RNG.normal(size=(23, 4)).astype(np.float32)


def linear(params, rest, x):
    return x @ params["kernel"] + rest["bias"]


def test_the_fisher_of_a_linear_model_with_labels_by_hand(monkeypatch):
    """∂ log p(y|x) / ∂W = x ⊗ (e_y − p); the mean of its square. In chunks of 2, the last ones filled up."""
    monkeypatch.setattr(fisher, "CHUNK_BYTES", 2 * 12 * 4)
    labels = RNG.integers(0, 3, len(X))
    batches = [{"image": X[i : i + 5], "label": labels[i : i + 5]} for i in range(0, len(X), 5)]
    part = {"kernel": LINEAR["kernel"], "bias": None}
    found, count, size = fisher.diagonal_fisher(
        linear, part, {"bias": LINEAR["bias"]}, batches, jax.random.key(0), "data"
    )
    error = np.eye(3)[labels] - softmax(X @ LINEAR["kernel"] + LINEAR["bias"])
    np.testing.assert_allclose(found["kernel"], np.einsum("ni,nj->ij", X**2, error**2) / len(X), rtol=1e-4)
    assert (count, size) == (len(X), 2 * 12 * 4)
    assert found["bias"] is None


def test_the_fisher_with_drawn_labels_is_the_expectation_over_the_models_prediction():
    """E over y of (e_y − p)² is p (1 − p): the closed form, to which the draws converge."""
    many = np.concatenate([X] * 400)
    batches = [{"image": many, "label": np.full(len(many), -1)}]
    found, _, _ = fisher.diagonal_fisher(linear, LINEAR, LINEAR, batches, jax.random.key(1))
    p = softmax(X @ LINEAR["kernel"] + LINEAR["bias"])
    expected = np.einsum("ni,nj->ij", X**2, p * (1 - p)) / len(X)
    np.testing.assert_allclose(found["kernel"], expected, rtol=0.12)
    with pytest.raises(UserError, match="has no label; expected labels='model'"):
        fisher.diagonal_fisher(linear, LINEAR, LINEAR, batches, jax.random.key(1), "data")
    with pytest.raises(UserError, match="no photograph"):
        fisher.diagonal_fisher(linear, LINEAR, LINEAR, [], jax.random.key(1))


# ---- runs


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("source")
    source_task.write(root / "weights.safetensors")
    source_task.photographs(root / "photos")
    return root


@pytest.fixture
def run(tiny, place, tmp_path):
    """`run(name, **fields)` trains on the loaded weights; returns the workdir."""

    def start(name="run", **fields):
        fields = {"weights": place / "weights.safetensors", "train_for": "6 steps", "log_every": "1 steps"} | fields
        assert train.main(changed(tiny, tmp_path / name, **fields)) == 0
        return tmp_path / name

    return start


def last_state(path):
    exp, layout, *_ = evaluate.restore(Workdir(path), "last")
    checkpoints = Checkpoints(path / "checkpoints")
    _, state = exp.restore(checkpoints, checkpoints.latest(), layout, 24)
    state = layout.to_host(state)
    checkpoints.close()
    return exp, state


def by_path(tree):
    return dict(zip(plans.paths(tree), jax.tree.leaves(tree)))


@pytest.mark.slow
def test_a_huge_strength_keeps_the_loaded_weights_and_the_metric_is_logged(run, place, capsys):
    """SGD contracts the distance by 1 − lr · strength = 0 each step: what is left is the last step's gradient."""
    plainly = {"optim_name": "sgd", "optim_momentum": 0.0, "optim_weight_decay": 0.0, "optim_clip": 0.0,
               "optim_schedule": "constant", "optim_warmup": "0 steps", "optim_lr": 0.002, "train_for": "30 steps",
               "eval_every": "30 steps"}  # fmt: skip
    loaded, distance = by_path(source_task.variables()["params"]), {}
    for name, more in {"free": {}, "held": {"regulariser": "l2_sp(500.0)"}}.items():
        path = run(name, **plainly, **more)
        after = by_path(last_state(path)[1].params)
        moved = [after[p] - loaded[p] for p in after if p.startswith("block3")]
        distance[name] = np.sqrt(sum(np.sum(np.square(x), dtype=np.float64) for x in moved))
        rows = Workdir(path).rows()
        assert any("train/penalty" in row for row in rows) == (name == "held")
    assert distance["held"] < 0.25 * distance["free"]
    assert distance["held"] < 0.002 * max(row["train/grad_norm"] for row in rows if "train/grad_norm" in row)
    out = capsys.readouterr().out
    assert "values held to the loaded ones; their anchor takes" in out
    assert "lint: no gradient of a frozen leaf is formed" in out
    assert "lint: a gradient" not in out


@pytest.mark.parametrize(
    "how",
    [
        {"devices": 1}, {"devices": 8}, {"devices": 4, "accumulate": 2}, {"devices": 8, "mode": "pmap"},
        {"devices": 8, "fsdp": 2},
    ],
    ids=str,
)  # fmt: skip
def test_a_step_adds_the_pull_once_however_it_runs(how, monkeypatch):
    """SGD without momentum: with and without the penalty a step differs by lr · multiplier · s · F · (w − w₀)."""
    from ml_collections import ConfigDict

    from tljax import config as configs
    from tljax import models, optim, strategies
    from tljax.parallel import Layout
    from tljax.step import init_state, make_train_step

    monkeypatch.setattr("tljax.parallel.FSDP_LEAST", 64)
    accumulate, rng = how.get("accumulate", 1), np.random.default_rng(1)
    layout = Layout(ConfigDict({"mode": how.get("mode", "jit"), "fsdp": how.get("fsdp", 1)}), 16, accumulate,
                    how["devices"])  # fmt: skip
    model = models.create("groupnorm_tiny", 5, axis_name=layout.axis_name)
    params = jax.tree.map(np.asarray, models.initialise(model, jax.random.key(0))["params"])
    plan = plans.build(strategies.parse("partial(last=2, body=0.5)")(model.stages), params, {}, model.stages)
    config = configs.base().optim
    config.update({"name": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip": 0.0, "lr": 0.1})
    tx = optim.optimizer(plan, config, lambda step: 0.1)
    loaded = jax.tree.map(lambda w: (w + rng.normal(0, 0.1, w.shape)).astype(np.float32), params)
    weights = jax.tree.map(lambda w: rng.uniform(0, 2, w.shape).astype(np.float32), params)
    trained = {leaf.path for leaf in plan.trainable}
    penalty = regularisers.resolve(regularisers.ewc({"block2": 0.3, "**": 0.7}), params, trained, ("head",))
    anchor = penalty.anchor(loaded, weights)
    batch = {"image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8), "label": np.arange(16, dtype=np.int32) % 5}

    def after(penalty, anchor):
        step = make_train_step(model, plan, tx, mean=(0.5,) * 3, std=(0.5,) * 3, num_classes=5, accumulate=accumulate,
                               axis_name=layout.axis_name, penalty=penalty)  # fmt: skip
        start = init_state(plan, tx, params, {}, 0.0, anchor)
        shapes = layout.abstract_batch(16, 32)
        assert tljax.lint(layout.program(step, start), plan, layout.abstract(start), shapes) == ()
        compiled = layout.compile_train(step, start, shapes)
        state, metrics = compiled(layout.place(start), layout.place_batch(batch))
        return layout.to_host(state), jax.device_get(metrics)

    (free, plain), (held, metrics) = after(None, None), after(penalty, anchor)
    assert "penalty" not in plain
    assert float(metrics["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)
    total = 0.0
    for leaf, w, w0, f, a, b in zip(plan.leaves, *map(jax.tree.leaves, (params, loaded, weights, free.params,
                                                                         held.params))):  # fmt: skip
        strength = 0.0 if leaf.stage == "head" or not leaf.multiplier else 0.3 if leaf.stage == "block2" else 0.7
        total += 0.5 * strength * np.sum(f * np.square(w - w0), dtype=np.float64)
        expected = a - 0.1 * leaf.multiplier * strength * f * (w - w0)
        np.testing.assert_allclose(b, expected, rtol=1e-4, atol=2e-6, err_msg=leaf.path)
    assert float(metrics["penalty"]) == pytest.approx(total, rel=1e-4)
    for path, a, b in zip(plans.paths(anchor), jax.tree.leaves(anchor), jax.tree.leaves(held.anchor), strict=True):
        assert np.array_equal(a, b), path


@pytest.mark.slow
def test_ewc_in_phases_resumes_exactly_without_its_source(run, place, tmp_path):
    """A stage that is thawed late is held to what was loaded, and a resume needs no photographs."""
    photos = shutil.copytree(place / "photos", tmp_path / "photos")
    fields = {
        "regulariser": f"ewc(strength={{'head': 0, '**': 5.0}}, source='folder:{photos}', batches=2)", "seed": 2,
        "phases": "phases(('3 steps', frozen()), ('rest', rules(('block2', 1), ('head', 1), ('**', 0))))", "ema": 0.5,
        "train_for": "8 steps", "checkpoint_every": "4 steps", "eval_every": "50 steps",
        "checkpoint.delta": "true",
    }  # fmt: skip
    whole = run("whole", **fields)
    _, state = last_state(whole)
    loaded = by_path(source_task.variables()["params"])
    held = {p for p in loaded if p.startswith("block2")}
    anchor = by_path(state.anchor)
    assert set(anchor) == {f"{kind}/{p}" for kind in ("params", "fisher") for p in held}
    for path in held:
        assert np.array_equal(anchor[f"params/{path}"], loaded[path])
        assert (np.asarray(anchor[f"fisher/{path}"]) >= 0).all()
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "8")
    shutil.rmtree(photos)
    assert run("again", **fields) == again
    for path, a, b in zip(plans.paths(state), jax.tree.leaves(state), jax.tree.leaves(last_state(again)[1])):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
    told = [json.loads((p / "summary.json").read_text())["test"] for p in (whole, again)]
    assert told[0] == told[1]


def test_a_run_says_what_it_cannot_hold(tiny, place, tmp_path):
    weights = place / "weights.safetensors"
    for fields, line in (
        ({"regulariser": "l2_sp()"}, "config.regulariser needs loaded weights"),
        ({"regulariser": "l2_sp()", "weights": weights, "strategy": "frozen()"}, "holds nothing"),
        ({"regulariser": "ewc()", "weights": weights}, "config.source.data = ''"),
        ({"regulariser": "l2_sp({'blok1': 1, '**': 1})", "weights": weights}, "nearest: block1"),
        ({"regulariser": "l2_sp()", "weights": weights, "strategy": "lora(rank=1)"}, "holds nothing"),  # nor adapters
    ):
        with pytest.raises(UserError, match=line):
            train.main(changed(tiny, tmp_path / "w", **fields))


def test_the_cost_of_a_step_knows_the_anchor(place):
    from tiny import get_config

    from tljax import cost, experiment, optim

    config, sizes = get_config(), {}
    config.weights = str(place / "weights.safetensors")
    for regulariser in ("", "l2_sp(0.1)", "ewc(1.0)"):
        config.regulariser = regulariser
        exp = experiment.build(config, 3)
        plan = exp.plans[0][1]
        shapes = exp.state_shapes(plan, optim.optimizer(plan, config.optim, lambda step: 1.0))
        sizes[regulariser] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    held = sum(leaf.nbytes for leaf in plan.trainable if leaf.stage != "head")
    assert sizes["l2_sp(0.1)"] - sizes[""] == held
    assert sizes["ewc(1.0)"] - sizes[""] == 2 * held
    (found,), _ = cost.compare(config, 3, ["frozen()"])  # whose own anchor is empty, whatever the config trains
    assert found.state == sizes[""] - sum(2 * leaf.nbytes for leaf in plan.trainable if leaf.stage != "head")

"""What each strategy trains, what it says of bad arguments, and the laws by which strategies compose."""

import fnmatch
import math

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tljax import models, strategies
from tljax import plan as plans
from tljax.errors import UserError
from tljax.models import layers
from tljax.patterns import under

STAGES = ("stem", "block1", "block2", "block3", "top", "head")
PARAMS = {stage: {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for stage in STAGES}


def multipliers(text: str) -> dict[str, float]:
    """The multiplier of each stage's kernel."""
    plan = plans.build(strategies.parse(text)(STAGES), PARAMS, stages=STAGES)
    found = {leaf.stage: leaf.multiplier for leaf in plan.leaves if leaf.path.endswith("kernel")}
    return {stage: found[stage] for stage in STAGES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("frozen()", [0, 0, 0, 0, 0, 1]),
        ("frozen", [0, 0, 0, 0, 0, 1]),
        ("partial(last=1)", [0, 0, 0, 0, 1, 1]),
        ("partial(2)", [0, 0, 0, 1, 1, 1]),
        ("partial(last=5)", [1, 1, 1, 1, 1, 1]),
        ("partial(from_stage='block2')", [0, 0, 1, 1, 1, 1]),
        ("partial(from_stage='head')", [0, 0, 0, 0, 0, 1]),
        ("partial(last=2, body=0.1)", [0, 0, 0, 0.1, 0.1, 1]),
        ("full()", [1, 1, 1, 1, 1, 1]),
        ("full(body=0.1)", [0.1, 0.1, 0.1, 0.1, 0.1, 1]),
        ("first(rules(('**/bias', 0)), partial(last=2))", [0, 0, 0, 1, 1, 1]),
        ("layerwise_decay(0.5)", [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(1)", [1, 1, 1, 1, 1, 1]),
        ("layerwise_decay(0.5, floor=0.2)", [0.2, 0.2, 0.2, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(0.5, {'stem': 0.1, 'block*': 0.25})", [0.1, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(0.5, {'**/bias': 0.9})", [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(0.5, {'**/kernel': 0.2, 'stem': 0.1})", [0.2, 0.2, 0.2, 1 / 4, 1 / 2, 1]),
        ("layerwise_decay(0.5, {'block1/kernel': 0, 'block*': 0.3})", [1 / 32, 1 / 16, 0.3, 0.3, 1 / 2, 1]),
        ("head_and('block2', 'stem/bias', body=0.5)", [0, 0, 0.5, 0, 0, 1]),
        ("biases_only()", [0, 0, 0, 0, 0, 1]),
        ("scaled(partial(last=2, body=0.1), 0.5)", [0, 0, 0, 0.05, 0.05, 0.5]),
        ("first(within('block2', full()), frozen())", [0, 0, 1, 0, 0, 1]),
        ("rules(('!head', 0), ('**', 1))", [0, 0, 0, 0, 0, 1]),
        ("surgical('block1')", [0, 1, 0, 0, 0, 1]),
        ("surgical('head')", [0, 0, 0, 0, 0, 1]),
        ("discriminative({'block*': 0.1, 'stem': 0.01, 'top': 0.5, 'head': 1})", [0.01, 0.1, 0.1, 0.1, 0.5, 1]),
        ("rules(('head', 1), ('re:block[12]/.*', 0.3), ('**', 0))", [0, 0.3, 0.3, 0, 0, 1]),
    ],
)
def test_multipliers_by_stage(text, expected):
    assert list(multipliers(text).values()) == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("partail(last=2)", "unknown strategy 'partail'; nearest: partial"),
        ("partial()", "give either last=n or from_stage"),
        ("partial(last=2, from_stage='top')", "give either last=n or from_stage"),
        ("partial(last=9)", "the model has 5 stages before its head"),
        ("partial(from_stage='blok2')", "unknown stage 'blok2'; nearest: block2"),
        ("partial(depth=2)", "unexpected keyword argument 'depth'"),
        ("partial(last=1, body=0)", "expected a multiplier above 0"),
        ("surgical('block9')", "unknown stage 'block9'"),
        ("layerwise_decay(1.5)", "expected 0 < rate <= 1"),
        ("layerwise_decay('a')", "layerwise_decay"),
        ("layerwise_decay(0.5, floor=2)", "expected 0 <= floor <= 1"),
        ("layerwise_decay(0.5, {'blok1': 0.1})", "floor 'blok1' matches no stage; nearest: block1"),
        ("layerwise_decay(0.5, {'**/bias': 0.01})", "floor 0.01 of '**/bias' changes nothing"),
        ("layerwise_decay(0.5, {'**/bais': 0.2})", "rule '{stem,block1,block2} & **/bais' matches no parameter"),
        ("head_and()", "expected at least one pattern"),
        ("head_and('**/se')", "rule '**/se' matches no parameter"),
        ("biases_only(body=0)", "expected a multiplier above 0"),
        ("norms_only()", "norm*"),  # this network has none
        ("frozen_norms(full())", "norm*"),
        ("scaled(full(), 0)", "expected a factor above 0"),
        ("scaled(full(), -1)", "expected a factor above 0"),
        ("within('stem', frozen())", "the strategy counts stages"),
        ("within('re:stem', full())", "expected a path"),
        ("rules(('**', float('inf')))", "unknown strategy 'float'"),
        ("rules(('**', 1e999))", "expected (pattern, multiplier >= 0)"),
        ("discriminative({'head': 1})", "no rule matches block1/bias"),
        ("discriminative(3)", "expected {pattern: multiplier"),
        ("rules(('**', -1))", "expected (pattern, multiplier >= 0)"),
        ("rules(('**', 0))", "everything is frozen"),
        ("partial(last=", "cannot be read"),
        ("__import__('os').system('true')", "neither a call nor a value"),
        ("(lambda: 1)()", "neither a call nor a value"),
        ("partial(last=1 + x)", "neither a call nor a value"),
        ("3", "cannot be read"),
    ],
)
def test_bad_strategies_get_one_line(text, message):
    with pytest.raises(UserError) as error:
        multipliers(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# Named as the modules of flax, big_vision and torch-like ports are.
NAMES = {
    "stem": ["conv/kernel", "bn/scale", "bn/bias"],
    "block1": ["LayerNorm_0/scale", "attn/query/kernel", "attn/query/bias", "mlp/kernel", "mlp/bias"],
    "block2": ["ln2/scale", "ln2/bias", "MultiHeadDotProductAttention_0/out/kernel", "downsample_bn/scale"],
    "block3": ["se/kernel", "se/bias", "encoder_norm/scale", "kiln/kernel"],
    "head": ["kernel", "bias"],
}
NAMED = {
    stage: {leaf: jnp.ones((2, 2)) for leaf in leaves} for stage, leaves in NAMES.items()
}  # a key may hold "/": paths are joined by it anyway


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("biases_only()", ["stem/bn/bias", "block1/attn/query/bias", "block1/mlp/bias", "block2/ln2/bias",
                           "block3/se/bias"]),
        ("norms_only()", ["stem/bn/scale", "stem/bn/bias", "block1/LayerNorm_0/scale", "block2/ln2/scale",
                          "block2/ln2/bias", "block2/downsample_bn/scale", "block3/encoder_norm/scale"]),
        ("attention_only()", ["block1/attn/query/kernel", "block1/attn/query/bias",
                              "block2/MultiHeadDotProductAttention_0/out/kernel"]),
        ("head_and('!{stem,head,block1,block3}')", [f"block2/{leaf}" for leaf in NAMES["block2"]]),
    ],
)  # fmt: skip
def test_what_is_chosen_by_name(text, expected):
    plan = plans.build(strategies.parse(text)(tuple(NAMES)), NAMED, stages=tuple(NAMES))
    assert {leaf.path for leaf in plan.trainable} == {*expected, "head/kernel", "head/bias"}


NETWORKS = [
    "efficientnet_tiny",
    "resnet_tiny",
    "groupnorm_tiny",
    "vit_mini",
    "convnext_mini",
    "densenet_mini",
    "swin_mini",
    "efficientnet_b0",
    "resnet50",
]


@pytest.mark.parametrize("model", NETWORKS)
def test_norms_of_the_models_are_the_modules_that_have_a_scale(model):
    model = models.create(model, 3)
    shapes = models.shapes(model)
    plan = plans.build(strategies.norms_only()(model.stages), shapes["params"], shapes["batch_stats"], model.stages)
    norms = {leaf.path.rpartition("/")[0] for leaf in plan.leaves if leaf.path.endswith("/scale")}
    trainable = {leaf.path.rpartition("/")[0] for leaf in plan.trainable}
    assert trainable == norms | {"head"}
    assert plan.live_norms == (norms if shapes["batch_stats"] else set())


@pytest.mark.parametrize("model", [*NETWORKS, "keras_resnet_tiny"])
@pytest.mark.parametrize("text", ["full()", "partial(last=2)"])
def test_frozen_norms_leave_out_norms_alone(model, text):
    """Also where one is a stage of its own, of which the strategy would have a rule, or beside a shortcut."""
    model = models.create(model, 3)
    shapes = models.shapes(model)

    def trainable(text):
        strategy = strategies.parse(text)
        plan = plans.build(strategy(model.stages), shapes["params"], shapes["batch_stats"], model.stages)
        return {leaf.path for leaf in plan.trainable}, plan.live_norms

    found, live = trainable(f"frozen_norms({text})")
    every, _ = trainable(text)
    norms = {path.rpartition("/")[0] for path in every if path.endswith("/scale")}
    assert every - found == {path for path in every if path.rpartition("/")[0] in norms} != set()
    assert not live


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("norms_only()", {"norm1/scale", "norm1/bias", "norm2/scale", "norm2/bias"}),
        ("attention_only()", {f"attn/{m}/{p}" for m in ("query", "key", "value", "out") for p in ("kernel", "bias")}),
        ("biases_only()", {"norm1/bias", "norm2/bias", "mlp/fc1/bias", "mlp/fc2/bias"}
                          | {f"attn/{m}/bias" for m in ("query", "key", "value", "out")}),
    ],
)  # fmt: skip
def test_what_is_chosen_of_a_transformer(text, names):
    model = models.create("vit_mini", 3)
    plan = plans.build(strategies.parse(text)(model.stages), models.shapes(model)["params"], stages=model.stages)
    expected = {f"block{i}/{name}" for i in range(1, 7) for name in names} | {"head/kernel", "head/bias"}
    expected |= {"norm/scale", "norm/bias", "embed/patch/bias"} & {
        "norms_only()": {"norm/scale", "norm/bias"}, "biases_only()": {"norm/bias", "embed/patch/bias"},
    }.get(text, set())  # fmt: skip
    assert {leaf.path for leaf in plan.trainable} == expected
    undecayed = [leaf.path for leaf in plan.leaves if not leaf.decay and len(leaf.shape) > 1]
    assert undecayed == ["embed/position"]


@pytest.mark.parametrize("kind", sorted(layers.NORMS))
@pytest.mark.parametrize("name", ["norm1", "final_norm", "RMSNorm_0", "ln_post"])
def test_norms_of_every_kind_are_found(kind, name):
    norm = layers.norm(layers.Common(norm=kind), name)
    params = jax.eval_shape(lambda: norm.init(jax.random.key(0), jnp.zeros((2, 4, 4, 8)), frozenset()))["params"]
    tree = {"block1": {name: params, "fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}, "head": jnp.ones(2)}
    plan = plans.build(strategies.norms_only()(tuple(tree)), tree)
    assert {leaf.path for leaf in plan.trainable} == {f"block1/{name}/{leaf}" for leaf in params} | {"head"}
    assert set(params) == {"rms": {"scale"}, "batch_bias": {"bias"}}.get(kind, {"scale", "bias"})


# ---- the laws, on what decides: the first rule of each path

PATHS = [f"{stage}/{leaf}" for stage, leaves in NAMES.items() for leaf in leaves]
LAWS = settings(max_examples=100, deadline=None)
globs = st.sampled_from(
    ["**", "head", "stem", "block*", "block1/**", "**/bias", "**/bn*", "*/kernel", "**/{ln,LayerNorm}*", "re:.*/scale",
     "re:block[12]/.*|stem/.*", "block?/se"]
)  # fmt: skip
patterns = st.one_of(globs, globs.map("!{}".format), globs.map("!!{}".format))
eighths = st.integers(0, 16).map(lambda n: n / 8)  # products of these are exact
plain = st.lists(st.tuples(patterns, eighths), min_size=1, max_size=4).map(lambda pairs: strategies.rules(*pairs))
total = st.one_of(
    plain.map(lambda a: strategies.first(a, strategies.rules(("**", 0.25)))),
    st.sampled_from(
        [strategies.frozen(), strategies.partial(last=2), strategies.full(), strategies.full(body=0.5),
         strategies.layerwise_decay(0.5), strategies.surgical("stem"), strategies.biases_only()]
    ),
)  # fmt: skip
any_strategy = st.one_of(plain, total)
powers = st.integers(-3, 3).map(lambda n: 2.0**n)


def decisions(strategy, paths=tuple(PATHS)) -> dict[str, float | None]:
    """The multiplier of each path; None where no rule matches."""
    rules = strategy(tuple(NAMES))
    return {path: next((m for pattern, m in rules if plans.matches(pattern, path)), None) for path in paths}


@LAWS
@given(any_strategy, any_strategy, any_strategy)
def test_first_is_associative_and_nothing_is_its_identity(a, b, c):
    first, nothing = strategies.first, strategies.first()
    assert decisions(first(first(a, b), c)) == decisions(first(a, first(b, c))) == decisions(first(a, b, c))
    assert decisions(first(a, nothing)) == decisions(first(nothing, a)) == decisions(first(a)) == decisions(a)


@LAWS
@given(any_strategy, any_strategy)
def test_the_earlier_decides_and_the_later_only_what_is_left(a, b):
    left, right = decisions(a), decisions(b)
    assert decisions(strategies.first(a, b)) == {p: right[p] if left[p] is None else left[p] for p in PATHS}
    assert decisions(strategies.first(a, a)) == left


@LAWS
@given(total, any_strategy)
def test_after_a_total_strategy_nothing_is_left_to_decide(a, b):
    assert None not in decisions(a).values()
    assert decisions(strategies.first(a, b)) == decisions(a)


def test_rules_after_a_total_strategy_are_an_error_of_the_plan():
    with pytest.raises(UserError, match="decides nothing: earlier rules match every path"):
        multipliers("first(full(), frozen())")


@LAWS
@given(any_strategy, any_strategy, powers, powers)
def test_scaling_multiplies_and_passes_through_first(a, b, x, y):
    scaled, first = strategies.scaled, strategies.first
    assert decisions(scaled(a, 1)) == decisions(a)
    assert decisions(scaled(scaled(a, x), y)) == decisions(scaled(a, x * y))
    assert decisions(scaled(first(a, b), x)) == decisions(first(scaled(a, x), scaled(b, x)))
    assert decisions(scaled(a, x)) == {p: None if m is None else m * x for p, m in decisions(a).items()}


@LAWS
@given(any_strategy, any_strategy, powers)
def test_within_moves_every_decision_under_the_prefix_and_touches_nothing_else(a, b, x):
    stages = tuple(NAMES)
    within = lambda prefix, strategy: strategies.within(prefix, strategy, stages)
    moved = [f"towers/image/{p}" for p in PATHS]
    others = [*PATHS, *(f"towers/text/{p}" for p in PATHS), *(f"image/{p}" for p in PATHS)]
    both = decisions(within("towers/image", a), (*moved, *others))
    assert [both[p] for p in moved] == list(decisions(a).values())
    assert not any(both[p] is not None for p in others)
    everywhere = (*moved, *others)
    assert decisions(within("towers", within("image", a)), everywhere) == both
    assert decisions(within("towers/im*", a), everywhere) == both
    together = decisions(strategies.first(within("t", a), within("t", b)), [f"t/{p}" for p in PATHS])
    assert decisions(within("t", strategies.first(a, b)), [f"t/{p}" for p in PATHS]) == together
    scaled = strategies.scaled
    assert decisions(scaled(within("t", a), x), together) == decisions(within("t", scaled(a, x)), together)


@LAWS
@given(globs, st.sampled_from(PATHS))
def test_not_is_the_complement_and_twice_not_is_nothing(pattern, path):
    assert plans.matches("!" + pattern, path) is not plans.matches(pattern, path)
    assert plans.matches("!!" + pattern, path) is plans.matches(pattern, path)


@LAWS
@given(st.text("ab/", min_size=1, max_size=6), st.lists(st.text("ab", min_size=1, max_size=2), min_size=1, max_size=3))
def test_braces_are_either(path, names):
    expected = any(fnmatch.fnmatchcase(path, name) or path.startswith(name + "/") for name in names)
    assert plans.matches("{" + ",".join(names) + "}", path) is expected


@LAWS
@given(st.floats(0.01, 1), st.floats(0, 1))
def test_layerwise_decay_never_falls_below_its_floor(rate, floor):
    found = [m for _, m in strategies.layerwise_decay(rate, floor)(STAGES)]
    assert found == sorted(found)
    assert found[-1] == 1
    assert all(m == floor or math.isclose(m, rate**depth) for depth, m in enumerate(reversed(found)))
    assert min(found) >= floor


@LAWS
@given(
    st.floats(0.1, 1),
    st.dictionaries(
        st.sampled_from(["**/bias", "block1/**", "re:block[12]/.*", "**/{kernel,scale}"]), eighths, max_size=2
    ),
    st.dictionaries(st.sampled_from(["stem", "block?", "**"]), eighths, max_size=2),
)
def test_floors_by_parameter_and_by_stage(rate, of_parameters, of_stages):
    """Each leaf has the larger of rate**depth and its floor: that of its name, else that of its stage, else 0."""
    floors = {p: min(v, 1.0) for p, v in (of_parameters | of_stages).items()}
    try:
        found = decisions(strategies.layerwise_decay(rate, floors))
    except UserError:  # a floor under which nothing falls
        return
    stages = tuple(NAMES)
    for path, multiplier in found.items():
        stage = path.split("/")[0]
        by_name = [floors[p] for p in of_parameters if plans.matches(p, path)]
        by_stage = [floors[p] for p in of_stages if plans.matches(p, stage)]
        floor = (by_name + by_stage + [0.0])[0]
        assert multiplier == max(rate ** (len(stages) - 1 - stages.index(stage)), floor), path


@LAWS
@given(patterns, patterns, patterns, st.sampled_from(PATHS))
def test_and_is_the_intersection(a, b, c, path):
    expected = plans.matches(a, path) and plans.matches(b, path)
    assert plans.matches(f"{a} & {b}", path) is expected
    assert plans.matches(f"{a} & {b} & {c}", path) is (expected and plans.matches(c, path))
    assert plans.matches(under("t", f"{a} & {b}"), f"t/{path}") is expected
    assert not plans.matches(under("t", f"{a} & {b}"), path)

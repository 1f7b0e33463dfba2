"""What a config denotes: model, shapes, plan, optimizer. From shapes alone: no weights, no data, no compile."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from tljax import adapters, cache, delta, frozen_dtype, models, optim, phases, regularisers, strategies, weights
from tljax import plan as plans
from tljax.adapters import files
from tljax.config import base, check, duration
from tljax.data.catalogue import CATALOGUE
from tljax.data.pipeline import Augment
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.patterns import matches
from tljax.step import Numbers, State, init_state, make_train_step, numbers_of

DEFAULT_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, where no card says otherwise


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images reach the model: as the weights' card says."""

    size: int
    mean: tuple[float, ...]  # a channel
    std: tuple[float, ...]
    interpolation: str
    crop: float


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config and the number of classes, resolved."""

    config: ConfigDict
    model: Any
    card: weights.Card | None  # None: random weights
    preprocessing: Preprocessing
    shapes: dict  # {"params": …, "batch_stats": …} of jax.ShapeDtypeStruct
    plans: tuple[tuple[str, plans.Plan], ...]  # (duration, plan) of each phase
    classes: tuple[str, ...] = ()  # their names, where they are known

    @property
    def paths(self) -> tuple[str, ...]:
        """The path of every parameter."""
        return plans.paths(self.shapes["params"])

    @property
    def reset(self) -> tuple[str, ...]:
        """The patterns of what the loaded network has not. A zero-shot classifier is its head."""
        zeroshot = self.config.head == "zeroshot"
        return tuple(p for p in self.config.reset if not (zeroshot and matches(p, f"{self.model.stages[-1]}/kernel")))

    @functools.cached_property
    def penalty(self) -> regularisers.Penalty | None:
        """What holds the weights to the loaded ones (`config.regulariser`). Raises UserError."""
        regulariser = regularisers.parse(self.config.regulariser)
        if regulariser is None:
            return None
        if self.card is None:
            raise UserError("config.regulariser needs loaded weights, config.weights = ''")
        own = set(plans.paths(_own(self.model, self.shapes)["params"]))  # adapters begin as the identity
        trained = {leaf.path for _, plan in self.plans for leaf in plan.trainable} & own
        return regularisers.resolve(regulariser, self.shapes["params"], trained, self.reset)

    @functools.cached_property
    def narrow(self) -> frozenset[str]:
        """The paths of the parameters that are stored in `config.parallel.frozen_dtype`."""
        return frozen_dtype.narrow(self)

    @functools.cached_property
    def stored(self) -> dict:
        """As `shapes`, in the dtypes in which a run stores them: on its devices and in its checkpoints."""
        dtype, (leaves, structure) = self.config.parallel.frozen_dtype, jax.tree.flatten(self.shapes["params"])
        cast = lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, dtype) if path in self.narrow else leaf
        return self.shapes | {"params": structure.unflatten(map(cast, self.paths, leaves))}

    def features(self, plan: plans.Plan) -> jax.ShapeDtypeStruct:
        """Shape and dtype of what a plan's frozen prefix makes of one image."""
        size = self.preprocessing.size
        image = jax.ShapeDtypeStruct((1, size, size, self.config.channels), jnp.float32)
        found = jax.eval_shape(lambda v, x: self.model.apply(v, x, stop=plan.cut), self.shapes, image)
        return jax.ShapeDtypeStruct(found.shape[1:], found.dtype)

    def plain_model(self, num_classes: int):
        """The config's model on one device, for so many classes."""
        return _model(self.config, num_classes)

    def plan_of(self, strategy: strategies.Strategy) -> plans.Plan:
        """The plan of a strategy for this model. Its adapters, if it has any, have to be the model's."""
        config = self.config
        return plans.build(
            strategy(self.model.stages), self.shapes["params"], self.shapes["batch_stats"], self.model.stages,
            config.optim.no_decay, config.norm_stats,
        )  # fmt: skip

    def in_time(self, examples: int) -> tuple[phases.Phase, ...]:
        """The phases in steps, for so many training examples."""
        return phases.resolve(self.plans, *total_steps(self.config, examples))

    def optimizer(self, phase: phases.Phase, examples: int, numbers: Numbers | None = None):
        """Returns (gradient transformation over what trains, learning rate as a function of the run's step).

        `numbers`, which may be traced, take the place of the config's.
        """
        config, (total, per_epoch) = self.config.optim, total_steps(self.config, examples)
        peak, decay = (numbers.lr, numbers.weight_decay) if numbers else (None, None)
        if config.restart:
            part = optim.learning_rate(config, phase.stop - phase.start, per_epoch, peak)
            schedule = lambda step: part(step - phase.start)
        else:
            schedule = optim.learning_rate(config, total, per_epoch, peak)
        return optim.optimizer(phase.plan, config, schedule, phase.births, decay), schedule

    def train_step(self, plan: plans.Plan, tx, layout: Layout, numbers: Numbers | None = None, **more):
        """`make_train_step` as the config says, under one of its plans; `numbers` as in `optimizer`."""
        config, p, numbers = self.config, self.preprocessing, numbers or numbers_of(self.config)
        model = self.model if numbers.drop_rate is None else self.model.clone(drop_rate=numbers.drop_rate)
        return make_train_step(
            model, plan, tx, mean=p.mean, std=p.std, num_classes=self.model.num_classes,
            smoothing=numbers.label_smoothing, mixup=config.augment.mixup, cutmix=config.augment.cutmix,
            ema=config.ema, accumulate=config.optim.accumulate, seed=numbers.seed, axis_name=layout.axis_name,
            penalty=self.penalty, remat=bool(config.parallel.remat), **more,
        )  # fmt: skip

    def state_shapes(self, plan: plans.Plan, tx: optax.GradientTransformation) -> State:
        """Shapes and dtypes of the training state under a plan."""
        params, stats = self.stored["params"], self.stored["batch_stats"]
        anchor = lambda params: self.penalty and self.penalty.anchor(params, params)
        return jax.eval_shape(lambda p, s: init_state(plan, tx, p, s, self.config.ema, anchor(p)), params, stats)

    def saved_at(self, step: int, examples: int) -> tuple[plans.Plan, State]:
        """The plan of a checkpoint of that step, and the shapes of its state."""
        found = self.in_time(examples)
        phase = found[phases.index(found, step)]
        return phase.plan, self.state_shapes(phase.plan, self.optimizer(phase, examples)[0])

    def left_out(self, past: tuple[phases.Phase, ...]) -> dict[str, int]:
        """{path: number of values} of what a checkpoint of the last of these phases leaves out.

        With `config.checkpoint.delta` what has trained in none of them and is as the file of the weights has it. What
        was drawn from the seed or resized is held: another machine may not make the same bits of it.
        """
        if not self.config.checkpoint.delta:
            return {}
        made = (*self.config.reset, *map(weights.resizing.path, self.config.resize))
        if other_channels(self.config):
            made += (models.stem(self.config.model).partition("/")[2],)
        new = getattr(self.model, "adapters", ())
        is_made = lambda p: files.belongs(new, p) or any(matches(pattern, p.partition("/")[2]) for pattern in made)
        return {path: size for path, size in phases.never_trained(past).items() if not is_made(path)}

    def restore(self, checkpoints, step: int, layout: Layout, examples: int) -> tuple[plans.Plan, State]:
        """Returns (plan, placed state) of one of `checkpoints`, a `tljax.checkpoint.Checkpoints`.

        A delta checkpoint is filled from the weights, which are loaded anew. Raises UserError where the checkpoint is
        of another model, plan or base.
        """
        plan, like = self.saved_at(step, examples)
        found = self.in_time(examples)
        absent = self.left_out(found[: phases.index(found, step) + 1])
        state = checkpoints.restore(step, layout.abstract(delta.cut(like, absent)))
        if not absent:
            return plan, state
        began = checkpoints.notes(step)["frozen"]
        name = f"checkpoint {step} of {checkpoints.folder}"
        digests = {path: began[path] for path in absent}
        return plan, delta.fill(state, plan, self.load()[:2], digests, layout, name)

    def load(self) -> tuple[dict, dict, weights.Report | None]:
        """Returns (params, batch_stats, report): weights from the card, the rest initialised from the seed.

        They are as a run stores them (`stored`).
        """
        config, report, values = self.config, None, {}
        if self.card is not None:
            own = _own(self.model, self.shapes)
            loaded = weights.load(self.card, config.model, own, config.reset, config.resize, other_channels(config))
            report = loaded.report
            found = {"params": loaded.params, "batch_stats": loaded.batch_stats}
            values = {p: leaf for p, leaf in plans.flat(found).items() if not isinstance(leaf, jax.ShapeDtypeStruct)}
            if config.model.startswith("clip"):
                from tljax import texts

                texts.check_activation(self.card, config.model)
                values |= texts.head(self) if config.head == "zeroshot" else {}
        new = [path for path in plans.paths(self.shapes) if path not in values]
        key, size = jax.random.key(config.seed), self.preprocessing.size
        values |= plans.flat(models.initialise(self.model, key, size, only=new))
        values |= files.stored(self.model, values, config.reset)
        narrow = {f"params/{path}" for path in self.narrow}
        values |= {path: np.asarray(values[path]).astype(config.parallel.frozen_dtype) for path in narrow}
        structure = jax.tree.structure(self.shapes)
        variables = structure.unflatten([values[path] for path in plans.paths(self.shapes)])
        return variables["params"], variables["batch_stats"], report


def _own(model, shapes: dict) -> dict:
    """The shapes of what a file of weights can hold: all but the adapters."""
    return shapes | {"params": adapters.plain(model, shapes["params"])}


def _model(config: ConfigDict, num_classes: int, axis_name: str | None = None):
    rates = {name: config[name] for name in ("drop_rate", "drop_path_rate") if config[name] >= 0}
    types = {name: jnp.dtype(config[name]) for name in ("dtype", "param_dtype")}
    return models.create(config.model, num_classes, axis_name=axis_name, channels=config.channels, **types, **rates)


def build(config: ConfigDict, classes: int | Sequence[str], layout: Layout | None = None) -> Experiment:
    """Resolves a config for so many classes, or those of these names. Raises UserError for what does not fit."""
    check(config)
    named, num_classes = ((), classes) if isinstance(classes, int) else (tuple(classes), len(classes))
    Augment.of(config.augment)
    cache.check(config)
    frozen_dtype.check(config)
    card = card_of(config)
    if config.checkpoint.delta and card is None:
        raise UserError("config.checkpoint.delta = True needs config.weights: random weights are no base to go back to")
    _check_head(config, card)
    model = _model(config, num_classes, layout.axis_name if layout else None)
    seen = preprocessing(config, card)
    pairs = ((phases.REST, strategies.parse(config.strategy)),)
    if config.phases:
        pairs = phases.parse(config.phases)(model.stages)
    wanted = strategies.adapters_of(*(strategy for _, strategy in pairs))
    if wanted:  # of all phases, so that the state is one tree from the first step to the last
        example = jax.ShapeDtypeStruct((1, seen.size, seen.size, config.channels), jnp.float32)
        model = adapters.adapt(model, wanted, example)
    shapes = models.shapes(model, size=seen.size)
    weights.check(card, config.model, plans.paths(_own(model, shapes)), config.reset, config.resize)
    experiment = Experiment(config, model, card, seen, shapes, (), named)
    timed = tuple((length, experiment.plan_of(strategy)) for length, strategy in pairs)
    experiment = dataclasses.replace(experiment, plans=timed)
    _ = experiment.penalty  # its mistakes are told now
    return experiment


def _check_head(config: ConfigDict, card: weights.Card | None) -> None:
    defaults = base(config.model)
    if not config.head:
        for field in ("templates", "class_names", "tokenizer"):
            if config[field] != defaults[field]:
                raise UserError(f"config.{field} = {config[field]!r} is of use with config.head = 'zeroshot' only")
        return
    from tljax import texts

    texts.require(config.model, "config.head = 'zeroshot'")
    if card is None:
        raise UserError("config.head = 'zeroshot' needs loaded weights, config.weights = ''")
    if not any(matches(pattern, "head/kernel") for pattern in config.reset):
        raise UserError(f"config.head = 'zeroshot' makes the head: config.reset = {config.reset} has to name it")
    texts.templates(config.templates)


def card_of(config: ConfigDict) -> weights.Card | None:
    """The card of the config's weights; None where they are random. Raises UserError."""
    return weights.card(config.weights, config.model) if config.weights else None


def preprocessing(config: ConfigDict, card: weights.Card | None) -> Preprocessing:
    """How images reach the config's model."""
    if card is None:
        mean, std = DEFAULT_MEAN_STD
        found = Preprocessing(models.input_size(config.model), mean, std, "bicubic", 0.875)
    else:
        fields = {f.name: getattr(card, f.name) for f in dataclasses.fields(Preprocessing) if f.name != "size"}
        found = Preprocessing(size=card.input_size, **fields)
    if len(found.mean) != config.channels:  # as timm: the mean of all channels for each
        one = lambda values: (sum(values) / len(values),) * config.channels
        found = dataclasses.replace(found, mean=one(found.mean), std=one(found.std))
    return dataclasses.replace(found, size=config.image_size) if config.image_size else found


def other_channels(config: ConfigDict) -> int | None:
    """The number of channels to which the first convolution is adapted; None where it is as in the file."""
    return None if config.channels == 3 else config.channels


def classes_without_data(config: ConfigDict) -> int:
    """The number of classes that the config or the catalogue of data sets tells. Raises UserError."""
    known = CATALOGUE.get(config.data.source, {}).get("num_classes", 0)
    if not (config.data.num_classes or known):
        raise UserError(
            f"set config.data.num_classes: without the data nothing tells the classes of {config.data.source!r}"
        )
    return config.data.num_classes or known


def plan_table(experiment: Experiment):
    """The plan as a table (see tljax.report.table), optimizer bytes by `jax.eval_shape`; with phases the last one's."""
    from tljax.report.table import plan_table as table

    config, (_, plan) = experiment.config, experiment.plans[-1]
    per_leaf, total = optim.state_bytes(optim.optimizer(plan, config.optim, lambda step: 1.0), plan)
    totals = plan.totals() | {
        "optimizer_bytes": total,
        "frozen prefix": f"{plan.prefix[0]} … {plan.prefix[-1]}" if plan.prefix else "none",
        "strategy": config.phases or config.strategy,
        "norm_stats": None if config.norm_stats == "plan" else config.norm_stats,
        "digest": plan.digest[:16],
    }
    if experiment.narrow:
        count = sum(leaf.size for leaf in plan.leaves if leaf.path in experiment.narrow)
        totals[f"stored in {config.parallel.frozen_dtype}"] = f"{count:,} values that never train"
    if len(experiment.plans) > 1:
        for i, (length, earlier) in enumerate(experiment.plans, 1):
            totals[f"phase {i}, {length}"] = f"{earlier.totals()['trainable']:,} train, in {live_spans(earlier)}"
    return table(plan.rows(per_leaf), totals, plan.rule_counts())


def live_spans(plan: plans.Plan) -> str:
    """The live stages, neighbours as `first … last`."""
    found = []
    for i, stage in enumerate(plan.stages):
        if stage in plan.live_stages:
            if found and found[-1][-1] == i - 1:
                found[-1].append(i)
            else:
                found.append([i])
    name = lambda run: plan.stages[run[0]] + (f" … {plan.stages[run[-1]]}" if len(run) > 1 else "")
    return ", ".join(map(name, found))


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    import importlib.metadata
    import platform

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a checkout on the path
            return "not installed"

    names = ("tljax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


def total_steps(config: ConfigDict, examples: int) -> tuple[int, float]:
    """Returns (steps of the run, steps per epoch)."""
    per_epoch = examples / config.batch_size
    total = duration(config.train_for, per_epoch, "train_for")
    if total < 1:
        raise UserError(f"config.train_for = {config.train_for!r} is no step at all")
    return total, per_epoch

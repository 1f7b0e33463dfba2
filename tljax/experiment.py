"""What a config denotes: model, shapes, plan, optimizer. From shapes alone: no weights, no data, no compile."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tljax import delta, models, optim, phases, strategies, weights
from tljax import plan as plans
from tljax.config import check, duration
from tljax.data.catalogue import CATALOGUE
from tljax.data.pipeline import Augment
from tljax.errors import UserError
from tljax.parallel import Layout
from tljax.patterns import matches
from tljax.step import State, init_state

DEFAULT_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet's, where no card says otherwise


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images reach the model: as the weights' card says."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
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

    def in_time(self, examples: int) -> tuple[phases.Phase, ...]:
        """The phases in steps, for so many training examples."""
        return phases.resolve(self.plans, *total_steps(self.config, examples))

    def optimizer(self, phase: phases.Phase, examples: int):
        """Returns (gradient transformation over what trains, learning rate as a function of the run's step)."""
        config, (total, per_epoch) = self.config.optim, total_steps(self.config, examples)
        if config.restart:
            part = optim.learning_rate(config, phase.stop - phase.start, per_epoch)
            schedule = lambda step: part(step - phase.start)
        else:
            schedule = optim.learning_rate(config, total, per_epoch)
        return optim.optimizer(phase.plan, config, schedule, phase.births), schedule

    def state_shapes(self, plan: plans.Plan, tx: optax.GradientTransformation) -> State:
        """Shapes and dtypes of the training state under a plan."""
        params, stats = self.shapes["params"], self.shapes["batch_stats"]
        return jax.eval_shape(lambda p, s: init_state(plan, tx, p, s, self.config.ema), params, stats)

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
        made = (*self.config.reset, *self.config.resize)
        is_made = lambda path: any(matches(pattern, path.partition("/")[2]) for pattern in made)
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
        """Returns (params, batch_stats, report): weights from the card, the rest initialised from the seed."""
        key, size = jax.random.key(self.config.seed), self.preprocessing.size
        if self.card is None:
            variables, report = models.initialise(self.model, key, size), None
        else:
            config = self.config
            loaded = weights.load(self.card, config.model, self.shapes, config.reset, config.resize)
            variables = {"params": loaded.params, "batch_stats": loaded.batch_stats}
            report = loaded.report
            is_shape = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
            new = [p for p, leaf in zip(plans.paths(variables), jax.tree.leaves(variables)) if is_shape(leaf)]
            fresh = models.initialise(self.model, key, size, only=new)
            fresh = dict(zip(plans.paths(fresh), jax.tree.leaves(fresh)))
            leaves, structure = jax.tree.flatten(variables)
            names = plans.paths(variables)
            variables = structure.unflatten([fresh.get(n, leaf) for n, leaf in zip(names, leaves)])
        return variables["params"], variables.get("batch_stats", {}), report


def build(config: ConfigDict, num_classes: int, layout: Layout | None = None) -> Experiment:
    """Resolves a config. Raises UserError for whatever in it does not exist or does not fit."""
    check(config)
    Augment.of(config.augment)
    card = weights.card(config.weights, config.model) if config.weights else None
    if config.checkpoint.delta and card is None:
        raise UserError("config.checkpoint.delta = True needs config.weights: random weights are no base to go back to")
    rates = {name: config[name] for name in ("drop_rate", "drop_path_rate") if config[name] >= 0}
    model = models.create(
        config.model,
        num_classes,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        axis_name=layout.axis_name if layout else None,
        **rates,
    )
    if card is None:
        mean, std = DEFAULT_MEAN_STD
        preprocessing = Preprocessing(models.input_size(config.model), mean, std, "bicubic", 0.875)
    else:
        fields = {f.name: getattr(card, f.name) for f in dataclasses.fields(Preprocessing) if f.name != "size"}
        preprocessing = Preprocessing(size=card.input_size, **fields)
    shapes = models.shapes(model, size=preprocessing.size)
    shapes.setdefault("batch_stats", {})
    weights.check(card, config.model, plans.paths(shapes), config.reset, config.resize)
    pairs = ((phases.REST, strategies.parse(config.strategy)),)
    if config.phases:
        pairs = phases.parse(config.phases)(model.stages)
    resolve = lambda rules: plans.build(
        rules, shapes["params"], shapes["batch_stats"], model.stages, config.optim.no_decay, config.norm_stats
    )
    timed = tuple((length, resolve(strategy(model.stages))) for length, strategy in pairs)
    return Experiment(config, model, card, preprocessing, shapes, timed)


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

    names = ("tljax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def total_steps(config: ConfigDict, examples: int) -> tuple[int, float]:
    """Returns (steps of the run, steps per epoch)."""
    per_epoch = examples / config.batch_size
    total = duration(config.train_for, per_epoch, "train_for")
    if total < 1:
        raise UserError(f"config.train_for = {config.train_for!r} is no step at all")
    return total, per_epoch

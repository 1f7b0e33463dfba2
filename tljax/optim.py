"""The optimizer, derived from the plan: one chain over the trainable leaves, multipliers by label."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from tljax.config import duration
from tljax.errors import UserError
from tljax.plan import Plan, paths

SLANT_RATIO = 32  # of the largest to the smallest rate of the slanted triangle


def learning_rate(
    config: ConfigDict, total_steps: int, steps_per_epoch: float, peak: float | jax.Array | None = None
) -> optax.Schedule:
    """Linear warm-up from 0, then cosine or linear to 0, or constant; a function of the step.

    Or slanted triangular (Howard & Ruder 2018): the warm-up rises from lr/32 to lr, then the rate falls linearly to
    lr/32. `config` is `config.optim`; `peak` takes the place of its lr, and may be traced. Raises UserError where the
    warm-up is longer than the run.
    """
    peak = config.lr if peak is None else peak
    warmup = duration(config.warmup, steps_per_epoch, "optim.warmup", whole=total_steps)
    if warmup >= total_steps:
        raise UserError(f"config.optim.warmup = {config.warmup!r} is {warmup} steps, the run has {total_steps}")
    if config.schedule == "slanted_triangular":
        least, after = peak / SLANT_RATIO, total_steps - warmup
        # The paper divides by cut * (1 / cut_frac - 1), which is this unless its cut was rounded: then it ends below 0.
        falling = optax.linear_schedule(peak, least, after)
        return optax.join_schedules([optax.linear_schedule(least, peak, warmup), falling], [warmup])
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, total_steps - warmup),
        "linear": lambda: optax.linear_schedule(peak, 0.0, total_steps - warmup),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    if not warmup:
        return after
    # The first step has the rate lr/warmup, not 0: no step is spent on nothing.
    rising = lambda step: peak * (step + 1) / warmup
    return optax.join_schedules([rising, after], [warmup])


def scales(
    plan: Plan, trainable_only: bool = True, multipliers: jax.Array | None = None
) -> optax.GradientTransformation:
    """Multiplies each leaf's update by its multiplier: `multi_transform` over the plan's labels.

    `multipliers`, one for each trainable leaf, may be traced; they take the place of the plan's.
    """
    if multipliers is not None:
        each = iter(range(len(plan.trainable)))
        places = plan.tree(lambda leaf: next(each), trainable_only=True)
        return optax.stateless(lambda updates, _: jax.tree.map(lambda u, i: u * multipliers[i], updates, places))
    labels = plan.tree(lambda leaf: leaf.label, trainable_only)
    multipliers = {leaf.label: leaf.multiplier for leaf in plan.leaves if leaf.multiplier or not trainable_only}
    return _by_label({label: optax.scale(m) if m else optax.set_to_zero() for label, m in multipliers.items()}, labels)


def _by_label(transforms: dict[str, optax.GradientTransformation], labels) -> optax.GradientTransformation:
    """`optax.multi_transform`, also for trees that can be called, as Equinox modules can."""
    if not callable(labels):
        return optax.multi_transform(transforms, labels)
    # Optax would call it, taking it for a function from parameters to labels: it goes in as a tuple of one.
    tx = optax.multi_transform(transforms, (labels,))

    def update(updates, state, params=None, **more):
        (updates,), state = tx.update((updates,), state, None if params is None else (params,), **more)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init((params,)), update)


def by_age(plan: Plan, births: dict[str, int], core: Callable[[], optax.GradientTransformation]):
    """An optimizer core that keeps leaves of each age apart: those that began to train at one step share a state.

    Adam counts its steps once for all its leaves. With zero moments and a late count the first updates of a leaf
    that a phase thaws would be about 3 times too large.
    """
    label = lambda leaf: f"from{births.get(leaf.path, 0)}"
    names = {label(leaf) for leaf in plan.trainable}
    return optax.multi_transform({name: core() for name in names}, plan.tree(label, trainable_only=True))


def optimizer(
    plan: Plan, config: ConfigDict, schedule: optax.Schedule, births: dict[str, int] | None = None,
    weight_decay: float | jax.Array | None = None, multipliers: jax.Array | None = None,
) -> optax.GradientTransformation:  # fmt: skip
    """One chain over the trainable part of the parameters (`plan.split(params)[0]`).

    Clip by the global norm; the core (Adam, Loshchilov & Hutter's AdamW when decayed; SGD with momentum; LAMB,
    You et al. 2020); decoupled weight decay by the plan's decay flags; the multipliers; the schedule. So decay
    scales with the multiplier, and there is one clip for everything that trains. `config` is `config.optim`;
    `births`: the step at which each leaf began to train, where there are phases (`tljax.phases`); `weight_decay` and
    `multipliers` (of the leaves that train) take the place of the config's and the plan's, and may be traced.
    """
    weight_decay = config.weight_decay if weight_decay is None else weight_decay
    adam = lambda eps: optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=eps)
    core, after_decay = {
        "adamw": (lambda: adam(1e-8), ()),
        "sgd": (lambda: optax.trace(config.momentum, nesterov=True), ()),
        "lamb": (lambda: adam(1e-6), (optax.scale_by_trust_ratio(),)),
    }[config.name]
    decay = plan.tree(lambda leaf: leaf.decay, trainable_only=True)
    return optax.chain(
        *([optax.clip_by_global_norm(config.clip)] if config.clip else []),
        by_age(plan, births or {}, core),
        *([optax.add_decayed_weights(weight_decay, decay)] if config.weight_decay else []),
        *after_decay,
        scales(plan, multipliers=multipliers),
        optax.scale_by_learning_rate(schedule),
    )


def freeze(tx: optax.GradientTransformation, plan: Plan) -> optax.GradientTransformation:
    """`tx` over the whole tree with the plan applied, for training loops of one's own.

    The updates of frozen leaves are 0 and those of the others scaled by their multiplier; `tx` sees, and keeps
    state for, the trainable leaves alone. (Differentiating only `plan.split(params)[0]` saves more: then the
    frozen gradients are never computed.)
    """
    groups = plan.tree(lambda leaf: "train" if leaf.multiplier else "frozen")
    return optax.chain(
        _by_label({"train": tx, "frozen": optax.set_to_zero()}, groups),
        scales(plan, trainable_only=False),
    )


def state_bytes(tx: optax.GradientTransformation, plan: Plan) -> tuple[dict[str, int], int]:
    """Returns ({leaf path: bytes of its optimizer state}, total bytes), from shapes alone."""
    trainable = plan.tree(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trainable_only=True)
    state = jax.eval_shape(tx.init, trainable)
    per_leaf = {leaf.path: 0 for leaf in plan.trainable}
    total = 0
    for path, value in zip(paths(state), jax.tree.leaves(state)):
        nbytes = value.size * jnp.dtype(value.dtype).itemsize
        total += nbytes
        # A moment's path ends with its leaf's; the longest such leaf owns it ("a/bias" against "bias").
        owners = [p for p in per_leaf if path == p or path.endswith("/" + p)]
        if owners:
            per_leaf[max(owners, key=len)] += nbytes
    return per_leaf, total

"""The pure steps: one update of the trainable leaves, and logits of a batch."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tljax.plan import Plan

Tree = Any


class State(NamedTuple):
    """Everything that a step changes. `params` is one whole tree, whatever is frozen."""

    step: jax.Array  # int32, updates done
    params: Tree
    stats: Tree  # stored normalisation statistics
    optimizer: Tree  # over the trainable leaves alone
    average: Tree  # moving average {"params": trainable part, "stats": …}, or None
    anchor: Tree = None  # what a regulariser holds the weights to {"params": …, "fisher": … or None}, constant; or None


class Numbers(NamedTuple):
    """What of a config a compiled step takes as numbers: runs that differ in these alone share one program."""

    lr: Any  # float32, the schedule's peak
    weight_decay: Any  # float32
    label_smoothing: Any  # float32
    seed: Any  # uint32
    multipliers: Any = None  # float32, one for each leaf that trains, in their order; None: the plan's
    drop_rate: Any = None  # float32, of the dropout before the head; None: the model's


def numbers_of(config) -> Numbers:
    """The numbers of a whole config."""
    optim = config.optim
    values = map(np.float32, (optim.lr, optim.weight_decay, config.label_smoothing))
    return Numbers(*values, np.uint32(config.seed))


def init_state(
    plan: Plan, tx: optax.GradientTransformation, params: Tree, stats: Tree, ema: float, anchor: Tree = None
) -> State:
    """The state before the first step; `anchor` is a `regularisers.Penalty`'s."""
    trainable, _ = plan.split(params)
    # The average starts as a copy: the state is donated, and one buffer cannot be donated twice.
    average = jax.tree.map(jnp.copy, {"params": trainable, "stats": stats}) if ema else None
    anchor = jax.tree.map(jnp.copy, anchor)
    return State(jnp.zeros((), jnp.int32), params, stats, tx.init(trainable), average, anchor)


def part(state: State, plan: Plan) -> tuple[State, State]:
    """Parts a state into (what a step moves, what it only reads); absent leaves are None."""
    trainable, frozen = plan.split(state.params)
    moving, still = plan.split_stats(state.stats)
    average = state.average
    if average is not None:  # whose still statistics are those of the state
        average = {"params": average["params"], "stats": plan.split_stats(average["stats"])[0]}
    own = State(state.step, trainable, moving, state.optimizer, average)
    return own, State(None, frozen, still, None, None, state.anchor)


def whole(own: State, shared: State, plan: Plan) -> State:
    """The inverse of `part`."""
    average = own.average
    if average is not None:
        average = average | {"stats": plan.merge(average["stats"], shared.stats)}
    params, stats = plan.merge(own.params, shared.params), plan.merge(own.stats, shared.stats)
    return State(own.step, params, stats, own.optimizer, average, shared.anchor)


def evaluated(state: State, plan: Plan) -> tuple[Tree, Tree]:
    """The (params, stats) that evaluation uses: the moving average where there is one."""
    if state.average is None:
        return state.params, state.stats
    _, frozen = plan.split(state.params)
    return plan.merge(state.average["params"], frozen), state.average["stats"]


def normalise(images: jax.Array, mean: tuple, std: tuple) -> jax.Array:
    """uint8 images [batch, height, width, 3] to floats of the weights' mean and std (on the 0–1 scale).

    With one mean the network sees grey images: the luma of ITU-R BT.601 as one channel.
    """
    grey = len(mean) == 1 and images.shape[-1] == 3
    mean, std = (255 * jnp.array(v, jnp.float32) for v in (mean, std))
    images = images.astype(jnp.float32)
    if grey:
        images = (images * jnp.array([0.299, 0.587, 0.114], jnp.float32)).sum(-1, keepdims=True)
    return (images - mean) / std


def make_train_step(
    model, plan: Plan, tx: optax.GradientTransformation, *, mean, std, num_classes: int,
    smoothing: float | jax.Array = 0.0, mixup: float = 0.0, cutmix: float = 0.0, ema: float = 0.0, accumulate: int = 1,
    seed: int | jax.Array = 0, axis_name: str | None = None, penalty=None, start: str | None = None,
    mix_at: str | None = None, remat: bool = False,
):  # fmt: skip
    """Returns `train_step(state, batch) -> (state, metrics)`, pure and with global semantics.

    `batch` is {"image": uint8 [batch, height, width, 3], "label": int32 [batch]}; metrics are the scalars
    loss, accuracy and grad_norm (of the trainable leaves, before clipping). Only the trainable leaves are
    differentiated. A `penalty` (`regularisers.Penalty`) adds its gradient once a step, before the clip; its value
    is the metric `penalty`, and no part of `loss`. Randomness is a function of (seed, step). With `axis_name` the
    step is one device's part under `jax.pmap`, and gives what the global program under `jax.jit` gives.

    With `start`, a stage behind the frozen prefix, the batch has "features" instead of "image": what that stage
    takes. With `mix_at`, such a stage, mixup and CutMix mix what it takes, and not images. With `remat` the backward
    pass keeps only what enters each stage, and computes the rest again (`jax.checkpoint`).
    """
    from tljax.data.mix import mix, soft_targets

    mixes = bool(mixup or cutmix)
    begin = mix_at if mixes and mix_at else start  # where the differentiated part of the network begins

    def forward(params, stats, images, key, **between):
        variables = {"params": params, "batch_stats": stats}
        logits, moved = model.apply(
            variables, images, live=plan.live, rngs={"dropout": key}, mutable=["batch_stats"], **between
        )
        return logits, moved.get("batch_stats", stats)

    def forward_by_stage(params, stats, x, key):
        behind = plan.stages[len(plan.prefix) :]
        if begin in behind:
            behind = behind[behind.index(begin) :]
        elif plan.prefix:  # no gradient runs through it: nothing of it is kept, and nothing is computed again
            x, _ = forward(params, stats, x, key, start=begin, stop=plan.cut)
        for stage, after in zip(behind, (*behind[1:], None)):
            own = [{stage: tree[stage]} if stage in tree else {} for tree in (params, stats)]
            x, moved = jax.checkpoint(functools.partial(forward, start=stage, stop=after))(*own, x, key)
            stats = stats | moved
        return x, stats

    def loss_fn(trainable, frozen, stats, images, targets, key):
        between = {} if begin is None else {"start": begin}  # a model need not know of stages to be trained whole
        run = forward_by_stage if remat else functools.partial(forward, **between)
        logits, stats = run(plan.merge(trainable, frozen), stats, images, key)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (stats, logits)

    def gradients(state, images, targets, labels, key):
        trainable, frozen = plan.split(state.params)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

        def part(stats, inputs):
            images, targets, labels, key = inputs
            (loss, (stats, logits)), grads = grad_fn(trainable, frozen, stats, images, targets, key)
            return stats, (grads, loss, (logits.argmax(-1) == labels).mean())

        if accumulate == 1:
            return part(state.stats, (images, targets, labels, key))
        # Example i goes to part i mod n, so that each part is spread evenly over the devices.
        parts = lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)
        inputs = (parts(images), parts(targets), parts(labels), jax.random.split(key, accumulate))
        # Sums in the carry: one gradient is held, not one a part.
        shapes = jax.eval_shape(part, state.stats, jax.tree.map(lambda x: x[0], inputs))[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(carry, inputs):
            stats, total = carry
            stats, new = part(stats, inputs)
            return (stats, jax.tree.map(jnp.add, total, new)), None

        (stats, total), _ = jax.lax.scan(add, (state.stats, zeros), inputs)
        return stats, jax.tree.map(lambda x: x / accumulate, total)

    def train_step(state: State, batch: dict) -> tuple[State, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        mix_key, dropout_key = jax.random.split(key)
        labels = batch["label"]
        images = normalise(batch["image"], mean, std) if start is None else batch["features"]
        targets = soft_targets(labels, num_classes, smoothing)
        if begin != start:
            images = model.apply({"params": state.params, "batch_stats": state.stats}, images, start=start, stop=begin)
        if mixes:
            images, targets = mix(mix_key, images, targets, mixup=mixup, cutmix=cutmix)
        stats, (grads, loss, accuracy) = gradients(state, images, targets, labels, dropout_key)
        if axis_name is not None:
            grads, loss, accuracy = jax.lax.pmean((grads, loss, accuracy), axis_name)
        trainable, frozen = plan.split(state.params)
        metrics = {"loss": loss, "accuracy": accuracy}
        if penalty is not None:
            metrics["penalty"], pull = penalty(trainable, state.anchor)
            grads = jax.tree.map(jnp.add, grads, pull)
        updates, optimizer = tx.update(grads, state.optimizer, trainable)
        trainable = optax.apply_updates(trainable, updates)
        average = state.average
        if ema:
            # The rate rises from 0 as (1 + t) / (10 + t) so that the first weights are soon forgotten.
            t = state.step.astype(jnp.float32)
            rate = 1 - jnp.minimum(ema, (1 + t) / (10 + t))
            average = optax.incremental_update({"params": trainable, "stats": stats}, average, rate)
            # A weighted mean of equal values is not that value to the last bit: frozen statistics are taken as stored.
            moving, stored = plan.split_stats(average["stats"])[0], plan.split_stats(stats)[1]
            average = average | {"stats": plan.merge(moving, stored)}
        metrics["grad_norm"] = optax.tree.norm(grads)
        params = plan.merge(trainable, frozen)
        return State(state.step + 1, params, stats, optimizer, average, state.anchor), metrics

    return train_step


def make_predict_step(model, *, mean, std, start: str | None = None, stop: str | None = None):
    """Returns `predict_step(params, stats, images uint8 [batch, height, width, 3]) -> logits float32`.

    With `start` it takes what that stage takes instead of images, with `stop` it gives what that one takes.
    """

    def predict_step(params, stats, images):
        variables = {"params": params, "batch_stats": stats}
        x = normalise(images, mean, std) if start is None else images
        return model.apply(variables, x, start=start, stop=stop)

    return predict_step

"""K members of a sweep in one compiled step: what is theirs is stacked along a first axis, what is frozen is held once.

A member's own part is all that its training moves: trainable leaves, moving statistics, optimizer state and moving
average. Frozen leaves, stored statistics and the anchor of a regulariser are shared, so that the frozen forward runs
once for all members where they see the same batch.
"""

import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import optim
from tljax.errors import UserError, unknown
from tljax.parallel import Layout, Spread
from tljax.phases import Phase
from tljax.plan import Plan
from tljax.step import Numbers, State, evaluated, init_state, make_predict_step, part, whole

if TYPE_CHECKING:
    from tljax.experiment import Experiment

Tree = Any
HOW = ("auto", "vmap", "map", "sequence")


def choose(how: str, plan: Plan, kept: bool) -> str:
    """How members train: "vmap" (one batched step), "map" (in turn in one step), "sequence" (one run after another).

    Under vmap a convolution whose kernel is a member's own becomes one of many groups, and is slower than one member's
    at a time; matrices, pointwise and depthwise kernels are not. So "auto" is vmap where only these train, else map. On
    CPUs two things differ. Within loops XLA runs dense spatial convolutions without its fast kernels: where they train,
    it is sequence, as long as no frozen forward is computed once for all (`kept` says that its features are there). And
    activations of one member lie in the processor's caches, those of all do not: where stages other than the head run,
    and none of these convolutions is in them, it is map.
    """
    if how not in HOW:
        raise unknown("way to run members", how, HOW)
    if how != "auto":
        return how
    spatial = lambda leaf: len(leaf.shape) >= 4 and math.prod(leaf.shape[:-2]) > 1 and leaf.shape[-2] > 1
    train = any(map(spatial, plan.trainable))
    if jax.default_backend() != "cpu":
        return "map" if train else "vmap"
    if train:
        return "sequence" if kept or not plan.prefix else "vmap"
    run = [leaf for leaf in plan.leaves if leaf.stage not in plan.prefix]
    only_head = len({leaf.stage for leaf in run}) == 1
    return "vmap" if only_head or any(map(spatial, run)) else "map"


class Members:
    """The compiled programs of a group of members, which differ in numbers and, where `varied`, in seed and stream.

    With `kept` they take kept features of one pool of photographs, {"features": [views, photographs, …], "label":
    [photographs]}, and an index of it: (view, place), each [batch], or [members, batch] where `varied`. Without, they
    take the batch itself, {"image", "label"}, which all see. `how` is "vmap" or "map". The members are laid over the
    devices of `spread`, whose number divides theirs.
    """

    def __init__(
        self, exp: "Experiment", layout: Layout, phase: Phase, how: str, kept: bool, varied: bool, spread: Spread
    ):  # fmt: skip
        if varied and not kept:
            raise ValueError("members that see photographs, and not their features, share one stream")
        self.exp, self.layout, self.phase, self.plan = exp, layout, phase, phase.plan
        self.how, self.kept, self.varied, self.spread = how, kept, varied, spread
        self.first = spread.program(jax.vmap(self._begun, in_axes=(0, 0, None)), True, True, False)
        self.step = spread.program(
            self._step, True, True, False, False, True, True, False, varied, donate=(0, 1)
        )  # fmt: skip
        self._evaluations = {
            varied: spread.program(functools.partial(self._logits, varied=varied), True, False, False, varied)
            for varied in (False, True)
        }
        self.pick = spread.program(
            lambda mask, new, old: jax.tree.map(lambda a, b: _where(mask, a, b), new, old), True, True, True
        )

    # ---- states

    def begin(self, variables: list[tuple[Tree, Tree]], fisher: Tree = None) -> tuple[State, State]:
        """The state before the first step: (own [members, …], shared), from each member's (params, stats).

        Raises UserError where what they are to share is not the same in all.
        """
        digests = {}
        for params, stats in variables:
            found = digests.setdefault(id(params), None) or self.plan.frozen_digests(params, stats)
            digests[id(params)] = found
        first = digests[id(variables[0][0])]
        differing = sorted(path for other in digests.values() for path in other if other[path] != first[path])
        if differing:
            raise UserError(f"members cannot share frozen values that differ: {differing[0]}")
        params, stats = variables[0]
        penalty, split = self.exp.penalty, self.plan.split
        anchor = penalty and penalty.anchor(params, fisher)
        _, shared = part(State(None, params, stats, None, None, anchor), self.plan)
        shared = jax.device_put(shared, self.spread.shared)
        stack = lambda *leaves: np.stack(leaves)
        own = jax.tree.map(stack, *(split(params)[0] for params, _ in variables))
        moving = jax.tree.map(stack, *(self.plan.split_stats(stats)[0] for _, stats in variables))
        return self.first(own, moving, shared), shared

    def _begun(self, trainable: Tree, moving: Tree, shared: State) -> State:
        merge = self.plan.merge
        params, stats = merge(trainable, shared.params), merge(moving, shared.stats)
        state = init_state(self.plan, self._optimizer(), params, stats, self.exp.config.ema)
        return part(state, self.plan)[0]._replace(step=None)

    def shapes(self, count: int) -> tuple[State, State]:
        """The shapes of `begin`'s (own, shared) for so many members."""
        params, stats = self.exp.stored["params"], self.exp.stored["batch_stats"]
        shaped = self.exp.state_shapes(self.plan, self._optimizer())
        own, shared = part(shaped._replace(step=None, params=params, stats=stats), self.plan)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), own), shared

    def variables(self, own: State, shared: State, member: int) -> tuple[Tree, Tree]:
        """The (params, stats) with which one member is evaluated, whole."""
        own = jax.tree.map(lambda leaf: leaf[member], own)
        return evaluated(whole(own, shared, self.plan), self.plan)

    def _optimizer(self, numbers: Numbers | None = None):
        """The optimizer at one step: `numbers.lr` is the schedule's value there, not its peak."""
        rate, decay = (numbers.lr, numbers.weight_decay) if numbers else (0.0, None)
        multipliers = numbers.multipliers if numbers else np.ones(len(self.plan.trainable), np.float32)
        config = self.exp.config.optim
        return optim.optimizer(self.plan, config, lambda _: rate, self.phase.births, decay, multipliers)

    # ---- programs

    def _each(self, function, *stacked):
        """`function` of each member's part of `stacked` trees."""
        if self.how == "vmap":
            return jax.vmap(function)(*stacked)
        return jax.lax.map(lambda parts: function(*parts), stacked)

    def _prefix(self, shared: State, images: jax.Array) -> jax.Array:
        """What the frozen prefix makes of images: once, for all members."""
        p, inside = self.exp.preprocessing, set(self.plan.prefix)
        params, stats = ({s: tree[s] for s in tree if s in inside} for tree in (shared.params, shared.stats))
        return make_predict_step(self.exp.model, mean=p.mean, std=p.std, stop=self.plan.cut)(params, stats, images)

    def _step(self, own: State, alive, shared: State, step, go, numbers: Numbers, inputs: dict, index=None):
        """Returns (own, alive, metrics), each [members, …]: one update of those that `go` and are `alive`.

        A member whose loss is not finite is alive no more. Who is not updated stays as he was, bit for bit.
        """
        augment, plan = self.exp.config.augment, self.plan
        mixes_images = (augment.mixup or augment.cutmix) and augment.mix_at == "images"
        start = None if mixes_images else plan.cut
        mix_at = plan.cut if augment.mix_at == "features" else None
        if not self.kept and start:
            inputs = {"features": self._prefix(shared, inputs["image"]), "label": inputs["label"]}
        pick = lambda at: {"features": inputs["features"][at], "label": inputs["label"][at[1]]}
        batch = pick(index) if self.kept and not self.varied else inputs

        def one(own, alive, go, numbers, index):
            if self.varied:
                seen = pick(index)
            else:
                seen, numbers = batch, numbers._replace(seed=seed)
            tx = self._optimizer(numbers)
            update = self.exp.train_step(plan, tx, self.layout, numbers, start=start, mix_at=mix_at)

            def updated(own):
                state, metrics = update(whole(own._replace(step=step), shared, plan), seen)
                return part(state, plan)[0]._replace(step=None), metrics

            if self.how == "map":  # who is over takes no time
                nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(updated, own)[1])
                new, metrics = jax.lax.cond(alive & go, updated, lambda own: (own, nothing), own)
            else:
                new, metrics = updated(own)
            alive = alive & (jnp.isfinite(metrics["loss"]) | ~go)
            return jax.tree.map(lambda a, b: jnp.where(alive & go, a, b), new, own), alive, metrics

        if self.varied:
            return self._each(one, own, alive, go, numbers, index)
        # One seed for all: what is drawn, and what is mixed by it, exists once.
        seed, numbers = numbers.seed[0], numbers._replace(seed=None)
        return self._each(one, own, alive, go, numbers, None)

    def logits(self, own: State, shared: State, inputs, places=None, varied: bool = False) -> jax.Array:
        """Logits [members, batch, classes]: of images, or of kept features [photographs, …] at `places`.

        `places` are [batch], or [members, batch] where they are `varied`.
        """
        return self._evaluations[varied](own, shared, inputs, places)

    def _logits(self, own: State, shared: State, inputs, places, varied: bool) -> jax.Array:
        p, plan = self.exp.preprocessing, self.plan
        if not self.kept and plan.cut:
            inputs = self._prefix(shared, inputs)
        predict = make_predict_step(self.exp.model, mean=p.mean, std=p.std, start=plan.cut)
        if self.kept and not varied:
            inputs = inputs[places]

        def one(own, places):
            params, stats = evaluated(whole(own, shared, plan), plan)
            return predict(params, stats, inputs[places] if varied else inputs)

        return self._each(one, own, places if varied else None)


def _where(mask: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """Each member's leaf from `new` where its `mask` says so, else from `old`; all are [members, …]."""
    return jnp.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

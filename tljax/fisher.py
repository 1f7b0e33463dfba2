"""The diagonal of the Fisher information: how much a network's likelihood depends on each of its weights.

For elastic weight consolidation (`regularisers.ewc`, Kirkpatrick et al. 2017).
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tljax import source
from tljax.errors import UserError
from tljax.experiment import Experiment
from tljax.plan import paths
from tljax.report import text
from tljax.step import normalise

Tree = Any
CHUNK_BYTES = 2**28  # of per-example gradients that are held at a time


def diagonal_fisher(
    logits_fn: Callable, params: Tree, rest: Tree, batches: Iterable[dict], key: jax.Array, labels: str = "model"
) -> tuple[Tree, int, int]:
    """Returns (F, number of examples, bytes): the mean square of each example's gradient of log p(y | x).

    `logits_fn(params, rest, images) -> [batch, classes]`; `params` is the part that F is wanted of, `rest` whatever
    else the logits depend on (as the parts that `plan.split` gives); `batches` are {"image", "label"} of numpy arrays.
    y is drawn from the model's prediction, once an example, or with `labels="data"` the label. The gradients of a
    chunk of examples are held at a time: `bytes` of them, 2**28 at most or those of one example. Raises UserError
    where there is no example, or no label.
    """
    each = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    chunk = max(1, CHUNK_BYTES // max(each, 1))

    def log_likelihood(params, rest, image, label, key):
        log_p = jax.nn.log_softmax(logits_fn(params, rest, image[None])[0].astype(jnp.float32))
        # Drawn inside, but constant: the gradient is of the likelihood of the label, not of how it was drawn.
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p)) if labels == "model" else label
        return log_p[drawn]

    @jax.jit
    def squares(params, rest, images, labels, keys, mask):
        per_example = jax.vmap(jax.grad(log_likelihood), (None, None, 0, 0, 0))(params, rest, images, labels, keys)
        square = lambda g: jnp.einsum("i,i...->...", mask, jnp.square(g.astype(jnp.float32)))
        return jax.tree.map(square, per_example)

    total, count, size = None, 0, 0
    for batch in batches:
        images, given = np.asarray(batch["image"]), np.asarray(batch["label"])
        if labels == "data" and (given < 0).any():
            raise UserError("ewc(labels='data'): a photograph of the source task has no label; expected labels='model'")
        size = size or min(chunk, len(images))
        for start in range(0, len(images), size):
            part, known = images[start : start + size], given[start : start + size]
            n, fill = len(part), size - len(part)  # one shape, one compile: what is filled up has no weight
            part = np.concatenate([part, np.zeros((fill, *part.shape[1:]), part.dtype)])
            known = np.concatenate([known, np.zeros(fill, known.dtype)])
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(count + jnp.arange(size))
            new = squares(params, rest, part, known, keys, jnp.asarray(np.arange(size) < n, jnp.float32))
            total = new if total is None else jax.tree.map(jnp.add, total, new)
            count += n
    if not count:
        raise UserError("ewc: no photograph of the source task to measure the Fisher information on")
    return jax.tree.map(lambda x: x / count, total), count, size * each


def of_source(exp: Experiment) -> tuple[dict, str]:
    """Returns (the diagonal Fisher information that `config.regulariser` asks for, a line about it).

    Every process of several measures the whole of it, on one device: it is small beside the training. At most 32
    photographs are in memory at a time, with their activations.
    """
    asked, config, p = exp.penalty.regulariser, exp.config, exp.preprocessing
    net = source.network(exp)
    where = {**config.source, **({"data": asked.source, "split": asked.split, "limit": 0} if asked.source else {})}
    found = source.photographs(where, net.classes)
    # A folder lies in the order of its classes.
    order = np.random.default_rng(config.seed).permutation(len(found.split))
    split = found.split.take(order[: asked.batches * config.batch_size])
    held = set(exp.penalty.held)
    leaves, structure = jax.tree.flatten(net.params)
    of = lambda wanted: structure.unflatten(
        [leaf if (path in held) is wanted else None for path, leaf in zip(paths(net.params), leaves)]
    )
    measured, rest = of(True), {"params": of(False), "stats": net.stats}

    def logits(part, rest, images):
        is_none = lambda x: x is None
        params = jax.tree.map(lambda a, b: b if a is None else a, part, rest["params"], is_leaf=is_none)
        return net.model.apply({"params": params, "batch_stats": rest["stats"]}, normalise(images, p.mean, p.std))

    batches = source.batches(exp, split, min(config.batch_size, source.BATCH))
    result, count, size = diagonal_fisher(logits, measured, rest, batches, jax.random.key(config.seed), asked.labels)
    drawn = "labels of the data" if asked.labels == "data" else "labels drawn from the loaded network's prediction"
    said = f"Fisher information of {count:,} photographs ({found.name}), {drawn}"
    return result, f"{said}; {text.size(size)} of gradients at a time"

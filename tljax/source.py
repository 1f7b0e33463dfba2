"""The source task: the loaded network with its own head, and photographs of what it was trained on.

What a network knew before the transfer is measured with it (`tljax.forgetting`, `tljax.wise_ft`), and weighs what
must not move (`regularisers.ewc`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from tljax import adapters, frozen_dtype, models, weights
from tljax.data.dataset import Split, read
from tljax.data.pipeline import eval_batches
from tljax.data.table import Table
from tljax.errors import UserError, listing
from tljax.experiment import Experiment, build, other_channels
from tljax.report import metrics
from tljax.weights.matcher import covers

BATCH = 32  # photographs at a time: their maps of one stage are held, twice
FIELDS = ("image_column", "label_column", "data_dir")  # of config.source, as of config.data
UNNAMED = "config.source.data = '': expected photographs of the source task, as folder:DIR"


@dataclasses.dataclass(frozen=True)
class Network:
    """The loaded weights, whole: nothing is reset, and the head tells the source's classes apart."""

    model: Any
    params: dict
    stats: dict
    classes: int


@dataclasses.dataclass(frozen=True)
class Photographs:
    """What there is of the source task; `split` gives labels that are the loaded head's classes, or −1."""

    name: str
    split: Split
    origin: str
    licence: str
    report: tuple[str, ...]  # lines that loading has to say

    @property
    def labelled(self) -> int:
        """How many photographs have a label."""
        return int((self.split.labels >= 0).sum())


def num_classes(exp: Experiment) -> int:
    """The number of classes of the loaded head. Raises UserError where nothing was loaded."""
    if exp.card is None:
        raise UserError("config.weights = '': no network is loaded, so there is no source task")
    return len(exp.classes) if exp.config.head == "zeroshot" else weights.num_classes(exp.card, exp.config.model)


def network(exp: Experiment) -> Network:
    """Loads the weights of an experiment as they were published. Raises UserError where there are none.

    With a zero-shot head they are a classifier already, of the experiment's own classes.
    """
    count = num_classes(exp)
    if exp.config.head == "zeroshot":
        plain = exp.config.copy_and_resolve_references()
        plain.update(strategy="frozen()", phases="", regulariser="")  # no adapters
        begun = build(plain, exp.classes)
        return Network(begun.model, *begun.load()[:2], count)
    model = exp.plain_model(count)
    shapes = models.shapes(model, size=exp.preprocessing.size)
    loaded = weights.load(exp.card, exp.config.model, shapes, (), exp.config.resize, other_channels(exp.config))
    return Network(model, loaded.params, loaded.batch_stats, count)


def under_loaded_head(exp: Experiment, net: Network, params: dict) -> tuple[Any, dict]:
    """(model, params) of a trained body as the source's classifier: a head that was reset is the loaded one again."""
    head = exp.model.stages[-1]
    paths = [path for path in exp.paths if path.split("/")[0] == head]
    if not any(covers(exp.reset, path) for path in paths):
        return exp.model.clone(axis_name=None), params
    return exp.model.clone(axis_name=None, num_classes=net.classes), {**params, head: net.params[head]}


def without_adapters(exp: Experiment, params: dict) -> tuple[Experiment, dict]:
    """The experiment with adapters folded into plain weights. Raises UserError for those that cannot be."""
    if not isinstance(exp.model, adapters.Adapted):
        return exp, params
    return replaced(exp, exp.model.model), host(adapters.merge(exp.model, frozen_dtype.widened(exp, params)))


def replaced(exp: Experiment, model: Any) -> Experiment:
    """The experiment with another model, for `evaluate.Evaluator`."""
    return dataclasses.replace(exp, model=model)


def photographs(config: Mapping, classes: int) -> Photographs:
    """Reads the photographs of `config.source`, each once, for a loaded head of so many classes. Raises UserError.

    Their labels are the head's classes where they are whole numbers (a folder's name, too), where there are as many
    classes as the head has (in their order), or where `config.source.classes` names them. Otherwise they have none.
    """
    if not config["data"]:
        raise UserError(UNNAMED)
    table = read({"source": config["data"]} | {name: config[name] for name in FIELDS})
    rows = np.arange(len(table.names)) if not config["split"] else np.flatnonzero(table.splits == config["split"])
    if table.keys is not None:
        _, first = np.unique(np.array([table.keys[row] for row in rows]), return_index=True)
        rows = rows[np.sort(first)]
    if config["limit"]:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[: config["limit"]])
    if not len(rows):
        raise UserError(f"config.source.data = {config['data']!r} has no photographs{_of(config['split'])}")
    labels, said = class_numbers(table, classes, _names(config["classes"], classes))
    split = Split(table, rows, labels[rows])
    count = int((split.labels >= 0).sum())
    report = [*table.notes, f"{len(rows):,} photographs of the source task{_of(config['split'])}, {count:,} labelled"]
    return Photographs(config["data"], split, table.origin, table.licence, tuple(report + ([said] if said else [])))


def _of(split: str) -> str:
    return f" in {split}" if split else ""


def _names(file: str, classes: int) -> tuple[str, ...]:
    if not file:
        return ()
    try:
        with open(file, encoding="utf-8") as lines:
            names = tuple(line.strip() for line in lines if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config.source.classes: {file}: {getattr(error, 'strerror', None) or error}") from None
    if len(names) != classes:
        raise UserError(f"config.source.classes: {file} names {len(names)} classes, the loaded head has {classes}")
    return names


def class_numbers(table: Table, classes: int, names: tuple[str, ...] = ()) -> tuple[np.ndarray, str]:
    """The class of the loaded head that each row is of, −1 for none, and a line where nothing tells them.

    Raises UserError for a number that the head does not have and for a name that `names` lacks.
    """
    values = [None if v in (None, -1) else v for v in table.labels]
    if table.class_names and (names or len(table.class_names) == classes):
        values = [None if v is None else table.class_names[int(v)] for v in values]
    found = sorted({v for v in values if v is not None}, key=str)
    if all(str(v).isdecimal() for v in found) and not (table.class_names and len(table.class_names) != classes):
        numbers = {v: int(v) for v in found}
        beyond = [n for n in numbers.values() if n >= classes]
        if beyond:
            raise UserError(f"source class {max(beyond)} found, the loaded head has the classes 0 to {classes - 1}")
    elif names:
        strange = [str(v) for v in found if str(v) not in names]
        if strange:
            raise UserError(f"source classes that config.source.classes does not name: {listing(strange, 3)}")
        numbers = {v: names.index(str(v)) for v in found}
    elif len(table.class_names or found) == classes:
        numbers = {v: i for i, v in enumerate(table.class_names or found)}
    else:
        said = f"{len(found)} class names, the loaded head has {classes} classes: used without labels"
        return np.full(len(values), -1, np.int32), said
    return np.array([-1 if v is None else numbers[v] for v in values], np.int32), ""


def figures(logits: np.ndarray, before: np.ndarray, labels: np.ndarray) -> dict:
    """What a classifier makes of the source task; logits [examples, classes], of it and of the loaded network.

    accuracy, top5 and nll over the labelled examples, where there are any; agreement, the share of examples on which
    both guess the same; kl, the mean KL divergence of its prediction from the loaded network's, in nats.
    """
    log_p, log_q = metrics.log_softmax(before), metrics.log_softmax(logits)
    known, found = labels >= 0, {}
    if known.any():
        truth, scores = labels[known], log_q[known]
        order = np.argsort(-scores, axis=1, kind="stable")
        found["accuracy"] = float((order[:, 0] == truth).mean())
        found["top5"] = float((order[:, :5] == truth[:, None]).any(axis=1).mean())
        found["nll"] = float(-scores[np.arange(len(truth)), truth].mean())
    found["agreement"] = float((log_p.argmax(-1) == log_q.argmax(-1)).mean())
    found["kl"] = float(max(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean()))
    return found


def batches(exp: Experiment, split: Split, limit: int = BATCH) -> Iterator[dict[str, np.ndarray]]:
    """The photographs in order, prepared as for evaluation: {"image", "label"} of at most `limit`, none filled up."""
    p = exp.preprocessing
    size = min(limit, len(split))
    for batch in eval_batches(
        split, batch_size=size, size=p.size, crop=p.crop, interpolation=p.interpolation,
        threads=exp.config.data.threads,
    ):  # fmt: skip
        known = batch["mask"] > 0
        yield {"image": batch["image"][known], "label": batch["label"][known]}


def task(exp: Experiment, given: str = "") -> tuple[Network, Photographs]:
    """The loaded network, and the photographs of `config.source` or of another source (`given`). Raises UserError."""
    net = network(exp)
    where = {**exp.config.source, **({"data": given, "split": ""} if given else {})}
    if not where["data"]:
        raise UserError("config.source.data is not set: give photographs of the source task, as --source=folder:DIR")
    return net, photographs(where, net.classes)


def host(tree: Any) -> Any:
    """A tree on one device as numpy arrays: what is measured there does not inherit the placement of a run."""
    return jax.tree.map(np.asarray, tree)

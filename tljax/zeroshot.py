"""Classifies photographs by the names of classes alone: `python -m tljax.zeroshot --weights=… --data=…`.

A CLIP says how well a photograph goes with each class's prompts (Radford et al. 2021); nothing is trained. The same
classifier is where fine-tuning begins with `config.head = "zeroshot"`.
"""

from tljax import command

USAGE = {
    "description": __doc__,
    "config": False,
    "weights": "a CLIP's: a name of the catalogue, a file, hf:org/name",
    "data": "the photographs, as config.data.source: folder:DIR, fruit, …",
    "classes": "their names: a file with a line each, or a list with commas (default: as the data call them)",
    "templates": "prompts: default, ensemble, or a file with a line each, {} for the class",
    "tokenizer": "a tokenizer.json, vocab.json, or list of merges (default: the one beside the weights)",
    "model": "the network (default: found out)",
    "split": "train, val, test or all (default: test where there is one, else all)",
    "workdir": "a folder for zeroshot.json (default: nothing is written)",
}
if __name__ == "__main__":  # before what is slow to import
    command.help_if_asked(**USAGE)

import json
from pathlib import Path

import numpy as np

from tljax import experiment, parallel, texts, weights
from tljax.config import base
from tljax.data import dataset
from tljax.errors import UserError, listing
from tljax.evaluate import Evaluator
from tljax.models import clip
from tljax.report import metrics, text
from tljax.stores import is_remote
from tljax.workdir import Workdir

BATCH = 64
SHOWN = 40  # classes, at most, in what is printed; the file has them all


def model_of(card: weights.Card) -> tuple[str, str]:
    """(the CLIP that weights are of, what is to be said about it): the card's, or found out. Raises UserError.

    Shapes tell all but the activation, which a file beside the weights may.
    """
    if card.model:
        texts.require(card.model, f"--weights={card.name}")
        return card.model, ""
    fitting = weights.fitting(card, clip.VARIANTS)
    if not fitting:
        raise UserError(
            f"weights {card.name!r} are of no CLIP: their arrays fit none of {', '.join(clip.VARIANTS)}; "
            "--model=NAME says of which one they should be, and then what does not fit"
        )
    activation, _ = texts.beside(card.source)
    model = next((name for name in fitting if clip.VARIANTS[name].image.activation == activation), fitting[0])
    if activation is None and len(fitting) > 1:
        others = " or ".join(f"--model={name}" for name in fitting if name != model)
        return model, f"taken for {model}: the arrays do not tell; otherwise {others}"
    return model, ""


def photographs(source: str, part: str, given: tuple[str, ...]) -> tuple[dataset.Split, tuple[str, ...], list[str]]:
    """(photographs with their labels, class names, lines to be said) of a source as in `config.data.source`.

    part: "train", "val", "test" or "all"; "": test where there is one, else all. given: class names, of which the
    data's are some, or as many as these in their order. Raises UserError.
    """
    table = dataset.read({"source": source})
    labels, own = dataset.class_numbers(table)
    there = sorted(set(table.splits.tolist()))
    if part not in ("", "all", *there):
        raise UserError(f"--split={part}: {source} has {', '.join(there)}; expected one of them, or all")
    part = part or ("test" if "test" in there else "all")
    rows = np.flatnonzero((labels >= 0) & ((table.splits == part) | (part == "all")))
    if table.keys is not None:
        _, first = np.unique(np.array([table.keys[row] for row in rows]), return_index=True)
        rows = rows[np.sort(first)]
    if not len(rows):
        raise UserError(f"--data={source}: no photograph with a class in {part}")
    said = [*table.notes, f"{len(rows):,} photographs of {len(own)} classes, {part}"]
    if not given:
        return dataset.Split(table, rows, labels[rows]), texts.readable(own), said
    plain = lambda name: " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
    place = {plain(name): i for i, name in enumerate(given)}
    strange = [name for name in own if plain(name) not in place]
    if not strange:
        labels = np.array([place[plain(name)] for name in own])[labels]
    elif len(own) == len(given):
        said.append(f"the classes of the data in their order: {listing(map(' = '.join, zip(own, given)), 3)}")
    else:
        raise UserError(
            f"--classes names {len(given)} classes and lacks {listing(strange, 3)} of the {len(own)} of {source}"
        )
    return dataset.Split(table, rows, labels[rows]), given, said


def measure(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict:
    """The figures of `metrics.classification`, top-5 where there are more classes, and 95 % intervals."""
    found = metrics.classification(logits, labels, classes)
    order = np.argsort(-logits, axis=1, kind="stable")
    if len(classes) > 5:
        found["top5"] = float((order[:, :5] == labels[:, None]).any(axis=1).mean())
    hits = lambda share: round(share * len(labels))
    found["interval"] = {k: metrics.interval(hits(found[k]), len(labels)) for k in ("accuracy", "top5") if k in found}
    confusion = np.array(found["confusion"])
    found["class_intervals"] = {
        name: metrics.interval(int(confusion[i, i]), int(confusion[i].sum())) if confusion[i].any() else None
        for i, name in enumerate(classes)
    }
    found["class_examples"] = dict(zip(classes, confusion.sum(axis=1).tolist()))
    return found


def lines(found: dict) -> list[str]:
    """What `measure` found, as text: the whole, then a line a class, the worst first where not all are shown."""
    said = []
    for key, name in (("accuracy", "top-1"), ("top5", "top-5")):
        if key in found:
            said.append(f"{name} {_with(found[key], found['interval'][key])}")
    said.append(f"NLL {found['nll']:.4f}, {found['examples']:,} photographs")
    seen = [name for name, count in found["class_examples"].items() if count]
    if len(seen) > SHOWN:
        seen = sorted(seen, key=lambda name: found["per_class"][name])[:SHOWN]
        said.append(f"the {SHOWN} classes of the lowest accuracy:")
    width = max(map(len, seen))
    for name in seen:
        accuracy = _with(found["per_class"][name], found["class_intervals"][name])
        said.append(f"{name:<{width}}  {accuracy} of {found['class_examples'][name]}")
    return said


def _with(share: float, interval: tuple[float, float]) -> str:
    low, high = (text.percent(bound) for bound in interval)
    return f"{text.percent(share, 2)} ({low} to {high})"


def main(argv: list[str]) -> int:
    """Classifies photographs with a CLIP by the classes' names: top-1, top-5 and each class's, with 95 % intervals."""
    from tljax.report.console import Console, quiet_libraries

    flags = command.from_command_line(argv, **USAGE)
    for name in ("weights", "data"):
        if not flags[name].value:
            raise UserError(f"no --{name}: {flags[name].help}")
    quiet_libraries()
    prompts = texts.templates(flags.templates)
    given = texts.names(flags.classes, "--classes") if flags.classes else ()
    split, classes, said = photographs(flags.data, flags.split, given)
    card = weights.card(flags.weights, flags.model)
    model, note = (flags.model, "") if flags.model else model_of(card)
    texts.require(model, f"--model={model}")
    config = base(model)
    config.update(weights=flags.weights, head="zeroshot", tokenizer=flags.tokenizer, batch_size=BATCH)
    config.templates = flags.templates or "default"
    layout = parallel.Layout.for_evaluation(BATCH)
    exp = experiment.build(config, classes, layout)
    console = Console()
    about = f"weights {exp.card.name}: {model}, {len(prompts)} prompts a class"
    for line in filter(None, (*said, about, note, exp.card.note)):
        console.print(line)
    params, stats, _ = exp.load()
    logits = Evaluator(exp, layout)(*layout.place((params, stats)), split)
    found = measure(logits, split.labels, classes)
    for line in lines(found):
        console.print(line)
    if flags.workdir:
        if not is_remote(flags.workdir):
            Path(flags.workdir).mkdir(parents=True, exist_ok=True)
        of = {"model": model, "weights": exp.card.name, "data": flags.data, "templates": list(prompts)}
        Workdir(flags.workdir).write("zeroshot.json", json.dumps(of | found, indent=2) + "\n")
        console.print(f"written to zeroshot.json in {flags.workdir}")
    return 0


if __name__ == "__main__":
    command.run(main)

"""Readers of texts: vocabularies, lists, configs and command lines, the folders of runs and sweeps."""

import gzip
import json
import os
import shlex
import tempfile
from pathlib import Path

import lies
import mutations as m
import numpy as np
from target import MB, Case, Target, saved


def _tokenizer() -> list[Case]:
    import clip_files
    from tokenizers import Tokenizer

    from tljax import tokens

    merges = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in clip_files.merges())]) + "\n"
    pair = {"vocab.json": json.dumps(clip_files.vocabulary()).encode(), "merges.txt": merges.encode()}

    def whole(path):
        for name, content in pair.items():
            path.with_name(name).write_bytes(content)
        found = tokens.load(str(path.with_name("vocab.json")))
        assert isinstance(found._backend, Tokenizer)
        found._backend.save(str(path))

    packed = gzip.compress(merges.encode(), mtime=0)
    return [pair, {"tokenizer.json": saved(whole)}, {"bpe_simple_vocab_16e6.txt.gz": packed}]


def _tokens(folder: Path) -> None:
    from tljax import tokens

    numbers = tokens.load(str(folder))(["a photo of the reds!", ""], 77)
    assert numbers.shape == (2, 77)
    assert numbers.min() >= 0


def _token_ways(name: str) -> tuple[m.Mutation, ...]:
    if name.endswith(".gz"):
        return (m.gzipped(m.TEXT), m.gzipped(m.TEXT), *m.BYTES)
    return (*m.JSON, m.deep) if name.endswith(".json") else m.TEXT


def _beside() -> list[Case]:
    ours = {"model_type": "clip", "text_config": {"hidden_act": "quick_gelu", "eos_token_id": 49407}}
    theirs = {"model_cfg": {"quick_gelu": True, "embed_dim": 8}}
    return [{"config.json": json.dumps(ours).encode()}, {"open_clip_config.json": json.dumps(theirs).encode()}]


def _told(folder: Path) -> None:
    from tljax import texts

    texts.beside.cache_clear()
    activation, end = texts.beside(str(folder))
    assert activation is None or isinstance(activation, str)
    assert end is None or isinstance(end, int)


def _lists() -> list[Case]:
    templates = b"a photo of a {}.\na {} far away.\n"
    return [{"classes": b"red apple\ngreen pear\nplum\n", "templates": templates}]


def _lines(folder: Path) -> None:
    from tljax import source, texts

    texts.readable(texts.names(str(folder / "classes")))
    texts.templates(str(folder / "templates"))
    source._names(str(folder / "classes"), 3)


LINES = """\
--config.optim.lr=3e-4 --config.train_for='2.5 epochs' --config.optim.warmup='10 %'
--config.strategy="partial(last=2, body=0.1)" --config.reset="('head',)"
--config.strategy="layerwise_decay(0.7, floor={'norm': 0.1})" --config.cache_limit='1.5 GB'
--config.strategy="first(frozen_norms(surgical('block1')), rules(('head', 1), ('**/bias', 0.5), ('!re:x.*', 0)))"
--config.strategy="lora(rank=4, targets='**/{conv,query}', rest=head_and('block2'))" --config.seed=3
--config.phases="lp_ft(head='5 steps', then=full(0.1))" --config.regulariser="l2_sp(strength=0.01)"
--config.phases="phases(('3 steps', frozen()), ('rest', full()))" --config.regulariser="ewc(strength={'**': 2.0})"
--config.data.val='fold:2/5' --config.data.test='fraction:0.2' --config.augment.randaugment='(2, 9)'
--config.sweep.optim.lr='loguniform(1e-4, 1e-1)' --config.search='random(8)' --config.halving='halving(2, 0.5)'
--config.sweep.optim.lr='(1e-3, 1e-2)' --config.sweep.train_for="('4 steps', '8 steps')" --config.search='grid()'
--config.sweep.optim.lr='uniform(0.1, 1.0)' --config.search="optuna(8, sampler='random')"
"""
CONFIG = b"""\
from tljax import grid
from tljax.config import base


def get_config():
    config = base("resnet_tiny")
    config.weights = ""
    config.sweep = grid.axes({"optim.lr": (0.1,), "train_for": ("2 steps",), "seed": range(2)})
    config.search = ""
    config.halving = ""
    return config
"""


def _overrides() -> list[Case]:
    return [{"line": line.encode()} for line in LINES.splitlines()]


def _parsed(folder: Path) -> None:
    """A command line as a command takes it, and every text in it that is a small language."""
    from tljax import command, config, grid, halving, models, patterns, phases, regularisers, search, strategies
    from tljax.data import splits
    from tljax.errors import UserError

    file = folder.with_name("config.py")
    if not file.exists():
        file.write_bytes(CONFIG)
    try:
        argv = shlex.split((folder / "line").read_text(encoding="utf-8", errors="replace"))
    except ValueError as error:  # the shell's, not ours
        raise UserError(str(error)) from error
    argv = [word for word in argv if word.startswith("--config.")]
    whole = command.from_command_line([f"--config={file}", *argv], "fuzz").config
    space, searched, _ = grid.space(whole), search.of(whole), halving.parse(whole.halving)
    assert searched is not None
    search.ends(space)
    given = space.base
    config.check(given)
    stages = models.create("resnet_tiny", 3).stages
    rules = strategies.parse(given.strategy)(stages)
    [patterns.matches(pattern, "block1/conv/kernel") for pattern, _ in rules]
    if given.phases:
        [strategy(stages) for _, strategy in phases.parse(given.phases)(stages)]
    regularisers.parse(given.regulariser)
    splits.parse("val", given.data.val, ("split", "none", "fold", "fraction"))
    splits.parse("test", given.data.test, ("split", "fraction"))
    config.from_json(config.to_json(given))


def _workdir() -> list[Case]:
    from tljax import config

    rows = [{"step": i, "epoch": i / 3, "train/loss": 0.5, "val/accuracy": 0.5, "val/nll": 1.0} for i in (2, 4, 6)]
    figures = {"nll": 1.0, "accuracy": 0.5, "macro_f1": 0.4, "per_class": {"a": {"accuracy": 0.5, "examples": 2}}}
    summary = {
        "name": "x", "steps": 6, "val": figures, "test": figures, "time": {"total": 3.0, "train": 2.0},
        "frozen": {"values": 10, "digest": "ab", "verified": True, "steps": 6}, "weights": {"name": "w"},
        "data": {"name": "d"}, "versions": {"jax": "0.10"}, "devices": "1 cpu",
    }  # fmt: skip
    return [
        {
            "config.json": config.to_json(config.base("resnet_tiny")).encode(),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
            "summary.json": json.dumps(summary).encode(),
        }
    ]


def _run(folder: Path) -> None:
    from tljax import config
    from tljax.workdir import Workdir

    workdir = Workdir(folder)
    found = workdir.config()
    config.check(found)
    workdir.claim(found)
    assert all(isinstance(row["step"], int) for row in workdir.rows())
    workdir.rewind(4)
    workdir.close()
    workdir.summary()


def _checkpoint() -> list[Case]:
    from tljax.checkpoint import Checkpoints

    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder)
        checkpoints.save(3, {"a": np.arange(6, dtype=np.float32), "step": np.int32(3)}, {"step": 3, "classes": ["x"]})
        checkpoints.close()
        files = [file for file in sorted(Path(folder).rglob("*")) if file.is_file()]
        return [{str(file.relative_to(folder)): file.read_bytes() for file in files}]


def _restored(folder: Path) -> None:
    import jax

    from tljax.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder, create=False)
    for step in checkpoints.steps():
        # What proves itself is what was saved.
        assert checkpoints.notes(step) == {"step": 3, "classes": ["x"]}
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {
            "a": jax.ShapeDtypeStruct((6,), np.float32, sharding=here),
            "step": jax.ShapeDtypeStruct((), np.int32, sharding=here),
        }
        found = checkpoints.restore(step, like)
        assert np.asarray(found["a"]).tolist() == [0, 1, 2, 3, 4, 5]
        assert int(found["step"]) == 3
    checkpoints.close()


def _sweep() -> list[Case]:
    from tljax import claims

    row = {
        "number": 0, "fields": {"optim.lr": 0.1}, "status": "trained", "steps": 4, "epochs": 1.0, "best": None,
        "val": {"nll": 1.0}, "test": {"nll": 1.0}, "curve": [{"step": 4, "loss": 1.0}],
    }  # fmt: skip
    plan = {"groups": [{"kept": "", "units": [[0, 1], [2]]}]}
    holder = claims.identity() | {"since": "2026-01-01 00:00:00"}
    result = {"worker": "a:1", "rows": [row]}
    return [{name: json.dumps(c).encode() for name, c in (("plan", plan), ("claim", holder), ("result", result))}]


def _worked(folder: Path) -> None:
    from tljax import claims
    from tljax.folder import Folder, _name

    whole = Folder(folder)
    for name, place in (("plan", f"plans/{_name([0, 1, 2])}/plan.json"), ("claim", "units/a/claim-0001"),
                        ("result", "units/a/result.json")):  # fmt: skip
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / name, folder / place)
    holder = claims.holder(folder / "units/a")
    assert holder is None or isinstance(f"{holder['worker']}, since {holder['since']}", str)
    units = whole.planned([0, 1, 2], lambda: [])
    [whole.place(unit) for unit in units]
    whole.workers()
    whole.results()


def _json_ways(name: str) -> tuple[m.Mutation, ...]:
    return (*m.JSON, m.deep) if not name.endswith(".jsonl") else (*m.TEXT, m.deep)


def _saved_ways(name: str) -> tuple[m.Mutation, ...]:
    return m.JSON if name.endswith(("metadata", "METADATA", ".json")) else m.BYTES


TARGETS = {
    "tokenizer": Target(_tokenizer, _tokens, _token_ways, share=0.3, lies=lies.tokenizer),
    "clip_config": Target(_beside, _told, _json_ways),
    "lists": Target(_lists, _lines, lambda name: m.TEXT),
    "overrides": Target(_overrides, _parsed, lambda name: (m.text, m.text, m.digits, m.flip), share=0.3),
    "workdir": Target(_workdir, _run, _json_ways, share=0.5),
    "checkpoint": Target(_checkpoint, _restored, _saved_ways, bound=512 * MB, share=0.2),
    "sweep": Target(_sweep, _worked, _json_ways),
}

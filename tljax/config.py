"""What an experiment is: one ConfigDict, its defaults, and how it is read from a file and a command line."""

import ast
import hashlib
import json
import operator
import re
from collections.abc import Container

from ml_collections import ConfigDict

from tljax import durations
from tljax.errors import UserError, listing, nearest, unknown
from tljax.files import parsed


def base(model: str = "efficientnet_lite0") -> ConfigDict:
    """Returns the default experiment, on a model's own weights; a config file changes the few fields it is about."""
    config = ConfigDict()
    config.name = "base"
    config.seed = 0

    config.model = model  # a name of tljax.models.names()
    config.drop_rate = 0.0  # dropout before the head; -1: the model's own default
    config.drop_path_rate = -1.0  # stochastic depth; -1: the model's own default
    config.image_size = 0  # height and width in pixels; 0: as the weights' card says
    config.channels = 3  # of the images that the network sees: 3, or 1 for grey; loaded kernels are adapted
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.param_dtype = "float32"

    config.weights = model  # a catalogue name, a file, "hf:org/name", or "" for random weights
    config.reset = ("head",)  # stages or paths that start anew instead of being loaded
    config.resize = ()  # paths that are resized to fit: position embeddings and patches, as "embed/position:bicubic"

    config.head = ""  # "zeroshot": a CLIP's vectors of the classes' names; "": drawn or loaded, as config.reset says
    config.templates = "default"  # prompts for it: a set of tljax.texts, or a file with a line each, {} for the class
    config.class_names = ""  # names for it, in the classes' order: a file with a line each, or a list; "": the data's
    config.tokenizer = ""  # its file, folder, "package:…" or "hf:org/name"; "": the one beside the weights

    config.strategy = "frozen()"  # what trains: a strategy of tljax.strategies, written as a call
    config.phases = ""  # strategies in time instead of one: a call of tljax.phases, as lp_ft(head='5 epochs')
    config.norm_stats = "plan"  # whose statistics move: norms that train ("plan"), none ("frozen"), all ("batch")
    config.train_for = "15 epochs"  # durations are "n steps" or "n epochs"
    config.batch_size = 16  # over all devices
    config.label_smoothing = 0.1

    config.cache = "auto"  # the frozen prefix computed once: "auto", "off", "memory" or "disk" (tljax.cache)
    config.cache_views = 0  # augmented views of each photograph, in turn by epoch; 0: each epoch draws new ones
    config.cache_limit = "4 GB"  # of features; what needs more goes on uncached
    config.cache_folder = ""  # of "disk"; "": ~/.cache/tljax/features

    config.ema = 0.0  # decay of the moving average of the trained weights that is evaluated; 0: none
    config.regulariser = ""  # against forgetting: a call of tljax.regularisers, as l2_sp(strength=0.01); "": none

    config.source = ConfigDict()  # the source task: what the loaded network could do before (tljax.source)
    config.source.data = ""  # its photographs, as config.data.source; "": forgetting is not measured
    config.source.split = ""  # "train", "val" or "test" of them; "": all
    config.source.limit = 0  # so many photographs, drawn with a fixed seed; 0: all
    config.source.classes = ""  # a text file with a name of the loaded head's classes a line; "": folders say numbers
    config.source.image_column = ""  # parquet and TFDS, as in config.data
    config.source.label_column = ""
    config.source.data_dir = ""  # of TFDS

    config.data = ConfigDict()
    config.data.source = "fruit"  # "fruit", "folder:DIR", "filenames:DIR", "parquet:PATH" or "tfds:NAME"
    config.data.num_classes = 0  # 0: as the data says
    config.data.val = "split"  # "split", "fold:2/5" (of train + val), "fraction:0.1", "none"
    config.data.test = "split"  # "split" or, where a folder has none, "fraction:0.2"
    config.data.fold_seed = 0
    config.data.on_bad = "stop"  # an unreadable image stops the run, or is counted and left out: "skip"
    config.data.limit = 0  # training examples a class; 0: all
    config.data.image_column = ""  # parquet; "": found out
    config.data.label_column = ""
    config.data.coarse_column = ""
    config.data.split_column = ""
    config.data.sha256 = ""  # of the parquet file; "": unchecked
    config.data.data_dir = ""  # of TFDS
    config.data.threads = 2

    config.augment = ConfigDict()
    config.augment.crop_min_scale = 0.3  # random-resized crop: smallest share of the area; 1: the centre crop
    config.augment.crop_ratio = (0.75, 4 / 3)
    config.augment.flip = True
    config.augment.color_jitter = 0.0
    config.augment.randaugment = ()  # (operations, magnitude)
    config.augment.mixup = 0.0  # alpha of the Beta distribution; 0: off
    config.augment.cutmix = 0.0
    config.augment.mix_at = "images"  # what mixup and CutMix mix: images, or the "features" behind the frozen prefix

    config.optim = ConfigDict()
    config.optim.name = "adamw"  # adamw, sgd or lamb
    config.optim.lr = 1e-2  # peak
    config.optim.schedule = "cosine"  # after the warm-up: cosine, linear or constant; slanted_triangular: the whole
    config.optim.warmup = "1.5 epochs"  # or a share, as "10 %", of the run (with restart: of the phase)
    config.optim.restart = False  # whether the schedule begins anew with each phase
    config.optim.weight_decay = 0.1
    config.optim.no_decay = ("**/bias", "**/scale", "**/position*")
    config.optim.momentum = 0.9  # of sgd
    config.optim.b1 = 0.9
    config.optim.b2 = 0.999
    config.optim.clip = 1.0  # global norm of the gradients of what trains; 0: off
    config.optim.accumulate = 1  # a step sums the gradients of this many parts of the batch

    config.log_every = "10 steps"
    config.eval_every = "1 epochs"
    config.checkpoint_every = "1 epochs"
    config.metric = "val/nll"  # by which a checkpoint is the best: val/nll, val/accuracy or val/macro_f1
    config.select = "last"  # the checkpoint of the final figures: "last" or "best" (a small val chooses badly)
    config.early_stop = 0  # end after this many evaluations without a better one; 0: never

    config.checkpoint = ConfigDict()
    config.checkpoint.delta = False  # leave out what has never trained: restoring takes it from the weights again

    config.stall = "10 minutes"  # without a step, after which the stacks of all threads are written down; "": never
    config.profile = ""  # a window of steps for the profiler, as "steps:100-110"; "": none (docs/watching.md)
    config.wandb = ""  # metrics go to Weights & Biases too: "PROJECT" or "ENTITY/PROJECT", extra wandb; "": no

    config.parallel = ConfigDict()
    config.parallel.mode = "jit"  # jit over a mesh, or pmap
    config.parallel.data = -1  # devices over which only the batch is laid; -1: the rest
    config.parallel.fsdp = 1  # devices over which each large leaf is laid, too; -1: the rest
    config.parallel.frozen_dtype = ""  # what never trains is stored so: "" as it is, or config.dtype
    config.parallel.remat = ""  # "stages": the backward pass computes a stage's activations again; "": keeps them
    config.parallel.members = 0  # devices over which the members of a sweep are laid; 0: all there are
    return config


def arguments(text: str, **defaults):
    """Reads a config file's argument (`last=6,model=resnet50`) over typed defaults; returns a ConfigDict.

    Raises UserError for an unknown name or a value of another type.
    """
    values = ConfigDict(defaults)
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if name not in defaults:
            raise unknown("argument of the config file", name, defaults)
        kind = type(defaults[name])
        try:
            if not equals or (kind is bool and value not in ("true", "false")):
                raise ValueError
            values[name] = value == "true" if kind is bool else kind(value)
        except ValueError:
            raise UserError(f"argument {item!r} of the config file: expected {name}=<{kind.__name__}>") from None
    return values


def duration(text: str, steps_per_epoch: float, field: str, whole: int | None = None) -> int:
    """Returns the number of steps in `"500 steps"`, `"1.5 epochs"` or `"10 %"` of `whole`, rounded to the nearest.

    Raises UserError for other texts, and for shares where there is no whole.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(steps?|epochs?|%)\s*", text)
    units = {"step": 1, "epoch": steps_per_epoch} | ({} if whole is None else {"%": whole / 100})
    try:
        number, unit = float(match[1]), units[match[2].rstrip("s")]
    except (TypeError, ValueError, KeyError):
        either = "'n steps' or 'n epochs'" if whole is None else "'n steps', 'n epochs' or 'n %'"
        raise UserError(f"config.{field} = {text!r}: expected {either}") from None
    steps = number * unit
    if not steps < 2**31:
        raise UserError(f"config.{field} = {text!r}: expected fewer than {2**31} steps")
    return round(steps)


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def nbytes(value: str, field: str) -> int:
    """Returns the bytes in `"500 MB"` or `"1.5 GB"`. Raises UserError for other texts."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]B)\s*", value)
    if not match:
        raise UserError(f"config.{field} = {value!r}: expected a number of {listing(UNITS)}, as '4 GB'")
    count = float(match[1]) * UNITS[match[2]]
    if not count < 2**63:
        raise UserError(f"config.{field} = {value!r}: expected fewer than 2**63 bytes")
    return round(count)


CHOICES = {
    "cache": ("auto", "off", "memory", "disk"),
    "augment.mix_at": ("images", "features"),
    "channels": (1, 3),
    "dtype": ("float32", "bfloat16", "float16"),
    "param_dtype": ("float32", "bfloat16"),
    "head": ("", "zeroshot"),
    "source.split": ("", "train", "val", "test"),
    "data.on_bad": ("stop", "skip"),
    "optim.name": ("adamw", "sgd", "lamb"),
    "optim.schedule": ("cosine", "linear", "constant", "slanted_triangular"),
    "norm_stats": ("plan", "frozen", "batch"),
    "metric": ("val/nll", "val/accuracy", "val/macro_f1"),
    "select": ("last", "best"),
    "parallel.mode": ("jit", "pmap"),
    "parallel.frozen_dtype": ("", "bfloat16", "float16"),
    "parallel.remat": ("", "stages"),
}
AT_LEAST = dict.fromkeys(("batch_size", "optim.accumulate", "data.threads"), 1) | dict.fromkeys(
    ("seed", "image_size", "cache_views", "label_smoothing", "ema", "early_stop", "data.num_classes", "data.fold_seed",
     "data.limit", "parallel.members", "source.limit", "augment.mixup", "augment.cutmix", "optim.lr",
     "optim.weight_decay", "optim.momentum", "optim.b1", "optim.b2", "optim.clip"), 0,
) | {"drop_rate": -1, "drop_path_rate": -1}  # fmt: skip
AT_MOST = {"seed": 2**32 - 1, "label_smoothing": 1}
BELOW = dict.fromkeys(("ema", "drop_rate", "drop_path_rate", "optim.momentum", "optim.b1", "optim.b2"), 1)


def check(config: ConfigDict) -> None:
    """Raises UserError for a value that no run could use, before anything is loaded."""
    fields = flatten(config)
    for field in set(flatten(base())) - set(fields):
        raise UserError(f"config.{field} is missing: start the config file from tljax.config.base()")
    for field in set(fields) - set(flatten(base())):
        raise UserError(f"unknown config field {field!r}{nearest(field, flatten(base()))}")
    for field, default in flatten(base()).items():
        kind, value = type(default), fields[field]
        if not isinstance(value, int | float if kind is float else kind) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"config.{field} = {value!r}: expected {kind.__name__}, as {default!r}")
    for field in ("reset", "resize", "optim.no_decay"):
        for pattern in fields[field]:
            if not isinstance(pattern, str):
                raise UserError(f"config.{field} = {fields[field]!r}: {pattern!r} is no path or pattern")
    for field, choices in CHOICES.items():
        if fields[field] not in choices:
            raise UserError(f"config.{field} = {fields[field]!r}: expected one of {', '.join(map(str, choices))}")
    for bounds, fits, words in (
        (AT_LEAST, operator.ge, "at least"), (AT_MOST, operator.le, "at most"), (BELOW, operator.lt, "less than"),
    ):  # fmt: skip
        for field, bound in bounds.items():
            if not fits(fields[field], bound):
                raise UserError(f"config.{field} = {fields[field]!r}: expected {words} {bound}")
    for field in ("train_for", "log_every", "eval_every", "checkpoint_every"):
        duration(fields[field], 1.0, field)
    duration(fields["optim.warmup"], 1.0, "optim.warmup", whole=1)
    nbytes(fields["cache_limit"], "cache_limit")
    durations.seconds(fields["stall"], "stall")
    durations.window(fields["profile"], "profile")
    if not re.fullmatch(r"([\w.-]+/)?[\w.-]+|", fields["wandb"]):
        raise UserError(f"config.wandb = {fields['wandb']!r}: expected 'PROJECT' or 'ENTITY/PROJECT'")
    if "://" in fields["cache_folder"]:
        raise UserError(f"config.cache_folder = {fields['cache_folder']!r}: features are kept in a local folder")


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict:
    """Returns {dotted name: value} of every field."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, one field a line."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    """The inverse of `to_json`; lists come back as tuples."""

    def tuples(value):
        if isinstance(value, dict):
            return {k: tuples(v) for k, v in value.items()}
        return tuple(map(tuples, value)) if isinstance(value, list) else value

    return ConfigDict(tuples(parsed(text)))


def digest(config: ConfigDict) -> str:
    """Eight hexadecimal digits that tell configs apart, for the names of workdirs."""
    said = {name: value for name, value in config.to_dict().items() if name not in WATCHING}
    return hashlib.sha256((json.dumps(said, indent=2) + "\n").encode()).hexdigest()[:8]


# How a run is watched, and no part of what it computes: it may go on, in the same folder, under others.
WATCHING = ("stall", "profile", "wandb")
# How a run is laid over its devices, and no part of what it computes: it may go on under others.
ELASTIC = ("parallel.mode", "parallel.data", "parallel.fsdp", "parallel.remat")


def differences(old: ConfigDict, new: ConfigDict, but: Container[str] = ()) -> list[str]:
    """Returns a `field: old → new` for every field that differs, `but` for some that may."""
    a, b = flatten(old), flatten(new)
    return [f"{k}: {a.get(k)!r} → {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k) and k not in but]


def call(text: str, functions: dict, kind: str):
    """Evaluates `name(1, key="x")` with literal arguments and nested calls, and nothing else.

    `functions` are those that may be called. Raises UserError: unknown names, wrong arguments, other syntax.
    """
    try:
        tree = ast.parse(text, mode="eval").body
    # Also of null bytes, and of what is nested too deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{kind} {text!r} cannot be read: expected a call, as partial(last=4)") from None

    def value(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return invoke(node.func.id, node.args, node.keywords)
        if isinstance(node, ast.Name):
            return invoke(node.id, [], [])
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(value(element) for element in node.elts)
        if isinstance(node, ast.Dict):
            return {value(k): value(v) for k, v in zip(node.keys, node.values, strict=True)}
        try:
            return ast.literal_eval(node)
        except (ValueError, TypeError):
            raise UserError(f"{kind} {text!r}: {ast.unparse(node)!r} is neither a call nor a value") from None

    def invoke(name, positional, named):
        if name not in functions:
            raise unknown(kind, name, functions)
        try:
            return functions[name](*map(value, positional), **{k.arg: value(k.value) for k in named})
        except TypeError as error:
            raise UserError(f"{kind} {text!r}: {error}") from None

    if not isinstance(tree, ast.Call | ast.Name):
        raise UserError(f"{kind} {text!r} cannot be read: expected a call, as partial(last=4)")
    return value(tree)

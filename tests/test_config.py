"""Configs: durations, arguments, the command line; and what each mistake is told."""

import pytest

from tljax import command
from tljax import config as configs
from tljax.errors import UserError

FILE = """
from tljax.config import arguments, base

def get_config(arg=""):
    given = arguments(arg, last=4, model="efficientnet_lite0", rate=0.5, fast=False)
    config = base()
    config.strategy = f"partial(last={given.last})"
    return config
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "partial.py"
    path.write_text(FILE)
    return str(path)


def read(*argv):
    return command.from_command_line(list(argv), "About.", workdir="the folder")


def test_overrides_and_arguments(file):
    flags = read(f"--config={file}:last=6", "--config.optim.lr=3e-4", "--config.reset=('head','top')", "--workdir=w")
    assert flags.config.strategy == "partial(last=6)"
    assert flags.config.optim.lr == 3e-4
    assert flags.config.reset == ("head", "top")
    assert flags.workdir == "w"
    assert read(f"--config={file}").workdir == ""


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no --config: give an experiment"),
        (["--config=DIR/partail.py"], "no config file '.*partail.py'; nearest: .*partial.py"),
        (["--config=FILE", "--config.optim.lrr=1"], "unknown config field 'optim.lrr'; nearest: optim.lr"),
        (["--config=FILE", "--config.sead=1"], "unknown config field 'sead'; nearest: seed"),
        (["--config=FILE", "--config.optim.lr=fast"], "config.optim.lr=fast: could not convert string to float"),
        (["--config=FILE", "--config.seed=1.5"], "config.seed=1.5: invalid literal for int"),
        (["--config=FILE", "--config.augment.flip=perhaps"], "config.augment.flip=perhaps: .*[Bb]oolean"),
        (["--config=FILE", "--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        (["--config=FILE", "last=6"], "unexpected argument 'last=6'"),
        (["--config=FILE:depth=6"], "unknown argument of the config file 'depth'; there are: fast, last, model, rate"),
        (["--config=FILE:last=six"], "argument 'last=six' of the config file: expected last=<int>"),
        (["--config=FILE:fast=yes"], "expected fast=<bool>"),
        (["--config=FILE:last"], "expected last=<int>"),
    ],
)
def test_mistakes_get_one_line(file, argv, message):
    argv = [a.replace("FILE", file).replace("DIR", file.rpartition("/")[0]) for a in argv]
    with pytest.raises(UserError, match=message) as error:
        read(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["def get_config(:\n", "import nonexistent_module\n", "x = 1\n", "def get_config(arg=''):\n    return 3\n"]
)
def test_broken_config_files_get_one_line(tmp_path, text):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(UserError, match=r"broken\.py") as error:
        read(f"--config={path}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("optim.name", "adam", r"config.optim.name = 'adam': expected one of adamw, sgd, lamb"),
        ("dtype", "int8", "expected one of float32, bfloat16"),
        ("batch_size", 0, "config.batch_size = 0: expected at least 1"),
        ("train_for", "20", "config.train_for = '20': expected 'n steps' or 'n epochs'"),
        ("eval_every", "1.2.3 epochs", "config.eval_every = '1.2.3 epochs'"),
        ("train_for", "10 %", "config.train_for = '10 %': expected 'n steps' or 'n epochs'"),
        ("optim.warmup", "10 pct", "config.optim.warmup = '10 pct': expected 'n steps', 'n epochs' or 'n %'"),
        ("parallel.mode", "pjit", "expected one of jit, pmap"),
    ],
)
def test_values_that_no_run_could_use(field, value, message):
    config = configs.base()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=message):
        configs.check(config)


def test_a_field_that_base_does_not_have_is_named():
    config = configs.base()
    config.optim.learning_rate = 1.0
    with pytest.raises(UserError, match=r"unknown config field 'optim.learning_rate'"):
        configs.check(config)


@pytest.mark.parametrize(
    ("text", "steps"), [("20 steps", 20), ("1 step", 1), ("2 epochs", 85), ("0.5 epochs", 21), ("1e3 steps", 1000)]
)
def test_durations(text, steps):
    assert configs.duration(text, 42.3, "train_for") == steps


def test_json_keeps_every_field_and_differences_name_them():
    config = configs.base()
    again = configs.from_json(configs.to_json(config))
    assert configs.flatten(again) == configs.flatten(config)
    assert configs.digest(again) == configs.digest(config)
    again.optim.lr = 0.5
    assert configs.differences(config, again) == ["optim.lr: 0.01 → 0.5"]
    assert configs.digest(again) != configs.digest(config)

"""The loop around the step: it leaves the device no time to wait, neither for the host nor for input."""

import importlib
import re
import threading
import time

import jax
import pytest
from conftest import changed, script
from jax._src.array import ArrayImpl

from tljax import data, loop, texts, train, waiting
from tljax.report import console
from tljax.workdir import Workdir

COMMANDS = (
    "train", "plan", "evaluate", "predict", "sweep", "convert", "auto_rgn", "forgetting", "wise_ft", "zeroshot",
    "models", "adapters", "status",
)  # fmt: skip


class Stopped(Exception):
    """The part of a run that is looked at is over."""


@pytest.fixture
def begun(tiny, tmp_path, monkeypatch):
    """Starts tiny runs (fields) that end before their final figures, and gives the `train.Run`."""

    def start(**fields):
        runs, fit = [], loop.fit

        def fitted(run, state):
            runs.append(run)
            fit(run, state)
            raise Stopped

        fields = {"data_val": "none", "log_every": "4 steps", "checkpoint_every": "9 epochs"} | fields
        with monkeypatch.context() as m:
            m.setattr(loop, "fit", fitted)
            with pytest.raises(Stopped):
                train.main(changed(tiny, tmp_path / "run", **fields))
        return runs[0]

    return start


def test_nothing_is_fetched_from_the_device_between_the_rows_of_metrics(begun, monkeypatch):
    """All ways from an array on the device to a number or an array on the host are counted, step by step."""
    fetched, given = [], []
    value, wait = ArrayImpl.__dict__["_value"], ArrayImpl.block_until_ready
    main = lambda: threading.current_thread() is threading.main_thread()

    def seen(how, original):
        def call(self, *args):
            if main() and given:
                fetched.append((len(given), how))
            return original(self, *args)

        return call

    def counting(self, result, original=waiting.InputWait.given):
        given.append(result)
        original(self, result)

    monkeypatch.setattr(ArrayImpl, "_value", property(seen("value", value.fget)))
    monkeypatch.setattr(ArrayImpl, "block_until_ready", seen("wait", wait))
    monkeypatch.setattr(jax, "block_until_ready", seen("wait", jax.block_until_ready))
    monkeypatch.setattr(waiting.InputWait, "given", counting)
    begun(train_for="11 steps")
    assert len(given) == 11
    # The first step is timed; metrics come with each fourth step and with the last, then the run ends.
    assert {step for step, _ in fetched} == {1, 4, 8, 11}
    assert any(how == "value" for _, how in fetched)


def test_the_state_is_donated(begun):
    """Every array of the new state lies where one of the old has lain."""
    run = begun(train_for="2 steps", optim_warmup="1 steps")
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", run.train_step.as_text())[1]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}", aliases)
    leaves = len(jax.tree.leaves(run.train_step.args_info[0][0]))
    assert leaves > 20
    assert sorted(int(out) for out, _ in pairs) == list(range(leaves))


def test_a_step_that_waits_for_photographs_says_so(begun, monkeypatch):
    def slow(*args, original=data.train_batches, **kwargs):
        for batch in original(*args, **kwargs):
            time.sleep(0.4)
            yield batch

    monkeypatch.setattr(data, "train_batches", slow)
    run = begun(train_for="5 steps", cache="off")
    assert run.waited > 0.4 * 4 * 0.4  # but for the first step's, and what steps take on a loaded machine
    assert run.waited <= run.clock.seconds["train"]


def test_features_are_no_input_to_wait_for(begun, monkeypatch):
    """Computing them is the device's work, with a time of its own."""
    parts = train.cache.FeatureCache._parts

    def slow(*args):
        for part in parts(*args):
            time.sleep(0.1)
            yield part

    monkeypatch.setattr(train.cache.FeatureCache, "_parts", slow)
    fields = {"cache": "memory", "cache_views": 2, "strategy": "frozen()", "train_for": "20 steps"}
    run = begun(**fields)
    assert run.clock.seconds["features"] > 6 * 0.1  # two views of 24 photographs, 8 at a time
    assert run.waited < 0.5 * run.clock.seconds["features"]


def test_only_the_time_in_which_the_device_is_idle_counts():
    """Steps of 0.1 s as a device would take them, and batches of 0.15 s: 0.05 s are lost a step."""

    class Result:
        def __init__(self, until):
            self.until = until

        def block_until_ready(self):
            time.sleep(max(0.0, self.until - time.perf_counter()))

    def waited(step, batch, busy=0.0, count=4):
        with waiting.InputWait() as wait:
            for _ in range(count + 1):
                asked = time.perf_counter()
                time.sleep(batch)
                wait.arrived(asked, busy)
                wait.given(Result(time.perf_counter() + step))
            return wait.seconds

    assert waited(0.1, 0.15) == pytest.approx(4 * 0.05, abs=0.05)
    assert waited(0.15, 0.05) == 0.0
    assert waited(0.0, 0.05) == pytest.approx(4 * 0.05, abs=0.05)
    assert waited(0.0, 0.05, busy=0.04) == pytest.approx(4 * 0.01, abs=0.03)


def test_the_input_wait_is_told_everywhere(trained):
    summary = Workdir(trained).summary()
    assert 0 <= summary["input_wait"]["share"] <= 1
    share = summary["input_wait"]["seconds"] / summary["time"]["train"]
    assert summary["input_wait"]["share"] == pytest.approx(share, abs=0.01)
    rows = console.final_rows(summary | {"input_wait": {"seconds": 3.0, "share": 0.25}})
    assert rows["input wait"] == "25.0 % of the time in training"
    assert "input wait" in (trained / "report.html").read_text()
    assert {"start", "data", "model", "weights", "compile", "first step", "train"} <= set(summary["time"])
    assert sum(v for k, v in summary["time"].items() if k != "total") <= summary["time"]["total"] + 0.1


def test_help_comes_before_anything_slow_is_imported():
    """In one process: each command's module is run as `python -m` would, and what it imports is looked at."""
    text = f"""
import contextlib, io, runpy, sys
for name in {COMMANDS!r}:
    sys.argv, out = [name, "--help"], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module("tljax." + name, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (name, end.code)
    said = out.getvalue()
    assert said.split("Flags:")[1].strip(), (name, said)
    heavy = {{"jax", "flax", "optax", "orbax", "matplotlib", "rich", "numpy", "cv2", "grain", "tensorflow"}}
    assert not heavy & set(sys.modules), (name, heavy & set(sys.modules))
print("quick")
"""
    out, err = script(text).communicate(timeout=60)
    assert out.strip() == "quick", err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_what_the_command_takes(name, capsys):
    """The same flags as those which `main` parses."""
    module = importlib.import_module(f"tljax.{name}" + (".__main__" if name in ("models", "adapters") else ""))
    with pytest.raises(SystemExit):
        module.main(["--help"])
    said = capsys.readouterr().out
    flags = {key for key in module.USAGE if key not in ("description", "config", "rest")}
    assert flags <= {flag.strip("-=…") for flag in re.findall(r"--\w+", said)}
    assert ("--config=FILE" in said) == module.USAGE.get("config", True)


def test_the_help_names_all_sets_of_prompts():
    from tljax import zeroshot

    assert all(name in zeroshot.USAGE["templates"] for name in texts.TEMPLATES)

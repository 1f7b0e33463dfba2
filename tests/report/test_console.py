import io
import logging
import os
import pty
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from tljax.report import console, text
from tljax.report.table import plan_table

ROWS = [
    {"stage": "stem", "parameters": 928, "trainable": 0, "multiplier": 0, "decay": "no", "norm": "stored",
     "optimizer_bytes": 0},
    {"stage": "head", "parameters": 17934, "trainable": 17934, "multiplier": "0.1–1", "decay": "some",
     "norm": "-", "optimizer_bytes": 143472},
]  # fmt: skip
TOTALS = {"parameters": 18862, "trainable": 17934, "optimizer_bytes": 143472}
SUMMARY = {
    "test": {"accuracy": 0.8123, "coarse_accuracy": 0.9, "macro_f1": 0.79, "nll": 0.6, "ece": 0.03,
             "examples": 661},
    "best": {"step": 588, "metric": "val/accuracy", "value": 0.877},
    "plan": {"parameters": 18862, "trainable": 17934}, "frozen": {"values": 928, "verified": True},
    "time": {"train": 171.0, "total": 204.0}, "peak_memory_bytes": 2.5 * 2**30, "images_per_second": 63.4,
}  # fmt: skip


def plain():
    file = io.StringIO()
    return console.Console(file=file), file


def test_plain_output_has_no_escape_codes_and_keeps_markup():
    out, file = plain()
    out.header({"devices": "8 × cpu", "data": ["[bold]fruit[/bold]", "675 train"], "nothing": None})
    out.plan(plan_table(ROWS, TOTALS, [("head/.*", 1.0, 2)]))
    with out.progress(20, every=10) as progress:
        for step in range(1, 21):
            progress.update(step, {"loss": np.float32(2 / step), "accuracy": step / 20}, 143.2)
    out.evaluation(20, {"accuracy": 0.78, "confusion": [[1]], "loss": 0.812}, best=True)
    out.final(SUMMARY)
    said = file.getvalue()
    assert "\x1b" not in said
    assert "\r" not in said
    assert "[bold]fruit[/bold]" in said
    assert "nothing" not in said
    assert [line for line in said.splitlines() if line.startswith("step")] == [
        "step 10/20  loss 0.200  accuracy 0.500  images/s 143  left 0:00",
        "step 20/20  loss 0.100  accuracy 1.000  images/s 143  left 0:00",
    ]
    assert "evaluation at step 20  loss 0.812  accuracy 0.780  best so far\n" in said
    for figure in ("81.23 %", "90.00 %", "0.7900", "0.6000", "661", "588", "17,934 of 18,862", "3 min 24 s"):
        assert figure in said, figure


def test_progress_survives_no_steps_and_a_resumed_end():
    for total, start in ((0, 0), (10, 10)):
        out, file = plain()
        with out.progress(total, start=start):
            pass
        assert file.getvalue() == ""
    out, file = plain()
    with out.progress(130, start=125, every=10) as progress:
        for step in range(126, 131):
            progress.update(step, {})
    assert file.getvalue().startswith("step 130/130  left 0:00")


def test_time_left_is_steps_left_times_pace(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    out, file = plain()
    with out.progress(100) as progress:
        progress.update(1)  # the first step compiles: it is not part of the pace
        now[0] += 20
        progress.update(11)
    assert [line.split("left ")[1] for line in file.getvalue().splitlines()] == ["-:--", "2:58"]  # 89 · 2 s


def test_disabled_is_silent():
    file = io.StringIO()
    out = console.Console(enabled=False, file=file)
    out.header({"a": "b"})
    out.print("x")
    out.plan(plan_table(ROWS, TOTALS, []))
    with out.progress(2) as progress:
        progress.update(1, {"loss": 1.0}, 1.0)
    out.evaluation(1, {"accuracy": 1.0})
    out.final(SUMMARY)
    assert file.getvalue() == ""


def test_long_lines_are_not_broken():
    out, file = plain()
    out.print("x" * 500)
    out.header({"weights": "y " * 300})
    assert "x" * 500 in file.getvalue()
    assert "y " * 299 + "y" in file.getvalue()


def test_a_stream_without_unicode_does_not_stop_the_run():
    raw = io.BytesIO()
    out = console.Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    out.plan(plan_table(ROWS, TOTALS, []))
    assert b"head" in raw.getvalue()


SCRIPT = """
from tljax.report.console import Console
out = Console()
out.header({"data": "fruit"})
with out.progress(3) as progress:
    for step in (1, 2, 3):
        progress.update(step, {"loss": 0.5, "accuracy": 0.25}, 10.0)
    out.evaluation(3, {"accuracy": 0.5})
with out.progress(0):
    pass
"""


def run_in_terminal(**env) -> str:
    parent, child = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **env}
    run = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=child, stderr=child, env=env)
    os.close(child)
    said = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux says EIO once the other side has closed
            break
        if not part:
            break
        said += part
    os.close(parent)
    assert run.wait(timeout=60) == 0
    return said.decode()


def test_a_terminal_gets_a_bar():
    said = run_in_terminal()
    assert "\x1b[" in said
    assert "━" in said
    assert "3/3" in said
    assert "loss 0.500  accuracy 0.250  10 images/s  left 0:00" in said
    assert "evaluation at step 3" in said
    assert "nothing to do" in said


def test_a_dumb_terminal_gets_plain_lines():
    assert "\x1b" not in run_in_terminal(TERM="dumb")


def test_quiet_libraries_leaves_errors_and_others():
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("orbax.checkpoint.x", "absl", "jax.x", "mine")]
    root, filters = logging.getLogger(), list(warnings.filters)
    levels = {name: logging.getLogger(name).level for name in console.LIBRARIES}
    environment = dict(os.environ)
    root.addHandler(handler)
    try:
        console.quiet_libraries()
        logging.getLogger("absl").setLevel(logging.INFO)  # as absl.app does when it starts
        for logger in loggers:
            logger.warning(f"{logger.name} warns")
            logger.error(f"{logger.name} fails")
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("old", UserWarning, "x.py", 1, module="orbax.checkpoint")
            warnings.warn_explicit("own", UserWarning, "x.py", 1, module="jaxish")
    finally:
        root.removeHandler(handler)
        warnings.filters[:] = filters
        os.environ.clear()
        os.environ.update(environment)
        for name, level in levels.items():
            logger = logging.getLogger(name)
            logger.setLevel(level)
            logger.filters = [f for f in logger.filters if not isinstance(f, console._ErrorsOnly)]
    wanted = ["jax.x fails", "mine warns", "mine fails"]  # orbax raises what it logs
    assert [m for m in heard if m.split()[0] in ("orbax.checkpoint.x", "absl", "jax.x", "mine")] == wanted
    assert [str(w.message) for w in caught] == ["own"]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (72, "1:12"), (3661, "1:01:01"), (200000, "2 d 7 h"),
     (None, "-:--"),
     (float("nan"), "-:--"), (float("inf"), "-:--")],
)  # fmt: skip
def test_clock(seconds, said):
    assert text.clock(seconds) == said


@pytest.mark.parametrize(
    ("write", "value", "said"),
    [(text.size, 0, "0 B"), (text.size, 1023, "1.00 KiB"), (text.size, 143472, "140 KiB"),
     (text.size, 2.7e9, "2.51 GiB"), (text.thousands, 1234567, "1,234,567"), (text.duration, 0.4, "0.40 s"),
     (text.duration, 59.97, "1 min 00 s"), (text.duration, 7380, "2 h 03 min"),
     (text.percent, 0.8123, "81.2 %"), (text.number, 0.81234, "0.812"), (text.number, 3e-5, "3.00e-05"),
     (text.number, 12345.0, "1.23e+04"),
     (text.number, 0.0, "0.000"), (text.flops, 1.83e10, "18.3 GFLOP"), (text.size, None, "-"),
     (text.number, float("nan"), "nan")],
)  # fmt: skip
def test_numbers(write, value, said):
    assert write(value) == said

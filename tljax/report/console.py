"""What a run says on the terminal: a live bar where there is one, plain lines where there is none."""

import contextlib
import logging
import os
import sys
import time
import warnings

from rich import progress as bars
from rich.console import Console as Rich
from rich.table import Table
from rich.text import Text

from tljax.report import text

LIBRARIES = (
    "absl", "orbax", "jax", "jaxlib", "flax", "optax", "grain", "etils", "tensorboardX", "matplotlib", "PIL",
    "tensorflow", "tensorflow_datasets", "h5py", "asyncio", "fsspec", "gcsfs", "s3fs",
    "ml_collections",
)  # fmt: skip
RAISING = ("absl", "orbax", "asyncio")  # orbax logs the traceback of every thread that fails, and raises it again
ACCURACIES = (("accuracy", "accuracy"), ("coarse_accuracy", "coarse accuracy"))
LOSSES = (("macro_f1", "macro F1"), ("nll", "negative log-likelihood"), ("ece", "calibration error"))
RATES = ("loss", "accuracy")  # what the bar shows, in this order; other metrics follow in plain lines


def quiet_libraries():
    """Silences the libraries' own logging and warnings; errors are still heard, but where they are raised as well.

    Call it before jax is imported: XLA's C++ side reads its level from the environment once.
    """
    # 3 leaves fatal messages only: what fails in XLA comes as a Python error anyway.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.CRITICAL if name in RAISING else logging.ERROR)
        # absl.app and jax set the level of their loggers anew when they start: a filter stays.
        if not any(isinstance(f, _ErrorsOnly) for f in logger.filters):
            logger.addFilter(_ErrorsOnly(name))
    if "absl.logging" in sys.modules:
        sys.modules["absl.logging"].set_verbosity("error")
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")  # orbax's, when a save fails
    for name in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")


class _ErrorsOnly(logging.Filter):
    def filter(self, record):
        return record.levelno >= (logging.CRITICAL if self.name in RAISING else logging.ERROR)


class Console:
    """The run's voice. `enabled=False` (processes other than 0) says nothing; `file` defaults to stdout.

    A terminal gets colours and a live bar; anything else gets plain lines without escape codes.
    """

    def __init__(self, enabled: bool = True, file=None):
        file = file or sys.stdout
        if hasattr(file, "reconfigure"):
            file.reconfigure(errors="replace")  # a terminal without Unicode must not stop a run
        self.enabled = enabled
        self.live = enabled and file.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
        self._rich = Rich(
            file=file, quiet=not enabled, force_terminal=self.live, force_jupyter=False, highlight=False,
            markup=False, emoji=False, color_system="auto" if self.live else None,
        )  # fmt: skip

    def print(self, value="", style: str | None = None):
        """Prints a text as it is (no markup, no wrapping), or anything that rich can render."""
        self._rich.print(value, style=style, soft_wrap=isinstance(value, str))

    def header(self, rows: dict):
        """Prints what the run stands on, a row each; a value may be a list: one line each."""
        self._pairs("tljax", {k: v for k, v in rows.items() if v not in (None, "", [], ())})

    def plan(self, table):
        """Prints the plan's table (`report.table.plan_table`)."""
        self.print()
        self._rich.print(table if self.live else str(table), soft_wrap=True)
        self.print()

    @contextlib.contextmanager
    def progress(self, total_steps: int, start: int = 0, every: int = 1):
        """Gives a context whose `.update(step, metrics, images_per_s)` shows them and the time left.

        start: the step that a resumed run begins with; every: without a terminal, a line each so many steps.
        """
        if not self.live:
            yield Lines(self, total_steps, start, every)
            return
        narrow = self._rich.width < 90
        columns = [
            bars.TextColumn("[bold]step"),
            bars.BarColumn(10 if narrow else 24, complete_style="cyan", finished_style="green"),
            bars.MofNCompleteColumn(),
            bars.TextColumn("{task.fields[said]}", markup=False),
        ]
        with bars.Progress(*columns, console=self._rich, refresh_per_second=5) as progress:
            yield Bar(progress, total_steps, start, narrow)

    def evaluation(self, step: int, metrics: dict, best: bool = False):
        """One line for an evaluation at a step; `best` marks the best one so far."""
        line = Text(f"evaluation at step {step:,}  ")
        line.append(_figures(metrics))
        if best:
            line.append("  best so far", style="bold green")
        self._rich.print(line, soft_wrap=True)

    def final(self, summary: dict):
        """Prints the final figures of summary.json; parts that are missing are left out."""
        self.print()
        self._pairs("final figures", final_rows(summary))

    def _pairs(self, title: str, rows: dict):
        if not rows:
            return
        self.print(title, style="bold")
        if self.live:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="cyan", no_wrap=True)
            grid.add_column(overflow="fold")
            for key, value in rows.items():
                for i, line in enumerate(_lines(value)):
                    grid.add_row(Text("" if i else f"  {key}"), Text(line))
            self._rich.print(grid)
        else:
            width = max(len(str(key)) for key in rows)
            for key, value in rows.items():
                for i, line in enumerate(_lines(value)):
                    self.print(f"  {'' if i else str(key):<{width}}  {line}".rstrip())
        self.print()


def _lines(value) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]


def _figures(metrics: dict, only=None) -> str:
    """`loss 0.812  accuracy 0.780`: the scalars, loss and accuracy first."""
    scalars = {k: v for k, v in metrics.items() if _scalar(v)}
    order = [k for k in RATES if k in scalars] + [k for k in scalars if k not in RATES]
    shown = [k for k in only or order if k in scalars]
    return "  ".join(f"{k.replace('_', ' ')} {text.number(_plain(scalars[k]))}" for k in shown)


def _scalar(value) -> bool:
    return isinstance(value, int | float) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


def _plain(value):
    return value.item() if hasattr(value, "item") else value


class _Pace:
    """Seconds left, from the steps since the first update (so that compilation does not count)."""

    def __init__(self, total: int, start: int):
        self.total, self.step, self.since = total, start, None

    def left(self, step: int) -> float | None:
        now = time.monotonic()
        if step >= self.total:
            return 0.0
        if self.since is None:
            self.since = (now, step)
        begun, first = self.since
        return (now - begun) / (step - first) * (self.total - step) if step > first else None


class Lines:
    """Progress as one plain line each `every` steps and one at the last."""

    def __init__(self, console: Console, total: int, start: int, every: int):
        self.console, self.total, self.every = console, total, max(1, every)
        self.said, self.pace = start // self.every, _Pace(total, start)

    def update(self, step: int, metrics: dict | None = None, images_per_s: float | None = None):
        """Says where the run is after `step` steps; metrics: scalars by name."""
        left = self.pace.left(step)
        if step // self.every <= self.said and step < self.total:
            return
        self.said = step // self.every
        speed = "" if images_per_s is None else f"  images/s {images_per_s:.0f}"
        said = f"{_figures(metrics or {})}{speed}  left {text.clock(left)}".strip()
        self.console.print(f"step {step}/{self.total}  {said}")


class Bar:
    """Progress as a live bar."""

    def __init__(self, progress, total: int, start: int, narrow: bool):
        self.progress, self.narrow, self.pace = progress, narrow, _Pace(total, start)
        said = "waiting for the first step" if total > start else "nothing to do"
        self.task = progress.add_task("train", total=total, completed=start, said=said)

    def update(self, step: int, metrics: dict | None = None, images_per_s: float | None = None):
        """Says where the run is after `step` steps; metrics: scalars by name."""
        shown = _figures(metrics or {}, only=RATES)
        speed = "" if images_per_s is None else f"{images_per_s:.0f} {'img' if self.narrow else 'images'}/s"
        left = f"left {text.clock(self.pace.left(step))}"
        if self.narrow:
            shown = shown.replace("accuracy", "acc")
        self.progress.update(self.task, completed=step, said="  ".join(s for s in (shown, speed, left) if s))


def final_rows(summary: dict) -> dict[str, str | list[str]]:
    """The final figures of summary.json as rows of text, in the order in which one asks for them."""
    rows, get = {}, lambda key: summary.get(key) or {}
    test, val, best, plan, frozen = get("test"), get("val"), get("best"), get("plan"), get("frozen")
    for split, figures in (("test", test), ("val", val)):
        for key, name in ACCURACIES:
            if figures.get(key) is not None:
                rows[f"{split} {name}"] = text.percent(figures[key], 2)
        if split == "test":
            for key, name in LOSSES:
                if figures.get(key) is not None:
                    rows[f"test {name}"] = f"{figures[key]:.4f}"
    lost = get("forgetting")
    for key, name in (("accuracy", "source accuracy"), ("agreement", "source agreement")):
        if key in (lost.get("after") or {}):
            now, then = (text.percent(lost[when][key], 2) for when in ("after", "before"))
            rows[name] = f"{now}, {then} before training"
            break
    if test.get("examples"):
        rows["test photographs"] = text.thousands(test["examples"])
    if summary.get("evaluated_step") is not None:
        rows["figures of step"] = f"{summary['evaluated_step']:,}"
    if best.get("step") is not None:
        rows["best on val"] = f"step {best['step']:,}" + (
            f" ({best['metric']} {text.number(best['value'])})" if best.get("value") is not None else ""
        )
    if plan.get("parameters"):
        share = plan["trainable"] / plan["parameters"]
        rows["trainable"] = f"{plan['trainable']:,} of {plan['parameters']:,} parameters ({text.percent(share)})"
    if frozen.get("values"):
        rows["frozen"] = f"{frozen['values']:,} values, " + (
            f"bit-identical after {frozen.get('steps', 0):,} steps" if frozen.get("verified") else "NOT verified"
        )
    if summary.get("images_per_second"):
        rows["speed"] = f"{summary['images_per_second']:.0f} images/s"
    if get("input_wait"):
        rows["input wait"] = f"{text.percent(summary['input_wait']['share'])} of the time in training"
    if summary.get("peak_memory_bytes"):
        rows["peak memory"] = text.size(summary["peak_memory_bytes"])
    spent = get("time")
    if spent:
        parts = [f"{k} {text.duration(v)}" for k, v in spent.items() if k != "total" and v is not None]
        total = [text.duration(spent["total"])] if spent.get("total") is not None else []
        rows["time"] = total + ([", ".join(parts)] if parts else [])
    return rows

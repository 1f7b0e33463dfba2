"""How runs are: `python -m tljax.status runs/*` prints a row each: steps, figures, time left, alive or dead and why.

Reads what they leave in their workdirs, never a checkpoint, and imports no JAX.
"""

from tljax import command

USAGE = {
    "description": __doc__,
    "config": False,
    "json": "--json prints a list of objects instead of the table",
    "rest": "workdirs of runs or sweeps, or patterns, as 'runs/*' (the default)",
}
if __name__ == "__main__":
    command.help_if_asked(**USAGE)

import contextlib
import glob
import json
import os
import time
from pathlib import Path

from tljax import claims, stores
from tljax.errors import UserError, listing
from tljax.report import text

TAIL = 2**16  # bytes of metrics.jsonl that are read
LATE = 4  # a heartbeat that is so many of its intervals old, and its process not on this machine: nobody knows
COMPLETE = ("commit_success.txt", "whole.json")  # the last of what a checkpoint in a store gets: orbax's, ours
COLUMNS = ("run", "step", "loss", "val", "images/s", "left", "checkpoint", "state")
RIGHT = {"step", "loss", "images/s", "left"}


def main(argv: list[str]) -> int:
    """Prints a row a run, or JSON. Raises UserError, after the others' rows, for folders that are no runs."""
    flags = command.from_command_line(["--json=yes" if arg == "--json" else arg for arg in argv], **USAGE)
    folders, others = find(flags.rest or ["runs/*"])
    found = [look(folder) for folder in folders]
    if flags.json:
        print(json.dumps(found, indent=2))
    elif found:
        print("\n".join(table(found)))
    if others:
        raise UserError(_no_run(others, bool(flags.rest)))
    return 0


def find(given: list[str]) -> tuple[list[Path], list[str]]:
    """The workdirs that are given or match a pattern; what is given and is none. What a pattern finds may be none."""
    folders, others = [], []
    for name in given:
        runs = [place for place in _matching(name) if (place / "config.json").exists()]
        folders += runs
        others += [] if runs else [name]
    return list(dict.fromkeys(folders)), others


def _matching(name: str) -> list:
    """The folders that a name or a pattern stands for."""
    if stores.is_remote(name):
        above, _, last = name.rstrip("/").rpartition("/")
        with stores.reported("read", name):
            return (
                sorted(stores.place(above, name).glob(last)) if glob.has_magic(last) else [stores.place(name, "status")]
            )
    is_pattern = glob.has_magic(name) and not os.path.exists(name)
    return [Path(found) for found in (sorted(glob.glob(name)) if is_pattern else [name])]


def _no_run(names: list[str], asked: bool) -> str:
    within = [name for name in names if glob.glob(f"{glob.escape(name)}/*/config.json")]
    if within:
        return f"{within[0]} is no workdir of a run, but holds some: give '{within[0].rstrip('/')}/*'"
    if not asked:
        return "there are no runs under runs/: give their workdirs, as 'elsewhere/*'"
    first = names[0]
    if glob.has_magic(first) and not os.path.exists(first):
        found = "matches no workdir of a run"
    elif not os.path.exists(first) and not stores.is_remote(first):
        found = "does not exist"
    else:
        found = "is no workdir of a run"
    more = f"; likewise {listing(names[1:], 5)}" if len(names) > 1 else ""
    return f"{first} {found}: expected a folder with the config.json that tljax.train leaves there{more}"


def look(folder: Path) -> dict:
    """What a workdir tells of its run; None for what it does not tell.

    "state" is one of finished, running, stalled, stopped, diverged, failed, killed, silent (on another machine, and
    its heartbeat is late) and unknown (no heartbeat); "why" says more. Times are in seconds.
    """
    try:
        return _look(folder, time.time())
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # one damaged file hides no other run
        return {
            "workdir": str(folder), "kind": "run", "name": None, "state": "unknown",
            "why": f"its files cannot be read: {type(error).__name__}: {error}", "step": None, "total": None,
            "val": {"metric": None, "value": None},
        }  # fmt: skip


def _look(folder: Path, now: float) -> dict:
    config, summary, beat = (_read(folder / name) for name in ("config.json", "summary.json", "heartbeat.json"))
    if not all(isinstance(beat.get(key), int | float) for key in ("time", "since", "alive", "every")):
        beat = {}  # not what a run writes
    if "sweep" in config:
        return _sweep(folder, config)
    rows = _tail(folder / "metrics.jsonl")
    last = lambda key: next((row[key] for row in reversed(rows) if isinstance(row.get(key), int | float)), None)
    steps = [row["step"] for row in (*rows, beat) if isinstance(row.get("step"), int)]
    state, why = _state(summary, beat, now)
    alive = state in ("running", "stalled")
    left = beat.get("left")
    return {
        "workdir": str(folder),
        "kind": "run",
        "name": config.get("name"),
        "state": state,
        "why": why,
        "part": beat.get("part") if alive else None,
        "step": summary.get("steps", max(steps, default=None)),
        "total": summary.get("steps", beat.get("total")),
        "loss": last("train/loss"),
        "val": {"metric": config.get("metric"), "value": last(config.get("metric"))},
        "images_per_second": last("images_per_second"),
        "left": max(0.0, left - (now - beat["time"])) if alive and left is not None else None,
        "checkpoint": _checkpoint(folder, now),
        "heartbeat_age": round(now - beat["time"], 1) if beat else None,
        "host": beat.get("host"),
        "pid": beat.get("pid"),
    }


def _state(summary: dict, beat: dict, now: float) -> tuple[str, str]:
    """How a run is, and why."""
    if summary:
        return "finished", ""
    if not beat:
        return "unknown", "no heartbeat: it has not begun to train"
    if beat.get("end"):
        return beat["end"], beat.get("why", "")
    age, where = now - beat["time"], f"process {beat.get('pid')} on {beat.get('host')}"
    part = beat.get("part")
    there = claims.alive(beat)
    if there is False:
        return "killed", f"{where} is gone, in {part}; the same command goes on"
    late = age > LATE * beat["every"]
    if there is None and late:
        return "silent", f"no heartbeat of {where} for {text.duration(age)}, in {part}: killed, or cut off"
    quiet = text.duration(now - beat["alive"])
    if beat.get("stalled"):
        return "stalled", f"no step for {quiet}, in {part}: see stacks.txt"
    if late:
        return "stalled", f"{where} is there, without a heartbeat for {text.duration(age)}: suspended, or a full disk"
    return "running", "" if part == "train" else f"in {part} for {text.duration(now - beat['since'])}"


def _checkpoint(folder: Path, now: float) -> dict | None:
    """The newest complete checkpoint, {"step", "age"}."""
    with contextlib.suppress(Exception):  # every store's library has errors of its own
        found = [place for place in (folder / "checkpoints").iterdir() if place.name.isdigit()]
        if isinstance(folder, Path):
            newest = max(found, key=lambda place: int(place.name))
            made = newest.stat().st_mtime
        else:  # a store's folders have no time, and no other sign of being complete
            last = {p: p / name for p in found for name in COMPLETE if (p / name).exists()}
            newest = max(last, key=lambda place: int(place.name))
            made = last[newest].stat().mtime
        return {"step": int(newest.name), "age": round(now - made, 1)}
    return None


def _sweep(folder: Path, config: dict) -> dict:
    """What a sweep's folder tells: its "step" and "total" are members."""
    planned, rows, held = set(), {}, []
    for file in folder.glob("plans/*/plan.json"):
        planned |= {number for group in _read(file).get("groups", ()) for unit in group["units"] for number in unit}
    for file in folder.glob("units/*/result.json"):
        rows |= {row["number"]: row for row in _read(file).get("rows", ())}
    for unit in folder.glob("units/*"):
        if not (unit / "result.json").exists():
            with contextlib.suppress(OSError):  # a folder of someone else's
                held += filter(None, [claims.holder(unit)])
    workers = sorted({found.get("worker", "?") for found in held})
    metric = config.get("metric") or ""
    values = [
        value
        for row in rows.values()
        if isinstance(value := (row.get("val") or {}).get(metric.removeprefix("val/")), int | float)
    ]
    best = (min if metric.endswith("nll") else max)(values, default=None)
    state, why = "stopped", "no worker; the same command goes on"
    if workers:
        state, why = "running", f"{text.counted(len(workers), 'worker')}: {listing(workers, 3)}"
    elif planned and planned <= set(rows):
        state, why = "finished", ""
    return {
        "workdir": str(folder), "kind": "sweep", "name": config.get("name"), "state": state, "why": why,
        "step": len(rows), "total": len(planned) or None, "val": {"metric": metric, "value": best},
    }  # fmt: skip


def _read(file: Path) -> dict:
    """What a JSON file holds; {} where it is not there, or is no object."""
    try:
        found = json.loads(file.read_text())
    except Exception:  # every store's library has errors of its own
        return {}
    return found if isinstance(found, dict) else {}


def _tail(file: Path) -> list[dict]:
    """The last rows of a run's metrics."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - TAIL))
            lines = stream.read().decode(errors="replace").splitlines()
    except Exception:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # the first may be cut, and the last half written
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict)]


def table(found: list[dict]) -> list[str]:
    """The lines of the table."""
    cells = [dict(zip(COLUMNS, COLUMNS)), *map(_cells, found)]
    widths = {name: max(len(row[name]) for row in cells) for name in COLUMNS}
    aligned = lambda name, cell: f"{cell:>{widths[name]}}" if name in RIGHT else f"{cell:<{widths[name]}}"
    return ["  ".join(aligned(name, row[name]) for name in COLUMNS).rstrip() for row in cells]


def _cells(run: dict) -> dict[str, str]:
    step, total, val, checkpoint = run["step"], run["total"], run["val"], run.get("checkpoint")
    rate = run.get("images_per_second")
    unit = " members" if run["kind"] == "sweep" else ""
    cells = (
        run["workdir"],
        (f"{step:,}" if step is not None else "-") + (f"/{total:,}" if total else "") + unit,
        text.number(run.get("loss")),
        f"{val['metric'].removeprefix('val/')} {text.number(val['value'])}" if val["value"] is not None else "-",
        "-" if rate is None else f"{rate:.0f}",
        "-" if run.get("left") is None else text.clock(run["left"]),
        f"{checkpoint['step']:,}, {_ago(checkpoint['age'])}" if checkpoint else "-",
        run["state"] + (f": {run['why']}" if run["why"] else ""),
    )
    return dict(zip(COLUMNS, cells))


def _ago(seconds: float) -> str:
    """`12 s ago`, `3 min ago`, `5 h ago`, `2 d ago`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


if __name__ == "__main__":
    command.run(main)

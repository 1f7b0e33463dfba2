"""Starts workers on a sweep's folder, and waits for them.

Each runs `python -m tljax.sweep` with the same arguments, takes units until there are none, and writes what it says to
`workers/NAME.log`. One that dies loses nothing: others take its unit over.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tljax import config as configs
from tljax.errors import UserError
from tljax.launchers import LAUNCHED, LAUNCHERS, Job
from tljax.report import text

if TYPE_CHECKING:
    from tljax.sweep import Sweep

POLL = 0.5  # seconds


def end_with_parent() -> None:
    """Ends this process when the launcher that has started it is gone."""
    if not os.environ.pop(LAUNCHED, None):
        return

    def watch() -> None:
        os.read(0, 1)  # nothing comes but the end
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def launch(call: str, sweep: "Sweep", argv: Sequence[str], share: float) -> int:
    """Starts workers on a sweep's folder, shows what they say, waits for them, and writes the tables. Returns 0.

    Raises UserError where members are left without a result; the same command goes on with them.
    """
    launcher = configs.call(call, LAUNCHERS, "--launch")
    folder, say = sweep.folder, sweep.console.print
    if folder.begun:
        folder.claim(sweep.config)
    before = folder.workers()
    jobs = _jobs(launcher, folder.path, argv, share)
    shown = {job.log: os.path.getsize(job.log) if os.path.exists(job.log) else 0 for job in jobs}
    said: dict[str, str] = {}
    with launcher.start(jobs) as workers:
        ends: dict[str, int | str] = {}
        while len(ends) < len(workers):
            ends |= {w.job.name: end for w in workers if w.job.name not in ends and (end := w.ended()) is not None}
            for job in jobs:
                for line in _new(job.log, shown):
                    say(f"{job.name}: {line}")
                    said[job.name] = line
            time.sleep(POLL)
    after = folder.workers()
    for name, end in ends.items():
        units = after.get(name, 0) - before.get(name, 0)
        say(f"{name}: {text.counted(units, 'unit')}, {_told(end)}")
    missing = sweep.search.count(sweep.config) - len(folder.results())
    if missing:
        failed = next((f": {name}: {said.get(name, _told(end))}" for name, end in ends.items() if end), "")
        raise UserError(f"{text.counted(missing, 'member')} without a result{failed}; the same command goes on")
    say(f"{sweep.tables()}; everything is in {folder.path}")
    return 0


def _jobs(launcher, folder: Path, argv: Sequence[str], share: float) -> list[Job]:
    """What each worker runs: this command without --launch."""
    rest, given = [], iter(argv)
    for argument in given:
        if re.fullmatch("--?launch", argument):
            next(given)
        elif not re.match("--?launch=", argument):
            rest.append(argument)
    flag = lambda name: any(re.match(f"--?{name}(=|$)", argument) for argument in rest)
    if not flag("workers"):
        rest.append(f"--workers={launcher.count}")
    if not flag("workdir"):
        rest.append(f"--workdir={folder}")
    if not flag("memory"):
        rest += launcher.arguments(share)
    logs = folder.absolute() / "workers"
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    command = (sys.executable, "-m", "tljax.sweep", *rest)
    names = [f"{type(launcher).__name__.lower()}-{i + 1}" for i in range(launcher.count)]
    return [
        Job(name, command, {"TLJAX_WORKER": name, "PYTHONUNBUFFERED": "1"}, str(logs / f"{name}.log"), os.getcwd())
        for name in names
    ]


def _new(log: str, shown: dict[str, int]) -> list[str]:
    """The whole lines that a log has got since the last call."""
    try:
        with open(log, "rb") as file:
            file.seek(shown[log])
            found = file.read()
    except FileNotFoundError:
        return []
    whole = found[: found.rfind(b"\n") + 1]
    shown[log] += len(whole)
    return whole.decode(errors="replace").splitlines()


def _told(end: int | str) -> str:
    if isinstance(end, str):
        return end
    return "ended" if end == 0 else f"killed by {signal.Signals(-end).name}" if end < 0 else f"exit code {end}"

"""SIGTERM at random moments: what a scheduler sends before it takes a machine away."""

import contextlib
import functools
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from conftest import command
from test_launch import launch
from test_resume import MORE, end, newest

from tljax.lock import Lock


def trainers(launcher: int) -> list[int]:
    """The processes of a run that a script has started; it has others, too."""
    found = []
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        with contextlib.suppress(OSError):  # which has just ended
            found += [int(pid)] * ("tljax.train" in Path(f"/proc/{pid}/cmdline").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_sigterm_at_twenty_random_moments_loses_nothing(tiny, tmp_path, processes):
    """Of two processes either may get it: both save the same step, and the launcher's exit code says start me again."""
    rng, argv = random.Random(), [*tiny, *MORE, f"--config.train_for={2000 // processes} steps"]
    start = lambda path: (launch if processes > 1 else functools.partial(command, "tljax.train"))(
        *argv, f"--workdir={path}"
    )
    whole = start(tmp_path / "whole")
    out, err = whole.communicate(timeout=3000)
    assert whole.returncode == 0, err
    first_step = float(re.search(r"first step ([0-9.]+) s after the command", out)[1])

    stopped, codes = tmp_path / "stopped", []
    for _ in range(100):
        before, process = newest(stopped), start(stopped)
        if len(codes) < 20:
            # Half of them while it starts, half behind a checkpoint of its own: however fast the machine is at the
            # moment, the run must not be over before the twentieth.
            behind = len(codes) % 2
            end_by = time.monotonic() + (600 if behind else rng.uniform(0, first_step))
            while newest(stopped) == before and process.poll() is None and time.monotonic() < end_by:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.5 / processes) * behind)
            each = trainers(process.pid)
            one = rng.choice(each) if processes > 1 and each and rng.random() < 0.7 else process.pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, signal.SIGTERM)
        out, err = process.communicate(timeout=3000)
        codes.append(process.returncode)
        assert process.returncode in (0, 143, -signal.SIGTERM), (out, err)
        assert "Traceback" not in err
        if process.returncode == 0:
            break
        said = re.findall(r"stopped by SIGTERM at step (\d+), saved", out)
        assert newest(stopped) == int(said[0]) if said else newest(stopped) >= before
        with Lock(stopped) as free:  # nobody is in the workdir
            free.take()
    assert len(codes) > 20
    assert 143 in codes
    assert end(stopped) == end(tmp_path / "whole")

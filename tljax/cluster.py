"""Joining the processes of one run, and their end: the roll call (`tljax.roll`), then JAX's own runtime."""

import os
import re
import sys
from collections.abc import Callable
from typing import Any

from tljax.errors import UserError
from tljax.places import FLAGS, TIMEOUT, Place, find

RESTART = 75  # the exit code where another process is gone: sysexits.h's EX_TEMPFAIL, "try again"

_roll = None  # the connections to the other processes of this run, once they are there


def join(flags: Any, config, command: str) -> None:
    """Before the first use of a device: joins the other processes of this run, where there are any.

    They compare what must be alike (`tljax.hosts`) first. Raises UserError, in all of them.
    """
    from tljax import hosts, parallel, relay, roll

    global _roll
    parallel.start()
    place = find({name: getattr(flags, name) for name in FLAGS})
    timeout = _timeout(flags.join_timeout)
    if place is None:
        import jax

        if jax.process_count() > 1:  # a slice of TPUs of which nothing has told
            raise UserError("the devices are those of several hosts: give --coordinator, --processes and --process")
        return
    if not place.address:
        raise UserError(f"{place.said} does not say where process 0 is: give --coordinator=HOST:PORT")
    relay.start(place.index)
    facts = hosts.facts(config) | {"command": command, "--workdir": flags.workdir}
    _roll = roll.call(place.index, place.count, place.address, facts, timeout)
    _initialize(place, timeout)
    hosts.same_devices()
    # gloo, which joins CPUs, announces its connections on file descriptor 1: Python keeps the real one to itself.
    sys.stdout = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _timeout(given: str) -> float:
    if given and not re.fullmatch(r"\d*[1-9]\d*", given):
        raise UserError(f"--join_timeout = {given!r}: expected seconds")
    return float(given or TIMEOUT)


def _initialize(place: Place, timeout: float) -> None:
    import jax

    try:
        jax.distributed.initialize(
            place.address, place.count, place.index, place.gpus(_gpus()),
            cluster_detection_method="deactivate", initialization_timeout=int(timeout) + 1,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(
            f"cannot join the other processes at {place.address}: {' '.join(str(error).split())[:300]}"
        ) from error


def _gpus() -> list[str]:
    from tljax.launchers import gpus

    return gpus()


def meet(**facts: Callable[[], object]) -> None:
    """Returns when all processes have come here. Raises UserError, in all of them, where facts of theirs differ.

    What they do together for the first time waits 30 s on CPUs, no more; and they compile each on its own, where one
    may have to while the others find theirs in the compilation cache.
    """
    if _roll is not None:
        _roll.meet({f"the {name.replace('_', ' ')}": str(fact()) for name, fact in facts.items()})


def alone(what: str) -> None:
    """Before the first use of a device, by a command for one process. Raises UserError where it is one of several."""
    from tljax import parallel

    place = find()
    if place is not None:
        raise UserError(f"{what} runs in one process, not {place.count} (as {place.said} says): start it once")
    parallel.start()


def worker() -> Place | None:
    """Before the first use of a device, by a worker of a sweep: its place among those that were launched with it.

    They share a folder, and nothing else: JAX does not join them. Each takes its part of a machine's GPUs.
    """
    from tljax import parallel, relay

    place = None if os.environ.get("TLJAX_WORKER") else find()
    if place is not None:
        import jax

        os.environ["TLJAX_WORKER"] = f"process-{place.index}"
        own = place.gpus(_gpus())
        if own is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, own)))
        relay.start(place.index, stdout=True)
    parallel.start()
    return place


# ---- the end


def failing(error: BaseException | None = None) -> None:
    """Is called by a process that will say why it fails; one that learns of another's end meanwhile says that."""
    if _roll is not None:
        _roll.failing(error)


def failed(code: int, line: str) -> None:
    """Tells the others, so that they end too, and exits; returns in a process that is alone."""
    if _roll is not None:
        _roll.failed(code, line)
        os._exit(code)  # JAX's orderly end would wait for the others


def leave() -> None:
    """Is called by a process that has done its work: the others go on without it."""
    if _roll is not None:
        _roll.leave()

"""What compiling costs a process, as JAX itself counts it: all programs, not the train step alone."""

import collections

import jax.monitoring

COMPILED, HIT = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_counted = collections.Counter()


class Compiles:
    """Counts what is compiled from now on."""

    def __init__(self):
        self._before = _counted.copy()

    def told(self) -> dict:
        """How many programs, how many of them the compilation cache had, and the seconds for all."""
        since = lambda name: _counted[name] - self._before[name]
        return {
            "programs": since("programs"), "from_cache": since("from_cache"), "seconds": round(since("seconds"), 2),
        }  # fmt: skip


def _compiled(event: str, seconds: float, **_) -> None:
    if event == COMPILED:
        _counted["programs"] += 1
        _counted["seconds"] += seconds


def _found(event: str, **_) -> None:
    if event == HIT:
        _counted["from_cache"] += 1


jax.monitoring.register_event_duration_secs_listener(_compiled)
jax.monitoring.register_event_listener(_found)

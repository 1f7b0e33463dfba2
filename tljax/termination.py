"""Signals that ask a run to end: it finishes its step, saves, and leaves."""

import contextlib
import signal

import jax


class Termination(contextlib.AbstractContextManager):
    """Within it SIGTERM and Ctrl-C only set `.received`: the loop ends its step, saves, and leaves.

    (An exception raised by Ctrl-C could come while a library calls back into Python, and be lost.) A second Ctrl-C
    interrupts at once.
    """

    received: signal.Signals | None = None

    def __enter__(self):
        # Several processes must agree on the step: there JAX's own notifier listens (Checkpoints.preempted).
        listened = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        wanted = [s for s in listened if signal.getsignal(s) != signal.SIG_IGN]
        self.before = {s: signal.signal(s, self._receive) for s in wanted}
        return self

    def _receive(self, number, _):
        self.received = signal.Signals(number)
        signal.signal(number, self.before[number])

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

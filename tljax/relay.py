"""What one process of several says on stderr, with its number before each line: `[1] error: …`.

A process of its own passes it on, so that the last words of one that crashes are not lost. Where JAX's runtime kills a
process because another is gone, it writes a page and a stack; one line is left of it, or none where one was said.
"""

import os
import re
import signal
import subprocess
import sys

FATAL = re.compile(rb"F\d{4} .*Terminating process because the JAX distributed service")
HEARD = re.compile(rb"[EW]\d{4} .* coordination_service_agent\.cc:\d+\] ")  # what comes before it
GONE = b"error: another process is gone; start all processes again: the run goes on from its last checkpoint\n"


def start(index: int, stdout: bool = False) -> None:
    """From now on what this process writes to stderr (and stdout) passes through; process 0's has no number."""
    mark = f"[{index}] " if index else ""
    for stream, number in ((sys.stderr, 2), (sys.stdout, 1))[: 1 + (stdout and bool(mark))]:
        stream.flush()
        command = [sys.executable, "-I", "-S", __file__, mark]
        try:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=number, start_new_session=True)
        except OSError:  # no process, no descriptor left: everything goes its plain way
            return
        os.dup2(child.stdin.fileno(), number)
        child.stdin.close()


def main(mark: bytes) -> None:
    """Passes lines from stdin to stdout."""
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when there is nothing left to pass on
        signal.signal(number, signal.SIG_IGN)
    dying = told = False
    for line in filter(lambda line: not HEARD.match(line), sys.stdin.buffer):
        told |= line.startswith(b"error: ")
        dying |= bool(FATAL.match(line))
        if not dying or line.startswith(b"error: "):
            _write(mark + line)
    if dying and not told:
        _write(mark + GONE)


def _write(line: bytes) -> None:
    while line:
        line = line[os.write(1, line) :]


if __name__ == "__main__":
    main(sys.argv[1].encode())

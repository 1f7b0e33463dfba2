"""The roll call of a run's processes: a connection from each to process 0, from before JAX joins them to the end.

Process 0 listens on the coordinator's port until all have come, compares what they say of themselves (`tljax.hosts`),
tells them what it has found, and leaves the port to JAX. The connections stay: where one ends without a word, its
process is dead, and all others end with a line that names it. Messages are lines of JSON.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Mapping

from tljax import hosts
from tljax.cluster import RESTART
from tljax.errors import UserError, listing

AGAIN = "start all processes again: the run goes on from its last checkpoint"
LINE = 2**20  # bytes; no message is longer
GREETING = "tljax-roll-1"
LINGER = 10.0  # seconds in which late-comers are told why there is no run
ALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 6}  # a machine that is cut off is dead after 45 s
SPEAKING = 1.0  # seconds for which process 0 stays when all others are to end: JAX kills them when it is gone


def call(index: int, count: int, address: str, facts: Mapping[str, str], timeout: float) -> "Roll":
    """Waits until all processes are there and alike. Raises UserError, the same one in all that have come."""
    host, _, port = address.rpartition(":")
    own = {
        "greeting": GREETING, "process": index, "processes": count, "facts": dict(facts),
        "host": f"{socket.gethostname()}, pid {os.getpid()}",
    }  # fmt: skip
    here = (host.strip("[]"), int(port))
    if index == 0:
        return _Gathering(here, own, timeout).roll()
    return _dial(here, address, own, timeout)


# ---- process 0


class _Gathering:
    """Process 0, as the others come."""

    def __init__(self, address: tuple[str, int], own: dict, timeout: float):
        self.address, self.own, self.timeout, self.count = address, own, timeout, own["processes"]
        self.said, self.offsets, self.connections = {0: own}, {}, {}

    def roll(self) -> "Roll":
        try:
            listener = _listen(self.address[1])
        except OSError as error:
            where = "{}:{}".format(*self.address)
            why = os.strerror(error.errno) if error.errno else error
            raise UserError(f"process 0 cannot listen at {where}, the coordinator's port: {why}") from error
        deadline = time.monotonic() + self.timeout
        with listener:
            wrong = None
            while not wrong and not self.all_here() and time.monotonic() < deadline:
                wrong = self.one(listener, min(1.0, deadline - time.monotonic()))
            wrong = wrong or self.missing() or self.unlike()
            if wrong:
                self.refuse(listener, wrong)
                raise UserError(wrong)
        names = {index: said["host"] for index, said in self.said.items()}
        for connection in self.connections.values():
            _send(connection, {"go": names[0]})
        return Roll(0, names, self.connections)

    def all_here(self) -> bool:
        """Whether all have come; those who died or gave up meanwhile have not."""
        if len(self.connections) + 1 < self.count:
            return False
        for index in [i for i, connection in self.connections.items() if _ended(connection)]:
            self.connections.pop(index).close()
            self.said.pop(index)
        return len(self.connections) + 1 == self.count

    def one(self, listener: socket.socket, wait: float) -> str:
        """Lets one process in, where one comes. Returns what is wrong with it, "" for nothing."""
        listener.settimeout(max(wait, 0.01))
        try:
            connection, _ = listener.accept()
        except OSError:
            return ""
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # whoever that was, it is none of us
            connection.settimeout(2.0)
            said = _receive(connection)
            index, count, host = int(said["process"]), int(said["processes"]), str(said["host"])
            if said["greeting"] != GREETING or index < 0:
                raise ValueError
            dict(said["facts"])
            other = self.said.get(index)
            if index in self.connections and _ended(self.connections[index]):
                self.connections.pop(index).close()
                other = None
            self.offsets[index] = float(said["time"]) - time.time()
            if other is not None:
                wrong = f"two processes have the number {index}: {other['host']} and {host}"
                _send(connection, {"wrong": wrong})
                connection.close()
                return wrong
            self.said[index], self.connections[index] = said, connection
            if count != self.count:
                return f"there are {self.count} processes, says process 0, and {count}, says process {index} ({host})"
            return ""
        connection.close()
        return ""

    def missing(self) -> str:
        absent = [str(i) for i in range(self.count) if i not in self.said]
        if not absent:
            return ""
        which = f"process {absent[0]} has" if len(absent) == 1 else f"processes {listing(absent)} have"
        return f"{which} not come to {self.address[0]}:{self.address[1]} within {self.timeout:g} s, of {self.count}"

    def unlike(self) -> str:
        names = {index: said["host"] for index, said in self.said.items()}
        found = hosts.differences({i: said["facts"] for i, said in self.said.items()}, names)
        found += hosts.apart(self.offsets, names)
        return f"the processes differ: {listing(found, 5)}" if found else ""

    def refuse(self, listener: socket.socket, wrong: str) -> None:
        """Tells all that have come, and those that come a little later."""
        until = time.monotonic() + LINGER
        told = set()
        while True:
            for index in self.connections.keys() - told:
                with contextlib.suppress(OSError):
                    _send(self.connections[index], {"wrong": wrong})
                told.add(index)
            if len(told) + 1 >= self.count or time.monotonic() > until:
                return
            self.one(listener, 0.5)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


# ---- the others


def _dial(here: tuple[str, int], address: str, own: dict, timeout: float) -> "Roll":
    deadline, why, pause = time.monotonic() + timeout, "", 0.1
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection(here, timeout=min(5.0, timeout))
            _send(connection, own | {"time": time.time()})
            connection.settimeout(timeout + LINGER)  # it may have begun to wait when we did, or later
            answer = _receive(connection)
            if "wrong" in answer:
                raise UserError(answer["wrong"])
            return Roll(own["process"], {0: answer["go"]}, {0: connection})
        except OSError as error:
            why = error.strerror or str(error)
        except (ValueError, LookupError, TypeError):
            why = "what answers there is no process 0 of this run"
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
    raise UserError(
        f"process {own['process']} cannot reach process 0 at {address} within {timeout:g} s ({why}): "
        "is it there, and its port open?"
    )


# ---- all, from now on


class Roll:
    """The connections while the run goes on: of process 0 to each other one, of the others to it."""

    def __init__(self, index: int, names: dict[int, str], connections: dict[int, socket.socket]):
        self.index, self.names, self.connections = index, names, connections
        self.lock = threading.Lock()  # held by who ends this process
        self.meeting, self.arrived, self.verdicts, self.over = 0, {}, {}, threading.Condition()
        self.selector = selectors.DefaultSelector()
        for peer, connection in connections.items():
            connection.settimeout(5.0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ALIVE.items():
                if hasattr(socket, option):  # not everywhere
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
            self.selector.register(connection, selectors.EVENT_READ, peer)
        threading.Thread(target=self._watch, daemon=True, name="roll").start()

    def _watch(self) -> None:
        while self.selector.get_map():
            for key, _ in self.selector.select():
                try:
                    message = _receive(key.fileobj)
                except (OSError, ValueError):
                    message = {"gone": key.data, "name": self.names[key.data]}
                if "left" in message:
                    self.selector.unregister(key.fileobj)
                elif "at" in message:
                    self._arrive(message)
                elif "gone" in message:
                    who = f"process {message['gone']} ({message['name']})"
                    self._end(RESTART, message, f"{who} is gone; {AGAIN}")
                elif "failed" in message:
                    line = message["line"]
                    if message["code"] != 2:
                        line = f"process {message['failed']} has failed, as its log tells: {line}"
                    self._end(message["code"], message, line)

    def meet(self, facts: Mapping[str, str]) -> None:
        """Returns when all processes have called it as often as this one. Raises UserError where their facts differ."""
        self.meeting += 1
        if self.index:
            _send(self.connections[0], {"at": self.meeting, "process": self.index, "facts": dict(facts)})
        else:
            self._arrive({"at": self.meeting, "process": 0, "facts": dict(facts)})
        with self.over:
            self.over.wait_for(lambda: self.meeting in self.verdicts)
        if self.verdicts[self.meeting]:
            raise UserError(self.verdicts[self.meeting])

    def _arrive(self, message: dict) -> None:
        """A process has come to a meeting, as process 0 hears; the others hear that all have come."""
        meeting = message["at"]
        with self.over:
            if self.index == 0:
                said = self.arrived.setdefault(meeting, {})
                said[message["process"]] = message["facts"]
                if len(said) < len(self.names):
                    return
                found = hosts.differences(self.arrived.pop(meeting), self.names)
                message = {"at": meeting, "wrong": f"the processes differ: {listing(found, 5)}" if found else ""}
                for connection in self.connections.values():
                    with contextlib.suppress(OSError):  # the watch tells of it
                        _send(connection, message)
            self.verdicts[meeting] = message["wrong"]
            self.over.notify_all()

    def _end(self, code: int, message: dict, line: str) -> None:
        """Says why, passes it on, and exits."""
        self.lock.acquire()
        sys.stdout.flush()
        sys.stderr.write(f"error: {line}\n")
        sys.stderr.flush()
        if self.index == 0:
            self._tell(message)
        os._exit(code)

    def _tell(self, message: dict) -> None:
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                _send(connection, message)
        if self.index == 0:
            time.sleep(SPEAKING)

    def failing(self, error: BaseException | None) -> None:
        """Before this process says why it ends: where another's end may be the cause, that is told first."""
        if error is not None and not isinstance(error, UserError):
            time.sleep(2.0)
        self.lock.acquire()

    def failed(self, code: int, line: str) -> None:
        """Tells the others that this process ends, and why."""
        self._tell({"failed": self.index, "code": code, "line": line})

    def leave(self) -> None:
        """Tells the others that this process has done its work; it listens to them until it has ended."""
        for connection in self.connections.values():
            with contextlib.suppress(OSError):
                _send(connection, {"left": self.index})


def _send(connection: socket.socket, message: dict) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict:
    """One line. Raises OSError or ValueError where none comes."""
    found = bytearray()
    while not found.endswith(b"\n"):
        # No more than this line is taken: what a buffer held, the selector would not know of.
        part = connection.recv(LINE, socket.MSG_PEEK)
        if not part or len(found) > LINE:
            raise ConnectionError("the connection has ended")
        end = part.find(b"\n") + 1 or len(part)
        found += connection.recv(end)
    message = json.loads(found)
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message


def _ended(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    before = connection.gettimeout()
    try:
        connection.setblocking(False)
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(before)

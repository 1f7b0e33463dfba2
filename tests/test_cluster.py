"""Who a run's processes are, by flags and environments; the roll call; what they say when one of them is gone."""

import http.server
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time

import pytest
from conftest import script
from tiny import get_config

from tljax import hosts, places, relay, roll
from tljax.errors import UserError
from tljax.places import Place

SLURM = {  # as srun gives it to the third of five tasks on two nodes
    "SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "5", "SLURM_STEP_NUM_TASKS": "5", "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2,3",
}  # fmt: skip
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
SLICES = {  # of GKE: the second worker of the second slice of two
    "TPU_WORKER_HOSTNAMES": "b-0.svc,b-1.svc", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "a-0.svc:8080",
}  # fmt: skip
JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


def test_places_are_found_in_what_launchers_give():
    found = places.find(environ=SLURM)
    assert found == Place(2, 5, found.address, "SLURM", local=0, beside=3)
    assert found.address.startswith("gpu07:")
    assert places.find(environ=SLURM | {"SLURM_PROCID": "0"}).address == found.address
    assert places.find(environ=SLURM | {"SLURM_STEP_ID": "1"}).address != found.address  # a step beside it
    assert places.find(environ=SLURM | {"SLURM_TRES_PER_TASK": "cpu:2,gres/gpu:1"}).bound
    found = places.find(environ=MPI)
    assert found == Place(3, 4, found.address, "Open MPI", local=1, beside=2)
    assert found.address.startswith("10.96.0.1:")
    found = places.find(environ=SLICES)
    assert (found.index, found.count, found.address) == (3, 4, "a-0.svc:8482")
    found = places.find(environ=JAX)
    assert (found.index, found.count, found.address) == (1, 2, "10.0.0.1:1234")
    assert "JAX_PROCESS_ID" in found.said


def test_flags_come_before_variables_and_those_before_launchers():
    flags = {"coordinator": "[::1]:99", "processes": "3", "process": "2", "join_timeout": "5"}
    found = places.find(flags, SLURM | JAX)
    assert (found.index, found.count, found.address) == (2, 3, "[::1]:99")
    found = places.find({"coordinator": "head:99"}, SLURM)
    assert (found.index, found.count, found.address, found.beside) == (2, 5, "head:99", 3)
    assert places.find({"processes": "1"}, SLURM | JAX) is None


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch, without srun
        SLURM | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell that salloc gives
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        SLICES | {"JAX_PLATFORMS": "cpu"},
        MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"JAX_NUM_PROCESSES": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # any pod
    ],
)
def test_who_is_alone_is_left_alone(environ):
    assert places.find(environ=environ) is None


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        ({}, JAX | {"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID = 2 of 2 processes: expected 0 to 1"),
        ({"process": "7"}, JAX, "--process = 7 of 2 processes: expected 0 to 1"),
        ({"process": "-1"}, JAX, "--process = '-1': expected a whole number from 0 on"),
        ({"processes": "two"}, JAX, "--processes = 'two': expected a whole number from 1 on"),
        ({"coordinator": "head"}, JAX, "--coordinator = 'head': expected HOST:PORT, as 10.0.0.1:1234"),
        (
            {"coordinator": "head:1"}, {"JAX_NUM_PROCESSES": "2"},
            "JAX_NUM_PROCESSES, --coordinator given, but not --process or JAX_PROCESS_ID: give all or none",
        ),
        ({}, SLURM | {"SLURM_PROCID": "x"}, "the environment of slurm cannot be read"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_named(flags, environ, message):
    with pytest.raises(UserError) as error:
        places.find(flags, environ)
    assert str(error.value).startswith(message)


def test_nodes_and_tasks_are_read_as_slurm_writes_them():
    names = ["a", "a,b", "n[3-7]", "n[003,9],m", "rack[1-2]-x,b", "a1,b[2-3]"]
    assert [places.first_host(name) for name in names] == ["a", "a", "n3", "n003", "rack1-x", "a1"]
    assert places._tasks("2(x3),1") == [2, 2, 2, 1]


def test_processes_of_one_machine_share_its_gpus():
    four = list("0123")
    assert [Place(i, 4, local=i % 2, beside=2).gpus(four) for i in range(4)] == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert Place(1, 2).gpus(four) is None  # one a machine
    assert Place(1, 2, local=1, beside=2, bound=True).gpus(four) is None
    assert Place(1, 2, local=1, beside=2).gpus([]) is None
    assert Place(1, 2, local=1, beside=2).gpus(["3"]) is None  # each sees its own


def test_a_cloud_tpu_vm_is_asked_for_its_neighbours(monkeypatch):
    """A server on this machine plays Google's metadata; JAX's own detection reads it."""
    answers = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "a:b:127.0.0.1,c:d:127.0.0.2",
        "tpu-env": "X: ''",
    }

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rpartition("/")[2]].encode())

        def log_message(self, *_):
            pass

    from jax._src import cloud_tpu_init
    from jax._src.clusters import cloud_tpu_cluster
    from jax._src.clusters import cluster as jax_cluster

    with socketserver.TCPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_address[1]}")
        monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
        for module in (cloud_tpu_init, cloud_tpu_cluster, jax_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)
        found = places.find(environ={"TPU_LIBRARY_PATH": "/lib/libtpu.so"})
        server.shutdown()
    assert (found.index, found.count, found.address) == (1, 2, "127.0.0.1:8482")


# ---- what must be alike


def test_what_differs_is_named_with_its_processes():
    config = get_config()
    said = {i: hosts.facts(config, {}) for i in range(4)}
    names = {i: f"host{i}" for i in range(4)}
    assert hosts.differences(said, names) == []
    config.optim.lr = 0.5
    said[2] = hosts.facts(config, {"JAX_ENABLE_X64": "1"})
    said[1]["jax"] = "0.8.0"
    jax = said[0]["jax"]
    assert hosts.differences(said, names) == [
        "config.optim.lr is 0.01 on processes 0, 1, 3 and 0.5 on process 2 (host2)",
        f"jax is {jax} on processes 0, 2, 3 and 0.8.0 on process 1 (host1)",
        "JAX_ENABLE_X64 is not set on processes 0, 1, 3 and '1' on process 2 (host2)",
    ]
    assert hosts.apart({1: 3.0, 2: -3600.0}, names) == ["the clock of process 2 (host2) is 3600 s behind"]


def test_another_source_file_is_other_code(tmp_path, monkeypatch):
    for version in "ab":
        (tmp_path / version / "data").mkdir(parents=True)
        (tmp_path / version / "hosts.py").write_text("")
        (tmp_path / version / "data" / "x.py").write_text("x = 1\n")
    digests = []
    for change in ("x = 1\n", "x = 2\n"):
        (tmp_path / "b" / "data" / "x.py").write_text(change)
        for version in "ab":
            monkeypatch.setattr(hosts, "__file__", str(tmp_path / version / "hosts.py"))
            digests.append(hosts.code_digest())
    assert digests[0] == digests[1] == digests[2] != digests[3]


# ---- the roll call


@pytest.fixture
def address() -> str:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def refused(address, *calls: tuple[int, int, dict], timeout: float = 20.0) -> list[str]:
    """What so many processes, as threads, are told of why there is no run; each (number, count, facts)."""
    told = []

    def one(index, count, facts):
        with pytest.raises(UserError) as error:
            roll.call(index, count, address, facts, timeout)
        told.append(str(error.value))

    threads = [threading.Thread(target=one, args=given) for given in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return told


def test_all_are_told_what_differs(address):
    told = refused(address, (0, 3, {"config.seed": "0"}), (1, 3, {"config.seed": "0"}), (2, 3, {"config.seed": "1"}))
    assert len(set(told)) == 1
    assert len(told) == 3
    assert told[0].startswith("the processes differ: config.seed is 0 on processes 0, 1 and 1 on process 2 (")


def test_all_are_told_that_numbers_are_wrong(address, monkeypatch):
    monkeypatch.setattr(roll, "LINGER", 0.5)
    told = refused(address, (0, 3, {}), (1, 3, {}), (1, 3, {}))
    assert len(set(told)) == 1
    assert len(told) == 3
    assert told[0].startswith("two processes have the number 1: ")
    told = refused(address, (0, 2, {}), (1, 3, {}))
    assert len(set(told)) == 1
    assert told[0].startswith("there are 2 processes, says process 0, and 3, says process 1 (")


def test_clocks_that_are_far_apart_are_told(address, monkeypatch):
    times = iter((7000.0, 0.0))  # of who comes, and of process 0
    monkeypatch.setattr(roll.time, "time", lambda: next(times))
    told = refused(address, (0, 2, {}), (1, 2, {}))
    assert len(told) == 2
    assert "the clock of process 1 (" in told[0]
    assert "is 7000 s ahead" in told[0]


def test_who_does_not_come_is_named_within_the_bound(address, monkeypatch):
    monkeypatch.setattr(roll, "LINGER", 0.5)
    begun = time.time()
    told = refused(address, (0, 4, {}), (2, 4, {}), timeout=1.0)
    assert set(told) == {f"processes 1, 3 have not come to {address} within 1 s, of 4"}
    assert time.time() - begun < 20


def test_a_coordinator_that_does_not_answer_is_named_within_the_bound(address):
    told = refused(address, (1, 2, {}), timeout=0.5)
    assert told == [
        f"process 1 cannot reach process 0 at {address} within 0.5 s (Connection refused): "
        "is it there, and its port open?"
    ]
    with socket.create_server(("127.0.0.1", 0)) as other:  # something else is there
        where = f"127.0.0.1:{other.getsockname()[1]}"

        def answer():
            for _ in range(2):
                with other.accept()[0] as connection:
                    connection.recv(100)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        told = refused(where, (1, 2, {}), timeout=0.3)
    assert "what answers there is no process 0 of this run" in told[0] or "cannot reach process 0" in told[0]


def test_strangers_do_not_disturb_the_roll(address, monkeypatch):
    host, _, port = address.rpartition(":")

    def stranger():
        time.sleep(0.2)
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b"[1, 2]\n", b"\xff\n"):
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(said)

    threading.Thread(target=stranger).start()
    threading.Timer(1.0, lambda: refused(address, (1, 2, {"a": "1"}))).start()
    told = refused(address, (0, 2, {"a": "0"}))
    assert told[0].startswith("the processes differ: a is 0 on process 0 (")


# One process of three: it joins, says so, and does what it is told to.
MEMBER = """
import os, sys, time
from tljax import cluster, command, roll
from tljax.errors import UserError
index, address, act = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def main(_):
    cluster._roll = roll.call(index, 3, address, {}, 60)
    cluster.meet()
    if act == "meet":
        time.sleep(index / 10)
        print(f"{time.time()}", flush=True)
        cluster.meet(weights=lambda: "abc")
        print(f"{time.time()}", flush=True)
        cluster.meet(step=lambda: index // 2)
    print("joined", flush=True)
    if act == "fail":
        raise UserError("a photograph is broken")
    if act == "crash":
        raise TypeError("no such thing")
    if act == "end":
        return 0
    time.sleep(60)
command.run(main)
"""


def three(address, *acts: str):
    """Starts them; all have joined when it returns."""
    processes = [script(MEMBER, str(i), address, act) for i, act in enumerate(acts)]
    for process in processes:
        assert process.stdout.readline() == "joined\n"
    return processes


def ends(processes) -> list[tuple[int, str]]:
    """(exit code, stderr) of each."""
    said = [process.communicate(timeout=200)[1] for process in processes]
    return [(process.returncode, err) for process, err in zip(processes, said)]


def test_processes_meet_and_differ(address):
    processes = [script(MEMBER, str(i), address, "meet") for i in range(3)]
    said = [process.communicate(timeout=200) for process in processes]
    differ = "error: the processes differ: the step is 0 on processes 0, 1 and 1 on process 2 ("
    assert [(process.returncode, err[: len(differ)]) for process, (_, err) in zip(processes, said)] == [(2, differ)] * 3
    before, after = zip(*(map(float, out.split()) for out, _ in said))
    assert max(before) <= min(after)


@pytest.mark.parametrize("dead", [0, 2])
def test_the_others_name_a_process_that_is_killed(address, dead):
    processes = three(address, "wait", "wait", "wait")
    processes[dead].send_signal(signal.SIGKILL)
    for index, (code, err) in enumerate(ends(processes)):
        if index == dead:
            assert code == -signal.SIGKILL
        else:
            assert code == 75
            assert err.startswith(f"error: process {dead} (")
            assert f"pid {processes[dead].pid}) is gone; start all processes again" in err
            assert err.count("\n") == 1


def test_the_others_end_with_what_one_cannot_mend_and_not_with_what_is_done(address):
    assert ends(three(address, "wait", "fail", "wait")) == [(2, "error: a photograph is broken\n")] * 3
    (_, zero), (code, err), (last, two) = ends(three(address, "wait", "crash", "end"))
    assert code == 1
    assert err.endswith("TypeError: no such thing\n")
    assert zero == "error: process 1 has failed, as its log tells: TypeError: no such thing\n"
    assert (last, two) in ((0, ""), (1, zero))  # it had ended, or was about to


# ---- what they say


def test_lines_carry_the_number_and_jaxs_page_becomes_one_line():
    page = (
        "E1120 19:14:11.4 3187 coordination_service_agent.cc:289] Polled an error from coordination service\n"
        "F1120 18:35:20.1 25357 client.h:80] Terminating process because the JAX distributed service detected fatal "
        "errors. absl::Status: UNAVAILABLE\nRPC: PollForError\n*** Check failure stack trace: ***\n    @ 0x7fa0\n"
    )
    passed = lambda mark, text: (
        subprocess.run(
            [sys.executable, "-I", "-S", relay.__file__, mark],
            input=text,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    )
    assert passed("[3] ", "a\nerror: b") == "[3] a\n[3] error: b"
    assert passed("", "a\n" + page + "error: process 0 is gone\n") == "a\nerror: process 0 is gone\n"
    assert passed("[3] ", page) == f"[3] {relay.GONE.decode()}"

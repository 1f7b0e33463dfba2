"""launch/tpu_vm.sh with a `gcloud` that records its calls, plays the life of a slice, and preempts it."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "launch" / "tpu_vm.sh"
# `slice` holds the state of the queued resource and is absent where there is none; each look at it moves it on.
# `runs` has a line for each time that the command is run on the hosts: what happens to the slice, and the exit code.
GCLOUD = r"""#!/usr/bin/env bash
cd "$FAKE"
printf '%s\n' "$*" >> calls
case "$*" in
  *"queued-resources create"*) [ -e slice ] && exit 1; echo "${FIRST:-WAITING_FOR_RESOURCES}" > slice ;;
  *"queued-resources list"*)
    [ -e deaf ] && { rm deaf; exit 1; }
    [ -e slice ] || exit 0
    found=$(cat slice); echo "$found"
    case $found in WAITING_FOR_RESOURCES) echo PROVISIONING > slice ;; PROVISIONING) echo ACTIVE > slice ;; esac ;;
  *"queued-resources delete"*) [ -e slice ] || exit 1; rm slice ;;
  *"queued-resources describe"*) echo "no more quota" ;;
  *" scp "*)
    [ "$(cat slice)" = ACTIVE ] || exit 255
    for word in "$@"; do case $word in /*) cp "$word" host/ ;; esac; done ;;
  *"--command=bash host.sh install"*) [ -e broken ] && exit 2; exit 0 ;;
  *"--command=bash host.sh run"*)
    read -r what code < runs; sed -i 1d runs
    [ "$what" = preempted ] && echo SUSPENDED > slice
    [ "$what" = long ] && { trap 'exit 1' INT; touch running; for i in {1..600}; do sleep 0.1; done; }
    exit "${code:-0}" ;;
  *"storage rsync"*) exit 0 ;;
  *) echo "what is $*?" >&2; exit 64 ;;
esac
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A small clone with the script."""
    clone = tmp_path_factory.mktemp("clone")
    (clone / "launch").mkdir()
    shutil.copy(SCRIPT, clone / "launch")
    for name in ("pyproject.toml", "not committed.py", "left out"):
        (clone / name).touch()
    (clone / ".gitignore").write_text("left out\n")
    subprocess.run(["git", "init", "-q"], cwd=clone, check=True)
    subprocess.run(["git", "add", "pyproject.toml", "launch"], cwd=clone, check=True)
    return clone


@pytest.fixture
def play(clone, tmp_path):
    """`play(*runs)` runs the script; returns its exit code, what it says, and the calls, in short."""
    (tmp_path / "host").mkdir()
    (tmp_path / "gcloud").write_text(GCLOUD)
    (tmp_path / "gcloud").chmod(0o755)

    def run(*runs, argv=("--config=my config.py",), **more):
        (tmp_path / "runs").write_text("".join(f"{line}\n" for line in runs))
        environment = os.environ | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "FAKE": str(tmp_path), "POLL": "0", "PROJECT": "my-project",
            "ZONE": "us-west4-a", "ACCELERATOR": "v5litepod-16", "BUCKET": "gs://abc/runs", "NAME": "one", "SPOT": "1",
            "WORKDIR": str(tmp_path / "one"),
        } | more  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, str(clone / "launch" / "tpu_vm.sh"), *argv], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        while runs == ("long",) and not (tmp_path / "running").exists() and process.poll() is None:
            time.sleep(0.05)
        if runs == ("long",):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
        _, err = process.communicate(timeout=120)
        file = tmp_path / "calls"
        calls = [_short(line) for line in file.read_text().splitlines()] if file.exists() else []
        return process.returncode, err, [call for call in calls if call != "list"]

    return run


def _short(call: str) -> str:
    for name in ("create", "list", "delete", "describe", "scp", "install", "run ", "rsync"):
        if f" {name}" in call:
            return name.strip()
    return call


# Where the tests run in the background, SIGINT is ignored, and the script would inherit that.
INTERRUPTED = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
)
MADE = ["create", "scp", "install"]
OVER = ["rsync", "delete"]


def test_a_slice_is_made_used_and_deleted(play, tmp_path):
    code, err, calls = play("done 0")
    assert code == 0, err
    assert calls == [*MADE, "run", *OVER]
    assert not (tmp_path / "slice").exists()
    lines = (tmp_path / "calls").read_text().splitlines()
    find = lambda name: next(shlex.split(line) for line in lines if name in line)
    place = ["--project=my-project", "--zone=us-west4-a", "--quiet"]
    assert find(" create ") == [
        "compute", "tpus", "queued-resources", "create", "one", "--node-id=one", "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite", "--scopes=cloud-platform", "--spot", *place,
    ]  # fmt: skip
    run = next(line for line in lines if "host.sh run" in line)
    assert "tpu-vm ssh one --worker=all --command=" in run
    inner = run.partition("--command=")[2].removesuffix(" ".join(["", *place]))
    assert shlex.split(inner) == ["bash", "host.sh", "run", "--config=my config.py", "--workdir=gs://abc/runs/one"]
    assert find("rsync") == ["storage", "rsync", "--recursive", "gs://abc/runs/one", str(tmp_path / "one")]
    packed = subprocess.run(["tar", "-tzf", tmp_path / "host" / "tljax.tar.gz"], capture_output=True, text=True).stdout
    assert sorted(packed.splitlines()) == [".gitignore", "launch/tpu_vm.sh", "not committed.py", "pyproject.toml"]


def test_after_a_preemption_it_goes_on_on_the_next_slice(play):
    """Saved at the signal, cut off, or left with hosts that miss the others."""
    code, err, calls = play("preempted 143", "preempted 255", "preempted 2", "done 0")
    assert code == 0, err
    again = ["run", "delete", *MADE]
    assert calls == [*MADE, *again * 3, "run", *OVER]
    assert err.count("one is preempted: queued again") == 3


def test_a_saved_run_starts_again_on_the_same_slice(play):
    code, err, calls = play(*["kept 143"] * 3, "done 0", RETRIES="1")
    assert code == 0, err
    assert calls == [*MADE, *["run"] * 4, *OVER]


def test_a_mistake_is_never_started_again(play):
    code, _, calls = play("kept 2", "done 0")
    assert (code, calls) == (2, [*MADE, "run", *OVER])


@pytest.mark.parametrize("failure", [75, 255])
def test_errors_are_tried_again_so_many_times(play, failure):
    code, _, calls = play(*[f"kept {failure}"] * 9, RETRIES="1")
    assert (code, calls) == (failure, [*MADE, "run", "run", *OVER])


def test_an_installation_that_fails_is_no_mistake_of_the_run(play, tmp_path):
    (tmp_path / "broken").touch()
    code, _, calls = play(RETRIES="1")
    assert (code, calls) == (1, [*MADE, *MADE[1:], "delete"])


def test_a_slice_that_cannot_be_had_is_told(play):
    code, err, calls = play(FIRST="FAILED")
    assert (code, calls) == (1, ["create", "describe", "delete"])
    assert "no more quota" in err


def test_a_slice_that_is_there_is_used_and_a_failing_call_made_again(play, tmp_path):
    """As after a lost connection."""
    (tmp_path / "slice").write_text("ACTIVE\n")
    (tmp_path / "deaf").touch()
    code, _, calls = play("done 0")
    assert (code, calls) == (0, [*MADE[1:], "run", *OVER])


def test_ctrl_c_leaves_the_run_at_work_and_says_so(play, tmp_path):
    code, err, calls = play("long")
    assert (code, calls) == (130, [*MADE, "run"])
    assert (tmp_path / "slice").exists()
    assert err.endswith("tpu_vm.sh down` deletes it, the same command goes on\n")


def test_down_deletes_the_slice(play, tmp_path):
    (tmp_path / "slice").write_text("ACTIVE\n")
    code, _, calls = play(argv=["down"], ACCELERATOR="", BUCKET="")
    assert (code, calls) == (0, ["delete"])


def test_what_is_not_set_is_told(play):
    code, err, calls = play(BUCKET="")
    assert (code, calls) == (2, [])
    assert err.startswith("error: BUCKET is not set; ")
    assert err.count("\n") == 1


# What stands for the hosts' tools: `uv venv` makes a Python that says what it is told and trains for a while.
UV = """#!/bin/sh
[ "$1" = venv ] || exit 0
mkdir -p venv/bin && cp trainer venv/bin/python
"""
TRAINER = """#!/bin/sh
echo "begins: $*"
echo begun >> ../begun
while [ ! -e ../end ]; do sleep 0.05; done
echo ends
exit "$(cat ../end)"
"""


def test_a_lost_connection_does_not_stop_the_run(play, tmp_path):
    """host.sh, which the script brings to each host, as it runs there."""
    assert play("done 0")[0] == 0
    host, bin = tmp_path / "host", tmp_path / "bin"
    bin.mkdir()
    for file, text in ((bin / "uv", UV), (bin / "python3", "#!/bin/sh\n"), (host / "trainer", TRAINER)):
        file.write_text(text)
        file.chmod(0o755)
    environment = {"PATH": f"{bin}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    start = lambda *argv: subprocess.Popen(
        ["bash", "host.sh", *argv],
        cwd=host,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert start("install", "demo").wait(60) == 0
    assert (host / "tljax" / "pyproject.toml").is_file()
    first = start("run", "--config=my config.py")
    assert first.stdout.readline() == "begins: -m tljax.train --config=my config.py\n"
    first.kill()  # the connection is lost
    marker = host / "tljax" / "here"
    marker.touch()
    assert start("install", "demo").wait(60) == 0
    assert marker.exists()  # nothing is replaced under a run that is at work
    second = start("run", "--config=my config.py")
    (host / "end").write_text("143")
    assert second.communicate(timeout=60)[0].splitlines()[-1] == "ends"
    assert second.returncode == 143
    (host / "end").write_text("0")
    third = start("run")
    assert third.communicate(timeout=60)[0].splitlines() == ["begins: -m tljax.train", "ends"]
    assert third.returncode == 0
    assert (host / "begun").read_text() == "begun\n" * 2

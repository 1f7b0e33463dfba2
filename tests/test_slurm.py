"""launch/slurm.sbatch on a real SLURM of one machine: who is preempted goes on, who errs or is cancelled ends."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import slurm_cluster
from conftest import changed, command, rows

from tljax.launch import __main__ as launch
from tljax.launch import templates
from tljax.workdir import Workdir

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not slurm_cluster.there(), reason="no SLURM: apt-get install slurmctld slurmd munge slurm-client"
    ),
]
PROGRAM = """#!/usr/bin/env bash
# Stands for Python: the first time it runs until it is told to stop, the second time it is soon done.
echo "${SLURM_RESTART_COUNT:-0} $*" >> starts
[ -e code ] && exit "$(cat code)"
[ "$(wc -l < starts)" -gt 1 ] && exit 0
[ -e lost ] && exit 75
trap 'echo saved; exit 143' TERM
for i in {1..600}; do sleep 0.1; done
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of the cluster."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


class Job:
    """A job of launch/slurm.sbatch in a directory of its own."""

    def __init__(self, environment: dict, path: Path, *argv: str, options=(), python: str = "./program"):
        self.environment, self.path = environment | {"PYTHON": python}, path
        program = path / "program"
        program.write_text(PROGRAM)
        program.chmod(0o755)
        script = str(templates.folder() / "slurm.sbatch")
        self.number = self.said("sbatch", "--parsable", *options, script, *argv)

    def said(self, *command: str) -> str:
        """What a command of SLURM says, in the job's directory."""
        found = subprocess.run(command, env=self.environment, cwd=self.path, capture_output=True, text=True)
        assert found.returncode == 0, found
        return found.stdout.strip()

    def field(self, name: str) -> str:
        """A field of the job, as SLURM shows it."""
        return re.search(rf"\b{name}=(\S+)", self.said("scontrol", "show", "job", self.number))[1]

    def until(self, done, seconds: float = 900) -> None:
        """Waits for something to be true."""
        deadline = time.time() + seconds
        while not done():
            assert time.time() < deadline, (self.said("scontrol", "show", "job", self.number), self.log())
            time.sleep(0.5)

    def ended(self) -> str:
        """The state in which the job ends."""
        self.until(lambda: self.field("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"))
        return self.field("JobState")

    def starts(self) -> list[str]:
        """The restart count of each start, and its arguments."""
        file = self.path / "starts"
        return file.read_text().splitlines() if file.exists() else []

    def log(self) -> str:
        """What the job has said so far."""
        return "".join(path.read_text() for path in self.path.glob("slurm-*.log"))


def test_a_signalled_job_saves_and_is_queued_again(slurm, tmp_path):
    """As SLURM signals the steps when time is nearly over."""
    job = Job(slurm, tmp_path, "--config=it's here.py", "--workdir=run")
    job.until(job.starts)
    job.said("scancel", "--signal=TERM", job.number)
    assert job.ended() == "COMPLETED"
    arguments = "-m tljax.train --config=it's here.py --workdir=run"
    assert job.starts() == [f"0 {arguments}", f"1 {arguments}"]
    assert job.log().index("saved") < job.log().index("tljax: queued again, restart 1")
    assert job.field("Restarts") == "1"


def test_who_has_lost_another_process_starts_again(slurm, tmp_path):
    (tmp_path / "lost").touch()
    job = Job(slurm, tmp_path)
    assert job.ended() == "COMPLETED"
    assert [line[0] for line in job.starts()] == ["0", "1"]


def test_a_preempted_job_saves_and_runs_once_more(slurm, tmp_path):
    """SLURM, not the script, queues it again."""
    job = Job(slurm, tmp_path)
    job.until(job.starts)
    job.said("scontrol", "requeue", job.number)
    assert job.ended() == "COMPLETED"
    assert [line[0] for line in job.starts()] == ["0", "1"]
    assert "saved" in job.log()
    assert "queued again" not in job.log()


def test_who_is_cancelled_saves_and_ends(slurm, tmp_path):
    job = Job(slurm, tmp_path)
    job.until(job.starts)
    job.said("scancel", job.number)
    assert job.ended() == "CANCELLED"
    job.until(lambda: "saved" in job.log(), 30)
    time.sleep(8)  # more than the time for which a requeued job waits
    assert job.field("JobState") == "CANCELLED"
    assert len(job.starts()) == 1


@pytest.mark.parametrize("code", [1, 2])
def test_an_error_ends_the_job(slurm, tmp_path, code):
    (tmp_path / "code").write_text(str(code))
    job = Job(slurm, tmp_path, options=["--ntasks=2", "--ntasks-per-node=2"])
    assert job.ended() == "FAILED"
    assert job.field("ExitCode") == f"{code}:0"
    time.sleep(8)
    assert len(job.starts()) == 2  # one of each task


def test_the_command_submits_what_it_shows(slurm, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where its log will be
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    argv = ["slurm", f"--config={Path(__file__).parent / 'tiny.py'}", "--cpus=1", "--time=0:10:00", "--name=named"]
    assert launch.main([*argv, f"--workdir={tmp_path / 'run'}"]) == 0
    out, err = capfd.readouterr()
    number = re.search(r"Submitted batch job (\d+)", out)[1]
    assert "to start at" in err  # as sbatch --test-only says
    assert "at most 1 nodes × 0:10:00" in out
    found = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True).stdout
    assert "JobName=named" in found
    assert "TimeLimit=00:10:00" in found
    subprocess.run(["scancel", number], check=True)


def test_a_requeued_run_resumes_exactly(slurm, tiny, tmp_path):
    """A real run, preempted in the middle: metrics and figures are those of one that was never stopped."""
    long = {"train_for": "200 steps", "eval_every": "100 steps", "checkpoint_every": "50 steps", "cache": "off"}
    whole = command("tljax.train", *changed(tiny, tmp_path / "whole", **long))
    assert whole.wait(timeout=900) == 0
    environment = slurm | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(templates.folder().parent)}
    job = Job(environment, tmp_path, *changed(tiny, tmp_path / "run", **long), python=sys.executable)
    metrics = tmp_path / "run" / "metrics.jsonl"
    job.until(lambda: metrics.exists() and metrics.read_text())
    job.said("scontrol", "requeue", job.number)
    assert job.ended() == "COMPLETED"
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", job.log())[1])
    assert 0 < step < 200
    assert f"resumed from step {step}" in job.log()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    summary, other = (Workdir(tmp_path / name).summary() for name in ("run", "whole"))
    for name in ("frozen", "val", "test"):
        assert summary[name] == other[name]


def test_two_processes_of_a_job_are_one_run(slurm, tiny, tmp_path):
    """Joined as SLURM's environment says; the metrics are written once."""
    environment = slurm | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(templates.folder().parent)}
    options = ["--ntasks=2", "--ntasks-per-node=2"]
    job = Job(environment, tmp_path, *changed(tiny, tmp_path / "run"), options=options, python=sys.executable)
    assert job.ended() == "COMPLETED"
    assert Workdir(tmp_path / "run").summary()["devices"]["processes"] == 2
    assert job.log().count("step 24/24") == 1

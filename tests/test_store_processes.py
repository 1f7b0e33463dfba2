"""Several processes of one run that keep their checkpoints in a store to which process 0 alone writes: s3://."""

import json
import re
import signal

import pytest
from conftest import TINY
from etils import epath
from test_launch import CLOSE, DIES, SHARDED, assert_same, ended, together
from test_resume import end
from test_stores import SHORT

from tljax import evaluate
from tljax.workdir import Workdir

PLACE = "s3://bucket/runs/a"
LAID = "--config.parallel.fsdp=4"  # over both processes

SAVES = """
import json, os, sys
import jax
jax.distributed.initialize(os.environ["JAX_COORDINATOR_ADDRESS"], 2, int(os.environ["JAX_PROCESS_ID"]))
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tljax.checkpoint import Checkpoints, Damaged
from tljax.errors import UserError

place, = sys.argv[1:]
mesh = Mesh(np.array(jax.devices()), ("x",))
lie = {"w": NamedSharding(mesh, PartitionSpec("x")), "b": NamedSharding(mesh, PartitionSpec())}
whole = lambda step: {"w": np.arange(640, dtype=np.float32).reshape(64, 10) + step, "b": np.float32(step)}
put = lambda tree: jax.tree.map(lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda i: x[i]), tree, lie)
like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), whole(0), lie)
right = lambda tree, step: all(
    np.array_equal(s.data, whole(step)[k][s.index]) for k, x in tree.items() for s in x.addressable_shards
)
told = {}
checkpoints = Checkpoints(place)
for step in (1, 2, 3, 3):
    checkpoints.save(step, put(whole(step)), {"step": step}, best=None)
told["steps"] = checkpoints.steps(), checkpoints.latest()
checkpoints.close()
for create in (True, False):
    again = Checkpoints(place, create=create)
    last = again.latest()
    told[f"again {create}"] = [again.steps(), again.notes(2), right(again.restore(last, like), last)]
    if create:
        told["aside"] = again.set_aside([3]), again.steps()
        again.save(4, put(whole(4)), {"step": 4}, best=None)
        again.wait()
        told["after"] = again.steps()
    again.close()
print(json.dumps(told), flush=True)
"""


def flip(held, url: str) -> None:
    """Damages the object at an s3:// address."""
    content = bytearray(held.read(url))
    content[len(content) // 2] ^= 1
    bucket, _, name = url.removeprefix("s3://").partition("/")
    held.put(bucket, name, bytes(content))


def copied(held, url: str, other: str) -> str:
    """Copies what is below an s3:// address to another one, which is returned."""
    for name in held.names_below(url):
        bucket, _, place = other.removeprefix("s3://").partition("/")
        held.put(bucket, f"{place}/{name}", held.read(f"{url}/{name}"))
    return other


@pytest.mark.slow
def test_checkpoints_of_two_processes(buckets):
    """Laid over both; written by one, read, agreed on and set aside by both."""
    processes = together(SAVES, [[f"{PLACE}/checkpoints"]] * 2, 2, devices=2)
    first, second = (json.loads(ended(process)[0].splitlines()[-1]) for process in processes)
    assert first == second
    assert first == {
        "steps": [[2, 3], 3], "again True": [[2, 3], {"step": 2}, True], "aside": ["deleted", [2]],
        "after": [2, 4], "again False": [[2, 4], {"step": 2}, True],
    }  # fmt: skip
    names = buckets["s3"].names_below(f"{PLACE}/checkpoints")
    assert {name.partition("/")[0] for name in names} == {"2", "4"}
    assert not [name for name in names if "process_1" in name]


@pytest.fixture(scope="module")
def disk(photos, tmp_path_factory):
    """A run of two processes on a disk, whose leaves lie over both."""
    path = tmp_path_factory.mktemp("disk") / "run"
    for process in start(photos, path):
        ended(process)
    return path


def start(photos, workdir, *more: str, texts: tuple[str, ...] = (SHARDED, SHARDED), devices: int = 2) -> list:
    """Starts as many processes of a run as there are texts; what a text needs first are its lines of `# `."""
    argv = [f"--config={TINY}", f"--config.data.source=folder:{photos}", *SHORT, LAID, f"--workdir={workdir}", *more]
    argvs = [[*re.findall("^# (.*)$", text, re.MULTILINE), *argv] for text in texts]
    return together(
        f"import os; exec({list(texts)!r}[int(os.environ['JAX_PROCESS_ID'])])", argvs, len(texts), devices=devices
    )


TOLD = f"""
import sys
from tljax import loop
step, *sys.argv[1:] = sys.argv[1:]
told_to_stop = loop.told_to_stop

def telling(run, at):
    if at == int(step):
        print("at the step", file=sys.stderr, flush=True)
    return told_to_stop(run, at)

loop.told_to_stop = telling
{SHARDED}
"""
DIES_SHARDED = f"from tljax import parallel; parallel.FSDP_LEAST = 64\n{DIES}"


@pytest.mark.slow
def test_a_run_of_two_processes_that_are_killed_ends_as_on_a_disk(buckets, photos, disk, tmp_path):
    """Either is killed, in a save and before one; it goes on in two processes, bit for bit, and in one."""
    for dead, moment, step in ((0, "during", 3), (1, "before", 6)):
        texts = [SHARDED, SHARDED]
        texts[dead] = f"# {moment}\n# {step}\n{DIES_SHARDED}"
        processes = start(photos, PLACE, texts=tuple(texts))
        _, err = ended(processes[1 - dead], 75)
        assert f"process {dead} (" in err
        ended(processes[dead], -signal.SIGKILL)

    alone = copied(buckets["s3"], PLACE, "s3://bucket/runs/alone")
    (one,) = start(photos, alone, texts=(SHARDED,), devices=4)
    first, second = start(photos, PLACE)
    out, _ = ended(first)
    ended(second)
    assert re.search(r"resumed from step [34];", out)
    out, _ = ended(one)
    assert re.search(r"resumed from step [34];", out)
    assert not [p for p in (tmp_path / "cache").rglob("workdirs/**/*") if p.is_file()]
    assert end(epath.Path(PLACE)) == end(disk)
    assert_same(alone, disk, CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_either_of_two_processes_saves_one_step(buckets, photos, disk, told):
    processes = start(photos, PLACE, texts=(f"# 2\n{TOLD}",) * 2)
    for line in processes[told].stderr:
        if line.endswith("at the step\n"):
            break
    processes[told].send_signal(signal.SIGTERM)
    out, _ = [ended(process, 143)[0] for process in processes]
    step = int(re.search(r"stopped by SIGTERM at step (\d+), saved", out)[1])
    assert evaluate.restore(Workdir(PLACE), "last")[-1]["step"] == step
    first, second = start(photos, PLACE)
    assert f"resumed from step {step};" in ended(first)[0]
    ended(second)
    assert end(epath.Path(PLACE)) == end(disk)


@pytest.mark.slow
def test_two_processes_agree_on_damage_and_on_what_the_store_refuses(buckets, photos, disk):
    there = buckets["s3"]
    there.refused = "PUT .*/checkpoints/6/"
    for process in start(photos, PLACE):
        _, err = ended(process, 2)
        assert re.fullmatch(r"(\[1\] )?error: cannot write a checkpoint .*; the last whole one is of step 4\n", err)
    there.refused = ""
    there.put("bucket", "runs/a/checkpoints/6/whole.json", b"half")  # a list that is damaged, of nothing
    first, second = start(photos, PLACE)
    out, err = ended(first)
    ended(second)
    assert f"{PLACE}/checkpoints/6 is damaged: " in out
    assert "the run goes on from step 4\n" in out
    assert end(epath.Path(PLACE)) == end(disk)
    flip(there, f"{PLACE}/checkpoints/9/notes/metadata")
    there.objects.pop(("bucket", "runs/a/summary.json"))
    first, second = start(photos, PLACE)
    assert re.search(rf"{PLACE}/checkpoints/9 is damaged: .*the run goes on from step \d\n", ended(first)[0])
    ended(second)
    assert end(epath.Path(PLACE)) == end(disk)

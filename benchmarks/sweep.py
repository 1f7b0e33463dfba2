"""What training members together saves: steps of groups, and whole sweeps against ordinary runs.

    python benchmarks/sweep.py                # extra `demo`; an hour on 2 cores; writes docs/speed.md
    python benchmarks/sweep.py --only=steps   # or heads, members, depth: one part

Finished runs are kept in --workdir; the ordinary runs of the main job are those of benchmarks/cache.py, in --runs.
"""

from tljax import pages

if __name__ == "__main__":
    pages.restart()

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cache as ordinary
import numpy as np
import sections
import turns

SWEEPS = ordinary.CONFIGS / "sweeps"
REPEATS = 7
POOL = 640  # photographs whose features are kept
CLASSES = 14
LAST = "frozen_norms(partial(last={}, body=0.03))"
# What trains: network, strategy, members, ways, whether features are kept, steps that are measured as one.
GROUPS = {
    "64 rates of a head, from images": ("efficientnet_lite0", "frozen()", 64, ("vmap",), False, 5),
    "64 rates of a head, on features": ("efficientnet_lite0", "frozen()", 64, ("vmap", "map"), True, 50),
    "EfficientNet-Lite0, last 2 stages": ("efficientnet_lite0", LAST.format(2), 16, ("vmap", "map"), True, 3),
    "ViT-S/16, last 2 blocks": ("vit_small_patch16", LAST.format(2), 4, ("vmap", "map"), True, 1),
    "ResNet-50, last block": ("resnet50", LAST.format(1), 4, ("vmap", "map"), True, 1),
}


def steps(name: str, members: int, how: str):
    """A function that takes some steps of so many members, each with a rate of its own, and returns seconds of one."""
    import jax

    from tljax import config as configs
    from tljax import experiment
    from tljax.members import Members
    from tljax.parallel import Layout, Spread
    from tljax.step import numbers_of

    network, strategy, _, _, kept, count = GROUPS[name]
    config = configs.base(network)
    config.strategy, config.weights, config.reset = strategy, "", ()
    layout = Layout(configs.ConfigDict({"mode": "jit", "fsdp": 1}), config.batch_size, devices=1)
    exp = experiment.build(config, CLASSES, layout)
    phase, size, batch = exp.in_time(POOL)[0], exp.preprocessing.size, config.batch_size
    programs = Members(exp, layout, phase, how, kept, False, Spread(1))
    own, shared = programs.begin([exp.load()[:2]] * members)
    rng = np.random.default_rng(0)
    if kept:
        like = exp.features(phase.plan)
        inputs = {"features": rng.normal(size=(1, POOL, *like.shape)).astype(like.dtype)}
    else:
        inputs = {"image": rng.integers(0, 256, (batch, size, size, 3)).astype(np.uint8)}
    inputs = jax.device_put(inputs | {"label": rng.integers(0, CLASSES, POOL if kept else batch).astype(np.int32)})
    index = (np.zeros(batch, np.int32), rng.permutation(POOL)[:batch].astype(np.int32)) if kept else None
    multipliers = np.array([leaf.multiplier for leaf in phase.plan.trainable], np.float32)
    numbers = numbers_of(config)._replace(multipliers=multipliers)
    numbers = jax.tree.map(lambda x: np.broadcast_to(x, (members, *np.shape(x))), numbers)
    numbers = numbers._replace(lr=np.geomspace(1e-4, 1e-2, members).astype(np.float32))
    yes = np.ones(members, bool)
    states = [own, yes]
    compiled = programs.step.lower(own, yes, shared, np.int32(0), yes, numbers, inputs, index).compile()

    def run() -> float:
        begun = time.perf_counter()
        for i in range(count):
            *states[:], measured = compiled(*states, shared, np.int32(i), yes, numbers, inputs, index)
        jax.block_until_ready((states, measured))
        return (time.perf_counter() - begun) / count

    return run


def compare_steps() -> list[tuple]:
    """Rows of one member's step against that of all, each way."""
    rows = []
    for name, (_, _, members, ways, _, _) in GROUPS.items():
        process = turns.Process(sys.executable, __file__, f"--serve={name}")
        whats = ("one", *ways)
        for what in whats:
            process.seconds(what)
        found = [[process.seconds(what) for what in whats] for _ in range(REPEATS)]
        process.close()
        one, *others = np.median(found, 0)
        for how, seconds in zip(ways, others):
            rows.append(
                (name, members, how, f"{1e3 * one:.1f}", f"{1e3 * seconds:.1f}", f"{seconds / one:.2f}",
                 f"{members * one / seconds:.2f}")
            )  # fmt: skip
            print(*rows[-1], sep="\t", flush=True)
    return rows


def serve(name: str) -> None:
    """The other end of `compare_steps`."""
    _, _, members, ways, _, _ = GROUPS[name]
    turns.serve(lambda: {"one": steps(name, 1, "vmap")} | {how: steps(name, members, how) for how in ways})


def command(*argv: str) -> float:
    """Seconds of a command."""
    begun = time.time()
    subprocess.run([sys.executable, "-m", *argv], stdout=subprocess.DEVNULL, check=True)
    return time.time() - begun


def swept(folder: Path, name: str, config: str) -> tuple[float, list[dict]]:
    """(seconds of a sweep, its rows); the sweep is run where it has not been."""
    path = folder / name
    if not (path / "seconds").exists():
        shutil.rmtree(path, ignore_errors=True)
        seconds = command("tljax.sweep", f"--config={SWEEPS / config}", f"--workdir={path}")
        (path / "seconds").write_text(str(seconds))
    from tljax.folder import Folder

    return float((path / "seconds").read_text()), Folder(path).results()


def alone(folder: Path, name: str, row: dict, cached: bool) -> float:
    """Seconds of the ordinary run of a member, with its kept features or with new augmented views each epoch."""
    from tljax import config as configs
    from tljax import grid
    from tljax.folder import Folder

    path = folder / f"{name}-{row['number']}{'' if cached else '-uncached'}"
    if not (path / "seconds").exists():
        shutil.rmtree(path, ignore_errors=True)
        (member,) = (m for m in grid.members(Folder(folder / name).config()) if m.number == row["number"])
        path.mkdir(parents=True)
        if not cached:
            member.config.update(cache="off", cache_views=0)
        whole = repr(configs.to_json(member.config))
        text = f"from tljax.config import from_json\n\n\ndef get_config():\n    return from_json({whole})\n"
        (path / "config.py").write_text(text)
        seconds = command("tljax.train", f"--config={path / 'config.py'}", f"--workdir={path / 'run'}")
        (path / "seconds").write_text(str(seconds))
    return float((path / "seconds").read_text())


def steps_section(given) -> str:
    """Steps of groups against steps of one."""
    head = ("what trains", "members", "how", "one, ms", "all, ms", "all over one", "faster than in turn")
    return f"""## Sweeps

By `python benchmarks/sweep.py`: batch 16 at 224 pixels, float32. Machine: {sections.machine()}.

Steps, medians of {REPEATS}, of one member and of all in one compiled step; *faster than in turn* compares with as many
steps of one:

{sections.table(head, compare_steps())}

64 heads on kept features cost more than a few steps of one: one takes half a millisecond, most of it the time to begin
a step, and 64 have 64 times the weights, gradients and moments to move. As whole commands they are close (below). Where
more than the head trains, one member's step is near the processor's peak already; what members share is what stands
before it: features, starts, evaluations, reports.
"""


def members_section(given) -> str:
    """Sixteen members of the main job against sixteen ordinary runs."""
    seconds, rows = swept(given.workdir, "sixteen", "seeds.py:count=16,last=2")
    runs = {how: [] for how in ("cached", "uncached")}
    for seed in range(given.seeds):
        for how, found in runs.items():
            found.append(ordinary.finished(given.runs, f"main job, {how}", seed))
    told = []
    for how, found in runs.items():
        each = float(np.median([run["seconds"] for run in found]))
        told.append((f"ordinary runs, {how}", f"{16 * each:.0f}", f"{16 * each / seconds:.1f}"))
        print(*told[-1], sep="\t", flush=True)
    accuracy = lambda found: ordinary.spread([row["test"]["accuracy"] for row in found])
    uncached, cached = (float(np.median([r["seconds"] for r in runs[how]])) for how in ("uncached", "cached"))
    table = sections.table(
        ("16 seeds of configs/partial.py", "wall clock, s", "over the sweep"),
        [("the sweep", f"{seconds:.0f}", "1.0"), *told],
    )
    return f"""
{table}

Ordinary runs are estimated from {given.seeds} of them, {uncached:.0f} s each and with the feature cache {cached:.0f} s.
Test accuracy of the sweep's members {accuracy(rows)} %, of the cached runs {accuracy(runs["cached"])} %.
"""


def heads_section(given) -> str:
    """Sixty-four heads on kept features against ordinary runs of one, which keep theirs as well."""
    seconds, rows = swept(given.workdir, "heads", "seeds.py:count=64")
    each = [alone(given.workdir, "heads", row, True) for row in rows[: given.seeds]]
    one = float(np.median(each))
    table = sections.table(
        ("configs/sweeps/seeds.py:count=64", "wall clock, s", "over one run"),
        [("one ordinary run", f"{one:.0f}", "1.0"), ("the sweep of 64", f"{seconds:.0f}", f"{seconds / one:.2f}")],
    )
    return f"""
{table}

Ordinary runs: {", ".join(f"{t:.0f}" for t in each)} s.
"""


def depth_section(given) -> str:
    """The sweep lr_by_depth against the same runs one after another, estimated from five of them."""
    seconds, rows = swept(given.workdir, "lr_by_depth", "lr_by_depth.py")
    by_depth: dict[str, list[dict]] = {}
    for row in rows:
        by_depth.setdefault(row["fields"]["strategy"], []).append(row)
    # Of each depth a run from the middle of its rates, and of the first depth another.
    chosen = [[found[len(found) // 2]] for found in by_depth.values()]
    chosen[0].append(next(iter(by_depth.values()))[0])
    told, said = [("the sweep", len(rows), f"{seconds / 60:.1f}", "1.0")], []
    for cached, name in ((True, "with their feature cache"), (False, "cache off")):
        each = [[alone(given.workdir, "lr_by_depth", row, cached) for row in found] for found in chosen]
        expected = sum(len(found) * np.mean(times) for found, times in zip(by_depth.values(), each))
        told.append(
            (f"the same runs one after another, {name}", len(rows), f"{expected / 60:.0f}", f"{expected / seconds:.1f}")
        )
        said.append(f"{name} {', '.join(f'{t:.0f}' for found in each for t in found)} s")
    ends = [row["status"].split(" at ")[0] for row in rows]
    table = sections.table(("configs/sweeps/lr_by_depth.py", "members", "wall clock, min", "over the sweep"), told)
    return f"""
{table}

Its members: {", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))}. The ordinary runs are estimated
from {sum(map(len, chosen))} of them, each depth by its own: {"; ".join(said)}. Behind the kept features members share
nothing: what is left are their own steps, near the processor's peak, which no batching makes fewer.
"""


PARTS = {"steps": steps_section, "heads": heads_section, "members": members_section, "depth": depth_section}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmark-sweeps"))
    parser.add_argument("--runs", type=Path, default=Path("runs/cache"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        return serve(given.serve)
    for part in [given.only] if given.only else PARTS:
        text = PARTS[part](given)
        print(text, flush=True)
        sections.write(f"sweep, {part}", text)


if __name__ == "__main__":
    main()

"""What a step asks of a TPU v5e slice, read off the program that the TPU's compiler makes: writes `docs/scaling.md`.

    python benchmarks/scaling.py                      # needs `pip install libtpu`, and no TPU; hours on 2 cores
    python benchmarks/scaling.py --only=resnet50      # some of it: what a name begins with or holds
    python benchmarks/scaling.py --finished           # the document from the programs that there are

Each program is lowered ahead of time for a topology of 8, 64 or 256 chips, from shapes alone, and what the compiler
says of it is kept in --workdir as JSON. Nothing is measured: the document puts those figures beside the published ones
of a chip.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import time
from pathlib import Path

import scaling_page

ROOT = Path(__file__).parent.parent
MODELS = {"resnet50": "ResNet-50", "vit_large_patch16": "ViT-L/16"}
STRATEGIES = {"frozen": "frozen()", "last 4": "partial(last=4)", "LoRA": "lora(rank=8)", "full": "full()"}
TOPOLOGIES = {8: "v5e:2x4", 64: "v5e:8x8", 256: "v5e:16x16"}
LAYOUTS = {
    "replicated": {},
    "frozen bf16": {"frozen_dtype": "bfloat16"},
    "fsdp 8": {"fsdp": 8},
    "fsdp 8, frozen bf16": {"fsdp": 8, "frozen_dtype": "bfloat16"},
    "remat": {"remat": "stages"},
    "fsdp 8, remat": {"fsdp": 8, "remat": "stages"},
}
A_CHIP = 32  # images, of the size of the published weights


@dataclasses.dataclass(frozen=True)
class Case:
    """One program."""

    model: str
    strategy: str
    layout: str
    chips: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return re.sub(r"\W+", "-", f"{self.model} {self.strategy} {self.layout} {self.chips}")


def cases() -> list[Case]:
    """All programs, those first that tell most: the whole pod, then what each layout saves, then smaller slices."""
    found = [Case(m, s, "replicated", 256) for s in ("frozen", "full", "LoRA", "last 4") for m in MODELS]
    for layout in list(LAYOUTS)[1:]:
        # Where everything trains nothing is stored in another dtype; where the head alone does, nothing is kept.
        fits = {"frozen bf16": ("frozen", "last 4", "LoRA"), "remat": ("full", "last 4", "LoRA")}
        of = next((fits[word] for word in fits if layout.endswith(word)), STRATEGIES)
        found += [Case("vit_large_patch16", s, layout, 256) for s in of]
    return found + [Case(m, s, "replicated", n) for n in (8, 64) for m in MODELS for s in STRATEGIES]


def experiment_of(case: Case, layout=None):
    """(experiment, its plan, its optimizer, its state's shapes) of a program."""
    from tljax import config as configs
    from tljax import experiment, optim

    config = configs.base(case.model)
    config.update(weights="", dtype="bfloat16", strategy=STRATEGIES[case.strategy], batch_size=A_CHIP * case.chips)
    config.parallel.update(LAYOUTS[case.layout])
    exp = experiment.build(config, 1000, layout and layout(config))
    plan = exp.plans[0][1]
    tx = optim.optimizer(plan, config.optim, lambda step: config.optim.lr)
    return exp, plan, tx, exp.state_shapes(plan, tx)


def compiled(case: Case) -> dict:
    """What the compiler says of a program; {"refused": its words} where a chip cannot hold it."""
    import jax
    from jax.experimental import topologies

    from tljax import cost
    from tljax.parallel import Layout

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case.chips])
    made = lambda config: Layout(config.parallel, config.batch_size, devices=list(topology.devices))
    exp, plan, tx, state = experiment_of(case, made)
    layout, size, begun = made(exp.config), exp.preprocessing.size, time.time()
    lowered = layout.program(exp.train_step(plan, tx, layout), state).lower(
        layout.abstract(state), layout.abstract_batch(exp.config.batch_size, size)
    )
    told = dataclasses.asdict(case) | {"versions": {"jax": jax.__version__, "libtpu": version("libtpu")}}
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = re.search(r"Used ([\d.]+)G of ([\d.]+)G hbm", str(error))
        return told | {"refused": used[0] if used else str(error).splitlines()[0][:200]}
    memory, found = program.memory_analysis(), cost.cost(program)
    analysis = program.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return told | {
        "flops": found["flops_per_step"],
        "bytes_accessed": float(analysis["bytes accessed"]),
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporary": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "collectives": cost.collective_bytes(program),
        "seconds": round(time.time() - begun),
    }


def on_paper(model: str, strategy: str) -> dict:
    """What follows from the shapes alone: {"theory": bytes to reduce, "held": {layout: bytes of state and batch}, …}.

    Data parallelism has to reduce the gradients of what trains, each of the dtype in which the layer reads its leaf,
    and loss and accuracy. A norm whose statistics move has two moments a channel forward and the gradient of one
    backward; the scale's and bias' own gradients serve as the rest.
    """
    import jax
    import numpy as np

    from tljax import parallel
    from tljax.frozen_dtype import cast_alone
    from tljax.plan import paths

    exp, plan, _, state = experiment_of(Case(model, strategy, "replicated", 256))
    size = exp.preprocessing.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    forward = lambda p, stats, x: exp.model.apply({"params": p, "batch_stats": stats}, x)
    narrow = cast_alone(forward, exp.shapes["params"], exp.config.dtype, exp.shapes["batch_stats"], image)
    gradients = sum(leaf.size * (2 if leaf.path in narrow else 4) for leaf in plan.trainable)
    moving = sum(4 * n for path, n in plan.stats if path.rpartition("/")[0] in plan.live_norms)

    still = {f"params/{leaf.path}" for leaf in plan.leaves if not leaf.multiplier and leaf.path in narrow}
    held = {}
    for name, fields in LAYOUTS.items():
        total, parts = A_CHIP * (size * size * 3 + 4), fields.get("fsdp", 1)
        for path, leaf in zip(paths(state), jax.tree.leaves(state)):
            count = math.prod(leaf.shape)
            laid = count >= parallel.FSDP_LEAST and any(d % parts == 0 for d in leaf.shape)
            width = 2 if path in still and "frozen_dtype" in fields else leaf.dtype.itemsize
            total += count * width // (parts if laid else 1)
        held[name] = total
    told = {"model": model, "strategy": strategy, "images_a_chip": A_CHIP, "size": size, **plan.totals()}
    return told | {"theory": gradients + moving + moving // 2 + 2 * 4, "held": held}


def version(package: str) -> str:
    """The installed version of a package."""
    import importlib.metadata

    return importlib.metadata.version(package)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--only", default="", help="what the names of programs hold, as 'full' or 'resnet50-LoRA'")
    parser.add_argument("--finished", action="store_true", help="compile nothing")
    parser.add_argument("--compile-only", action="store_true", help="write no document")
    given = parser.parse_args()
    given.workdir.mkdir(parents=True, exist_ok=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}  # of this machine nothing is asked
    kept = lambda name: given.workdir / f"{name}.json"
    pairs = [(model, strategy) for model in MODELS for strategy in STRATEGIES]
    wanted = {f"paper {model} {strategy}": lambda pair=(model, strategy): on_paper(*pair) for model, strategy in pairs}
    wanted |= {case.name: lambda case=case: compiled(case) for case in cases()}
    for name, work in wanted.items():
        if kept(name).exists() or given.finished or given.only not in name:
            continue
        begun = time.time()
        kept(name).write_text(json.dumps(work(), indent=1) + "\n")
        print(f"{name}: {time.time() - begun:.0f} s", flush=True)
    if given.compile_only:
        return
    found = [json.loads(kept(name).read_text()) for name in wanted if kept(name).exists()]
    papers = {(r["model"], r["strategy"]): r for r in found if "theory" in r and "chips" not in r}
    records = [papers[r["model"], r["strategy"]] | r for r in found if "chips" in r]
    text = scaling_page.document(papers, records, MODELS, len(cases()))
    (ROOT / "docs/scaling.md").write_text(text)
    scaling_page.picture(records, MODELS, ROOT / "docs/scaling.png")
    print(text)


if __name__ == "__main__":
    main()

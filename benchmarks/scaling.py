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


def compiled(case: Case) -> dict:
    """What the compiler says of a program; {"refused": its words} where a chip cannot hold it."""
    import jax
    from jax.experimental import topologies

    from tljax import config as configs
    from tljax import cost, experiment, optim
    from tljax.parallel import Layout

    config = configs.base(case.model)
    config.update(weights="", dtype="bfloat16", strategy=STRATEGIES[case.strategy], batch_size=A_CHIP * case.chips)
    config.parallel.update(LAYOUTS[case.layout])
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[case.chips])
    layout = Layout(config.parallel, config.batch_size, devices=list(topology.devices))
    exp = experiment.build(config, 1000, layout)
    plan = exp.plans[0][1]
    tx = optim.optimizer(plan, config.optim, lambda step: config.optim.lr)
    state, size = exp.state_shapes(plan, tx), exp.preprocessing.size
    begun = time.time()
    lowered = layout.program(exp.train_step(plan, tx, layout), state).lower(
        layout.abstract(state), layout.abstract_batch(config.batch_size, size)
    )
    told = {
        **dataclasses.asdict(case), **plan.totals(), "images_a_chip": A_CHIP, "size": size,
        "optimizer": optim.state_bytes(tx, plan)[1], "theory": exchanged(exp, plan),
        "versions": {"jax": jax.__version__, "libtpu": version("libtpu")},
    }  # fmt: skip
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


def exchanged(exp, plan) -> int:
    """Bytes that data parallelism has to reduce, by theory: gradients of what trains, moments of norms, two scalars.

    A gradient is of the dtype in which the layer reads the leaf. A norm whose statistics move has two moments a
    channel forward and the gradient of one backward; the scale's and bias' own gradients serve as the rest.
    """
    import jax
    import numpy as np

    from tljax.frozen_dtype import cast_alone

    size = exp.preprocessing.size
    image = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    forward = lambda p, stats, x: exp.model.apply({"params": p, "batch_stats": stats}, x)
    narrow = cast_alone(forward, exp.shapes["params"], exp.config.dtype, exp.shapes["batch_stats"], image)
    gradients = sum(leaf.size * (2 if leaf.path in narrow else 4) for leaf in plan.trainable)
    moving = sum(4 * n for path, n in plan.stats if path.rpartition("/")[0] in plan.live_norms)
    return gradients + moving + moving // 2 + 2 * 4


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
    for case in cases():
        file = given.workdir / f"{case.name}.json"
        if file.exists() or given.finished or given.only not in case.name:
            continue
        begun = time.time()
        told = compiled(case)
        file.write_text(json.dumps(told, indent=1) + "\n")
        print(f"{case.name}: {time.time() - begun:.0f} s", flush=True)
    if given.compile_only:
        return
    files = [given.workdir / f"{case.name}.json" for case in cases()]
    records = [json.loads(file.read_text()) for file in files if file.exists()]
    text = scaling_page.document(records, MODELS, len(files))
    (ROOT / "docs/scaling.md").write_text(text)
    scaling_page.picture(records, MODELS, ROOT / "docs/scaling.png")
    print(text)


if __name__ == "__main__":
    main()

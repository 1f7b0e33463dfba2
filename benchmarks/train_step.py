"""Training steps under the strategies that people use, against PyTorch (eager and compiled), in one call.

    python benchmarks/train_step.py                       # writes docs/speed.md
    python benchmarks/train_step.py --only=vit --rows=head,LoRA --repeats=5

On a CPU (extra `parity`): ResNet-50, EfficientNet-Lite0 and ViT-S/16, batch 16. On a GPU
(`pip install 'jax[cuda12]' torch timm`): ResNet-50 and ViT-B/16, batch 256, bfloat16. Always 224 pixels, and no feature
cache: the frozen prefix is computed in each step, as PyTorch does under `no_grad`. What is compared, and how, is in
benchmarks/sides.py. The figures are medians over the repeats.
"""

import argparse

import jax
import sections
import sides

NETWORKS = {
    "cpu": ("resnet50", "efficientnet_lite0", "vit_small_patch16"),
    "gpu": ("resnet50", "vit_base_patch16"),
}
BATCH = {"cpu": 16, "gpu": 256}
# By profiling single convolutions, batch 16, milliseconds on the same 2 cores, XLA to oneDNN.
REASON = """Where tljax is behind on a CPU, it is for convolutions, which XLA's CPU backend takes from Eigen and
PyTorch from oneDNN. The gradient of a 3×3 kernel takes 37 ms to 11 (56 pixels, 64 channels), 33 to 11 (28, 128) and
28 to 9 (14, 256), that of ResNet's 7×7 stem 100 to 14; forward and for the input's gradient it is 1.2 to 2 times as
much. Tried for the kernel's gradient: nine products of shifted slices, one product of all patches, three of rows of
patches: as fast at best. XLA's experimental fusions (`xla_cpu_experimental_ynn_fusion_type`) make it as fast as
oneDNN's alone, and a whole step no faster (ResNet-50: 677 ms to 727; EfficientNet-Lite0: 243 to 227; ViT-S: 577 to
580)."""


def rows_of(network: str) -> tuple[str, ...]:
    """The strategies that are compared on a network."""
    return tuple(name for name in sides.STRATEGIES if name != "LoRA" or network.startswith("vit"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="networks whose names begin so, with commas")
    parser.add_argument("--rows", default="", help=f"some of {','.join(sides.STRATEGIES)}")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    backend = "gpu" if jax.default_backend() == "gpu" else "cpu"
    batch = given.batch or BATCH[backend]
    chosen, rows = tuple(filter(None, given.only.split(","))) or ("",), []
    known = sides.NETWORKS if given.only else NETWORKS[backend]
    for name in (name for name in known if name.startswith(chosen)):
        for strategy in (s for s in rows_of(name) if s in given.rows.split(",") or not given.rows):
            found = sides.compare(
                name, strategy, (sides.TRAIN,), batch, given.size, given.repeats, backend == "gpu"
            )  # fmt: skip
            rows.append((name, strategy, *sides.row(found[sides.TRAIN], batch)))
            print(*rows[-1], sep="\t", flush=True)
    text = f"""## Training steps

Images a second in training steps, by `python benchmarks/train_step.py`: batch {batch} at {given.size} pixels,
{"bfloat16" if backend == "gpu" else "float32"}, AdamW, medians of {given.repeats}; {sides.versions()}. What is frozen
has `requires_grad=False` in PyTorch, and the prefix that nothing trainable influences runs under `no_grad` in
evaluation mode; tljax's feature cache is off. *last 3*: the last three stages before the head, and the head. *LoRA*:
rank {sides.RANK}, on queries and values. Machine: {sections.machine()}.

{sections.table(("network", "trains", *sides.HEAD), rows)}
"""
    behind = any(float(ratio) < 1 for name, _, *found in rows for ratio in found[-2:] if not name.startswith("vit"))
    text += f"\n{REASON}\n" if backend == "cpu" and behind else ""
    print(text)
    if not (given.only or given.rows or given.batch or given.size != 224):
        sections.write(f"train_step {backend}", text)


if __name__ == "__main__":
    main()

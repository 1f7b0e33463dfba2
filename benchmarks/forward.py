"""Images a second of five networks, forward and in a full training step, against PyTorch (eager and compiled).

    python benchmarks/forward.py                          # extra `parity`; writes docs/speed.md
    python benchmarks/forward.py --only=resnet50 --size=128

What is compared, and how, is in benchmarks/sides.py. All sides have large pages (tljax/pages.py). The figures are
medians over the repeats.
"""

import argparse

import jax
import sections
import sides

NETWORKS = ("resnet50", "efficientnet_lite0", "mobilenet_v2", "convnext_tiny", "vit_small_patch16")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(NETWORKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    gpu, rows = jax.default_backend() == "gpu", []
    for name in given.only.split(","):
        passes = (sides.FORWARD, sides.TRAIN)
        found = sides.compare(name, "full", passes, given.batch, given.size, given.repeats, gpu)
        for what in passes:
            rows.append((name, what, *sides.row(found[what], given.batch)))
            print(*rows[-1], sep="\t", flush=True)
    text = f"""## Forward and full training step

Images a second, by `python benchmarks/forward.py`: batch {given.batch} at {given.size} pixels,
{"bfloat16" if gpu else "float32"}, AdamW on all parameters, medians of {given.repeats}; {sides.versions()}.
Machine: {sections.machine()}.

{sections.table(("network", "pass", *sides.HEAD), rows)}
"""
    if given.only == ",".join(NETWORKS):
        sections.write("forward", text)


if __name__ == "__main__":
    main()

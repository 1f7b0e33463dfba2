"""What large pages save: full training steps with glibc's tunable and without it, each in processes of their own.

    python benchmarks/pages.py        # writes docs/speed.md; Linux with glibc 2.35 or newer

`python -m tljax.train` sets the tunable itself (tljax/pages.py).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time

import numpy as np
import sections

NETWORKS = ("efficientnet_lite0", "resnet50")
SIZES = ("size", "steps")


def child(name: str, size: int, steps: int) -> None:
    """Prints [seconds, CPU seconds, CPU seconds in the kernel] of the median step and the process's peak bytes."""
    from sides import ours

    train, spent = ours(name, "full", 16, size, False)["train"], []
    for _ in range(steps + 1):
        begun, before = time.perf_counter(), os.times()
        train()
        after = os.times()
        used = after.user + after.system - before.user - before.system
        spent.append((time.perf_counter() - begun, used, after.system - before.system))
    print(json.dumps([*np.median(spent[1:], axis=0), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", default="")
    given = parser.parse_args()
    if given.child:
        return child(given.child, given.size, given.steps)
    rows = []
    for name in NETWORKS:
        found = {"": [], "glibc.malloc.hugetlb=1": []}
        for _ in range(given.rounds):
            for tunable, runs in found.items():
                command = [
                    sys.executable,
                    __file__,
                    f"--child={name}",
                    f"--size={given.size}",
                    f"--steps={given.steps}",
                ]
                env = os.environ | {"GLIBC_TUNABLES": tunable}
                runs.append(json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout))
        plain, large = (np.median(runs, axis=0) for runs in found.values())
        for what, (seconds, used, kernel, peak) in (("pages of 4 KiB", plain), ("pages of 2 MiB", large)):
            speed = f"{plain[0] / seconds:.2f}"
            rows.append(
                (name, what, f"{1000 * seconds:.0f}", speed, f"{used:.2f}", f"{kernel:.2f}", f"{peak / 1e9:.1f}")
            )
            print(*rows[-1], sep="\t", flush=True)
    head = ("network", "scratch memory", "step, ms", "faster", "CPU s a step", "of which kernel", "peak memory, GB")
    text = f"""## Large pages

Full training steps on the CPU with glibc's tunable `glibc.malloc.hugetlb=1`, which `python -m tljax.train` sets where
the kernel leaves the choice to programs, and without: by `python benchmarks/pages.py`, batch 16 at {given.size} pixels,
float32, medians over {given.rounds} processes each. Machine: {sections.machine()}.

{sections.table(head, rows)}
"""
    sections.write("pages", text)
    return None


if __name__ == "__main__":
    main()

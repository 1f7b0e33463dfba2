"""How soon a command answers: `--help` of each, and the main job's first step with a warm compilation cache.

    python benchmarks/start.py          # extra `demo`; four minutes on 2 cores; writes docs/speed.md

Seconds from the command, medians over the repeats. The main job is cut to 5 epochs; its first run, which may compile,
is not measured.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import sections

ROOT = Path(__file__).parent.parent
COMMANDS = ("train", "plan", "evaluate", "predict", "sweep", "zeroshot")
PARTS = ("start", "data", "model", "weights", "compile", "first step")


def called(*argv: str) -> float:
    """The seconds of a command."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", *argv], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def first_step() -> tuple[float, dict]:
    """(seconds to the first step, seconds of the parts) of the main job."""
    with tempfile.TemporaryDirectory(prefix="tljax-start-") as folder:
        config = f"--config={ROOT / 'configs/partial.py'}"
        called("tljax.train", config, f"--workdir={folder}", "--config.train_for=5 epochs")
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return summary["first_step_seconds"], summary["time"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    rows = []
    for name in COMMANDS:
        seconds = [called(f"tljax.{name}", "--help") for _ in range(given.repeats + 1)][1:]
        rows.append((f"`python -m tljax.{name} --help`", f"{np.median(seconds):.2f}"))
        print(*rows[-1], flush=True)
    found = [first_step() for _ in range(given.repeats + 1)][1:]
    rows.append(("main job, to the end of the first step", f"{np.median([first for first, _ in found]):.1f}"))
    parts = {part: np.median([spent[part] for _, spent in found]) for part in PARTS}
    said = ", ".join(f"{part} {seconds:.2f}" for part, seconds in parts.items())
    text = f"""## Start

By `python benchmarks/start.py`: seconds from the command, medians of {given.repeats}, the compilation cache warm (on by
default, in `~/.cache/tljax/xla`). Machine: {sections.machine()}.

{sections.table(("command", "s"), rows)}

Parts of the main job's first step, as its summary has them: {said} s; the rest is the features of the first batch.
*start* are imports..
"""
    print(text)
    sections.write("start", text)


if __name__ == "__main__":
    main()

"""Fuzzes the readers of all that comes from elsewhere: damaged files give a normal result or one clear line.

    nice python tests/fuzz/fuzz.py --minutes=60                      # every reader, an hour of computing each
    nice python tests/fuzz/fuzz.py --reader=npz,hdf5 --minutes=5
    python tests/fuzz/fuzz.py --inputs=100                           # by number, so that it is the same each time
    python tests/fuzz/fuzz.py --replay tests/fuzz/corpus/npz/*       # what was found, read again

Sound small files (fuzz_*.py) are damaged (mutations.py) and read in a process of its own. A finding is any exception
but UserError, a message of more than one line, more than SECONDS for one file, the end of the process, and memory
beyond a bound: the address space is limited, so that an allocation by a length that a file merely claims fails.
Findings lie under --keep, one folder each, named by what happened; the same one is kept once. Exit code 1: there are.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from random import Random

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

HERE = Path(__file__).parent
for _folder in (HERE, HERE.parent, HERE.parent / "weights"):  # as pytest does it
    if str(_folder) not in sys.path:
        sys.path.append(str(_folder))

import fuzz_data
import fuzz_texts
import fuzz_weights
import mutations
from target import MB, Case, Target

TARGETS = fuzz_weights.TARGETS | fuzz_data.TARGETS | fuzz_texts.TARGETS

SECONDS = 10.0  # of computing that one file may take; of the clock, with others on the machine, six times as many
FACTOR = 4096  # memory that is granted for each byte of a file: deflate's 1032, a few times
SLACK = 512 * MB  # address space that threads and libraries take whatever they read
LONGEST = 12_000  # characters of a message


def case_of(target: Target, seeds: list[Case], rng: Random) -> Case:
    """A sound case with one of its files damaged, or two."""
    case = dict(rng.choice(seeds))
    for name in rng.sample(sorted(case), min(len(case), rng.choice((1, 1, 1, 2)))):
        case[name] = mutations.some(case[name], rng, target.ways(name))
    return case


def put(folder: Path, case: Case) -> None:
    """The files of a case as all that is in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in case.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def taken(folder: Path) -> Case:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def outcome(target: Target, folder: Path, seconds: float = SECONDS) -> tuple[str, str]:
    """("", "") for a normal result, ("", line) for a clear error, (kind, what happened) for a finding."""
    from tljax.errors import UserError

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    granted = target.bound + FACTOR * sum(file.stat().st_size for file in folder.rglob("*"))
    began = time.process_time()
    faulthandler.dump_traceback_later(6 * seconds, exit=True)
    try:
        target.read(folder)
        kind, said = "", ""
    except UserError as error:
        kind, said = "", str(error)
        if short := _short_of_memory(error):
            kind, said = "memory", f"{said} (because of {short})"
        elif "\n" in said or "\r" in said or not said.strip():
            kind = "not one line"
        elif len(said) > LONGEST:
            kind, said = "long", said[:2000]
    except BaseException as error:  # what bindings of other languages raise is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        own = [f for f in traceback.extract_tb(error.__traceback__) if "/tljax/" in f.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "outside"
        kind, said = f"{type(error).__name__} {where}", f"{error}"[:500]
    finally:
        faulthandler.cancel_dump_traceback_later()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    spent = time.process_time() - began
    if not kind and grown > granted:
        kind, said = "memory", f"grew by {grown >> 20} MB for {granted >> 20}"
    if not kind and spent > seconds:
        kind, said = "slow", f"{spent:.0f} s"
    return kind, said


def _short_of_memory(error: BaseException | None) -> str:
    """What says that memory was asked for in vain, in the causes of an error.

    What libhdf5 asks for to read a header into it never touches, as it looks before it reads whether the file goes on
    for so long (test_hdf5).
    """
    while error is not None:
        text = str(error)
        if "on disk image buffer" in text:
            return ""
        if isinstance(error, MemoryError) and "arser" not in text:  # Python's parser says it of deep nesting
            return f"{type(error).__name__}: {text}"
        if any(words in text.lower() for words in ("unable to allocate", "memory allocation failed", "malloc of size")):
            return text
        error = error.__cause__ or error.__context__
    return ""


def limit(slack: int) -> None:
    """Bounds the address space to what is taken now, and so much more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft = pages * resource.getpagesize() + slack
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.getrlimit(resource.RLIMIT_AS)[1]))


def unlimit() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def worker(names: list[str], seed: int, start: int, inputs: int, seconds: float, folder: Path, replays: list[str]):
    """Reads input after input; writes a JSON line for each finding, and what it is at to `folder`."""
    for name in names:
        target, place = TARGETS[name], folder / "in" / name
        unlimit()
        (folder / "at").write_text(json.dumps([name, start - 1]))
        seeds, done = target.seeds(), 0
        for case in seeds:  # sound, and what they need is imported
            put(place, case)
            if (found := outcome(target._replace(bound=4096 * MB), place, 100.0))[0]:
                report(name, -1, *found)
        limit(target.bound + SLACK)
        for case in replayed(replays, name):
            put(place, case)
            report(name, -1, *outcome(target, place))
        for lie, case in target.lies().items():
            put(place, case)
            kind, said = outcome(target, place)
            report(name, -1, kind if kind or said else "believed", f"{lie}: {said}")
        last = round(inputs * target.share) if inputs else sys.maxsize if seconds else 0
        began = time.process_time()  # of computing: others on the machine do not make an hour shorter
        for count in range(start, last):
            if time.process_time() - began > seconds:
                break
            (folder / "at").write_text(json.dumps([name, count]))
            # Independent of all inputs before it, so that any one can be made again.
            case = case_of(target, seeds, Random(f"{name} {seed} {count}"))
            put(place, case)
            found = outcome(target, place)
            if found[0]:
                keep(folder / "found" / name, found[0], case)
                report(name, count, *found)
            done += 1
        print(json.dumps({"reader": name, "done": done, "seconds": time.process_time() - began}), flush=True)
        start = 0


def replayed(folders: list[str], name: str) -> Iterator[Case]:
    for folder in map(Path, folders):
        if folder.parent.name == name:
            yield taken(folder)


def keep(folder: Path, kind: str, case: Case) -> Path:
    """Keeps a finding, the smallest of its kind."""
    slug = "".join(c if c.isalnum() else "_" for c in kind)[:60] + "-" + hashlib.sha256(kind.encode()).hexdigest()[:6]
    path, size = folder / slug, sum(map(len, case.values()))
    if not path.exists() or size < sum(map(len, taken(path).values())):
        put(path, case)
    return path


def report(name: str, count: int, kind: str, said: str) -> None:
    if kind:
        print(json.dumps({"reader": name, "input": count, "kind": kind, "said": said}), flush=True)


def run(
    names: list[str], seed: int = 0, inputs: int = 0, seconds: float = 1e9, keep_at: Path | None = None, replays=(),
    say=print,
) -> dict[str, dict]:  # fmt: skip
    """Fuzzes readers in a process that is started again where it ends; {reader: {"inputs", "seconds", "findings"}}."""
    results = {name: {"inputs": 0, "seconds": 0.0, "findings": {}} for name in names}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        folder, waiting, start = Path(place), list(names), 0
        while waiting:
            # By time each reader has a process and a span of its own; by number all share one.
            now = waiting if inputs or not seconds else waiting[:1]
            begun = _computed()
            left = max(0.0, seconds - results[now[0]]["seconds"])
            argv = [",".join(now), seed, start, inputs, left, folder, *replays]
            process = subprocess.Popen(
                [sys.executable, __file__, "--worker", *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
            out, err = process.communicate()
            finished = []
            for line in out.splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                result = results[row["reader"]]
                if "done" in row:
                    result["inputs"] += row["done"]
                    result["seconds"] += row["seconds"]
                    finished.append(row["reader"])
                else:
                    known = result["findings"].setdefault(row["kind"], {"count": 0, **row})
                    known["count"] += 1
            waiting = [name for name in waiting if name not in finished]
            if process.returncode:
                at = folder / "at"
                if not at.exists() or (process.returncode == 1 and "Timeout" not in err):
                    raise RuntimeError(f"the fuzzer itself failed: {err[-3000:]}")
                name, count = json.loads(at.read_text())
                tail = [line for line in err.splitlines() if line.strip()][-25:]
                kind = "hang" if "Timeout" in err else f"exit {process.returncode}"
                kind += " " + next((line.strip() for line in tail if "/tljax/" in line), "")
                keep(folder / "found" / name, kind, taken(folder / "in" / name))
                row = {"count": 0, "input": count, "kind": kind, "said": " | ".join(tail)[:1500]}
                results[name]["findings"].setdefault(kind, row)["count"] += 1
                results[name]["inputs"] += count + 1 - (start if name == now[0] else 0)
                results[name]["seconds"] += _computed() - begun
                start = count + 1
                if results[name]["seconds"] >= seconds:
                    waiting.remove(name)
                    finished.append(name)
                    start = 0
            else:
                start = 0
            for name in finished:
                say(told(name, results[name]))
        if keep_at and (folder / "found").exists():
            shutil.copytree(folder / "found", keep_at, dirs_exist_ok=True)
    return results


def _computed() -> float:
    """Seconds that the processes which have ended have computed."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def told(name: str, result: dict) -> str:
    lines = [f"{name}: {result['inputs']:,} inputs in {result['seconds']:.0f} s, {len(result['findings'])} findings"]
    for kind, row in result["findings"].items():
        lines.append(f"  {row['count']} × {kind} (input {row['input']}): {row['said'][:600]}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", default=",".join(TARGETS), help=f"some of {', '.join(TARGETS)}")
    parser.add_argument("--minutes", type=float, default=1.0, help="of computing, for each reader")
    parser.add_argument("--inputs", type=int, default=0, help="for each reader, instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for what is found")
    parser.add_argument("--replay", nargs="+", default=[], help="folders of findings, corpus/READER/NAME")
    given = parser.parse_args()
    names = given.reader.split(",")
    if given.replay:
        names = list(dict.fromkeys(Path(folder).parent.name for folder in given.replay))
    if strange := set(names) - set(TARGETS):
        parser.error(f"no reader {', '.join(strange)}; there are {', '.join(TARGETS)}")
    results = run(names, given.seed, given.inputs, 60 * given.minutes * (not given.replay), given.keep, given.replay)
    return int(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.path.insert(0, str(Path(__file__).parents[2]))
        _, _, given, seed, start, inputs, seconds, folder, *replays = sys.argv
        worker(given.split(","), int(seed), int(start), int(inputs), float(seconds), Path(folder), replays)
    else:
        raise SystemExit(main())

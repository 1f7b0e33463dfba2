"""Damaged files, the same ones each time, give a normal result or one clear line; so do those that once did not."""

from pathlib import Path

import fuzz
import pytest
from target import MB, Target

from tljax.errors import UserError

CORPUS = Path(__file__).parent / "corpus"
NEEDS = {"hdf5": "h5py", "tokenizer": "tokenizers"}


def findings(results):
    return "\n".join(fuzz.told(name, result) for name, result in results.items() if result["findings"])


def test_every_reader(tmp_path):
    """Some inputs for each reader, all that was ever found, and files that claim more than they hold."""
    for module in NEEDS.values():
        pytest.importorskip(module)
    known = sorted(str(path) for path in CORPUS.glob("*/*"))
    results = fuzz.run(list(fuzz.TARGETS), inputs=20, replays=known, keep_at=tmp_path / "found")
    assert not findings(results), findings(results)
    assert {name: result["inputs"] for name, result in results.items()} == {
        name: round(20 * target.share) for name, target in fuzz.TARGETS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_minute_of(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "numpy"))
    results = fuzz.run([name], seed=1, seconds=60, keep_at=tmp_path / "found")
    assert not findings(results), findings(results)


def raises(error, cause=None):
    def read(folder):
        raise error from cause

    return Target(lambda: [], read, lambda name: ())


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        (raises(UserError("damaged")), ""),
        (Target(lambda: [], lambda folder: None, lambda name: ()), ""),
        (raises(KeyError("a")), "KeyError outside"),
        (raises(BaseException("a panic")), "BaseException outside"),
        (raises(UserError("")), "not one line"),
        (raises(UserError("damaged"), MemoryError("8 TB")), "memory"),
        (raises(UserError("damaged"), OSError("Unable to allocate memory")), "memory"),
        (Target(lambda: [], lambda folder: bytearray(b"x") * (96 * MB), lambda name: (), bound=MB), "memory"),
    ],
)
def test_what_counts_as_a_finding(tmp_path, target, kind):
    fuzz.put(tmp_path / "in", {"file": b"x"})
    assert fuzz.outcome(target, tmp_path / "in")[0] == kind


def test_inputs_are_the_same_each_time():
    for name in ("safetensors", "lists", "npz"):
        target = fuzz.TARGETS[name]
        first, again = ([fuzz.case_of(target, target.seeds(), fuzz.Random(i)) for i in range(30)] for _ in range(2))
        assert first == again
        assert len({str(case) for case in first}) > 20


def test_the_smallest_of_each_kind_is_kept(tmp_path):
    for content in (b"xxx", b"x", b"xx"):
        kept = fuzz.keep(tmp_path, "KeyError a:b", {"file": content})
    assert [path.read_bytes() for path in tmp_path.glob("*/*")] == [b"x"]
    assert fuzz.taken(kept) == {"file": b"x"}


def test_messages_are_one_line_whatever_a_file_says():
    text = str(UserError("the name 'a\nb\x1b[31m\u2028c' " + "x" * 20_000))
    assert text.startswith("the name 'a b?[31m c' xxx")
    assert len(text) < 11_000
    assert text.isprintable()

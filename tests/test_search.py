"""Searches: what random ones draw, what a study asks for and is told, and what of both a killed process leaves."""

import contextlib
import json
import math
import re
import signal
import sqlite3
from collections import Counter
from pathlib import Path

import conftest
import numpy as np
import pytest
from tiny import get_config

from tljax import config, distributions, grid, search, study, sweep
from tljax.distributions import integers, loguniform, uniform
from tljax.errors import UserError
from tljax.report.console import Console


def sweeping(axes, text="", **fields):
    """The tiny experiment as a sweep."""
    made = get_config()
    made.data.threads = 1
    made.update_from_flattened_dict(fields)
    made.sweep, made.search = grid.axes(axes), text
    return made


def drawn(axes, text, **fields):
    made = sweeping(axes, text, **fields)
    return [member.fields for member in search.of(made).members(made)]


# ---- what is drawn


def test_draws_have_the_distributions_that_they_name():
    """Kolmogorov and Smirnov: 300 draws lie nowhere further than 1.95 / sqrt(300), p = 0.001, from the law."""
    axes = {"optim.lr": loguniform(1e-4, 1e-1), "label_smoothing": "uniform(0.05, 0.2)", "early_stop": integers(0, 4)}
    found = drawn(axes, "random(300, seed=3)")
    column = lambda field: np.sort([fields[field] for fields in found])
    rank = np.arange(1, 301) / 300
    rates, smoothing = column("optim.lr"), column("label_smoothing")
    assert rates[0] >= 1e-4 and rates[-1] <= 1e-1  # noqa: PT018
    assert np.abs((np.log10(rates) + 4) / 3 - rank).max() < 1.95 / math.sqrt(300)
    assert np.abs((smoothing - 0.05) / 0.15 - rank).max() < 1.95 / math.sqrt(300)
    counts = Counter(fields["early_stop"] for fields in found)
    assert sorted(counts) == [0, 1, 2, 3, 4]
    # Chi square with four degrees of freedom, p = 0.001.
    assert sum((n - 60) ** 2 / 60 for n in counts.values()) < 18.5
    assert abs(np.corrcoef([(f["optim.lr"], f["label_smoothing"]) for f in found], rowvar=False)[0, 1]) < 0.19


def test_whole_numbers_on_a_logarithm_and_the_ends():
    found = Counter(integers(1, 99, log=True).at(share) for share in np.linspace(0, 1, 10001))
    assert (min(found), max(found)) == (1, 99)
    assert abs(sum(found[i] for i in range(1, 10)) / 10001 - 0.5) < 0.001  # 1 to 9 as often as 10 to 99
    for made in (uniform(-1, 0.1), loguniform(3e-5, 0.7), integers(-3, 9)):
        assert (made.at(0.0), made.at(1.0)) == (made.low, made.high)
        assert distributions.parse(str(made)) == made


def test_a_search_is_a_function_of_its_seed_and_begins_as_a_smaller_one():
    axes = {"optim.lr": loguniform(1e-4, 1e-1), "strategy": ("frozen()", "full()"), "seed": (0, 7)}
    found = drawn(axes, "random(6, seed=1)")
    assert found == drawn(axes, "random(6, seed=1)") == drawn(axes, "random(9, seed=1)")[:12]
    assert found[0] != drawn(axes, "random(6, seed=2)")[0]
    # Each setting with each of its repeats, one after the other.
    assert [fields["seed"] for fields in found] == [0, 7] * 6
    assert all({**a, "seed": 7} == b for a, b in zip(found[::2], found[1::2]))
    assert {fields["strategy"] for fields in found} == {"frozen()", "full()"}


def test_a_grid_is_drawn_without_replacement():
    axes = {"optim.lr": (0.1, 0.2, 0.3), "strategy": ("frozen()", "full()"), "seed": range(2)}
    every, found = drawn(axes, ""), drawn(axes, "random(6)")
    key = lambda fields: json.dumps(fields, sort_keys=True)
    assert sorted(map(key, every)) == sorted(map(key, found))
    assert every != found
    assert len({key(fields) for fields in drawn(axes, "random(4)")}) == 8


def test_a_distribution_can_be_given_on_the_command_line(tmp_path):
    """A tuple's flag makes tuples of what it is given, and a text's flag texts."""
    from tljax import command

    file = tmp_path / "config.py"
    made = sweeping({"optim.lr": (0.1, 0.2), "label_smoothing": uniform(0, 0.1)}, "random(3)", name="x")
    file.write_text(
        f"from tljax.config import from_json\ndef get_config():\n    return from_json('''{config.to_json(made)}''')\n"
    )
    more = ["--config.sweep.optim.lr=loguniform(1e-4, 1e-2)", "--config.sweep.label_smoothing=(0.0, 0.1)"]
    space = grid.space(command.from_command_line([f"--config={file}", *more], "").config)
    assert space.axes == {"label_smoothing": (0.0, 0.1), "optim.lr": loguniform(1e-4, 1e-2)}


@pytest.mark.parametrize(
    ("axes", "text", "line"),
    [
        ({"optim.lr": "loguniform(1e-3, 1e-1)"}, "", "axis optim.lr = 'loguniform(0.001, 0.1)': to draw from it, set"),
        ({"optim.lr": "loguniform(0.1, 0.01)"}, "random(2)", "loguniform(0.1, 0.01): expected low < high"),
        ({"optim.lr": "loguniform(0, 0.01)"}, "random(2)", "loguniform(0, 0.01): expected low > 0"),
        ({"optim.lr": "normal(0, 1)"}, "random(2)", "unknown distribution 'normal'"),
        ({"optim.lr": "uniform('a', 1)"}, "random(2)", "uniform('a', 1): expected two numbers"),
        ({"early_stop": "integers(0, 1.5)"}, "random(2)", "integers(0, 1.5): expected two whole numbers"),
        ({"early_stop": "uniform(0, 2)"}, "random(2)", "axis early_stop = 'uniform(0, 2)': draws no int, as 0"),
        ({"augment.flip": "uniform(0, 2)"}, "random(2)", "axis augment.flip = 'uniform(0, 2)': draws no bool, as True"),
        ({"strategy": "uniform(0, 1)"}, "random(2)", "axis strategy = 'uniform(0, 1)': expected a tuple of values"),
        ({"seed": "integers(0, 9)"}, "random(2)", "runs that differ in it repeat one setting; give it values"),
        ({"label_smoothing": "uniform(0, 1.5)"}, "random(2)", "config.label_smoothing = 1.5: expected at most 1"),
        ({"optim.lr": (0.1, "high")}, "random(1)", "config.optim.lr = 'high': expected float"),
        ({"optim.lr": (0.1, 0.2)}, "random(3)", "config.search = 'random(3)': there are 2 settings"),
        ({"optim.lr": (0.1, 0.2)}, "random(0)", "random(n=0): expected a whole number, at least 1"),
        ({"optim.lr": (0.1, 0.2)}, "random()", "missing 1 required positional argument: 'n'"),
        ({"optim.lr": (0.1, 0.2)}, "rnadom(2)", "unknown search 'rnadom'; nearest: random"),
        ({"optim.lr": (0.1, 0.2)}, "optuna(8, sampler='tpo')", "unknown sampler 'tpo'; nearest: tpe"),
        ({"optim.lr": (0.1, 0.2)}, "optuna(8, generation=0)", "optuna(generation=0): expected a whole number"),
        ({"optim.lr": (0.1, 0.2)}, "optuna(8, storage=3)", "optuna(storage=3): expected a text"),
        ({"seed": (0, 1)}, "optuna(8)", "config.search = 'optuna(8)': no axis to search, seed only repeat"),
    ],
)
def test_bad_searches_are_told_in_one_line(tmp_path, axes, text, line):
    with pytest.raises(UserError, match=re.escape(line)) as error:
        sweep.Sweep(sweeping(axes, text), sweep.Folder(tmp_path / "sweep"), Console(enabled=False), "auto", 10**9)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sweep").exists()


# ---- studies: what is told is made up here, of the settings themselves


class Made(sweep.Folder):
    """A folder whose rows are those that `train` leaves at once."""

    rows = ()

    def results(self):
        return list(self.rows)

    def train(self, members, figure, status="finished"):
        told = lambda member: {
            "number": member.number, "fields": member.fields, "steps": 9,
            "status": status if np.isfinite(figure(member)) else "diverged at step 3",
            "val": {"nll": figure(member)} if np.isfinite(figure(member)) else None,
        }  # fmt: skip
        self.rows = [*self.rows, *map(told, members)]


def far(member) -> float:
    """The distance of a rate from 0.01, in decades, and 0.01 for the seed 1."""
    return abs(math.log10(member.config.optim.lr) + 2) + 0.01 * member.config.seed


RATES = {"optim.lr": loguniform(1e-5, 1e1), "seed": (0, 1)}


def asked(made, folder, generations=99, figure=far):
    """Goes through so many generations, the last one not ended; returns their members."""
    found = []
    steps = search.of(made).generations(made, folder, lambda line: None)
    for members in steps:
        found.append(members)
        if len(found) == generations:
            break
        folder.train(members, figure)
    return found, steps


def test_a_study_finds_the_better_rates_within_generations(tmp_path):
    made = sweeping(RATES, "optuna(40, generation=8, seed=1)")
    folder = Made(tmp_path)
    found, _ = asked(made, folder)
    assert [len(members) for members in found] == [16] * 5
    numbers = [member.number for members in found for member in members]
    assert numbers == list(range(80))
    away = [np.mean([far(member) for member in members]) for members in found]
    assert away[-1] < away[0] / 2
    trials = study.Study(search.of(made), made, folder).study.get_trials()
    # Told is the mean over both seeds.
    for i, trial in enumerate(trials):
        expected = abs(math.log10(trial.params["optim.lr"]) + 2) + 0.005
        assert trial.value == pytest.approx(expected)
        assert trial.params["optim.lr"] == next(m for ms in found for m in ms if m.number == 2 * i).config.optim.lr


def test_what_ended_early_and_what_diverged_are_told_as_worse(tmp_path):
    made = sweeping({"optim.lr": loguniform(1e-5, 1e1)}, "optuna(6, generation=3)")
    folder, steps = Made(tmp_path), None
    steps = search.of(made).generations(made, folder, print)
    folder.train(next(steps), far, "eliminated at step 9")
    folder.train(next(steps), lambda member: math.nan)
    assert not list(steps)
    trials = study.Study(search.of(made), made, folder).study.get_trials()
    assert [trial.state.name for trial in trials] == ["PRUNED"] * 6
    assert [list(trial.intermediate_values) for trial in trials] == [[9]] * 3 + [[]] * 3
    assert trials[0].intermediate_values[9] == pytest.approx(abs(math.log10(trials[0].params["optim.lr"]) + 2))


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(tmp_path):
    made = sweeping(RATES, "optuna(12, generation=4)")
    whole, _ = asked(made, Made(tmp_path / "whole"))
    folder = Made(tmp_path / "cut")
    cut, steps = asked(made, folder, generations=2)
    steps.close()
    again, _ = asked(made, folder)
    told = lambda generations: [(member.number, member.fields) for members in generations for member in members]
    assert told(cut[:1] + again) == told(whole)


def test_results_that_were_not_told_are(tmp_path):
    """Killed between the last row of a generation and its telling."""
    made = sweeping(RATES, "optuna(4, generation=2)")
    folder = Made(tmp_path)
    first = study.Study(search.of(made), made, folder)
    folder.claim(made)
    folder.train(first.members(first.ask()), far)
    again, _ = asked(made, folder)
    assert [member.number for members in again for member in members] == [4, 5, 6, 7]


def test_workers_share_a_study_and_what_a_silent_one_has_left(tmp_path, monkeypatch):
    """Two workers of one study: no trial twice; those of one that beats no more are the other's, numbers and all."""
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    made = sweeping(RATES, f"optuna(9, generation=3, heartbeat=3600, study='one', storage={url!r})")
    mine, theirs = Made(tmp_path / "a"), Made(tmp_path / "b")
    a = search.of(made).generations(made, mine, print)
    silent = study.Study(search.of(made), made, theirs)
    silent.worker = "elsewhere:1"
    first, left = next(a), silent.members(silent.ask())
    mine.train(first, far)
    second = next(a)
    mine.train(second, far)
    assert [member.number for member in [*first, *left, *second]] == list(range(18))
    assert len({member.config.optim.lr for member in [*first, *left, *second]}) == 9
    waited = []

    def long_after(seconds):
        """Three hours without a beat of the silent worker."""
        waited.append(seconds)
        with contextlib.closing(sqlite3.connect(tmp_path / "shared.db")) as database:
            database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-3 hours')")
            database.commit()

    monkeypatch.setattr(study.time, "sleep", long_after)
    third = next(a)  # once two heartbeats are missing
    assert waited == [5]
    assert [(m.number, m.fields) for m in third] == [(m.number, m.fields) for m in left]
    mine.train(third, far)
    assert not list(a)
    other = sweeping({"optim.lr": loguniform(1e-5, 1e-2)}, made.search)
    with pytest.raises(UserError, match=r"the study 'one' at sqlite:.* has other axes: optim.lr: .* → ") as error:
        study.Study(search.of(other), other, Made(tmp_path / "c"))
    assert "\n" not in str(error.value)


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
from test_search import Made, RATES, far, search, sweeping
made = sweeping(RATES, "optuna(6, generation=3)")
folder = Made(sys.argv[2])
for i, members in enumerate(search.of(made).generations(made, folder, print)):
    if i:
        print("there", flush=True)
        input()
    folder.train(members, far)
    (folder.path / "rows.json").write_text(__import__("json").dumps(folder.rows))
"""


@pytest.mark.slow
def test_trials_of_a_killed_process_are_taken_up_at_once(tmp_path):
    made = sweeping(RATES, "optuna(6, generation=3)")
    process = conftest.script(KILLED, str(Path(__file__).parent), str(tmp_path / "cut"))
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close(), process.stderr.close()
    folder = Made(tmp_path / "cut")
    folder.rows = json.loads((folder.path / "rows.json").read_text())
    again, _ = asked(made, folder)
    whole, _ = asked(made, Made(tmp_path / "whole"))
    told = lambda generations: [(member.number, member.fields) for members in generations for member in members]
    assert told(again) == told(whole[1:])


TOGETHER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_search import Made, RATES, far, search, sweeping
made = sweeping(RATES, f"optuna(12, generation=2, study='one', storage={sys.argv[3]!r})")
folder = Made(sys.argv[2])
for members in search.of(made).generations(made, folder, lambda line: None):
    time.sleep(0.3)
    folder.train(members, far)
print(*[row["number"] for row in folder.rows])
"""


@pytest.mark.slow
def test_processes_that_start_at_once_share_the_trials_of_a_study(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    given = (str(Path(__file__).parent), *(str(tmp_path / name) for name in "ab"))
    processes = [conftest.script(TOGETHER, given[0], folder, url) for folder in given[1:]]
    found = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        found.append(list(map(int, out.split())))
    assert sorted(found[0] + found[1]) == list(range(24))
    assert all(found)


def test_a_storage_that_cannot_be_opened_and_a_missing_package_are_told_in_one_line(tmp_path, monkeypatch):
    made = sweeping(RATES, "optuna(6, storage='sqlite:////nowhere/study.db')")
    with pytest.raises(UserError, match=r"the storage sqlite:////nowhere/study\.db cannot be opened: ") as error:
        next(search.of(made).generations(made, Made(tmp_path / "a"), print))
    assert "\n" not in str(error.value)
    made = sweeping(RATES, "optuna(6, storage='nosql://me:secret@there/x')")
    with pytest.raises(UserError, match="the storage nosql://there/x cannot be opened: ") as error:
        next(search.of(made).generations(made, Made(tmp_path / "b"), print))
    assert "secret" not in str(error.value)
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match="pip install"):
        next(search.of(made).generations(made, Made(tmp_path / "c"), print))

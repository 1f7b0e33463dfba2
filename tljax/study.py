"""A search by Optuna's ask and tell, in generations; several workers share one study (Akiba et al. 2019).

A trial is a setting. Its number here is its place among the study's trials that repeat no other, so that the trial of
a killed worker keeps its number when another trains it.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from tljax import config as configs
from tljax import grid
from tljax.distributions import Distribution
from tljax.errors import UserError, listing
from tljax.grid import Member, Space
from tljax.report import metrics, text

if TYPE_CHECKING:
    from tljax.search import Optuna
    from tljax.sweep import Folder

AXES = "tljax axes"  # attributes of a study, and of a trial
WORKER = "tljax worker"
RACED = re.compile("already exists|UNIQUE|duplicate key", re.IGNORECASE)  # two workers have made the tables at once
WORKERS: set[str] = set()  # those of this process: another that had its number is gone


def generations(search: "Optuna", config: ConfigDict, folder: "Folder", say: Callable) -> Iterator[tuple[Member, ...]]:
    """Generations of members, until the study has its trials: those of killed workers first.

    Raises UserError: no Optuna, a storage that cannot be opened, a study of other axes.
    """
    study = Study(search, config, folder)
    said = False
    while True:
        study.tell()
        if trials := study.ask():
            said = False
            with study.alive(trials):
                done = {row["number"] for row in folder.results()}
                yield tuple(member for member in study.members(trials) if member.number not in done)
                study.tell()
        elif others := study.running():
            if not said:
                say(f"waiting for {text.counted(len(others), 'trial')} of other workers")
            said = True
            time.sleep(min(search.heartbeat, 5))
        else:
            return


class Study:
    """One worker's hold on a study."""

    def __init__(self, search: "Optuna", config: ConfigDict, folder: "Folder"):
        try:
            import optuna
        except ImportError:
            raise UserError("config.search = 'optuna(…)' needs Optuna: pip install 'tljax[sweep]'") from None
        self.optuna, self.search, self.folder = optuna, search, folder
        self.space: Space = grid.space(config)
        self.sign = metrics.sign(config.metric)
        self.metric = config.metric.removeprefix("val/")
        self.worker = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
        WORKERS.add(self.worker)
        self.mine: set[int] = set()  # numbers of the trials that this worker trains now
        self.choices = {
            # What a database can hold stands for what an axis can be.
            field: {v if isinstance(v, bool | int | float | str) else repr(v): v for v in values}
            for field, values in self.space.searched.items()
            if not isinstance(values, Distribution)
        }
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage")  # which its own loop would beat
        folder.claim(config)
        self.study = self._opened(config)

    def _opened(self, config: ConfigDict):
        url = self.search.storage or f"sqlite:///{self.folder.path / 'study.db'}"
        name = self.search.study or f"{config.name}-{configs.digest(config)}"
        axes = {field: str(v) if isinstance(v, Distribution) else list(v) for field, v in self.space.axes.items()}
        mine = {"metric": self.metric} | json.loads(json.dumps(axes))
        for left in (2, 1, 0):
            try:
                study, theirs = self._joined(url, name, mine)
                break
            except Exception as error:  # of Optuna, SQLAlchemy, a driver of its, or of an import of one
                line = " ".join(str(error).split())[:200]
                if not left or not RACED.search(line):
                    raise UserError(f"the storage {_shown(url)} cannot be opened: {line}") from error
                time.sleep(1)
        if theirs != mine:
            found = [f"{k}: {theirs.get(k)!r} → {mine.get(k)!r}" for k in theirs | mine if theirs.get(k) != mine.get(k)]
            raise UserError(f"the study {name!r} at {_shown(url)} has other axes: {listing(found)}; name another study")
        return study

    def _joined(self, url: str, name: str, axes: dict) -> tuple[Any, dict]:
        """The study, made where there is none, and the axes that it is of."""
        optuna, storages, seconds = self.optuna, self.optuna.storages, self.search.heartbeat
        # Several processes write to one file: each waits for its turn.
        arguments = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        self.again = storages.RetryHeartbeatStaleTrialCallback()
        self.storage = storages.RDBStorage(
            url, arguments, heartbeat_interval=seconds, grace_period=2 * seconds,
            heartbeat_stale_trial_callback=self.again,
        )  # fmt: skip
        study = optuna.create_study(
            storage=self.storage, study_name=name, load_if_exists=True,
            direction="minimize" if self.sign < 0 else "maximize",
        )  # fmt: skip
        theirs = study.user_attrs.get(AXES) or axes
        study.set_user_attr(AXES, theirs)
        return study, theirs

    # ---- trials

    def trials(self) -> dict[int, Any]:
        """{a trial's number in the study: its place among those that repeat no other, from 0}."""
        trials = self.study.get_trials(deepcopy=False)
        own = {trial.number: self.again.retried_trial_number(trial) for trial in trials}
        places = {number: i for i, number in enumerate(number for number in own if own[number] is None)}
        return {number: places[number if first is None else first] for number, first in own.items()}

    def ask(self) -> list:
        """The trials of the next generation: first those that a killed worker has left."""
        state = self.optuna.trial.TrialState
        self._take_back()
        asked = []
        while len(asked) < self.search.generation:
            places = self.trials()
            waiting = self.study.get_trials(deepcopy=False, states=(state.WAITING,))
            fresh = len(set(places.values()))
            if not waiting and fresh >= self.search.n:
                break
            self.study.sampler = self._sampler(fresh)
            trial = self.study.ask(self._distributions())
            try:
                self.storage.record_heartbeat(trial._trial_id)  # at once: who has never lived is not missed
                trial.set_user_attr(WORKER, self.worker)
            except self.optuna.exceptions.UpdateFinishedTrialError:  # taken for that of the worker who was killed
                continue
            if self.trials()[trial.number] >= self.search.n:  # another worker was faster
                self.study.tell(trial, state=state.FAIL)
                break
            asked.append(trial)
        return sorted(asked, key=lambda trial: trial.number)

    def _sampler(self, place: int):
        """The sampler of the trial with a place: what is drawn depends on it and on what is known, and on no run."""
        samplers, seed = self.optuna.samplers, self.search.seed
        own = int(np.random.SeedSequence((seed, place)).generate_state(1)[0] >> 1)
        if self.search.sampler == "qmc":
            return samplers.QMCSampler(seed=seed, scramble=True, warn_independent_sampling=False)
        if self.search.sampler == "random":
            return samplers.RandomSampler(seed=own)
        # What is being trained counts as bad: the members of a generation keep apart.
        return samplers.TPESampler(seed=own, constant_liar=True)

    def _distributions(self) -> dict:
        d = self.optuna.distributions
        number = lambda v: (d.IntDistribution if v.whole else d.FloatDistribution)(v.low, v.high, log=v.log)
        kind = lambda field, v: (
            number(v) if isinstance(v, Distribution) else d.CategoricalDistribution(self.choices[field])
        )
        return {field: kind(field, values) for field, values in self.space.searched.items()}

    def members(self, trials: list) -> tuple[Member, ...]:
        """The members of some trials, with their repeats."""
        places = self.trials()
        return tuple(m for t in trials for m in self.space.repeated(places[t.number], self._setting(t)))

    def _setting(self, trial) -> dict[str, Any]:
        return {
            field: self.choices[field][value] if field in self.choices else value
            for field, value in trial.params.items()
        }

    def running(self) -> list:
        """The trials that are being trained."""
        return self.study.get_trials(deepcopy=False, states=(self.optuna.trial.TrialState.RUNNING,))

    def tell(self) -> None:
        """Tells the study the figures of all running trials whose members have their rows in the folder.

        A figure is the mean over a setting's repeats. What was eliminated is told as pruned, with its figure there;
        what has diverged as pruned without one, which is worse.
        """
        state, running = self.optuna.trial.TrialState, self.running()
        places = self.trials()  # after those that run: other workers ask for more meanwhile
        rows = {row["number"]: row for row in self.folder.results()}
        repeats = len(self.space.repeats)
        for trial in running:
            first = places[trial.number] * repeats
            found = [rows.get(number) for number in range(first, first + repeats)]
            if not all(found):
                continue
            told = {"state": state.PRUNED}
            if all(row["val"] for row in found):
                value = float(np.mean([row["val"][self.metric] for row in found]))
                if any(row["status"].startswith("eliminated") for row in found):
                    live = self.optuna.trial.Trial(self.study, trial._trial_id)
                    live.report(value, max(row["steps"] for row in found))
                else:
                    told = {"values": value}
            elif not any(row["status"].startswith("diverged") for row in found):
                raise UserError("config.search = 'optuna(…)' needs a val split; see config.data.val")
            self.study.tell(trial.number, skip_if_finished=True, **told)

    # ---- who lives

    @contextlib.contextmanager
    def alive(self, trials: list) -> Iterator[None]:
        """Tells the study that these trials are being trained; gives back those that were not told, at its end."""
        over = threading.Event()

        def beat():
            while not over.wait(self.search.heartbeat):
                for trial in trials:
                    with contextlib.suppress(Exception):  # a storage that is busy now is not later
                        self.storage.record_heartbeat(trial._trial_id)

        self.mine = {trial.number for trial in trials}
        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            left = [trial for trial in self.running() if trial.number in self.mine]
            self.mine = set()
            for trial in left:
                self._repeat(trial)

    def _take_back(self) -> None:
        """Sets the trials of workers that are gone to be trained again."""
        self.optuna.storages.fail_stale_trials(self.study)
        for trial in self.running():
            if _gone(trial.user_attrs.get(WORKER, "")):
                self._repeat(trial)

    def _repeat(self, trial) -> None:
        with contextlib.suppress(self.optuna.exceptions.UpdateFinishedTrialError):  # another worker was faster
            if self.storage.set_trial_state_values(trial._trial_id, self.optuna.trial.TrialState.FAIL):
                self.again(self.study, trial)


def _gone(worker: str) -> bool:
    """Whether a worker was a process of this machine that is no more; others are told by their silence."""
    host, _, rest = worker.partition(":")
    process = rest.partition(":")[0]
    if host != socket.gethostname() or not process.isdigit():
        return False
    if int(process) == os.getpid():
        return worker not in WORKERS
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _shown(url: str) -> str:
    """A URL without a password in it."""
    scheme, at, rest = url.partition("://")
    return f"{scheme}{at}{rest.rpartition('@')[2]}"

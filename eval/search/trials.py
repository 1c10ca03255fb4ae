"""What a search has evaluated: an Optuna study in a journal next to the schedule file, so that a search can resume.

The attributes of the study hold the settings and the figures of the unpruned model. Every other schedule is a trial.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import Trial, TrialState, create_trial

from tokprune.core.errors import RunError

from ..run.lines import shortened, typed
from ..run.locks import alone_at

Counts = Mapping[int, int]  # visual tokens left from a layer on, of the largest picture; empty for the unpruned model
NAME, SETTINGS, UNPRUNED, POINT = "schedule", "settings", "unpruned", "point"


@dataclass(frozen=True)
class Point:
    """The figures of one evaluated schedule.

    Args:
        key: the schedule, as `key_of` writes it.
        right: number of right answers.
        n: number of questions.
        tokens: visual tokens in every decoder layer, mean over the questions.
    """

    key: str
    right: int
    n: int
    tokens: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """Between 0 and 1."""
        return self.right / self.n


def key_of(counts: Counts) -> str:
    """A schedule as text, "2x72/5x18"."""
    return "/".join(f"{layer}x{n}" for layer, n in sorted(counts.items()))


class Trials:
    """The evaluated schedules of a study.

    Args:
        study: holds those of earlier runs, and takes new ones.
        path: of its journal.

    Raises:
        Damaged: a trial holds no figures.
    """

    def __init__(self, study: optuna.Study, path: Path):
        self.study, self.path = study, path
        done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        noted = [t.user_attrs.get(POINT) for t in done]
        if UNPRUNED in study.user_attrs:
            noted.append(study.user_attrs[UNPRUNED])
        self.points = {p.key: p for p in (typed(Point, values) for values in noted)}

    def add(self, point: Point, trial: Trial | None = None) -> None:
        """Record the figures of a schedule.

        Args:
            point: the figures.
            trial: the trial that proposed the schedule, if a sampler did.
        """
        if trial is not None:
            trial.set_user_attr(POINT, asdict(point))
            self.study.tell(trial, point.accuracy)
        elif point.key:
            self.study.add_trial(create_trial(value=point.accuracy, user_attrs={POINT: asdict(point)}))
        else:
            self.study.set_user_attr(UNPRUNED, asdict(point))
        self.points[point.key] = point


@contextmanager
def opened(out: Path, settings: Mapping[str, Any], overwrite: bool = False) -> Iterator[Trials]:
    """The trials of a search, which no other process can open meanwhile.

    Args:
        out: the schedule file; the journal is next to it.
        settings: everything that the figures depend on, and what is searched for, as JSON values.
        overwrite: delete the trials of an earlier search.

    Raises:
        RunError: the journal cannot be read or written, another process has it open, it belongs to a search with other
            settings, or `out` exists and no search wrote it.
    """
    path = out.with_name(f"{out.name}.trials.jsonl")
    with alone_at(out):
        try:
            _prepare(out, path, overwrite)
            trials = Trials(_study(path, json.loads(json.dumps(settings))), path)
        except RunError:
            raise
        except OSError as error:
            raise _unwritable(path, error) from error
        except Exception as error:  # Optuna documents no error for a damaged line
            raise RunError(
                f"cannot read {path} as the trials of a search; start over with --overwrite, or name another file "
                "with --out"
            ) from error
        yield trials


class _Journal(JournalFileBackend):
    """Optuna's journal; says in one line why it cannot be written."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        try:
            super().append_logs(logs)
        except OSError as error:
            raise _unwritable(Path(self._file_path), error) from error


def _prepare(out: Path, path: Path, overwrite: bool) -> None:
    """Clear what an earlier process left, which may have been killed while it wrote."""
    if overwrite:
        path.unlink(missing_ok=True)
    elif out.exists() and not path.exists():
        raise RunError(f"{out} exists already; name another file with --out, or type --overwrite")
    Path(f"{path}.lock").unlink(missing_ok=True)  # Optuna's lock: the next process would wait for it
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)  # else the next line is appended to half a line


def _study(path: Path, settings: dict[str, Any]) -> optuna.Study:
    """The study of a journal, or a new one."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(_Journal(str(path), JournalFileOpenLock(str(path))))
    if not storage.get_all_studies():
        study = optuna.create_study(study_name=NAME, storage=storage, direction="maximize")
    else:
        study = optuna.load_study(study_name=NAME, storage=storage)
    if SETTINGS not in study.user_attrs and not study.trials:
        study.set_user_attr(SETTINGS, settings)
    there = study.user_attrs[SETTINGS]
    for name in {**there, **settings}:
        if there.get(name) != settings.get(name):
            raise RunError(
                f"{path} belongs to a search with other settings ({name}: {shortened(there.get(name), 80)} there, "
                f"{shortened(settings.get(name), 80)} now); name another file with --out, or start over with "
                "--overwrite"
            )
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # its process was killed
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _unwritable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror or error}. What was evaluated is kept: free some space, then type the "
        "same command again, or name another file with --out"
    )

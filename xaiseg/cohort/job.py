"""Segment and explain the cases of an input: preflight, segmentation, plan, explanation, tables. A run that is repeated goes on."""

import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from tqdm import tqdm

from xaiseg.checkpoints import load_model
from xaiseg.cohort.cache import use_compilation_cache
from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.identity import changed_inputs, identity
from xaiseg.cohort.journal import CaseRecord, verify
from xaiseg.cohort.local import EXPLANATION, SEGMENTATION, needs, work_through
from xaiseg.cohort.methods import Settings
from xaiseg.cohort.output import OutputError
from xaiseg.cohort.plan import load_of, nothing_to_explain, say_plan, window_count
from xaiseg.cohort.running import Heartbeat
from xaiseg.cohort.session import Session
from xaiseg.cohort.stages import MASK, PROBABILITY, WORKER, fail
from xaiseg.cohort.stopping import Stopping
from xaiseg.cohort.tables import Counts, case_line, case_row, finish_case, write_tables
from xaiseg.cohort.work import Execution, Print, Request
from xaiseg.errors import InputError, Stopped
from xaiseg.imaging import Case, Cohort, Rejected, problems, read_cohort, select_cases, select_participants
from xaiseg.models import Model

# Characters of a case's name, so that the names of its files are no longer than file systems allow.
_LONGEST = 150
# Cases that the terminal is told of one by one at the end.
_FEW = 20
# Cases from which on a bar is shown while they are checked.
_MANY = 50


class Result(NamedTuple):
    """One finished piece of work.

    status: "segmented", "explained" or "failed". method, lesion: of an explanation. row: of the lesion's table, or of the case's.
    message: why it failed.
    """

    case: str
    status: str
    method: str | None = None
    lesion: int | None = None
    row: dict[str, Any] = {}  # noqa: RUF012
    message: str | None = None


def segment(
    model: Model | str | Path, request: Request, say: Print = print, execution: Execution | None = None
) -> list[dict[str, Any]]:
    """Segment the cases, write masks, probabilities and label maps; returns the rows of `cases.tsv`. See `run`."""
    return _last(run(model, request, None, execution, say))


def explain(
    model: Model | str | Path,
    request: Request,
    settings: Settings,
    say: Print = print,
    execution: Execution | None = None,
) -> list[dict[str, Any]]:
    """Segment, then explain every instance; writes maps, pictures and tables and returns the rows of `cases.tsv`. See `run`."""
    return _last(run(model, request, settings, execution, say))


def run(
    model: Model | str | Path,
    request: Request,
    settings: Settings | None = None,
    execution: Execution | None = None,
    say: Print = print,
) -> Generator[Result, None, list[dict[str, Any]]]:
    """Work on the cases of an input and yield what is done as it comes; returns the rows of `cases.tsv` of these cases.

    settings: of the explanation; None for a segmentation alone. execution: where it is computed.

    What is done is recorded in the output folder, lesion by lesion, and not done again when the same run is repeated. A case or
    lesion that fails is recorded with its cause, and the others go on. Ctrl-C and SIGTERM end the run cleanly.

    First all cases are segmented, then lesions are explained; tables are written when the iteration comes to its end.

    Raises InputError for input or settings that cannot be used and, in a folder of its own and without a choice of cases by label
    or shard, where every case fails or there is nothing to explain at all: the folder is then left as it was found. OutputError for
    an output that cannot be written, and Stopped after a signal: what was finished stays.
    """
    started = time.time()
    execution = execution or Execution()
    use_compilation_cache()
    folder = RunFolder(request.output, request.overwrite)
    session = Session(load_model(model) if isinstance(model, str | Path) else model, request, settings, folder)
    now = identity(session.model, request, settings, session.methods)
    if request.level == "group":
        return _group(session, execution, now, started, say)
    # one part of many cannot know whether it matters that it comes to nothing
    alone = folder.fresh and not (request.shard or request.participants or request.sessions or request.level)
    cohort = _cohort(request, session.model.spec.channels, alone or request.dry_run)
    folder.compare(now)
    if request.dry_run:
        return _dry_run(session, cohort, say)
    with Stopping() as stopping, Heartbeat(folder, stopping) as heartbeat:
        folder.begin(now, str(request.input.absolute()))
        heartbeat.begin()
        job = _Job(session, cohort, execution, say, stopping, heartbeat, alone and folder.fresh)
        try:
            for result in job.work():
                with stopping.paused():
                    yield result
        except OutputError:
            raise
        except InputError:
            if folder.fresh and not job.explaining:
                heartbeat.end()
                folder.discard()
            raise
        else:
            return job.finish(started)
        finally:
            folder.release()


class _Job:
    """A run that has begun. alone: it is refused where nothing comes of it."""

    def __init__(
        self,
        session: Session,
        cohort: Cohort,
        execution: Execution,
        say: Print,
        stopping: Stopping,
        heartbeat: Heartbeat,
        alone: bool,
    ) -> None:
        self.session, self.execution, self.say = session, execution, say
        self.stopping, self.heartbeat, self.alone = stopping, heartbeat, alone
        self.cases, self.rejected = cohort.cases, cohort.rejected
        self.names = list(dict.fromkeys([case.name for case in cohort.cases] + [r.name for r in cohort.rejected]))
        self.explaining = self.crashed = False
        self._workers: Any = None
        self._held = ExitStack()

    def work(self) -> Iterator[Result]:
        with self._held:
            yield from self._work()

    def _work(self) -> Iterator[Result]:
        session, folder = self.session, self.session.folder
        folder.plan(self.names)
        for name, message in self.rejected:
            yield from self._told([fail(session, name, "input", None, InputError(message))])
        if not folder.fresh:
            self._survey()
        yield from self._stage(
            SEGMENTATION, "window", window_count(session.segmenter, session.model, self._left(SEGMENTATION))
        )
        if self.stopping():
            return
        if self.alone and not any(record.segmented for record in self._records()):
            first = next(failure for record in self._records() for failure in record.failures.values())
            others = f" (and {len(self.names) - 1} more cases failed)" if len(self.names) > 1 else ""
            raise InputError(first["message"] + others)
        if session.settings is None:
            return
        if self.alone and not any(record.lesions() for record in self._records()):
            raise InputError(nothing_to_explain(session, self._records()))
        load = load_of((CaseRecord.read(folder.root, case.name) for case in self.cases), session.methods)
        if not load.units:
            self.say(f"nothing left to do: {load.done} units were done before")
            self.explaining = True
            return
        by_name = {case.name: case for case in self.cases}
        # workers on this machine share it, and rows were measured on all of it
        elsewhere = self.execution.executor == "slurm" or self.execution.scheduler is not None
        total = say_plan(session, load, by_name, self.say, self.execution.workers if elsewhere else None)
        self.explaining = True
        yield from self._stage(EXPLANATION, "row", total)

    def _stage(self, stage: str, unit: str, total: int | None) -> Iterator[Result]:
        left = self._left(stage)
        if not left:
            return
        with _bar(total, unit, "segmenting" if stage == SEGMENTATION else "explaining") as bar:
            yield from self._told(self._execute(left, stage, bar.update))

    def _execute(self, cases: Sequence[Case], stage: str, progress: Callable[[int], Any]) -> Iterator[dict[str, Any]]:
        if self.execution.executor == "local":
            return work_through(self.session, cases, stage, self.stopping, progress)
        if self._workers is None:
            from xaiseg.cohort.distributed import started

            self._workers = self._held.enter_context(started(self.execution))
        return self._workers.work_through(self.session, cases, stage, self.stopping, progress)

    def _told(self, entries: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> Iterator[Result]:
        """Results of journal lines, which are logged, and failures told at once."""
        for entry in entries:
            for result in _results(entry):
                self.heartbeat.log(_line(result, entry))
                if result.status == "failed":
                    if len(self.names) > 1:
                        tqdm.write(_line(result, entry), file=sys.stderr)
                    if self.execution.stop_on_first_crash:
                        self.crashed = True
                        self.stopping.asked.set()
                for warning in entry.get("warnings", ()):
                    tqdm.write(f"{result.case}: warning: {warning}", file=sys.stderr)
                yield result

    def _records(self) -> Iterator[CaseRecord]:
        """One after the other: a cohort's do not fit into memory."""
        for name in self.names:
            yield CaseRecord.read(self.session.folder.root, name)

    def _left(self, stage: str) -> list[Case]:
        root = self.session.folder.root
        return [case for case in self.cases if needs(CaseRecord.read(root, case.name), self.session, stage)]

    def _survey(self) -> None:
        """Trust of an earlier run only what is whole and came from the same files."""
        root = self.session.folder.root
        for case in tqdm(self.cases, desc="checking", unit="case", file=sys.stderr, disable=len(self.cases) < _MANY):
            if self.stopping():
                return
            journal = self.session.folder.journal(case.name)
            with journal.claimed() as ours:
                if not ours:
                    continue
                if broken := verify(root, case.name):
                    self.say(f"{case.name}: {broken[0]} is missing or damaged{_more(broken)}: done again")
                record = CaseRecord.read(root, case.name)
                if any(lesion is None for _, lesion in record.failures):
                    journal.append({"entry": "cleared"})  # it is tried again
                if record.segmented and (changed := changed_inputs(case, record.segmented["inputs"])):
                    journal.append({"entry": "restarted"})
                    self.say(f"{case.name}: {', '.join(changed)} changed since: done again")

    def finish(self, started: float) -> list[dict[str, Any]]:
        session = self.session
        keys = session.keys if session.settings is not None else None
        for case in self.cases:
            with session.folder.journal(case.name).claimed() as ours:
                if ours:
                    finish_case(session, case)
        self.heartbeat.end()
        if session.request.level != "participant":
            write_tables(session, self.execution, started, self.say)
        session.folder.close()
        rows = [case_row(record, keys) for record in self._records()]
        _say_rows(rows, self.say)
        if self.crashed:
            self.say("stopped at the first failure; give the same command again to go on")
        elif self.stopping():
            raise Stopped(f"{_progress_of(rows)}; give the same command again to go on")
        return rows


def _cohort(request: Request, channels: Sequence[str], needed: bool) -> Cohort:
    """The cases to work on, and what is wrong with the others. Raises InputError where a case is `needed` and none is left."""
    cohort = read_cohort(request.input, channels, request.index)
    if request.participants or request.sessions:
        cohort = select_participants(cohort, request.participants, request.sessions)
    rejected = [] if request.cases else list(cohort.rejected)
    if request.cases:
        bad = {r.name: r for r in cohort.rejected}
        rejected = [bad[name] for name in request.cases if name in bad]
        wanted = [name for name in request.cases if name not in bad]
        cohort = cohort._replace(cases=select_cases(cohort.cases, wanted) if wanted else [])
    if request.instances != "given":
        cohort = cohort._replace(cases=[replace(case, instances=None) for case in cohort.cases])
    found: list[tuple[str, Case | None, str | None]] = [(r.name, None, r.message) for r in rejected]
    found += [(case.name, case, None) for case in cohort.cases]
    found.sort(key=lambda entry: entry[0])
    if request.shard is not None:
        part, parts = request.shard
        found = found[part - 1 :: parts]  # before any file is looked at: a case that is repaired stays in its part
        if not found:
            raise InputError(f"--shard {part}/{parts}: no case in this part; expected at most as many parts as cases")
    cases, rejected = [], []
    for name, case, message in found:
        if case is not None:
            message = _unfit(case, channels, request)
        if message is not None:
            rejected.append(Rejected(_shortened(name), message))
        elif case is not None:
            cases.append(case)
    if not cases and needed:
        names = [name for name, _ in rejected[1:]]
        others = f" (and {len(names)} more: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
        raise InputError(rejected[0].message + others)
    return Cohort(cases, rejected)


def _shortened(name: str) -> str:
    """A rejected case's name, which can be anything, as its journal's file can be called."""
    return name if len(quote(name)) <= _LONGEST else f"{name[:40]}_{zlib.crc32(name.encode()):08x}"


def _unfit(case: Case, channels: Sequence[str], request: Request) -> str | None:
    """Why a case cannot be used, as far as headers tell."""
    if len(case.name) > _LONGEST:
        return f"{_shortened(case.name)}: a name of {len(case.name)} characters; expected at most {_LONGEST}: rename the case"
    if request.instances in ("reference", "missed") and case.reference is None:
        return f"{case.name}: has no reference mask, which --instances {request.instances} needs; add it, or select by --cases"
    if request.instances == "given" and case.instances is None:
        return f"{case.name}: has no label map, which --instances given needs; add a column 'instances' to the manifest"
    found = problems(case, channels, request.resample)
    if not found:
        return None
    names = [path.name for path, _ in found[1:]]
    return found[0][1] + (
        f" (and {len(names)} more: {', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
    )


def _dry_run(session: Session, cohort: Cohort, say: Print) -> list[dict[str, Any]]:
    """The plan of the whole, from a segmentation of which nothing is kept."""
    with tempfile.TemporaryDirectory(prefix="xaiseg-") as place, Stopping() as stopping:
        folder = RunFolder(place)
        session.folder = folder
        total = window_count(session.segmenter, session.model, cohort.cases)
        with _bar(total, "window", "segmenting") as bar:
            for entry in work_through(session, cohort.cases, SEGMENTATION, stopping, bar.update):
                case = next(case for case in cohort.cases if case.name == entry["case"])
                for name in (PROBABILITY, MASK):
                    folder.path(case, name).unlink(missing_ok=True)
                if entry["entry"] == "failed" and len(cohort.cases) > 1:
                    tqdm.write(f"{case.name}: failed: {entry['message']}", file=sys.stderr)
        for name, message in cohort.rejected:
            tqdm.write(f"{name}: failed: {message}", file=sys.stderr)
        if stopping():
            raise Stopped("no plan was made")
        records = [CaseRecord.read(folder.root, case.name) for case in cohort.cases]
        if not any(record.segmented for record in records):
            raise InputError(next(f["message"] for record in records for f in record.failures.values()))
        if session.settings is not None:
            if not any(record.lesions() for record in records):
                raise InputError(nothing_to_explain(session, iter(records)))
            load = load_of(iter(records), session.methods)
            say_plan(session, load, {case.name: case for case in cohort.cases}, say, None)
        return [case_row(record, session.keys) for record in records]


def _group(
    session: Session, execution: Execution, now: dict[str, Any], started: float, say: Print
) -> list[dict[str, Any]]:
    """The tables of what earlier runs did."""
    folder = session.folder
    if folder.fresh:
        raise InputError(f"{folder.shown}: holds no run; expected one: run the level participant first")
    folder.begin(now, str(session.request.input.absolute()))
    try:
        counts: Counts = write_tables(session, execution, started, say)
    finally:
        folder.release()
    total = sum(counts.cases.values())
    say(f"{total} case{'s' * (total != 1)}, {counts.done} of {counts.units} units done, {counts.failures} failures")
    keys = session.keys if session.settings is not None else None
    return [case_row(CaseRecord.read(folder.root, name), keys) for name in folder.planned()]


def _results(entry: dict[str, Any]) -> Iterator[Result]:
    case, kind = entry["case"], entry["entry"]
    if kind == "segmented":
        yield Result(case, "segmented", row=entry["row"])
    elif kind == "explained":
        for lesion in entry["lesions"]:
            yield Result(case, "explained", entry["method"], lesion["lesion"], lesion["row"])
    elif kind == "failed":
        method = entry["unit"] if entry["lesion"] is not None else None
        yield Result(case, "failed", method, entry["lesion"], message=entry["message"])


def _line(result: Result, entry: dict[str, Any]) -> str:
    what = f"{result.method}, lesion {result.lesion}" if result.lesion is not None else ""
    if result.status == "failed":
        return f"{result.case}: {what + ' ' if what else ''}failed: {result.message}"
    took = f" in {entry['seconds']:.1f} s" + (f" by {entry['worker']}" if entry["worker"] != WORKER else "")
    return f"{result.case}: {what or str(result.row['lesions']) + ' lesions'} {result.status}{took}"


def _say_rows(rows: Sequence[dict[str, Any]], say: Print) -> None:
    if len(rows) <= _FEW:
        for row in rows:
            say(case_line(row))
        return
    for row in rows:
        if row["status"] in ("failed", "partial"):
            say(case_line(row))
    say(_progress_of(rows))


def _progress_of(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["status"] for row in rows)
    return f"{len(rows)} case{'s' * (len(rows) > 1)}: " + ", ".join(f"{n} {status}" for status, n in counts.items())


def _more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _bar(total: int | None, unit: str, what: str) -> tqdm:
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(total=total, unit=unit, desc=what, file=sys.stderr, mininterval=interval, dynamic_ncols=True)


def _last(results: Generator[Any, None, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    while True:
        try:
            next(results)
        except StopIteration as end:
            return end.value

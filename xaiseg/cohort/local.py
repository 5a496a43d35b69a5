"""Cases worked through in this process: the next scan is read and the last results are written while one is computed."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from xaiseg._types import Progress
from xaiseg.cohort.identity import changed_inputs, fingerprint
from xaiseg.cohort.journal import CaseRecord
from xaiseg.cohort.session import Session
from xaiseg.cohort.stages import Stopped, Write, explain_case, fail, must_stop, segment_case
from xaiseg.cohort.work import load_scan
from xaiseg.errors import InputError
from xaiseg.imaging import Case, Scan, warnings

SEGMENTATION, EXPLANATION = "segmentation", "explanation"
# Results that wait to be written; each holds the maps of a group of lesions.
_BEHIND = 4
_POLL = 0.5  # seconds


@dataclass
class _Task:
    """A case that is claimed and read, unless another process has it (`busy`) or nothing is left to do (no scan, no error)."""

    case: Case
    claim: ExitStack = field(default_factory=ExitStack)
    busy: bool = False
    scan: Scan | None = None
    record: CaseRecord | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: BaseException | None = None


def needs(record: CaseRecord, session: Session, stage: str) -> bool:
    """Whether a stage has work left in a case."""
    if stage == SEGMENTATION:
        return record.segmented is None
    return record.segmented is not None and bool(record.missing(session.keys))


def work_through(
    session: Session,
    cases: Sequence[Case],
    stage: str,
    stopped: Stopped = lambda: False,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """Take the cases through a stage; yields the lines of their journals as they are written.

    A case that another process works on is left to it; what that has not done in the end is done here. When `stopped`, the group of
    lesions under way is finished. Raises OutputError when the output cannot be written; what is in the journals then is whole.
    """
    queue: deque[Case] = deque(cases)
    later: list[Case] = []
    with _Behind() as behind, ThreadPoolExecutor(1) as reader:
        ahead: Future[_Task] | None = None

        def read_next() -> Future[_Task] | None:
            return reader.submit(_read, session, queue.popleft(), stage) if queue and not stopped() else None

        try:
            ahead = read_next()
            while ahead is not None:
                task, ahead = ahead.result(), read_next()
                if task.busy:
                    later.append(task.case)
                else:
                    yield from _take(session, task, stage, stopped, progress, behind)
                if ahead is None and later and not stopped():
                    time.sleep(_POLL)
                    queue.extend(later)
                    later.clear()
                    ahead = read_next()
        finally:
            if ahead is not None:
                ahead.result().claim.close()
        yield from behind.rest()


def _read(session: Session, case: Case, stage: str) -> _Task:
    task = _Task(case)
    if not task.claim.enter_context(session.folder.journal(case.name).claimed()):
        task.claim.close()
        return _Task(case, busy=True)
    try:
        task.record = CaseRecord.read(session.folder.root, case.name)
        if needs(task.record, session, stage):
            session.folder.clean(case)
            if stage == SEGMENTATION:
                session.folder.clear(case)
                task.inputs = fingerprint(case)
            elif changed := changed_inputs(case, (task.record.segmented or {})["inputs"]):
                raise InputError(
                    f"{case.name}: {', '.join(changed)} changed since the segmentation; give the command again to start it anew"
                )
            task.scan = load_scan(case, session.model.spec, session.request.resample)
            if stage == SEGMENTATION:
                task.warnings = warnings(
                    case, task.scan.image, session.model.spec.channels, zero_is_background=task.scan.prepared is None
                )
    except BaseException as error:
        task.error = error
    return task


def _take(
    session: Session, task: _Task, stage: str, stopped: Stopped, progress: Progress | None, behind: "_Behind"
) -> Iterator[dict[str, Any]]:
    """One claimed case; its claim ends when its last result is written."""
    try:
        try:
            if task.error is not None:
                raise task.error
            if task.scan is None or task.record is None or stopped():
                return
            if stage == SEGMENTATION:
                told = (lambda: progress(1)) if progress is not None else None
                yield from behind.add(segment_case(session, task.case, task.scan, task.inputs, task.warnings, told))
            else:
                for write in explain_case(session, task.case, task.scan, task.record, stopped, progress):
                    yield from behind.add(write)
        except Exception as error:
            if must_stop(error):
                raise
            failure = error
            yield from behind.add(lambda: fail(session, task.case, stage, None, failure))
    finally:
        behind.then(task.claim.close)


class _Behind:
    """A thread that writes results in order, at most `_BEHIND` of them waiting."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[dict[str, Any]]] = deque()
        self._broken = threading.Event()

    def add(self, write: Write) -> Iterator[dict[str, Any]]:
        """Have it written; yields what is written meanwhile. Raises what writing raised."""
        self._waiting.append(self._pool.submit(self._unless_broken, write))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > _BEHIND):
            yield self._waiting.popleft().result()

    def then(self, call: Callable[[], Any]) -> None:
        """After all that was added before, whether it could be written or not."""
        self._pool.submit(call)

    def rest(self) -> Iterator[dict[str, Any]]:
        while self._waiting:
            yield self._waiting.popleft().result()

    def _unless_broken(self, write: Write) -> dict[str, Any]:
        if self._broken.is_set():
            raise InterruptedError("not written, since an earlier result could not be")
        try:
            return write()
        except BaseException:
            self._broken.set()
            raise

    def __enter__(self) -> "_Behind":
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=True)

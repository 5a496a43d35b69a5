"""Cases worked through by Dask workers: the same units and the same journals, on whatever machines share the output folder."""

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from xaiseg.checkpoints import load_model, model_hash, save_model
from xaiseg.cohort.cache import use_compilation_cache
from xaiseg.cohort.folder import RunFolder
from xaiseg.cohort.journal import CaseRecord
from xaiseg.cohort.local import work_through
from xaiseg.cohort.methods import Settings
from xaiseg.cohort.session import Session
from xaiseg.cohort.stages import Stopped, fail
from xaiseg.cohort.work import Execution, Request
from xaiseg.errors import InputError
from xaiseg.imaging import Case

_MODEL = Path("logs/model")
_RETRIES = 3
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class _Place:
    """Where a worker finds what it needs; all paths are absolute, on a file system that all machines share.

    local: of how many workers on one machine this is one; 0 where somebody else has started them.
    """

    request: Request
    settings: Settings | None
    stop: Path
    local: int
    accelerated: bool


def work_through_workers(
    session: Session,
    execution: Execution,
    cases: Sequence[Case],
    stage: str,
    stopped: Stopped,
    progress: Callable[[int], Any],
) -> Iterator[dict[str, Any]]:
    """As `local.work_through`, a task for each case. A case whose worker is lost is given to another, which goes on from the
    journal. Raises InputError where there are no workers to be had."""
    distributed = _package("distributed", "dask")
    folder = session.folder
    with folder.exclusively("model"):
        if not (folder.root / _MODEL).is_dir() or model_hash(load_model(folder.root / _MODEL)) != model_hash(
            session.model
        ):
            save_model(folder.root / _MODEL, session.model, overwrite=True)
    # the folder is shared, so a file can tell every worker to stop
    stop = folder.root / "logs" / f"stop-{os.getpid()}-{time.time_ns()}"
    request = replace(session.request, input=session.request.input.absolute(), output=folder.root, overwrite=False)
    local = (execution.workers or 1) if execution.executor == "dask" and execution.scheduler is None else 0
    place = _Place(request, session.settings, stop, local, jax.default_backend() != "cpu")
    with _client(distributed, execution) as client, ExitStack() as at_end:
        at_end.callback(lambda: stop.unlink(missing_ok=True))
        by_key: dict[str, Case] = {}
        attempts: dict[str, int] = {}
        queue = distributed.as_completed()

        def submit(case: Case) -> None:
            attempts[case.name] = attempts.get(case.name, 0) + 1
            key = f"xaiseg-{stage}-{case.name}-{stop.name}-{attempts[case.name]}"
            by_key[key] = case
            queue.add(client.submit(_work, place, _absolute(case), stage, key=key, retries=_RETRIES, pure=False))

        for case in cases:
            submit(case)
        told = False
        while by_key:
            if stopped() and not told:
                told = True
                stop.touch()
            for future in queue.next_batch(block=False) if queue.has_ready() else ():
                case, error = by_key.pop(future.key), None
                try:
                    for entry in future.result():
                        progress(_units(entry))
                        yield entry
                except Exception as failure:
                    error = failure
                if error is not None and not stopped():
                    yield from _lost(session, case, stage, error, attempts[case.name], submit)
            time.sleep(_POLL)


def _lost(
    session: Session, case: Case, stage: str, error: Exception, attempts: int, submit: Callable[[Case], None]
) -> Iterator[dict[str, Any]]:
    """A task that Dask has given up: once more, unless that is hopeless."""
    if type(error).__name__ in ("KilledWorker", "FutureCancelledError", "CancelledError") and attempts < _RETRIES:
        tqdm.write(f"{case.name}: its worker was lost ({type(error).__name__}); given to another")
        submit(case)
        return
    done = len(CaseRecord.read(session.folder.root, case.name).explained)
    reason = RuntimeError(f"{attempts} workers were lost over this case, {done} of its units are done: {error}")
    yield fail(session, case, stage, None, reason if attempts >= _RETRIES else error)


def _work(place: _Place, case: Case, stage: str) -> list[dict[str, Any]]:
    """In a worker: one case, whose results are in the journal when this returns."""
    _settle(place)
    session = _session(place)
    return list(work_through(session, [case], stage, place.stop.exists))


@lru_cache(maxsize=1)
def _session(place: _Place) -> Session:
    use_compilation_cache()
    folder = RunFolder(place.request.output)
    return Session(load_model(folder.root / _MODEL), place.request, place.settings, folder)


@lru_cache(maxsize=1)
def _settle(place: _Place) -> None:
    """Before JAX begins: a worker that shares this machine with others takes its part of the cores, or a device of its own."""
    if not place.local:
        return
    from distributed import get_worker

    number = int(get_worker().name)
    if place.accelerated:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(number)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the process that plans is on it too
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[number % len(cores) :: place.local]))


@contextmanager
def _client(distributed: Any, execution: Execution) -> Iterator[Any]:
    with ExitStack() as stack:
        if execution.scheduler is not None:
            try:
                client = distributed.Client(execution.scheduler, timeout=30)
            except OSError as error:
                raise InputError(
                    f"--scheduler {execution.scheduler}: no answer ({error}); expected the address of a Dask scheduler, "
                    "tcp://host:port: start one with `dask scheduler`"
                ) from error
        elif execution.executor == "slurm":
            cluster = stack.enter_context(_slurm(execution))
            client = distributed.Client(cluster)
        else:
            cluster = stack.enter_context(
                distributed.LocalCluster(
                    n_workers=execution.workers or 1,
                    threads_per_worker=1,
                    memory_limit=0,  # bounded by the run itself
                    dashboard_address="127.0.0.1:0",
                )
            )
            client = distributed.Client(cluster)
        stack.enter_context(client)
        tqdm.write(f"dask: {client.scheduler.address}, dashboard {client.dashboard_link}")
        yield client


def _slurm(execution: Execution) -> Any:
    jobqueue = _package("dask_jobqueue", "dask")
    options = {name.replace("-", "_"): _number(value) for name, value in execution.job_options}
    options = {"cores": 1, "processes": 1, **options}
    try:
        cluster = jobqueue.SLURMCluster(**options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--job-option: {' '.join(str(error).split())}; expected options of dask-jobqueue's SLURMCluster, such as memory=32GB"
        ) from error
    cluster.scale(jobs=execution.workers or 1)
    return cluster


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _absolute(case: Case) -> Case:
    return replace(
        case,
        images={channel: path.absolute() for channel, path in case.images.items()},
        reference=case.reference and case.reference.absolute(),
        instances=case.instances and case.instances.absolute(),
    )


def _units(entry: dict[str, Any]) -> int:
    return entry.get("passes") or 0


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--executor: needs the package {name.replace('_', '-')}, which is missing: pip install 'xaiseg[{extra}]'"
        ) from error

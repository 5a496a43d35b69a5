"""Cases worked through by Dask workers: the same units and the same journals, on whatever machines share the output folder."""

import importlib.util
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
from xaiseg.cohort.stages import Stopped, fail, must_stop
from xaiseg.cohort.work import Execution, Request
from xaiseg.errors import InputError
from xaiseg.imaging import Case

_MODEL = Path("logs/model")
_LOSSES = 3  # of workers over one case, after which the case is given up
# Options of a job that are lists: each may be given several times.
_LISTS = ("job_extra_directives", "job_script_prologue", "worker_extra_args", "job_directives_skip")
_POLL = 0.1  # seconds


@dataclass(frozen=True)
class _Place:
    """Where a worker finds what it needs; all paths are absolute, on a file system that all machines share.

    local: of how many workers on one machine this is one; 0 where somebody else has started them.
    """

    request: Request
    settings: Settings | None
    local: int
    accelerated: bool


class Workers:
    """The workers of a run, started once for all of its stages."""

    def __init__(self, client: Any, execution: Execution) -> None:
        self._client = client
        # processes on this machine that share it
        own = execution.executor == "dask" and execution.scheduler is None
        self._local = (execution.workers or 1) if own else 0

    def work_through(
        self,
        session: Session,
        cases: Sequence[Case],
        stage: str,
        stopped: Stopped,
        progress: Callable[[int], Any],
    ) -> Iterator[dict[str, Any]]:
        """As `local.work_through`, a task for each case. A case whose worker is lost is given to another, which goes on from the
        journal."""
        from distributed import as_completed

        folder = session.folder
        with folder.exclusively("model"):
            stored = folder.root / _MODEL
            if not stored.is_dir() or model_hash(load_model(stored)) != model_hash(session.model):
                save_model(stored, session.model, overwrite=True)
        # the folder is shared, so a file can tell every worker to stop
        stop = folder.root / "logs" / f"stop-{os.getpid()}-{time.time_ns()}"
        request = replace(session.request, input=session.request.input.absolute(), output=folder.root, overwrite=False)
        place = _Place(request, session.settings, self._local, jax.default_backend() != "cpu")
        by_key: dict[str, Case] = {}
        attempts: dict[str, int] = {}
        queue = as_completed()

        def submit(case: Case) -> None:
            attempts[case.name] = attempts.get(case.name, 0) + 1
            key = f"xaiseg-{stage}-{case.name}-{stop.name}-{attempts[case.name]}"
            by_key[key] = case
            queue.add(self._client.submit(_work, place, _absolute(case), stage, stop, key=key, pure=False))

        try:
            for case in cases:
                submit(case)
            while by_key:
                if stopped():
                    stop.touch()
                    if not self._client.nthreads():
                        return  # the signal has reached the workers, too
                for future in queue.next_batch(block=False) if queue.has_ready() else ():
                    case, error = by_key.pop(future.key), None
                    try:
                        for entry in future.result():
                            progress(entry.get("passes") or 0)
                            yield entry
                    except Exception as failure:
                        error = failure
                    if error is not None and not stopped():
                        yield from _lost(session, case, stage, error, attempts[case.name], submit)
                time.sleep(_POLL)
        finally:
            stop.unlink(missing_ok=True)


def _lost(
    session: Session, case: Case, stage: str, error: Exception, attempts: int, submit: Callable[[Case], None]
) -> Iterator[dict[str, Any]]:
    """A task that Dask has given up: once more, unless that is hopeless. Raises OutputError as `local.work_through`."""
    if must_stop(error):
        raise error
    if type(error).__name__ in ("KilledWorker", "FutureCancelledError", "CancelledError") and attempts < _LOSSES:
        tqdm.write(f"{case.name}: its worker was lost ({type(error).__name__}); given to another")
        submit(case)
        return
    done = len(CaseRecord.read(session.folder.root, case.name).explained)
    reason = RuntimeError(f"{attempts} workers were lost over this case, {done} of its units are done: {error}")
    yield fail(session, case, stage, None, reason if attempts >= _LOSSES else error)


def _work(place: _Place, case: Case, stage: str, stop: Path) -> list[dict[str, Any]]:
    """In a worker: one case, whose results are in the journal when this returns."""
    _settle(place.local, place.accelerated)
    return list(work_through(_session(place), [case], stage, stop.exists))


@lru_cache(maxsize=1)
def _session(place: _Place) -> Session:
    use_compilation_cache()
    folder = RunFolder(place.request.output)
    return Session(load_model(folder.root / _MODEL), place.request, place.settings, folder)


@lru_cache(maxsize=1)
def _settle(local: int, accelerated: bool) -> None:
    """Before JAX begins: a worker that shares this machine with others takes its part of the cores, or a device of its own."""
    from distributed import get_worker

    if not local:
        return
    number = int(get_worker().name)
    if accelerated:
        allowed = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = allowed[number % len(allowed)] if allowed else str(number)
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the process that plans is on it too
    elif hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(cores[number % len(cores) :: local]))


@contextmanager
def started(execution: Execution) -> Iterator[Workers]:
    """Workers as `execution` asks for them, ended with the context. Raises InputError where there are none to be had."""
    os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "error")  # what workers say is said here, too
    distributed = _package("distributed", "dask")
    from xaiseg.cohort.worker import Apart

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
        client.register_plugin(Apart())
        drawn = importlib.util.find_spec("bokeh") is not None
        dashboard = client.dashboard_link if drawn else "needs bokeh (pip install 'xaiseg[dask]')"
        tqdm.write(f"dask: {client.scheduler.address}, dashboard {dashboard}")
        yield Workers(client, execution)


def _slurm(execution: Execution) -> Any:
    jobqueue = _package("dask_jobqueue", "dask")
    options: dict[str, Any] = {"cores": 1, "processes": 1}
    for name, value in execution.job_options:
        name = name.replace("-", "_")
        if name in _LISTS:
            options[name] = [*options.get(name, []), value]
        else:
            options[name] = int(value) if value.isdigit() else value
    try:
        cluster = jobqueue.SLURMCluster(**options)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"--job-option: {' '.join(str(error).split())}; expected options of dask-jobqueue's SLURMCluster, such as memory=32GB"
        ) from error
    cluster.scale(jobs=execution.workers or 1)
    return cluster


def _absolute(case: Case) -> Case:
    return replace(
        case,
        images={channel: path.absolute() for channel, path in case.images.items()},
        reference=case.reference and case.reference.absolute(),
        instances=case.instances and case.instances.absolute(),
    )


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"--executor: needs the package {name.replace('_', '-')}, which is missing: pip install 'xaiseg[{extra}]'"
        ) from error

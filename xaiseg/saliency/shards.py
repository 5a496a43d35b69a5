"""Independent passes - noise samples, steps of a path - spread over the devices of a predictor, their results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Lock
from typing import Any, TypeVar

from xaiseg._types import Progress
from xaiseg.inference.devices import sample_shards

Result = TypeVar("Result")


def in_order(
    predictor: Any, numbers: Iterable[int], work: Callable[[Any, int], Result]
) -> Generator[Result, None, None]:
    """`work(shard, number)` for each number, one after another as results: the order of the numbers, whichever is ready first.

    The shards of the predictor take the numbers in turn, each in a thread of its own, so that what a number gives does not depend
    on timing; a predictor of one shard works in the caller's thread. No more than one result per shard is held or under way, and
    numbers are drawn as they are needed: a caller that has seen enough closes the iterator, which waits for the passes under way.
    Results stay on the devices of their shard. The first error is raised in its place, and nothing is begun after it.

    >>> list(in_order(None, range(3), lambda shard, number: number**2))
    [0, 1, 4]
    """
    shards = sample_shards(predictor)
    if len(shards) == 1:
        for number in numbers:
            yield work(shards[0], number)
        return
    left = iter(numbers)
    with ExitStack() as stack:
        pending: deque[tuple[int, Future[Result]]] = deque()
        threads = [stack.enter_context(ThreadPoolExecutor(1, f"shard-{s}")) for s in range(len(shards))]

        def begin(s: int) -> None:
            for number in left:
                pending.append((s, threads[s].submit(work, shards[s], number)))
                return

        for s in range(len(shards)):
            begin(s)
        while pending:
            s, future = pending.popleft()
            result = future.result()
            # before the caller gets the result, so that the shard works meanwhile
            begin(s)
            yield result


def one_at_a_time(progress: Progress | None) -> Progress | None:
    """The same callback for use from several threads: calls wait for each other."""
    if progress is None:
        return None
    lock, report = Lock(), progress

    def locked(rows: int) -> None:
        with lock:
            report(rows)

    return locked

"""Passes over shards: in order, in turn, no further ahead than needed, and no thread left behind."""

import threading
import time

import pytest

from xaiseg.saliency import shards
from xaiseg.saliency.shards import in_order, one_at_a_time


@pytest.fixture(params=[1, 2, 3])
def count(request, monkeypatch):
    monkeypatch.setattr(shards, "sample_shards", lambda predictor: [(predictor, s) for s in range(request.param)])
    return request.param


def test_results_come_in_order_from_the_shards_in_turn(count):
    def work(shard, number):
        time.sleep(0.002 * (number * 7 % 5))
        return shard, number

    assert list(in_order("p", range(9), work)) == [(("p", n % count), n) for n in range(9)]


def test_no_numbers_no_results(count):
    assert list(in_order("p", [], lambda shard, number: number)) == []


def test_fewer_numbers_than_shards(count):
    assert list(in_order("p", [4], lambda shard, number: number)) == [4]


def test_a_shard_does_one_pass_at_a_time_and_the_shards_work_together(count):
    busy, most = dict.fromkeys(range(count), 0), 0
    together = threading.Barrier(count, timeout=10)

    def work(shard, number):
        nonlocal most
        busy[shard[1]] += 1
        most = max(most, *busy.values())
        together.wait()
        busy[shard[1]] -= 1

    list(in_order("p", range(4 * count), work))
    assert most == 1


def test_a_caller_that_has_enough_begins_at_most_one_more_per_shard(count):
    begun = []

    def work(shard, number):
        begun.append(number)
        return number

    before = threading.active_count()
    results = in_order("p", iter(range(1000)), work)
    assert next(results) == 0
    assert next(results) == 1
    results.close()
    assert set(begun) <= set(range(2 + count))
    assert threading.active_count() == before


def test_the_first_error_comes_in_its_place(count):
    def work(shard, number):
        if number >= 2:
            raise KeyError(number)
        return number

    before = threading.active_count()
    results = in_order("p", range(1000), work)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(KeyError, match="2"):
        next(results)
    assert threading.active_count() == before


def test_progress_calls_wait_for_each_other():
    inside, total = 0, 0

    def progress(rows):
        nonlocal inside, total
        inside += 1
        assert inside == 1
        time.sleep(0.001)
        total += rows
        inside -= 1

    report = one_at_a_time(progress)
    threads = [threading.Thread(target=lambda: [report(2) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total == 40
    assert one_at_a_time(None) is None

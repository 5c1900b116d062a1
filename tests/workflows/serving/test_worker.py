"""The model's thread: batches, a full queue, failures, the end."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest

from trainer.workflows.serving.counters import Histogram
from trainer.workflows.serving.worker import Busy, Worker


class Model:
    """Doubles numbers, once it may; fails at a 13."""

    def __init__(self) -> None:
        self.may, self.began = threading.Event(), threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, questions: Sequence[int]) -> list[int]:
        self.began.set()
        assert self.may.wait(30)
        self.batches.append(list(questions))
        if 13 in questions:
            raise ValueError("thirteen")
        return [2 * question for question in questions]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def worker(model: Model) -> Iterator[Worker[int, int]]:
    worker = Worker(model, batch=4, waiting=6)
    yield worker
    model.may.set()
    worker.close()
    assert not worker.alive


def busy_with(worker: Worker[int, int], model: Model, question: int) -> Future[int]:
    future = worker.ask(question)
    assert model.began.wait(30)
    return future


def test_what_came_in_meanwhile_is_answered_together(model: Model, worker: Worker[int, int]) -> None:
    futures = [busy_with(worker, model, 0), *(worker.ask(question) for question in range(1, 7))]
    model.may.set()
    assert [future.result(30) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6]]


def test_a_full_queue_refuses_and_recovers(model: Model, worker: Worker[int, int]) -> None:
    futures = [busy_with(worker, model, 0), *(worker.ask(question) for question in range(1, 7))]
    with pytest.raises(Busy) as refused:
        worker.ask(7)
    assert 1 <= refused.value.retry_after <= 60
    model.may.set()
    assert [future.result(30) for future in futures] == [0, 2, 4, 6, 8, 10, 12]
    assert worker.ask(7).result(30) == 14


def test_who_left_costs_nothing(model: Model, worker: Worker[int, int]) -> None:
    first, second, third = busy_with(worker, model, 0), worker.ask(1), worker.ask(2)
    assert second.cancel()
    model.may.set()
    assert [first.result(30), third.result(30)] == [0, 4]
    assert model.batches == [[0], [2]]


def test_a_failed_batch_fails_alone(model: Model, worker: Worker[int, int], caplog: pytest.LogCaptureFixture) -> None:
    first, second, third = busy_with(worker, model, 0), worker.ask(13), worker.ask(2)
    model.may.set()
    assert first.result(30) == 0
    for future in (second, third):
        with pytest.raises(ValueError, match="thirteen"):
            future.result(30)
    assert worker.ask(5).result(30) == 10
    assert "a batch of 2 failed" in caplog.text


def test_the_end_answers_what_waits(model: Model) -> None:
    worker = Worker(model, batch=2, waiting=9)
    futures = [worker.ask(question) for question in range(9)]
    model.may.set()
    worker.close()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_a_histogram_is_cumulative() -> None:
    histogram = Histogram([1.0, 2.0])
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert list(histogram.lines("x")) == [
        "# TYPE x histogram",
        'x_bucket{le="1.0"} 2',
        'x_bucket{le="2.0"} 3',
        'x_bucket{le="+Inf"} 4',
        "x_sum 12.000000",
        "x_count 4",
    ]

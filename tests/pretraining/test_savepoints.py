"""cim_models.pretraining.savepoints: when a run saves, and what a signal does."""

import signal
import threading

import pytest

from cim_models.pretraining import savepoints
from cim_models.pretraining.config import PretrainConfig
from cim_models.pretraining.savepoints import SavePoints
from cim_models.processes import Processes


@pytest.fixture
def clock(monkeypatch):
    """`clock[0]` is the time in seconds."""
    now = [100.0]
    monkeypatch.setattr(savepoints.time, "monotonic", lambda: now[0])
    return now


def test_steps_and_the_end(clock):
    points = SavePoints(PretrainConfig(save_every=4), steps=10)
    assert [done for done in range(1, 11) if points.reached(done)] == [4, 8, 10]


def test_minutes_since_the_last_save(clock):
    points = SavePoints(PretrainConfig(save_every=4, save_minutes=0.5), steps=1000)
    reached = []
    for done in range(1, 13):
        clock[0] += 12
        if points.reached(done):
            reached.append(done)
    assert reached == [3, 4, 7, 8, 11, 12]
    clock[0] += 1e6
    assert not SavePoints(PretrainConfig(save_minutes=None), steps=1000).reached(1)


def test_only_the_first_process_has_a_clock_and_all_follow_it(clock, monkeypatch):
    said = []
    monkeypatch.setattr(Processes, "greatest", lambda self, number: said.append(number) or max(said))
    points = [SavePoints(PretrainConfig(save_minutes=1.0), 1000, Processes(rank, 2)) for rank in range(2)]
    clock[0] += 61
    assert [point.reached(1) for point in points] == [True, True] and said == [1, 0]
    said.clear()
    with points[0], points[1]:
        signal.raise_signal(signal.SIGTERM)  # only the handler that was set last notes it
        assert [point.received for point in points] == [0, signal.SIGTERM]
        assert points[1].reached(2) and points[0].reached(2)
        assert [point.received for point in points] == [signal.SIGTERM, signal.SIGTERM]


def test_a_signal_that_one_process_notes_during_a_save_ends_all(monkeypatch):
    said = []
    monkeypatch.setattr(Processes, "greatest", lambda self, number: said.append(number) or max(said))
    points = [SavePoints(PretrainConfig(save_every=1), 1000, Processes(rank, 2)) for rank in range(2)]
    with points[1]:  # the other one heard nothing
        assert [point.reached(1) for point in points] == [True, True]
        signal.raise_signal(signal.SIGTERM)
        for point in reversed(points):
            with pytest.raises(SystemExit, match="143"):
                point.end_if_asked()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_process_ignores_is_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with SavePoints(PretrainConfig(), steps=1000) as points:
            signal.raise_signal(number)
            assert not points.reached(1)
            points.end_if_asked()
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_the_run_after_its_save(number, error):
    before = signal.getsignal(number)
    points = SavePoints(PretrainConfig(), steps=1000)
    with pytest.raises(error) as raised, points:
        assert not points.reached(1)
        points.end_if_asked()
        signal.raise_signal(number)
        assert points.reached(2) and signal.getsignal(number) != before
        points.end_if_asked()
    assert error is KeyboardInterrupt or raised.value.code == 143
    assert signal.getsignal(number) == before


def test_handlers_of_the_caller_are_called_and_may_let_the_run_go_on():
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))
    try:
        with SavePoints(PretrainConfig(), steps=1000) as points:
            for step in (1, 3):
                signal.raise_signal(signal.SIGTERM)
                assert points.reached(step) and not called
                points.end_if_asked()
                assert called == [signal.SIGTERM] and not points.reached(step + 1)
                called.clear()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whoever_interrupts_twice_is_not_kept_waiting():
    with pytest.raises(KeyboardInterrupt), SavePoints(PretrainConfig(), steps=1000):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_other_threads_have_no_signals():
    before, reached = signal.getsignal(signal.SIGTERM), []

    def run():
        with SavePoints(PretrainConfig(save_every=1), steps=9) as points:
            reached.append(points.reached(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reached == [True] and signal.getsignal(signal.SIGTERM) == before

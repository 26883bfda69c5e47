"""Ctrl-C waits for the end of what belongs together, SIGTERM is an end like it, and both are as usual afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from minitune.config import Training
from minitune.training import interrupt
from minitune.training.checkpoint import steps
from minitune.training.interrupt import Terminated, one_end, terminable, unbroken
from minitune.training.run import Observer
from tests.training.stopping import checkpoints, data, train


def test_unbroken_holds_ctrl_c_back_and_puts_everything_back():
    done, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), unbroken():
        signal.raise_signal(signal.SIGINT)
        done.append("after it")
    assert done == ["after it"] and signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError), unbroken():
        raise ValueError
    assert signal.getsignal(signal.SIGINT) is before
    thread = threading.Thread(target=lambda: [unbroken().__enter__(), done.append("in a thread")])
    thread.start()
    thread.join()
    assert done[1:] == ["in a thread"] and signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_terminable_makes_it_an_end_like_ctrl_c(number, code):
    done, before = [], signal.signal(number, signal.SIG_DFL)        # whoever runs the tests may ignore it
    try:
        with pytest.raises(Terminated) as ended, terminable():
            with unbroken():
                signal.raise_signal(number)
                done.append("whole")
            done.append("too late")
        assert done == ["whole"] and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert isinstance(ended.value, KeyboardInterrupt) and ended.value.exit_code == code


def test_a_program_keeps_its_own_handler_of_sigterm():
    heard, before = [], signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with terminable():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_every_signal_that_was_held_is_heard():
    heard, before = [], signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with pytest.raises(KeyboardInterrupt), unbroken():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
        assert heard == [signal.SIGTERM] * 2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_while_handlers_are_put_back_leaves_none_of_ours(monkeypatch):
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    put = signal.signal

    def interrupted(number, handler):
        found = put(number, handler)
        if number == signal.SIGINT and handler is usual[signal.SIGINT]:
            raise KeyboardInterrupt
        return found

    with terminable():
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), unbroken():
            monkeypatch.setattr(signal, "signal", interrupted)
        monkeypatch.undo()
        assert signal.getsignal(signal.SIGTERM) is own
    assert {number: signal.getsignal(number) for number in usual} == usual


def at_once(*numbers):
    """These signals, all there before the first one's handler is called."""
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.raise_signal(number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


@pytest.fixture
def default():
    """Whoever runs the tests may ignore them."""
    usual = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    assert all(signal.getsignal(number) is signal.SIG_DFL for number in usual)
    for number, handler in usual.items():
        signal.signal(number, handler)


def test_signals_that_come_at_once_are_one(default, monkeypatch):
    done = []
    with pytest.raises(Terminated) as ended, terminable(), one_end():
        try:
            at_once(signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        finally:
            done.append("kept")
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            done.append("whole")
            monkeypatch.setattr(interrupt, "SAME", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            done.append("later")
    assert done == ["kept", "whole", "later"] and ended.value.exit_code == 129


def test_a_run_that_signals_at_once_end_is_kept(fakes, tmp_path, default):
    class Impatient(Observer):
        def on_step(self, record):
            if record.step == 2:
                at_once(signal.SIGHUP, signal.SIGINT, signal.SIGTERM)

        def on_end(self, run):
            self.end = run.end

    observer = Impatient()
    with pytest.raises(KeyboardInterrupt), terminable():
        train(fakes, fakes.TinyModel(), data(fakes), Training(lr=0.05), observers=[observer],
              checkpoints=checkpoints(tmp_path))
    assert observer.end == "interrupted" and steps(tmp_path / "checkpoint") == [2]


def test_a_handler_that_ends_nothing_hears_every_signal():
    heard, before = [], signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with one_end():
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM] * 3

"""Ctrl-C waits for the end of what belongs together, SIGTERM is an end like it, and both are as usual afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from minitune.training.interrupt import Terminated, terminable, unbroken


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

"""unbroken: Ctrl-C waits for the end of what belongs together, and is as usual again afterwards."""

from __future__ import annotations

import signal
import threading

import pytest

from minitune.training.interrupt import unbroken


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

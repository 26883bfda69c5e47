"""minitune complete: the continuation alone, as it is written, and what the flags of sampling mean."""

import sys

import pytest

pytest.importorskip("tyro")
import minitune as mt
from minitune.commands.complete import Complete
from minitune.commands.flags.groups import Sampling


@pytest.mark.parametrize("sampling", [
    {}, {"temperature": 1.5, "seed": 3}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 4},
    {"temperature": 2.0, "stop": ("e", "a"), "seed": 5}], ids=str)
def test_what_is_printed_is_the_completion(capsys, tiny, sampling):
    draws = Sampling(**sampling)
    Complete(tiny, "The number", device="cpu", dtype="float32", max_new_tokens=20, sampling=draws).run()
    expected = mt.load(tiny, device="cpu", dtype="float32").complete("The number", 20, **sampling)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(("sampling", "words"), [({"temperature": float("nan")}, "temperature is nan"),
                                                 ({"top_p": 0.0}, "top_p is 0"), ({"stop": ("",)}, "stop is")])
def test_errors_print_nothing(capsys, tiny, sampling, words):
    with pytest.raises(mt.InputError, match=words):
        Complete(tiny, "x", device="cpu", sampling=Sampling(**sampling)).run()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_reach_a_pipe_but_no_terminal(capsys, monkeypatch, tiny, terminal):
    monkeypatch.setattr(mt.Model, "stream", lambda *_, **__: iter(["a\x1b[2J\n", "\tb"]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    Complete(tiny, "x", device="cpu").run()
    assert capsys.readouterr().out == ("a\\x1b[2J\n\tb\n" if terminal else "a\x1b[2J\n\tb\n")

"""inspect's report: trained tokens coloured in a terminal, marked elsewhere; a sample's text never acts on it."""

from __future__ import annotations

import io

import pytest

from minitune.data.document import Document
from minitune.data.glued import spread
from minitune.data.ledger import Epoch, Ledger, Note, Source
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.report import progress
from minitune.report.inspect import LONG, SHOWN, print_lengths, print_sample
from minitune.report.ledger import print_ledger
from minitune.report.terminal import visible
from tests.files import BASE


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BASE)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def document(tokenizer: Tokenizer, prompt: str, answer: str) -> Document:
    head, tail = tokenizer.encode(prompt), tokenizer.encode(answer, bos=False, eos=True, continues=True)
    return Document(head + tail, [0] * len(head) + [1] * len(tail), 2.5, "a.jsonl:3")


def test_trained_tokens_are_marked_in_a_pipe(tokenizer: Tokenizer) -> None:
    out = io.StringIO()
    print_sample(document(tokenizer, "What is it?\nSay:", " a tool"), tokenizer, out)
    head, first, second = out.getvalue().splitlines()
    assert head.startswith("a.jsonl:3: ") and head.endswith("trained, weight 2.5")
    assert first == "<s> What is it?" and second == "Say:« a tool</s>»"


def test_trained_tokens_are_coloured_in_a_terminal(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = document(tokenizer, "What is it?", " a [bold]tool[/]")
    out = Terminal()
    print_sample(sample, tokenizer, out)
    assert "\x1b[1;32m a [bold]tool[/]</s>\x1b[0m" in out.getvalue() and "«" not in out.getvalue()
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            out = Terminal()
            print_sample(sample, tokenizer, out)
            assert "« a [bold]tool[/]</s>»" in out.getvalue() and "\x1b" not in out.getvalue()


def test_text_cannot_act_on_the_terminal(tokenizer: Tokenizer) -> None:
    for out in (Terminal(), io.StringIO()):
        print_sample(document(tokenizer, "a\x1b[2Jb\rc\td", "x\x07"), tokenizer, out)
        assert "\\x1b[2Jb\\x0dc\\x09d" in out.getvalue() and "\x1b[2J" not in out.getvalue()
        assert "x\\x07" in out.getvalue()


def test_text_stays_as_it_is_but_for_what_acts() -> None:
    kept = "日本\u3000語 a\u00a0b 👩\u200d👧 \U0001f3f3\ufe0f \u200b é\n"
    assert visible(kept, keep="\n") == kept
    assert visible("a\u202eb\u2066\u200f\t\x9b\ue000\ud800\U0010fffd") == (
        "a\\u202eb\\u2066\\u200f\\x09\\x9b\\ue000\\ud800\\U0010fffd")


def test_a_long_sample_is_cut_and_says_so(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("word " * 2000)
    out = io.StringIO()
    print_sample(Document(ids, [1] * len(ids), where="a:1"), tokenizer, out)
    assert out.getvalue().endswith(f"… and {len(ids) - SHOWN:,} tokens more\n") and len(out.getvalue()) < 6000


def test_a_narrow_encoding_is_no_error(tokenizer: Tokenizer) -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_sample(document(tokenizer, "é", "日本"), tokenizer, out)
    out.flush()
    assert b"?" in raw.getvalue()


def test_histogram() -> None:
    out = io.StringIO()
    print_lengths([1, 2, 3, 4, 4, 70, 100], 80, out)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[0] == "Lengths in tokens: median 4, longest 100"
    assert [line.split()[:4] for line in lines[3:]] == [
        ["1", "1", "#" * 14], ["2", "1", "#" * 14], ["3", "-", "4", "3"], ["5", "-", "8", "0"], ["9", "-", "16", "0"],
        ["17", "-", "32", "0"], ["33", "-", "64", "0"], ["65", "-", "128", "2"]]
    assert lines[5].endswith(" " + "#" * 40) and lines[-1].endswith("# 1 too long for a row")
    out = io.StringIO()
    print_lengths([5, 300], 100, out)
    assert out.getvalue().rstrip().endswith("# too long for a row")
    print_lengths([5, 300], 100, out, what=LONG["split"])
    assert out.getvalue().rstrip().endswith("# split into rows")


def test_ledger_table() -> None:
    source = Source(path="a.jsonl", share=0.5, samples=1200, documents=1200, pieces=1200, tokens=5000, trained=3000,
                    masked=1500, truncated=0, dropped=500, reasons={"label is false": (3, 500)})
    other = Source(path="b.jsonl", samples=1, documents=1, pieces=1, tokens=10, trained=6, masked=4, truncated=0,
                   dropped=0)
    ledger = Ledger(sources=(source, other), notes=(Note("odd", 1, ("a.jsonl:7",)),),
                    epoch=Epoch(samples=601, batches=3, row=1000, trained=1506, masked=754, filler=740))
    ledger.check()
    out = io.StringIO()
    print_ledger(ledger, out)
    lines = out.getvalue().splitlines()
    assert lines[1].split() == ["file", "samples", "tokens", "trained", "masked", "truncated", "dropped"]
    assert lines[3].split() == ["a.jsonl", "×", "0.5", "1,200", "5,000", "3,000", "1,500", "0", "500"]
    assert lines[5].split()[:4] == ["all", "files", "1,201", "5,010"]
    assert lines[6] == "an epoch: 601 samples, 2,260 tokens + 740 filler (24.7%) = 3 batches of 1,000"
    assert lines[7] == "note: 1 sample: odd (a.jsonl:7)"


def test_progress_is_told_at_growing_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    tell = progress.reading(out)
    for second in range(100):
        clock[0] = 100.0 + second
        tell("a.jsonl", 1000 * second, 50_000 * second)
    lines = out.getvalue().splitlines()
    assert lines[0] == "reading a.jsonl: 2,000 samples, 100,000 tokens so far"
    assert [line.split()[2] for line in lines] == ["2,000", "6,000", "14,000", "30,000", "60,000", "90,000"]


def test_spread() -> None:
    assert spread(10, 3) == [0, 3, 6] and spread(2, 5) == [0, 1] and spread(5, 0) == []

"""What of a text reaches a terminal: what is read, and nothing that acts."""

from __future__ import annotations

import io
import sys
import unicodedata

from minitune.report.terminal import MARKS, SPOKEN, one_line, say, visible


def test_all_that_acts_is_written_out_and_all_else_stays():
    kept = "日本語 a b 👩\u200d👧 \U0001f3f3\ufe0f \u200b é"
    assert visible(kept) == one_line(f" {kept}\n") == kept
    assert visible("日本\u3000語 a\u00a0b") == "日本\u3000語 a\u00a0b" and one_line("a\u3000 b\u2028c") == "a b c"
    assert visible("\x1b[2J\x9b\x7f\t\n") == "\\x1b[2J\\x9b\\x7f\\x09\\x0a"
    assert visible("a\u202eb\u2066\ue000\ud800\U0010fffd") == "a\\u202eb\\u2066\\ue000\\ud800\\U0010fffd"


def test_an_answer_keeps_its_lines_and_the_marks_of_its_script():
    text = "a\n\tb" + MARKS
    assert visible(text, SPOKEN) == text and "\\u200f" in visible(text)
    assert visible("\u202e\r", SPOKEN) == "\\u202e\\x0d"


def test_no_control_character_passes():
    for number in range(sys.maxunicode + 1):
        if unicodedata.category(chr(number)) in ("Cc", "Cs") and chr(number) not in SPOKEN:
            assert visible(chr(number), SPOKEN).isascii() and visible(chr(number), SPOKEN).isprintable()


def test_a_narrow_encoding_is_no_error():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    say("é日", out)
    out.flush()
    assert raw.getvalue() == b"??\n"

"""minitune doctor: what is there, every op beside its reference, and one line for a wrong name or number."""

import pytest

from minitune.ops import swiglu

pytest.importorskip("tyro")
from minitune.cli import main
from tests.oracles import make


def test_doctor_says_what_is_there_and_that_all_is_right(capsys):
    main(["doctor", "--device", "cpu", "--tokens", "20"])
    printed = capsys.readouterr().out
    assert "WRONG" not in printed
    for word in ("native", "triton", "rms_norm", "attention", "dB", "right"):
        assert word in printed


def test_doctor_takes_a_folder_and_ends_with_1_if_an_op_is_wrong(tmp_path, monkeypatch, capsys):
    make("qwen3", tmp_path)
    right = swiglu.forward
    monkeypatch.setattr(swiglu, "forward", lambda gate_up, out=None: right(gate_up) * 1.1)
    with pytest.raises(SystemExit) as ended:
        main(["doctor", str(tmp_path), "--device", "cpu", "--tokens", "20"])
    assert ended.value.code == 1 and "WRONG" in capsys.readouterr().out


def test_a_wrong_name_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "lama-2-7b"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("minitune: doctor: there is no folder 'lama-2-7b', and no shape")
    assert "did you mean 'llama-2-7b'?" in said


def test_a_folder_that_is_missing_is_named(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "models/nowhere"])
    assert ended.value.code == 2
    assert "doctor: there is no folder 'models/nowhere', and no shape is named" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", ["0", "-5"])
def test_a_number_that_is_none_is_named(tokens, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--tokens", tokens])
    assert ended.value.code == 2 and f"tokens is {tokens}" in capsys.readouterr().err

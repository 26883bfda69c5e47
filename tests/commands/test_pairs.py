"""minitune train --objective dpo: a run from the command line, its words, and how it goes on."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.training.runner import Runner

ROWS = [{"prompt": f"Number {i} is", "chosen": f" {i * i}.", "rejected": f" {i + 7}!"} for i in range(24)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words(tiny, data, out, *more):
    return ["train", str(tiny), str(data), "--out", str(out), "--tokens", "64", "--epochs", "2", "--lr", "5e-3",
            "--rank", "4", "--max-new-tokens", "3", *more]


def test_a_run_and_its_adapter(tiny, data, tmp_path, capsys):
    out = tmp_path / "out"
    main(words(tiny, data, out, "--objective", "dpo", "--beta", "0.5", "--valid-split", "6"))
    said = capsys.readouterr()
    assert "before training: validation loss 0.6931, chosen answer ahead in 50.0% of the pairs" in said.err
    assert "chosen answer ahead in 100.0% of the pairs" in said.err and "loss 0." in said.out
    settings = (out / "train.toml").read_text()
    assert 'objective = "dpo"' in settings and "beta = 0.5" in settings
    main(["complete", str(tiny), "Number 3 is", "--adapter", str(out / "adapter"), "--max-new-tokens", "3"])
    capsys.readouterr()
    measured = ["evaluate", str(tiny), str(data), "--objective", "dpo", "--tokens", "64"]
    main([*measured, "--adapter", str(out / "adapter")])
    said = " ".join(capsys.readouterr().out.split())
    for wanted in ("trained tokens of 24 samples", "chosen answer ahead 100.00%", "loss (a pair, beta 0.1) 0."):
        assert wanted in said
    main([*measured, "--adapter", str(out / "adapter"), "--beta", "1e-6"])
    assert "loss (a pair, beta 1e-06) 0.6931" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit) as ended:
        main(measured)
    assert ended.value.code == 2 and "compares an adapter with the base; name it" in capsys.readouterr().err
    given = [word for word in words(tiny, data, tmp_path / "next", "--objective", "dpo") if word not in ("--rank", "4")]
    with pytest.raises(SystemExit) as ended:
        main([*given, "--adapter", str(out / "adapter")])
    assert ended.value.code == 2 and "merge it into the base first" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()


def test_a_validation_file_is_of_pairs_and_a_run_goes_on(tiny, data, tmp_path, capsys, monkeypatch):
    held, out = tmp_path / "held.jsonl", tmp_path / "out"
    held.write_text(json.dumps({"prompt": "Number 99 is", "chosen": " 9801.", "rejected": " 106!"}) + "\n")
    given = words(tiny, data, out, "--objective", "dpo", "--valid", str(held), "--save-every", "2")
    launch, steps = Runner._launch, iter(range(5))

    def dies(self, *rest):
        if next(steps, None) is None:
            raise OSError("gone")
        launch(self, *rest)

    with monkeypatch.context() as ending, pytest.raises(SystemExit):
        ending.setattr(Runner, "_launch", dies)
        main(given)
    assert any((out / "checkpoint").iterdir())
    capsys.readouterr()
    main(["train", "--resume", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seen = [line for line in lines if "valid_loss" in line]
    assert seen[0]["valid_chosen"] == 0.0 and seen[0]["valid_accuracy"] == 0.5 and seen[-1]["valid_tokens"] > 0
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, seen[-1]["step"] + 1))
    main(["inspect", str(tiny), str(data), "--objective", "dpo", "--n", "0", "--tokens", "64", "--valid", str(held)])
    assert "Held out" in capsys.readouterr().out


def test_both_answers_are_shown(tiny, data, capsys):
    main(["inspect", str(tiny), str(data), "--objective", "dpo", "--n", "1", "--tokens", "64"])
    said = capsys.readouterr().out
    assert "Number 0 is« 0.</s>»\n--- rejected:\n<s> Number 0 is« 7!</s>»" in said
    main(["inspect", str(tiny), str(data), "--objective", "dpo", "--n", "0", "--tokens", "20"])
    assert "say --long drop, since a pair is trained whole" in capsys.readouterr().out
    main(["inspect", str(tiny), str(data), "--objective", "dpo", "--n", "0", "--tokens", "21", "--long", "drop"])
    assert "longer than 21 tokens (" in (out := capsys.readouterr().out) and "too long for a row: dropped" in out


def test_a_dry_run_and_bad_words(tiny, data, tmp_path, capsys):
    main(words(tiny, data, tmp_path / "out", "--objective", "dpo", "--dry-run"))
    assert "0.6931" in capsys.readouterr().out and not (tmp_path / "out").exists()
    for more, wanted in ((["--beta", "0.5"], "which only the objective dpo has"),
                         (["--beta", "0.1"], "beta is given, which only the objective dpo has"),
                         (["--objective", "dop"], "dpo"),
                         (["--objective", "dpo", "--train", "full"], "the base itself is trained")):
        given = words(tiny, data, tmp_path / "out", *more)
        if "--train" in more:
            at = given.index("--rank")
            del given[at:at + 2]
        with pytest.raises(SystemExit) as ended:
            main(given)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and wanted in said and not (tmp_path / "out").exists(), said

"""minitune init: the checkpoint that its seed makes, with the demo's tokenizer, in a folder of its own."""

import shutil

import pytest

pytest.importorskip("tyro")
from minitune.cli import main
from tests.files import BASE


def test_the_seed_makes_the_checkpoint(tiny, tmp_path, capsys):
    for seed in ("1", "2"):
        main(["init", "tiny", str(tmp_path / seed), "--seed", seed])
        assert capsys.readouterr().out == f"random weights of shape tiny in {tmp_path / seed}\n"
    files = sorted(path.name for path in tiny.iterdir())
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == files
    for name in files:
        first, second = ((tmp_path / seed / name).read_bytes() for seed in ("1", "2"))
        assert first == (tiny / name).read_bytes() and (first != second) == name.endswith(".safetensors")


def test_the_tokenizer_may_be_that_of_another_folder(tiny, tmp_path):
    words = tmp_path / "words"
    words.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(BASE / name, words)
    (words / "chat_template.jinja").write_text("{{ messages }}")
    main(["init", "tiny", str(tmp_path / "new"), "--tokenizer", str(words)])
    assert (tmp_path / "new" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tiny / "chat_template.jinja").exists()


def test_a_folder_in_use_is_left_as_it_is(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as ended:
        main(["init", "tiny", str(tmp_path)])
    assert ended.value.code == 2 and "exists already; name another folder" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("notes.txt", "mine")]

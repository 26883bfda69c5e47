"""read_corpus: the search for garbage rests meanwhile, and need not run; the order and the first fault are the file's,
whichever thread is done first; a sample without any token is named."""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitune.data.encode import encode
from minitune.data.read import read_corpus
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"text": "one two </s> three"}, {"prompt": "a", "completion": " b", "weight": 2.5},
    {"messages": [{"role": "user", "content": "Hello <s>"}, {"role": "assistant", "content": "Hi"}]},
    {"prompt": "q", "chosen": "good", "rejected": "a bad answer"}, {"prompt": "q", "completion": "no", "label": False},
]


@pytest.fixture(scope="module")
def tokenizer(small_spm: Path) -> Tokenizer:
    return load_tokenizer(small_spm)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS * 20)), encoding="utf-8")
    return path


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was(enabled: bool, path: Path, tokenizer: Tokenizer) -> None:
    during: list[bool] = []
    switch = sys.getswitchinterval()
    try:
        (gc.enable if enabled else gc.disable)()
        read_corpus(path, tokenizer, progress=lambda *_: during.append(gc.isenabled()))
        after = [gc.isenabled()]
        path.write_text('{"text": "a"}\n{"text": 3}', encoding="utf-8")
        with pytest.raises(InputError, match=r"a\.jsonl:2: text is 3"):
            read_corpus(path, tokenizer)
        after.append(gc.isenabled())
    finally:
        gc.enable()
    assert during and not any(during) and after == [enabled] * 2
    assert sys.getswitchinterval() == switch


def test_threads_keep_the_order_of_the_file(path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = read_corpus(path, tokenizer)
    monkeypatch.setattr("minitune.data.encode.CHUNK_SAMPLES", 3)
    late = [0.02, 0.0]

    def slowly(samples: list[Any], tokenizer: Tokenizer) -> list[Any]:
        time.sleep(late[int(samples[0].where.rpartition(":")[2]) // 3 % 2])      # every other chunk is overtaken
        return encode(samples, tokenizer)

    monkeypatch.setattr("minitune.data.read.encode", slowly)
    threaded = read_corpus(path, tokenizer)
    assert all(torch.equal(getattr(alone, name), getattr(threaded, name)) for name in ("ids", "trained", "numbers"))
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[3:6] = ['{"text": "a", "wieght": 2}'] * 3
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl:4: "):
        read_corpus(path, tokenizer)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_first_fault_is_the_first_in_the_file(tmp_path: Path, byte_level: Callable[..., Path], size: int,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that the tokenizer finds and one that the reader finds, in either order."""
    monkeypatch.setattr("minitune.data.encode.CHUNK_SAMPLES", size)
    tokenizer = load_tokenizer(byte_level())
    lines = ['{"text": "a"}'] * 9
    empty, unknown = '{"prompt": "a", "completion": "b", "tools": [1]}', '{"text": "a", "wieght": 2}'
    for first, second in ((empty, unknown), (unknown, empty)):
        (tmp_path / "b.jsonl").write_text("\n".join([*lines[:2], first, *lines[:3], second, *lines]), encoding="utf-8")
        with pytest.raises(InputError, match=r"b\.jsonl:3: "):
            read_corpus(tmp_path / "b.jsonl", tokenizer)


def test_files_read_side_by_side_leave_the_interpreter_as_it_was(path: Path, tokenizer: Tokenizer) -> None:
    before, entered, leave = (gc.isenabled(), sys.getswitchinterval()), threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        entered.set()
        leave.wait(10)

    other = threading.Thread(target=read_corpus, args=(path, tokenizer), kwargs={"progress": wait})
    other.start()
    entered.wait(10)
    read_corpus(path, tokenizer)
    assert not gc.isenabled()
    leave.set()
    other.join()
    assert before == (gc.isenabled(), sys.getswitchinterval())


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_samples_leave_no_cyclic_garbage(path: Path, small_spm: Path, tmp_path: Path, template: str,
                                         write_folder: Callable[..., Path]) -> None:
    config = json.loads((small_spm / "tokenizer_config.json").read_text(encoding="utf-8"))
    if template == "chatml":
        config["chat_template"] = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    folder = write_folder(tmp_path / "tokenizer", tokenizer_config=config)
    (folder / "tokenizer.model").write_bytes((small_spm / "tokenizer.model").read_bytes())
    tokenizer = load_tokenizer(folder)
    read_corpus(path, tokenizer)        # what is made once may have cycles
    gc.collect()
    gc.disable()
    try:
        assert len(read_corpus(path, tokenizer)) == 80 and gc.collect() == 0
    finally:
        gc.enable()


def test_a_sample_that_the_tokenizer_reads_nothing_of(tmp_path: Path, byte_level: Callable[..., Path]) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    folder = byte_level()
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.normalizer = tokenizers.normalizers.Strip()
    made.save(str(folder / "tokenizer.json"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"inputs": [{"value": " ", "trainable": false}]}', encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl:2: the tokenizer makes no token of it; write"):
        read_corpus(path, load_tokenizer(folder))

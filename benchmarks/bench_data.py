"""Tokens/s from a JSONL file to packed batches, beside transformers' tokenizer on the same texts; raw JSON out.

``python -m benchmarks.bench_data``, a few minutes on a quiet machine, on all its cores. One file of prose, about a
million tokens, once as long samples and once as short ones; a sentencepiece model (mistral-common's, 32,000 pieces) and
a byte-level BPE of tokenizer.json (8,000, trained here on the same file). Sides, in turns within one run:

- ``minitune``: `mt.data.stream` without its cache, and all batches of an epoch, of 2,048 tokens each;
- ``cached``: the same out of the cache;
- ``transformers``: reads the lines and calls its tokenizer on 1,000 texts at a time. It packs nothing.

Each file is measured with each tokenizer in a process of its own, as a user's is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import minitune as mt
from benchmarks.harness import ROOT, VOID_SHARE, machine, other_share, read_ticks, save, summary
from minitune.data.rows import read_rows
from minitune.data.tokenizer import load_tokenizer

TOKENS = 2048
REPEATS = 5
CHARACTERS = 4_000_000
"""About a million tokens."""
SAMPLES = {"long": 2000, "short": 200}
"""Characters of a sample."""


def main() -> None:
    before = read_ticks(os.getpid())
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MINITUNE_CACHE"] = str(folder / "cache")
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        files = {kind: _write(folder / f"{kind}.jsonl", size) for kind, size in SAMPLES.items()}
        for kind, path in files.items():
            for tokenizer, place in (("sentencepiece", _sentencepiece(folder)), ("tokenizers", _fast(folder, path))):
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    rows += process.submit(_measure, kind, tokenizer, path, place).result()
    others = other_share(before, read_ticks(os.getpid()))
    path = save("data", {"kind": "data", "machine": machine(), "row": TOKENS, "others_share": others,
                         "void": others > VOID_SHARE, "rows": rows})
    print(f"raw figures: {path.name}" + (f"; VOID, others took {others:.0%}" if others > VOID_SHARE else ""))


def _measure(kind: str, tokenizer: str, path: Path, place: Path) -> list[dict[str, object]]:
    ours = load_tokenizer(place)
    n_tokens = mt.data.stream(path, ours, tokens=TOKENS, cache=True).n_tokens

    def read(cache: bool) -> None:
        for _ in mt.data.stream(path, ours, tokens=TOKENS, cache=cache):
            pass

    sides: dict[str, Callable[[], object]] = {"minitune": lambda: read(False), "cached": lambda: read(True)}
    theirs = _transformers(place)
    if theirs is not None:
        sides["transformers"] = lambda: theirs(path)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(REPEATS):
        for side, call in sides.items():
            start = time.perf_counter()
            call()
            seconds[side].append(time.perf_counter() - start)
    found: list[dict[str, object]] = []
    for side, each in seconds.items():
        rate = n_tokens / summary(each)["median"]
        found.append({"samples": kind, "tokenizer": tokenizer, "side": side, "n_tokens": n_tokens,
                      "seconds": summary(each), "tokens_per_second": rate})
        print(f"{kind} samples, {tokenizer}, {side}: {rate:,.0f} tokens/s", flush=True)
    return found


def _write(path: Path, size: int) -> Path:
    """The replay set's prose, again and again, in samples of about `size` characters, no two of them alike."""
    prose = " ".join(row["text"] for _, row in read_rows(ROOT / "examples" / "replay.jsonl"))
    with path.open("w", encoding="utf-8") as file:
        for number, start in enumerate(range(0, CHARACTERS, size)):
            at = start % (len(prose) - size)
            file.write(json.dumps({"text": f"{number}. {prose[at:at + size]}"}) + "\n")
    return path


def _sentencepiece(folder: Path) -> Path:
    place = folder / "sentencepiece"
    place.mkdir(exist_ok=True)
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None and spec.submodule_search_locations, "pip install mistral-common"
    source = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    shutil.copyfile(source, place / "tokenizer.model")
    return place


def _fast(folder: Path, path: Path) -> Path:
    import tokenizers

    place = folder / "tokenizers"
    if not place.exists():
        place.mkdir()
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.train_from_iterator((row["text"] for _, row in read_rows(path)), tokenizers.trainers.BpeTrainer(
            vocab_size=8000, special_tokens=["<s>", "</s>"], show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
        made.save(str(place / "tokenizer.json"))
        (place / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return place


def _transformers(place: Path) -> Callable[[Path], object] | None:
    """A call that reads a file and tokenises it; None where transformers cannot read this tokenizer."""
    import transformers

    if not (place / "tokenizer.json").exists():
        return None
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(place / "tokenizer.json"))

    def read(path: Path) -> list[list[int]]:
        with path.open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        return [ids for start in range(0, len(texts), 1000)
                for ids in tokenizer(texts[start:start + 1000], return_attention_mask=False)["input_ids"]]

    return read


if __name__ == "__main__":
    main()

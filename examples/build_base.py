"""Builds what the demo ships: base/ (model, tokenizer, SOURCE.md), heldout.jsonl and replay.jsonl; say `make base`.

Everything follows from the text that the installed Python and torch carry and from one seed. About 12 minutes on
2 cores.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import shutil
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

import corpus
import sentencepiece
import torch

import minitune as mt
from minitune.model.init import init_weights
from minitune.model.llama import Llama
from minitune.report.progress import ProgressLines

HERE = Path(__file__).parent
CONFIG = mt.ModelConfig(vocab_size=4096, d_model=192, n_layers=6, n_heads=6, n_kv_heads=2, head_dim=32, d_ff=512,
                        max_positions=1024, tied_head=True, bos_id=1, eos_ids=(2,))
TRAINING = mt.Training(tokens=2048, epochs=2, lr=3e-3, warmup=0.02, min_lr_ratio=0.1, weight_decay=0.05, log_every=20)
REPLAYED = 5000
"""So many short training texts go into replay.jsonl, for the demo to mix with its facts."""
REPLAY_CHARS = range(60, 700)


def train_tokenizer(texts: Iterable[str]) -> bytes:
    """A sentencepiece model of the Llama kind: BPE, byte fallback, digits one by one, unk/bos/eos = 0/1/2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.split("\n") if line.strip()), model_writer=model,
        model_type="bpe", vocab_size=CONFIG.vocab_size, byte_fallback=True, split_digits=True, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, max_sentence_length=1 << 16, num_threads=1, minloglevel=2)
    return model.getvalue()


def train_base(work: Path, out: Path, texts: list[str], seed: int) -> mt.Run:
    """Random weights in `work`, beside the tokenizer; trained in full on `texts`; saved in `out`."""
    data = work / "train.jsonl"
    write_texts(data, texts)
    network = Llama(CONFIG, dtype=torch.float32)
    init_weights(network, seed)
    mt.Model(network, None).save(work)
    model = mt.load(work, train="full")
    run = mt.train(model, data, training=TRAINING, observers=[ProgressLines(sys.stderr)])
    model.save(out)
    return run


def write_texts(path: Path, texts: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def replay(texts: list[str], held: list[str]) -> list[str]:
    """REPLAYED short training texts, those with the smallest hashes, without any that shares a line with `held`."""
    lines = {line.strip() for text in held for line in text.split("\n") if line.strip()}
    short = [text for text in texts if len(text) in REPLAY_CHARS
             and lines.isdisjoint(line.strip() for line in text.split("\n"))]
    return sorted(short, key=lambda text: hashlib.sha256(text.encode()).digest())[:REPLAYED]


def held_out_loss(model: mt.Model, path: Path) -> float:
    with torch.no_grad():
        sums = [model.loss_sum(batch) for batch in mt.data.stream(path, model.tokenizer, tokens=2048, shuffle=False)]
    return float(sum(total.item() for total, _ in sums) / sum(n for _, n in sums))


def licences() -> str:
    """The licence texts of both sources, as they are installed with them."""
    python = next((path for folder in (sysconfig.get_paths()["stdlib"], ".") if
                   (path := Path(folder) / "LICENSE.txt").is_file()), None)
    if python is None:
        raise SystemExit("this Python carries no LICENSE.txt in its library folder; take one from python.org or pyenv")
    files = distribution("torch").files or []
    torch_path = next(file for file in files if file.parts[-2:] == ("licenses", "LICENSE"))
    return (f"## The licence of Python\n\n```\n{python.read_text('utf-8').strip()}\n```\n\n"
            f"## The licence of PyTorch\n\n```\n{torch_path.read_text('utf-8').strip()}\n```\n")


def source_note(texts: list[str], held: list[str], n_tokens: int, run: mt.Run, held_loss: float) -> str:
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    return f"""# Where this model comes from

A Llama-shaped model of {run.info.n_parameters:,} parameters with a tokenizer of {CONFIG.vocab_size} pieces, both made
by `examples/build_base.py` (`make base`) from documentation alone:

- the language reference (`pydoc_data.topics`) and the docstrings of the standard library and of the built-in modules
  of Python {platform.python_version()}: PSF License Version 2; files that name another copyright holder are left out;
- the docstrings of PyTorch {torch.__version__.split("+")[0]}: BSD 3-Clause.

What was changed: reStructuredText markup was removed, tables and printed numbers were left out, equal texts were kept
once, long ones cut between paragraphs, and the first paragraph of a docstring was also written as the answer to
"What is …?" or "What does … do?". `../heldout.jsonl` and `../replay.jsonl` are extracts of the same text under the same
licences; the first was never trained on.

| | |
| --- | --- |
| training text | {len(texts):,} texts, {sum(map(len, texts)):,} characters, {n_tokens:,} tokens |
| its SHA-256 | `{digest}` |
| held-out text | {len(held)} texts, {sum(map(len, held)):,} characters |
| training | {len(run.records):,} steps of {TRAINING.tokens} tokens, {run.seconds / 60:.1f} minutes |
| loss on the held-out text | {held_loss:.3f} nats a token |

{licences()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder that gets base/, heldout.jsonl, replay.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    licences()      # missing ones shall be found before the training, not after it
    started = time.perf_counter()
    texts, held = corpus.split(corpus.documents())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "tokenizer.model").write_bytes(train_tokenizer(texts))
        tokenizer = mt.data.load_tokenizer(work)
        n_tokens = sum(map(len, tokenizer.encode_many(texts, eos=True)))
        print(f"{len(texts):,} texts, {n_tokens:,} tokens, {len(held)} texts held out; "
              f"{time.perf_counter() - started:.0f} s", flush=True)
        base = options.out / "base"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        write_texts(options.out / "heldout.jsonl", held)
        write_texts(options.out / "replay.jsonl", replay(texts, held))
        run = train_base(work, base, texts, options.seed)
    held_loss = held_out_loss(mt.load(base), options.out / "heldout.jsonl")
    (base / "SOURCE.md").write_text(source_note(texts, held, n_tokens, run, held_loss), encoding="utf-8")
    size = sum(path.stat().st_size for path in base.iterdir())
    print(f"{base}: {size:,} bytes, held-out loss {held_loss:.3f}; {time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()

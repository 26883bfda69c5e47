"""Tokenizer folders for the data tests: a real Llama-style one, small trained ones, each as a checkpoint has it."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitune.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.chat_templates import KINDS

TEXT = """The quick brown fox jumps over the lazy dog. Why did it jump? Because the dog was asleep, and foxes jump.
def add(a, b):
    return a + b  # the sum of a and b

for line in file:
    if line.strip():
        print(line)
<|a|> <|b|> <|c|> <|d|> <|e|>
### User:
What is minitune? It fine-tunes language models on one GPU. 12 + 34 = 46, 3.14159, 2026-01-02. </s> <s> <|im_end|>
""".splitlines()

HARD = [
    "", " ", "  ", "\n", "\n\n", "\t\tx", "Hello", " Hello", "   Hello", "Hello ", "a\u00a0b",
    "def f(x):\n    if x:\n        return '  '\n\n", "\r\nwindows\r\n", "naïve café e\u0301 o\u0308\u0323",
    "שלום עולם, مرحبا بالعالم \u202babc\u202c", "👩‍👩‍👧‍👦🏳️‍🌈 \U0001f600",
    "日本語テキスト、中文。", "a\x00b\x07", "▁already▁",
    "</s>", "<s>x</s>", " </s> ", "<unk>", "<0x0A>", "<|im_start|>user\n", "<|im_end|>", "a<|end|><|pad|>",
    "[INST] hi [/INST]", "x" * 3000, "\ufeffbom",
    "\u200b\u200d", "1234567890 + 0.5e-3", "ﬁ ½ Å", "\ue000\U0010fffd",
]
"""Strings on which tokenizers are known to go wrong."""


@pytest.fixture(scope="session")
def hard() -> list[str]:
    return HARD


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return TEXT


@pytest.fixture(scope="session", name="write_folder")
def _write_folder() -> Callable[..., Path]:
    return write_folder


@pytest.fixture(scope="session", name="train_sentencepiece")
def _train_sentencepiece() -> Callable[..., None]:
    return train_sentencepiece


def write_folder(folder: Path, **files: Any) -> Path:
    """A folder with JSON files; the keyword tokenizer_config gives tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def mistral() -> Path | None:
    """The real sentencepiece model that mistral-common carries."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    return path if path.is_file() else None


def train_sentencepiece(path: Path, **options: Any) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    settings = {"vocab_size": 400, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity",
                "remove_extra_whitespaces": False, "split_digits": True, "minloglevel": 2, "num_threads": 1}
    with path.open("wb") as file:
        trainer.train(sentence_iterator=iter(TEXT * 5), model_writer=file, **(settings | options))


@pytest.fixture(scope="session")
def small_spm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-style folder around a sentencepiece model of 400 pieces."""
    folder = write_folder(tmp_path_factory.mktemp("spm"), tokenizer_config={
        "bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "add_bos_token": True})
    train_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session", params=["mistral", "small"])
def llama(request: pytest.FixtureRequest, small_spm: Path, mistral: Path | None,
          tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real 32,000-piece model of mistral-common, and the small one."""
    if request.param == "small":
        return small_spm
    if mistral is None:
        pytest.skip("mistral-common is not installed")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(mistral, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a byte-level BPE tokenizer.json: Qwen-like, or with ``bos`` like Llama 3."""
    tokenizers = pytest.importorskip("tokenizers")
    fast = tokenizers.Tokenizer(tokenizers.models.BPE())
    fast.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>", "<|pad|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    fast.train_from_iterator(TEXT, trainer)
    fast.add_tokens([tokenizers.AddedToken("<think>", special=False, normalized=False)])
    bare = fast.to_str()

    def make(bos: bool = False, **files: Any) -> Path:
        folder = tmp_path_factory.mktemp("bpe")
        made = tokenizers.Tokenizer.from_str(bare)
        if bos:
            made.post_processor = tokenizers.processors.TemplateProcessing(
                single="<|begin|> $A", pair="<|begin|> $A <|begin|> $B", special_tokens=[("<|begin|>", 0)])
        made.enable_truncation(8)
        made.enable_padding(length=16)
        made.save(str(folder / "tokenizer.json"))
        config = {"bos_token": "<|begin|>" if bos else None, "eos_token": "<|end|>", "pad_token": "<|pad|>"}
        return write_folder(folder, **({"tokenizer_config": config} | files))

    return make


@pytest.fixture(scope="session")
def qwen_with(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A byte-level tokenizer with Qwen3's control tokens and the given template."""
    tk = pytest.importorskip("tokenizers")
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tk.decoders.ByteLevel()
    kind = KINDS["qwen-3"]
    made.train_from_iterator(["the dog said yes"], tk.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *kind.control], show_progress=False,
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet()))
    made.add_tokens([tk.AddedToken(token, special=False, normalized=False) for token in kind.added])

    def load(source: str) -> Tokenizer:
        folder = tmp_path_factory.mktemp("qwen")
        made.save(str(folder / "tokenizer.json"))
        write_folder(folder, tokenizer_config={"bos_token": None, "eos_token": "<|im_end|>", "chat_template": source})
        return load_tokenizer(folder)

    return load

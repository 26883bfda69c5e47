"""The command minitune inspect."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from tyro.conf import Positional

from minitune.config import Data, check_whole
from minitune.data.holdout import hold_out
from minitune.data.ledger import PLACES, Note
from minitune.data.stream import Stream, read_parts
from minitune.data.tokenizer import load_tokenizer
from minitune.report.inspect import print_ledger, print_lengths, print_samples, reading, spread


@dataclass(frozen=True)
class Inspect:
    """Show what training would see of your data: where each token goes, the samples' lengths, what is trained."""

    base: Positional[Path]
    """Folder of the model that is to be trained: its tokenizer and chat template are used, its weights are not."""
    data: Positional[Path]
    """Samples, as train reads them: JSONL, JSON, text or Parquet; --mix adds more files."""
    add_tokens: tuple[str, ...] = ()
    """New tokens that train is to be given, each one id of the tokenizer then."""
    n: int = 3
    """How many samples are shown, from the first on, evenly spread."""
    tokens: int = 2048
    """T, the length of one packed micro-batch."""
    samples: Data = field(default_factory=Data)

    def run(self) -> None:
        check_whole("inspect", "n", self.n, low=0)
        check_whole("inspect", "tokens", self.tokens, low=2)
        tokenizer, settings = load_tokenizer(self.base, self.add_tokens), self.samples
        parts = read_parts(settings.shares(self.data), tokenizer, settings.fields(), settings.cached, reading())
        lengths = [(length, part.corpus, index) for part in parts
                   for index, length in enumerate(part.corpus.bounds.diff().tolist())]
        longest = max(length for length, _, _ in lengths)
        row = max(self.tokens, longest) if settings.long == "refuse" else self.tokens
        train, valid = hold_out(Stream(parts, row, long=settings.long), tokenizer, settings)
        ledger = train.ledger
        if row > self.tokens:
            places = [corpus.where(index) for length, corpus, index in lengths if length > self.tokens]
            note = Note(f"longer than {self.tokens:,} tokens, so training refuses them: raise --tokens to {longest:,}, "
                        "or say --long split or truncate", len(places), tuple(places[:PLACES]))
            ledger = replace(ledger, notes=(note, *ledger.notes))
        print_ledger(ledger)
        if valid is not None:
            print()
            print_ledger(valid.ledger, title="Held out")
        print()
        print_lengths([length for length, _, _ in lengths], self.tokens)
        chosen = [lengths[place] for place in spread(len(lengths), self.n)]
        print_samples((corpus.document(index, int(corpus.bounds[index]), int(corpus.bounds[index + 1]))
                       for _, corpus, index in chosen), tokenizer)

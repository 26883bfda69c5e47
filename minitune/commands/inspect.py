"""The command minitune inspect."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from minitune.arguments import check_seed, check_whole
from minitune.config import Data, ObjectiveName, Training


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
    objective: ObjectiveName = "sft"
    """As train's: dpo reads both answers of each preference, chosen and rejected."""
    seed: int = 0
    """Random seed, as train's: it draws what --valid-split holds out."""
    samples: Data = field(default_factory=Data)

    def run(self) -> None:
        check_whole("inspect", "n", self.n, low=0)
        check_whole("inspect", "tokens", self.tokens, low=2)
        check_seed("inspect", self.seed)
        from minitune.data.glued import with_glued
        from minitune.data.holdout import hold_out, read_valid
        from minitune.data.stream import Stream, read_parts
        from minitune.data.tokenizer import load_tokenizer
        from minitune.objectives import named, takes_pairs
        from minitune.report.folder import check_no_run
        from minitune.report.inspect import LONG, packed, print_lengths, print_samples, refused
        from minitune.report.ledger import print_ledger
        from minitune.report.progress import reading

        check_no_run(self.base)
        tokenizer, settings = load_tokenizer(self.base, self.add_tokens), self.samples
        tokenizer.chat_template_kwargs = settings.template_kwargs() or {}
        pairs = takes_pairs(named(Training(objective=self.objective)))
        parts = read_parts(settings.shares(self.data), tokenizer, settings.fields(), settings.cached, reading(), pairs)
        held = read_valid(settings, tokenizer, reading(), pairs)
        longest = max(max(part.corpus.bounds.diff().tolist(), default=0) for part in [*parts, *(held or ())])
        refuses = settings.long == "refuse"
        row = max(self.tokens, longest) if refuses else self.tokens
        train, valid = hold_out(Stream(parts, row, seed=self.seed, long=settings.long), settings, held)
        for title, stream in (("Where the tokens go", train), ("Held out", valid)):
            if stream is not None:
                ledger = refused(stream, self.tokens) if refuses else stream.ledger
                print_ledger(with_glued(stream, ledger, tokenizer), title=title)
                print()
        lengths = [length for part in parts for length in part.corpus.bounds.diff().tolist()]
        print_lengths(lengths, self.tokens, what=LONG[settings.long])
        print_samples(packed(train, self.n), tokenizer)

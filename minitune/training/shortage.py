"""Shortage: what a run does where memory runs out in a step: it keeps less for the backward, then it splits rows."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterable, Sequence

import torch

from minitune.data.batch import Batch
from minitune.model.llama import Llama
from minitune.training.needs import LESS


class Shortage:
    """How much of a step is computed at a time: whole rows, until memory runs out.

    ``network``: the model's, whose memory policy may be chosen; None: it has none. ``divisible``: whether the objective
    of a row is the sum of those of its documents, so that they may come one after the other.
    """

    def __init__(self, network: Llama | None, divisible: bool) -> None:
        self.network, self.divisible = network, divisible
        self.tokens: int | None = None

    def micro_batches(self, rows: Iterable[Batch], device: torch.device) -> list[Batch]:
        """The rows as they are computed, on the device: whole, or documents of at most `tokens` tokens at a time."""
        found = []
        for row in rows:
            whole = row.trimmed() if device.type == "cpu" and row.n_filler else row
            parts = [whole] if self.tokens is None or whole.n_tokens <= self.tokens else whole.split(self.tokens)
            found += [part.on(device) for part in parts]
        return found

    def met(self, batches: Sequence[Batch]) -> str | None:
        """Memory ran out with these: take less from now on -> what to tell of it; None where nothing is left to do."""
        longest = max(batches, key=lambda batch: batch.n_tokens)
        policy = None if self.network is None else self.network.save_memory(longest.n_tokens)
        if policy is not None:
            return (f"memory ran out with rows of {longest.n_tokens:,} tokens; the memory policy is {policy} from here "
                    "on, which takes longer and changes no result")
        if not self.divisible or len(longest.documents.lengths) == 1:
            return None
        self.tokens = longest.n_tokens // 2
        changed = "no more than rounding"
        if self.network is not None and any(each.dropout for each in self.network.adapters().values()):
            changed = "rounding, and what dropout draws"
        return (f"memory ran out with rows of {longest.n_tokens:,} tokens; from here on their documents are computed "
                f"{self.tokens:,} tokens at a time, in the same steps, which changes {changed}")

    def least(self, batches: Sequence[Batch]) -> str:
        """What cannot be made less, and what to do."""
        longest = max(batches, key=lambda batch: batch.n_tokens)
        alone = len(longest.documents.lengths) == 1
        policy = "" if self.network is None else f" and the memory policy {self.network.policy_of(longest.n_tokens)}"
        return (f"a {'document' if alone else 'row'} of {longest.n_tokens:,} tokens{policy}: "
                f"{LESS}{' (long split makes several documents of a long one)' if alone else ''}; a dry run tells how "
                "much of what a step takes")


def free_what_hangs_on(error: BaseException, device: torch.device, handled: BaseException | None = None) -> None:
    """Let go of the tensors in the frames that an error came through, and those that it came from. An exception that
    was `handled` when the work began, by who asked for it, keeps its own."""
    spared = _came_from(handled, [])
    for each in _came_from(error, spared):
        traceback.clear_frames(each.__traceback__)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _came_from(error: BaseException | None, spared: Sequence[BaseException]) -> list[BaseException]:
    """The error and all behind it, but for those `spared`."""
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in (*found, *spared):
            found.append(each)
            waiting += [each.__context__, each.__cause__]
    return found

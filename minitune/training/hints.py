"""What a user is told of a run that will hardly do what is wanted: too few steps, rows mostly empty, a loss that rises.

None of it is an error, for each may be meant; but none of it shows in a number that a newcomer looks at.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import torch

from minitune.config import Training
from minitune.training.needs import LESS, gigabytes, longest_row, needs_of
from minitune.training.schedule import warmup_steps

FEW_STEPS = 10
"""With fewer optimizer steps a learning rate hardly gets to work, whatever the data."""
STUCK, SAMPLE = 0.9, 65_536
"""Share of the trained weights that cannot move from which it is said; values looked at of each weight, about."""
WINDOW = 20
"""Steps whose median loss is looked at."""
EARLY = 5
"""As many are enough in a run that has not had WINDOW yet."""
NO_GRADIENT = ("step 1: the gradient is exactly 0, so nothing is learned: the objective does not depend on what is "
               "trained, or the weights of all its tokens are 0")
"""Of an objective with a graph that leads elsewhere, which autograd takes without a word."""


@runtime_checkable
class Filled(Protocol):
    """Data that knows how full its rows are, as `mt.data.stream` gives it."""

    tokens: int
    n_tokens: int
    n_filler: int


def hints(batches: Iterable[Any], training: Training, total_steps: int, device: torch.device,
          network: Any = None) -> list[str]:
    """A line for each thing to know before the first step; empty where all is well. ``network``: a `Llama`, whose
    trained base weights are looked at.

    The number of steps is not questioned where ``max_steps`` says it, nor filler on a CPU, which leaves most of it out.
    """
    found = []
    if training.max_steps is not None and training.epochs > 1:
        found.append(f"max_steps {training.max_steps:,} alone decides how long the run is; epochs {training.epochs} is "
                     "not looked at")
    if total_steps < FEW_STEPS and training.max_steps is None:
        ways = [*(["fewer micro_batches"] if training.micro_batches > 1 else []), "fewer tokens a row", "more epochs"]
        found.append(f"only {total_steps} optimizer step{'' if total_steps == 1 else 's'}, in which hardly anything is "
                     f"learned; {' or '.join(ways)} make{'' if len(ways) > 1 else 's'} more (tokens is "
                     f"{training.tokens:,}, epochs {training.epochs})")
    if training.warmup is not None and training.warmup >= max(1, total_steps) and total_steps > 1:
        found.append(f"warmup is {training.warmup:g} steps, and the run has {total_steps}; the rate reaches lr in step "
                     f"{warmup_steps(total_steps, training) + 1}")
    if device.type != "cpu" and isinstance(batches, Filled) and batches.n_filler > batches.n_tokens:
        share = batches.n_filler / (batches.n_filler + batches.n_tokens)
        found.append(f"{share:.0%} of the rows is filler, which is computed for nothing; take fewer tokens a row "
                     f"(tokens is {batches.tokens:,})")
    share = 0.0 if network is None or training.optimizer != "adamw" else _stuck(network, training.lr * total_steps)
    if share > STUCK:
        found.append(f"{share:.0%} of the trained base weights stay, rounded to {_name(network.dtype)}, what they are, "
                     f"and so they are read: {total_steps:,} steps of lr {training.lr:g} do not reach the next number; "
                     "take a higher lr, more steps, or dtype float32")
    longest = None if network is None else longest_row(batches, device)
    needs = None if longest is None else needs_of(network, longest, training)
    if needs is not None and needs.total > needs.free:
        found.append(f"a step takes about {gigabytes(needs.total)} beside the weights, and {gigabytes(needs.free)} are "
                     f"free: it may not fit; {LESS}")
    return found


def _stuck(network: Any, reach: float) -> float:
    """The share of trained base weights that a move by `reach`, which is all that AdamW's steps of a run come to, does
    not round to another number of the compute dtype, by samples of each; 0 for fp32."""
    if network.dtype == torch.float32:
        return 0.0
    weights, names = network.hf_weights(), sorted(network.trained_names())
    samples = [weights[name].flatten()[:: -(-weights[name].numel() // SAMPLE)] for name in names]
    # The next number is at least eps / 2 of a value away, and rounding goes there from the middle on.
    stuck = [int((sample.abs() * (torch.finfo(network.dtype).eps / 4) > reach).sum()) * weights[name].numel()
             / len(sample) for name, sample in zip(names, samples, strict=True)]
    return sum(stuck) / max(1, sum(weights[name].numel() for name in names))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Divergence:
    """Watches the losses of a run: `seen` tells once that they rose far above where they began.

    That is when the median of the last WINDOW is a nat above the first one, and more than half of the way from it to
    `chance`, the loss of a model that guesses every token alike, ln(vocab_size): a network that a step has wrecked
    settles near that, and only one that is spoilt by more stands above.
    """

    def __init__(self, chance: float | None) -> None:
        self.chance, self.first = chance, 0.0       # None: nothing is watched
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._told = False

    def seen(self, loss: float) -> bool:
        """Whether this loss is the one that shows it."""
        if not self._last:
            self.first = loss
        self._last.append(loss)
        if self._told or self.chance is None or len(self._last) < EARLY:
            return False
        self._told = self.median > max(self.first + 1, (self.first + self.chance) / 2)
        return self._told

    @property
    def steps(self) -> int:
        """How many losses are looked at."""
        return len(self._last)

    @property
    def median(self) -> float:
        """Of these losses: one that is far off says nothing."""
        return statistics.median(self._last)

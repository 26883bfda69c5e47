"""LossPlot: the loss curve of a run as a PNG, drawn by matplotlib without touching its global state."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from minitune.arguments import warn
from minitune.checkpoint.files import staged
from minitune.training.run import EvaluationRecord, Observer, Run, RunInfo, StepRecord


def plot_loss(records: Sequence[StepRecord], path: str | Path, title: str = "Training loss",
              evaluations: Sequence[EvaluationRecord] = ()) -> Path:
    """Draw the losses of steps and evaluations (left axis) and the learning rate (right axis) into the PNG `path`;
    returns it.

    With 20 records or more a running mean lies over the raw curve. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    steps, losses = [r.step for r in records], [r.loss for r in records]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    smooth = len(losses) >= 20
    axes.plot(steps, losses, color="tab:blue", alpha=0.35 if smooth else 1.0, marker="." if len(steps) < 40 else "",
              label="loss")
    if smooth:
        axes.plot(steps, running_mean(losses), color="tab:blue", label="running mean")
    seen = [(e.step, e.loss) for e in evaluations if e.loss is not None]
    if seen:
        axes.plot(*zip(*seen, strict=True), color="tab:green", marker="o", markersize=4, label="validation loss")
    axes.set(xlabel="step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(steps, [r.lr for r in records], color="tab:orange", linewidth=1, alpha=0.7, label="learning rate")
    rates.set_ylabel("learning rate")
    rates.set_ylim(bottom=0)
    handles = [*axes.get_lines(), *rates.get_lines()]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right")
    with staged(path.parent) as staging, staging.open(path.name) as file:
        figure.savefig(file, format="png")
    return path


def running_mean(values: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential mean that starts unbiased; a value that is not finite leaves it where it is."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight if weight else math.nan)
    return means


class LossPlot(Observer):
    """Draws `path` when the run ends, however it ended. Without matplotlib it warns at the start and draws nothing; a
    failure at the end (a full disk, too little memory) is a warning too, which hides no other error."""

    def __init__(self, path: str | Path, title: str = "Training loss") -> None:
        self.path, self.title = Path(path), title
        self._available = True

    def on_start(self, info: RunInfo) -> None:
        self._available = importlib.util.find_spec("matplotlib") is not None
        if not self._available:
            warn(f"{self.path} will not be drawn: matplotlib is not installed (pip install matplotlib)")

    def on_end(self, run: Run) -> None:
        if not self._available or not run.records:
            return
        try:
            plot_loss(run.records, self.path, self.title, run.evaluations)
        except Exception as error:
            warn(f"{self.path} is not drawn: {str(error) or type(error).__name__}; metrics.jsonl has its numbers")

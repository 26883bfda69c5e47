"""minitune: fine-tune Llama-family models with LoRA, by a transformer, kernels and a training step of its own."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitune import data
    from minitune.api import Answer, Model, init, load, train
    from minitune.config import Data, LoRA, ModelConfig, Rope, Training
    from minitune.data.batch import Batch
    from minitune.errors import InputError
    from minitune.objectives.evaluate import Evaluation, evaluate
    from minitune.ops import nf4
    from minitune.ops.backends import backends
    from minitune.report.tensorboard import TensorBoard
    from minitune.training.graph import GraphedStep
    from minitune.training.loop import TrainingDiverged
    from minitune.training.optimizers import SGD, AdamW
    from minitune.training.run import EvaluationRecord, Observer, Run, StepRecord
    from minitune.training.step import StepResult, train_step

__version__ = "0.1.0"
__all__ = ["SGD", "AdamW", "Answer", "Batch", "Data", "Evaluation", "EvaluationRecord", "GraphedStep", "InputError",
           "LoRA", "Model", "ModelConfig", "Observer", "Rope", "Run", "StepRecord", "StepResult", "TensorBoard",
           "Training", "TrainingDiverged", "backends", "data", "evaluate", "init", "load", "nf4", "train",
           "train_step"]
_HOME = {"api": ("Answer", "Model", "init", "load", "train"),
         "config": ("Data", "LoRA", "ModelConfig", "Rope", "Training"),
         "data.batch": ("Batch",), "errors": ("InputError",), "ops.backends": ("backends",),
         "training.loop": ("TrainingDiverged",), "training.optimizers": ("SGD", "AdamW"),
         "objectives.evaluate": ("Evaluation", "evaluate"), "report.tensorboard": ("TensorBoard",),
         "training.run": ("EvaluationRecord", "Observer", "Run", "StepRecord"),
         "training.step": ("StepResult", "train_step"), "training.graph": ("GraphedStep",)}
"""Where each public name lives: loaded at its first use, so that `minitune --help` does not wait for torch."""
_MODULES = {"data": "data", "nf4": "ops.nf4"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value: Any = importlib.import_module(f"minitune.{_MODULES[name]}")
    else:
        home = next((home for home, names in _HOME.items() if name in names), None)
        if home is None:
            from minitune.names import ENTRIES_ELSEWHERE

            here = f"; here it is {ENTRIES_ELSEWHERE[name]}" if name in ENTRIES_ELSEWHERE else ""
            raise AttributeError(f"module 'minitune' has no attribute {name!r}{here}")
        value = getattr(importlib.import_module(f"minitune.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

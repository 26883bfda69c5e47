"""minitune: fine-tune Llama-family models with LoRA, from code that one person can read in an evening."""

from minitune import data
from minitune.api import Model, init, load, train
from minitune.config import LoRA, ModelConfig, Rope, Training
from minitune.data.batch import Batch
from minitune.errors import InputError
from minitune.ops import nf4
from minitune.ops.backends import backends
from minitune.training.loop import TrainingDiverged
from minitune.training.optimizers import SGD, AdamW
from minitune.training.run import Run, StepRecord

__version__ = "0.1.0"
__all__ = ["SGD", "AdamW", "Batch", "InputError", "LoRA", "Model", "ModelConfig", "Rope", "Run", "StepRecord",
           "Training", "TrainingDiverged", "backends", "data", "init", "load", "nf4", "train"]

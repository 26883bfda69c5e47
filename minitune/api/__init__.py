"""The public face: load a checkpoint, a Model that trains and generates, train."""

from minitune.api.generation import Answer
from minitune.api.loading import init, load
from minitune.api.model import Model
from minitune.api.training import train

__all__ = ["Answer", "Model", "init", "load", "train"]

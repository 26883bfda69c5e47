"""Operations of the training step: one file per op, each with its contract, its reference and its backward."""

from minitune.ops import vector_math

vector_math.settle()

"""Operations of the training step: one file per op, each with its contract, its reference and its backward."""

from minitune.ops import vector_math

# Before any thread calls one: MKL's first calls race (vector_math says how).
vector_math.settle()

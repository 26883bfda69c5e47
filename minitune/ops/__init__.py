"""Operations of the training step: one file per op, each with its contract, its reference and its backward."""

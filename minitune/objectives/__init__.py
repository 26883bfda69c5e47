"""What is minimised: one file an objective, each a function (model, batch) -> (sum of losses, trained tokens)."""

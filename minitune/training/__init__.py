"""Training: optimizers over flat tensors, schedules, the step and the loop; it tells observers and knows no screen."""

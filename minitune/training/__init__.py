"""Training: optimizers over flat buffers, schedules, the step and the loop; it tells observers and knows no screen."""

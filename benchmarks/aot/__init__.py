"""What each Triton kernel becomes on GPUs that are not there: `python -m benchmarks.aot` writes it down."""

from benchmarks.aot import rows_attention, rows_lora_matmul, rows_losses, rows_nf4, rows_optimizers, rows_pointwise

MODULES = (rows_attention, rows_lora_matmul, rows_losses, rows_nf4, rows_optimizers, rows_pointwise)
ROWS = [row for module in MODULES for row in module.ROWS]
"""Every kernel in every configuration that is launched."""

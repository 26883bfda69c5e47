"""What is said of a flag that a command does not have: the one that is meant, or how it is done here."""

from __future__ import annotations

import re
from collections.abc import Collection

from minitune.names import nearest

_KEPT = "the last two checkpoints are kept (--save-every), and the best adapter at each evaluation (--evaluate-every)"
_LOGS = "metrics.jsonl has every step, and --tensorboard writes event files"
_STEP = "a step is counted in tokens here, --tokens times --micro-batches"
DONE_HERE = {
    **dict.fromkeys(("save_strategy", "save_total_limit"), _KEPT),
    **dict.fromkeys(("resume_from_checkpoint", "resume_from"), "--resume goes on with the run in --out"),
    **dict.fromkeys(("wandb", "report_to", "logger_name", "log_with", "use_wandb", "wandb_project"), _LOGS),
    **dict.fromkeys(("batch_size", "per_device_train_batch_size", "micro_batch_size", "global_batch_size"), _STEP),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "precision"),
                    "bfloat16 is taken where the device is good at it; --dtype says another"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_bit"), "--quant nf4-dq holds the base in 4 bits"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "use_gradient_checkpointing"),
                    "--memory full keeps each layer's input alone; auto, the default, does so where memory is short"),
    **dict.fromkeys(("packing", "sample_packing"), "samples are always packed, and do not see each other"),
    **dict.fromkeys(("train_on_inputs", "completion_only_loss", "assistant_only_loss", "mask_prompt"),
                    "answers alone are trained; minitune inspect shows it"),
    **dict.fromkeys(("flash_attn", "flash_attention", "use_flash_attention_2", "attn_implementation"),
                    "attention never forms the scores as a whole; on a GPU minitune tune measures the fastest way"),
    **dict.fromkeys(("deepspeed", "fsdp", "ddp", "num_gpus"),
                    "one device does the run; --memory and --quant make larger models fit"),
    **dict.fromkeys(("modules_to_save", "lora_modules_to_save"),
                    "--add-tokens trains the rows of new tokens, --train base weights"),
    "lora_target_modules": "--targets names the linears that get an adapter",
    "do_sample": "--temperature above 0 draws, 0 is greedy",
}
"""Settings of other trainers that a name of ours does not answer -> how it is done here. What names a flag is said by
the commands that have it."""


def done_here(name: str, known: Collection[str]) -> str:
    """"; " and how it is done here what others have this setting for, or nothing; `known` as in `instead`."""
    done = DONE_HERE.get(name.replace("-", "_").lower())
    plain = {each.replace("-", "_") for each in known}
    return f"; {done}" if done is not None and plain.issuperset(_flags_in(done)) else ""


def instead(name: str, known: Collection[str], hyphens: str = "") -> str:
    """What follows "there is no …" for a mistyped or foreign name: how it is done here, "; did you mean --lr?", or
    nothing. `known`: the flags of the command without their `hyphens`, or the keys of a file."""
    meant = nearest(name, known)
    return done_here(name, known) or (f"; did you mean {hyphens}{meant}?" if meant else "")


def instead_of_value(value: str, choices: Collection[str]) -> str:
    """The same for a value that is none of the `choices` of its flag."""
    if re.fullmatch(r"(paged_)?adamw?(_bnb)?_?8bit", value.replace("-", "_").lower()):
        return "; say --moments 8bit"
    meant = nearest(value, choices)
    return f"; did you mean {meant}?" if meant else ""


def _flags_in(text: str) -> list[str]:
    return [flag.replace("-", "_") for flag in re.findall(r"--([a-z][a-z-]*)", text)]

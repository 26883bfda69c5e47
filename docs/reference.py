"""Writes reference.md from the dataclasses of the settings: python docs/reference.py. A test holds the two together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

from minitune.commands.flags.declared import describe
from minitune.commands.flags.help import texts_of
from minitune.config import Data, LoRA, Training

PAGE = Path(__file__).with_name("reference.md")
HEAD = """\
# The settings

You get: every setting of adapters, training and data, and the environment variables. In Python a setting is an
argument, in a TOML file a key of the table, on the command line a flag (`max_steps` is `--max-steps`). `python
docs/reference.py` writes this page from `minitune/config.py`; `minitune COMMAND --help` tells the flags that a command
has besides.
"""
PARTS = {"lora": (LoRA, "`mt.LoRA`: the adapters"),
         "training": (Training, "`mt.Training`, or arguments of `mt.train`: the run"),
         "samples": (Data, "`mt.Data`: how the data is read")}
"""TOML table -> (its dataclass, what it is)."""
TAIL = """\
## Environment variables

| name | values | meaning |
| --- | --- | --- |
| `MINITUNE_BACKEND` | `native`, `triton`, `cudnn`, `reference` | Every op that has this backend takes it. `cudnn`: \
attention on a GPU by cuDNN, forward and backward, which is fast where documents are long and of one length; its \
gradients differ in the last bits from run to run, and each new length costs a moment of planning. Unset, an op takes \
its fastest backend; on a GPU attention and the LoRA products what `minitune tune` measured to be the fastest, else \
torch's. \
All of these repeat to the bit. |
| `MINITUNE_TUNED` | a file | The table that `minitune tune` writes and ops choose by; unset, one for each kind of GPU \
and torch in the user's cache folder. |
| `MINITUNE_CPU_ISA` | `amx`, `avx512_bf16`, `avx512`, `avx2`, `portable` | The highest instruction \
set that the extension uses on a CPU. |
| `MINITUNE_CACHE` | a folder | Where encoded data is kept; unset, `minitune` in the user's cache folder. |
| `MINITUNE_NATIVE` | `0` | At installation: without the C++ and CUDA extension. |
| `MINITUNE_CUDA` | `0`, `1`, `auto` | At installation: without the extension's CUDA half, or with it whatever this \
torch is built for. |
"""


def page() -> str:
    """The text of reference.md."""
    parts = [HEAD]
    for table, (owner, what) in PARTS.items():
        rows = "\n".join(_row(field, get_type_hints(owner)[field.name], texts_of(owner)[field.name])
                         for field in dataclasses.fields(owner))
        parts.append(f"## [{table}]\n\n{what}.\n\n| name | type | default | meaning |\n"
                     f"| --- | --- | --- | --- |\n{rows}\n")
    return "\n".join([*parts, TAIL])


def _row(field: dataclasses.Field[Any], hint: Any, text: str) -> str:
    factory = field.default_factory
    default = field.default if factory is dataclasses.MISSING else factory()
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return f"| `{field.name}` | {describe(hint)} | {'' if default in (None, (), {}) else f'`{shown}`'} | {text} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""The command line: the commands of `minitune.commands` through tyro, and how each error ends."""

from __future__ import annotations

import re
import sys
from typing import Annotated

import torch
import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

from minitune.commands.complete import Complete
from minitune.commands.demo import Demo
from minitune.commands.doctor import Doctor
from minitune.commands.init import Init
from minitune.commands.merge import Merge
from minitune.commands.train import Train
from minitune.commands.tune import Tune
from minitune.errors import InputError
from minitune.training.loop import TrainingDiverged

Command = (Annotated[Train, tyro.conf.subcommand("train")] | Annotated[Complete, tyro.conf.subcommand("complete")]
           | Annotated[Merge, tyro.conf.subcommand("merge")] | Annotated[Init, tyro.conf.subcommand("init")]
           | Annotated[Demo, tyro.conf.subcommand("demo")] | Annotated[Doctor, tyro.conf.subcommand("doctor")]
           | Annotated[Tune, tyro.conf.subcommand("tune")])


DESCRIPTION = "Fine-tune Llama-family models with LoRA on one NVIDIA GPU or a CPU."


def main(args: list[str] | None = None) -> None:
    """Run one command. User errors end in one line on stderr and exit code 2."""
    try:
        command = tyro.cli(Command, prog="minitune", description=DESCRIPTION, args=args,
                           config=(OmitArgPrefixes, OmitSubcommandPrefixes))
        command.run()
    except InputError as error:
        print(f"minitune: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        print(f"minitune: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (TrainingDiverged, MemoryError, torch.OutOfMemoryError) as error:
        print(f"minitune: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except RuntimeError as error:       # torch's allocator of host memory has no exception of its own
        found = re.search(r"tried to allocate (\d+) bytes", str(error))
        if found is None:
            raise
        print(f"minitune: out of memory: {int(found[1]) / 1e9:,.1f} GB more are needed; take fewer tokens, a smaller "
              "rank or model, or --quant nf4-dq", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None

"""What several commands share."""

from __future__ import annotations

from pathlib import Path

from minitune.errors import InputError


def check_out(out: Path) -> None:
    """InputError unless `out` is free: not there yet, or an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; name another folder, or remove it")

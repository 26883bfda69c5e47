"""The device and the compute dtype of a run: what was asked for, checked, or else what fits the machine."""

from __future__ import annotations

import torch

from minitune.errors import InputError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else the GPU if there is one. InputError for what is not there, or is neither GPU nor CPU:
    on "meta" a model would have no weights, and on others (mps, xpu, …) nothing was ever tried."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"load: device {str(device)[:60]!r} is not one that torch knows; say "
                         '"cuda" or "cpu"') from error
    if place.type not in ("cuda", "cpu"):
        raise InputError(f'load: device {str(place)!r} is not one that minitune runs on; say "cuda" or "cpu"')
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError('load: device "cuda" is asked for, but torch sees no GPU; say device="cpu" or nothing')
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise InputError(f'load: device "{place}" is asked for, but torch sees {torch.cuda.device_count()} GPUs, '
                         'counted from "cuda:0"')
    return place


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The compute dtype asked for, else bf16 where the device is good at it, else fp32."""
    if dtype is None:
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
        good = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if good else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise InputError(f"load: dtype is {str(dtype)[:60]!r}; say {', '.join(DTYPES)} or nothing")
    return found

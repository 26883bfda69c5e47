"""linear_cross_entropy and lora_images: what their kernels are compiled as, and what they may cost."""

from typing import Any

from minitune.kernels import linear_cross_entropy, lora_images
from tests.kernels.aot import Row


def _losses(kind: str, logits: str, V: str, smooth: bool = False, gradient: bool = True, pitch: str = "i32:16",
            **checks: Any) -> Row:
    config = linear_cross_entropy.CONFIGS[kind][80]
    name = f"{kind} {logits}{' ragged' * (V == 'i32')}{' smooth' * smooth}{' gradient' * gradient}"
    signature = {"logits": f"*{logits}:16", "labels": "*i64:16", "losses": "*fp32:16", "pitch": pitch, "V": V,
                 "smoothing": "fp32"}
    constants = {"GRADIENT": gradient, "SMOOTH": smooth, "RAGGED": V == "i32", **config.tiles}
    return Row(f"linear_cross_entropy {name}", linear_cross_entropy.linear_cross_entropy_losses, signature, constants,
               config.options(), config.registers, shared=config.shared, **checks)


def _images(flat: str, group: int, **checks: Any) -> Row:
    config = lora_images.CONFIGS["refresh"][80]
    signature = {"entries": "*i64", "scales": "*fp32", "tiles": "*i64", "flat": f"*{flat}:16"}
    return Row(f"lora_images {flat} {group}", lora_images.lora_images_refresh, signature,
               {"GROUP": group, **config.tiles}, config.options(), config.registers, shared=config.shared, **checks)


ROWS = [
    _losses("losses", "bf16", "i32:16"),
    _losses("losses", "bf16", "i32:16", gradient=False, arches=(90,)),
    _losses("losses", "bf16", "i32", smooth=True, arches=(90, 100)),
    _losses("losses", "fp32", "i32", smooth=True, arches=(90, 100)),
    _losses("losses_long", "bf16", "i32:16"),
    _losses("losses_long", "fp32", "i32:16", smooth=True, arches=(90, 100)),
    _losses("losses_narrow", "bf16", "i32", smooth=True, pitch="i32"),
    _images("bf16", lora_images.GROUP, stores=128),
    _images("fp32", lora_images.GROUP, stores=128, arches=(90,)),
    _images("bf16", 1),
]

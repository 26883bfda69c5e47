"""linear_cross_entropy, lora_images, lora_gradients: what their kernels are compiled as, and what they may cost."""

from typing import Any

from benchmarks.aot.compile import Row
from minitune.kernels import linear_cross_entropy, lora_gradients, lora_images


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


def _weigh(d: int) -> Row:
    config = linear_cross_entropy.CONFIGS["weigh"][80]
    return Row(f"linear_cross_entropy weigh {d}", linear_cross_entropy.linear_cross_entropy_weigh,
               {"x": "*bf16:16", "weights": "*fp32:16", "out": "*bf16:16", "step": "i32", "pitch": "i32:16"},
               {"D": d, **config.tiles}, config.options(), config.registers, shared=config.shared, stores=128)


def _gradients(name: str, kind: str, rank: int, **checks: Any) -> Row:
    """dB of the library's products comes transposed, of ours in rows; ours are fp32, of which dA is taken as it is."""
    config, wide = lora_gradients.CONFIGS["apart"][80], kind == "fp32"
    narrow = {} if wide else {"da": f"*{kind}:16", "out_a": "*fp32:16"}
    moving, fixed = ("row_step", "rank_step") if wide else ("rank_step", "row_step")
    signature = narrow | {"db": f"*{kind}:16", "out_b": "*fp32:16", "scale": "fp32", "A_VALUES": "i32:16",
                          "N": "i32:16", moving: "i32:16"}
    constants = {"R": rank, "RANK": 1 << (rank - 1).bit_length(), fixed: 1,
                 **({"da": None, "out_a": None} if wide else {})}
    return Row(f"lora_gradients {name} R {rank}", lora_gradients.lora_gradients_apart, signature,
               {**constants, **config.tiles}, config.options(), config.registers, shared=config.shared, **checks)


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
    _weigh(4096),
    _gradients("of the library", "bf16", 16, stores=128),
    _gradients("of the library", "bf16", 64, arches=(90,)),
    _gradients("of our kernel", "fp32", 16, arches=(90,)),
]

"""The MLP half of a layer: residual -> norm -> gate and up -> SwiGLU -> down."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.model.half import Context, Half, Kept, Need, Wanted
from minitune.model.lora import Projection, frozen
from minitune.ops import lora_matmul, rms_norm, swiglu
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer


class MlpHalf(Half):
    """down(swiglu(gate_up(norm(x)))). Weight names follow the checkpoint: mlp.{gate,up,down}_proj."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device,
                 buffer: DecodeBuffer | None = None):
        super().__init__()
        self.eps = config.norm_eps
        prefix = f"model.layers.{layer}.mlp"
        self.norm = frozen(torch.empty(config.d_model, dtype=dtype, device=device))
        self.gate_up = Projection({f"{prefix}.gate_proj": config.d_ff, f"{prefix}.up_proj": config.d_ff},
                                  config.d_model, config.mlp_bias, dtype, device, buffer)
        self.down = Projection({f"{prefix}.down_proj": config.d_model}, config.d_ff, config.mlp_bias, dtype, device,
                               buffer)

    def projections(self) -> tuple[Projection, Projection]:
        return self.gate_up, self.down

    def norms(self) -> list[nn.Parameter]:
        return [self.norm]

    def cheap(self) -> frozenset[str]:
        return frozenset({"normed", "h"})

    def composed(self, x: Tensor, context: Context) -> Tensor:
        return self.down(swiglu.reference(self.gate_up(rms_norm.reference(x, self.norm, self.eps))))

    def forward_keeping(self, x: Tensor, branch: Tensor | None, weights: tuple[LoraWeights, LoraWeights],
                        context: Context, need: Need = "both") -> tuple[Tensor | None, Kept]:
        rows, (w_gate_up, w_down) = len(x), weights
        place = lora_matmul.input_rows(rows, w_gate_up)
        normed, rstd, x, s = rms_norm.forward_s(x, self.norm, self.eps, branch, w_gate_up.a, out=place)
        place = lora_matmul.gradient_rows(rows, w_gate_up)      # where its gradient may follow it; always there, since
        gate_up, s_gate_up = lora_matmul.forward(normed, w_gate_up, out=place, s=s)     # a product's bits depend on it
        h = swiglu.forward(gate_up, out=lora_matmul.input_rows(rows, w_down))
        kept: Kept = {"x": x, "rstd": rstd, "normed": normed, "s_gate_up": s_gate_up, "gate_up": gate_up, "h": h}
        if need == "kept":
            return None, kept | {"s_down": lora_matmul.forward_s(h, w_down)}
        y, kept["s_down"] = lora_matmul.forward(h, w_down)
        return y, kept

    def backward_from(self, dy: Tensor, past: Tensor | None, kept: Kept, weights: tuple[LoraWeights, LoraWeights],
                      context: Context, wanted: Wanted) -> tuple[Tensor | None, list[Tensor]]:
        w_gate_up, w_down = weights
        ds_down = lora_matmul.backward_s(dy, w_down)
        dh = lora_matmul.backward_input(dy, ds_down, w_down)
        want_h = "h" not in kept and self.down.reads_input(kept["s_down"])
        place = None if wanted.overwrite else lora_matmul.gradient_rows(len(dy), w_gate_up)
        d_gate_up, h = swiglu.backward(dh, kept["gate_up"], want_h=want_h, overwrite=wanted.overwrite, out=place)
        gradients_down = self.down.gradients(dy, kept.pop("h", h), kept["s_down"], ds_down, w_down)
        del dh, h       # the last product takes the most memory: what is used up goes before it
        dx, gradients, d_norm = self.backward_through_norm(d_gate_up, "s_gate_up", w_gate_up, kept, past, wanted)
        return dx, [*gradients, *gradients_down, *d_norm]

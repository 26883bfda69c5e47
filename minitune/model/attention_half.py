"""The attention half of a layer: norm -> q, k, v -> (their norms) -> rotation -> attention -> output -> residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.model.half import Context, Kept
from minitune.model.lora import Projection, frozen
from minitune.ops import attention, lora_matmul, rms_norm, rope
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer


class AttentionHalf(nn.Module):
    """x + o(attention(rotate(qkv(norm(x))))). Weight names follow the checkpoint: self_attn.{q,k,v,o}_proj."""

    q_norm: nn.Parameter | None
    k_norm: nn.Parameter | None

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device,
                 buffer: DecodeBuffer | None = None):
        super().__init__()
        self.config, self.window = config, config.windows[layer]
        prefix = f"model.layers.{layer}.self_attn"
        q_rows, kv_rows = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.norm = frozen(torch.empty(config.d_model, dtype=dtype, device=device))
        self.qkv = Projection({f"{prefix}.q_proj": q_rows, f"{prefix}.k_proj": kv_rows, f"{prefix}.v_proj": kv_rows},
                              config.d_model, config.qkv_bias, dtype, device, buffer)
        self.o = Projection({f"{prefix}.o_proj": config.d_model}, q_rows, config.o_bias, dtype, device, buffer)
        for name in ("q_norm", "k_norm"):
            weight = frozen(torch.empty(config.head_dim, dtype=dtype, device=device)) if config.qk_norm else None
            self.register_parameter(name, weight)

    @property
    def needs_composed(self) -> bool:
        norms = any(p is not None and p.requires_grad for p in (self.norm, self.q_norm, self.k_norm))
        return norms or self.qkv.needs_composed or self.o.needs_composed

    def adapter_parameters(self) -> list[Tensor]:
        return [*self.qkv.adapter_parameters(), *self.o.adapter_parameters()]

    def cheap(self) -> frozenset[str]:
        return frozenset({"normed"})

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, (heads + 2·kv_heads)·head_dim] -> views q [T, heads, head_dim], k and v [T, kv_heads, head_dim]."""
        heads, kv_heads = self.config.n_heads, self.config.n_kv_heads
        q, k, v = qkv.unflatten(-1, (-1, self.config.head_dim)).split((heads, kv_heads, kv_heads), dim=-2)
        return q, k, v

    def composed(self, x: Tensor, context: Context) -> Tensor:
        q, k, v = self.split(self.qkv(rms_norm.reference(x, self.norm, self.config.norm_eps)))
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm.reference(q, self.q_norm, self.config.norm_eps)
            k = rms_norm.reference(k, self.k_norm, self.config.norm_eps)
        q, k = rope.reference(q, context.cos, context.sin), rope.reference(k, context.cos, context.sin)
        attended = attention.differentiable(q, k, v, context.documents, self.window)
        return x + self.o(attended.flatten(1))

    def project(self, x: Tensor, weights: LoraWeights, context: Context) -> tuple[Tensor, Kept]:
        """The way up to rotated q, k, v: (qkv [T, rows], what is kept of it). Generation starts here too."""
        normed, rstd = rms_norm.forward(x, self.norm, self.config.norm_eps)
        qkv, s = lora_matmul.forward(normed, weights)
        kept: Kept = {"x": x, "rstd": rstd, "normed": normed, "s_qkv": s}
        q, k, _ = self.split(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            kept["raw_q"], kept["raw_k"] = q.clone(), k.clone()
            for part, weight, name in ((q, self.q_norm, "q_rstd"), (k, self.k_norm, "k_rstd")):
                y, kept[name] = rms_norm.forward(part, weight, self.config.norm_eps)
                part.copy_(y)
        rope.rotate_(self.rotated(qkv), context.cos, context.sin)
        return qkv, kept

    def rotated(self, qkv: Tensor) -> Tensor:
        """The heads of q and k together, which lie side by side: [T, heads + kv_heads, head_dim], a view."""
        heads = self.config.n_heads + self.config.n_kv_heads
        return qkv.unflatten(-1, (-1, self.config.head_dim))[:, :heads]

    def operands(self) -> tuple[LoraWeights, LoraWeights]:
        return self.qkv.operands(), self.o.operands()

    def forward_keeping(self, x: Tensor, weights: tuple[LoraWeights, LoraWeights], context: Context,
                        needs_backward: bool) -> tuple[Tensor, Kept]:
        qkv, kept = self.project(x, weights[0], context)
        out, saved = attention.forward(*self.split(qkv), context.documents, self.window, needs_backward)
        attended = out.flatten(1)
        y, s_o = lora_matmul.forward(attended, weights[1])
        return y.add_(x), kept | {"qkv": qkv, "graph": saved.graph, "attended": attended, "s_o": s_o}

    def restore(self, kept: Kept) -> None:
        kept["normed"] = rms_norm.apply(kept["x"], kept["rstd"], self.norm)

    def backward_from(self, dy: Tensor, kept: Kept, weights: tuple[LoraWeights, LoraWeights], context: Context,
                      need_dx: bool) -> tuple[Tensor | None, list[Tensor]]:
        w_qkv, w_o = weights
        ds_o = lora_matmul.backward_s(dy, w_o)
        gradients_o = self.o.adapter_gradients(dy, kept["attended"], kept["s_o"], ds_o)
        saved = attention.Saved(*self.split(kept["qkv"]), context.documents, self.window, kept["graph"])
        d_out = lora_matmul.backward_input(dy, ds_o, w_o).unflatten(-1, (-1, self.config.head_dim))
        d_qkv = torch.cat(attention.backward(d_out, saved), dim=1)
        rope.rotate_(d_qkv[:, : self.config.n_heads + self.config.n_kv_heads], context.cos, context.sin, back=True)
        if self.q_norm is not None and self.k_norm is not None:
            dq, dk, _ = d_qkv.split((self.config.n_heads, self.config.n_kv_heads, self.config.n_kv_heads), dim=1)
            dq.copy_(rms_norm.backward(dq, kept["raw_q"], kept["q_rstd"], self.q_norm))
            dk.copy_(rms_norm.backward(dk, kept["raw_k"], kept["k_rstd"], self.k_norm))
        d_rows = d_qkv.flatten(1)
        ds = lora_matmul.backward_s(d_rows, w_qkv)
        gradients = [*self.qkv.adapter_gradients(d_rows, kept["normed"], kept["s_qkv"], ds), *gradients_o]
        if not need_dx:
            return None, gradients
        d_normed = lora_matmul.backward_input(d_rows, ds, w_qkv)
        return rms_norm.backward(d_normed, kept["x"], kept["rstd"], self.norm).add_(dy), gradients

"""The attention half of a layer: residual -> norm -> q, k, v -> (their norms) -> rotation -> attention -> output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from minitune.config import ModelConfig
from minitune.model.half import Context, Half, Kept, Need, Wanted
from minitune.model.lora import Projection, frozen
from minitune.ops import attention, lora_matmul, rms_norm, rope
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4_linear import DecodeBuffer


class AttentionHalf(Half):
    """o(attention(rotate(qkv(norm(x))))). Weight names follow the checkpoint: self_attn.{q,k,v,o}_proj."""

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

    def projections(self) -> tuple[Projection, Projection]:
        return self.qkv, self.o

    def norms(self) -> list[nn.Parameter]:
        return [weight for weight in (self.q_norm, self.k_norm, self.norm) if weight is not None]

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
        return self.o(attended.flatten(1))

    def project(self, x: Tensor, branch: Tensor | None, weights: LoraWeights, context: Context) -> Kept:
        """The way up to the rotated "qk" [T, heads + kv_heads, head_dim] and "v"; all that is kept of it. Generation
        starts here too."""
        rows = lora_matmul.input_rows(len(x), weights)
        normed, rstd, x, s = rms_norm.forward_s(x, self.norm, self.config.norm_eps, branch, weights.a, out=rows)
        qkv, s = lora_matmul.forward(normed, weights, s=s)
        q, k, v = self.split(qkv)
        kept: Kept = {"x": x, "rstd": rstd, "normed": normed, "s_qkv": s, "v": v}
        qk = self.q_and_k(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            kept["raw_qk"], qk = qk, torch.empty_like(qk, memory_format=torch.contiguous_format)
            for raw, weight, out, name in zip((q, k), (self.q_norm, self.k_norm), self.split_qk(qk),
                                              ("q_rstd", "k_rstd"), strict=True):
                kept[name] = rms_norm.forward(raw, weight, self.config.norm_eps, out=out)[1]
        kept["qk"] = rope.rotate_(qk, context.cos, context.sin)
        return kept

    def q_and_k(self, qkv: Tensor) -> Tensor:
        """The heads of q and k together, which lie side by side: [T, heads + kv_heads, head_dim], a view."""
        heads = self.config.n_heads + self.config.n_kv_heads
        return qkv.unflatten(-1, (-1, self.config.head_dim))[:, :heads]

    def split_qk(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Views q [T, heads, head_dim] and k [T, kv_heads, head_dim] of the two together."""
        return qk[:, : self.config.n_heads], qk[:, self.config.n_heads :]

    def forward_keeping(self, x: Tensor, branch: Tensor | None, weights: tuple[LoraWeights, LoraWeights],
                        context: Context, need: Need = "both") -> tuple[Tensor | None, Kept]:
        kept = self.project(x, branch, weights[0], context)
        attended, saved = attention.forward(*self.split_qk(kept["qk"]), kept["v"], context.documents, self.window,
                                       need != "branch", lora_matmul.input_rows(len(x), weights[1]))
        kept |= {"lse": saved.lse, "graph": saved.graph, "attended": attended.flatten(1)}
        if need == "kept":
            return None, kept | {"s_o": lora_matmul.forward_s(kept["attended"], weights[1])}
        y, kept["s_o"] = lora_matmul.forward(kept["attended"], weights[1])
        return y, kept

    def backward_from(self, dy: Tensor, past: Tensor | None, kept: Kept, weights: tuple[LoraWeights, LoraWeights],
                      context: Context, wanted: Wanted) -> tuple[Tensor | None, list[Tensor]]:
        w_qkv, w_o = weights
        ds_o = lora_matmul.backward_s(dy, w_o)
        gradients_o = self.o.gradients(dy, kept["attended"], kept["s_o"], ds_o, w_o)
        d_out = lora_matmul.backward_input(dy, ds_o, w_o)
        d_rows, d_norms = self.backward_through_attention(d_out, kept, context, wanted, w_qkv)
        del d_out
        for name in ("qk", "raw_qk", "v", "attended", "lse", "graph"):      # before the last product
            kept.pop(name, None)
        dx, gradients_qkv, d_norm = self.backward_through_norm(d_rows, "s_qkv", w_qkv, kept, past, wanted)
        return dx, [*gradients_qkv, *gradients_o, *d_norms, *d_norm]

    def backward_through_attention(self, d_out: Tensor, kept: Kept, context: Context, wanted: Wanted,
                                   w_qkv: LoraWeights) -> tuple[Tensor, list[Tensor]]:
        """d_out [T, heads·head_dim] -> (the gradient of what the q, k, v product gave, [T, rows], where the backward
        of that product wants it; those of the heads' norms that are trained)."""
        saved = attention.Saved(*self.split_qk(kept["qk"]), kept["v"], context.documents, self.window, kept["graph"],
                                kept["attended"].unflatten(-1, (-1, self.config.head_dim)), kept["lse"])
        d_heads = d_out.unflatten(-1, (-1, self.config.head_dim))
        apart = attention.backward_apart(d_heads, saved, not wanted.overwrite)
        rows = lora_matmul.gradient_rows(len(d_out), w_qkv)     # not before: the library's backward takes memory too
        if rows is None:
            rows = d_out.new_empty(len(d_out), self.qkv.n_rows)
        d_qkv, d_qk = rows.unflatten(-1, (-1, self.config.head_dim)), self.q_and_k(rows)
        if apart is not None:       # they are turned on their way into one buffer
            rope.join(*apart, context.cos, context.sin, d_qkv, back=True)
        else:
            attention.backward(d_heads, saved, d_qkv)
            rope.rotate_(d_qk, context.cos, context.sin, back=True)
        d_norms: list[Tensor] = []
        if self.q_norm is not None and self.k_norm is not None:
            raws = self.split_qk(kept["raw_qk"])
            for d, raw, weight, name in zip(self.split_qk(d_qk), raws, (self.q_norm, self.k_norm),
                                            ("q_rstd", "k_rstd"), strict=True):
                if weight.requires_grad:
                    d_norms.append(rms_norm.backward_weight(d, raw, kept[name]))
                rms_norm.backward(d, raw, kept[name], weight, out=d)
        return rows, d_norms

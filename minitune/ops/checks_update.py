"""What `checks` runs of a step's end: the adapters' own gradients, AdamW and SGD, and the images of what they moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minitune.ops import adamw, lora_gradients, moments8, sgd
from minitune.ops.lora_images import Images

Results = dict[str, Tensor]
Function = Callable[[str, dict[str, Tensor]], Results]
SCALE, LR, DECAY, MOMENTUM, STEP = 0.5, 1e-2, 0.1, 0.9, 3
BETA1, BETA2, EPS = 0.9, 0.99, 1e-8
MARGIN = 8
"""Values between two rows of an image, as a tail of a weight's row has the rest of the row between."""


class Update(NamedTuple):
    """Operands of an adapter r x d on a linear of f outputs, and the function from them to the results: kind "ours",
    "plain" or, in fp64, "truth". All are fp32 but for the gradients of the whole projection and the images."""

    d: int
    f: int
    rank: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def lora_gradients(self) -> tuple[Function, dict[str, Tensor]]:
        def function(kind: str, t: dict[str, Tensor]) -> Results:
            take = lora_gradients.apart if kind == "ours" else lora_gradients.reference
            return dict(zip(("dA", "dB"), take(t["da"].clone(), t["db"].clone(), SCALE), strict=True))

        operands = {"da": self.random(self.rank, self.d), "db": self.random(self.f, self.rank)}
        return function, {name: value.to(self.dtype) for name, value in operands.items()}

    def lora_images(self) -> tuple[Function, dict[str, Tensor]]:
        n_a, pitch = self.rank * self.d, self.rank + MARGIN

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            flat = torch.zeros(n_a + self.f * pitch, dtype=t["a"].dtype if kind == "truth" else self.dtype,
                               device=self.device)
            copies = [(flat[:n_a].view(self.rank, self.d), t["a"], 1.0),
                      (flat[n_a:].view(self.f, pitch)[:, :self.rank], t["b"], SCALE)]
            if kind == "ours":
                Images().refresh(flat, copies)
            else:
                for place, parameter, factor in copies:
                    place.copy_(parameter * factor)
            return {"images": flat}

        return function, {"a": self.random(self.rank, self.d), "b": self.random(self.f, self.rank)}

    def adamw(self) -> tuple[Function, dict[str, Tensor]]:
        how = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "step": STEP}

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            p, g, m, v = (t[name].clone() for name in ("param", "grad", "exp_avg", "exp_avg_sq"))
            if kind == "truth":
                g = g * SCALE
                m, v = BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g
                p = p * (1 - LR * DECAY) - LR / (1 - BETA1**STEP) * m / ((v / (1 - BETA2**STEP)).sqrt() + EPS)
            else:
                take = adamw.adamw_ if kind == "ours" else adamw.adamw_reference_
                take(p, g, m, v, **how, grad_scale=self._scale())       # type: ignore[arg-type]
            return {"param": p, "exp_avg": m, "exp_avg_sq": v}

        operands = {name: self.random(self._n()) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
        return function, operands | {"exp_avg_sq": operands["exp_avg_sq"].square()}

    def sgd(self) -> tuple[Function, dict[str, Tensor]]:
        how = {"lr": LR, "momentum": MOMENTUM, "nesterov": True, "weight_decay": DECAY, "first": False}

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            p, g, m = (t[name].clone() for name in ("param", "grad", "momentum"))
            if kind == "truth":
                g = g * SCALE
                m = MOMENTUM * m + g
                p = p * (1 - LR * DECAY) - LR * (g + MOMENTUM * m)
            else:
                take = sgd.sgd_ if kind == "ours" else sgd.sgd_reference_
                take(p, g, m, **how, grad_scale=self._scale())      # type: ignore[arg-type]
            return {"param": p, "momentum": m}

        return function, {name: self.random(self._n()) for name in ("param", "grad", "momentum")}

    def adamw_8bit(self) -> tuple[Function, dict[str, Tensor]]:
        """A step with moments in 8 bits, whose bits the reference defines; there is no truth in fp64."""
        how = {"lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "step": STEP}

        def function(kind: str, t: dict[str, Tensor]) -> Results:
            moments = [moments8.zeros(self._n(), signed, self.device) for signed in (True, False)]
            for moment, name in zip(moments, ("exp_avg", "exp_avg_sq"), strict=True):
                moments8.encode_(moment, t[name])
            param = t["param"].clone()
            take = adamw.adamw_8bit_ if kind == "ours" else adamw.adamw_8bit_reference_
            take(param, t["grad"].clone(), *moments, **how, grad_scale=self._scale())    # type: ignore[arg-type]
            found = [each.float() for moment in moments for each in (moment.codes, moment.absmax)]
            return {"8-bit moments": torch.cat(found), "param, moments in 8 bits": param}

        operands = {name: self.random(self._n()) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}
        return function, operands | {"exp_avg_sq": operands["exp_avg_sq"].square()}

    def _n(self) -> int:
        """No multiple of a block or a vector."""
        return self.rank * self.d + 3

    def _scale(self) -> Tensor:
        return torch.tensor(SCALE, device=self.device)

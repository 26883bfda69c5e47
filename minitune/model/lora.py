"""Projection: several linears that share their input as one product, with their adapters."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.config import LoRA
from minitune.model.adapter import Adapter, make_adapter, matches
from minitune.ops import dora, few_rows, lora_gradients, lora_matmul
from minitune.ops.augmented import Augmented
from minitune.ops.lora_matmul import LoraWeights
from minitune.ops.nf4 import NF4Weight
from minitune.ops.nf4_linear import DecodeBuffer, FusedNF4, nf4_linear


class Projection(nn.Module):
    """Several linears that share their input, as one product: weight [N, K], the rows of each part below each other.

    ``parts`` maps a Hugging Face module path to its number of rows, ``rows`` to where they lie, ``own_adapters`` to its
    adapter: in the order of the parts, that of A's rows and B's columns in the images.

    A frozen weight lies in the compute dtype, or, with a ``buffer`` to decode into, in NF4 (`put_nf4`); one that is
    trained is split into a fp32 Parameter for each part (`unfreeze`), and `copied` into one again, in the compute
    dtype, wherever a product reads it.

    The forms that the weights take here, and who makes them:
    weight, bias       as the checkpoint has them, in the compute dtype; `weight` is empty where they lie in NF4
    nf4, fused         parts in NF4 as they come (`put_nf4`), and all of them, once they are there
    trained            fp32 Parameters of parts that are trained (`unfreeze`)
    cast               copies of those in the compute dtype, for passes without a backward (`refresh_cast`)
    images             the adapters' A and s·B in the compute dtype, as of the last pass (`Llama.refresh_images`)
    around             the weight in a buffer with the images in its margins (`lay_out`; ops/augmented.py)
    packed, decoded    for generation: laid out for a few rows, decoded once for single ones (`prepare`)
    """

    def __init__(self, parts: Mapping[str, int], in_features: int, bias: bool, dtype: torch.dtype,
                 device: torch.device, buffer: DecodeBuffer | None = None):
        super().__init__()
        self.parts = dict(parts)
        ends = list(itertools.accumulate(parts.values()))
        self.rows = {path: slice(end - parts[path], end) for path, end in zip(parts, ends, strict=True)}
        self.n_rows, self.n_columns = sum(parts.values()), in_features
        self.buffer, self.nf4 = buffer, None if buffer is None else dict[str, NF4Weight | Tensor]()
        self.fused: FusedNF4 | None = None
        rows = self.n_rows if buffer is None else 0
        self.weight = frozen(torch.empty(rows, in_features, dtype=dtype, device=device))
        self.bias = frozen(torch.empty(self.n_rows, dtype=dtype, device=device)) if bias else None
        self.adapters = nn.ModuleDict()
        self.own_adapters: dict[str, Adapter] = {}
        self.trained = nn.ParameterDict()
        self.enabled = True
        self.images: tuple[Tensor, Tensor] | None = None
        self.lengths: Tensor | None = None
        self.cast: tuple[Tensor, Tensor | None] | None = None
        self.around: Augmented | None = None
        self.packed: Tensor | None = None
        self.decoded: Tensor | None = None

    def hf_weights(self) -> dict[str, Tensor]:
        """Hugging Face tensor name -> that part's rows (or its own trained Parameter). Weights in NF4 are left out:
        see `nf4_shapes`."""
        found = {}
        if self.fused is not None:
            found = {f"{path}.weight": part for path, part in zip(self.parts, self.fused.parts, strict=True)
                     if isinstance(part, Tensor)}
        for path, rows in self.rows.items():
            for kind, fused in (("weight", self.weight if self.buffer is None else None), ("bias", self.bias)):
                if fused is not None:
                    name = f"{path}.{kind}"
                    key = _key(name)
                    found[name] = self.trained[key].data if key in self.trained else fused[rows]
        return found

    # -- weights in 4 bits -----------------------------------------------------------------------------------------

    def nf4_shapes(self) -> dict[str, tuple[int, int]]:
        """Hugging Face tensor name -> [rows, K] of each weight that lies in NF4, or shall: see `put_nf4`."""
        if self.buffer is None:
            return {}
        paths = self.parts if self.fused is None else dict(self.nf4_parts())
        return {f"{path}.weight": (self.parts[path], self.n_columns) for path in paths}

    def put_nf4(self, path: str, weight: NF4Weight | Tensor) -> None:
        """Give a part its weight; in 16 bits where its checkpoint left it so. With the last one all is ready."""
        assert self.buffer is not None and self.nf4 is not None and tuple(weight.shape) == (self.parts[path],
                                                                                           self.n_columns)
        self.nf4[path] = weight
        if len(self.nf4) < len(self.parts):
            return
        parts = [self.nf4[path] for path in self.parts]
        plain = [part for part in parts if isinstance(part, Tensor)]
        if len(plain) == len(parts):        # none of them is quantised: a projection like any other
            self.weight, self.buffer = frozen(torch.cat(plain)), None
        else:
            self.fused = FusedNF4(parts, self.buffer)
        self.nf4 = {}

    def nf4_parts(self) -> list[tuple[str, NF4Weight]]:
        """(path, weight) of each part that lies in NF4."""
        parts = [] if self.fused is None else zip(self.parts, self.fused.parts, strict=True)
        return [(path, part) for path, part in parts if isinstance(part, NF4Weight)]

    def trained_names(self) -> set[str]:
        """Hugging Face names of its trained weights and biases."""
        return {key.replace("/", ".") for key, value in self.trained.items() if value.requires_grad}

    def prepare(self, rows: int, dtype: torch.dtype) -> None:
        """Lay the weight out for many products with `rows` rows on a CPU: see `Llama.weights_at_hand`."""
        dense = self.operands().weight
        if not isinstance(dense, Tensor):
            if rows == 1 and dense.reads_packed(dtype):
                return
            dense = dense.decode(torch.zeros(dense.shape, dtype=dtype, device=dense.device))    # memory that is there
        self.packed = few_rows.pack(dense) if rows > 1 else None
        if self.packed is None and self.fused is not None:
            self.decoded = dense

    def _apply(self, fn: Any, recurse: bool = True) -> Projection:
        """`to(device)` takes the weights in NF4 along; their dtypes stay."""
        before = self.weight.device
        super()._apply(fn, recurse)
        if self.fused is not None and self.fused.device != self.weight.device:
            self.fused = self.fused.to(self.weight.device)
        if self.weight.device != before:
            self.lay_out()      # what it lay in was left behind, and another device may take another way
        return self

    def laid_out(self) -> Augmented | None:
        """What the weight lies in. Whoever copied the model, or put another tensor in the weight's place, tore the two
        apart: then it is laid out anew."""
        around = self.around
        if around is not None and around.nf4 is None and around.weight.data_ptr() != self.weight.data_ptr():
            self.lay_out()
        return self.around

    def lay_out(self) -> None:
        """Lay the frozen weight out for the augmented product, if that is the fastest here."""
        self.around = None
        rank = self.image_shapes()[0][0]
        if not rank or self.trained or not lora_matmul.wants_margins(self.n_rows, self.n_columns, rank, self.weight,
                                                                     self.fused is not None):
            return
        self.around = Augmented(self.weight if self.fused is None else self.fused, rank, self.weight.dtype)
        if self.fused is None:
            self.weight.data = self.around.weight

    # -- adapters --------------------------------------------------------------------------------------------------

    def add_adapters(self, lora: LoRA, seed: int) -> None:
        """An adapter for each part that `lora.targets` names. DoRA's start from the weights, which must be there."""
        for path, count in self.parts.items():
            adapter = make_adapter(path, self.n_columns, count, lora, seed, self.weight.device)
            if adapter is not None:
                self.adapters[_key(path)] = self.own_adapters[path] = adapter
        if self.has_magnitudes:
            lengths = self._row_lengths()
            for path, adapter in self.own_adapters.items():
                adapter.start_magnitude(lengths[self.rows[path]])

    @property
    def has_magnitudes(self) -> bool:
        """Whether an adapter is one of DoRA's."""
        return any(adapter.m is not None for adapter in self.own_adapters.values())

    def _row_lengths(self) -> Tensor:
        """fp32 [N]: the length of each row of W + s·B·A, with the images as they are; of W where there are none."""
        a, b = self.images or (None, None)
        if self.fused is None:
            return dora.row_lengths(self.weight, a, b)
        with self.fused.decoded() as weight:
            return dora.row_lengths(weight, a, b)

    @torch.no_grad()
    def refresh_lengths(self) -> None:
        """For DoRA: the lengths that go with the images. A pass without the adapters leaves them to the others."""
        if self.enabled and self.has_magnitudes:
            self.lengths = self._row_lengths()

    def gain(self) -> Tensor | None:
        """fp32 [N], what DoRA multiplies the rows of the output by, 1 for other parts; None without DoRA."""
        if self.lengths is None or not self.enabled:
            return None
        return torch.cat([self.own_adapters[path].gain(self.lengths[rows]) if path in self.own_adapters
                          else torch.ones_like(self.lengths[rows]) for path, rows in self.rows.items()])

    def image_slices(self) -> Iterator[tuple[Adapter, slice, slice]]:
        """(adapter, its rows of the fused weight, its place among the ranks)."""
        start = 0
        for path, adapter in self.own_adapters.items():
            yield adapter, self.rows[path], slice(start, start + adapter.rank)
            start += adapter.rank

    def image_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the images a [R, K] and b [N, R]."""
        width = sum(adapter.rank for adapter in self.own_adapters.values())
        return (width, self.n_columns), (self.n_rows, width)

    def image_copies(self) -> Iterator[tuple[Tensor, Tensor, float]]:
        """(slice of an image, fp32 parameter, factor) of every copy that brings the images up to date."""
        if self.images is not None:
            a, b = self.images
            for adapter, rows, ranks in self.image_slices():
                yield a[ranks], adapter.A.detach(), 1.0
                yield b[rows, ranks], adapter.B.detach(), adapter.scale

    def operands(self) -> LoraWeights:
        """What the product reads; without a and b where there is no adapter or it is switched off."""
        a, b = self.images if self.images is not None and self.enabled else (None, None)
        if self.trained:
            return LoraWeights(*(self.cast or self.copied()), a, b, self.packed)
        weight = self.weight if self.fused is None else self.fused if self.decoded is None else self.decoded
        gain = self.gain()
        return LoraWeights(weight, self.bias, a, b, self.packed, self.laid_out(),
                           None if gain is None else gain.detach())

    # -- what is trained -------------------------------------------------------------------------------------------

    def trained_parameters(self) -> list[Tensor]:
        """fp32 parameters that get a gradient, in the order of `gradients`: A and B of each adapter unless they are
        switched off, then the `base_parameters`."""
        adapters = self.own_adapters.values() if self.enabled else ()
        return [p for adapter in adapters for p in (adapter.A, adapter.B)] + self.base_parameters()

    def base_parameters(self) -> list[Tensor]:
        """Weights and biases that are trained."""
        return [p for p in self.trained.values() if p.requires_grad]

    def reads_input(self, s: Tensor | None) -> bool:
        """Whether `gradients` wants x: for adapters, whose S is there, or for a weight."""
        return s is not None or any(p.dim() == 2 for p in self.base_parameters())

    def gradients(self, dy: Tensor, x: Tensor | None, s: Tensor | None, ds: Tensor | None,
                  w: LoraWeights) -> list[Tensor]:
        """Gradients of `trained_parameters` from dy [T, N], x [T, K] and the S and dS of lora_matmul. x may be None
        where nothing `reads_input`.

        The adapters' products serve all parts at once; each adapter takes its own rows and columns, B's with the scale.
        """
        found: list[Tensor] = []
        if x is not None and s is not None and ds is not None:      # else no adapter, or switched off
            da, db = lora_matmul.backward_adapters(dy, x, s, ds, w)
            for adapter, rows, ranks in self.image_slices():
                found += lora_gradients.apart(da[ranks], db[rows, ranks], adapter.scale)
        for key, parameter in self.trained.items():
            if parameter.requires_grad:
                path, _, kind = key.replace("/", ".").rpartition(".")
                part = dy[:, self.rows[path]]
                if kind == "bias":
                    found.append(part.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32)))
                else:
                    assert x is not None
                    found.append(lora_matmul.backward_weight(part, x))
        return found

    def unfreeze(self, patterns: tuple[str, ...]) -> None:
        """Make a fp32 Parameter of every part of the weight or bias whose full name a pattern names; its siblings stay
        frozen in the compute dtype."""
        weights = self.hf_weights()
        names = {name for name in weights if any(matches(pattern, name) for pattern in patterns)}
        for kind in ("weight", "bias"):
            if not any(name.endswith(kind) for name in names):
                continue
            for name, value in [each for each in weights.items() if each[0].endswith(kind)]:
                # A sibling that stays as it is is copied too: a view would keep the memory of all of them.
                copy = value.to(torch.float32 if name in names else value.dtype, copy=True)
                self.trained[_key(name)] = nn.Parameter(copy, requires_grad=name in names)
            setattr(self, kind, frozen(getattr(self, kind)[:0].clone()))
            self.around = None

    def is_split(self, kind: str) -> bool:
        """Whether its "weight" or "bias" lies in parts, since one of them is trained."""
        return any(key.endswith(kind) for key in self.trained)

    @torch.no_grad()
    def copied(self) -> tuple[Tensor, Tensor | None]:
        """(weight [N, K], bias [N] or None) in the compute dtype; what is split, as a copy of its parts."""
        whole: list[Tensor | None] = []
        for kind, fused in (("weight", self.weight), ("bias", self.bias)):
            if fused is not None and self.is_split(kind):
                copy = fused.new_empty(self.n_rows, *fused.shape[1:])
                for path, rows in self.rows.items():
                    copy[rows].copy_(self.trained[_key(f"{path}.{kind}")])
                whole.append(copy)
            else:
                whole.append(fused)
        weight, bias = whole
        assert weight is not None
        return weight, bias

    @property
    def n_copied(self) -> int:
        """Values that `copied` makes anew."""
        return self.n_rows * (self.n_columns * self.is_split("weight") + self.is_split("bias"))

    def refresh_cast(self) -> None:
        """For passes without gradients, which may be many tokens' generation: trained parts as one weight. In training
        each half makes its own, and frees it."""
        self.cast = self.copied() if self.trained and not torch.is_grad_enabled() else None

    # -- the composed path -----------------------------------------------------------------------------------------

    @property
    def needs_composed(self) -> bool:
        """Dropout and DoRA take plain autograd instead of the hand-written halves."""
        dropout = self.training and any(a.dropout for a in self.own_adapters.values())
        return dropout or (self.enabled and self.has_magnitudes)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, K] -> [T, N] by plain autograd: the specification, and the path of the rare variants.

        DoRA's factor meets the sum of base and adapter, the bias comes behind it. (PEFT gives the base a dropped x as
        well where there is dropout; here the adapter alone sees it.)
        """
        gain = self.gain()
        if gain is not None:
            y = self._sum(x, None) * gain
            return (y if self.bias is None else y + self.bias).to(x.dtype)
        return self._sum(x, self.bias)

    def _sum(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, K] -> the base's product and the adapters' terms [T, N]."""
        weight: Tensor = self._joined("weight", x.dtype) if self.is_split("weight") else self.weight
        if bias is not None and self.is_split("bias"):
            bias = self._joined("bias", x.dtype)
        y = F.linear(x, weight, bias) if self.fused is None else nf4_linear(x, self.fused, bias)
        if not self.enabled:
            return y
        adapters = self.own_adapters
        if not adapters:
            return y
        zero = y.new_zeros(())
        terms = [adapters[path](x) if path in adapters else zero.expand(len(x), count)
                 for path, count in self.parts.items()]
        return y + torch.cat(terms, dim=-1)

    def _joined(self, kind: str, dtype: torch.dtype) -> Tensor:
        """The trained weights or biases of all parts, differentiable."""
        return torch.cat([self.trained[_key(f"{path}.{kind}")].to(dtype) for path in self.parts])


def frozen(value: Tensor) -> nn.Parameter:
    """A Parameter that gets no gradient."""
    return nn.Parameter(value, requires_grad=False)


def _key(name: str) -> str:
    return name.replace(".", "/")     # a ModuleDict takes no dots

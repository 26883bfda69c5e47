"""The network: a Llama-family transformer over a flat stream of packed documents. Families differ by config alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitune.arguments import warn
from minitune.config import LoRA, MemoryPolicy, ModelConfig
from minitune.model import half
from minitune.model.adapter import HEAD, Adapter, check_targets, matches
from minitune.model.attention_half import AttentionHalf
from minitune.model.head import Head
from minitune.model.lora import Projection, frozen
from minitune.model.memory import Trained, choose_policy, policies
from minitune.model.mlp_half import MlpHalf
from minitune.model.offload import Parking
from minitune.model.token_rows import TokenRows
from minitune.model.train_patterns import train_patterns
from minitune.model.turn import Turn, in_turn
from minitune.ops import few_rows, huge_pages, rope
from minitune.ops.documents import Documents
from minitune.ops.lora_images import Images
from minitune.ops.nf4 import NF4Weight
from minitune.ops.nf4_linear import DecodeBuffer
from minitune.ops.rms_norm import rms_norm


class Layer(nn.Module):
    """One transformer layer: x -> x + attention(norm(x)), then x -> x + mlp(norm(x)). The last sum is left to whoever
    comes next, who takes it in one pass with the norm."""

    def __init__(self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device,
                 buffer: DecodeBuffer | None = None):
        super().__init__()
        self.attention = AttentionHalf(config, index, dtype, device, buffer)
        self.mlp = MlpHalf(config, index, dtype, device, buffer)

    def forward(self, x: Tensor, branch: Tensor | None, context: half.Context) -> tuple[Tensor, Tensor]:
        """x and branch [T, d_model], whose sum is the layer's input -> the same of its output."""
        return half.run_layer(self.attention, self.mlp, x, branch, context)


class Llama(nn.Module):
    """Embedding, layers, final norm and head. All weights frozen until `add_adapters` or `unfreeze`.

    `dtype` is the compute dtype: frozen weights and activations. What is trained lies in fp32 and is cast for use.
    The storage is uninitialised: a checkpoint or `init_weights` fills it through `hf_weights`. With ``quantized`` the
    linears of the layers have none: they are given to `put_nf4`, and decoded into one buffer for each product.
    """

    head: nn.Parameter | None

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str = "cpu",
                 memory: MemoryPolicy = "auto", quantized: bool = False):
        super().__init__()
        device = torch.device(device)
        buffer = DecodeBuffer(dtype) if quantized else None
        self.config, self.memory = config, memory
        self.embedding = frozen(torch.empty(config.vocab_size, config.d_model, dtype=dtype, device=device))
        self.layers = nn.ModuleList(Layer(config, i, dtype, device, buffer) for i in range(config.n_layers))
        self.norm = frozen(torch.empty(config.d_model, dtype=dtype, device=device))
        head = None if config.tied_head else frozen(torch.empty_like(self.embedding))
        self.register_parameter("head", head)
        self.output = Head()
        self.dtype = dtype
        self._policies: dict[int, MemoryPolicy] = {}
        self._fastest: MemoryPolicy = "keep"
        self._images, self._parking = Images(), Parking()
        self.turn, self._at_hand = Turn(), 0
        huge_pages.ask(self.parameters())

    # -- forward -----------------------------------------------------------------------------------------------------

    @in_turn
    def forward(self, tokens: Tensor, positions: Tensor, documents: Documents) -> Tensor:
        """tokens and positions int64 [T] on the network's device -> hidden [T, d_model] after the final norm."""
        self.refresh_images()
        cos, sin = rope.tables(self.config, positions, documents)
        policy = self._policy(len(tokens))
        context = half.Context(cos, sin, documents, policy, self._parking if policy == "offload" else None)
        x, branch = self.embed(tokens), None
        for layer in self.layers:
            x, branch = layer(x, branch, context)
        return rms_norm(x, self.norm, self.config.norm_eps, branch)

    def check_length(self, length: int) -> None:
        """Warn, once for each place in the code, of documents longer than the model was made for."""
        if length > self.config.max_positions and self.config.rope.kind != "dynamic":
            warn(f"a document of {length} tokens is longer than the {self.config.max_positions} positions "
                 "that config.json names; the model may be poor there")

    def _policy(self, tokens: int) -> MemoryPolicy:
        """The memory policy of a pass over so many tokens, decided at the first one."""
        if tokens not in self._policies and torch.is_grad_enabled():
            if self.needs_composed and not self._policies:
                warn("dropout and DoRA take plain autograd through the layers, which is slower than the "
                     "hand-written backward")
            self._policies[tokens] = self.policy_of(tokens)
        return self._policies.get(tokens, "keep")

    @property
    def needs_composed(self) -> bool:
        """Whether a layer trains under plain autograd."""
        return any(layer.attention.needs_composed or layer.mlp.needs_composed for layer in self.blocks())

    def policy_of(self, tokens: int) -> MemoryPolicy:
        """The memory policy of a training pass over so many tokens, by what is free now."""
        return choose_policy(self.config, tokens, self.memory, self.dtype, self.device, self.needs_composed,
                             self.trained_values(), self._fastest)

    def save_memory(self, tokens: int) -> MemoryPolicy | None:
        """Take, from now on, a cheaper memory policy than that of passes over so many tokens -> its name; None where
        there is none, or `memory` was not left to be chosen ("auto"). The results stay the same bit for bit."""
        if self.memory != "auto":
            return None
        known, before = policies(self.device, self.needs_composed), self._policy(tokens)
        self._fastest = known[min(known.index(before) + 1, len(known) - 1)]
        self._policies.clear()
        after = self._policy(tokens)
        return None if after == before else after

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens int64 [T] -> [T, d_model] in the compute dtype."""
        x = F.embedding(tokens, self.embedding).to(self.dtype)
        return x if self.output.rows is None or not self.output.enabled else self.output.rows.embed(x, tokens)

    @in_turn
    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, d_model] -> fp32 [n, vocab_size]."""
        return self.output.logits(hidden, self.head_weight)

    @contextlib.contextmanager
    def weights_at_hand(self, rows: int) -> Iterator[None]:
        """Within it a CPU finds the weights as products with `rows` rows like them, beside where they lie: packed for
        a few rows; for one row as they are, where they lie in NF4 decoded once if the extension is not there. Streams,
        of one row each, may be within it at once; whoever has more rows keeps his turn until he leaves."""
        projections = self.projections()
        try:
            with self.turn:
                self._at_hand += 1
                if self._at_hand == 1 or rows > 1:
                    for projection in projections:
                        projection.prepare(rows, self.dtype)
                    self.output.packed = few_rows.pack(self.head_weight.to(self.dtype)) if rows > 1 else None
            yield
        finally:
            with self.turn:
                self._at_hand -= 1
                for projection in projections:
                    projection.packed, projection.decoded = None, projection.decoded if self._at_hand else None
                self.output.packed = None

    @in_turn
    def losses_at(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels int64 [n] -> negative log-likelihood fp32 [n]; logits are never whole."""
        return self.output.losses_at(hidden, self.head_weight, labels, label_smoothing)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def head_weight(self) -> Tensor:
        """[vocab_size, d_model]: the embedding itself where the head is tied to it."""
        return self.embedding if self.head is None else self.head

    # -- weights and adapters by their Hugging Face names --------------------------------------------------------------

    def blocks(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def projections(self) -> list[Projection]:
        return [projection for layer in self.blocks() for half_ in (layer.attention, layer.mlp)
                for projection in half_.projections()]

    def hf_weights(self) -> dict[str, Tensor]:
        """Every tensor of the checkpoint by its Hugging Face name, as a view of where it lies here; those in NF4 are
        left out."""
        found = {name: getattr(owner, attribute).data for name, owner, attribute in self.single_weights()}
        for projection in self.projections():
            found |= projection.hf_weights()
        return found

    def homes(self) -> list[tuple[list[str], nn.Parameter]]:
        """(Hugging Face names, the Parameter that is their rows below each other) of every weight but those in NF4."""
        found = [([name], getattr(owner, attribute)) for name, owner, attribute in self.single_weights()]
        return found + [([f"{path}.weight" for path in projection.parts], projection.weight)
                        for projection in self.projections() if projection.buffer is None]

    def nf4_shapes(self) -> dict[str, tuple[int, int]]:
        """Hugging Face name -> [rows, K] of every weight that lies in NF4."""
        return {name: shape for projection in self.projections() for name, shape in projection.nf4_shapes().items()}

    def put_nf4(self, name: str, weight: NF4Weight | Tensor) -> None:
        """Give the weight of this Hugging Face name its values."""
        path = name.removesuffix(".weight")
        next(p for p in self.projections() if path in p.parts).put_nf4(path, weight)

    def dense_weights(self) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, Callable[[], Tensor]]]:
        """(Hugging Face name, shape, dtype, what gives its values) of every tensor of the checkpoint. Those in NF4
        decode when they are asked for, one by one; their dtype is the one that they were quantised from."""
        for name, value in self.hf_weights().items():
            yield name, tuple(value.shape), value.dtype, functools.partial(Tensor.detach, value)
        for projection in self.projections():
            for path, part in projection.nf4_parts():
                yield f"{path}.weight", part.shape, part.dtype, functools.partial(part.dequantize, self.dtype)

    def trained_names(self) -> set[str]:
        """Hugging Face names of the base weights that are trained."""
        found = {name for name, owner, attribute in self.single_weights() if getattr(owner, attribute).requires_grad}
        return found.union(*(projection.trained_names() for projection in self.projections()))

    def single_weights(self) -> list[tuple[str, nn.Module, str]]:
        """(Hugging Face name, module, attribute) of each weight outside the projections."""
        found: list[tuple[str, nn.Module, str]] = [
            ("model.embed_tokens.weight", self, "embedding"), ("model.norm.weight", self, "norm"),
            ("lm_head.weight", self, "head")]
        for i, layer in enumerate(self.blocks()):
            prefix = f"model.layers.{i}"
            found += [(f"{prefix}.input_layernorm.weight", layer.attention, "norm"),
                      (f"{prefix}.post_attention_layernorm.weight", layer.mlp, "norm"),
                      (f"{prefix}.self_attn.q_norm.weight", layer.attention, "q_norm"),
                      (f"{prefix}.self_attn.k_norm.weight", layer.attention, "k_norm")]
        return [place for place in found if getattr(place[1], place[2]) is not None]

    def adapters(self) -> dict[str, Adapter]:
        """Every adapter by the Hugging Face path of its linear."""
        found = {path: a for projection in self.projections() for path, a in projection.own_adapters.items()}
        return found if self.output.adapter is None else found | {HEAD: self.output.adapter}

    def linears(self) -> list[str]:
        """The Hugging Face paths of all linears that can be adapted."""
        return [*(path for projection in self.projections() for path in projection.parts), HEAD]

    def add_adapters(self, lora: LoRA, seed: int) -> None:
        """Put an adapter on every linear that `lora.targets` names. InputError for a name that fits nothing."""
        check_targets(lora, self.linears())
        for projection in self.projections():
            projection.add_adapters(lora, seed)
            projection.lay_out()
        self.output.add_adapter(lora, seed, self.head_weight)

    @torch.no_grad()
    def grow(self, vocab_size: int) -> None:
        """Give the embedding, and a head of its own, rows for a larger vocabulary. The new rows are the mean of the old
        ones, from which a model's guesses change least (Hewitt 2021, "Initializing new word embeddings")."""
        for name in ("embedding", "head"):
            old = getattr(self, name)
            if old is not None:
                more = old.float().mean(0).to(old.dtype).expand(vocab_size - len(old), -1)
                setattr(self, name, nn.Parameter(torch.cat([old, more]), requires_grad=old.requires_grad))
        self.config = replace(self.config, vocab_size=vocab_size)

    def train_tokens(self, ids: Sequence[int], head: bool = True) -> None:
        """Train the rows of these tokens beside an adapter, those of a head of its own only with `head`; rows that are
        trained already go on from where they stand."""
        known = self.output.rows
        rows = TokenRows(ids, self.embedding, self.head if head else None, self.config.tied_head)
        if known is not None:
            rows.take(known)
        self.output.rows = rows

    @contextlib.contextmanager
    def adapters_switched(self, on: bool) -> Iterator[None]:
        """Within it the network computes with its adapters and trained token rows, or as its base does."""
        before = self.output.enabled
        if before == on:
            yield
            return
        try:
            self._switch(on)
            yield
        finally:
            self._switch(before)

    def _switch(self, on: bool) -> None:
        self.output.enabled = on
        for projection in self.projections():
            projection.enabled = on

    def refresh_images(self) -> None:
        """Copies of all adapters in the compute dtype, laid out for the products, made anew from the fp32 parameters.

        Anew in each forward pass: whoever changed a parameter, and however, the next pass reads it, and a backward
        that is still to come keeps the images of its own forward.
        """
        for projection in self.projections():
            projection.refresh_cast()
        adapted = [p for p in self.projections() if p.adapters]
        shapes = [shape for projection in adapted for shape in projection.image_shapes()]
        flat = torch.zeros(sum(n * k for n, k in shapes), dtype=self.dtype, device=self.device)
        images = [part.view(shape) for part, shape in zip(flat.split([n * k for n, k in shapes]), shapes, strict=True)]
        for i, projection in enumerate(adapted):
            projection.images = (images[2 * i], images[2 * i + 1])
        self._images.refresh(flat, [copy for projection in adapted for copy in projection.image_copies()])
        for projection in adapted:
            around = projection.laid_out()
            if around is not None and projection.images is not None:
                around.fill(*projection.images)
            projection.refresh_lengths()
        self.output.refresh(self.head_weight, self.dtype)

    # -- training base weights ----------------------------------------------------------------------------------------

    def trained_values(self) -> Trained:
        """How much is trained, and what of it takes memory beside parameters, gradients and moments."""
        halves = [(layer.attention, layer.mlp) for layer in self.blocks()]
        copied = [sum(p.n_copied for half in layer for p in half.projections()) for layer in halves]
        gradients = [sum(p.numel() for half in layer for p in half.base_parameters()) for layer in halves]
        outside = [p.numel() for p in (self.embedding, self.head_weight) if p.requires_grad]
        trained = [p for p in self.parameters() if p.requires_grad]
        return Trained(sum(p.numel() for p in trained), sum(copied), max(copied), max(gradients),
                       max(outside, default=0) * (2 if self.head is None else 1),
                       sum(p.numel() for p in trained if p.grad is None))

    def unfreeze(self, train: str | list[str] | tuple[str, ...]) -> None:
        """Train the base weights that `train_patterns` finds in `train`, in fp32. Gradients of a tied head are those of
        the embedding."""
        patterns = train_patterns(train, self.config, self.hf_weights(), self.nf4_shapes())
        for projection in self.projections():
            projection.unfreeze(patterns)
        for name, owner, attribute in self.single_weights():
            if any(matches(pattern, name) for pattern in patterns):
                setattr(owner, attribute, nn.Parameter(getattr(owner, attribute).detach().float().clone()))

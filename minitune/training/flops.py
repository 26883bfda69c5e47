"""What a training step computes: floating-point operations counted from shapes, as they must be for frozen weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minitune.data.batch import Batch
from minitune.model.llama import Layer, Llama
from minitune.model.lora import Projection


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The sizes that decide what a token costs. All count elements; ``windows`` has one entry a layer.

    ``forward_only`` are the linears' weights of the ``idle`` lowest layers, below all that is trained, which the
    backward never reaches; ``frozen`` and ``trained`` those of the other layers. ``head`` is the head's weight, and
    ``head_products`` how many of its three products are formed (logits, the input's gradient, its own). ``adapters``
    are all A and B, ``attention_width`` is heads · head_dim. ``reference``: a forward pass of the base comes on top.
    """

    forward_only: int = 0
    idle: int = 0
    frozen: int
    trained: int
    head: int
    head_products: int
    adapters: int
    attention_width: int
    windows: tuple[int | None, ...]
    reference: bool = False

    def of_batch(self, batch: Batch) -> float:
        """FLOPs of one batch in training: 4 for each element of a frozen weight and token (forward and the gradient of
        the input; a frozen weight has none of its own), 6 for a trained one and the adapters, the head at trained
        positions alone, and 3.5 times the forward of attention. No recomputation is counted, and no filler.
        """
        return self.of_documents(batch.lengths, batch.n_trained)

    def of_documents(self, lengths: Sequence[int], n_trained: int) -> float:
        """The same of documents of so many tokens each, `n_trained` positions of them trained."""
        linears = 2 * self.forward_only + 4 * self.frozen + 6 * (self.trained + self.adapters)
        heads = self.head_products
        if self.reference:
            linears, heads = linears + 2 * (self.forward_only + self.frozen + self.trained), heads + 1
        return linears * sum(lengths) + 2 * heads * self.head * n_trained + sum(map(self._attention, lengths))

    def _attention(self, length: int) -> float:
        """FLOPs of one document in all layers: forward 4 · width for each pair of a query and a key it may see."""
        pairs = 0.0
        for layer, window in enumerate(self.windows):
            seen = min(window or length, length)
            passes = (1.0 if layer < self.idle else 3.5) + self.reference
            pairs += passes * (seen * length - seen**2 / 2)
        return 4 * self.attention_width * pairs


def costs_of(network: Llama, reference: bool = False) -> Costs:
    """The Costs of a network as it stands: what is trained and which adapters it carries."""
    config, blocks = network.config, network.blocks()
    moving = [any(p.requires_grad for p in block.parameters()) for block in blocks]
    whole = network.embedding.requires_grad or network.output.rows is not None      # the backward reaches the embedding
    idle = 0 if whole else [*moving, True].index(True)
    sizes = [_linears(block) for block in blocks]
    trained = sum(own for _, own in sizes)
    head = network.head_weight
    return Costs(
        forward_only=sum(total for total, _ in sizes[:idle]), idle=idle,
        frozen=sum(total for total, _ in sizes[idle:]) - trained, trained=trained, head=head.numel(),
        head_products=1 + head.requires_grad + (idle < len(blocks) or network.norm.requires_grad),
        adapters=sum(p.numel() for adapter in network.adapters().values() for p in (adapter.A, adapter.B)),
        attention_width=config.n_heads * config.head_dim, windows=config.windows, reference=reference)


def _linears(block: Layer) -> tuple[int, int]:
    """Elements of a layer's linears: all, and those of them that are trained."""
    own = [module for module in block.modules() if isinstance(module, Projection)]
    return (sum(p.n_rows * p.n_columns for p in own),
            sum(value.numel() for p in own for value in p.trained.values() if value.dim() == 2))

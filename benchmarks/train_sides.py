"""The sides of bench_train, each run in a process of its own: minitune, transformers + PEFT, the products alone.

``python -m benchmarks.train_sides SIDE --folder … --size … --layout …`` serves the commands of that side. Nothing heavy
is imported before the side asks for it, since the time from process start to the first logits is measured here.
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import shapes
from benchmarks.harness import memory, serve
from benchmarks.shapes import ALPHA, LR, NEW_TOKENS, PROMPT, RANK, SEED, SIZES, Size, layout, token_ids
from minitune.config import LINEAR_NAMES

if TYPE_CHECKING:
    import torch

    from minitune.config import Quant


class Trainer(ABC):
    """What both trainers share: timed steps on one batch that never changes, so the loss must fall."""

    optimizer: Any
    parameters: list[torch.nn.Parameter]

    @abstractmethod
    def loss(self) -> torch.Tensor:
        """The mean loss of the batch, ready for backward."""

    def one_step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def steps(self, n: int, keep: bool = True) -> dict[str, Any]:
        """Run `n` steps; seconds and loss of each, and the gradient's norm after the last. keep: freed memory, as
        `mt.load` has it, so that no side pays for its pages anew in every step; else malloc is as it comes."""
        import torch

        from minitune.model.memory import reuse_freed_memory

        if keep:
            reuse_freed_memory()
        seconds, losses = [], []
        for _ in range(n):
            begun = time.perf_counter()
            losses.append(self.one_step())
            seconds.append(time.perf_counter() - begun)
        norms = [p.grad.float().norm() for p in self.parameters if p.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        return {"seconds": seconds, "losses": losses, "grad_norm": norm, "memory": memory(),
                "threads": torch.get_num_threads()}

    def profile(self) -> dict[str, Any]:
        """One step's operators by their own time, as text."""
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            self.one_step()
        return {"text": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)}


class Ours(Trainer):
    """minitune, as a user would call it: with adapters, or with `full` training every weight."""

    def __init__(self, folder: Path, ids: list[int], lengths: tuple[int, ...], quant: Quant | None,
                 full: bool = False, moments: str = "fp32") -> None:
        import torch

        import minitune as mt

        trained: dict[str, Any] = {"train": "full"} if full else {"lora": mt.LoRA(rank=RANK, alpha=ALPHA)}
        self.model = mt.load(folder, dtype=torch.bfloat16, quant=quant, seed=SEED, **trained)
        self.model.train()
        bounds = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        tokens = torch.tensor(ids)
        labels = tokens.roll(-1)
        labels[bounds[1:].long() - 1] = -100
        self.batch = mt.Batch(tokens=tokens, labels=labels, cu_seqlens=bounds)
        self.parameters = list(self.model.trainable_parameters())
        self.optimizer = mt.AdamW(self.parameters, lr=LR, moments=moments)

    def loss(self) -> torch.Tensor:
        return self.model.loss(self.batch)


class Peers(Trainer):
    """transformers + PEFT: `adapters` fp32 (as PEFT comes) or bf16, `attention` sdpa or eager, compiled or not; with
    `quant` over 4-bit weights of bitsandbytes."""

    def __init__(self, folder: Path, ids: list[int], lengths: tuple[int, ...], adapters: str, attention: str,
                 compiled: bool, quant: Quant | None) -> None:
        import peft
        import torch
        import transformers

        torch.manual_seed(SEED)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16,
                                                                 attn_implementation=attention, **four_bits(quant))
        wanted = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(LINEAR_NAMES), lora_dropout=0.0,
                                 task_type="CAUSAL_LM")
        self.model: Any = peft.get_peft_model(base, wanted, autocast_adapter_dtype=adapters == "fp32")
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        expected = torch.float32 if adapters == "fp32" else torch.bfloat16
        if any(p.dtype != expected for p in self.parameters):
            raise RuntimeError(f"the adapters are not {expected}")
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.ids = torch.tensor(ids).view(len(lengths), lengths[0])
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.forward(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss


class FullPeers(Trainer):
    """transformers, every weight trained: `weights` fp32 under autocast to bf16, as ours are, or all of it in bf16, the
    moments too, which rounds every update to 8 bits; `attention` sdpa or eager, compiled or not."""

    def __init__(self, folder: Path, ids: list[int], lengths: tuple[int, ...], weights: str, attention: str,
                 compiled: bool) -> None:
        import torch
        import transformers

        torch.manual_seed(SEED)
        self.wide = weights == "fp32"
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32 if self.wide else torch.bfloat16, attn_implementation=attention)
        self.model.train()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.ids = torch.tensor(ids).view(len(lengths), lengths[0])
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self) -> torch.Tensor:
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.wide):
            loss: torch.Tensor = self.forward(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss


def four_bits(quant: str | None) -> dict[str, Any]:
    """What transformers is told for weights in NF4, double quantised for "nf4-dq", computing in bf16."""
    if quant is None:
        return {}
    import torch
    import transformers

    return {"device_map": "cpu", "quantization_config": transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=quant == "nf4-dq")}


class Products:
    """The machine's limit: a step's own matrix products on the same weights, results allocated beforehand, each as
    minitune multiplies (`minitune.ops.products`: the library's product, by parts where that leaves threads idle).

    Forward Y = X·Wᵀ and backward dX = dY·W of every linear and of the head, for T tokens, in bf16. Frozen weights have
    no gradient, so there is no third product. No adapters, no attention, nothing elementwise.
    """

    def __init__(self, folder: Path, n_tokens: int) -> None:
        import torch

        weights = fused_weights(folder)
        torch.manual_seed(SEED)
        widths = sorted({width for weight in weights for width in weight.shape})
        given = {width: torch.randn(n_tokens, width).bfloat16() for width in widths}
        result = {width: torch.empty(n_tokens, width, dtype=torch.bfloat16) for width in widths}
        self.calls = [(given[w.shape[1]], w.t(), result[w.shape[0]]) for w in weights]
        self.calls += [(given[w.shape[0]], w, result[w.shape[1]]) for w in reversed(weights)]

    def steps(self, n: int) -> dict[str, Any]:
        import torch

        from minitune.ops import products

        seconds = []
        for _ in range(n):
            begun = time.perf_counter()
            for left, right, out in self.calls:
                products.mm(left, right, out)
            seconds.append(time.perf_counter() - begun)
        flops = sum(2 * left.shape[0] * right.shape[0] * right.shape[1] for left, right, _ in self.calls)
        return {"seconds": seconds, "flops": flops, "memory": memory(), "threads": torch.get_num_threads()}


def fused_weights(folder: Path) -> list[torch.Tensor]:
    """A checkpoint's linears in the order of a step, q/k/v and gate/up in one, the head last; bf16 [out, in]."""
    import torch
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    layers = sum(name.endswith("q_proj.weight") for name in tensors)
    found = []
    for layer in range(layers):
        at = f"model.layers.{layer}."
        for names in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                      ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]):
            found.append(torch.cat([tensors[f"{at}{name}.weight"] for name in names]))
    return [*found, tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])]


class OursStart:
    """minitune from process start: load, first logits, greedy answers."""

    def __init__(self, folder: Path, prompt: list[int], quant: Quant | None) -> None:
        import torch

        import minitune as mt

        self.imported = time.monotonic()
        self.prompt = prompt
        self.model = mt.load(folder, dtype=torch.bfloat16, quant=quant)
        self.loaded = time.monotonic()
        self.model.eval()
        with torch.no_grad():
            self.first = self.model.logits(torch.tensor(prompt))

    def generate(self) -> list[int]:
        return list(self.model.generate(self.prompt, NEW_TOKENS))


class PeersStart:
    """The same by transformers (no adapter, so PEFT is not even imported)."""

    def __init__(self, folder: Path, prompt: list[int], quant: Quant | None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.imported = time.monotonic()
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **four_bits(quant))
        self.loaded = time.monotonic()
        self.model.eval()
        self.prompt = torch.tensor([prompt])
        with torch.no_grad():
            self.first = self.model(self.prompt).logits[0].float()

    def generate(self) -> list[int]:
        import torch

        with torch.no_grad():
            out = self.model.generate(self.prompt, attention_mask=torch.ones_like(self.prompt), do_sample=False,
                                      max_new_tokens=NEW_TOKENS, use_cache=True)
        return [int(i) for i in out[0, self.prompt.shape[1]:]]


def start(kind: type[OursStart] | type[PeersStart], folder: Path, ids: list[int],
          quant: Quant | None) -> dict[str, Any]:
    """Handlers of a starting side; the loading itself has happened when this returns."""
    side = kind(folder, ids[:PROMPT], quant)
    ready, used = time.monotonic(), memory()
    if not bool(side.first.isfinite().all()):
        raise RuntimeError("the first logits are not finite")

    def first_logits() -> dict[str, Any]:
        best = [int(i) for i in side.first.argmax(-1)]
        return {"at": ready, "imported": side.imported, "loaded": side.loaded, "memory": used, "argmax": best,
                "mean_square": float(side.first.square().mean())}

    def generate(n: int) -> dict[str, Any]:
        seconds, new = [], []
        for _ in range(n):
            begun = time.perf_counter()
            new = side.generate()
            seconds.append(time.perf_counter() - begun)
        return {"seconds": seconds, "new": new, "memory": memory()}

    def profile() -> dict[str, Any]:
        import torch

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            side.generate()
        return {"text": profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)}

    return {"first_logits": first_logits, "generate": generate, "profile": profile}


def handlers(told: argparse.Namespace, size: Size, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Build the side that was asked for and name the commands it answers."""
    ids = token_ids(size, max(sum(lengths), PROMPT))
    if told.side.endswith("-start"):
        return start(OursStart if told.side == "ours-start" else PeersStart, told.folder, ids, told.quant)
    ids = ids[:sum(lengths)]
    if told.side == "products":
        return {"steps": Products(told.folder, sum(lengths)).steps}
    trainer: Trainer
    if told.side == "ours":
        trainer = Ours(told.folder, ids, lengths, told.quant, told.full, told.moments)
    elif told.full:
        trainer = FullPeers(told.folder, ids, lengths, told.adapters, told.attention, told.compiled)
    else:
        trainer = Peers(told.folder, ids, lengths, told.adapters, told.attention, told.compiled, told.quant)
    return {"steps": trainer.steps, "profile": trainer.profile}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("side", choices=["ours", "peers", "products", "ours-start", "peers-start", "write"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--size", choices=sorted(SIZES), required=True)
    parser.add_argument("--layout", default="4x256")
    parser.add_argument("--full", action="store_true", help="train every weight, not adapters")
    parser.add_argument("--moments", choices=["fp32", "8bit"], default="fp32", help="minitune's AdamW's")
    parser.add_argument("--adapters", choices=["fp32", "bf16"], default="fp32", help="what is trained lies in")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--quant", choices=["nf4", "nf4-dq"])
    told = parser.parse_args()
    size, lengths = SIZES[told.size], layout(told.layout)
    if told.side == "write":
        shapes.write_checkpoint(size, told.folder)
        return
    serve(lambda: handlers(told, size, lengths))


if __name__ == "__main__":
    main()

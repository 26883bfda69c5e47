"""Model: a network with its tokenizer; its losses, what is trained, its files, and what it writes (`generation.py`)."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitune.api.fingerprint import fingerprint
from minitune.api.generation import Generation
from minitune.arguments import MAX_WHOLE, check_path, short
from minitune.checkpoint.adapter import write_adapter
from minitune.checkpoint.hf_config import write_config
from minitune.checkpoint.merge import base_tensors, merged_config, merged_tensors
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.weights import save_weights
from minitune.config import LINEAR_NAMES, LoRA, Onto, Quant
from minitune.data.batch import IGNORED, Batch
from minitune.data.tokenizer import Tokenizer
from minitune.data.tokenizer_writer import save_tokenizer
from minitune.devices import DTYPES
from minitune.errors import InputError
from minitune.model.adapter import HEAD
from minitune.model.llama import Llama
from minitune.names import METHODS_ELSEWHERE
from minitune.objectives import sft
from minitune.training.runner import all_finite


def as_path(owner: str, name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{owner}: {name} is {short(value)}; give a path")
    return check_path(owner, name, value)


def _described(value: object) -> str:
    """A tensor by dtype and shape, for a message."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else short(value)


def _integers(name: str, value: Any) -> Tensor:
    """What `Model.logits` is given, as an int64 tensor on the host. Fractions are never cut off."""
    try:
        found = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = torch.empty(0)
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if not whole or found.dim() != 1 or not found.numel() or int(found.abs().max()) > MAX_WHOLE:
        raise InputError(f"logits: {name} is {short(value)}; it must be a flat list or tensor of whole numbers below "
                         "2**31, at least one")
    return found.long()


def _batch(owner: str, batch: Any) -> Batch:
    if not isinstance(batch, Batch):
        raise InputError(f"{owner}: batch is {short(batch)}; give an mt.Batch, as mt.data.stream and mt.data.pack make "
                         "them")
    return batch


def trained_weights(network: Llama) -> str:
    """Which base weights are trained: all, or the names of the modules, and of which layers."""
    names = network.trained_names()
    if len(names) == len(network.hf_weights()):
        return "all base weights"
    layers: dict[str, dict[int, None]] = {}     # module -> numbers of its layers
    for name in (name for name, *_ in network.dense_weights() if name in names):
        numbers = layers.setdefault(name.rpartition(".")[0].rpartition(".")[2], {})
        if name.startswith("model.layers."):
            numbers[int(name.split(".")[2])] = None
    alike: dict[tuple[int, ...], list[str]] = {}
    for module, numbers in layers.items():
        alike.setdefault(tuple(sorted(numbers)), []).append(module)
    every = tuple(range(network.config.n_layers))
    return "base weights " + "; ".join(
        ", ".join(modules) + (" of all layers" if numbers == every else
                              f" of layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}" if numbers else "")
        for numbers, modules in alike.items())


def _ranks(network: Llama) -> str:
    ranks = sorted({adapter.rank for adapter in network.adapters().values()})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _adapted(network: Llama) -> str:
    """The linears with an adapter, by their own names, and in how many layers, if not in all."""
    paths = list(network.adapters())
    names = [name for name in (*LINEAR_NAMES, HEAD) if any(path.endswith(name) for path in paths)]
    some, all_ = len({path.split(".")[2] for path in paths if path != HEAD}), network.config.n_layers
    of_all = "" if some in (0, all_) else f" in {some} of {all_} layers"
    return f"{', '.join(names)}{of_all}"


class Model(Generation):
    """A network with its tokenizer (None if the checkpoint has none) and the folder it came from.

    Threads may share it: losses and answers are those that one thread would get, since the passes take turns. While one
    thread trains it, no other should use it.
    """

    def __init__(self, network: Llama, tokenizer: Tokenizer | None, path: Path | None = None):
        super().__init__(network, tokenizer, path)
        self.lora: LoRA | None = None
        self.adapter_path: Path | None = None       # of the adapter that was loaded, if one was

    def __getattr__(self, name: str) -> Any:
        """A method that others' models have is answered with ours."""
        if name in METHODS_ELSEWHERE:
            raise AttributeError(f"a Model has no {name}; here it is {METHODS_ELSEWHERE[name]}")
        return super().__getattr__(name)

    @property
    def quant(self) -> Quant | None:
        """How the base's linears lie in 4 bits, as `load` calls it; also for a checkpoint that was stored so."""
        parts = [part for projection in self.network.projections() for _, part in projection.nf4_parts()]
        return None if not parts else "nf4-dq" if parts[0].nested else "nf4"

    def __repr__(self) -> str:
        """One line: family, shape, parameters, dtype and device, and what is trained, as print_trainable_parameters
        of PEFT tells it."""
        network, config = self.network, self.config
        base = sum(math.prod(shape) for _, shape, _, _ in network.dense_weights())
        added = [*network.adapters().values(), *([] if network.output.rows is None else [network.output.rows])]
        total = base + sum(p.numel() for each in added for p in each.parameters())
        n_trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        kind = str(network.dtype).removeprefix("torch.") + (f", linears in {self.quant}" if self.quant else "")
        parts = [f"{config.family}, {config.n_layers} layers x {config.d_model}, {base:,} parameters in {kind}, on "
                 f"{self.device}", f"trains {n_trained:,} ({n_trained / total:.2%})" if n_trained else "all frozen"]
        if self.lora is not None:
            parts.append(f"{'DoRA' if self.lora.dora else 'LoRA'} of rank {_ranks(network)} on {_adapted(network)}")
        elif network.trained_names():
            parts.append(trained_weights(network))
        return f"Model({'; '.join(parts)})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Model:
        """`to(device)` and its kin. InputError for another dtype: what is trained stays fp32, and all else has the
        compute dtype, which more than the weights follows."""
        for dtype in (torch.float32, self.network.dtype):
            made = fn(torch.empty(0, dtype=dtype)).dtype
            if made != dtype:
                raise InputError(f"the model cannot be cast to {made}; load it in the dtype to compute in: "
                                 'mt.load(…, dtype="float32")')
        super()._apply(fn, recurse)
        return self

    # -- losses ------------------------------------------------------------------------------------------------------

    def hidden(self, batch: Batch) -> Tensor:
        """[T, d_model] on the model's device, after the final norm."""
        batch = _batch("hidden", batch)
        if self.network.dtype == torch.float32 and self.device.type != "meta" and torch.is_autocast_enabled(
                self.device.type):
            raise InputError("the model computes in float32, and torch.autocast is on, which would change half of its "
                             'products: leave autocast, or load the model with dtype="bfloat16"')
        if batch.highest_token >= self.config.vocab_size:
            raise InputError(f"the batch holds the token id {batch.highest_token}; the vocabulary ends at "
                             f"{self.config.vocab_size - 1}")
        self.network.check_length(batch.longest_trained)
        batch = batch.to(self.device)
        out: Tensor = self.network(batch.tokens, batch.positions, batch.documents)
        return out

    def losses_at(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels int64 [n], each a token of the vocabulary (no -100: take the rows of
        ``batch.trained``) -> negative log-likelihood fp32 [n]."""
        self._check_rows("losses_at", hidden)
        self._check_labels(labels, len(hidden))
        return self.network.losses_at(hidden, labels, label_smoothing)

    def logits_at(self, hidden: Tensor) -> Tensor:
        """hidden [n, d_model] -> fp32 [n, vocab_size], differentiable: for rows that you choose, few at a time."""
        self._check_rows("logits_at", hidden)
        return self.network.logits(hidden)

    def _check_rows(self, owner: str, hidden: Tensor) -> None:
        if not isinstance(hidden, Tensor) or hidden.dim() != 2 or hidden.shape[1] != self.config.d_model:
            raise InputError(f"{owner}: hidden is {_described(hidden)}; it must be [n, {self.config.d_model}], rows of "
                             "what model.hidden(batch) gives")

    def _check_labels(self, labels: Tensor, n: int) -> None:
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
            raise InputError(f"losses_at: labels is {_described(labels)}; it must be int64 [{n}], a token for each row "
                             "of hidden")
        if labels.device.type != "cpu":
            return      # a GPU is not asked for their values
        wrong = ((labels < 0) | (labels >= self.config.vocab_size)).nonzero().flatten()
        if wrong.numel():
            at = int(wrong[0])
            raise InputError(f"losses_at: labels[{at}] is {int(labels[at])}; it must be a token of the vocabulary, "
                             f"from 0 to {self.config.vocab_size - 1} (of a batch take the rows of batch.trained, "
                             "which leaves out those of -100)")

    def logits(self, tokens: Tensor | Sequence[int], cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens int64 [T], one document or those that cu_seqlens int32 [n + 1] bounds -> fp32 [T, vocab_size]."""
        ids = _integers("tokens", tokens)
        bounds = _integers("cu_seqlens", [0, ids.numel()] if cu_seqlens is None else cu_seqlens)
        batch = Batch(tokens=ids, labels=torch.full_like(ids, IGNORED), cu_seqlens=bounds.to(torch.int32))
        return self.network.logits(self.hidden(batch))

    def token_losses(self, batch: Batch) -> Tensor:
        """fp32 [T]: negative log-likelihood at trained positions, without their weights, and 0 elsewhere."""
        n_tokens = _batch("token_losses", batch).n_tokens
        batch = self._placed(batch)
        losses = self.losses_at(self.hidden(batch)[batch.trained], batch.labels[batch.trained])
        return losses.new_zeros(n_tokens).index_put((batch.trained,), losses)

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum over trained tokens of weight · loss, fp32 scalar; number of trained tokens)."""
        return sft.sft(self, self._placed(_batch("loss_sum", batch)))

    def _placed(self, batch: Batch) -> Batch:
        """The batch on the model's device. A CPU has nothing to gain from rows of one length, so filler goes."""
        batch = batch.to(self.device)
        return batch.trimmed() if self.device.type == "cpu" else batch

    def loss(self, batch: Batch) -> Tensor:
        """Mean of weight · loss over the trained tokens, fp32 scalar. InputError if no token is trained."""
        if _batch("loss", batch).n_trained == 0:
            raise InputError("loss: the batch trains no token (all labels are -100), so its mean is not defined")
        total, n = self.loss_sum(batch)
        return total / n

    def forward(self, *_: Any, **__: Any) -> Any:
        raise InputError("model: it is not called here; say model.loss(batch), model.logits(ids) or "
                         "model.generate(ids)")

    # -- what is trained ---------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Every parameter that gets a gradient, fp32, in a fixed order. InputError if all is frozen."""
        found = [p for p in self.network.parameters() if p.requires_grad]
        if not found:
            raise InputError("the model has nothing to train; load it with lora=mt.LoRA(…), adapter=… or train=…")
        return found

    def param_groups(self, lr: float) -> list[dict[str, Any]]:
        """Optimizer groups; with LoRA+ (Hayou et al. 2024, arXiv:2402.12354) the B matrices at lr · lr_ratio."""
        ratio = 1.0 if self.lora is None else self.lora.lr_ratio
        if ratio == 1.0:
            return [{"params": self.trainable_parameters(), "lr": lr, "lr_ratio": 1.0}]
        up = {id(adapter.B) for adapter in self.network.adapters().values()}
        parts = ([p for p in self.trainable_parameters() if id(p) not in up],
                 [p for p in self.trainable_parameters() if id(p) in up])
        return [{"params": params, "lr": lr * r, "lr_ratio": r}
                for params, r in zip(parts, (1.0, ratio), strict=True) if params]

    @contextlib.contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """Within it the model answers as its base does; other threads that share it wait. InputError where weights of
        the base are trained: what they were is nowhere."""
        if self.network.trained_names():
            raise InputError("adapter_disabled: weights of the base itself are trained (train=…), so there is no "
                             "adapter to switch off; load a second model as the reference")
        with self.network.turn, self.network.adapters_switched(False):
            yield

    def save_adapter(self, folder: str | Path) -> None:
        """A PEFT adapter folder (adapter_config.json, adapter_model.safetensors); peft, vLLM, transformers load it.
        Where tokens were added, the tokenizer goes with it; minitune.json has the SHA-256 of the tensors' file, which
        is checked when it is loaded here, a fingerprint of the base, where that lies in 4 bits how, and settings of the
        chat template: {"sha256": …, "base": {"nf4": …}, "quant": "nf4-dq", "chat_template_kwargs": {…}}."""
        if self.lora is None:
            raise InputError("save_adapter: the model has no adapter; load it with lora=mt.LoRA(…) or adapter=…")
        added = [*self.network.adapters().values(), *filter(None, [self.network.output.rows])]
        if not all_finite(p for each in added for p in each.parameters()):
            raise InputError("save_adapter: the adapter holds values that are not finite; the training diverged, so "
                             "begin anew with a lower lr")
        base = None if self.path is None else str(self.path)
        target, rows = as_path("save_adapter", "folder", folder), self.network.output.rows
        about: dict[str, Any] = {"base": fingerprint(self.network)}
        if self.quant is not None:
            about["quant"] = self.quant
        if self._tokenizer is not None and self._tokenizer.chat_template_kwargs:
            about["chat_template_kwargs"] = dict(self._tokenizer.chat_template_kwargs)
        write_adapter(target, self.network.adapters(), self.lora, base, self.network.linears(), rows, about)
        if rows is not None and self._tokenizer is not None:
            save_tokenizer(self._tokenizer, target)

    def save_merged(self, folder: str | Path, onto: Onto = "loaded") -> None:
        """The model with its adapter added into the weights, as a checkpoint folder that transformers and vLLM load.

        onto: for a base in 4 bits, "loaded" merges into its decoded values, which the adapter was trained on, and
        "original" into the 16-bit weights that were quantised. Tensors that nothing changed are the file's, bit for
        bit. Written tensor by tensor: beside the model there is one of them in memory, in fp32.
        """
        target = as_path("save_merged", "folder", folder)
        if target.exists() and not target.is_dir():
            raise InputError(f"save_merged: {target} is a file; name a folder")
        if self.path is not None and target.exists() and target.samefile(self.path):
            raise InputError(f"save_merged: {target} is the folder of the base itself; name another one")
        if self.path is None:
            save_weights(target, merged_tensors(self.network, None, onto))
        else:
            with Checkpoint.open(self.path) as source:
                save_weights(target, merged_tensors(self.network, source, onto))
        write_config(target, merged_config(self.network))
        if self._tokenizer is not None and self.path is not None:
            save_tokenizer(self._tokenizer, target)

    def save(self, folder: str | Path) -> None:
        """The base weights as a checkpoint folder that transformers and minitune load, its tokenizer with it.

        In the dtype that config.json names; where weights were trained and the model computes in fp32, in fp32, so that
        the folder computes what the model does."""
        if self.network.adapters():
            raise InputError("save: the model carries an adapter, which a checkpoint cannot hold; use save_adapter(), "
                             "or save_merged()")
        if self.network.nf4_shapes():
            raise InputError("save: the weights lie in 4 bits; save_merged() writes their decoded values")
        target = as_path("save", "folder", folder)
        if target.exists() and not target.is_dir():
            raise InputError(f"save: {target} is a file; name a folder")
        plain = self.network.dtype == torch.float32 and self.network.trained_names()
        config = replace(self.config, dtype="float32") if plain else self.config
        target.mkdir(parents=True, exist_ok=True)
        save_weights(target, base_tensors(self.network, DTYPES[config.dtype]))
        write_config(target, config)
        if self._tokenizer is not None and self.path is not None:
            save_tokenizer(self._tokenizer, target)

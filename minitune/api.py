"""The public face: load a checkpoint, a Model that trains and generates, train."""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, overload

import torch
from torch import Tensor, nn

from minitune.checkpoint.adapter import match_adapter, read_adapter, write_adapter
from minitune.checkpoint.hf_config import is_prequantized, read_config, write_config
from minitune.checkpoint.merge import Onto, base_tensors, merged_tensors
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.weights import Quantized, load_weights, save_weights
from minitune.config import LoRA, MemoryPolicy, ModelConfig, Quant, Training, check_seed, short
from minitune.data.batch import IGNORED, Batch
from minitune.data.ending import Ending
from minitune.data.ids import as_prompts, flat_integers
from minitune.data.stream import Stream, stream
from minitune.data.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer
from minitune.devices import DTYPES, choose_device, choose_dtype
from minitune.errors import InputError
from minitune.model.generate import generate, sampler
from minitune.model.llama import Llama, init_weights
from minitune.model.memory import reuse_freed_memory
from minitune.model.shapes import shape
from minitune.objectives import sft
from minitune.training.loop import fit
from minitune.training.run import Observer, Run


def load(path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
         quant: Quant | None = None, lora: LoRA | None = None, adapter: str | Path | None = None,
         train: str | Sequence[str] | None = None, memory: MemoryPolicy = "auto", seed: int = 0) -> Model:
    """A model from a Hugging Face folder: config.json, safetensors, and its tokenizer if it has one.

    device: CUDA where there is one, else the CPU. dtype: the compute dtype, bfloat16 where the device is good at it,
    else float32. quant: "nf4" or "nf4-dq" (double quantisation) keeps the layers' linears in 4 bits, quantised one by
    one as they are read (they are no part of state_dict()); a checkpoint that bitsandbytes quantised to NF4 stays as it
    is, without `quant`. lora: fresh adapters to train;
    adapter: a PEFT adapter folder to go on from or to use; train: base weights to train ("full", "head", "norms",
    "embedding", "last:4", or name patterns). With none of the three all is frozen. memory: what is kept for the
    backward ("keep", "pointwise", "full", "offload"; "auto" decides by free memory). seed: for the adapters' start. On
    a CPU it also tells malloc to keep freed memory, which saves a step's page faults.

    Raises InputError for whatever is wrong with the folder or the arguments.
    """
    folder = _path("load", "path", path)
    _check_load(quant, lora, adapter, train, memory, seed)
    place = choose_device(device)
    compute = choose_dtype(dtype, place)
    if compute == torch.float16 and (lora is not None or train is not None):
        raise InputError("load: training in float16 loses small gradients, and loss scaling is not part of this "
                         'version; say dtype="bfloat16" or "float32"')
    if place.type == "cpu":
        reuse_freed_memory()
    network = _read_network(folder, compute, place, memory, quant)
    config = network.config
    tokenizer = load_tokenizer(folder) if _has_tokenizer(folder) else None
    if tokenizer is not None:
        tokenizer.check_vocab(config.vocab_size)
    model = Model(network, tokenizer, folder)
    if adapter is not None:
        lora, tensors = read_adapter(Path(adapter))
        network.add_adapters(lora, seed)
        match_adapter(tensors, network.adapters(), Path(adapter), folder)
    elif lora is not None:
        network.add_adapters(lora, seed)
    model.lora = lora
    if train is not None:
        network.unfreeze(train if isinstance(train, str) else tuple(train))
    return model


def _check_load(quant: Any, lora: Any, adapter: Any, train: Any, memory: Any, seed: Any) -> None:
    """InputError for arguments of `load` that are wrong, or do not go together."""
    if quant not in (None, *get_args(Quant)):
        raise InputError(f"load: quant is {short(quant)}; say {', '.join(get_args(Quant))}, or leave it out")
    if lora is not None and adapter is not None:
        raise InputError(f"load: both lora and adapter are given; the adapter in {adapter} brings its own rank and "
                         "targets, so leave lora=None")
    if adapter is not None:
        _path("load", "adapter", adapter)
    if lora is not None and not isinstance(lora, LoRA):
        raise InputError(f"load: lora is {short(lora)}; give mt.LoRA(rank=16, …)")
    if lora is not None and lora.dora:
        raise InputError("load: LoRA(dora=True) is not part of this version; leave dora=False")
    if train is not None and (lora is not None or adapter is not None):
        raise InputError("load: an adapter and trained base weights together are not part of this version, since no "
                         "file could hold both; give either lora or adapter, or train")
    if memory not in get_args(MemoryPolicy):
        raise InputError(f"load: memory is {short(memory)}; say {', '.join(get_args(MemoryPolicy))}")
    if train is not None and not isinstance(train, str) and not (
            isinstance(train, Sequence) and train and all(isinstance(name, str) for name in train)):
        raise InputError(f'load: train is {short(train)}; say "full", "head", "norms", "embedding", "last:4", or give '
                         'a list of name patterns such as ["*.q_proj.weight"]')
    check_seed("load", seed)


def _path(owner: str, name: str, value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{owner}: {name} is {short(value)}; give a path")
    return Path(value)


def _read_network(folder: Path, dtype: torch.dtype, device: torch.device, memory: MemoryPolicy,
                  quant: str | None) -> Llama:
    """The network of a checkpoint folder; in NF4 where `quant` says so or the checkpoint is."""
    config, stored = read_config(folder), is_prequantized(folder)
    if stored and quant is not None:
        raise InputError(f"load: quant is {quant!r}, but {folder} is quantised already, as its config.json says; leave "
                         "quant out")
    checkpoint = Checkpoint.open(folder)
    in_4bit = stored or quant is not None
    if _too_large(config, checkpoint):      # its missing tensors are named before memory is taken for them
        empty = Llama(config, dtype=dtype, device="meta", quantized=in_4bit)
        _fill(checkpoint, empty, quant, stored)
    network = Llama(config, dtype=dtype, device=device, memory=memory, quantized=in_4bit)
    _fill(checkpoint, network, quant, stored)
    return network


def _fill(checkpoint: Checkpoint, network: Llama, quant: str | None, stored: bool) -> None:
    shapes = network.nf4_shapes()
    slots = Quantized(shapes, network.put_nf4, network.device, network.dtype, quant == "nf4-dq", stored)
    load_weights(checkpoint, network.hf_weights(), network.config.tied_head, slots if shapes else None)


def init(name: str, folder: str | Path, *, tokenizer: str | Path | None = None, seed: int = 0) -> None:
    """Write a checkpoint folder with random weights in a named shape, its tokenizer copied from another folder."""
    config = shape(name)
    target = _path("init", "folder", folder)
    check_seed("init", seed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"init: {target} exists already; name another folder, or remove it")
    network = Llama(config, dtype=DTYPES[config.dtype])
    init_weights(network, seed)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if words is not None:
        words.check_vocab(config.vocab_size)
    Model(network, words, None if tokenizer is None else Path(tokenizer)).save(folder)


class Model(nn.Module):
    """A network with its tokenizer (None if the checkpoint has none) and the folder it came from."""

    def __init__(self, network: Llama, tokenizer: Tokenizer | None, path: Path | None = None):
        super().__init__()
        self.network, self.path = network, path
        self._tokenizer = tokenizer
        self.lora: LoRA | None = None

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def tokenizer(self) -> Tokenizer:
        """InputError if the checkpoint folder has none."""
        if self._tokenizer is None:
            raise InputError(f"{self.path}: no tokenizer.json or tokenizer.model in the folder; text needs one, put it "
                             "beside config.json")
        return self._tokenizer

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
        if batch.highest_token >= self.config.vocab_size:
            raise InputError(f"the batch holds the token id {batch.highest_token}; the vocabulary ends at "
                             f"{self.config.vocab_size - 1}")
        self.network.check_length(batch.longest_trained)
        batch = batch.to(self.device)
        out: Tensor = self.network(batch.tokens, batch.positions, batch.documents)
        return out

    def losses_at(self, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """hidden [n, d_model] and labels int64 [n] -> negative log-likelihood fp32 [n]."""
        return self.network.token_losses(hidden, labels, label_smoothing)

    def logits(self, tokens: Tensor | Sequence[int], cu_seqlens: Tensor | None = None) -> Tensor:
        """tokens int64 [T], one document or those that cu_seqlens int32 [n + 1] bounds -> fp32 [T, vocab_size]."""
        ids = flat_integers("logits", "tokens", tokens)
        bounds = flat_integers("logits", "cu_seqlens", [0, ids.numel()] if cu_seqlens is None else cu_seqlens)
        batch = Batch(tokens=ids, labels=torch.full_like(ids, IGNORED), cu_seqlens=bounds.to(torch.int32))
        return self.network.logits(self.hidden(batch))

    def token_losses(self, batch: Batch) -> Tensor:
        """fp32 [T]: negative log-likelihood at trained positions, without their weights, and 0 elsewhere."""
        batch = batch.to(self.device)
        losses = sft.token_losses(self, batch)
        return losses.new_zeros(batch.n_tokens).index_put((batch.trained,), losses)

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """(sum over trained tokens of weight · loss, fp32 scalar; number of trained tokens)."""
        return sft.sft(self, batch.to(self.device))

    def loss(self, batch: Batch) -> Tensor:
        """Mean of weight · loss over the trained tokens, fp32 scalar. InputError if no token is trained."""
        if batch.n_trained == 0:
            raise InputError("loss: the batch trains no token (all labels are -100), so its mean is not defined")
        total, n = self.loss_sum(batch)
        return total / n

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
        """Within it the model answers as its base does."""
        before = [projection.enabled for projection in self.network.projections()]
        try:
            for projection in self.network.projections():
                projection.enabled = False
            yield
        finally:
            for projection, enabled in zip(self.network.projections(), before, strict=True):
                projection.enabled = enabled

    def save_adapter(self, folder: str | Path) -> None:
        """A PEFT adapter folder (adapter_config.json, adapter_model.safetensors); peft, vLLM, transformers load it."""
        if self.lora is None:
            raise InputError("save_adapter: the model has no adapter; load it with lora=mt.LoRA(…) or adapter=…")
        base = None if self.path is None else str(self.path)
        linears = [path for projection in self.network.projections() for path in projection.parts]
        write_adapter(_path("save_adapter", "folder", folder), self.network.adapters(), self.lora, base, linears)

    def save_merged(self, folder: str | Path, onto: Onto = "loaded") -> None:
        """The model with its adapter added into the weights, as a checkpoint folder that transformers and vLLM load.

        onto: for a base in 4 bits, "loaded" merges into its decoded values, which the adapter was trained on, and
        "original" into the 16-bit weights that were quantised. Tensors that nothing changed are the file's, bit for
        bit. Written tensor by tensor: beside the model there is one of them in memory, in fp32.
        """
        target = _path("save_merged", "folder", folder)
        if target.exists() and not target.is_dir():
            raise InputError(f"save_merged: {target} is a file; name a folder")
        if self.path is not None and target.exists() and target.samefile(self.path):
            raise InputError(f"save_merged: {target} is the folder of the base itself; name another one")
        if self.path is None:
            save_weights(target, merged_tensors(self.network, None, onto))
        else:
            with Checkpoint.open(self.path) as source:
                save_weights(target, merged_tensors(self.network, source, onto))
        write_config(target, self.config)
        if self._tokenizer is not None and self.path is not None:
            copy_tokenizer(self.path, target)

    def save(self, folder: str | Path) -> None:
        """The base weights as a checkpoint folder that transformers and minitune load, its tokenizer with it."""
        if self.network.adapters():
            raise InputError("save: the model carries an adapter, which a checkpoint cannot hold; use save_adapter(), "
                             "or save_merged()")
        if self.network.nf4_shapes():
            raise InputError("save: the weights lie in 4 bits; save_merged() writes their decoded values")
        target = _path("save", "folder", folder)
        target.mkdir(parents=True, exist_ok=True)
        save_weights(target, base_tensors(self.network, DTYPES[self.config.dtype]))
        write_config(target, self.config)
        if self._tokenizer is not None and self.path is not None:
            copy_tokenizer(self.path, target)

    # -- generation --------------------------------------------------------------------------------------------------

    @overload
    def generate(self, ids: Sequence[int], max_new_tokens: int, temperature: float = ..., top_k: int | None = ...,
                 top_p: float | None = ..., stop: str | Sequence[str] | None = ...,
                 seed: int | None = ...) -> list[int]: ...
    @overload
    def generate(self, ids: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = ...,
                 top_k: int | None = ..., top_p: float | None = ..., stop: str | Sequence[str] | None = ...,
                 seed: int | None = ...) -> list[list[int]]: ...
    def generate(self, ids: Any, max_new_tokens: int, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, stop: str | Sequence[str] | None = None, seed: int | None = None) -> Any:
        """Continue one prompt (ids) or many (a list of them) -> the new ids alone, without EOS or the stop text.

        Greedy at temperature 0, else sampled. Ends at EOS, at a stop text or after `max_new_tokens`.
        """
        single, prompts = as_prompts(ids)
        choose = sampler(temperature, top_k, top_p, seed, self.device)
        ending = Ending(self.eos_ids, self._tokenizer, stop)
        answers = [ending.trim(new) for new in generate(self.network, prompts, max_new_tokens, choose, ending.reached)]
        return answers[0] if single else answers

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer, by config.json, generation_config.json and the tokenizer."""
        known = set(self.config.eos_ids)
        if self._tokenizer is not None:
            known |= set(self._tokenizer.eos_ids)
        return frozenset(known)

    def complete(self, text: str, max_new_tokens: int = 128, temperature: float = 0.0, top_k: int | None = None,
                 top_p: float | None = None, stop: str | Sequence[str] | None = None, seed: int | None = None) -> str:
        """What the model writes after `text`; control strings inside `text` stay text."""
        ending = Ending(self.eos_ids, self.tokenizer, stop)
        choose = sampler(temperature, top_k, top_p, seed, self.device)
        (new,) = generate(self.network, [self.tokenizer.encode(text)], max_new_tokens, choose, ending.reached)
        return ending.text(new)


def train(model: Model, data: str | Path | Iterable[Batch], *, training: Training | None = None,
          observers: Sequence[Observer] = (), **settings: Any) -> Run:
    """Fine-tune `model` on a JSONL file or on batches -> Run, the record of every step.

    `settings` are fields of Training (lr=1e-4, tokens=4096, …), or give a whole `training`. A path is tokenised and
    packed by `mt.data.stream`; batches are taken as they come.
    """
    if training is not None and settings:
        raise InputError(f"train: both training and {', '.join(settings)} are given; put all of it into one of them")
    unknown = settings.keys() - Training.__dataclass_fields__.keys()
    if unknown:
        raise InputError(f"train: no setting is named {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(Training.__dataclass_fields__)}")
    training = training or Training(**settings)
    if isinstance(data, str | Path):
        data = stream(data, model.tokenizer, tokens=training.tokens, seed=training.seed)
    elif not isinstance(data, Iterable):
        raise InputError(f"train: data is {short(data)}; give the path of a JSONL file, or batches")
    elif isinstance(data, Stream) and data.epochs not in (1, training.epochs):
        raise InputError(f"train: the stream has epochs={data.epochs}, the training epochs={training.epochs}; set "
                         "epochs in one place")
    objective = functools.partial(sft.sft, label_smoothing=training.label_smoothing)
    return fit(model, data, training, objective, observers)


def _too_large(config: ModelConfig, checkpoint: Checkpoint) -> bool:
    """Whether config.json asks for more weights than the checkpoint holds. InputError if by far."""
    names = checkpoint.names()
    if config.n_layers > len(names):
        raise InputError(f"{checkpoint.path(names[0]).parent if names else 'the checkpoint'}: config.json says "
                         f"{config.n_layers} layers, and the checkpoint holds {len(names)} tensors in all; fetch "
                         "config.json and the weights of one and the same model")
    infos = [checkpoint.info(name) for name in names]
    held = sum(math.prod(info.shape) * (2 if info.dtype == torch.uint8 else 1) for info in infos)   # two to a byte
    return config.n_layers * config.d_model * config.d_ff * 3 + config.vocab_size * config.d_model > held


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))

"""load: a Model from a checkpoint folder; init: a folder with random weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from minitune.api.fingerprint import warn_of_another_base
from minitune.api.model import Model, as_path
from minitune.arguments import answers_names, check_seed, short, warn
from minitune.checkpoint.adapter import match_adapter, match_rows, take_copies
from minitune.checkpoint.adapter_reader import TokenTensors, base_copies, read_adapter, read_token_rows
from minitune.checkpoint.files import read_json_object
from minitune.checkpoint.folders import ABOUT
from minitune.checkpoint.hf_config import is_prequantized, read_config
from minitune.checkpoint.reader import Checkpoint
from minitune.checkpoint.weights import Quantized, load_weights
from minitune.config import LoRA, MemoryPolicy, ModelConfig, Quant
from minitune.data.template import check_table, names_read
from minitune.data.tokenizer import Tokenizer, load_tokenizer
from minitune.devices import DTYPES, choose_device, choose_dtype
from minitune.errors import InputError
from minitune.model.adapter import HEAD
from minitune.model.init import fill_random, init_weights
from minitune.model.llama import Llama
from minitune.model.memory import reuse_freed_memory
from minitune.model.shapes import shape
from minitune.report.folder import check_no_run


@answers_names
def load(path: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None,
         quant: Quant | None = None, lora: LoRA | None = None, adapter: str | Path | None = None,
         train: str | Sequence[str] | None = None, add_tokens: Sequence[str] = (), memory: MemoryPolicy = "auto",
         chat_template_kwargs: Mapping[str, Any] | None = None, seed: int = 0) -> Model:
    """A model from a Hugging Face folder: config.json, safetensors, and its tokenizer if it has one.

    device: CUDA where there is one, else the CPU. dtype: the compute dtype, bfloat16 where the device is good at it,
    else float32. quant: "nf4" or "nf4-dq" (double quantisation) keeps the layers' linears in 4 bits, quantised one by
    one as they are read (they are no part of state_dict()); a checkpoint that bitsandbytes quantised to NF4 stays as it
    is, without `quant`. lora: fresh adapters to train; adapter: a PEFT adapter folder to go on from or to use, with the
    tokenizer in it, if there is one; train: base weights to train ("full", "head", "norms", "embedding", "last:4", or a
    name pattern or several). With none of the three all is frozen. add_tokens: texts that become tokens of their own;
    with an adapter their rows of embedding and head are trained beside it. memory: what is kept for the backward
    ("keep", "pointwise", "full", "offload"; "auto" decides by free memory). chat_template_kwargs: settings of the chat
    template, such as {"enable_thinking": False}; by default those that the adapter was saved with. seed: for the
    adapters' start. On a CPU it also tells malloc to keep freed memory, which saves a step's page faults, and asks
    Linux for huge pages under weights; of a model with nothing to train it maps those that lie in the files as they are
    needed: such a file may be replaced while the model lives, but not be written into.

    Raises InputError for whatever is wrong with the folder or the arguments.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("load: torch.inference_mode is on, and weights that are made within it can never be trained; "
                         "load before it")
    folder = as_path("load", "path", path)
    _check_load(quant, lora, adapter, train, memory, chat_template_kwargs, seed)
    adapted = None if adapter is None else as_path("load", "adapter", adapter)
    added = _added(add_tokens)
    check_no_run(folder)
    place = choose_device(device)
    compute = choose_dtype(dtype, place)
    if compute == torch.float16 and (lora is not None or train is not None):
        raise InputError("load: training in float16 loses small gradients, and loss scaling is not part of this "
                         'version; say dtype="bfloat16" or "float32"')
    if place.type == "cpu":
        reuse_freed_memory()
    only_used = lora is None and adapter is None and train is None
    network = _read_network(folder, compute, place, memory, quant, only_used)
    found = None if adapted is None else read_adapter(adapted)
    stored = None if adapted is None else read_token_rows(adapted)
    tokenizer = _tokenizer(folder, adapted, stored, network.config.vocab_size, added)
    model = Model(network, tokenizer, folder)
    about = _about(adapted)
    _set_template(tokenizer, folder, chat_template_kwargs, adapted, about)
    rows = _room_for_tokens(network, tokenizer, adapted, stored, added)
    if adapted is not None and found is not None:
        lora, model.adapter_path = found[0], adapted
        network.add_adapters(lora, seed)
        match_adapter(found[1], network.adapters(), adapted, folder)
        _warn_of_base(adapted, about, model, folder)
    elif lora is not None:
        network.add_adapters(lora, seed)
    _train_rows(network, adapted, stored, rows)
    model.lora = lora
    if train is not None:
        network.unfreeze(train if isinstance(train, str) else tuple(train))
    if added and lora is None and not network.embedding.requires_grad:
        raise InputError("load: add_tokens needs rows of the embedding to train: give lora=mt.LoRA(…), or a train that "
                         'names the embedding, such as "full"')
    return model


def _about(adapter: Path | None) -> dict[str, Any]:
    """What an adapter that minitune wrote says of its training; nothing of another trainer's."""
    return read_json_object(adapter / ABOUT) if adapter is not None and (adapter / ABOUT).exists() else {}


def _set_template(tokenizer: Tokenizer | None, folder: Path, given: Mapping[str, Any] | None, adapter: Path | None,
                  about: Mapping[str, Any]) -> None:
    """Set the chat template as it is `given`, else as the adapter was trained with it, as far as there is one that
    reads that."""
    name = "chat_template_kwargs"
    wanted, owner = (about.get(name), f"{adapter}/{ABOUT}") if given is None else (given, "load")
    if not wanted or (tokenizer is None and given is None):
        return
    if tokenizer is None:
        raise InputError(f"{owner}: {name} is {short(wanted)}, but {folder} holds no tokenizer; put tokenizer.json or "
                         "tokenizer.model there")
    if given is None:
        check_table(wanted, owner)
    try:
        if given is None:
            known = names_read(tuple(tokenizer.chat_templates.values()))
            if unread := sorted(set(wanted).difference(known)):
                warn(f"{owner}: the adapter was trained with {', '.join(unread)} set in its chat template, which that "
                     f"of {folder} does not read, so prompts may differ; take the template it was trained with")
            wanted = {each: value for each, value in wanted.items() if each in known}
        tokenizer.chat_template_kwargs = wanted
    except InputError as error:
        raise InputError(f"{owner}: {error}") from None


def _warn_of_base(adapter: Path, said: Mapping[str, Any], model: Model, folder: Path) -> None:
    """Warn where an adapter that minitune wrote was trained on another base, or on one in 4 bits and this one is not,
    or otherwise. InputError for a file of ours that says what we never write."""
    if not said:        # another trainer's, who does not tell
        return
    trained, quant = said.get("quant"), model.quant
    if "quant" in said and trained not in get_args(Quant):
        raise InputError(f"{adapter / ABOUT}: quant is {short(trained)}; it must be {' or '.join(get_args(Quant))}, as "
                         "the base lay that it was trained on; correct it, or remove the file")
    if trained != quant:
        then, here = trained or "16 bits or more", quant or "16 bits or more"
        how = f"load it with quant {trained}" if trained else "load it without quant"
        how = "take the base it was trained on" if is_prequantized(folder) else how
        warn(f"{adapter}: was trained on a base in {then}, and this one lies in {here}, so the answers differ "
             f"somewhat; {how} to have what was trained")
    warn_of_another_base(adapter, said, model.network, folder)


def _added(tokens: Any) -> tuple[str, ...]:
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or not all(isinstance(t, str) for t in tokens):
        raise InputError(f'load: add_tokens is {short(tokens)}; give a list of texts such as ["<tool>"]')
    return tuple(tokens)


def _tokenizer(folder: Path, adapter: Path | None, stored: TokenTensors | None, vocab_size: int,
               added: tuple[str, ...]) -> Tokenizer | None:
    """The base's tokenizer, or the one that lies beside the adapter: it was trained with that one, which may know more
    tokens or another chat template. One with more tokens than the model and the adapter have rows for (a padding token
    that was never used, in adapters of other trainers) gives way to the base's."""
    if adapter is not None and _has_tokenizer(adapter):
        tokenizer = load_tokenizer(adapter, added)
        if tokenizer.vocab_size - len(added) <= max(vocab_size, 0 if stored is None else stored.ids[-1] + 1):
            return tokenizer
        warn(f"{adapter}: its tokenizer has ids up to {tokenizer.vocab_size - 1}, for which there are no "
             f"rows; the one of {folder} is used")
    if not _has_tokenizer(folder):
        if added:
            raise InputError(f"{folder}: holds no tokenizer to add tokens to; put tokenizer.json or tokenizer.model "
                             "there")
        return None
    tokenizer = load_tokenizer(folder)
    tokenizer.check_vocab(vocab_size)
    return load_tokenizer(folder, added) if added else tokenizer


def _room_for_tokens(network: Llama, tokenizer: Tokenizer | None, adapter: Path | None, stored: TokenTensors | None,
                     added: tuple[str, ...]) -> set[int]:
    """Make room for tokens that were added, here or in the adapter -> the ids of those added here. The rows that PEFT
    stored of a vocabulary that had grown are taken over; the others must be the base's."""
    ids = {number for token in added if tokenizer is not None and (number := tokenizer.id_of(token)) is not None}
    old, size = network.config.vocab_size, max((network.config.vocab_size, *(number + 1 for number in ids)))
    copies: dict[str, Tensor] = {}
    if adapter is not None:
        copies = base_copies(adapter)
        known = max((size, *map(len, copies.values())))
        more = sorted(number for number in (() if stored is None else stored.ids) if number >= known)
        if more and more != list(range(known, known + len(more))):
            raise InputError(f"{adapter}: adapter_config.json's trainable_token_indices go up to {more[-1]}, and the "
                             f"rows between {known - 1} and that are nowhere; load the base that it was trained on")
        size = known + len(more)
    if size > old:
        network.grow(size)
    if adapter is not None:
        take_copies(adapter, copies, network, old)
    return ids


def _train_rows(network: Llama, adapter: Path | None, stored: TokenTensors | None, added: set[int]) -> None:
    """Beside an adapter train the rows of the tokens that were added, here or before."""
    if (stored is None and not added) or not network.adapters():
        return
    if HEAD in network.adapters():
        raise InputError("load: an adapter on lm_head and trained rows of single tokens together are not part of this "
                         "version; leave lm_head out of the targets, or add_tokens")
    if stored is not None and adapter is not None:
        network.train_tokens(stored.ids, head=stored.head is not None)
        assert network.output.rows is not None
        match_rows(stored, network.output.rows, adapter)
    if stored is None or added - set(stored.ids):
        network.train_tokens(sorted(added | set(() if stored is None else stored.ids)),
                             head=stored is None or stored.head is not None)


def _check_load(quant: Any, lora: Any, adapter: Any, train: Any, memory: Any, kwargs: Any, seed: Any) -> None:
    """InputError for arguments of `load` that are wrong, or do not go together."""
    if quant not in (None, *get_args(Quant)):
        raise InputError(f"load: quant is {short(quant)}; say {', '.join(get_args(Quant))}, or leave it out")
    if lora is not None and adapter is not None:
        raise InputError(f"load: both lora and adapter are given; the adapter in {adapter} brings its own rank and "
                         "targets, so leave lora=None")
    if lora is not None and not isinstance(lora, LoRA):
        raise InputError(f"load: lora is {short(lora)}; give mt.LoRA(rank=16, …)")
    if train is not None and (lora is not None or adapter is not None):
        raise InputError("load: an adapter and trained base weights together are not part of this version, since no "
                         "file could hold both; give either lora or adapter, or train")
    if memory not in get_args(MemoryPolicy):
        raise InputError(f"load: memory is {short(memory)}; say {', '.join(get_args(MemoryPolicy))}")
    if train is not None and not isinstance(train, str) and not (
            isinstance(train, Sequence) and train and all(isinstance(name, str) for name in train)):
        raise InputError(f'load: train is {short(train)}; say "full", "head", "norms", "embedding", "last:4", a '
                         'name pattern such as "*.q_proj.weight", or a list')
    if kwargs is not None:
        check_table(kwargs, "load")
    check_seed("load", seed)


def _read_network(folder: Path, dtype: torch.dtype, device: torch.device, memory: MemoryPolicy,
                  quant: str | None, mapped: bool) -> Llama:
    """The network of a checkpoint folder; in NF4 where `quant` says so or the checkpoint is. mapped: weights may stay
    in their files."""
    config, stored = read_config(folder), is_prequantized(folder)
    if stored and quant is not None:
        raise InputError(f"load: quant is {quant!r}, but {folder} is quantised already, as its config.json says; leave "
                         "quant out")
    in_4bit = stored or quant is not None
    with Checkpoint.open(folder) as checkpoint:
        if _too_large(config, checkpoint):      # its missing tensors are named before memory is taken for them
            empty = Llama(config, dtype=dtype, device="meta", quantized=in_4bit)
            _fill(checkpoint, empty, quant, stored, mapped=False)
        network = Llama(config, dtype=dtype, device=device, memory=memory, quantized=in_4bit)
        _fill(checkpoint, network, quant, stored, mapped)
    return network


def _fill(checkpoint: Checkpoint, network: Llama, quant: str | None, stored: bool, mapped: bool) -> None:
    shapes = network.nf4_shapes()
    slots = Quantized(shapes, network.put_nf4, network.device, network.dtype, quant == "nf4-dq", stored)
    load_weights(checkpoint, network.hf_weights(), network.config.tied_head, slots if shapes else None,
                 network.homes() if mapped else ())


def init(name: str, folder: str | Path, *, tokenizer: str | Path | None = None, seed: int = 0) -> None:
    """Write a checkpoint folder with random weights in a named shape, its tokenizer copied from another folder."""
    config = shape(name)
    target = as_path("init", "folder", folder)
    check_seed("init", seed)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"init: {target} exists already; name another folder, or remove it")
    network = Llama(config, dtype=DTYPES[config.dtype])
    init_weights(network, seed)
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if words is not None:
        words.check_vocab(config.vocab_size)
    Model(network, words, None if tokenizer is None else Path(tokenizer)).save(folder)


def random_model(config: ModelConfig, *, device: str | torch.device | None, dtype: str | torch.dtype | None,
                 quant: Quant | None, lora: LoRA | None, train: str | Sequence[str] | None, memory: MemoryPolicy
                 ) -> Model:
    """A model of that shape with random weights made on the device, no file and no tokenizer; arguments as of `load`.
    """
    _check_load(quant, lora, None, train, memory, None, 0)
    place = choose_device(device)
    if place.type == "cpu":
        reuse_freed_memory()
    network = Llama(config, dtype=choose_dtype(dtype, place), device=place, memory=memory, quantized=quant is not None)
    fill_random(network, quant == "nf4-dq")
    model = Model(network, None)
    if lora is not None:
        network.add_adapters(lora, 0)
        model.lora = lora
    if train is not None:
        network.unfreeze(train if isinstance(train, str) else tuple(train))
    return model


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


def config_of(command: str, base: str) -> ModelConfig:
    """Of a checkpoint folder, or of a named shape. InputError for what is neither."""
    if Path(base).exists():
        check_no_run(Path(base))
        return read_config(Path(base))
    try:
        return shape(base)
    except InputError as error:
        reason = str(error).removeprefix("init: ")
        raise InputError(f"{command}: there is no folder {short(base)}, and {reason}") from None

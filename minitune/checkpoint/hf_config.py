"""config.json of Hugging Face to ModelConfig and back, for published checkpoints and for those of transformers 5."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitune.arguments import short
from minitune.checkpoint.fields import Rule, flag, integer, mapping, number, only, refuse, text, texts, token_ids
from minitune.checkpoint.files import json_bytes, read_json_object, staged
from minitune.checkpoint.folders import model_config
from minitune.checkpoint.hf_rope import read_rope, write_rope
from minitune.config import ModelConfig
from minitune.devices import DTYPES
from minitune.errors import InputError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Family (``model_type``) -> the architecture that is supported."""
MAX_LAYERS = 10_000
_REQUIRED = object()
_UNKNOWN = "this field is unknown; if it changes nothing, delete it from the file"


@dataclass(frozen=True)
class Used:
    """A field that shapes the model (of all others a Rule says at which values they change nothing). ``default`` is
    transformers' own where the field is missing, one or by family.

    ``families``: those that read it; for the others transformers ignores the field, so only ``unread`` values pass.
    """

    default: Any = _REQUIRED
    families: tuple[str, ...] = tuple(ARCHITECTURES)
    unread: tuple[object, ...] = (None, False)


_QWEN = ("qwen2", "qwen3")
_GENERATION = (
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
    "num_beam_groups", "diversity_penalty", "temperature", "top_k", "top_p", "min_p", "typical_p",
    "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
    "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens",
)
_BOOKKEEPING = (
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "tokenizer_class",
    "transformers.js_config", "is_llama_config", "unsloth_version", "unsloth_fixed", "unsloth_tied",
)

FIELDS: dict[str, Used | Rule] = {
    "architectures": Used(None),
    "model_type": Used(None),
    "vocab_size": Used(),
    "hidden_size": Used(),
    "intermediate_size": Used(),
    "num_hidden_layers": Used(),
    "num_attention_heads": Used(),
    "num_key_value_heads": Used({"llama": None, "mistral": 8, "qwen2": 32, "qwen3": 32}),
    "head_dim": Used({"llama": None, "mistral": None, "qwen2": None, "qwen3": 128}),
    "hidden_act": Used("silu"),
    "max_position_embeddings": Used({"llama": 2048, "mistral": 131_072, "qwen2": 32_768, "qwen3": 32_768}),
    "rms_norm_eps": Used(1e-6),
    "tie_word_embeddings": Used(False),
    "attention_bias": Used(False, ("llama", "qwen3")),
    "mlp_bias": Used(False, ("llama",)),
    "rope_theta": Used(None),
    "rope_scaling": Used(None),
    "rope_parameters": Used(None),
    "original_max_position_embeddings": Used(None),
    "sliding_window": Used(4096, ("mistral", *_QWEN)),
    "use_sliding_window": Used(False, _QWEN),
    "max_window_layers": Used(28, _QWEN),
    "layer_types": Used(None),
    "torch_dtype": Used(None),
    "dtype": Used(None),
    "quantization_config": Used(None),
    "bos_token_id": Used({"llama": 1, "mistral": 1, "qwen2": None, "qwen3": None}),
    "eos_token_id": Used({"llama": 2, "mistral": 2, "qwen2": None, "qwen3": None}),
    "partial_rotary_factor": Rule("the whole head is rotated", (None, 1)),
    "pretraining_tp": Rule("products are not sliced", (None, 1)),
    "attention_dropout": Rule("no attention weight is dropped; set it to 0 to train without", (None, 0)),
    "rope_interleaved": Rule("halves of a head are rotated, not neighbours", (None, False)),
    "use_mrope": Rule("text has one position per token", (None, False)),
    "is_encoder_decoder": Rule("a decoder only", (None, False)),
    "add_cross_attention": Rule("a decoder only", (None, False)),
    "tie_encoder_decoder": Rule("a decoder only", (None, False)),
    "cross_attention_hidden_size": Rule("a decoder only", (None,)),
    "pruned_heads": Rule("no head is cut", (None, {})),
    "chunk_size_feed_forward": Rule("the same sums", (None, 0)),
    "auto_map": Rule("code beside a checkpoint is never run; remove it where the model is a plain one of its "
                     "model_type", (None, {})),
    "per_layer_config": Rule("all layers are alike", (None, {})),
    "initializer_range": Rule("weights come from the file"),
    "use_cache": Rule("a choice of the caller"),
    "pad_token_id": Rule("nothing is padded"),
    "sep_token_id": Rule("the tokenizer decides"),
    "decoder_start_token_id": Rule("a decoder starts with its prompt"),
    "prefix": Rule("the data decides what stands before a text"),
    "max_sequence_length": Rule("an early name of max_position_embeddings, which decides"),
    "is_decoder": Rule("it is one"),
    "output_hidden_states": Rule("what transformers returns"),
    "output_attentions": Rule("what transformers returns"),
    "return_dict": Rule("what transformers returns"),
    "torchscript": Rule("how transformers runs"),
    "attn_implementation": Rule("how transformers runs"),
    "_attn_implementation_autoset": Rule("how transformers runs"),
    "tf_legacy_loss": Rule("how transformers runs"),
    "use_bfloat16": Rule("how transformers runs on TPUs"),
    "id2label": Rule("for classifiers"),
    "label2id": Rule("for classifiers"),
    "num_labels": Rule("for classifiers"),
    "problem_type": Rule("for classifiers"),
    "finetuning_task": Rule("for classifiers"),
    "task_specific_params": Rule("for other tasks"),
    **{name: Rule("a setting of generation") for name in _GENERATION},
    **{name: Rule("where the file comes from") for name in _BOOKKEEPING},
}
"""Every field of config.json that is known. Any other is refused by name, unless it is null."""


QUANTIZATION: dict[str, Rule] = {
    "quant_method": Rule("only bitsandbytes is read; take the unquantised checkpoint", ("bitsandbytes", None)),
    "load_in_8bit": Rule("8-bit weights are not read; take the unquantised checkpoint", (None, False)),
    "_load_in_8bit": Rule("8-bit weights are not read; take the unquantised checkpoint", (None, False)),
    "load_in_4bit": Rule("only 4-bit weights are read; take the unquantised checkpoint", (True,)),
    "_load_in_4bit": Rule("only 4-bit weights are read; take the unquantised checkpoint", (None, True)),
    "bnb_4bit_quant_type": Rule("only NF4 is read; take the unquantised checkpoint", ("nf4",)),
    "bnb_4bit_quant_storage": Rule("weights are read from uint8; save it again so", ("uint8", None)),
    "bnb_4bit_use_double_quant": Rule("the tensors of each weight say it"),
    "bnb_4bit_compute_dtype": Rule("a choice of the caller"),
    "llm_int8_skip_modules": Rule("the tensors say which linears are quantised"),
    "llm_int8_threshold": Rule("for 8 bits"),
    "llm_int8_enable_fp32_cpu_offload": Rule("for 8 bits"),
    "llm_int8_has_fp16_weight": Rule("for 8 bits"),
}
"""Every field of quantization_config that is known, in the order in which they are judged."""


def read_config(folder: str | Path) -> ModelConfig:
    """The model that ``folder/config.json`` describes; ``generation_config.json`` may add end tokens.

    Raises InputError, which names the file, the field and its value, for a field that is unknown or has the wrong
    type, and for a value that would need something which minitune does not compute.
    """
    path = model_config(Path(folder))
    where, raw = str(path), read_json_object(path)
    family = _family(where, raw)
    _check_known(where, raw, family)

    def get(name: str) -> Any:
        entry = FIELDS[name]
        assert isinstance(entry, Used)
        if family not in entry.families:
            return None
        default = entry.default[family] if isinstance(entry.default, dict) else entry.default
        if name not in raw and default is _REQUIRED:
            raise InputError(f"{where}: {name} is missing")
        return raw.get(name, default)

    def size(name: str, **bounds: int) -> int:
        return integer(where, name, get(name), **bounds)

    n_layers, d_model = size("num_hidden_layers", high=MAX_LAYERS), size("hidden_size")
    n_heads, max_positions = size("num_attention_heads"), size("max_position_embeddings")
    _quantization(where, get("quantization_config"))
    if get("hidden_act") not in ("silu", "swish"):
        refuse(where, "hidden_act", get("hidden_act"), "supported: 'silu'")
    if get("head_dim") is None and (d_model % n_heads or family == "qwen3"):
        refuse(where, "head_dim", None, f"it is needed (hidden_size is {d_model}, num_attention_heads {n_heads})")
    attention_bias = family in ("llama", "qwen3") and flag(where, "attention_bias", get("attention_bias"))
    bos = get("bos_token_id")
    try:
        return ModelConfig(
            family=family,
            vocab_size=size("vocab_size"),
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=n_heads if get("num_key_value_heads") is None else size("num_key_value_heads"),
            head_dim=d_model // n_heads if get("head_dim") is None else size("head_dim"),
            d_ff=size("intermediate_size"),
            norm_eps=number(where, "rms_norm_eps", get("rms_norm_eps")),
            max_positions=max_positions,
            rope=read_rope(where, raw, max_positions),
            tied_head=flag(where, "tie_word_embeddings", get("tie_word_embeddings")),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=family == "llama" and flag(where, "mlp_bias", get("mlp_bias")),
            qk_norm=family == "qwen3",
            windows=_windows(where, family, n_layers, get),
            dtype=_dtype(where, raw),
            bos_id=None if bos is None else integer(where, "bos_token_id", bos, 0),
            eos_ids=_eos_ids(where, get("eos_token_id"), Path(folder), size("vocab_size")),
        )
    except InputError as error:
        if str(error).startswith(("model: ", "rope: ")):  # from config.py, which knows no file
            raise InputError(f"{where}: {error}") from None
        raise


def is_prequantized(folder: str | Path) -> bool:
    """Whether config.json says that linears are stored in bitsandbytes' NF4. InputError for any other quantisation."""
    path = Path(folder) / "config.json"
    return _quantization(str(path), read_json_object(path).get("quantization_config"))


def _quantization(where: str, block: object) -> bool:
    if block is None:
        return False
    fields = mapping(where, "quantization_config", block)
    for name, entry in QUANTIZATION.items():
        entry.check(where, f"quantization_config.{name}", fields.get(name))
    for name, value in fields.items():
        if name not in QUANTIZATION and value is not None:
            refuse(where, f"quantization_config.{short(name)}", value, _UNKNOWN)
    return True


def _family(where: str, raw: dict[str, Any]) -> Any:
    kind, named = raw.get("model_type"), raw.get("architectures")
    by_name = {name: family for family, name in ARCHITECTURES.items()}
    if kind is not None and text(where, "model_type", kind) not in ARCHITECTURES:
        refuse(where, "model_type", kind, f"supported: {', '.join(ARCHITECTURES)}")
    if named is None or not texts(where, "architectures", named):
        if kind is None:
            raise InputError(f"{where}: has neither model_type nor architectures, so it does not say what model it is")
        return kind
    family = by_name.get(named[0]) if len(named) == 1 else None
    if family is None:
        refuse(where, "architectures", named, f"supported: one of {', '.join(by_name)}")
    if kind not in (None, family):
        refuse(where, "architectures", named, f"but model_type is {kind!r}")
    return family


def _check_known(where: str, raw: dict[str, Any], family: str) -> None:
    for name, value in raw.items():
        entry = FIELDS.get(name)
        if entry is None and value is not None:
            refuse(where, short(name), value, _UNKNOWN)
        if isinstance(entry, Used) and family not in entry.families:
            only(where, f"{name} (which {family} does not have)", value, entry.unread)
        if isinstance(entry, Rule):
            entry.check(where, name, value)


def _windows(where: str, family: str, n_layers: int, get: Any) -> tuple[int | None, ...]:
    window, types = get("sliding_window"), get("layer_types")
    if family in _QWEN and not flag(where, "use_sliding_window", get("use_sliding_window")):
        window = None
    if window is not None:
        integer(where, "sliding_window", window)
    if types is None:
        first = integer(where, "max_window_layers", get("max_window_layers"), 0) if family in _QWEN else 0
        return tuple(window if i >= first else None for i in range(n_layers))
    known = ("full_attention",) if window is None else ("full_attention", "sliding_attention")
    if family == "mistral" and window is not None:
        known = ("sliding_attention",)  # transformers gives every layer of a Mistral the window
    if len(texts(where, "layer_types", types)) != n_layers or not set(types) <= set(known):
        rule = f"it must name each of {n_layers} layers {' or '.join(known)} (sliding_window is {window})"
        refuse(where, "layer_types", types, rule)
    return tuple(window if each == "sliding_attention" else None for each in types)


def _dtype(where: str, raw: dict[str, Any]) -> Any:
    """The dtype of the weights; float32, which loses nothing, where the file does not say."""
    said = {name: raw[name] for name in ("dtype", "torch_dtype") if raw.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, str) or value.removeprefix("torch.") not in DTYPES:
            refuse(where, name, value, f"supported: {', '.join(DTYPES)}")
    values = [value.removeprefix("torch.") for value in said.values()]
    if len(set(values)) > 1:
        refuse(where, "torch_dtype", values[1], f"but dtype is {values[0]!r}")
    return values[0] if values else "float32"


def _eos_ids(where: str, value: object, folder: Path, vocab_size: int) -> tuple[int, ...]:
    said, path = {where: value}, folder / "generation_config.json"
    if path.exists():
        said[str(path)] = read_json_object(path).get("eos_token_id")
    found = []
    for file, ids in said.items():
        for each in token_ids(file, "eos_token_id", ids):
            if each >= vocab_size:
                refuse(file, "eos_token_id", each, f"but the ids of this model end at {vocab_size - 1} (vocab_size); "
                       "fetch the file from where the weights come")
            found.append(each)
    return tuple(dict.fromkeys(found))


def write_config(folder: str | Path, config: ModelConfig) -> None:
    """Write ``folder/config.json`` in the published style, which transformers 4 (from 4.43) and 5 both read.

    Raises InputError where the family's config.json cannot say what ``config`` says.
    """
    family, biased = config.family, config.qkv_bias and config.o_bias
    expected = {
        "qkv_bias": family == "qwen2" or (biased and family in ("llama", "qwen3")),
        "o_bias": biased and family in ("llama", "qwen3"),
        "mlp_bias": config.mlp_bias and family == "llama",
        "qk_norm": family == "qwen3",
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise InputError(f"model: {name} is {getattr(config, name)}, which config.json of {family!r} cannot say")
    ids = config.eos_ids
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": config.bos_id,
        "eos_token_id": None if not ids else ids[0] if len(ids) == 1 else list(ids),
        "torch_dtype": config.dtype,
        **write_rope(config.rope, config.max_positions),
        **_write_windows(config),
    }
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = config.o_bias
    if family == "llama":
        fields["mlp_bias"] = config.mlp_bias
    with staged(Path(folder)) as staging:
        staging.write("config.json", json_bytes(fields))


def _write_windows(config: ModelConfig) -> dict[str, Any]:
    windows = set(config.windows)
    sizes = windows - {None}
    fits = {"llama": not sizes, "mistral": len(windows) == 1}.get(config.family, len(sizes) < 2)
    if not fits:
        raise InputError(f"model: windows are {short(config.windows)}; config.json of {config.family!r} cannot say so")
    if config.family == "llama":
        return {}
    window = next(iter(sizes), None)
    if config.family == "mistral":
        return {"sliding_window": window}
    first = next((i for i, each in enumerate(config.windows) if each is not None), config.n_layers)
    fields: dict[str, Any] = {"sliding_window": window, "max_window_layers": first}
    fields["use_sliding_window"] = window is not None
    if window is not None:
        # transformers 4 before 4.53 knows max_window_layers only; later ones read layer_types first.
        fields["layer_types"] = ["full_attention" if each is None else "sliding_attention" for each in config.windows]
    return fields

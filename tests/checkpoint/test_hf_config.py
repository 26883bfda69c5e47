"""config.json: published files of both generations, round trips with transformers, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitune.checkpoint.hf_config import ARCHITECTURES, FIELDS, read_config, write_config
from minitune.config import ModelConfig, Rope
from minitune.errors import InputError

COMMON = {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False}
LLAMA_7B = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "num_attention_heads": 32,
    "num_hidden_layers": 32, "rms_norm_eps": 1e-06, "torch_dtype": "float16", "vocab_size": 32000, "pad_token_id": 0,
    "max_sequence_length": 2048, "transformers_version": "4.28.0.dev0",
}
LLAMA_2_7B = {
    **COMMON, "_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
    "model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 4096, "intermediate_size": 11008,
    "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "torch_dtype": "float16", "vocab_size": 32000,
    "transformers_version": "4.31.0.dev0",
}
LLAMA_3_8B = {
    **COMMON, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 500000.0, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "vocab_size": 128256,
}
LLAMA_3_1_8B = {
    **LLAMA_3_8B, "max_position_embeddings": 131072, "mlp_bias": False, "eos_token_id": [128001, 128008, 128009],
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}
LLAMA_3_2_1B = {
    **LLAMA_3_1_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "tie_word_embeddings": True, "eos_token_id": 128001,
    "rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "factor": 32.0},
}
MISTRAL_7B = {
    **COMMON, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "vocab_size": 32000,
}
QWEN2_7B = {
    **COMMON, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151643, "hidden_size": 3584, "intermediate_size": 18944,
    "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
    "torch_dtype": "bfloat16", "transformers_version": "4.37.2", "use_sliding_window": False, "use_mrope": False,
    "vocab_size": 152064,
}
QWEN2_5_7B = {**QWEN2_7B, "transformers_version": "4.40.1"}
QWEN_YARN = {
    **QWEN2_7B, "max_position_embeddings": 32768,
    "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
}
QWEN3_8B = {
    **COMMON, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False,
    "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 4096,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_sliding_window": False, "vocab_size": 151936,
}
SHAPE_7B = {"vocab_size": 32000, "d_model": 4096, "n_layers": 32, "n_heads": 32, "head_dim": 128}
PUBLISHED: dict[str, tuple[dict[str, Any], ModelConfig]] = {
    "llama-7b": (LLAMA_7B, ModelConfig(**SHAPE_7B, n_kv_heads=32, d_ff=11008, norm_eps=1e-6, dtype="float16",
                                       bos_id=1, eos_ids=(2,))),
    "llama-2-7b": (LLAMA_2_7B, ModelConfig(**SHAPE_7B, n_kv_heads=32, d_ff=11008, max_positions=4096,
                                           dtype="float16", bos_id=1, eos_ids=(2,))),
    "llama-3-8b": (LLAMA_3_8B, ModelConfig(**SHAPE_7B | {"vocab_size": 128256}, n_kv_heads=8, d_ff=14336,
                                           max_positions=8192, rope=Rope(theta=5e5), bos_id=128000,
                                           eos_ids=(128001,))),
    "llama-3.1-8b": (LLAMA_3_1_8B, ModelConfig(
        **SHAPE_7B | {"vocab_size": 128256}, n_kv_heads=8, d_ff=14336, max_positions=131072, bos_id=128000,
        eos_ids=(128001, 128008, 128009),
        rope=Rope(kind="llama3", theta=5e5, factor=8.0, original_max_positions=8192))),
    "llama-3.2-1b": (LLAMA_3_2_1B, ModelConfig(
        vocab_size=128256, d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, d_ff=8192,
        max_positions=131072, tied_head=True, bos_id=128000, eos_ids=(128001,),
        rope=Rope(kind="llama3", theta=5e5, factor=32.0, original_max_positions=8192))),
    "mistral-7b-v0.1": (MISTRAL_7B, ModelConfig(**SHAPE_7B, family="mistral", n_kv_heads=8, d_ff=14336,
                                                max_positions=32768, windows=(4096,) * 32, bos_id=1, eos_ids=(2,))),
    "mistral-7b-v0.3": ({**MISTRAL_7B, "sliding_window": None, "rope_theta": 1000000.0, "vocab_size": 32768},
                        ModelConfig(**SHAPE_7B | {"vocab_size": 32768}, family="mistral", n_kv_heads=8, d_ff=14336,
                                    max_positions=32768, rope=Rope(theta=1e6), bos_id=1, eos_ids=(2,))),
    "qwen2-7b": (QWEN2_7B, ModelConfig(
        family="qwen2", vocab_size=152064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128,
        d_ff=18944, norm_eps=1e-6, max_positions=131072, rope=Rope(theta=1e6), qkv_bias=True, bos_id=151643,
        eos_ids=(151643,))),
    "qwen2.5-7b": (QWEN2_5_7B, ModelConfig(
        family="qwen2", vocab_size=152064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128,
        d_ff=18944, norm_eps=1e-6, max_positions=131072, rope=Rope(theta=1e6), qkv_bias=True, bos_id=151643,
        eos_ids=(151643,))),
    "qwen-yarn": (QWEN_YARN, ModelConfig(
        family="qwen2", vocab_size=152064, d_model=3584, n_layers=28, n_heads=28, n_kv_heads=4, head_dim=128,
        d_ff=18944, norm_eps=1e-6, max_positions=32768, qkv_bias=True, bos_id=151643, eos_ids=(151643,),
        rope=Rope(kind="yarn", theta=1e6, factor=4.0, original_max_positions=32768))),
    "qwen3-8b": (QWEN3_8B, ModelConfig(
        family="qwen3", vocab_size=151936, d_model=4096, n_layers=36, n_heads=32, n_kv_heads=8, head_dim=128,
        d_ff=12288, norm_eps=1e-6, max_positions=40960, rope=Rope(theta=1e6), qk_norm=True, bos_id=151643,
        eos_ids=(151645,))),
}


def put(folder: Path, config: Any, name: str = "config.json") -> Path:
    (folder / name).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, tmp_path: Path) -> None:
    raw, expected = PUBLISHED[name]
    assert read_config(put(tmp_path, raw)) == expected


TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32, "rope_theta": 5e5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6},
    "yarn-full": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6,
                  "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7,
                  "mscale_all_dim": 0.9, "truncate": False},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"sliding_window": 24, "eos_token_id": [2, 5], "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "eos_token_id": 3},
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 8, "num_key_value_heads": 4,
              "layer_types": ["sliding_attention", "full_attention"] * 2},
}


def theirs(family: str, **values: Any) -> Any:
    pytest.importorskip("transformers")
    import transformers

    kind = getattr(transformers, ARCHITECTURES[family].replace("ForCausalLM", "Config"))
    return kind(**TINY, max_position_embeddings=128, **{"num_key_value_heads": 4} | values)


def meaning(config: Any) -> dict[str, Any]:
    """What a transformers config says about the model, without bookkeeping and without fields at their defaults."""
    names = (
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads hidden_act "
        "num_key_value_heads max_position_embeddings rms_norm_eps tie_word_embeddings attention_bias mlp_bias "
        "sliding_window layer_types bos_token_id eos_token_id dtype use_sliding_window"
    )
    said = {name: getattr(config, name, None) for name in names.split()}
    rope = {"beta_fast": 32.0, "beta_slow": 1.0} if config.rope_parameters["rope_type"] == "yarn" else {}
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    return said | {"head_dim": head_dim, "rope": rope | config.rope_parameters}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("varied", [False, True])
def test_round_trip_with_transformers(family: str, rope: str, varied: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    config = theirs(family, rope_parameters=dict(ROPES[rope]), dtype="bfloat16", **VARIANTS[family] if varied else {})
    config.save_pretrained(tmp_path / "theirs")
    ours = read_config(tmp_path / "theirs")
    assert (ours.family, ours.n_layers, ours.d_ff, ours.max_positions) == (family, 4, 48, 128)
    assert ours.rope.kind == ROPES[rope]["rope_type"] and ours.rope.theta == ROPES[rope]["rope_theta"]
    windows = {"llama": (None,) * 4, "mistral": (24,) * 4, "qwen2": (None, None, 16, 16), "qwen3": (8, None, 8, None)}
    if varied:
        assert ours.windows == windows[family]
        assert (ours.o_bias, ours.qkv_bias) == {"llama": (True, True), "qwen2": (False, True), "qwen3": (True, True),
                                                "mistral": (False, False)}[family]
    write_config(tmp_path / "ours", ours)
    assert read_config(tmp_path / "ours") == ours
    assert meaning(AutoConfig.from_pretrained(tmp_path / "ours")) == meaning(config)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "rope_parameters" not in written and "torch_dtype" in written  # what transformers 4 reads


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_defaults_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import AutoConfig

    sizes = {**TINY, "hidden_size": 4096, "num_attention_heads": 32, "model_type": family}
    their = AutoConfig.from_pretrained(put(tmp_path, sizes))
    ours = read_config(tmp_path)
    assert (ours.n_kv_heads, ours.head_dim) == (their.num_key_value_heads, getattr(their, "head_dim", 128))
    assert (ours.max_positions, ours.norm_eps) == (their.max_position_embeddings, their.rms_norm_eps)
    assert ours.rope == Rope(theta=their.rope_parameters["rope_theta"])
    assert ours.windows[0] == (their.sliding_window if family == "mistral" else None)
    assert (ours.bos_id, ours.eos_ids or (None,)) == (their.bos_token_id, (their.eos_token_id,))
    assert ours.tied_head is their.tie_word_embeddings is False
    assert ours.dtype == "float32"


def test_both_names_of_the_model(tmp_path: Path) -> None:
    raw = dict(MISTRAL_7B)
    del raw["model_type"]
    assert read_config(put(tmp_path, raw)).family == "mistral"
    raw = {**MISTRAL_7B, "architectures": None}
    assert read_config(put(tmp_path, raw)).family == "mistral"


def test_generation_config_adds_end_tokens(tmp_path: Path) -> None:
    put(tmp_path, LLAMA_3_8B)
    put(tmp_path, {"eos_token_id": [128001, 128009], "temperature": 0.6}, "generation_config.json")
    assert read_config(tmp_path).eos_ids == (128001, 128009)
    put(tmp_path, {"eos_token_id": [128001, 128256]}, "generation_config.json")
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id is 128256; .* end at 128255"):
        read_config(tmp_path)
    put(tmp_path, {"eos_token_id": "x"}, "generation_config.json")
    with pytest.raises(InputError, match="generation_config"):
        read_config(tmp_path)


def test_both_generations_of_rope(tmp_path: Path) -> None:
    block = dict(LLAMA_3_1_8B["rope_scaling"])
    raw = {**LLAMA_3_1_8B, "rope_parameters": {**block, "rope_theta": 5e5}}
    assert read_config(put(tmp_path, raw)) == PUBLISHED["llama-3.1-8b"][1]
    raw["rope_parameters"]["factor"] = 4.0
    with pytest.raises(InputError, match="contradict"):
        read_config(put(tmp_path, raw))
    outside = {**block, "original_max_position_embeddings": None}
    raw = {**LLAMA_3_1_8B, "rope_scaling": outside, "original_max_position_embeddings": 8192}
    assert read_config(put(tmp_path, raw)) == PUBLISHED["llama-3.1-8b"][1]


YARN = QWEN_YARN["rope_scaling"]
REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA_2_7B, {"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    (LLAMA_2_7B, {"pretraining_tp": 2}, "pretraining_tp is 2"),
    (LLAMA_2_7B, {"pretraining_tp": True}, "pretraining_tp is True"),
    (LLAMA_2_7B, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    (LLAMA_2_7B, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA_2_7B, {"quantization_config": {"load_in_4bit": True}}, "quantization_config.bnb_4bit_quant_type is None"),
    (LLAMA_2_7B, {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
    (LLAMA_2_7B, {"new_thing": 3}, "'new_thing' is 3; this field is unknown"),
    (LLAMA_2_7B, {"sliding_window": 4096}, "sliding_window .which llama does not have. is 4096"),
    (LLAMA_2_7B, {"layer_types": ["sliding_attention"] * 32}, "layer_types"),
    (LLAMA_2_7B, {"layer_types": ["full_attention"] * 31}, "each of 32 layers"),
    (MISTRAL_7B, {"attention_bias": True}, "attention_bias .which mistral"),
    (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "layer_types"),
    (QWEN2_7B, {"mlp_bias": True}, "mlp_bias"),
    (QWEN2_7B, {"layer_types": ["full_attention"] * 27 + ["linear_attention"]}, "layer_types"),
    (QWEN3_8B, {"head_dim": None}, "head_dim"),
    (QWEN3_8B, {"head_dim": 127}, "head_dim is 127"),
    (LLAMA_2_7B, {"hidden_size": "4096"}, "hidden_size is '4096'"),
    (LLAMA_2_7B, {"hidden_size": 4096.0}, "hidden_size is 4096.0"),
    (LLAMA_2_7B, {"hidden_size": True}, "hidden_size is True"),
    (LLAMA_2_7B, {"hidden_size": None}, "hidden_size is None"),
    (LLAMA_2_7B, {"hidden_size": 4097}, "head_dim"),
    (LLAMA_2_7B, {"hidden_size": -1}, "hidden_size is -1"),
    (LLAMA_2_7B, {"vocab_size": 10**400}, "vocab_size"),
    (LLAMA_2_7B, {"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    (LLAMA_2_7B, {"num_key_value_heads": 5}, "config.json: model: n_heads 32 is no multiple"),
    (LLAMA_2_7B, {"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    (LLAMA_2_7B, {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    (LLAMA_2_7B, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
    (LLAMA_2_7B, {"torch_dtype": "float64"}, "torch_dtype is 'float64'"),
    (LLAMA_2_7B, {"dtype": "bfloat16"}, "but dtype is 'bfloat16'"),
    (LLAMA_2_7B, {"eos_token_id": [2, "3"]}, "eos_token_id is '3'"),
    (LLAMA_2_7B, {"eos_token_id": -1}, "eos_token_id is -1"),
    (LLAMA_2_7B, {"eos_token_id": 32000}, "eos_token_id is 32000; but the ids of this model end at 31999"),
    (LLAMA_2_7B, {"bos_token_id": 1.0}, "bos_token_id"),
    (LLAMA_2_7B, {"model_type": "gemma"}, "model_type is 'gemma'; supported: llama"),
    (LLAMA_2_7B, {"model_type": "qwen2"}, "but model_type is 'qwen2'"),
    (LLAMA_2_7B, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    (LLAMA_2_7B, {"architectures": ["LlamaModel"]}, "architectures"),
    (LLAMA_2_7B, {"architectures": "LlamaForCausalLM"}, "architectures"),
    (LLAMA_2_7B, {"architectures": None, "model_type": None}, "neither model_type nor architectures"),
    (LLAMA_2_7B, {"rope_theta": "1e4"}, "rope_theta is '1e4'"),
    (LLAMA_2_7B, {"rope_theta": 0}, "rope_theta is 0"),
    (LLAMA_2_7B, {"rope_scaling": "linear"}, "rope_scaling"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_scaling.type is 'longrope'; supported"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "but rope_type is 'yarn'"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
    (LLAMA_2_7B, {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor is 2.0"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor is '2'"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 1}}, "rope_scaling.alpha is 1"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "partial_rotary"),
    (LLAMA_2_7B, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    (LLAMA_2_7B, {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    (LLAMA_2_7B, {"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 99}}, "4096"),
    (LLAMA_3_1_8B, {"original_max_position_embeddings": 4096}, "original_max_position_embeddings is 4096; but"),
    (LLAMA_3_1_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is None"),
    (LLAMA_3_1_8B, {"rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], "low_freq_factor": 4.0}}, "high_freq_factor"),
    (QWEN_YARN, {"rope_scaling": {**YARN, "attention_factor": 0}}, "attention_factor is 0"),
    (QWEN_YARN, {"rope_scaling": {**YARN, "truncate": 1}}, "truncate is 1"),
    (QWEN_YARN, {"rope_scaling": {**YARN, "beta_fast": [32]}}, "beta_fast"),
]


@pytest.mark.parametrize(("base", "change", "message"), REFUSED, ids=lambda each: str(each)[:40])
def test_refuses_by_name(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message) as error:
        read_config(put(tmp_path, {**base, **change}))
    assert str(error.value).startswith(str(tmp_path / "config.json")) and len(str(error.value)) < 1500


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"])
def test_missing_size(name: str, tmp_path: Path) -> None:
    raw = {key: value for key, value in LLAMA_2_7B.items() if key != name}
    with pytest.raises(InputError, match=f"{name} is missing"):
        read_config(put(tmp_path, raw))


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[]", "3", "", "{", '{"a":' * 50_000, '{"a": "\\ud800"}', "\ufeff{}"]
)
def test_refuses_malformed_json(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(put(tmp_path, text))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: there is no such file"):
        read_config(tmp_path)


def test_unused_null_fields_pass(tmp_path: Path) -> None:
    assert read_config(put(tmp_path, {**LLAMA_2_7B, "something_new": None})) == PUBLISHED["llama-2-7b"][1]


def test_yarn_nulls_and_zeros_are_absent(tmp_path: Path) -> None:
    block = {**YARN, "factor": None, "beta_fast": None, "mscale": 0, "mscale_all_dim": 1.0}
    raw = {**QWEN_YARN, "max_position_embeddings": 131072, "rope_scaling": block}
    rope = read_config(put(tmp_path, raw)).rope
    assert (rope.factor, rope.beta_fast, rope.mscale, rope.mscale_all_dim) == (4.0, 32.0, None, 1.0)


@pytest.mark.parametrize(
    "change",
    [
        {"qk_norm": True},
        {"qkv_bias": True},
        {"windows": (4,) * 32},
        {"family": "mistral", "windows": (4,) * 31 + (None,)},
        {"family": "mistral", "o_bias": True, "qkv_bias": True},
        {"family": "qwen2"},
        {"family": "qwen2", "qkv_bias": True, "windows": (4,) * 31 + (8,)},
        {"family": "qwen3", "qk_norm": True, "mlp_bias": True},
        {"rope": Rope(kind="dynamic", factor=2.0, original_max_positions=512)},
    ],
)
def test_write_refuses_what_the_format_cannot_say(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot say|can only say"):
        write_config(tmp_path, ModelConfig(**{**SHAPE_7B, "n_kv_heads": 32, "d_ff": 11008, **change}))
    assert not (tmp_path / "config.json").exists()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**40) | st.floats() | st.text(max_size=4)
    | st.sampled_from(["silu", "yarn", "linear", "float16", "full_attention", "sliding_attention"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["type", "rope_type", "factor", "rope_theta", "x"]), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    base=st.sampled_from([LLAMA_3_1_8B, MISTRAL_7B, QWEN_YARN, QWEN3_8B]),
    change=st.dictionaries(st.sampled_from(list(FIELDS)) | st.text(max_size=5), VALUES, max_size=3),
)
def test_only_input_error_for_any_config(base: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    try:
        config = read_config(put(tmp_path, {**base, **change}))
    except InputError as error:
        assert len(str(error)) < 1500
    else:
        write_config(tmp_path / "again", config)
        assert read_config(tmp_path / "again") == config

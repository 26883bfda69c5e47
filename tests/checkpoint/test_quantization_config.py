"""quantization_config of config.json: bitsandbytes' NF4 is known, everything else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitune.checkpoint.hf_config import is_prequantized, read_config, write_config
from minitune.errors import InputError

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
}


def put(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantized(change: object) -> dict[str, Any]:
    """quantization_config as transformers writes it, with a change; ... takes a field away."""
    written = {
        "_load_in_4bit": True, "_load_in_8bit": False, "load_in_4bit": True, "load_in_8bit": False,
        "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0, "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    }
    block = {**written, **change} if isinstance(change, dict) else change
    if isinstance(block, dict):
        block = {name: value for name, value in block.items() if value is not ...}
    return {**LLAMA, "quantization_config": block}


OLD = {"quant_method": ..., "_load_in_4bit": ..., "_load_in_8bit": ..., "bnb_4bit_quant_storage": ...}


@pytest.mark.parametrize("change", [{}, OLD, {"load_in_8bit": ...}, {"new_thing": None}], ids=str)
def test_prequantized(change: dict[str, Any], tmp_path: Path) -> None:
    assert is_prequantized(put(tmp_path, quantized(change))) is True
    config = read_config(tmp_path)
    write_config(tmp_path, config)
    assert is_prequantized(tmp_path) is False and "quantization" not in (tmp_path / "config.json").read_text()
    assert is_prequantized(put(tmp_path, quantized(None))) is is_prequantized(put(tmp_path, LLAMA)) is False
    assert read_config(tmp_path) == config  # the shape alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({"quant_method": method}, f"quant_method is '{method}'; only bitsandbytes is read")
          for method in ("gptq", "awq", "fp8", "compressed-tensors")],
        ({"quant_method": ["bitsandbytes"]}, "quant_method is"),
        ({"load_in_8bit": True}, "load_in_8bit is True; 8-bit weights are not read; .* supported: None, False"),
        ({"_load_in_8bit": True}, "_load_in_8bit is True"),
        ({"load_in_4bit": False}, "load_in_4bit is False"),
        ({"load_in_4bit": 1}, "load_in_4bit is 1"),
        ({"load_in_4bit": ...}, "load_in_4bit is None"),
        ({"_load_in_4bit": False}, "_load_in_4bit is False"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is 'fp4'; only NF4 is read; .*; supported: 'nf4'"),
        ({"bnb_4bit_quant_type": ...}, "bnb_4bit_quant_type is None"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'"),
        ({"bits": 4}, "quantization_config.'bits' is 4; this field is unknown"),
        ("nf4", "quantization_config is 'nf4'; it must be an object"),
        ([], "it must be an object"),
    ],
    ids=str,
)
def test_refuses_other_quantisations(change: object, message: str, tmp_path: Path) -> None:
    put(tmp_path, quantized(change))
    for ask in (read_config, is_prequantized):
        with pytest.raises(InputError, match=message) as error:
            ask(tmp_path)
        assert str(error.value).startswith(str(tmp_path / "config.json")) and "quantization_config" in str(error.value)

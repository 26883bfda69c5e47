"""Prequantised NF4: what bitsandbytes wrote is read bit for bit; whatever it would not write is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from minitune.checkpoint import reader
from minitune.checkpoint.hf_config import is_prequantized, read_config
from minitune.checkpoint.prequantized import FIELDS, MAX_STATE, NESTED_FIELDS, STATE, find, read
from minitune.checkpoint.reader import SINGLE, Checkpoint
from minitune.errors import InputError
from minitune.ops.nf4 import TABLE, NF4Weight, quantize

W = "model.layers.0.mlp.up_proj.weight"
SHAPE = (40, 50)  # 32 blocks of 64, the last one not full


def state_of(weight: NF4Weight) -> dict[str, Any]:
    """The fields of quant_state that bitsandbytes writes for a weight."""
    state: dict[str, Any] = {
        "quant_type": "nf4", "blocksize": weight.blocksize, "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    if weight.nested_offset is not None:
        nested = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": weight.nested_offset.item()}
        state |= nested
    return state


def text(value: Any) -> Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


def stored(weight: NF4Weight, name: str = W) -> dict[str, Tensor]:
    """The tensors that bitsandbytes stores for a weight, by their names in the file."""
    tensors = {name: weight.packed[:, None], f"{name}.absmax": weight.absmax, f"{name}.quant_map": torch.tensor(TABLE)}
    if weight.nested_absmax is not None and weight.nested_code is not None:
        tensors[f"{name}.nested_absmax"] = weight.nested_absmax
        tensors[f"{name}.nested_quant_map"] = weight.nested_code.clone()  # safetensors refuses shared memory
    tensors[f"{name}.{STATE}"] = text(state_of(weight))
    return tensors


def put(folder: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, folder / SINGLE)
    return Checkpoint.open(folder)


def weight_of(nested: bool = True, **options: Any) -> NF4Weight:
    return quantize(torch.randn(*SHAPE).to(torch.bfloat16), nested, **options)


def equal(a: NF4Weight, b: NF4Weight) -> bool:
    """Bit by bit, the decoded values included."""
    mine, other = a.tensors(), b.tensors()
    return (
        mine.keys() == other.keys()
        and all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)
        and (a.blocksize, a.shape, a.dtype) == (b.blocksize, b.shape, b.dtype)
        and torch.equal(a.dequantize(), b.dequantize())
    )


# ---- what is read ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chunk", [64, reader.CHUNK])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1), (3, 7), (64, 1024)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_reads_bit_for_bit(
    nested: bool, dtype: torch.dtype, shape: tuple[int, int], chunk: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(reader, "CHUNK", chunk)
    weight = quantize(torch.randn(*shape).to(dtype), nested, blocksize=32)
    checkpoint = put(tmp_path, stored(weight))
    assert find(checkpoint).keys() == {W}
    assert equal(read(checkpoint, W, shape, "cpu"), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("nested", [False, True])
def test_reads_into_gpu_memory(nested: bool, tmp_path: Path) -> None:
    weight = weight_of(nested)
    found = read(put(tmp_path, stored(weight)), W, SHAPE, "cuda")
    assert found.device.type == "cuda" and equal(found.to("cpu"), weight)


def test_mixed_checkpoint(tmp_path: Path) -> None:
    other = "model.layers.1.mlp.up_proj.weight"
    first, second, plain = weight_of(), weight_of(False, blocksize=128), torch.randn(8, 8)
    skipped = {"model.layers.0.mlp.down_proj.weight": plain, "model.norm.weight": torch.ones(8)}
    checkpoint = put(tmp_path, {**stored(first), **stored(second, other), **skipped})
    found = find(checkpoint)
    assert found.keys() == {W, other}
    assert set(checkpoint.names()) == {*found, *skipped, *found[W], *found[other]}
    assert (len(found[W]), len(found[other])) == (5, 3)
    assert equal(read(checkpoint, W, SHAPE, "cpu"), first) and equal(read(checkpoint, other, SHAPE, "cpu"), second)


def test_a_plain_checkpoint_has_none(tmp_path: Path) -> None:
    checkpoint = put(tmp_path, {"model.norm.weight": torch.ones(8), "bytes": torch.zeros(3, dtype=torch.uint8)})
    assert find(checkpoint) == {}
    with pytest.raises(InputError, match=r"'model\.norm\.weight' is torch\.float32"):
        read(checkpoint, "model.norm.weight", (8,), "cpu")
    with pytest.raises(InputError, match="no tensor 'x'"):
        read(checkpoint, "x", (8,), "cpu")


@pytest.mark.parametrize("offset", [0, 0.0, -1.5, 1e-45])
def test_offsets_that_are_fine(offset: float, tmp_path: Path) -> None:
    weight = weight_of()
    checkpoint = put(tmp_path, {**stored(weight), f"{W}.{STATE}": text({**state_of(weight), "nested_offset": offset})})
    found = read(checkpoint, W, SHAPE, "cpu").nested_offset
    assert found is not None and found.item() == torch.tensor(offset, dtype=torch.float32).item()


# ---- bitsandbytes as the oracle -------------------------------------------------------------------------------------
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reads_what_bitsandbytes_saves(dtype: torch.dtype, nested: bool, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    shape = (96, 1000)
    packed, state = functional.quantize_4bit(
        torch.randn(*shape, dtype=dtype), quant_type="nf4", compress_statistics=nested, blocksize=64
    )
    companions = {f"{W}.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    checkpoint = put(tmp_path, {W: packed, **companions})
    assert set(find(checkpoint)[W]) == set(companions)
    weight = read(checkpoint, W, shape, "cpu")
    assert torch.equal(weight.packed, packed.view(-1)) and torch.equal(weight.absmax, state.absmax)
    assert weight.nested is nested and weight.dtype == dtype
    assert torch.equal(weight.dequantize(), functional.dequantize_4bit(packed, state))


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    # Rows of at least 64: narrower ones bitsandbytes 0.50 decodes wrongly on a CPU.
    LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                 num_attention_heads=4)).save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head", "down_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(tmp_path / "nf4")
    assert is_prequantized(tmp_path / "nf4") and not is_prequantized(tmp_path / "plain")
    assert read_config(tmp_path / "nf4").d_model == 64
    with Checkpoint.open(tmp_path / "nf4") as checkpoint:
        found = find(checkpoint)
        linears = {f"{name}.weight": part for name, part in model.named_modules() if hasattr(part, "quant_state")}
        assert len(linears) == 12 and found.keys() == linears.keys()
        for name, linear in linears.items():
            weight = read(checkpoint, name, (linear.out_features, linear.in_features), "cpu")
            theirs = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
            assert torch.equal(weight.dequantize(), theirs), name


# ---- what is refused ------------------------------------------------------------------------------------------------
def refused(checkpoint: Checkpoint, message: str, shape: tuple[int, ...] = SHAPE) -> str:
    with pytest.raises(InputError, match=message) as error:
        find(checkpoint)
        read(checkpoint, W, shape, "cpu")
    found = str(error.value)
    assert SINGLE in found and W in found and len(found) < 1500
    return found


STATES: list[tuple[dict[str, Any], str]] = [
    ({"quant_type": "fp4"}, "quant_type is 'fp4'; supported: 'nf4'"),
    ({"quant_type": ["nf4"]}, r"quant_type is \['nf4'\]"),
    ({"quant_type": ...}, "quant_type is None"),
    ({"blocksize": 48}, "blocksize is 48; it must be a power of two from 32 to 4096"),
    ({"blocksize": 0}, "blocksize is 0"),
    ({"blocksize": -64}, "blocksize is -64"),
    ({"blocksize": 8192}, "blocksize is 8192"),
    ({"blocksize": 64.0}, r"blocksize is 64\.0"),
    ({"blocksize": True}, "blocksize is True"),
    ({"blocksize": "64"}, "blocksize is '64'"),
    ({"blocksize": 10**400}, "blocksize is 1000"),
    ({"blocksize": 128}, r"absmax' is torch\.uint8 \[32\]; it must be torch\.uint8 \[16\]"),
    ({"blocksize": ...}, "needs exactly"),
    ({"dtype": "float64"}, "dtype is 'float64'; supported: 'float32', 'float16', 'bfloat16'"),
    ({"dtype": {}}, r"dtype is \{\}"),
    ({"dtype": ...}, "needs exactly"),
    ({"shape": [50, 40]}, r"shape is \[50, 40\]; but config\.json needs \[40, 50\]"),
    ({"shape": [2000]}, r"shape is \[2000\]"),
    ({"shape": None}, "shape is None"),
    ({"shape": "40x50"}, "shape is '40x50'"),
    ({"shape": ...}, "needs exactly"),
    ({"nested_blocksize": 128}, "nested_blocksize is 128; supported: 256"),
    ({"nested_dtype": "float16"}, "nested_dtype is 'float16'; supported: 'float32'"),
    ({"nested_offset": "0.1"}, r"nested_offset is '0\.1'; it must be a finite float32"),
    ({"nested_offset": True}, "nested_offset is True"),
    ({"nested_offset": None}, "nested_offset is None"),
    ({"nested_offset": 1e39}, r"nested_offset is 1e\+39"),
    ({"nested_offset": 10**400}, "nested_offset is 1000"),
    ({"nested_offset": ...}, "'nested_blocksize', 'nested_dtype'; for a nested absmax it needs exactly"),
    ({"extra": 1}, "'extra'; for a nested absmax it needs exactly"),
]


@pytest.mark.parametrize(("change", "message"), STATES, ids=lambda each: str(each)[:40])
def test_refuses_states(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    weight = weight_of()
    state = {name: value for name, value in {**state_of(weight), **change}.items() if value is not ...}
    found = refused(put(tmp_path, {**stored(weight), f"{W}.{STATE}": text(state)}), message)
    assert f"{W}.{STATE}" in found or "absmax" in found


def test_refuses_nested_fields_of_a_plain_weight(tmp_path: Path) -> None:
    state = text(state_of(weight_of(True)))
    refused(put(tmp_path, {**stored(weight_of(False)), f"{W}.{STATE}": state}), "for a plain absmax it needs exactly")


GOOD = json.dumps(state_of(NF4Weight(torch.zeros(1000, dtype=torch.uint8), torch.zeros(32), None, None, None, 64,
                                     SHAPE, torch.bfloat16))).encode()
RAW: dict[str, tuple[Any, str]] = {
    "truncated": (GOOD[:-9], "not valid JSON"),
    "empty": (b"", "not valid JSON"),
    "trailing": (GOOD + b"}", "not valid JSON"),
    "large": (GOOD + b" " * MAX_STATE, r"at most 4,096 bytes"),
    "not utf-8": (GOOD.replace(b"nf4", b"\xff\xfe"), "not UTF-8"),
    "deep": (b"[" * 2000 + b"]" * 2000, "nested|JSON"),
    "twice": (GOOD[:-1] + b', "blocksize": 64}', "'blocksize' stands twice"),
    "NaN": (GOOD.replace(b"64", b"NaN"), "NaN is not JSON"),
    "infinite": (GOOD.replace(b"64", b"1e999"), "no finite number"),
    "surrogate": (GOOD.replace(b"nf4", b"\\ud800"), "surrogate"),
    "a list": (b"[1, 2]", r"must hold a JSON object, but holds \[1, 2\]"),
    "floats": (torch.ones(40), r"is torch\.float32 \[40\]; it must hold JSON"),
    "two dimensions": (text(GOOD)[None], "it must hold JSON text"),
}


@pytest.mark.parametrize("fault", RAW)
def test_refuses_texts(fault: str, tmp_path: Path) -> None:
    value, message = RAW[fault]
    tensor = value if isinstance(value, Tensor) else text(value)
    found = refused(put(tmp_path, {**stored(weight_of(False)), f"{W}.{STATE}": tensor}), message)
    assert STATE in found and "take the unquantised one" in found


def at(place: int, *values: float) -> Callable[[Tensor], Tensor]:
    """A change: these values from a place on."""

    def change(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        out[place : place + len(values)] = torch.tensor(values)
        return out

    return change


INF, NAN = float("inf"), float("nan")
TENSORS: dict[str, tuple[bool, str, Callable[[Tensor], Tensor], str]] = {
    # what changes: nested or not, which tensor, how, the message
    "packed short": (True, "", lambda t: t[:-1], r"is torch\.uint8 \[999, 1\]; it must be torch\.uint8 \[1000, 1\]"),
    "packed long": (True, "", lambda t: torch.cat((t, t)), r"\[2000, 1\]"),
    "packed transposed": (True, "", lambda t: t.t(), r"\[1, 1000\]"),
    "packed flat": (True, "", lambda t: t[:, 0], r"\[1000\]; it must"),
    "packed as bf16": (True, "", lambda t: t.view(-1).view(torch.bfloat16), r"torch\.bfloat16.*bnb_4bit_quant_storage"),
    "packed as int8": (True, "", lambda t: t.view(torch.int8), r"torch\.int8; a quantised weight"),
    "absmax short": (True, "absmax", lambda t: t[:-1], r"\[31\]; it must be torch\.uint8 \[32\]"),
    "absmax fp32": (True, "absmax", lambda t: t.float(), r"is torch\.float32 \[32\]; it must be torch\.uint8"),
    "absmax uint8": (False, "absmax", lambda t: t.byte(), r"is torch\.uint8 \[32\]; it must be torch\.float32"),
    "absmax fp16": (False, "absmax", lambda t: t.half(), r"is torch\.float16"),
    "absmax NaN": (False, "absmax", at(3, NAN, INF, INF), "absmax' holds 1 NaN and 2 infinite"),
    "map fp16": (True, "quant_map", lambda t: t.half(), r"is torch\.float16 \[16\]; it must be torch\.float32"),
    "map short": (True, "quant_map", lambda t: t[:15], r"\[15\]; it must be torch\.float32 \[16\]"),
    "map of fp4": (True, "quant_map", at(3, -0.5), r"has -0\.5 as level 3; NF4 has -0\.3949"),
    "map close": (True, "quant_map", lambda t: t * (1 + 2**-23), "as level 0; NF4 has -1"),
    "map NaN": (True, "quant_map", at(15, NAN), "quant_map' holds 1 NaN"),
    "nested short": (True, "nested_absmax", lambda t: t[:0], r"\[0\]; it must be torch\.float32 \[1\]"),
    "nested fp16": (True, "nested_absmax", lambda t: t.half(), r"torch\.float16 \[1\]; it must"),
    "nested infinite": (True, "nested_absmax", at(0, INF), "nested_absmax' holds 0 NaN and 1 infinite"),
    "nested map short": (True, "nested_quant_map", lambda t: t[:255], r"\[255\]; it must be torch\.float32 \[256\]"),
    "nested map fp64": (True, "nested_quant_map", lambda t: t.double(), r"torch\.float64 \[256\]; it must"),
    "nested map NaN": (True, "nested_quant_map", at(7, NAN, INF), "nested_quant_map' holds 1 NaN and 1 infinite"),
    "overflow": (True, "nested_quant_map", at(255, 3e38), "absmax overflows float32"),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_refuses_tensors(fault: str, tmp_path: Path) -> None:
    nested, suffix, change, message = TENSORS[fault]
    tensors = stored(quantize(torch.randn(*SHAPE).mul(100).to(torch.bfloat16), nested))
    name = f"{W}.{suffix}" if suffix else W
    tensors[name] = change(tensors[name]).contiguous()
    found = refused(put(tmp_path, tensors), message)
    assert name in found or fault == "overflow"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        (["absmax"], "lacks its companions absmax"),
        (["quant_map"], "lacks its companions quant_map"),
        ([STATE], f"lacks its companions {STATE}"),
        (["nested_absmax"], "lacks its companions nested_absmax"),
        (["nested_quant_map"], "lacks its companions nested_quant_map"),
        (["nested_absmax", "nested_quant_map"], "for a plain absmax it needs exactly"),
        (["absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE],
         rf"is torch\.uint8, but lacks its companions absmax, quant_map, {STATE}"),
        ([""], f"absmax' is there, but not '{W}' itself"),
    ],
)
def test_refuses_lost_tensors(lost: list[str], message: str, tmp_path: Path) -> None:
    gone = {f"{W}.{suffix}" if suffix else W for suffix in lost}
    tensors = {name: tensor for name, tensor in stored(weight_of()).items() if name not in gone}
    checkpoint = put(tmp_path, tensors)
    refused(checkpoint, message)
    with pytest.raises(InputError, match=message):
        read(checkpoint, W, SHAPE, "cpu")


def test_refuses_fp4_and_lists_every_fault_at_once(tmp_path: Path) -> None:
    tensors = stored(weight_of())
    tensors[f"{W}.quant_state.bitsandbytes__fp4"] = tensors.pop(f"{W}.{STATE}")
    tensors |= {"a.weight": torch.zeros(4, dtype=torch.uint8), "b.weight.absmax": torch.zeros(4)}
    checkpoint = put(tmp_path, tensors)
    found = refused(checkpoint, r"3 quantised weights cannot be read; .*\n.*")
    assert "'fp4'; only 'nf4' is read" in found
    assert "'a.weight' is torch.uint8, but lacks" in found and "'b.weight.absmax' is there" in found


def test_refuses_another_shape_in_the_config(tmp_path: Path) -> None:
    refused(put(tmp_path, stored(weight_of())), r"config\.json needs \[80, 25\]", (80, 25))


def test_file_that_shrank(tmp_path: Path) -> None:
    checkpoint = put(tmp_path, stored(weight_of()))
    raw = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(raw[:-700])
    with pytest.raises(InputError, match="shorter"):
        read(checkpoint, W, SHAPE, "cpu")


STATE_NAMES = st.sampled_from([*FIELDS, *NESTED_FIELDS, "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["nf4", "float32", 64, 256, list(SHAPE)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(STATE_NAMES, VALUES, max_size=3) | st.binary(max_size=80))
def test_only_input_error_for_any_state(change: Any, tmp_path: Path) -> None:
    weight = weight_of()
    state = text(change) if isinstance(change, bytes) else text({**state_of(weight), **change})
    try:
        found = read(put(tmp_path, {**stored(weight), f"{W}.{STATE}": state}), W, SHAPE, "cpu")
    except InputError as error:
        assert len(str(error)) < 1500
    else:
        assert found.shape == SHAPE

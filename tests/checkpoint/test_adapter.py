"""PEFT's files: what we write peft loads and computes with, what peft writes we read; everything else is refused."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitune.checkpoint.adapter import CONFIG, TENSORS, match_adapter, write_adapter
from minitune.checkpoint.adapter_reader import AdapterTensors, read_adapter
from minitune.checkpoint.folders import ABOUT
from minitune.config import LINEAR_NAMES, LoRA
from minitune.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' and peft's own

SIZES = {
    "q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16),
    "gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24),
}
N_LAYERS = 12  # two digits: "layers.1" must not stand for "layers.11"


def module_path(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"


LINEARS = [module_path(layer, name) for layer in range(N_LAYERS) for name in LINEAR_NAMES]


@dataclass
class Fake:
    """An adapter of a network."""

    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    m: Tensor | None = None


def fakes(lora: LoRA, paths: list[str]) -> dict[str, Any]:
    result = {}
    for path in paths:
        rank = int(lora.rank_pattern.get(path, lora.rank))
        rows, columns = SIZES[path.rpartition(".")[2]]
        a, b = torch.randn(rank, columns), torch.randn(rows, rank)
        result[path] = Fake(a, b, rank, lora.alpha_pattern.get(path, lora.alpha))
    return result


@pytest.fixture(scope="module")
def llama() -> Any:
    """A function that makes a tiny random Llama of transformers, always the same."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=N_LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )

    def make() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()

    return make


def peft_layers(model: Any) -> dict[str, Any]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if hasattr(m, "lora_A")}


CASES: dict[str, tuple[LoRA, list[str]]] = {
    "all": (LoRA(rank=4, alpha=8), LINEARS),
    "rslora": (LoRA(rank=4, alpha=6.5, dropout=0.1, rslora=True), LINEARS),
    "names": (LoRA(rank=2, targets=("q_proj", "v_proj")), [p for p in LINEARS if p[-6:] in ("q_proj", "v_proj")]),
    "patterns": (
        LoRA(rank=4, targets=("model.layers.1.*",), rank_pattern={module_path(1, "q_proj"): 2}),
        [p for p in LINEARS if ".layers.1." in p],
    ),
    "mixed": (
        LoRA(
            rank=4,
            alpha=8,
            rank_pattern={module_path(1, "q_proj"): 2, **{module_path(i, "up_proj"): 3 for i in range(N_LAYERS)}},
            alpha_pattern={module_path(11, "k_proj"): 5.5, **{module_path(i, "o_proj"): 3 for i in range(N_LAYERS)}},
        ),
        LINEARS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_ours(case: str, llama: Any, tmp_path: Path) -> None:
    import warnings

    pytest.importorskip("peft")
    from peft import PeftModel

    lora, paths = CASES[case]
    adapters = fakes(lora, paths)
    write_adapter(tmp_path, adapters, lora, "some/base", LINEARS)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, TENSORS, ABOUT]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft warns of missing keys and of patterns that match nothing
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(llama(), tmp_path)
    layers = peft_layers(model)
    assert layers.keys() == adapters.keys()
    for path, adapter in adapters.items():
        layer, root = layers[path], math.sqrt if lora.rslora else float
        assert layer.r["default"] == adapter.rank and layer.lora_alpha["default"] == adapter.alpha, path
        assert layer.scaling["default"] == pytest.approx(adapter.alpha / root(adapter.rank))
        assert torch.equal(layer.lora_A["default"].weight, adapter.A)
        assert torch.equal(layer.lora_B["default"].weight, adapter.B)
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "some/base" and config.task_type == "CAUSAL_LM"
    written = json.loads((tmp_path / CONFIG).read_text())
    short = case != "patterns"
    assert (len(written["target_modules"]) == len({p.rpartition(".")[2] for p in paths})) is short or case == "patterns"
    if case == "mixed":
        assert written["rank_pattern"] == {module_path(1, "q_proj"): 2, "up_proj": 3}
        assert written["alpha_pattern"] == {module_path(11, "k_proj"): 5.5, "o_proj": 3}
    elif case in ("all", "names", "rslora"):
        assert written["rank_pattern"] == {} == written["alpha_pattern"]


@pytest.mark.parametrize("case", CASES)
def test_reads_back_its_own(case: str, tmp_path: Path) -> None:
    lora, paths = CASES[case]
    adapters = fakes(lora, paths)
    write_adapter(tmp_path, adapters, lora, None, LINEARS)
    found, tensors = read_adapter(tmp_path)
    assert (found.dropout, found.rslora) == (lora.dropout, lora.rslora)
    pick = lambda table, path, default: table.get(path, table.get(path.rpartition(".")[2], default))  # noqa: E731
    for path, adapter in adapters.items():
        assert pick(found.rank_pattern, path, found.rank) == adapter.rank
        assert pick(found.alpha_pattern, path, found.alpha) == adapter.alpha
        assert path in found.targets or path.rpartition(".")[2] in found.targets
    empty: dict[str, Any] = {path: Fake(torch.zeros_like(each.A), torch.zeros_like(each.B), each.rank, each.alpha)
                             for path, each in adapters.items()}
    match_adapter(tensors, empty)
    assert all(torch.equal(empty[p].A, a.A) and torch.equal(empty[p].B, a.B) for p, a in adapters.items())


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 12, "lora_dropout": 0.05},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": r".*\.layers\.(1|11)\..*(k|v)_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 3], "layers_pattern": "layers"},
        {"target_modules": list(LINEAR_NAMES), "exclude_modules": ["layers.2.mlp.up_proj"]},
        {"target_modules": ["q_proj", "k_proj"], "init_lora_weights": "gaussian",
         "rank_pattern": {"layers.1.self_attn.q_proj": 2, "^model.layers.2.self_attn.k_proj": 3,
                          r"layers\.[4-7]\..*": 5},
         "alpha_pattern": {r"layers\.1\..*": 7, "q_proj": 9}},
        # peft sorts the keys of a file, so only an order that is sorted already comes back as it was
        {"target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 6, "proj": 3, "q_proj": 5}},
    ],
)
def test_reads_what_peft_writes(options: dict[str, Any], llama: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    layers = peft_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    lora, tensors = read_adapter(tmp_path)
    assert tensors.keys() == layers.keys()
    ranks, alphas = lora.rank_pattern, lora.alpha_pattern
    for path in tensors:
        layer, name = layers[path], path.rpartition(".")[2]
        assert ranks.get(path, ranks.get(name, lora.rank)) == layer.r["default"]
        assert alphas.get(path, alphas.get(name, lora.alpha)) == layer.lora_alpha["default"]
        assert torch.equal(tensors[path][0], layer.lora_A["default"].weight)
        assert torch.equal(tensors[path][1], layer.lora_B["default"].weight)
    named = {p for p in LINEARS if p in lora.targets or p.rpartition(".")[2] in lora.targets}
    assert named == layers.keys()
    assert lora.rslora is options.get("use_rslora", False)
    assert lora.dropout == options.get("lora_dropout", 0.0)


def adapter_folder(folder: Path, change: dict[str, Any] | None = None, **tensors: Tensor) -> Path:
    lora = LoRA(rank=2, targets=("q_proj",))
    write_adapter(folder, fakes(lora, [module_path(0, "q_proj")]), lora, None, [module_path(0, "q_proj")])
    if change:
        raw = json.loads((folder / CONFIG).read_text()) | change
        (folder / CONFIG).write_text(json.dumps(raw))
    if tensors:
        save_file(load_file(folder / TENSORS) | tensors, folder / TENSORS)
        (folder / ABOUT).unlink()
    return folder


def test_one_flipped_bit_is_found_and_an_adapter_without_a_sum_is_read_as_ever(tmp_path: Path) -> None:
    good, path = read_adapter(adapter_folder(tmp_path))[1], tmp_path / TENSORS
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    for said in ((tmp_path / ABOUT).read_text(), '{"sha256": 3}'):
        (tmp_path / ABOUT).write_text(said)
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: its SHA-256 is not the one in {ABOUT}: the "):
            read_adapter(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | {"peft_version": "0.21.2"}))     # PEFT has saved it there since
    assert read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    (tmp_path / ABOUT).write_text("{}")
    assert not torch.equal(read_adapter(tmp_path)[1][module_path(0, "q_proj")].B, good[module_path(0, "q_proj")].B)
    (tmp_path / ABOUT).unlink()
    assert read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "lacks its lora_magnitude_vector, but adapter_config.json says use_dora: true"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"a_new_field": 0}, "'a_new_field' is 0"),
        ({"r": 3}, "rank 2, but adapter_config.json says 3"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 2.0}, "r is 2.0"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": -1}, "lora_alpha is -1"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
        ({"alpha_pattern": {"(a+)+": 2}}, "too complex"),
        ({"alpha_pattern": {"(a|a)" * 30: 2}}, "too complex"),
        ({"alpha_pattern": {"[z-a]x": 2}}, "no regular expression"),
        ({"alpha_pattern": {"a" * 201: 2}}, "201 characters"),
        ({"target_modules": [3]}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["nope"]}, r"is \['nope'\]; but .* adapts model.layers.0.self_attn.q_proj; fetch"),
        ({"target_modules": ["proj"]}, r"is \['proj'\]; but .* adapts"),
        ({"target_modules": ["q_proj", "mlp.up_proj"]}, r"has no tensor of 'mlp.up_proj'; fetch"),
        ({"target_modules": "q_proj"}, "'q_proj'; a text must match whole paths; write a list"),
    ],
)
def test_refuses_fields(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(InputError, match=message) as error:
        read_adapter(adapter_folder(tmp_path, change))
    assert str(tmp_path) in str(error.value) and time.process_time() - start < 5


@pytest.mark.parametrize("change", [
    {"target_modules": ["q_proj", "query_key_value"]},      # peft lets a name stand that fits nothing
    {"target_modules": ["self_attn.q_proj"]},
    {"target_modules": [module_path(0, "q_proj")]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]},
    {"target_modules": r".*\.q_proj"},
    {"target_modules": None},
])
def test_accepts_targets_that_the_tensors_bear_out(change: dict[str, Any], tmp_path: Path) -> None:
    lora, _ = read_adapter(adapter_folder(tmp_path, change))
    assert lora.targets in (("q_proj",), (module_path(0, "q_proj"),))


def test_accepts_defaults_of_unknown_fields(tmp_path: Path) -> None:
    change = {"new_a": None, "new_b": False, "new_c": {}, "new_d": [], "new_e": "", "qalora_group_size": 16}
    lora, _ = read_adapter(adapter_folder(tmp_path, change))
    assert lora.targets == ("q_proj",)


def test_refuses_tensors_all_at_once(tmp_path: Path) -> None:
    stem = "base_model.model.model.layers.0.self_attn."
    more = {
        stem + "q_proj.lora_magnitude_vector": torch.ones(16),
        stem + "k_proj.lora_A.weight": torch.ones(2, 16),
        stem + "v_proj.lora_A.weight": torch.ones(2, 16),
        stem + "v_proj.lora_B.weight": torch.ones(8, 3),
        stem + "o_proj.lora_A.weight": torch.ones(2, 16, dtype=torch.int32),
    }
    with pytest.raises(InputError) as error:
        read_adapter(adapter_folder(tmp_path, **more))
    message = str(error.value)
    for part in ("lora_magnitude_vector", "k_proj has lora_A, but not", "share the rank", "int32", "4 of its tensors"):
        assert part in message, part


def test_refuses_nan_pickle_and_missing(tmp_path: Path) -> None:
    name = "base_model.model." + module_path(0, "q_proj") + ".lora_A.weight"
    with pytest.raises(InputError, match=re.escape(name) + ".*32 NaN"):
        read_adapter(adapter_folder(tmp_path, **{name: torch.full((2, 16), torch.nan)}))
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"no such file; copy it from where adapter_config\.json comes"):
        read_adapter(tmp_path)


def test_half_precision_files_are_widened(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    halves = {name: value.half() for name, value in load_file(folder / TENSORS).items()}
    save_file(halves, folder / TENSORS)
    (folder / ABOUT).unlink()
    _, tensors = read_adapter(folder)
    a, b, _ = tensors[module_path(0, "q_proj")]
    assert a.dtype == b.dtype == torch.float32
    assert torch.equal(a, next(v for k, v in halves.items() if "lora_A" in k).float())


def test_match_adapter_lists_everything() -> None:
    lora = LoRA(rank=2)
    ours = fakes(lora, LINEARS[:3])
    found = {path: AdapterTensors(each.A + 1, each.B) for path, each in fakes(lora, LINEARS[1:4]).items()}
    found[LINEARS[2]] = AdapterTensors(torch.ones(3, 16), torch.ones(8, 3))
    before = ours[LINEARS[1]].A.clone()
    with pytest.raises(InputError, match="4 faults") as error:
        match_adapter(found, ours)
    assert f"{LINEARS[0]} is adapted here" in str(error.value) and f"{LINEARS[3]} is in the file" in str(error.value)
    assert "A has shape [3, 16]; the network needs [2, 16]" in str(error.value)
    assert torch.equal(ours[LINEARS[1]].A, before)


def test_an_adapter_of_another_model_names_both_and_the_right_base(tmp_path: Path) -> None:
    """A few lines tell it: which adapter, which base, which base it was trained on, and some of what differs."""
    adapters = fakes(LoRA(rank=2), LINEARS)
    for name, said in (("a", "meta-llama/Llama-2-7b-hf"), ("b", None)):
        write_adapter(tmp_path / name, adapters, LoRA(rank=2), said, LINEARS)
        _, tensors = read_adapter(tmp_path / name)
        with pytest.raises(InputError) as error:
            match_adapter(tensors, fakes(LoRA(rank=2), LINEARS[:14]), tmp_path / name, Path("my-base"))
        first, *lines = str(error.value).splitlines()
        assert first.startswith(f"{tmp_path / name}: does not fit my-base: 70 faults; ") and len(lines) == 5
        assert ("says that it was trained on 'meta-llama/Llama-2-7b-hf': load that base" in first) is (said is not None)
        assert "another adapter" in first


def test_write_refuses(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no adapter"):
        write_adapter(tmp_path, {}, LoRA(), None, LINEARS)
    assert not list(tmp_path.iterdir())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("q_proj.*(|)^$[]\\", max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("q_proj.*(|)[\\", max_size=6), inner, max_size=3),
    max_leaves=5,
)
NAMES = ["r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "lora_dropout", "bias", "use_rslora"]


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), JSON, max_size=3))
def test_only_input_error_for_any_config(change: dict[str, Any], tmp_path: Path) -> None:
    if not (tmp_path / "good").exists():
        adapter_folder(tmp_path / "good")
        (tmp_path / "good" / CONFIG).rename(tmp_path / "config")
    raw = json.loads((tmp_path / "config").read_text())
    (tmp_path / "good" / CONFIG).write_text(json.dumps(raw | change))
    try:
        lora, _ = read_adapter(tmp_path / "good")
    except InputError as error:
        assert len(str(error)) < 1500
    else:
        assert lora.rank_pattern.get("q_proj", lora.rank) == 2

"""An adapter tells what its base was and in what bits it lay, and a run's folder is not taken for a model."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest

import minitune as mt
from minitune.checkpoint.folders import ABOUT
from tests.files import write_numbers


def _adapter(tiny, folder, quant):
    mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2), quant=quant).save_adapter(folder)
    return folder


@pytest.mark.parametrize("quant", ["nf4", "nf4-dq"])
def test_an_adapter_of_4_bits_says_so_and_is_warned_of_on_another_base(tiny, tmp_path, quant):
    adapter = _adapter(tiny, tmp_path / "adapter", quant)
    said = json.loads((adapter / ABOUT).read_text())
    assert said.keys() == {"sha256", "base", "quant"} and said["quant"] == quant
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", ABOUT}
    other = "nf4" if quant == "nf4-dq" else "nf4-dq"
    for here, words in ((None, "16 bits or more"), (other, other)):
        with pytest.warns(UserWarning, match=f"was trained on a base in {quant}, and this one lies in {words}, so"):
            mt.load(tiny, device="cpu", adapter=adapter, quant=here)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.load(tiny, device="cpu", adapter=adapter, quant=quant)


def test_an_adapter_of_16_bits_warns_in_4_also_where_it_was_written_over_one_of_4(tiny, tmp_path):
    _adapter(tiny, tmp_path, "nf4")
    _adapter(tiny, tmp_path, None)
    assert json.loads((tmp_path / ABOUT).read_text()).keys() == {"sha256", "base"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.load(tiny, device="cpu", adapter=tmp_path)
    with pytest.warns(UserWarning, match="base in 16 bits or more, and this one lies in nf4, .* without quant"):
        mt.load(tiny, device="cpu", adapter=tmp_path, quant="nf4")
    (tmp_path / ABOUT).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.load(tiny, device="cpu", adapter=tmp_path, quant="nf4")      # another trainer's tells nothing


@pytest.mark.parametrize("quant", [None, "nf4-dq"])
def test_another_base_is_warned_of(tiny, tmp_path, quant):
    adapter, other = _adapter(tiny, tmp_path / "adapter", quant), tmp_path / "other"
    trained = mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2, targets="q_proj"))
    for each in trained.network.adapters().values():
        each.B.data.fill_(0.1)
    trained.save_merged(other)
    with pytest.warns(UserWarning, match=r"was trained on a base with other weights than .*other has, so its answers "
                                         r"differ; adapter_config.json says that it was trained on .*: load that base"):
        mt.load(other, device="cpu", adapter=adapter, quant=quant)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in ("float32", "bfloat16"):
            mt.load(tiny, device="cpu", adapter=adapter, quant=quant, dtype=dtype)
        mt.load(tiny, device="cpu", adapter=adapter, quant=quant and "nf4-dq")
    said = json.loads((adapter / ABOUT).read_text())
    (adapter / ABOUT).write_text(json.dumps({**said, "base": "llama"}))
    with pytest.raises(mt.InputError, match="base is 'llama'; it must be a table"):
        mt.load(tiny, device="cpu", adapter=adapter, quant=quant)
    (adapter / ABOUT).write_text(json.dumps({**said, "base": {"int3": "0"}}))       # of a version to come
    assert mt.load(tiny, device="cpu", adapter=adapter, quant=quant)


@pytest.mark.parametrize(("text", "words"), [('{"quant": "int8"}', "quant is 'int8'; it must be nf4 or nf4-dq"),
                                             ('{"quant": ["nf4"]}', "quant is \\['nf4'\\]"), ("{", "not valid JSON")])
def test_a_file_that_says_something_else_is_refused(tiny, tmp_path, text, words):
    _adapter(tiny, tmp_path, "nf4")
    (tmp_path / ABOUT).write_text(text)
    with pytest.raises(mt.InputError, match=f"{ABOUT}: .*{words}"):
        mt.load(tiny, device="cpu", adapter=tmp_path)


def test_peft_reads_it_as_any_other(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    assert peft.LoraConfig.from_pretrained(_adapter(tiny, tmp_path, "nf4-dq")).r == 2


def test_a_runs_folder_given_as_a_model_is_told_apart(tiny, tmp_path):
    data, run = write_numbers(tmp_path / "data.jsonl", range(8)), tmp_path / "run"
    model = mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2), quant="nf4")
    mt.train(model, data, out=run, valid=data, tokens=64, max_steps=1, ask=(), max_new_tokens=1)
    with pytest.raises(mt.InputError) as refused:
        mt.load(run, device="cpu")
    assert str(refused.value) == (f"{run}: is the folder of a run, no model: its base is {tiny}, quant nf4; give that "
                                  f"here, and {run / 'adapter'} or {run / 'adapter-best'} as the adapter")
    for name in ("adapter", "adapter-best"):
        shutil.rmtree(run / name)
    with pytest.raises(mt.InputError, match=f"it kept nothing that was trained; its base is {tiny}"):
        mt.load(run, device="cpu")
    whole = tmp_path / "whole"
    mt.train(mt.load(tiny, device="cpu", train="norms"), data, out=whole, tokens=64, max_steps=1, ask=())
    with pytest.raises(mt.InputError, match=f"is the folder of a run, no model: give {whole / 'model'}, which it"):
        mt.load(whole, device="cpu")
    mt.load(whole / "model", device="cpu")


@pytest.mark.parametrize(("stored", "words"), [(True, "base; give that"), (False, "base, quant nf4; give that")])
def test_no_quant_is_advised_for_a_base_that_is_stored_in_4_bits(tmp_path, stored, words):
    base, run = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {}} if stored else {}))
    (run / "adapter").mkdir(parents=True)
    (run / "environment.json").write_text("{}")
    (run / "config.json").write_text(json.dumps({"model": {"path": str(base)}, "quant": "nf4"}))
    with pytest.raises(mt.InputError, match=words):
        mt.load(run, device="cpu")

"""What print(model) and print(run) say: one line."""

from __future__ import annotations

import warnings

import pytest

import minitune as mt
from tests.files import write_numbers


def _numel(model):
    return sum(value.numel() for value in model.network.hf_weights().values())


def test_a_model_tells_its_shape_and_what_is_trained(tiny):
    frozen = mt.load(tiny, device="cpu", dtype="float32")
    base = _numel(frozen)
    config = frozen.config
    shape = f"{config.family}, {config.n_layers} layers x {config.d_model}, {base:,} parameters in "
    assert repr(frozen) == f"Model({shape}float32, on cpu; all frozen)"
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2, targets=("q_proj", "down_proj")))
    n = sum(p.numel() for p in model.trainable_parameters())
    assert repr(model) == (f"Model({shape}float32, on cpu; trains {n:,} ({n / (base + n):.2%}); LoRA of rank 2 on "
                           "q_proj, down_proj)")
    mixed = mt.LoRA(rank=2, dora=True, rank_pattern={"q_proj": 4}, targets=("model.layers.0.*",))
    assert repr(mt.load(tiny, device="cpu", lora=mixed)).endswith(
        "DoRA of rank 2 to 4 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in 1 of 4 layers)")
    assert repr(mt.load(tiny, device="cpu", lora=mt.LoRA(targets="lm_head"))).endswith("on lm_head)")
    everything = mt.LoRA(targets=("all-linear", "lm_head"))
    assert repr(mt.load(tiny, device="cpu", lora=everything)).endswith("up_proj, down_proj, lm_head)")


def test_a_model_in_4_bits_and_one_with_trained_weights_count_the_same_base(tiny):
    base = _numel(mt.load(tiny, device="cpu"))
    for quant in ("nf4", "nf4-dq"):
        model = mt.load(tiny, device="cpu", dtype="float32", quant=quant)
        assert model.quant == quant and f"{base:,} parameters in float32, linears in {quant}, on cpu;" in repr(model)
    model = mt.load(tiny, device="cpu", train="full")
    assert model.quant is None and f"trains {base:,} (100.00%)" in repr(model)


@pytest.mark.parametrize(("train", "told"), [
    ("full", "all base weights"), ("head", "base weights embed_tokens"),
    ("*.2.*.q_proj.weight", "base weights q_proj of layer 2"),
    ("norms", "base weights norm; input_layernorm, post_attention_layernorm of all layers"),
    (["last:2", "*.q_proj.weight"], "base weights input_layernorm, post_attention_layernorm, k_proj, v_proj, o_proj, "
                                    "gate_proj, up_proj, down_proj of layers 2, 3; q_proj of all layers")], ids=str)
def test_a_model_tells_which_base_weights_are_trained(tiny, train, told):
    assert repr(mt.load(tiny, device="cpu", train=train)).endswith(f"%); {told})")


def test_share_counts_rows_of_added_tokens(tiny):
    model = mt.load(tiny, device="cpu", lora=mt.LoRA(rank=2), add_tokens=["<tool>"])
    n = sum(p.numel() for p in model.trainable_parameters())
    assert f"trains {n:,} ({n / (_numel(model) + n):.2%})" in repr(model)


def test_a_run_tells_how_it_went_and_where_it_lies(tiny, tmp_path):
    data = write_numbers(tmp_path / "data.jsonl", range(8))
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    run = mt.train(model, data, valid=data, tokens=64, max_steps=3, out=tmp_path / "run", max_new_tokens=1, ask=())
    n_tokens = run.n_tokens - run.n_filler
    assert repr(run) == (f"Run(finished, 3 of 3 steps, {n_tokens:,} tokens ({run.n_trained:,} trained), final loss "
                         f"{run.final_loss:.4f}, {run.tokens_per_second:,.0f} tokens/s, best validation loss "
                         f"{run.best.loss:.4f} after step {run.best.step}; saved in {tmp_path / 'run' / 'adapter'} and "
                         f"{tmp_path / 'run' / 'adapter-best'})")
    assert "saved" not in repr(mt.train(model, data, tokens=64, max_steps=1))


def test_hints_are_warnings_where_no_progress_is_shown(tiny, tmp_path, capsys):
    data = write_numbers(tmp_path / "data.jsonl", range(8))
    model = mt.load(tiny, device="cpu", dtype="float32", lora=mt.LoRA(rank=2))
    with pytest.warns(UserWarning) as caught:
        mt.train(model, data, tokens=256, quiet=True)
    said = [str(each.message) for each in caught]
    assert any(each.startswith("only 1 optimizer step,") for each in said)
    assert capsys.readouterr().err == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.train(model, data, tokens=256, quiet=False)
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in said if line.startswith("note: only")] == ["note: only 1 optimizer step"]

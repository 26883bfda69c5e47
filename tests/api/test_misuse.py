"""The public face: one clear error for each misuse."""

import pytest
import torch

pytest.importorskip("transformers")
import minitune as mt
from tests.oracles import make


def _losses_at(folder, labels):
    model = mt.load(folder)
    return model.losses_at(torch.zeros(2, model.config.d_model), labels)


MISUSE = {
    "no folder": (lambda f: mt.load("nowhere"), "nowhere"),
    "quant": (lambda f: mt.load(f, quant="fp4"), "quant is 'fp4'"),
    "device": (lambda f: mt.load(f, device="gpu"), "device"),
    "dtype": (lambda f: mt.load(f, dtype="int8"), "dtype"),
    "target": (lambda f: mt.load(f, lora=mt.LoRA(targets=("qproj",))), "qproj"),
    "pattern": (lambda f: mt.load(f, lora=mt.LoRA(rank_pattern={"o_prj": 2})), "o_prj"),
    "pattern beside targets": (lambda f: mt.load(f, lora=mt.LoRA(targets="q_proj", alpha_pattern={"k_proj": 2})),
                               "alpha_pattern has 'k_proj', but targets gives no adapter to what it names, such as"),
    "path": (lambda f: mt.load(None), "path is None"),
    "batch": (lambda f: mt.load(f).loss("text"), "loss: batch is 'text'; give an mt.Batch"),
    "batch of ids": (lambda f: mt.load(f).loss_sum([1, 2]), r"loss_sum: batch is \[1, 2\]; give an mt.Batch"),
    "adapter path": (lambda f: mt.load(f, adapter=3), "adapter is 3"),
    "seed": (lambda f: mt.load(f, lora=mt.LoRA(), seed="a"), "seed is 'a'"),
    "device meta": (lambda f: mt.load(f, device="meta"), "'meta' is not one that minitune runs on"),
    "device mps": (lambda f: mt.load(f, device="mps"), "'mps' is not one that minitune runs on"),
    "device type": (lambda f: mt.load(f, device=[1]), "device"),
    "half": (lambda f: mt.load(f).half(), "cast to torch.float16"),
    "float": (lambda f: mt.load(f, dtype="bfloat16").float(), "cast to torch.float32"),
    "to dtype": (lambda f: mt.load(f, dtype="float32").to("cpu", torch.float64), "cast to torch.float64"),
    "init folder": (lambda f: mt.init("tiny", None), "folder is None"),
    "train data": (lambda f: mt.train(mt.load(f, lora=mt.LoRA()), 3), "data is 3"),
    "rank": (lambda f: mt.LoRA(rank=0), "rank"),
    "dropout": (lambda f: mt.LoRA(dropout=1.0), "dropout"),
    "train": (lambda f: mt.load(f, train="lst:2"), "lst:2"),
    "train nothing": (lambda f: mt.load(f, train=[]), r"train is \[\]"),
    "train type": (lambda f: mt.load(f, train=3), "train is 3"),
    "train one pattern": (lambda f: mt.load(f, train="*.q_prj.*"), "names no weight of this model; names look like"),
    "train a linear": (lambda f: mt.load(f, train="q_proj"), 'of this model; did you mean "*q_proj.weight"'),
    "train a layer": (lambda f: mt.load(f, train="model.layers.1"), 'did you mean "model.layers.1.*"'),
    "train pattern": (lambda f: mt.load(f, train=["*.q_prj.*"]), "q_prj"),
    "lora and adapter": (lambda f: mt.load(f, lora=mt.LoRA(), adapter=f), "both"),
    "lr": (lambda f: mt.Training(lr=float("nan")), "lr"),
    "setting": (lambda f: mt.train(mt.load(f), [], learning_rate=1), "learning_rate"),
    "ids": (lambda f: mt.load(f).generate("hi"), "ids is 'hi'; give token ids"),
    "empty prompt": (lambda f: mt.load(f).generate([], 3), "empty"),
    "id": (lambda f: mt.load(f).generate([4096], 3), "4096"),
    "id type": (lambda f: mt.load(f).generate([1.5], 3), "ids is"),
    "temperature type": (lambda f: mt.load(f).generate([1], 3, temperature="a"), "temperature is 'a'"),
    "top_k type": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_k=1.5), "top_k is 1.5"),
    "top_p type": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_p="a"), "top_p is 'a'"),
    "stop": (lambda f: mt.load(f).generate([1], 3, stop=[3]), r"stop is \[3\]"),
    "stop type": (lambda f: mt.load(f).complete("a", 3, stop=3), "stop is 3"),
    "draw seed": (lambda f: mt.load(f).generate([1], 3, temperature=1, seed="a"), "seed is 'a'"),
    "large seed": (lambda f: mt.load(f).complete("a", 3, temperature=1, seed=2**64), "seed is 18446744073709551616"),
    "max_new_tokens": (lambda f: mt.load(f).complete("a", max_new_tokens=1.5), "max_new_tokens is 1.5"),
    "too many tokens": (lambda f: mt.load(f).generate([1], 2**31), "max_new_tokens is 2147483648"),
    "text": (lambda f: mt.load(f).complete(3), "expected text"),
    "temperature": (lambda f: mt.load(f).generate([1], 3, temperature=-1), "temperature"),
    "top_p": (lambda f: mt.load(f).generate([1], 3, temperature=1, top_p=0), "top_p"),
    "hidden of ids": (lambda f: mt.load(f).hidden([1, 2]), "hidden: batch is"),
    "labels of another dtype": (lambda f: _losses_at(f, torch.zeros(2, dtype=torch.int32)),
                                r"labels is torch.int32 \[2\]; it must be int64 \[2\], a token for each row"),
    "more labels than rows": (lambda f: _losses_at(f, torch.zeros(3, dtype=torch.int64)), r"torch.int64 \[3\]"),
    "a label of no token": (lambda f: _losses_at(f, torch.tensor([5, -100])), r"labels\[1\] is -100; it must be"),
    "a label beyond": (lambda f: _losses_at(f, torch.tensor([10**9, 5])), r"labels\[0\] is 10+; it must be a token"),
    "hidden rows": (lambda f: mt.load(f).logits_at(torch.zeros(2, 3)), r"hidden is torch.float32 \[2, 3\]; it"),
    "a text as a path": (lambda f: mt.load("word " * 80), "it must be a path, and this one is too long"),
    "a null as a path": (lambda f: mt.data.stream("a\0b", mt.load(f).tokenizer, tokens=8), "a file is 'a.x00b'"),
    "logits": (lambda f: mt.load(f).logits([1, 2, 3], torch.tensor([0, 2])), "cu_seqlens"),
    "logits text": (lambda f: mt.load(f).logits("a"), "tokens is 'a'"),
    "logits fraction": (lambda f: mt.load(f).logits([1.5]), r"tokens is \[1.5\]"),
    "logits true": (lambda f: mt.load(f).logits(torch.tensor([True])), "tokens is"),
    "logits none": (lambda f: mt.load(f).logits([]), "tokens is"),
    "logits bounds": (lambda f: mt.load(f).logits([1, 2], [0, 2**32 + 2]), "cu_seqlens is"),
    "save adapter": (lambda f: mt.load(f).save_adapter(f / "x"), "no adapter"),
    "save with adapter": (lambda f: mt.load(f, lora=mt.LoRA()).save(f / "x"), "adapter"),
    "nothing trained": (lambda f: mt.load(f).loss(mt.Batch(
        tokens=torch.tensor([1, 2]), labels=torch.tensor([-100, -100]),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32))), "no token"),
    "shape": (lambda f: mt.init("llama2-7b", f / "x"), "llama-2-7b"),
    "batch labels": (lambda f: mt.Batch(
        tokens=torch.tensor([1, 2]), labels=torch.tensor([2, 1]),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)), "-100"),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_gets_one_clear_error(case, tiny):
    action, word = MISUSE[case]
    with pytest.raises(mt.InputError, match=word.replace("*", ".")) as error:
        action(tiny)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tiny / "x").exists()


def test_a_rank_beyond_the_layer_is_refused(tmp_path):
    make("llama-2-gqa", tmp_path)
    with pytest.raises(mt.InputError, match=r"rank is 100000 for model.layers.0.self_attn.q_proj, which is \d+ x \d+"):
        mt.load(tmp_path, lora=mt.LoRA(rank=100_000))


def test_methods_of_other_trainers_are_answered_with_ours(tiny):
    model = mt.load(tiny)
    for name, ours in (("save_pretrained", r"model\.save_adapter\(folder\)"), ("print_trainable_parameters", "print"),
                       ("merge_and_unload", "save_merged")):
        with pytest.raises(AttributeError, match=ours):
            getattr(model, name)
    assert not hasattr(model, "save_pretrained")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = model.nonsense


def test_entries_of_other_trainers_are_answered_with_ours():
    with pytest.raises(AttributeError, match=r"no attribute 'LoraConfig'; here it is mt\.LoRA"):
        _ = mt.LoraConfig
    with pytest.raises(AttributeError, match=r"no attribute 'nonsense'$"):
        _ = mt.nonsense


def test_evaluate_takes_batches(tiny):
    with pytest.raises(mt.InputError, match=r"evaluate: batches holds \{'text': 'a'\}; give a list of batches, or"):
        mt.evaluate(mt.load(tiny), [{"text": "a"}])
    for wrong in (None, 3):
        with pytest.raises(mt.InputError, match=f"evaluate: batches is {wrong}; give a list of batches"):
            mt.evaluate(mt.load(tiny), wrong)
    with pytest.raises(mt.InputError, match=r"evaluate: model is \[\]; give what mt.load returns"):
        mt.evaluate([], mt.load(tiny))
    with pytest.raises(mt.InputError, match=r"evaluate: batches is 'a\.jsonl'; give a list of batches, or mt\.data"):
        mt.evaluate(mt.load(tiny), "a.jsonl")


def test_what_is_not_finite_is_not_saved_over_a_good_adapter(tiny, tmp_path):
    model = mt.load(tiny, lora=mt.LoRA(rank=2))
    model.save_adapter(tmp_path / "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with torch.no_grad():
        model.trainable_parameters()[0][0] = float("nan")
    with pytest.raises(mt.InputError, match="save_adapter: the adapter holds values that are not finite"):
        model.save_adapter(tmp_path / "adapter")
    assert before == {path: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

"""Names of settings: typos and what other trainers call ours, on the command line and in Python alike."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

import minitune as mt
from minitune.names import ELSEWHERE, TOKENIZER_ELSEWHERE, nearest, unknown_names


def test_the_nearest_name_is_the_one_that_others_call_so_then_the_one_spelt_alike():
    assert nearest("Learning-Rate", ["lr", "rank"]) == "lr" and nearest("lora_r", ["rank"]) == "rank"
    assert nearest("rnak", ["lr", "rank"]) == "rank" and nearest("zzzz", ["lr", "rank"]) is None
    assert nearest("r", ["lr"]) != "rank"
    assert unknown_names({"r", "zzzz"}, ["rank"]) == "r (here: rank), zzzz"


@pytest.mark.parametrize(("make", "message"), [
    (lambda: mt.LoRA(r=8, lora_alpha=16), "LoRA: no setting is named lora_alpha (here: alpha), r (here: rank); there "
     "are rank, alpha, dropout, targets, rslora, dora, lr_ratio, rank_pattern, alpha_pattern"),
    (lambda: mt.LoRA(target_modules=["q_proj"], lora_dropout=0.1, use_rslora=True, use_dora=True, bias="none"),
     "LoRA: no setting is named bias, lora_dropout (here: dropout), target_modules (here: targets), use_dora (here: "
     "dora), use_rslora (here: rslora); there are "),
    (lambda: mt.Training(num_train_epochs=3), "training: no setting is named num_train_epochs (here: epochs); there"),
    (lambda: mt.Data(val_file="a"), "data: no setting is named val_file (here: valid); there are field_map, "),
    (lambda: mt.train(None, "a", learning_rate=1, quant="nf4"), "train: no setting is named learning_rate (here: lr), "
     "quant; there are tokens, "),
    (lambda: mt.load("a", load_in_4bit=True, torch_dtype="bfloat16"), "load: no argument is named load_in_4bit (here: "
     "quant), torch_dtype (here: dtype); there are path, device, dtype, quant, lora, "),
    (lambda: mt.Model.generate(None, [1], do_sample=True, max_length=9), "generate: no argument is named do_sample "
     "(here: temperature), max_length (here: max_new_tokens); there are ids, max_new_tokens, temperature, "),
    (lambda: mt.Model.chat(None, [], max_tokens=3), "chat: no argument is named max_tokens (here: max_new_tokens); "
     "there are messages, "),
    (lambda: mt.Model.stream(None, "a", stop_strings="b"), "stream: no argument is named stop_strings (here: stop); "),
    (lambda: mt.data.stream("a", None, max_length=9), "stream: no argument is named max_length (here: tokens); "),
    (lambda: mt.data.stream("a", "my-llama", tokens=9), "stream: tokenizer is 'my-llama'; give model.tokenizer, or ")])
def test_a_setting_of_another_trainer_is_answered_with_ours(make, message):
    with pytest.raises(mt.InputError) as refused:
        make()
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_settings_are_dataclasses_like_any_other():
    lora = mt.LoRA(8, targets=["q_proj"])
    assert copy.deepcopy(lora) == pickle.loads(pickle.dumps(lora)) == lora and lora.targets == ("q_proj",)
    assert list(inspect.signature(mt.LoRA).parameters)[:2] == ["rank", "alpha"]
    with pytest.raises(TypeError):
        mt.Training(1)
    assert not set(ELSEWHERE) & {*mt.LoRA.__dataclass_fields__, *mt.Training.__dataclass_fields__}


def test_a_model_is_not_called(tiny):
    with pytest.raises(mt.InputError, match=r"model: it is not called here; say model.loss\(batch\)"):
        mt.load(tiny)(input_ids=[[1, 2]])


def test_what_others_tokenizers_have_is_answered_with_ours(tiny):
    tokenizer = mt.data.load_tokenizer(tiny)
    with pytest.raises(mt.InputError, match=r"tokenizer: it is not called here; say tokenizer.encode\(text\), "):
        tokenizer("text", return_tensors="pt")
    with pytest.raises(AttributeError, match=r"a Tokenizer has no apply_chat_template; here it is encode_chat\("):
        tokenizer.apply_chat_template([])
    with pytest.raises(AttributeError, match=r"a Tokenizer has no eos_token_id; here it is eos_id$"):
        assert tokenizer.eos_token_id
    ours = [re.match(r"\w+", said)[0] for said in TOKENIZER_ELSEWHERE.values() if not said.startswith("mt")]
    assert all(hasattr(tokenizer, name) for name in ours) and not hasattr(tokenizer, "other")
    assert copy.deepcopy(tokenizer).encode("a") == tokenizer.encode("a")


def test_a_batch_size_is_said_to_count_something_else():
    assert unknown_names(["batch_size", "max_length"], ["tokens"]) == (
        "batch_size (here: tokens, counted in tokens), max_length (here: tokens)")

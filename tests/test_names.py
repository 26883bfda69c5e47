"""Names of settings: typos and what other trainers call ours, on the command line and in Python alike."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest

import minitune as mt
from minitune.names import ELSEWHERE, nearest, unknown_names


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
     "quant; there are tokens, ")])
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


def test_a_batch_size_is_said_to_count_something_else():
    assert unknown_names(["batch_size", "max_length"], ["tokens"]) == (
        "batch_size (here: tokens, counted in tokens), max_length (here: tokens)")

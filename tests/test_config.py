"""Settings: the order in which LoRA takes them, and one clear error for each value that is none."""

import pytest

import minitune as mt

LARGE = 10**400


def test_lora_takes_its_settings_in_the_documented_order():
    lora = mt.LoRA(8, 64, 0.1, ["q_proj"], True, False, 4.0, {"q_proj": 2}, {"q_proj": 3})
    assert lora == mt.LoRA(rank=8, alpha=64, dropout=0.1, targets=("q_proj",), rslora=True, dora=False, lr_ratio=4.0,
                           rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3})
    assert lora.targets == ("q_proj",)


WRONG = {
    "targets": (lambda: mt.LoRA(targets=[3]), r"targets is \[3\]; it must be a text, or a list of texts"),
    "a set": (lambda: mt.LoRA(targets={"q_proj"}), "targets is {'q_proj'}"),
    "table": (lambda: mt.LoRA(rank_pattern=[1]), r"rank_pattern is \[1\]; it must be a table"),
    "key": (lambda: mt.LoRA(alpha_pattern={1: 2}), "alpha_pattern is {1: 2}; it must be a table"),
    "rank in a table": (lambda: mt.LoRA(rank_pattern={"q_proj": 1.5}), r"rank_pattern\['q_proj'\] is 1.5"),
    "alpha in a table": (lambda: mt.LoRA(alpha_pattern={"q_proj": "2"}), r"alpha_pattern\['q_proj'\] is '2'"),
    "nan": (lambda: mt.LoRA(alpha_pattern={"q_proj": float("nan")}), "positive, finite"),
    "large rank": (lambda: mt.LoRA(rank=2**31), "rank is 2147483648; it must be at most 2147483647"),
    "large alpha": (lambda: mt.LoRA(alpha=LARGE), "positive, finite"),
    "large warmup": (lambda: mt.Training(warmup=LARGE), "finite number"),
    "warmup between": (lambda: mt.Training(warmup=1.5), "warmup is 1.5; below 1 it is a share of the steps"),
    "decay between": (lambda: mt.Training(schedule="wsd", decay=2.5), "decay is 2.5; below 1 it is a share"),
    "tokens": (lambda: mt.Training(tokens=3_000_000_000), "tokens is 3000000000; it must be at most 2147483647"),
    "tokens as text": (lambda: mt.Training(tokens="8"), "tokens is '8'; it must be a whole number"),
    "seed": (lambda: mt.Training(seed=99999999999999999999), r"seed is 99999999999999999999; .* to 2\*\*64 - 1"),
    "long": (lambda: mt.Training(optimizer="x" * 10_000), "optimizer is 'xxx"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_named_with_its_value(case):
    action, words = WRONG[case]
    with pytest.raises(mt.InputError, match=words) as error:
        action()
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_every_seed_of_torch_is_taken():
    for seed in (0, -(2**63), 2**64 - 1):
        assert mt.Training(seed=seed).seed == seed

"""What a flag of another trainer, a typo in a value and a positional given as a flag are answered with: one line."""

from __future__ import annotations

import pytest

pytest.importorskip("tyro")
from minitune.cli import main
from minitune.commands import COMMANDS
from minitune.commands.flags.declared import positionals, settings
from minitune.commands.flags.help import shown
from minitune.commands.flags.parse import load_command, parse
from minitune.commands.flags.suggestions import DONE_HERE, done_here, instead, instead_of_value
from minitune.config import LINEAR_NAMES
from minitune.errors import InputError

FLAGS = {name: {path[-1] for path in settings(load_command(name))} for name in COMMANDS}
SAID = {
    "--save-steps 5": "there is no flag --save-steps; did you mean --save-every?",
    "--save-total-limit 2": "there is no flag --save-total-limit; the last two checkpoints are kept (--save-every), "
                            "and the best adapter at each evaluation (--evaluate-every)",
    "--resume-from-checkpoint r1": "there is no flag --resume-from-checkpoint; --resume goes on with the run in --out",
    "--wandb": "there is no flag --wandb; metrics.jsonl has every step, and --tensorboard writes event files",
    "--report-to=wandb": "there is no flag --report-to; metrics.jsonl has every step",
    "--optimizer adamw_8bit": "--optimizer is 'adamw_8bit'; it must be one of adamw, sgd; say --moments 8bit",
    "--optimizer paged_adamw_8bit": "say --moments 8bit",
    "--optim adamw": "there is no flag --optim; did you mean --optimizer?",
    "--lora-r 8": "did you mean --rank?", "--lora-alpha 8": "did you mean --alpha?",
    "--per-device-train-batch-size 4": "a step is counted in tokens here, --tokens times --micro-batches",
    "--gradient-accumulation-steps 4": "did you mean --micro-batches?", "--learning-rate 1": "did you mean --lr?",
    "--num-train-epochs 3": "did you mean --epochs?", "--max-seq-length 3": "did you mean --tokens?",
    "--bf16": "there is no flag --bf16; bfloat16 is taken where the device is good at it; --dtype says another",
    "--load-in-4bit": "there is no flag --load-in-4bit; --quant nf4-dq holds the base in 4 bits",
    "--gradient_checkpointing": "--memory full", "--packing True": "samples are always packed",
    "--train.save_interval 3": "there is no flag --train.save_interval; did you mean --save-every?",
    "--targets q_porj v_proj": "--targets has 'q_porj', which names no linear; did you mean q_proj?",
    "--targets=al-linear": "did you mean all-linear?",
    "--rank-pattern q_proj": "--rank-pattern is 'q_proj'; it takes names, each with a whole number: --rank-pattern "
                             "NAME INT ...",
    "--rank-pattern q_proj=4": "--rank-pattern is 'q_proj=4'; it takes names, each with a whole number",
    "--rank-pattern q_proj 4 v_proj": "--rank-pattern is 'q_proj 4 v_proj'",
    "--alpha-pattern q_porj 4.5": "--alpha-pattern has 'q_porj', which names no linear; did you mean q_proj?",
    "--model_name_or_path x": "BASE is told by its place: minitune train BASE DATA",
    "--flash-attn": "there is no flag --flash-attn; attention never forms the scores as a whole",
    "--deepspeed x": "there is no flag --deepspeed; one device does the run", "--model x": "BASE is told by its place",
    "--seeed 1": "did you mean --seed?", "--verbose": "there is no flag --verbose (see",
    "--dataset x": "there is no flag --dataset; DATA is told by its place", "--base x": "BASE is told by its place",
}


@pytest.mark.parametrize("flags", SAID)
def test_what_train_says(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "a", "b", *flags.split()])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == "" and said.err.startswith("minitune: train: ")
    assert SAID[flags] in said.err and said.err.endswith("(see minitune train --help)\n") and said.err.count("\n") == 1


def test_patterns_and_full_names_of_linears_are_no_typos():
    flags = ["--targets", "model.layers.[01].*", "self_attn.q_proj", "lm_head", *LINEAR_NAMES, "--rank-pattern",
             "*.q_proj", "4", "v_proj", "8"]
    lora = parse("train", ["a", "b", *flags]).lora
    assert lora.targets[:2] == ("model.layers.[01].*", "self_attn.q_proj") and lora.rank_pattern["v_proj"] == 8
    assert parse("train", ["a", "b", "--alpha-pattern", "q_proj", "1e-3"]).lora.alpha_pattern == {"q_proj": 1e-3}


def test_what_is_said_names_only_flags_that_the_command_has():
    for name, flags in FLAGS.items():
        for foreign in DONE_HERE:
            for word in done_here(foreign, flags).replace("(", " ").replace(",", " ").replace(")", " ").split():
                if word.startswith("--"):
                    assert word[2:].replace("-", "_") in flags, (name, foreign, word)
    assert done_here("save-steps", FLAGS["chat"]) == "" != done_here("Load-In-4bit", FLAGS["chat"])
    assert all(done_here(foreign, FLAGS["train"]) or "temperature" in DONE_HERE[foreign] for foreign in DONE_HERE)
    assert not set(DONE_HERE) & set().union(*FLAGS.values())


def test_names_and_values():
    assert instead("rnak", ["rank"], "--") == "; did you mean --rank?" and instead("zzzz", ["rank"]) == ""
    assert instead_of_value("cosin", ["cosine", "wsd"]) == "; did you mean cosine?"
    assert instead_of_value("adam8bit", ["adamw"]) == "; say --moments 8bit"
    assert [path[-1] for path in positionals(shown(load_command("merge")))] == ["base", "adapter", "out"]


@pytest.mark.parametrize(("text", "words"), [
    ("save_strategy = 3\n", ":1: 'save_strategy' is no setting of this command; the last two checkpoints are kept"),
    ("[training]\nbatch_size = 4\n", ":2: 'training.batch_size' is no setting of this command; a step is counted in"),
    ('[training]\noptimizer = "adamw_8bit"\n', ":2: training.optimizer is 'adamw_8bit'; it must be one of adamw, sgd; "
     "say --moments 8bit"),
    ("zzzz = 1\n", ":1: 'zzzz' is no setting of this command; there are ")])
def test_a_file_of_settings_is_answered_alike(tmp_path, text, words):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(InputError) as refused:
        parse("train", ["a", "b", "--config", str(file)])
    assert str(refused.value).startswith(f"{file}{words}")

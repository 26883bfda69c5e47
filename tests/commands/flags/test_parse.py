"""Commands and their flags: what is refused and how, the help of each command, shell completion."""

import dataclasses
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import pytest

pytest.importorskip("tyro")
import minitune.commands
from minitune.cli import main
from minitune.commands import COMMANDS
from minitune.commands.flags.declared import options, settings
from minitune.commands.flags.groups import Reading
from minitune.commands.flags.parse import load_command, parse
from minitune.commands.train import Train
from minitune.config import Data, LoRA, Quant, Training
from minitune.errors import InputError
from minitune.names import COMMANDS_ELSEWHERE, ELSEWHERE, QUANTS_ELSEWHERE, nearest

NAMES = list(COMMANDS)
WRONG = {
    "flag": (["a", "b", "--rnak", "8"], "there is no flag --rnak; did you mean --rank?"),
    "flag before": (["--rnak", "8", "a", "b"], "there is no flag --rnak; did you mean --rank?"),
    "flag with =": (["a", "b", "--rnak=8"], "there is no flag --rnak; did you mean --rank?"),
    "underscores": (["a", "b", "--max_step", "8"], "did you mean --max-steps?"),
    "no-": (["a", "b", "--no-rslroa"], "did you mean --no-rslora?"),
    "as others call it": (["a", "b", "--learning_rate", "1"], "there is no flag --learning_rate; did you mean --lr?"),
    "like nothing": (["a", "b", "--zzzzz", "1"], "there is no flag --zzzzz (see minitune train --help)"),
    "choice": (["a", "b", "--schedule", "cosin"], "--schedule is 'cosin'; it must be one of constant, "),
    "choice meant": (["a", "b", "--quant=nf4dq"], "did you mean nf4-dq?"),
    "whole": (["a", "b", "--rank", "1.5"], "--rank is '1.5'; it must be a whole number"),
    "number": (["a", "b", "--lr", "fast"], "--lr is 'fast'; it must be a number"),
    "may be left out": (["a", "b", "--max-steps", "x"], "--max-steps is 'x'; it must be a whole number"),
    "long": (["a", "b", "--lr", "x" * 9999], "--lr is 'xxx"),
    "no value": (["a", "b", "--lr"], "--lr has no value; write --lr NUMBER"),
    "empty path": (["a", "b", "--out", ""], "--out is empty; give a path"),
    "empty path with =": (["a", "b", "--adapter="], "--adapter is empty; give a path"),
    "empty place": (["a", ""], "an argument is empty; its value may be a shell variable that is not set"),
    "empty place behind values": (["--lr", "1", "", "b"], "an argument is empty; "),
    "empty place behind a switch": (["--dry-run", "", "b"], "an argument is empty; "),
    "flag as value": (["a", "b", "--out", "--lr", "1"], "--out"),
    "half a pair": (["a", "b", "--rank-pattern", "q_proj"], "--rank-pattern NAME INT ..."),
    "pair": (["a", "b", "--rank-pattern", "q_proj", "x"], "--rank-pattern NAME INT ..."),
    "missing": ([], "BASE and DATA are missing"),
    "no values": (["a", "b", "--train"], "--train has no value; write --train "),
    "no values before a flag": (["a", "b", "--ask", "--lr", "1"], "--ask has no value"),
    "no pairs": (["a", "b", "--rank-pattern"], "--rank-pattern has no value; write --rank-pattern NAME INT ..."),
    "all taken": (["--train", "full", "a", "b", "--lr", "1"], "--train took 'full a b', so BASE and DATA come before"),
    "one taken": (["a", "--targets", "q_proj", "b", "--lr", "1"], "DATA is missing; --targets took 'q_proj b', so"),
    "one missing": (["a"], "DATA is missing"),
    "one more": (["a", "b", "c"], "not understood: c (see"),
    "text": (["a", "--rank is no flag"], "'--rank is no flag' looks like a flag; put -- before text"),
    "short flag": (["a", "b", "-r", "3"], "there is no flag -r; did you mean --rank?"),
    "short flag like nothing": (["a", "b", "-zzzz", "3"], "'-zzzz' looks like a flag"),
    "one hyphen": (["a", "b", "-lr=3"], "there is no flag -lr; did you mean --lr?"),
    "dots": (["a", "b", "--train.epochs", "3"], "there is no flag --train.epochs; did you mean --epochs?"),
    "dots and =": (["a", "b", "--lora.rank=3"], "there is no flag --lora.rank; did you mean --rank?"),
    "dots like nothing": (["a", "b", "--x.zzzz", "3"], "'--x.zzzz' looks like a flag"),
    "config": (["a", "b", "--config"], "--config PATH"),
}


@pytest.mark.parametrize("case", WRONG)
def test_misuse_ends_in_one_line(case, capsys):
    args, words = WRONG[case]
    with pytest.raises(SystemExit) as ended:
        main(["train", *args])
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("minitune: train: ") and words in said.err and said.err.count("\n") == 1
    assert said.err.endswith("(see minitune train --help)\n") and len(said.err) < 300 and "│" not in said.err


def test_text_that_looks_like_a_flag_stays_text():
    assert parse("complete", ["base", "--", "--rnak"]).text == "--rnak"
    assert parse("complete", ["base", "- not one"]).text == "- not one"
    assert parse("complete", ["base", "-1"]).text == "-1"
    assert parse("train", ["a", "b", "--ask=--rnak"]).ask == ("--rnak",)


def test_an_empty_text_is_a_text():
    assert parse("complete", ["base", ""]).text == ""
    assert parse("train", ["a", "b", "--ask", "x", "", "y"]).ask == ("x", "", "y")
    assert parse("chat", ["base", "--system", ""]).system == ""


def _numbers():
    hints = get_type_hints(Train)
    for part in (LoRA, Training, Data):
        assert part in hints.values()
        for name, hint in get_type_hints(part).items():
            if {int, float} & {*options(hint)} and name != "seed":
                yield part, name


@pytest.mark.parametrize(("part", "name"), list(_numbers()), ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_no_number_is_nan_infinite_or_negative(part, name):
    for value in ("nan", "inf", "-inf", "-1"):
        with pytest.raises(InputError, match=name.replace("_", "[-_]")):
            parse("train", ["a", "b", f"--{name.replace('_', '-')}={value}"])
        with pytest.raises(InputError, match=name):
            part(**{name: float(value)})


def test_a_command_knows_what_was_given(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[training]\nlr = 1e-3\n")
    command = parse("train", ["a", "b", "--rank", "16", "--no-rslora", "--max_steps=3", "--config", str(file)])
    assert {("lora", "rank"), ("lora", "rslora"), ("training", "max_steps"), ("training", "lr")} <= command.given
    assert ("lora", "alpha") not in command.given and Train.given == frozenset()
    assert parse("complete", ["base", "--", "--max-new-tokens"]).given == frozenset()


@pytest.mark.parametrize("other", [["--adapter", "x"], ["--train", "full"]])
@pytest.mark.parametrize("lora", [["--rank", "16"], ["--alpha=32"], ["--no-dora"]])
def test_flags_of_lora_are_refused_beside_an_adapter_even_at_their_defaults(other, lora):
    with pytest.raises(InputError, match="leave out the flags of LoRA"):
        parse("train", ["a", "b", *other, *lora])._load()


def test_merge_reads_its_data_as_evaluate_does(tmp_path):
    flags = ["--long", "split", "--field-map", "prompt=q", "--tokens", "64", "--chat-template-kwargs", "style=brief"]
    merge, evaluate = parse("merge", ["a", "b", "c", "--data", "d", *flags]), parse("evaluate", ["a", "b", *flags])
    for name in Reading.__dataclass_fields__:
        assert getattr(merge, name) == getattr(evaluate, name) != getattr(Reading(), name)
    with pytest.raises(InputError, match="merge: long and tokens say how --data is read, and there is no --data"):
        parse("merge", ["a", "b", "c", "--long", "refuse", "--tokens", "3"]).run()


def test_numbers_at_their_bounds_are_taken():
    command = parse("train", ["a", "b", "--lr", "1e-30", "--clip", "0", "--dropout", "0", "--seed", "-1"])
    assert (command.training.lr, command.training.clip, command.training.seed) == (1e-30, 0, -1)


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_each_command_is_whole(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert "{None" not in text and "default: None" not in text and "(default: )" not in text and "`" not in text
    known = settings(load_command(name))
    shown = set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*)", text)) - {"help"}
    flags = {path[-1].replace("_", "-") for path in known} | {"config"}
    no = {f"no-{path[-1].replace('_', '-')}" for path, hint in known.items() if hint is bool}
    assert shown <= flags | no
    for path in known:
        assert f"--{path[-1].replace('_', '-')} " in text.replace(",", " ") or f"{path[-1].upper()}" in text, path


@pytest.mark.parametrize("name", NAMES)
def test_every_flag_says_what_it_does_and_names_are_one(name):
    from minitune.commands.flags.help import texts_of

    command = load_command(name)
    owners = [command, *(hint for hint in get_type_hints(command).values() if dataclasses.is_dataclass(hint))]
    for owner in owners:
        nested = {key for key, hint in get_type_hints(owner).items() if dataclasses.is_dataclass(hint)}
        missing = {field.name for field in dataclasses.fields(owner)} - set(texts_of(owner)) - nested
        assert not missing, f"{owner.__name__}: {missing} have no text"
    last = [path[-1] for path in settings(command)]
    assert len(last) == len(set(last)), "two settings share a flag"
    assert all(len(path) <= 2 for path in settings(command)), "a file of settings opens one table"


@pytest.mark.parametrize("name", NAMES)
def test_no_part_of_a_command_may_be_left_out(name):
    """tyro makes a subcommand of an optional dataclass."""
    def walk(owner):
        for hint in get_type_hints(owner).values():
            if dataclasses.is_dataclass(hint):
                walk(hint)
            assert not (NoneType in get_args(hint) and any(map(dataclasses.is_dataclass, get_args(hint))))

    walk(load_command(name))


def test_every_file_of_a_command_is_in_the_list():
    found = set()
    for path in Path(minitune.commands.__file__).parent.glob("*.py"):
        module = importlib.import_module(f"minitune.commands.{path.stem}")
        if any(hasattr(each, "run") and dataclasses.is_dataclass(each) for each in vars(module).values()):
            found.add(path.stem)
    assert found == set(COMMANDS)


def test_what_others_call_it_is_a_name_here():
    names = {path[-1] for name in NAMES for path in settings(load_command(name))}
    assert set(ELSEWHERE.values()) <= names and not set(ELSEWHERE) & names
    quants = {each.replace("-", "_") for each in get_args(Quant)}
    assert set(QUANTS_ELSEWHERE.values()) <= quants and not set(QUANTS_ELSEWHERE) & quants
    assert set(COMMANDS_ELSEWHERE.values()) <= set(COMMANDS) and not set(COMMANDS_ELSEWHERE) & set(COMMANDS)
    assert nearest("Learning-Rate", ["lr", "rank"]) == "lr" and nearest("lora_r", ["rank"]) == "rank"
    assert nearest("rnak", ["lr", "rank"]) == "rank" and nearest("zzzz", ["lr", "rank"]) is None


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_hold_commands_and_flags(shell, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--completion", shell])
    script = capsys.readouterr().out
    assert ended.value.code in (0, None)
    assert all(f"'{name}'" in script for name in NAMES) and "--rank-pattern" in script and "--config" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_flags(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--completion", "bash"])
    script = tmp_path / "minitune.bash"
    script.write_text(capsys.readouterr().out)
    for words, place, expected in (("minitune tr", 1, "train"), ("minitune train --rank-p", 2, "--rank-pattern")):
        code = (f"source {script}; COMP_WORDS=({words}); COMP_CWORD={place}; COMP_LINE='{words}'; "
                f"COMP_POINT={len(words)}; _tyro_minitune; printf '%s\\n' \"${{COMPREPLY[@]}}\"")
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert expected in done.stdout.split()


def test_completion_of_another_shell_is_refused(capsys):
    for args in (["--completion", "tcsh"], ["--completion"], ["--completion=powershell"]):
        with pytest.raises(SystemExit) as ended:
            main(args)
        assert ended.value.code == 2 and "it must be bash, zsh or fish" in capsys.readouterr().err


def test_names_with_commas_are_told_to_stand_apart():
    with pytest.raises(InputError, match=r"--targets has 'q_proj,v_proj'; names stand apart, --targets q_proj v_proj "):
        parse("train", ["base", "data", "--targets", "q_proj,v_proj"])

"""--config FILE.toml: defaults of a command under its flags, and one error with file and line for what is wrong."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("tyro")
from minitune.commands.complete import Complete
from minitune.commands.flags.config_file import read_defaults
from minitune.commands.flags.help import shown
from minitune.commands.flags.parse import parse
from minitune.commands.train import Train
from minitune.config import LoRA, Training
from minitune.errors import InputError

WHOLE = """
base = "checkpoint"         # positional arguments too
data = "data.jsonl"
dtype = "float32"
targets = ["q_proj", "v_proj"]
max-steps = 12
ask = ["Who?", "Why?"]

[lora]
rank = 4
rank_pattern = {q_proj = 8}

[training]
lr = 1e-3
warmup = 10
"""


def _file(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_a_file_gives_every_kind_of_setting_flat_or_in_tables(tmp_path):
    command = parse("train", ["--config", _file(tmp_path, WHOLE)])
    assert type(command) is Train and type(command.lora) is LoRA and type(command.training) is Training
    assert command == Train(base=Path("checkpoint"), data=Path("data.jsonl"), dtype="float32", ask=("Who?", "Why?"),
                            lora=LoRA(rank=4, targets=("q_proj", "v_proj"), rank_pattern={"q_proj": 8}),
                            training=Training(max_steps=12, lr=1e-3, warmup=10))


def test_one_text_is_a_list_of_one_as_behind_a_flag(tmp_path):
    file = _file(tmp_path, 'base = "b"\ndata = "d"\ntrain = "last:1"\nask = "Who?"\ntargets = "q_proj"')
    command = parse("train", ["--config", file])
    assert (command.train, command.ask, command.lora.targets) == (("last:1",), ("Who?",), "q_proj")


def test_flags_win_over_the_file_and_none_unsets(tmp_path):
    file = _file(tmp_path, WHOLE)
    command = parse("train", ["other", f"--config={file}", "--rank", "2", "--dtype", "None", "--max_steps", "3",
                              "--targets", "all-linear", "--ask", "How?"])
    assert (command.base, command.data) == (Path("other"), Path("data.jsonl"))
    assert (command.lora.rank, command.lora.rank_pattern, command.lora.targets) == (2, {"q_proj": 8}, "all-linear")
    assert (command.dtype, command.training.max_steps, command.training.lr) == (None, 3, 1e-3)
    assert command.ask == ("How?",)


def test_what_neither_gives_is_missing(tmp_path):
    with pytest.raises(InputError, match="train: DATA is missing"):
        parse("train", ["--config", _file(tmp_path, 'base = "checkpoint"')])


def test_windows_ends_of_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b'\xef\xbb\xbf# mine\r\nbase = "b"\r\ntext = "t"\r\ntop_k = 5\r\n')
    assert parse("complete", ["--config", str(path)]) == Complete(Path("b"), "t", sampling=type(Complete(
        Path("b"), "t").sampling)(top_k=5))
    path.write_bytes(b'\xef\xbb\xbf# mine\r\ntop_k = 5\r\nbsae = "b"\r\n')
    with pytest.raises(InputError, match=r"run.toml:3: 'bsae' is no setting of this command; did you mean base\?"):
        parse("complete", ["--config", str(path)])


WRONG = {
    "unknown": ("lr = 1\nlrr = 1", r":2: 'lrr' is no setting of this command; did you mean lr\?"),
    "in a table": ("[lora]\n\nrnk = 1", r":3: 'lora.rnk' is no setting .* did you mean rank\?"),
    "another table's": ("[lora]\nlr = 1", r":2: 'lora.lr' is no setting of this command; lr belongs to \[training\]"),
    "another's table": ("[training]\nrank = 4", r"rank belongs to \[lora\]"),
    "table that is a setting": ("[data]\nvalid_split = 3", r":2: 'data.valid_split' .* belongs to \[samples\]"),
    "table of nothing": ("[optim]\nlr = 3", r":2: 'optim.lr' .* belongs to \[training\]"),
    "unknown table": ("[lroa]\nrank = 1", r":1: 'lroa' is no setting .* did you mean lora\?"),
    "as others call it": ("learning_rate = 1e-4", r"did you mean lr\?"),
    "like nothing": ("zzzzzz = 1", "there are adapter, add_tokens, alpha, "),
    "config": ('config = "other.toml"', ":1: 'config' is no setting"),
    "long key": (f"{'x' * 5000} = 1", "'xxx"),
    "nan": ("\nlr = nan", ":2: training: lr is nan; it must be a positive, finite number"),
    "infinite": ("[training]\nlr = -inf", ":2: training: lr is -inf"),
    "negative": ("alpha = -1", ":1: LoRA: alpha is -1"),
    "text for a number": ('lr = "fast"', ":1: lr is 'fast'; it must be a number"),
    "broken number": ("epochs = 1.5", ":1: epochs is 1.5; it must be a whole number"),
    "truth for a number": ("epochs = true", ":1: epochs is True; it must be a whole number"),
    "number for a path": ("base = 3", ":1: base is 3; it must be a path"),
    "number for texts": ("ask = [3]", r":1: ask is \[3\]; it must be a list of texts"),
    "date": ("seed = 2026-01-01", ":1: seed is datetime.date"),
    "list for a table": ("rank_pattern = [1]", ":1: rank_pattern is .* must be a table of whole numbers by name"),
    "choice": ('schedule = "cosin"', r":1: schedule is 'cosin'; it must be one of constant, .* did you mean cosine\?"),
    "table for a number": ("lora.rank.x = 1", ":1: lora.rank is {'x': 1}"),
    "number for a table": ("lora = 3", r":1: lora is a table of settings; write \[lora\]"),
    "list of tables": ("[[lora]]\nrank = 1", ":1: lora is a table of settings"),
    "twice": ("lr = 1\n[training]\nlr = 2", ":3: training.lr sets again what lr sets; keep one"),
    "twice, hyphen": ("max_steps = 1\nmax-steps = 2", ":2: max-steps sets again what max_steps sets"),
    "together": ('\nmoments = "8bit"\noptimizer = "sgd"', r':2: training: moments is "8bit"'),
    "same key": ("lr = 1\nlr = 2", "run.toml.*: not TOML: Cannot overwrite a value"),
    "no TOML": ("lr: 1e-4", ":1: not TOML: Expected '=' after a key"),
    "open end": ("targets = [", "run.toml: not TOML"),
    "deep": ("x = " + "[" * 20_000 + "]" * 20_000, "nested too deeply|not TOML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_gives_one_error_with_its_line(case, tmp_path):
    text, words = WRONG[case]
    with pytest.raises(InputError, match=words) as error:
        parse("train", ["a", "b", "--config", _file(tmp_path, text)])
    assert str(error.value).startswith(str(tmp_path / "run.toml")) and "\n" not in str(error.value)
    assert len(str(error.value)) < 800


def test_the_line_is_that_of_the_statement_not_of_the_same_words_elsewhere(tmp_path):
    text = '# lrr = 1\nask = ["""\nlrr = 2\n""",\n"lrr = 3"]\n[training]\nlr = 1\nlrr = [\n4]\n'
    with pytest.raises(InputError, match=r":8: 'training.lrr'"):
        parse("train", ["a", "b", "--config", _file(tmp_path, text)])


def test_a_file_that_is_not_one_of_settings(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"lr = 1\n\xff\n")
    with pytest.raises(InputError, match=r"run\.toml: byte 7 is not UTF-8"):
        parse("train", ["a", "b", "--config", str(path)])
    path.write_bytes(b"#" * 300_000)
    with pytest.raises(InputError, match="300,000 bytes"):
        parse("train", ["a", "b", "--config", str(path)])
    with pytest.raises(InputError, match=r"nowhere\.toml: there is no such file; --config takes a TOML file"):
        parse("train", ["a", "b", "--config", str(tmp_path / "nowhere.toml")])


KEYS = st.sampled_from(["lr", "rank", "lora", "training", "targets", "rank_pattern", "base", "max-steps", "schedule",
                        "rslora", "ask", "config", "", "x.y", "é"])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
                      lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
                      max_leaves=6)


def _toml(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=True) if isinstance(value, bool | str) else str(value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_any_file_gives_a_command_or_one_error(tmp_path, table):
    path = Path(_file(tmp_path, "\n".join(f"{json.dumps(key)} = {_toml(value)}" for key, value in table.items())))
    try:
        made, _ = read_defaults(shown(Train), path)
    except InputError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error) and len(str(error)) < 800
    else:
        assert isinstance(made.lora, LoRA) and isinstance(made.training, Training)

"""The command line from end to end on a tiny checkpoint, and exit code 2 with one line for every user error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minitune as mt

pytest.importorskip("tyro")
from minitune import cli
from minitune.cli import main
from minitune.commands import COMMANDS
from tests.files import records, write_numbers


@pytest.fixture
def data(tmp_path):
    return write_numbers(tmp_path / "data.jsonl", range(12))


def test_train_and_complete(tiny, data, tmp_path, capsys):
    out = tmp_path / "run"
    main(["train", str(tiny), str(data), "--out", str(out), "--tokens", "64", "--epochs", "2", "--rank", "2",
          "--lr", "1e-2", "--targets", "q_proj", "v_proj", "--max-new-tokens", "5", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "Number 0 is" in printed and "Number 2 is" in printed and "adapter in" in printed
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 and set(config["target_modules"]) == {"q_proj", "v_proj"}
    assert sum("loss" in record for record in records(out / "metrics.jsonl")) >= 2
    assert (out / "loss.png").stat().st_size > 5000
    main(["complete", str(tiny), "Number 3 is", "--adapter", str(out / "adapter"), "--max-new-tokens", "5",
          "--device", "cpu"])
    answer = capsys.readouterr().out
    expected = mt.load(tiny, adapter=out / "adapter", device="cpu").complete("Number 3 is", 5)
    assert answer == expected + "\n"


def _bad_line(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    return str(path)


ERRORS = {
    "no folder": (lambda f, d, t: ["train", "nowhere", d], "nowhere"),
    "no data": (lambda f, d, t: ["train", f, "nowhere.jsonl"], "nowhere.jsonl"),
    "bad line": (lambda f, d, t: ["train", f, _bad_line(t, "{")], "bad.jsonl:2"),
    "bad field": (lambda f, d, t: ["train", f, _bad_line(t, '{"promt": "a", "completion": "b"}')], "promt"),
    "nan": (lambda f, d, t: ["train", f, d, "--lr", "nan"], "lr"),
    "negative": (lambda f, d, t: ["train", f, d, "--lr", "-1"], "lr"),
    "target": (lambda f, d, t: ["train", f, d, "--targets", "q_prj"], "q_prj"),
    "long document": (lambda f, d, t: ["train", f, d, "--tokens", "4"], "data.jsonl:1"),
    "two files": (lambda f, d, t: ["train", f, d, d], "more data goes into --mix "),
    "modules": (lambda f, d, t: ["train", f, d, "--modules-to-save", "lm_head"], "--add-tokens trains the rows of"),
    "nothing to resume": (lambda f, d, t: ["train", "--resume", "--out", str(t / "empty")], "is empty, so there"),
    "out exists": (lambda f, d, t: ["train", f, d, "--out", f], "exists"),
    "shape": (lambda f, d, t: ["init", "lama-2-7b", str(t / "new")], "llama-2-7b"),
    "seed": (lambda f, d, t: ["train", f, d, "--seed", "99999999999999999999"], "seed is 99999999999999999999"),
    "tokens": (lambda f, d, t: ["train", f, d, "--tokens", "3000000000"], "tokens is 3000000000"),
    "answer": (lambda f, d, t: ["complete", f, "x", "--max-new-tokens", "99999999999"], "max_new_tokens is 999999"),
    "draw": (lambda f, d, t: ["complete", f, "x", "--temperature", "1", "--seed", "99999999999999999999"], "seed is"),
    "device": (lambda f, d, t: ["complete", f, "x", "--device", "meta"], "'meta' is not one"),
    "adapter": (lambda f, d, t: ["complete", f, "x", "--adapter", str(t / "empty")], "adapter_config.json"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_user_errors_end_in_one_line_and_exit_code_2(case, tiny, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make, word = ERRORS[case]
    arguments = make(str(tiny), str(data), tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("minitune: ") and word in message and "Traceback" not in captured.err
    assert set(tmp_path.iterdir()) == before, "something was written"


def test_no_command_prints_the_list_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    said = capsys.readouterr()
    main(["--help"])
    assert stop.value.code == 2 and said.out == "" and said.err == capsys.readouterr().out
    assert all(f"  {name} " in said.err for name in COMMANDS)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"minitune {mt.__version__}\n"


@pytest.mark.parametrize(("word", "hint"), [("tran", "did you mean train?"), ("Train", "did you mean train?"),
                                            ("finetune", "did you mean train?"), ("generate", "mean complete?"),
                                            ("--versoin", "did you mean --version?"), ("zzz", "there are demo, init, "),
                                            ("x" * 9999, "there are demo")])
def test_an_unknown_command_is_named(word, hint, capsys):
    with pytest.raises(SystemExit) as stop:
        main([word])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("minitune: there is no command ") and hint in message
    assert message.count("\n") == 1 and len(message) < 300


ENDINGS = {
    "memory of the host": (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2000000000 "
                                        "bytes."), 1, "out of memory: 2.0 GB more"),
    "memory of oneDNN": (RuntimeError("could not create a primitive"), 1, "out of memory (could not create a primiti"),
    "memory of cuBLAS": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 1,
                         "out of memory (CUBLAS_STATUS_ALLOC_FAILED)"),
    "memory of a GPU": (torch.OutOfMemoryError("CUDA out of memory"), 1, "CUDA out of memory"),
    "memory": (MemoryError(), 1, "out of memory"),
    "diverged": (mt.TrainingDiverged("step 3: loss nan"), 1, "step 3: loss nan"),
    "input": (mt.InputError("x.jsonl:3: wrong"), 2, "x.jsonl:3: wrong"),
    "file": (PermissionError(13, "Permission denied", "out"), 2, "out: Permission denied"),
}


@pytest.mark.parametrize("case", ENDINGS)
def test_how_an_error_ends(case, monkeypatch, capsys):
    error, code, words = ENDINGS[case]
    _raise_in_init(monkeypatch, error)
    with pytest.raises(SystemExit) as stop:
        main(["init", "tiny", "x"])
    message = capsys.readouterr().err
    assert stop.value.code == code and message.startswith(f"minitune: {words}") and message.count("\n") == 1


def test_what_a_device_cannot_do_is_no_lack_of_memory(monkeypatch):
    error = RuntimeError("could not create a primitive descriptor for the matmul primitive")
    _raise_in_init(monkeypatch, error)
    with pytest.raises(RuntimeError, match="descriptor"):
        main(["init", "tiny", "x"])


def test_ctrl_c_ends_with_130_and_a_fault_of_ours_is_shown(monkeypatch, capsys):
    _raise_in_init(monkeypatch, KeyboardInterrupt())
    with pytest.raises(SystemExit) as stop:
        main(["init", "tiny", "x"])
    assert stop.value.code == 130 and capsys.readouterr().err == ""
    _raise_in_init(monkeypatch, ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        main(["init", "tiny", "x"])


def _raise_in_init(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("minitune.api.init", fail)


def test_too_little_memory_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("minitune.api.init", lambda *_, **__: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(SystemExit) as stop:
        main(["init", "tiny", "x"])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 1 and message.startswith("minitune: out of memory: ") and " GB more" in message


def test_a_library_that_is_not_installed_is_named():
    code = ("import runpy, sys; sys.modules['tyro'] = None; sys.argv = ['minitune', 'init', '--help']; "
            "runpy.run_module('minitune', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr == (
        "minitune: the command line needs tyro, which is not installed; say: pip install tyro\n")


def test_python_dash_m_is_the_command_line():
    text = _run("--help").stdout
    assert all(command in text for command in ("train", "complete", "init", "demo"))
    done = _run("train", "a", "b", "--rnak", "3")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("minitune: train: there is no flag")


def test_a_terminal_without_a_letter_gets_its_code():
    done = _run("init", "--help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "tiny, \\u2026" in done.stdout


@pytest.mark.skipif(shutil.which("script") is None, reason="script makes a terminal")
def test_help_is_coloured_on_a_terminal_unless_no_color_is_set():
    for unset, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | unset
        done = subprocess.run(["script", "-qec", f"{sys.executable} -m minitune demo --help", os.devnull], check=True,
                              capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        assert "--device" in done.stdout.replace("\x1b[0m", "") and ("\x1b[" in done.stdout) == coloured


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_a_reader_that_stops_early_is_no_error():
    done = subprocess.run(f"{sys.executable} -m minitune --completion bash | head -n 1", shell=True,
                          capture_output=True, text=True, check=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1


PACKAGE = f"""
import sys, types
package = types.ModuleType("minitune")          # what minitune/__init__.py loads is not the command line's
package.__path__, package.__version__ = [{str(Path(cli.__file__).parent)!r}], "1"
sys.modules["minitune"] = package
from minitune.cli import main
"""


def _python(code):
    done = subprocess.run([sys.executable, "-c", PACKAGE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_commands_needs_neither_torch_nor_tyro():
    _python("""
main(["--help"])
main(["--version"])
try:
    main(["tran"])
except SystemExit as ended:
    assert ended.code == 2
loaded = {"torch", "tyro", "rich", "numpy"} & set(sys.modules)
assert not loaded, loaded
""")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_and_the_misuse_of_a_command_need_no_torch(name):
    assert "--device" in _python(f"""
for args, code in ((["--help"], 0), (["--zzzz"], 2), (["--config", "nowhere.toml"], 2)):
    try:
        main([{name!r}, *args])
    except SystemExit as ended:
        assert (ended.code or 0) == code, ended.code
    assert "torch" not in sys.modules, args
""") or name in ("init", "inspect")


def test_completion_needs_no_torch():
    assert "--rank" in _python("""
try:
    main(["--completion", "bash"])
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules
""")


def _run(*args, **environment):
    return subprocess.run([sys.executable, "-m", "minitune", *args], check=False, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "100"} | environment)


def test_what_is_not_utf_8_is_refused_in_words(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "base", b"a\xff.jsonl".decode("utf-8", "surrogateescape")])
    assert ended.value.code == 2 and "is not UTF-8; give what it names another name" in capsys.readouterr().err


def test_ctrl_c_ends_the_process_at_once_while_libraries_are_loaded():
    """Later it is an exception, as Python makes it; where it is ignored (a script's background) it stays so."""
    look = ("import signal, sys, minitune.__main__ as begun, minitune.cli as cli\n"
            "def look(args):\n"
            "    print(signal.getsignal(signal.SIGINT) is signal.SIG_DFL)\n"
            "    cli._load()\n"
            "    print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)\n"
            "cli._run = look\n")
    ignored = "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    for before, told in (("", "True"), (ignored, "False")):
        run = subprocess.run([sys.executable, "-c", f"{look}{before}begun.main()"], capture_output=True, text=True)
        assert run.stdout.split() == [told, told], run.stderr

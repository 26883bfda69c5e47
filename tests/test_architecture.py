"""What ARCHITECTURE.md promises of the source: imports go downward, borders hold, files and functions stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from minitune.commands import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minitune"
LEVELS = [{"errors", "names"}, {"arguments"}, {"config", "devices"}, {"kernels"}, {"ops"}, {"model"},
          {"checkpoint", "data"}, {"training", "objectives"}, {"report"}, {"api"}, {"demo", "doctor", "bench", "tune"},
          {"commands"}, {"cli"}]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
ONLY_IN = {"rich": {"report"}, "tyro": {"commands", "cli"}, "matplotlib": {"report"}, "sentencepiece": {"data"},
           "tokenizers": {"data"}, "jinja2": {"data"}, "pyarrow": {"data"}, "IPython": {"report"},
           "triton": {"kernels"}, "minitune.kernels": {"ops", "kernels"}}
FORBIDDEN = {"transformers", "peft", "bitsandbytes", "accelerate", "lightning"}
FILES = [path for path in sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")})     # kernels: a link
         if "examples" not in path.parts]


def _imports(path):
    """Every module that a file imports, in functions too, with names imported from a package."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _home(path):
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downward(path):
    home = _home(path)
    if home in ("__init__", "__main__"):
        return
    assert home in LEVEL, f"{home} has no level: add it to ARCHITECTURE.md and here"
    for name in _imports(path):
        top, *rest = name.split(".")
        if top == "minitune":
            other = rest[0]
            assert other == home or LEVEL[other] < LEVEL[home], f"{home} imports {name}, which is not below it"
        assert top not in FORBIDDEN, f"{path}: {top} is an oracle for tests, not a part of minitune"
        for part in (top, ".".join([top, *rest[:1]])):
            assert home in ONLY_IN.get(part, {home}), f"{path}: only {ONLY_IN[part]} may import {part}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short(path):
    source = path.read_text("utf-8")
    assert len(source.splitlines()) <= 400, f"{path} has {len(source.splitlines())} lines"
    tree = ast.parse(source)
    assert ast.get_docstring(tree) and source.startswith('"""'), f"{path}: the first line tells its one job"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{path}: {node.name} has {length} lines"


def test_other_files_stay_short():
    for folder in ("tests", "benchmarks", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            lines = len(path.read_text("utf-8").splitlines())
            assert lines <= 400, f"{path} has {lines} lines"


def test_every_op_has_its_test():
    helpers = {"__init__", "chunks", "documents", "attention_library"}
    for path in (PACKAGE / "ops").glob("*.py"):
        if path.stem not in helpers:
            assert (ROOT / "tests" / "ops" / f"test_{path.stem}.py").exists(), path.stem


def test_tests_lie_where_the_code_lies():
    folders = {path.parent.relative_to(PACKAGE) for path in FILES} | {Path("benchmarks"), Path("docs")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        assert path.parent.relative_to(ROOT / "tests") in folders, f"{path} tests no folder of the package"
    for name in COMMANDS:
        places = (ROOT / "tests" / "commands" / f"test_{name}.py", ROOT / "tests" / name)
        assert any(place.exists() for place in places), f"the command {name} has no test of its own"


IMPORT = """
import gc, sys, time, socket
start = time.process_time()
import torch
rival = time.process_time() - start
gc.freeze()       # else a collection of torch's objects may fall into the time
def refuse(*_, **__): raise AssertionError("import minitune opens a connection")
socket.socket.connect = refuse
state = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.nn.Linear.forward,
         torch.optim.AdamW.step, torch.Tensor.backward)
start = time.process_time()
import minitune
names = {name: getattr(minitune, name) for name in minitune.__all__}       # each is loaded at its first use
seconds = time.process_time() - start
assert state == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(), torch.nn.Linear.forward,
                 torch.optim.AdamW.step, torch.Tensor.backward), "import minitune changes torch"
heavy = set(sys.modules) & {"transformers", "peft", "tyro", "rich", "matplotlib", "triton", "sentencepiece",
                            "tokenizers", "jinja2", "pyarrow", "tensorboard"}
assert not heavy, f"import minitune loads {heavy}"
print(seconds / rival)
"""


def test_import_is_light_and_patches_nothing():
    found = []
    while len(found) < 5 and min(found, default=1.0) >= 0.4:
        found.append(float(subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True,
                                          cwd=ROOT).stdout))
    assert min(found) < 0.4, f"import minitune takes {min(found):.0%} of what torch's own import does"


def test_importing_minitune_alone_does_not_load_torch():
    code = "import sys, minitune; assert 'torch' not in sys.modules and minitune.__version__"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_functions_of_a_step_that_architecture_lists_are_there():
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8").split("```text\n")[1].split("```")[0]
    lines = [line.split("  (")[0].split() for line in text.splitlines()]
    assert len(lines) > 10
    for file, *names in lines:
        found = set()
        for node in ast.parse((ROOT / file).read_text("utf-8")).body:
            found.add(getattr(node, "name", None))
            found |= {f"{node.name}.{each.name}" for each in getattr(node, "body", ())
                      if isinstance(node, ast.ClassDef) and isinstance(each, ast.FunctionDef)}
        assert {name.strip(",") for name in names} <= found, file


def test_the_order_of_data_names_every_file():
    import minitune.data

    lines = [line.strip() for line in minitune.data.__doc__.splitlines()[2:] if line.strip()]
    named = [name for line in lines for name in line.split("  ")[0].split(", ")]
    assert sorted(named) == sorted(path.stem for path in (PACKAGE / "data").glob("*.py") if path.stem != "__init__")

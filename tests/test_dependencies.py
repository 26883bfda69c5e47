"""pyproject.toml asks for what minitune imports, and for nothing else."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPTIONAL = {"triton", "pyarrow", "IPython"}
"""Imported inside functions: what an extra brings, and a notebook that is there already."""


def _imported():
    """The top-level packages that minitune imports, in functions too."""
    for path in (ROOT / "minitune").glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                yield from (alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield node.module.split(".")[0]


def test_dependencies_are_what_minitune_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    declared = {re.split(r"[><=;\[ ]", line)[0] for line in project["dependencies"]}
    imported = set(_imported()) - sys.stdlib_module_names - {"minitune"}
    assert declared == imported - OPTIONAL
    assert {"triton", "parquet", "tensorboard"} <= project["optional-dependencies"].keys()


def test_the_tested_versions_are_none_that_torch_chooses_itself():
    """A torch for a GPU names the very triton, CUDA libraries and more that it was built for; one for CPUs, which may
    be the one that is here, names none."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert pinned.pop("torch") and len(pinned) > 50
    assert not [name for name in pinned if re.match(r"triton|nvidia|cuda", name)]
    for each in importlib.metadata.requires("torch") or ():
        exact = re.match(r"([\w.-]+)==([\w.]+)", each)
        if exact and "extra ==" not in each:
            assert pinned.get(exact[1], exact[2]) == exact[2], each

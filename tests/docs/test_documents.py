"""The guide says what is so: every command and program in it is run, every file, output and link in it is looked at."""

import importlib.util
import json
import re

import pytest
import torch

from tests.docs.blocks import Block, Runner, blocks_of, check_output, commands_of, matches
from tests.files import ROOT

pytest.importorskip("tyro")
pytest.importorskip("pyarrow")
import minitune as mt
from minitune.commands import COMMANDS
from minitune.commands.flags.declared import settings
from minitune.commands.flags.parse import load_command
from minitune.report import plot
from tests.docs.provoked import messages, prepare

DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
REPLACE = {
    "path/to/Llama-3.2-1B": "my-llama",
    "tokens=2048": "tokens=256",
    "--tokens 1024": "--tokens 256",
}
"""What a page says -> what is run, since the test's model is small and has a CPU alone."""
EXTRA = {
    "train": {"--max-new-tokens": "2", "--tokens": "256", "--ask": "Hello"},
    "evaluate": {"--tokens": "256"},
    "complete": {"--max-new-tokens": "4"},
    "chat": {"--max-new-tokens": "4"},
}
"""Flags of a command that are put behind it where the page does not give them: short rows, few and short answers."""
NOT_RUN = ("make ", "minitune tune ")
"""How shell lines begin that are not run here: they install, or need a GPU."""
README_FILES = {
    "my.jsonl": "".join(f'{{"prompt": "What is {i} + 1?", "completion": " {i + 1}."}}\n' for i in range(20)),
    "held-out.jsonl": '{"prompt": "What is 20 + 1?", "completion": " 21."}\n',
}
"""What the README calls your data."""


@pytest.fixture
def new_runner(tmp_path, monkeypatch):
    """Makes a Runner in a folder of that name."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("MINITUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plot, "plot_loss", lambda *_: None)      # a third of a short run's time

    def make(name):
        (tmp_path / name).mkdir()
        return Runner(tmp_path / name, REPLACE, EXTRA, NOT_RUN, monkeypatch)

    return make


@pytest.fixture
def runner(new_runner):
    return new_runner("page")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_the_page_runs(page, runner):
    runner.run_page(blocks_of((DOCS / page).read_text(encoding="utf-8")))


def test_run_folder_holds_what_its_page_says(runner, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.undo()
    monkeypatch.chdir(runner.folder)
    text = (DOCS / "run-folder.md").read_text(encoding="utf-8")
    (runner.folder / "my.jsonl").write_text(README_FILES["my.jsonl"], encoding="utf-8")
    runner.shell("minitune train my-llama my.jsonl --out run --valid-split 1 --tensorboard --device cpu")
    named = set(re.findall(r"^\| `([\w.-]+)/?` \|", text.partition("## metrics.jsonl")[0], re.MULTILINE))
    assert named == {path.name for path in (runner.folder / "run").iterdir()}
    steps = [json.loads(line) for line in (runner.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    fields = {name for line in steps for name in line}
    assert fields == set(re.findall(r"`([a-z_]+)`", text.partition("## metrics.jsonl")[2].partition("```")[0]))


def test_readme_runs(new_runner):
    """Each block by itself: it is no tutorial, and names its folders anew."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text[text.index("\n## Your Llama"):text.index("\n## What is different here")]
    n_run = 0
    for block in blocks_of(text):
        first = (commands_of(block.text) or [""])[0]
        language = block.language or ("sh" if first.startswith(("minitune ", "make ")) else "")
        if language in ("sh", "python"):
            runner = new_runner(f"block-{block.line}")
            for name, content in README_FILES.items():
                (runner.folder / name).write_text(content, encoding="utf-8")
            runner.run(Block(language, block.mark, block.text, block.line))
            n_run += 1
    assert n_run >= 3


@pytest.mark.parametrize("page", PAGES)
def test_page_is_short_and_its_links_lead_somewhere(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert text.startswith("# ")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
        assert target.startswith("https://") or (DOCS / target).exists(), f"{page} links to {target}"
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in prose.splitlines() if line.startswith("#")}
    for anchor in re.findall(r"\]\(#([^)]+)\)", prose):
        assert anchor in headings, f"{page} links to #{anchor}"


def test_index_lists_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert {name for name in PAGES if name != "index.md"} == set(re.findall(r"\]\(([\w-]+\.md)\)", index))


def test_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert text == reference.page(), "run: python docs/reference.py"
    for part in (mt.LoRA, mt.Training, mt.Data):
        assert all(f"\n| `{name}` | " in text for name in part.__dataclass_fields__)


def test_the_reference_names_every_environment_variable():
    sources = [ROOT / "setup.py", *(ROOT / "minitune").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"environ(?:\.get\(|\[)\"(MINITUNE_\w+)", path.read_text())}
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert len(read) > 5
    assert not {name for name in read - {"MINITUNE_SANITIZE"} if f"`{name}`" not in text}      # that one is for tests


def test_flags_in_the_prose_exist():
    known = {"--help", "--version", "--completion", "--config"}
    for name in COMMANDS:
        known |= {f"--{path[-1].replace('_', '-')}" for path in settings(load_command(name))}
    for page in PAGES:
        for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
            ours = line.rpartition(" | ")[2] if page in ("coming-from.md", "errors.md") else line
            ours = re.sub(r"`hf [^`]*`", "", ours)
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ours):
                assert flag in known or f"--{flag.removeprefix('--no-')}" in known, f"{page}: {flag}"


def test_names_of_the_package_exist():
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        for name in re.findall(r"\bmt\.([A-Za-z][\w.]*\w)", text):
            found = mt
            for part in name.split("."):
                assert hasattr(found, part), f"{page}: mt.{name}"
                found = getattr(found, part)
        lines = text.splitlines(keepends=True)      # what comes from elsewhere has models of its own, on the left
        ours = "".join(line.rpartition(" | ")[2] for line in lines) if page == "coming-from.md" else text
        for name in re.findall(r"\bmodel\.(\w+)\(", ours):
            assert hasattr(mt.Model, name), f"{page}: model.{name}"


def test_every_quoted_message_is_what_is_said(runner, monkeypatch):
    rows = re.findall(r"^\| `([^`]+)` \|", (DOCS / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 50
    prepare()
    said = list(messages(monkeypatch))
    unquoted = [each for each in said if not any(matches(row, each[1]) for row in rows)]
    assert unquoted == []
    assert [row for row in rows if not any(matches(row, message) for _, message in said)] == []


def test_replacements_are_all_needed():
    text = "".join((DOCS / page).read_text(encoding="utf-8") for page in PAGES)
    text += (ROOT / "README.md").read_text(encoding="utf-8")
    assert [said for said in REPLACE if said not in text] == []


class TestHarness:
    """That a page which is wrong is found out."""

    def test_blocks(self):
        found = blocks_of('a\n```sh\nminitune x \\\n  --y 1  # why\n```\nb\n```json title="a.jsonl"\n{}\n```\n')
        assert [(b.language, b.title, b.line) for b in found] == [("sh", None, 3), ("json", "a.jsonl", 8)]
        assert commands_of(found[0].text) == ["minitune x --y 1"]
        with pytest.raises(AssertionError, match="does not end"):
            blocks_of("```sh\nminitune x\n")

    def test_wrong_pages_fail(self, runner):
        with pytest.raises(AssertionError, match="there is no flag --rnak"):
            runner.run(Block("sh", "", "minitune train my-llama x.jsonl --rnak 3\n", 1))
        with pytest.raises(AssertionError, match="exit code 0"):
            runner.run(Block("sh", "fails", "minitune --version\n", 1))
        with pytest.raises(AssertionError, match="cannot run"):
            runner.run(Block("sh", "", "rm -r my-llama\n", 1))
        with pytest.raises(ZeroDivisionError):
            runner.run(Block("python", "", "1 / 0\n", 1))
        with pytest.raises(AssertionError, match="is not checked"):
            runner.run(Block("", "", "x\n", 1))

    def test_output(self):
        check_output("a … c\n…\nd\n", "a b  c\nx\nd\n")
        for shown in ("b\n", "d\na … c\n"):
            with pytest.raises(AssertionError, match="the page shows"):
                check_output(shown, "a b c\nd\n")
        assert matches("x: … fits", "x: it fits") and not matches("x: … fits", "x: it fits not")

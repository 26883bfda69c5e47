"""The tar from which a later run of `make gpu` starts: what it holds, what it gives back, and what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_start, harness
from minitune.errors import InputError

HERE = gpu_start.Here({"python": "cpython-311", "torch": "2.11", "triton": "3.6", "platform": "linux"}, ["9.0"],
                      "/triton")
KERNEL = '''
import json, sys
import triton
import triton.language as tl
from benchmarks.aot.compile import Row, compile_for


@triton.jit
def twice(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


hits = []
triton.knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
report = compile_for(Row("twice", twice, {"x": "*fp32:16", "n": "i32"}, {"BLOCK": 64}, {"num_warps": 1}, 255), 90)
print(json.dumps([hits, report.registers, report.ptx]))
'''


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> gpu_start.Here:
    monkeypatch.setattr(gpu_start, "ask", lambda: HERE)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return HERE


def make_tree(folder: Path, built: bytes = b"") -> Path:
    """What an extension is built of, an hour old, and the extension."""
    (folder / "csrc").mkdir(parents=True)
    (folder / "minitune").mkdir()
    for name in ("setup.py", "csrc/a.cpp"):
        (folder / name).write_text(name)
        os.utime(folder / name, (time.time() - 3600,) * 2)
    if built:
        (folder / "minitune" / "_C.abi3.so").write_bytes(built)
    return folder


def make_cache(folder: Path) -> Path:
    """One compiled kernel as Triton leaves it, and what a process that was killed leaves."""
    group = folder / "KEY"
    (group / "tmp.pid_1").mkdir(parents=True)
    for name in ("k.source", "k.ttir", "k.ptx", "k.cubin", "k.json", "tmp.pid_1/k.json"):
        (group / name).write_text(f'"{folder}/{name}"')
    children = {name: str(group / name) for name in ("k.source", "k.ttir", "k.ptx", "k.cubin", "k.json", "k.lost.json")}
    (group / "__grp__k.json").write_text(json.dumps({"child_paths": children}))
    return folder


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(file.relative_to(folder)): (file.read_bytes(), file.stat().st_mtime_ns)
            for file in folder.rglob("*") if file.is_file()}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {name: tar.extractfile(name).read() for name in tar.getnames()}


def repacked(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The tar with another stamp."""
    files = members(path)
    stamp = json.loads(files[gpu_start.STAMP])
    change(stamp)
    with tarfile.open(path, "w:xz") as tar:
        for name, data in {**files, gpu_start.STAMP: json.dumps(stamp).encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def refused(path: Path, into: Path) -> str:
    """What unpacking says, when it has changed nothing."""
    before = contents(into)
    with pytest.raises(InputError) as error:
        gpu_start.unpack(path, into, into / "cache")
    assert contents(into) == before
    text = str(error.value)
    assert text.startswith(str(path)) and "run without --start" in text and "\n" not in text
    return text


def test_an_unpacked_kernel_is_not_compiled_again(tmp_path: Path) -> None:
    """In another folder, the kernel's own file too, as on another machine."""
    pytest.importorskip("triton", reason="triton is not installed")

    def compiled(root: Path, cache: Path) -> Any:
        (root / "kernel.py").write_text(KERNEL)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        run = subprocess.run([sys.executable, root / "kernel.py"], capture_output=True, text=True, cwd=root, env={
            **environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(harness.ROOT)})
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    one, two, path = make_tree(tmp_path / "one"), make_tree(tmp_path / "two"), tmp_path / "start.tar.xz"
    hits, registers, ptx = compiled(one, one / "cache")
    assert hits == [False] and f'"{one}/kernel.py"' in ptx
    assert "1 compiled kernel, no built extension" in gpu_start.pack(path, one, one / "cache")
    packed = members(path)
    assert {Path(name).suffix for name in packed} == {".json", ".cubin", ".ptx"}
    for name, data in packed.items():
        if not name.endswith(".cubin"):     # a cubin's debug information names the kernel's folder
            assert str(tmp_path).encode() not in data and sys.prefix.encode() not in data, name
    shutil.rmtree(one)
    gpu_start.unpack(path, two, two / "elsewhere")
    before = contents(two / "elsewhere")
    assert compiled(two, two / "elsewhere") == [[True], registers, ptx.replace(str(one), str(two))]
    assert contents(two / "elsewhere") == before
    (told,) = (two / "elsewhere").glob("*/twice.json")
    assert Path(dict(json.loads(told.read_text())["extern_libs"])["libdevice"]).is_file()


def test_the_same_files_give_the_same_tar_and_come_back(tmp_path: Path, here: gpu_start.Here) -> None:
    one, two = (make_tree(tmp_path / name, b"built") for name in ("one", "two"))
    make_cache(one / "cache")
    first, second = tmp_path / "first.tar.xz", tmp_path / "second.tar.xz"
    gpu_start.pack(first, one, one / "cache")
    said = gpu_start.unpack(first, two, two / "other")
    assert said == "first.tar.xz: 1 compiled kernel, minitune/_C.abi3.so"
    assert not list((two / "other").rglob("*.part"))
    group = json.loads((two / "other/KEY/__grp__k.json").read_text())["child_paths"]
    assert group == {name: str(two / "other/KEY" / name) for name in ("k.ptx", "k.cubin", "k.json")}
    assert (two / "other/KEY/k.ptx").read_text() == f'"{two}/other/k.ptx"'
    gpu_start.pack(second, two, two / "other")
    assert set(members(first)) == {
        "made-with.json", "minitune/_C.abi3.so",
        *(f"triton-cache/KEY/{name}" for name in ("__grp__k.json", "k.ptx", "k.cubin", "k.json"))}
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        assert all((member.uid, member.uname, member.mtime) == (0, "", 0) for member in tar)


def test_folders_with_odd_names_come_back(tmp_path: Path) -> None:
    places = {"cache": '/tmp/ä "b"/cache', "root": '/tmp/ä "b"', "temp": "/tmp"}
    for suffix, text in ((".json", json.dumps([f"{places['cache']}/k", places["root"], "/tmp2", "x/tmp", "/tmp/y"])),
                         (".ptx", f'.file 1 "{places["cache"]}" /tmpx /tmp')):
        named = gpu_start._named(text, suffix, places)
        assert "${cache}" in named and "ä" not in named and "\\u" not in named and "${temp}" in named
        assert ("${temp}2" not in named and "x${temp}" not in named and "${temp}x" not in named)
        assert gpu_start._placed(named, suffix, places) == text
    assert gpu_start._placed("${L} $x {y}", ".ptx", places) == "${L} $x {y}"


def test_nothing_is_built_again_from_an_unpacked_extension(tmp_path: Path, here: gpu_start.Here) -> None:
    """setuptools looks at its own copy under build/, and at its age alone. The sources are newer than the tar."""
    trees = []
    for name in ("one", "two"):
        trees.append(tmp_path / name)
        (trees[-1] / "minitune").mkdir(parents=True)
        shutil.copytree(harness.ROOT / "csrc", trees[-1] / "csrc")
        shutil.copy(harness.ROOT / "setup.py", trees[-1])
    one, two = trees
    (one / "minitune" / "_C.abi3.so").write_bytes(b"built")
    gpu_start.pack(tmp_path / "x.tar.xz", one, tmp_path / "none")
    ahead = time.time() + 100
    os.utime(two / "csrc" / "nf4.h", (ahead, ahead))      # a clock that goes ahead
    gpu_start.unpack(tmp_path / "x.tar.xz", two, two / "cache")
    (copy,) = two.glob("build/lib*/minitune/_C.abi3.so")
    assert os.access(copy, os.X_OK) and copy.stat().st_mtime >= ahead
    run = subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=two, capture_output=True,
                         text=True, env={**os.environ, "MINITUNE_NATIVE": "", "MINITUNE_CUDA": "0", "CC": "false",
                                         "CXX": "false"})
    assert run.returncode == 0 and "building" not in run.stdout and "_C is not built" not in run.stdout, run.stdout
    assert (two / "minitune" / "_C.abi3.so").read_bytes() == copy.read_bytes() == b"built"


def test_an_extension_of_other_sources_or_for_other_gpus_is_left_out(
        tmp_path: Path, here: gpu_start.Here, monkeypatch: pytest.MonkeyPatch) -> None:
    one, path = make_tree(tmp_path / "one", b"built"), tmp_path / "x.tar.xz"
    gpu_start.pack(path, one, make_cache(one / "cache"))
    two = make_tree(tmp_path / "two", b"mine")
    monkeypatch.setattr(gpu_start, "ask", lambda: gpu_start.Here(HERE.versions, ["8.0"], HERE.triton))
    assert gpu_start.unpack(path, two, two / "cache").endswith("minitune/_C.abi3.so left out, built for other GPUs")
    monkeypatch.setattr(gpu_start, "ask", lambda: HERE)
    (two / "csrc" / "a.cpp").write_text("changed")
    assert gpu_start.unpack(path, two, two / "cache").endswith("left out, built of other sources")
    assert (two / "minitune" / "_C.abi3.so").read_bytes() == b"mine" and not (two / "build").exists()
    assert (two / "cache" / "KEY" / "k.cubin").exists()


def test_an_extension_older_than_its_sources_is_not_packed(tmp_path: Path, here: gpu_start.Here) -> None:
    one, path = make_tree(tmp_path / "one", b"built"), tmp_path / "deep" / "x.tar.xz"
    os.utime(one / "minitune" / "_C.abi3.so", (1, 1))
    assert gpu_start.pack(path, one, one / "none").endswith(" MB: 0 compiled kernels, no built extension")
    assert list(members(path)) == [gpu_start.STAMP] and [file.name for file in path.parent.iterdir()] == [path.name]


def test_other_versions_are_refused(tmp_path: Path, here: gpu_start.Here) -> None:
    one, path = make_tree(tmp_path / "one", b"built"), tmp_path / "x.tar.xz"
    gpu_start.pack(path, one, make_cache(one / "cache"))
    repacked(path, lambda stamp: stamp["versions"].update(torch="2.99", triton="3.0"))
    text = refused(path, make_tree(tmp_path / "two", b"mine"))
    assert "made with torch 2.99, triton 3.0, but here is torch 2.11, triton 3.6" in text and "python" not in text
    repacked(path, lambda stamp: stamp.pop("versions"))
    assert "is not a whole tar of make gpu" in refused(path, tmp_path / "two")


def test_a_broken_tar_is_refused(tmp_path: Path, here: gpu_start.Here) -> None:
    one, path, into = make_tree(tmp_path / "one", os.urandom(5000)), tmp_path / "x.tar.xz", make_tree(tmp_path / "two")
    gpu_start.pack(path, one, make_cache(one / "cache"))
    whole = path.read_bytes()
    for left in (0, 5, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:left])
        refused(path, into)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:])
    refused(path, into)
    path.write_text("not a tar")
    refused(path, into)
    path.unlink()
    assert "No such file" in refused(path, into)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil.json", "triton-cache/../../evil.json", "minitune/__init__.py",
                                  "triton-cache/KEY/a/b.json", "minitune/_C.so"])
def test_a_member_that_lands_elsewhere_or_is_no_file_is_refused(
        name: str, tmp_path: Path, here: gpu_start.Here) -> None:
    path, into = tmp_path / "x.tar.xz", make_tree(tmp_path / "two")
    gpu_start.pack(path, into, into / "none")
    stamp = members(path)[gpu_start.STAMP]
    with tarfile.open(path, "w:xz") as tar:
        first, second = tarfile.TarInfo(gpu_start.STAMP), tarfile.TarInfo(name)
        first.size = len(stamp)
        tar.addfile(first, io.BytesIO(stamp))
        if name == "minitune/_C.so":
            second.type, second.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(second, io.BytesIO())
    assert repr(name) in refused(path, into)
    assert not (tmp_path / "evil").exists()


def test_a_run_leaves_the_tar_where_it_is_asked(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def run_part(name: str, where: str, seconds: float) -> dict[str, Any]:
        seen.append(os.environ["TRITON_CACHE_DIR"])
        return {"status": "passed", "rows": [], "seconds": 1.0, "limit_s": seconds}

    def run(*words: str) -> tuple[int | str | None, list[str]]:
        monkeypatch.setattr("sys.argv", ["gpu", "--parts", "build", "--out", str(tmp_path / "out"), *words])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return end.value.code, capsys.readouterr().err.splitlines()

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu, "missing", lambda where: None)
    for name in ("CACHE", "TAR"):
        monkeypatch.setattr(gpu_start, name, tmp_path / "build" / name)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")      # undone in the end, what main sets too
    packed, unpacked = [], []
    monkeypatch.setattr(gpu_start, "pack", lambda path: packed.append(path) or "x.tar.xz, 1.0 MB")
    monkeypatch.setattr(gpu_start, "unpack", lambda path: unpacked.append(path) or "")
    assert run("--device", "cpu")[0] == 0 and not packed and seen == [str(tmp_path / "build" / "CACHE")]
    assert run("--device", "cpu", "--tar", "a")[1][-1] == "to start from: x.tar.xz, 1.0 MB" and packed == [Path("a")]
    assert run("--start", "b")[0] == 0 and packed[1:] == [gpu_start.TAR] and unpacked == [Path("b")]
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    run("--device", "cpu")
    assert seen[-1] == str(Path("mine").absolute())


def test_a_bad_tar_is_one_line_and_nothing_runs(tmp_path: Path) -> None:
    (tmp_path / "x.tar.xz").write_text("odd")
    run = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(tmp_path / "out"),
                          "--start", str(tmp_path / "x.tar.xz")], cwd=harness.ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and not run.stdout and not (tmp_path / "out").exists()
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"make gpu: {tmp_path}/x.tar.xz is not a whole tar of make gpu (")

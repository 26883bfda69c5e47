"""What `make gpu` runs on a GPU machine: the build, the tests there, then the timings part by part; raw JSON out.

``PARTS="build tests tune products attention ops layer step nf4" python -m benchmarks.gpu``; PARTS="tune peers"
measures whole 7B steps beside the others' and takes 5 minutes more, PARTS="configs" every Triton kernel in other tiles,
warps and stages than its own, PARTS="sanitizer" watches every kernel by compute-sanitizer. Each part is a process of
its own with its own time limit; one that fails or is cut off loses only what it had not printed yet. Without PARTS the
whole stays under 8 minutes. What "tune" measured decides which ways the parts after it take, as `minitune tune` does
for a user.

Nothing is installed and no network is needed: the extension is built in place with the compiler, nvcc and setuptools
that are there. A rival that is not installed (bitsandbytes, Liger, Unsloth) is named as not measured; bring its wheel
along and say `pip install --no-index --no-deps FILE.whl` to have it measured.
With --device cpu it runs tiny shapes and marks the file "device": "cpu". Exit code 1: a part failed or a figure was
wrong; 2: there is no GPU, or no torch, or a tar that does not fit, and nothing was run.

A run on a GPU leaves build/gpu-start.tar.xz, with the extension and what Triton compiled. Bring it along to a fresh
machine and say `python -m benchmarks.gpu --start TAR`, and what did not change since is not compiled again.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import gpu_start, tables_gpu
from benchmarks.harness import RESULTS, ROOT, machine, rewrite, save
from minitune.errors import InputError

LIMITS = {"build": 50, "tests": 105, "tune": 45, "products": 50, "attention": 45, "ops": 35, "layer": 25, "step": 40,
          "nf4": 65, "peers": 300, "configs": 300, "sanitizer": 500}
"""Seconds of each part; 460 in all without those that have to be asked for."""
ASKED = ("peers", "configs", "sanitizer")
"""Parts that run only where PARTS names them."""
TUNED = ROOT / "build" / "gpu-tuned.json"
"""The table of the part "tune", for the parts after it; a user's own is left alone."""
WORKERS, THREADS = 6, 2
"""Of the tests, and of each of their processes."""


def _python() -> str:
    """This python as a user types it from the repository."""
    path = Path(sys.executable)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def missing(where: str) -> str | None:
    """Why nothing can be run on "cuda" or "cpu", or None. Asked in a process of its own, so that this one holds no
    device memory."""
    question = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=120)
    words = asked.stdout.split()
    if asked.returncode or len(words) != 3:
        why = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
        there = ".venv/bin/python" if (ROOT / ".venv" / "bin" / "python").exists() else "… with a python that has it"
        return f"{sys.executable} cannot import torch ({why}); say make gpu PYTHON={there}"
    if where == "cuda" and words[2] != "True":
        build = "is built without CUDA" if words[1] == "None" else "finds none (nvidia-smi shows what the system sees)"
        return (f"no GPU: torch {words[0]} {build}; for tiny shapes on this CPU say {_python()} -m benchmarks.gpu "
                "--device cpu")
    return None


_C = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Of a child process, before it starts: to be killed when this one is, which a session of its own would outlive."""
    if _C is not None:
        _C.prctl(1, signal.SIGKILL)      # PR_SET_PDEATHSIG


def run_bounded(words: list[str], seconds: float, root: Path = ROOT,
                **variables: str) -> tuple[str, str, int | None]:
    """Run `words` from the root; (stdout, last of stderr, exit code or None when cut off). All its children end too."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(words, cwd=root, stdout=out, stderr=err, stdin=subprocess.DEVNULL,
                                   start_new_session=True, preexec_fn=end_with_parent,
                                   env={**os.environ, "PYTHONUNBUFFERED": "1", **variables})
        code: int | None = None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return texts[0], texts[1][-3000:].strip(), code


def parse_rows(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The JSON rows of a part's output (a cut-off last line is dropped), and whether its last row says "end"."""
    rows = []
    for line in text.splitlines():
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(finite(json.loads(line)))
    ended = bool(rows) and rows[-1].get("what") == "end"
    return (rows[:-1] if ended else rows), ended


def finite(value: Any) -> Any:
    """As JSON has it: a number that is not finite, of a run that went wrong, as a text."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def run_build(where: str, seconds: float, root: Path = ROOT) -> dict[str, Any]:
    """The extension in place; on a GPU both its halves must load, or what follows would measure something else."""
    begun, words = time.monotonic(), [sys.executable, "setup.py", "build_ext", "--inplace"]
    out, err, code = run_bounded(words, seconds, root, **({"MINITUNE_CUDA": "1"} if where == "cuda" else {}))
    question = ("import os, sys, torch; from minitune.ops import backends; "
                "why = backends.missing('native', torch.device(sys.argv[1])); "
                "here = why or os.path.dirname(sys.modules['minitune._C'].__file__) == os.path.realpath('minitune'); "
                "print(why or ('available' if here else 'what is found was not built here'))")
    answer, failure, _ = run_bounded([sys.executable, "-c", question, where],
                                     max(5, seconds - (time.monotonic() - begun)), root)
    native = (answer.strip().splitlines() or failure.splitlines() or ["no answer"])[-1]
    left_out = [line for line in out.splitlines() if line.startswith("minitune: ")]
    row: dict[str, Any] = {"what": "build", "native": native, "left_out": left_out}
    if where == "cuda":
        row["right"] = code == 0 and native == "available"
    passed = code == 0 and row.get("right", True)
    return {"status": "cut off" if code is None else "passed" if passed else "failed", "rows": [row],
            **({} if passed else {"stderr": f"{out[-6000:]}\n{err}".strip()})}


def run_tests(where: str, seconds: float, marks: str = "not slow") -> dict[str, Any]:
    """The test suite, in parallel where pytest-xdist is there; counts, and one line a failure. On a GPU the kernels'
    tests run compiled, and are not interpreted on a CPU once more."""
    words = [sys.executable, "-m", "pytest", "tests", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-rfE",
             "--tb=line", "--continue-on-collection-errors", "-m", marks]
    if where == "cuda":
        words += ["--ignore", "tests/kernels/test_interpreter.py"]
    if importlib.util.find_spec("xdist") and (os.cpu_count() or 1) >= WORKERS * THREADS:
        words += ["-n", str(WORKERS)]
    out, err, code = run_bounded([*words, *os.environ.get("PYTEST_ARGS", "").split()], seconds,
                                 OMP_NUM_THREADS=str(THREADS))
    return {"status": {0: "passed", None: "cut off"}.get(code, "failed"), "rows": [pytest_row(out)],
            **({"stderr": err} if err else {})}


def pytest_row(out: str) -> dict[str, Any]:
    """Counts and failures from pytest's own words; where it was cut off, from the letters that it had printed."""
    lines = out.strip().splitlines()
    found = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    failures = [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if found:
        summary = found[-1].strip("= ")
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", summary)}
    else:
        progress = "".join(seen[1] for line in lines if (seen := re.fullmatch(r"([.FEsxX]+)(\s*\[ *\d+%\])?", line)))
        counts = {word: progress.count(letter) for word, letter in (("passed", "."), ("failed", "F"), ("skipped", "s"))}
        summary = f"no summary; until then {counts}"
    return {"what": "tests", "summary": summary, "counts": counts, "failures": failures[:60]}


def run_part(name: str, where: str, seconds: float) -> dict[str, Any]:
    """One part's rows, its status (passed, failed, cut off) and how long it took."""
    begun = time.monotonic()
    if name == "build":
        part = run_build(where, seconds)
    elif name == "tests":
        part = run_tests(where, seconds)
    elif name == "sanitizer":
        part = run_tests(where, seconds, "gpu and slow")
    else:
        out, err, code = run_bounded([sys.executable, "-m", f"benchmarks.gpu_{name}", "--device", where], seconds,
                                     MINITUNE_TUNED=str(TUNED))
        rows, ended = parse_rows(out)
        wrong = [row for row in rows if row.get("right") is False]
        status = "cut off" if code is None else "passed" if code == 0 and ended and not wrong else "failed"
        part = {"status": status, "rows": rows, **({"stderr": err} if err and status != "passed" else {})}
    return {**part, "seconds": time.monotonic() - begun, "limit_s": seconds}


def attempt(step: Callable[[Path], str], tar: Path) -> bool:
    """Pack or unpack, and print what came of it; whether it went well."""
    try:
        print(f"to start from: {step(tar)}", file=sys.stderr, flush=True)
    except (InputError, ValueError, subprocess.SubprocessError) as error:       # a broken cache, a torch that hangs
        print(f"make gpu: {error}", file=sys.stderr)
        return False
    return True


def unwritable(out: Path, tar: Path | None) -> str | None:
    """Why the raw file or the tar cannot be written, which must be known before minutes of measuring; or None."""
    for option, folder in (("--out", out), *([("--tar", tar.parent)] if tar else [])):
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        try:
            tempfile.TemporaryFile(dir=there).close()       # the rest of the path is made when it is needed
        except OSError as error:
            return f"{option}: {folder} cannot be written to ({error.strerror}); name another place"
    if tar and tar.is_dir():
        return f"--tar: {tar} is a folder; name a file in it"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS),
                        default=(os.environ.get("PARTS", "").split() or [n for n in LIMITS if n not in ASKED]),
                        help=f"default: $PARTS, else all but {', '.join(ASKED)}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: tiny shapes, to try it out")
    parser.add_argument("--out", type=Path, help="folder of the raw file, default benchmarks/results")
    parser.add_argument("--start", type=Path, help="unpack the tar of an earlier run first")
    parser.add_argument("--tar", type=Path, help="where to leave one for a later run, default build/gpu-start.tar.xz; "
                        "with --device cpu none is left unless this is said")
    told = parser.parse_args()
    unknown = set(told.parts) - set(LIMITS)
    if unknown:
        parser.error(f"PARTS names {sorted(unknown)}; there are {list(LIMITS)}")
    where, reason = told.device, missing(told.device)
    if reason is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        sys.exit(2)
    told.tar = told.tar or (gpu_start.TAR if where == "cuda" else None)
    reason = unwritable(told.out or RESULTS, told.tar)
    if reason is not None:
        print(f"make gpu: {reason}", file=sys.stderr)
        sys.exit(2)
    os.environ["TRITON_CACHE_DIR"] = str(gpu_start.cache_folder())      # of every part
    if told.start and not attempt(gpu_start.unpack, told.start):
        sys.exit(2)
    if {"build", "tune"} & set(told.parts):     # else this goes on from an earlier call on this machine
        TUNED.unlink(missing_ok=True)       # of another GPU, torch or commit, perhaps
    raw: dict[str, Any] = {"kind": "gpu", "device": where, "machine": machine(), "parts": {}}
    path = save("gpu" if where == "cuda" else "gpu-cpu", raw, told.out)
    for name in told.parts:
        print(f"{name} … at most {LIMITS[name]} s", file=sys.stderr, flush=True)
        raw["parts"][name] = run_part(name, where, LIMITS[name])
        rewrite(path, raw)      # so far: whoever ends this process loses one part
        print(f"{name}: {raw['parts'][name]['status']}", file=sys.stderr, flush=True)
    packed = told.tar is None or attempt(gpu_start.pack, told.tar)
    print("\n".join(tables_gpu.gpu_tables(json.loads(path.read_text()))))
    print(f"raw figures: {path.name}")
    sys.exit(not packed or any(part["status"] != "passed" for part in raw["parts"].values()))


if __name__ == "__main__":
    main()

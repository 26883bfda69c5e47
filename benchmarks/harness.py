"""The ground of every benchmark: the machine's description, quiet-CPU accounting, worker processes, raw files."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VOID_SHARE = 0.05
"""A run in which other processes took more than this share of the whole CPU is void."""
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "sve", "bf16")
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "safetensors", "numpy", "accelerate", "litgpt",
             "torchtune", "torchao")


# ---- statistics -----------------------------------------------------------------------------------------------------
def percentile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0 … 1) of `values` by linear interpolation between the closest ranks."""
    if not values:
        raise ValueError("percentile of no values")
    ranked = sorted(values)
    place = q * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median with the 20th and 80th percentile, and the number of samples; {"n": 0} for none."""
    if not values:
        return {"n": 0}
    return {"median": percentile(values, 0.5), "p20": percentile(values, 0.2), "p80": percentile(values, 0.8),
            "n": len(values)}


# ---- the machine ----------------------------------------------------------------------------------------------------
def _command(*words: str) -> str | None:
    try:
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _field(path: str, name: str) -> str:
    """The first `name : value` of a /proc file, or "" where the system has none."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def machine() -> dict[str, Any]:
    """What a reader needs to judge a figure: processor, memory, GPU, versions, commit. No host name, no path."""
    flags = set(_field("/proc/cpuinfo", "flags").split())
    memory = _field("/proc/meminfo", "MemTotal").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = _command("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    # Raw files of other measurements are no change of what is measured.
    changed = _command("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {
        "cpu": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": cores,
        "memory_gib": round(int(memory[0]) / 2**20, 1) if memory else None,
        "threads_env": os.environ.get("OMP_NUM_THREADS"),
        "gpus": gpus.splitlines() if gpus else [],
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _command("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
    }


# ---- who used the CPU -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class CpuTicks:
    """Clock ticks since boot: all that passed, those that were busy, and those that one process tree used."""

    total: int
    busy: int
    own: int


def parse_stat(text: str) -> tuple[int, int]:
    """(total, busy) ticks from the text of /proc/stat. Time stolen by the hypervisor is busy: a neighbour had it."""
    fields = [int(word) for word in text.splitlines()[0].split()[1:9]]
    idle = sum(fields[3:5])
    return sum(fields), sum(fields) - idle


def tree_ticks(pid: int) -> int:
    """Ticks used by process `pid`, by its living descendants, and by the dead ones that were waited for."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # the process ended while we looked
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(int(word) for word in fields[11:15])
    tree, grown = {pid}, True
    while grown:
        children = {child for child, parent in parents.items() if parent in tree} - tree
        tree |= children
        grown = bool(children)
    return sum(used.get(member, 0) for member in tree)


def read_ticks(pid: int) -> CpuTicks:
    """The clock now, seen from process `pid`; zeros where there is no /proc."""
    try:
        total, busy = parse_stat(Path("/proc/stat").read_text())
        return CpuTicks(total, busy, tree_ticks(pid))
    except OSError:
        return CpuTicks(0, 0, 0)


def other_share(before: CpuTicks, after: CpuTicks) -> float:
    """The share (0 … 1) of the whole CPU that others than the watched process tree used between two readings."""
    total = after.total - before.total
    others = (after.busy - before.busy) - (after.own - before.own)
    return max(0.0, others / total) if total > 0 else 0.0


# ---- memory ---------------------------------------------------------------------------------------------------------
def memory(pid: int | str = "self") -> dict[str, int]:
    """Bytes of process `pid`: resident now, its peak since start, and what of it is anonymous (no file behind)."""
    names = {"VmRSS": "resident", "VmHWM": "resident_peak", "RssAnon": "anonymous"}
    found = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in names:
                found[names[key]] = int(value.split()[0]) * 1024
    return found


# ---- workers --------------------------------------------------------------------------------------------------------
class WorkerError(RuntimeError):
    """A worker process failed, ended or overran its time."""


@dataclass
class Answer:
    """What a worker said, and what the machine did meanwhile."""

    value: dict[str, Any]
    wall_s: float
    other_share: float
    anonymous_peak: int

    def void(self, limit: float = VOID_SHARE) -> bool:
        return self.other_share > limit


class Worker:
    """A process of its own that answers JSON commands, one a line; it idles while other workers are measured.

    `module` is run as ``python -m module`` and calls :func:`serve`. ``started`` is its birth on time.monotonic's clock,
    which processes of one machine share.
    """

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close())
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, env={**os.environ, **(env or {})},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True)
        assert self._process.stdin and self._process.stdout
        self._in, self._out = self._process.stdin, self._process.stdout

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, command: str, timeout: float = 1800.0, **arguments: Any) -> Answer:
        """Send one command and wait for its answer, watching memory and the CPU. Raises WorkerError."""
        before, begun = read_ticks(self._process.pid), time.monotonic()
        try:
            self._in.write(json.dumps({"command": command, **arguments}).encode() + b"\n")
            self._in.flush()
        except OSError as error:
            raise WorkerError(f"the worker ended before {command!r}: {self._tail()}") from error
        line, peak = self._wait(command, begun + timeout)
        after, wall = read_ticks(self._process.pid), time.monotonic() - begun
        value = json.loads(line)
        if "error" in value:
            raise WorkerError(f"{command}: {value['error']}")
        return Answer(value, wall, other_share(before, after), peak)

    def _wait(self, command: str, deadline: float) -> tuple[bytes, int]:
        peak, line = 0, b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._out, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if selector.select(0.1):
                    piece = os.read(self._out.fileno(), 1 << 16)
                    if not piece:
                        raise WorkerError(f"the worker ended during {command!r}: {self._tail()}")
                    line += piece
                peak = max(peak, memory(self._process.pid).get("anonymous", 0))
                if time.monotonic() > deadline:
                    self.close(kill=True)
                    raise WorkerError(f"{command!r} overran its time")
        return line, peak

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-2000:].strip()

    def close(self, kill: bool = False) -> None:
        """End the process and everything it started."""
        if self._log.closed:
            return
        with contextlib.suppress(OSError):
            self._in.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then it is killed, with whatever it started
            self._process.wait(0.01 if kill else 20)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._out.close()
        self._log.close()


def serve(prepare: Callable[[], Mapping[str, Callable[..., dict[str, Any]]]]) -> None:
    """The worker's side: make the handlers, then answer commands until the other end closes.

    What libraries print, while the handlers are made too, goes to stderr.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handlers = prepare()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("command")](**request)
        except Exception as error:  # told to the other side, which decides
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def ask_quietly(worker: Worker, command: str, attempts: int = 3, limit: float = VOID_SHARE,
                **arguments: Any) -> list[Answer]:
    """Ask until a run is not void, at most `attempts` times; all answers, void ones too, the valid one last."""
    answers = []
    for _ in range(attempts):
        answers.append(worker.ask(command, **arguments))
        if not answers[-1].void(limit):
            break
    return answers


# ---- raw files ------------------------------------------------------------------------------------------------------
def scrub(value: Any) -> Any:
    """`value` with the machine's own folders and host name taken out of every string (keys stay)."""
    if isinstance(value, Mapping):
        return {key: scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    if not isinstance(value, str):
        return value
    places = {str(ROOT): "<root>", sys.prefix: "<python>", sys.base_prefix: "<python>", str(Path.home()): "<home>",
              tempfile.gettempdir(): "<temp>"}
    for place in sorted(places, key=len, reverse=True):
        if len(place) > 1:
            value = value.replace(place, places[place])
    host = socket.gethostname()
    return re.sub(rf"\b{re.escape(host)}\b", "<host>", value) if len(host) > 3 else value


def save(name: str, data: Mapping[str, Any], folder: Path | None = None, suffix: str = ".json") -> Path:
    """Write `data` to <folder>/<date>-<name>.json, never over an older file, and return the path.

    A ``machine`` and a ``when`` (UTC) are added where absent. For another suffix, ``data["text"]`` is written as it is.
    """
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    stem, count = f"{now:%Y-%m-%d}-{name}", 1
    path = folder / f"{stem}{suffix}"
    while path.exists():
        count += 1
        path = folder / f"{stem}.{count}{suffix}"
    if suffix == ".json":
        full = {"name": name, "when": f"{now:%Y-%m-%dT%H:%M:%SZ}", **data}
        full.setdefault("machine", machine())
        text = _json(full)
    else:
        text = scrub(data["text"])
    path.write_text(text)
    return path


def rewrite(path: Path, data: Mapping[str, Any]) -> None:
    """Put `data` in place of what `save` wrote there, under the same name and time; whole or not at all."""
    kept = json.loads(path.read_text())
    part = path.with_suffix(".part")
    part.write_text(_json({"name": kept["name"], "when": kept["when"], **data}))
    part.replace(path)


def _json(full: Mapping[str, Any]) -> str:
    return json.dumps(scrub(full), indent=1, allow_nan=False) + "\n"

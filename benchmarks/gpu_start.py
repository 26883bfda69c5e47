"""Packs what a run of `make gpu` compiled into one tar, and unpacks it where a later run starts on a fresh machine.

The tar holds programs: unpack only one that you made. In it lie the built extension, those files of the Triton cache
that a later run reads, and with what all was made. Triton's texts name folders of the machine: a group's files,
libdevice, the source in PTX's `.file`. In the tar they are `${cache}`, `${triton}` and so on; unpacking puts the
folders of the new machine there. Binaries stay as they are, and with them the name of the kernels' folder in a
cubin's debug information, which only a debugger or a profiler reads.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import ROOT
from minitune.errors import InputError

CACHE = ROOT / "build" / "triton-cache"
TAR = ROOT / "build" / "gpu-start.tar.xz"
KEPT = (".cubin", ".ptx", ".json", ".so")
"""What a hit in the cache needs, and PTX, which tests read. The compiler's other texts are most of its bytes."""
STAMP = "made-with.json"
_MEMBER = re.compile(r"made-with\.json|minitune/_C[\w.-]*\.so|triton-cache/\w+/[\w.-]+\.(cubin|ptx|json|so)")
_OTHER = {"sources": "built of other sources", "architectures": "built for other GPUs"}
_QUESTION = """
import json, os, platform, sys, sysconfig, torch
try:
    import triton
    version, folder = triton.__version__, os.path.dirname(triton.__file__)
except ImportError:
    version, folder = "none", ""
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({
    "versions": {"python": sys.implementation.cache_tag, "triton": version,
                 "torch": f"{torch.__version__} with CUDA {torch.version.cuda}",
                 "platform": " ".join((sysconfig.get_platform(), *platform.libc_ver()))},
    "gpus": sorted({"%d.%d" % torch.cuda.get_device_capability(gpu) for gpu in gpus}), "triton": folder}))
"""


@dataclass(frozen=True)
class Here:
    """versions: what a tar must have been made with; gpus: the generations at hand; triton: its folder."""

    versions: dict[str, str]
    gpus: list[str]
    triton: str


def ask() -> Here:
    """What python, torch, triton and GPUs these are. In a process of its own, so that this one holds no device
    memory."""
    asked = subprocess.run([sys.executable, "-c", _QUESTION], capture_output=True, text=True, timeout=120)
    if asked.returncode:
        why = (asked.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise InputError(f"{sys.executable} does not say what torch it has ({why}); use a python that has torch")
    return Here(**json.loads(asked.stdout.splitlines()[-1]))


def cache_folder() -> Path:
    """Where Triton keeps what it compiles during a run: $TRITON_CACHE_DIR, else in the ignored build/."""
    return Path(os.environ.get("TRITON_CACHE_DIR") or CACHE).absolute()


def _places(here: Here, root: Path, cache: Path) -> dict[str, str]:
    """The machine's folders by their names in the tar."""
    named = {"cache": str(cache), "triton": here.triton, "root": str(root), "python": sys.prefix,
             "home": str(Path.home()), "temp": tempfile.gettempdir()}
    return {name: place for name, place in named.items() if len(place) > 1}


def _spelled(suffix: str, place: str) -> str:
    return json.dumps(place)[1:-1] if suffix == ".json" else place


def _named(text: str, suffix: str, places: Mapping[str, str]) -> str:
    """`text` with the names of folders for the folders; the longest first, for one may lie within another."""
    for name, place in sorted(places.items(), key=lambda item: len(item[1]), reverse=True):
        spelled = _spelled(suffix, place)
        if spelled in text:
            text = re.sub(rf"(?<![\w./-]){re.escape(spelled)}(?![\w.-])", f"${{{name}}}", text)
    return text


def _placed(text: str, suffix: str, places: Mapping[str, str]) -> str:
    """The way back."""
    return re.sub(r"\$\{(\w+)\}", lambda found: _spelled(suffix, places.get(found[1], found[0])), text)


# ---- what the tar holds ---------------------------------------------------------------------------------------------
def _sources(root: Path) -> list[Path]:
    """What the extension is built of."""
    return [root / "setup.py", *(file for file in sorted((root / "csrc").glob("*")) if file.is_file())]


def _built_of(root: Path, here: Here) -> dict[str, str]:
    """An extension built of anything else must not be taken for this tree's."""
    digest = hashlib.sha256()
    for source in _sources(root):
        digest.update(f"{source.name} {source.stat().st_size}\n".encode() + source.read_bytes())
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or " ".join(here.gpus)
    return {"sources": digest.hexdigest(), "architectures": architectures}


def _extension(root: Path) -> list[Path]:
    """The built files that are not older than their sources."""
    newest = max(source.stat().st_mtime for source in _sources(root))
    return [file for file in sorted((root / "minitune").glob("_C*.so")) if file.stat().st_mtime >= newest]


def _group(file: Path) -> str:
    """The text of a group's file without the members that are left out."""
    children = json.loads(file.read_text()).get("child_paths") or {}
    kept = [name for name in children if name.endswith(KEPT) and (file.parent / name).is_file()]
    return json.dumps({"child_paths": {name: f"${{cache}}/{file.parent.name}/{name}" for name in kept}})


def _members(root: Path, cache: Path, here: Here) -> Iterator[tuple[str, bytes]]:
    """Names and contents, in an order that only the names make; the stamp first."""
    made = {"versions": here.versions, "extension": _built_of(root, here)}
    yield STAMP, json.dumps(made, indent=1).encode()
    for file in _extension(root):
        yield f"minitune/{file.name}", file.read_bytes()
    places = _places(here, root, cache)
    for file in sorted(cache.glob("*/*")):
        name = f"triton-cache/{file.parent.name}/{file.name}"
        if not _MEMBER.fullmatch(name) or not file.is_file():
            continue
        if file.name.startswith("__grp__"):
            data = _group(file).encode()
        elif file.suffix in (".json", ".ptx"):
            text = file.read_bytes().decode(errors="surrogateescape")
            data = _named(text, file.suffix, places).encode(errors="surrogateescape")
        else:
            data = file.read_bytes()
        yield name, data


def _told(names: list[str]) -> str:
    """What a tar gave or got, in words."""
    extension = [name for name in names if name.startswith("minitune/")]
    kernels = sum(name.endswith(".cubin") for name in names)
    return f"{kernels} compiled kernel{'s' * (kernels != 1)}, " + (" and ".join(extension) or "no built extension")


def pack(path: Path, root: Path = ROOT, cache: Path | None = None) -> str:
    """Write the tar; its name, size and contents in words. The same files give the same bytes."""
    here, names, part = ask(), [], path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(part, "w:xz", preset=1) as tar:
            for name, data in _members(root, cache or cache_folder(), here):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o755 if name.endswith(".so") else 0o644
                tar.addfile(member, io.BytesIO(data))
                names.append(name)
        part.replace(path)      # a run that is cut off leaves no half of a tar under this name
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name another place with --tar") from None
    return f"{path.name}, {path.stat().st_size / 1e6:.1f} MB: {_told(names)}"


# ---- the way back ---------------------------------------------------------------------------------------------------
def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The stamp and all other members. Everything is read before anything is written."""
    files: dict[str, bytes] = {}
    try:
        with lzma.open(path) as packed, tarfile.open(fileobj=io.BytesIO(packed.read()), mode="r:") as tar:
            for member in tar:
                if not member.isreg() or not _MEMBER.fullmatch(member.name):
                    raise ValueError(f"it holds {member.name!r}, which none has")
                content = tar.extractfile(member)
                files[member.name] = content.read() if content else b""
        stamp = json.loads(files.pop(STAMP, b""))
        if not all(isinstance(stamp[name], dict) for name in ("versions", "extension")):
            raise ValueError(f"its {STAMP} says nothing")
    except (OSError, EOFError, lzma.LZMAError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{path} is not a whole tar of make gpu ({why}); give another, or run without --start, which "
                         "packs a new one") from None
    return stamp, files


def _refuse_others(path: Path, made: Mapping[str, str], versions: Mapping[str, str]) -> None:
    differing = [name for name in versions if made.get(name) != versions[name]]
    if differing:
        theirs, ours = (", ".join(f"{name} {of.get(name)}" for name in differing) for of in (made, versions))
        raise InputError(f"{path} was made with {theirs}, but here is {ours}; run without --start, which packs a new "
                         "one")


def _build_folder(root: Path) -> list[Path]:
    """Where setuptools looks for what an earlier build left: not at the file in place, which is a copy of that one."""
    try:
        from setuptools import Distribution
    except ImportError:
        return []
    build: Any = Distribution().get_command_obj("build")
    build.ensure_finalized()
    return [root / build.build_platlib / "minitune"]


def _write(path: Path, data: bytes, when: int) -> None:
    """Beside it first: a process that has the old file open keeps it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.chmod(0o755 if path.suffix == ".so" else 0o644)
    os.utime(part, ns=(when, when))
    part.replace(path)


def unpack(path: Path, root: Path = ROOT, cache: Path | None = None) -> str:
    """Put the files of a tar where a run finds them; what there was, in words. InputError, and nothing is changed,
    where the tar is broken or was made with another python, torch or triton. An extension that was built of other
    sources, or for other GPUs, stays in the tar."""
    made, files = _read(path)
    here, cache = ask(), cache or cache_folder()
    _refuse_others(path, made["versions"], here.versions)
    stale = [_OTHER[name] for name, of in _built_of(root, here).items() if made["extension"].get(name) != of]
    extension = [name for name in files if name.startswith("minitune/")]
    left_out = ""
    if stale and extension:
        files = {name: data for name, data in files.items() if name not in extension}
        left_out = f"; {' and '.join(extension)} left out, {' and '.join(stale)}"
    # Nothing is built again whose file is not older than its sources, and these may be of any age here.
    when = max(time.time_ns(), *(source.stat().st_mtime_ns for source in _sources(root)))
    places, folders = _places(here, root, cache), [root / "minitune", *_build_folder(root)]
    try:
        for name, data in files.items():
            target = Path(name)
            if name in extension:
                for folder in folders:
                    _write(folder / target.name, data, when)
                continue
            if target.suffix in (".json", ".ptx"):
                text = _placed(data.decode(errors="surrogateescape"), target.suffix, places)
                data = text.encode(errors="surrogateescape")
            _write(cache / target.parent.name / target.name, data, when)
    except OSError as error:
        raise InputError(f"{path} cannot be unpacked to {error.filename} ({error.strerror}); make room there, or run "
                         "without --start") from None
    return f"{path.name}: {_told(list(files))}{left_out}"

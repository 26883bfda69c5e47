"""doctor: what it says of a machine."""

import tomllib

import torch

from minitune import doctor
from tests.files import ROOT


def test_why_there_is_no_gpu_and_what_else_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in doctor.gpu()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "no NVIDIA GPU, or no driver" in doctor.gpu()
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    rows = dict(doctor.machine(torch.device("cpu"), torch.float32))
    assert rows["Parquet files"] == "not installed: pip install 'minitune[parquet]'"
    assert rows["minitune runs on"] == "cpu, computing in float32" and " GB on cpu" in rows["free memory"]
    assert {extra for _, extra in doctor.EXTRAS.values()} <= _extras()


def _extras():
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"])

"""A run that is killed at any file operation of its checkpoints goes on bit for bit."""

from __future__ import annotations

import os
from itertools import count

import pytest
import torch

from minitune.config import Training
from minitune.training.checkpoint import read, steps
from tests.killed import killed
from tests.training.stopping import checkpoints, data, train


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child of this process is killed")
def test_whatever_the_moment_a_whole_checkpoint_is_there_and_the_run_goes_on(fakes, tmp_path):
    training = Training(lr=0.05, epochs=2, save_every=3)
    straight, stood = fakes.TinyModel(), []
    expected = train(fakes, straight, data(fakes), training)
    for at in count():
        out = tmp_path / str(at)
        died = killed(lambda out=out: train(fakes, fakes.TinyModel(), data(fakes), training,
                                            checkpoints=checkpoints(out)), out, at)
        saved = read(out / "checkpoint") if steps(out / "checkpoint") else None
        stood.append(0 if saved is None else saved.step)
        other = fakes.TinyModel()
        run = train(fakes, other, data(fakes), training, start=saved, checkpoints=checkpoints(out, stood[-1] or None))
        assert run.losses == expected.losses and torch.equal(other.A, straight.A) and torch.equal(other.B, straight.B)
        assert not list(out.rglob(".*")), "what was half written is there for ever"
        if not died:
            break
    assert stood == sorted(stood) and set(stood) == {0, 3, 6, 9} and len(stood) > 20

"""The KV cache: it grows with what is generated, not with the limit, and growing changes no token."""

from unittest import mock

import pytest
import torch

import minitune as mt
from minitune.model import generate as generation
from minitune.model.lora import Projection
from tests.batches import documents, packed
from tests.oracles import make


def _caches(monkeypatch):
    """The caches made from now on."""
    made, real = [], generation.Cache

    def note(*arguments):
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(generation, "Cache", note)
    return made


@pytest.mark.filterwarnings("ignore:a document of")
@pytest.mark.parametrize("variant", ["llama-2-gqa", "mistral", "llama-dynamic"])
@pytest.mark.parametrize("prompts", [[[5, 6, 7]], [[5, 6, 7], [8], [9, 10, 11, 12, 13]]], ids=["one", "three"])
def test_a_cache_that_grows_gives_the_same_tokens(tmp_path, monkeypatch, variant, prompts):
    make(variant, tmp_path)
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    caches = _caches(monkeypatch)
    whole = model.generate(prompts, 50)
    monkeypatch.setattr(generation, "ROOM", 1)
    assert model.generate(prompts, 50) == whole
    longest = max(map(len, prompts))
    assert caches[0].capacity == longest + 50       # at once, since it is little
    assert caches[1].capacity <= caches[1].limit == longest + 50
    assert all(len(ids) == 50 for ids in whole) or model.eos_ids


@pytest.mark.filterwarnings("ignore:a document of")
def test_a_high_limit_costs_nothing_until_it_is_used(tmp_path, monkeypatch):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    caches = _caches(monkeypatch)
    grown = [generation.ROOM * k for k in (1, 3)]
    for count in grown:
        answer = generation.generate(model.network, [[5, 6, 7]], 2**31 - 1, generation.sampler(),
                                     lambda row, ids, count=count: len(ids) == count)
        assert len(answer[0]) == count
    assert [cache.capacity for cache in caches] == [3 + generation.ROOM, 4 * (3 + generation.ROOM)]
    assert caches[1].keys[0].shape == caches[1].values[-1].shape == torch.Size([1, 2, caches[1].capacity, 8])


def test_sampling_takes_a_whole_number_as_temperature(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    assert model.generate([5, 6], 8, temperature=10**30, seed=1) == model.generate([5, 6], 8, temperature=1e30, seed=1)


def test_trained_weights_are_copied_once_for_all_tokens(tmp_path):
    """Not for each of them; and the next training step makes its own, of the weights as they are then."""
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, train="full", device="cpu", dtype="bfloat16")
    with mock.patch.object(Projection, "copied", autospec=True, side_effect=Projection.copied) as copied:
        first = model.generate([3, 4, 5], 6)
    assert copied.call_count == len(model.network.projections())
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.normal_(0, 0.3)
    assert model.generate([3, 4, 5], 6) != first
    model.loss(packed(documents([9], 1), 9)).backward()
    assert all(projection.cast is None for projection in model.network.projections())

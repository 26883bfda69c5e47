"""The KV cache: it grows with what is generated, not with the limit, and growing changes no token."""

import warnings
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import minitune as mt
from minitune.model import generate as generation
from minitune.model.lora import Projection
from minitune.ops import attention
from minitune.ops.documents import Documents
from tests.batches import documents, packed
from tests.oracles import make
from tests.tolerance import relative


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


@pytest.mark.parametrize("lengths", [(4, 4), (2, 9, 5), (0, 3)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 5, 10, 20])
def test_a_token_attends_to_what_its_row_holds_and_its_window_shows(window, lengths):
    """As the last one of a document in `attention.reference`; keys behind the end of a row are stale."""
    q, keys, values = torch.randn(len(lengths), 4, 8), *torch.randn(2, len(lengths), 2, 12, 8)
    found = generation._attend(SimpleNamespace(window=window), q, keys, values, list(lengths))
    for row, length in enumerate(lengths):
        n = length + 1
        whole = attention.reference(q[row].expand(n, -1, -1), keys[row, :, :n].transpose(0, 1),
                                    values[row, :, :n].transpose(0, 1), Documents.from_lengths((n,)), window)
        assert relative(found[row], whole[-1].flatten()) < 1e-6


def test_each_row_ends_where_it_is_finished(tmp_path):
    make("llama-2-gqa", tmp_path)
    network, asked = mt.load(tmp_path, device="cpu", dtype="float32").network, [0, 0, 0]

    def finished(row, ids):
        asked[row] += 1
        return len(ids) == (4, 1, 3)[row]

    found = generation.generate(network, [[5, 6], [7], [8, 9, 10]], 20, generation.sampler(), finished)
    assert asked == [len(ids) for ids in found] == [4, 1, 3]


@torch.no_grad()
def test_a_step_of_a_stream_leaves_the_adapters_as_they_were_switched(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, lora=mt.LoRA(rank=2), device="cpu", dtype="float32")
    for adapter in model.network.adapters().values():
        adapter.B.normal_()
    ids, adapted = torch.tensor([3, 4, 5]), generation.steps(model.network, [[5, 6]], 3, generation.sampler())
    with model.adapter_disabled():
        base, other = model.logits(ids), generation.steps(model.network, [[5, 6]], 3, generation.sampler())
        next(adapted)
        assert torch.equal(model.logits(ids), base)
    whole = model.logits(ids)
    next(other)
    assert torch.equal(model.logits(ids), whole) and not torch.equal(whole, base)


def test_the_first_place_that_the_model_does_not_know_is_said(tmp_path):
    make("llama-2-gqa", tmp_path)
    model = mt.load(tmp_path, device="cpu", dtype="float32")
    prompt = [5] * (model.config.max_positions - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generation.steps(model.network, [prompt], 3, generation.sampler()))
    with pytest.warns(UserWarning, match=f"a document of {len(prompt) + 3} tokens is longer than"):
        list(generation.steps(model.network, [prompt], 4, generation.sampler()))


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

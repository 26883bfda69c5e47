"""Batch: the contract it checks and what it derives on the host."""

import warnings

import pytest
import torch

import minitune as mt


def _batch(tokens, labels, bounds, **rest):
    return mt.Batch(tokens=torch.tensor(tokens), labels=torch.tensor(labels),
                    cu_seqlens=torch.tensor(bounds, dtype=torch.int32), **rest)


def test_what_the_host_knows():
    batch = _batch([5, 6, 7, 0, 0, 0, 0, 8, 9], [6, -100, -100, -100, -100, -100, -100, 9, -100], [0, 3, 7, 9])
    assert batch.lengths == batch.documents.lengths == (3, 4, 2) and batch.longest_trained == 3
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert batch.trained.tolist() == [0, 7] and batch.n_trained == 2 and batch.highest_token == 9
    assert batch.to("cpu").documents.lengths == (3, 4, 2)


WRONG = {
    "label": ([1, 2, 3], [2, 1, -100], [0, 3], {}, "labels"),
    "last": ([1, 2], [2, 2], [0, 2], {}, "-100"),
    "bounds": ([1, 2], [2, -100], [0, 1], {}, "cu_seqlens"),
    "falling": ([1, 2], [2, -100], [0, 2, 1, 2], {}, "cu_seqlens"),
    "length": ([1, 2], [2], [0, 2], {}, "labels"),
    "negative": ([-1, 2], [2, -100], [0, 2], {}, "-1"),
    "weights": ([1, 2], [2, -100], [0, 2], {"weights": torch.tensor([float("nan"), 1])}, "weights"),
}


@pytest.mark.parametrize("name", ["tokens", "labels", "cu_seqlens", "weights"])
def test_lists_are_no_tensors(name):
    fields = {"tokens": torch.tensor([1, 2]), "labels": torch.tensor([2, -100]), "weights": torch.ones(2),
              "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)}
    with pytest.raises(mt.InputError, match=rf"Batch: {name} is \[1, 2\]; it must be a flat .* tensor; mt.data.pack"):
        mt.Batch(**fields | {name: [1, 2]})


@pytest.mark.parametrize("case", WRONG)
def test_a_broken_contract_is_named(case):
    tokens, labels, bounds, rest, word = WRONG[case]
    with pytest.raises(mt.InputError, match=word):
        _batch(tokens, labels, bounds, **rest)


def test_only_documents_that_are_trained_count_as_too_long(tmp_path):
    mt.init("tiny", tmp_path / "m")
    model = mt.load(tmp_path / "m", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.loss(mt.data.pack([[5, 6, 7]], 1500)[0])      # the filler of 1,497 tokens is no document
    with pytest.warns(UserWarning, match="1024 positions"):
        model.loss(mt.data.pack([list(range(3, 1103))], 1500)[0])


def test_it_is_shown_in_one_line():
    batch = mt.data.pack([[5, 6, 7], ([1, 2], [-100, -100])], tokens=9)[0]
    assert repr(batch) == "Batch(9 tokens in 2 documents, 2 trained, 4 filler, on cpu)"


@pytest.mark.parametrize(("row", "real", "left"), [(128, 40, 64), (128, 64, 64), (128, 65, 128), (128, 128, 128),
                                                   (100, 70, 100), (200, 100, 128), (4096, 4000, 4032)])
def test_what_is_trimmed_leaves_few_lengths(row, real, left):
    batch = mt.data.pack([list(range(1, 31)), list(range(1, real - 29))], tokens=row)[0]
    found = batch.trimmed()
    assert (found.n_tokens, found.n_filler) == (left, left - real) and found.n_trained == batch.n_trained
    lengths = (*batch.documents.lengths[:2], left - real)
    assert found.documents.lengths == lengths[:2 + (left > real)]
    assert torch.equal(found.labels[:real], batch.labels[:real]) and (found is batch) == (left == row)

"""Corpus: documents end to end keep their names, weights and flags, whatever a file calls its rows."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from minitune.data.corpus import BLANK, ENDS, Builder
from minitune.data.encode import Encoded


def sample(ids: list[int], trained: list[int], where: str = "a:1", **more: Any) -> Encoded:
    return Encoded(where, array("i", ids), bytes(trained), **more)


@pytest.mark.parametrize("places", [[":1", ":20"], [": row 1", ": row 7"], ["", ""]])
def test_names_of_lines_rows_and_files(places: list[str]) -> None:
    path = "some 3 folder/data.7"
    builder = Builder(path, [2])
    builder.add(sample([5, 6, 2], [0, 1, 1], path + place) for place in places)
    corpus = builder.finish()
    assert [corpus.where(index) for index in range(2)] == [path + place for place in places]


def test_what_is_kept_of_each_document() -> None:
    builder = Builder("a", [2, 3])
    builder.add([sample([5, 6, 2], [0, 1, 1]), sample([5, 2, 6], [0, 1, 1], weight=2.5, flags=BLANK),
                 sample([5, 6, 2], [0, 1, 0]), sample([5, 3, 9], [0, 1, 0]), sample([2], [0])])
    builder.add([sample([], [], "a:6", n_dropped=4, reason="label is false"),
                 sample([], [], "a:7", n_dropped=3, reason="label is false"),
                 sample([5, 6, 2], [0, 1, 1], "a:8", n_dropped=2, reason="rejected answer")])
    corpus = builder.finish()
    assert corpus.n_trained.tolist() == [2, 2, 1, 1, 0, 2] and corpus.bounds.tolist() == [0, 3, 6, 9, 12, 13, 16]
    assert corpus.flags.tolist() == [ENDS, ENDS + BLANK, 0, ENDS, 0, ENDS]
    assert [corpus.weight(index) for index in range(3)] == [None, 2.5, None]
    assert corpus.digests[0] == corpus.digests[2] == corpus.digests[5] != corpus.digests[1]
    assert corpus.n_samples == 8 and corpus.dropped == {"label is false": (2, 7), "rejected answer": (1, 2)}
    again = corpus.document(1, 3, 6)
    assert (list(again.ids), list(again.trained), again.weight) == ([5, 2, 6], [0, 1, 1], 2.5)


def test_an_empty_one() -> None:
    corpus = Builder("a", []).finish()
    assert len(corpus) == 0 and corpus.bounds.tolist() == [0] and corpus.ids.numel() == 0

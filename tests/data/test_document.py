"""Document: whatever kind of sequence the ids and flags come in, they are kept as compact arrays of plain numbers."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from minitune.data.document import Document
from minitune.errors import InputError

FLAGS: list[Any] = [
    [True, False, True, True], (1, 0, 1, 1), [5, 0, 200, 1], [300, 0, -1, 2**40], b"\x01\x00\x07\xff",
    array("b", [1, 0, -3, 1]), array("q", [1, 0, 2**40, 1]), torch.tensor([True, False, True, True]),
    torch.tensor([1.0, 0.0, 0.5, 2.0]), [1.0, 0.0, 0.5, 2.0], ["x", "", "x", "x"], memoryview(b"\x01\x00\x02\x01")]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: type(flags).__name__)
def test_flags_of_any_kind_are_0_or_1(flags: Any) -> None:
    document = Document([7, 8, 9, 10], flags)
    assert document.trained == array("b", [0, 0, 1, 1]) and document.n_trained == 2
    assert document.ids == array("i", [7, 8, 9, 10])


@pytest.mark.parametrize(("ids", "flags", "told"), [
    ([], [], "has no tokens"), ([1], [], "1 ids but 0 trained flags"), ([-1], [1], "-1 is no token id"),
    ([2**31], [1], "must be integers below"), (["a"], [1], "must be integers below")])
def test_what_is_no_document_is_refused(ids: Any, flags: Any, told: str) -> None:
    with pytest.raises(InputError, match=f"^a:3: .*{told}"):
        Document(ids, flags, where="a:3")

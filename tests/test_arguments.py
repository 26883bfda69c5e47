"""Values in messages: one short line, whatever was given."""

import pytest
import torch

from minitune.arguments import short


@pytest.mark.parametrize(("value", "shown"), [
    ("a  b\n", "'a  b\\n'"), ([1] * 99, "[1, 1, 1, 1, 1, 1, ...]"), ([[["deep"]]], "[[[...]]]"),
    (torch.eye(2), "tensor([[1., 0.], [0., 1.]])")], ids=["text", "long", "deep", "lines"])
def test_a_value_is_shown_in_one_short_line(value, shown):
    assert short(value) == shown


def test_no_value_is_shown_at_length():
    nested = {str(i): {str(j): ["word " * 99] * 99 for j in range(99)} for i in range(99)}
    for value in ("x" * 10**6, 10**4000, torch.zeros(99, 99), nested):
        found = short(value)
        assert len(found) < 400 and "\n" not in found and "..." in found

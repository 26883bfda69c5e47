"""PEFT's pattern tables: they match as peft matches, in bounded time, and the short form keeps every value."""

from __future__ import annotations

import itertools
import time

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from minitune.checkpoint.patterns import Patterns, compress
from minitune.config import LINEAR_NAMES
from minitune.errors import InputError

LINEARS = [f"model.layers.{layer}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
           for layer in range(12) for name in LINEAR_NAMES]      # two digits: "layers.1" must not stand for "layers.11"
KEYS = ["q_proj", "layers.1.self_attn.q_proj", "^model.layers.11.mlp.up_proj", r"model\.layers\.[0-3]\..*", "proj",
        r"(q|k)_proj", r".*\.1\..*", "layers.1", "model", ".*", r"self_attn\.q_proj|mlp.up_proj",
        "^q_proj"]


@pytest.mark.parametrize("keys", [*itertools.permutations(KEYS, 2), tuple(KEYS), tuple(KEYS[::-1])])
def test_patterns_match_as_in_peft(keys: tuple[str, ...]) -> None:
    pytest.importorskip("peft")
    from peft.utils.other import get_pattern_key

    table = {key: i for i, key in enumerate(keys)}
    ours = Patterns("x", table)
    for path in [*LINEARS[::5], "lm_head", "q_proj"]:
        assert ours.find(path, -1) == table.get(get_pattern_key(list(keys), path), -1), (path, keys)


def test_hostile_patterns_end_in_time() -> None:
    slow = {f"(.*{i}.*|.*x.*|y|z|w)": 1 for i in range(3000)} | {f".*{'a' * (i % 190)}.*{i}b": 1 for i in range(3000)}
    start = time.process_time()
    with pytest.raises(InputError, match=r"too complex|too long"):
        table = Patterns("x", {key: value for key, value in slow.items() if key.count("*") <= 2})
        for i in range(2000):
            table.find("a." * 95 + str(i), 0)
    assert time.process_time() - start < 20     # it takes about one; without bounds, hours


@given(st.dictionaries(st.sampled_from(LINEARS), st.integers(1, 3), min_size=1), st.integers(1, 3))
def test_compress_keeps_every_value(values: dict[str, int], default: int) -> None:
    keys = Patterns("x", compress(values, default))
    assert all(keys.find(path, default) == value for path, value in values.items())

"""deterministic: torch's flags stand as they were told to within the block, and as before behind it."""

import pytest
import torch
import torch.utils.deterministic

from minitune.ops.deterministic import deterministic


def _flags():
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory)


@pytest.mark.parametrize("warn_only", [False, True])
@pytest.mark.parametrize("fill", [False, True])
def test_the_flags_stand_within_and_are_put_back(warn_only, fill):
    before = _flags()
    with deterministic(warn_only=not warn_only, fill=not fill):
        outer = _flags()
        with pytest.raises(KeyError), deterministic(warn_only=warn_only, fill=fill):
            assert _flags() == (True, warn_only, fill)
            assert bool(torch.empty(100, dtype=torch.bfloat16).isnan().all()) >= fill
            raise KeyError
        assert _flags() == outer == (True, not warn_only, not fill)
    assert _flags() == before

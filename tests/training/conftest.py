"""The fakes as a fixture: a model and batches that need no network."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.training import fakes as module


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    return module

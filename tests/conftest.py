"""Guards and fixtures for the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rung.kernels


def pytest_configure(config: pytest.Config) -> None:
    # With two clones and one environment the tests of one clone would test the code of the other.
    imported, here = Path(rung.kernels.__path__[0]).parent.resolve(), Path(config.rootpath).resolve()
    if imported != here:
        pytest.exit(
            f"rung is imported from {imported}, but the tests are those of {here}: run `pip install -e .` here", 4
        )


@pytest.fixture(autouse=True)
def seed() -> None:
    """Seed torch's global generator, which modules use for their initial weights."""
    torch.manual_seed(0)

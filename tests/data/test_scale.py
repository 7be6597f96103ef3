"""A corpus of 500 million structures dealt to 4,096 ranks of 8 workers, from manifests alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rung.data.bench import (
    CORPUS_RANKS,
    CORPUS_STRUCTURES,
    CORPUS_WORKERS,
    PACK_STRUCTURES,
    corpus_manifest,
    corpus_sizes,
)
from rung.data.dealing import Dealing
from rung.data.manifest import MANIFEST_FILE, read_manifest, write_manifest

WORLD = CORPUS_RANKS * CORPUS_WORKERS


@pytest.mark.slow
def test_the_corpus_is_dealt_evenly_and_without_overlap(tmp_path: Path) -> None:
    load = np.zeros(WORLD, np.int64)  # structures of each consumer in one epoch of everything
    num_bytes = 0
    for index, size in enumerate(corpus_sizes()):
        folder = tmp_path / f"set{index}"
        folder.mkdir()
        write_manifest(corpus_manifest(folder.name, size), folder)
        num_bytes += (folder / MANIFEST_FILE).stat().st_size
        found = read_manifest(folder)
        total = sum(sum(shard.labels["pbe"]) for shard in found.shards)
        assert total == size
        shares = [Dealing(total, 8192, rank, WORLD).start().todo[0] for rank in range(WORLD)]
        starts, stops = np.array([share.start for share in shares]), np.array([share.stop for share in shares])
        assert starts[0] == 0 and stops[-1] == total and (starts[1:] == stops[:-1]).all()  # nothing twice, nothing lost
        load += stops - starts
    assert load.sum() == CORPUS_STRUCTURES
    assert (load.max() - load.min()) / load.mean() < 0.02
    assert num_bytes < 10_000_000


def test_a_share_is_read_from_few_packs() -> None:
    """A consumer of the smallest set reads its share and at most two cut packs, whatever the world."""
    size = corpus_sizes()[-1]
    for rank in (0, 17_000, WORLD - 1):
        share = Dealing(size, 8192, rank, WORLD).start().todo[0]
        touched = -(-share.stop // PACK_STRUCTURES) - share.start // PACK_STRUCTURES
        assert touched <= (share.stop - share.start) / PACK_STRUCTURES + 2


def test_manifests_are_read_once_for_each_state_of_the_file(tmp_path: Path) -> None:
    write_manifest(corpus_manifest("a", 1000), tmp_path)
    first = read_manifest(tmp_path)
    assert read_manifest(tmp_path) is first
    write_manifest(dataclasses.replace(first, version="2"), tmp_path)
    assert read_manifest(tmp_path).version == "2"

"""Throughput of the data pipeline as JSON lines, on one process, with molecules of 20 atoms.

    python -m rung.data.bench [--structures 100000] [--sources ani1x rmd17 ase] [--corpus] [--out FILE]

build_structures_per_s   reading, validation, splitting, sorting, packing, edge counts, hashing and writing of a source
stream_structures_per_s  from the shards built, through mixing, into batches without graphs
graph_structures_per_s   the same batches with their neighbour graphs within 5 angstrom
loader_structures_per_s  the same through one worker process of the loader
corpus_startup_s         with --corpus: what it costs a rank to open the manifests of 500 million structures in 20
                         datasets, their size, and how evenly they are dealt to 4,096 ranks of 8 workers

Rates are per second of processor time of the process (its threads included), `wall_structures_per_s` per second of the
clock; of the loader only the clock's. The files are synthetic and lie in a temporary folder, warm in the page cache.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rung.data.batch import Batch, Batcher, Budget
from rung.data.build import BuildConfig, build
from rung.data.dealing import Dealing
from rung.data.fidelity import Fidelity
from rung.data.loader import BatchLoader
from rung.data.manifest import MANIFEST_FILE, FidelityEntry, Manifest, read_manifest, write_manifest
from rung.data.mixing import MixedStream, Task, open_tasks
from rung.data.shard import ShardInfo
from rung.data.sources.registry import open_source

ATOMS = 20
CUTOFF = 5.0  # angstrom
BUDGET = Budget(max_atoms=2048, max_edges=65536)
CORPUS_STRUCTURES, CORPUS_DATASETS = 500_000_000, 20
CORPUS_RANKS, CORPUS_WORKERS = 4096, 8
PACK_STRUCTURES = 800
_SHARD_STRUCTURES = 200 * PACK_STRUCTURES
_CONFORMERS = 1000  # of each molecule in the HDF5 file
_BOX = (9.0, 6.0, 5.0)  # angstrom; about 240 edges a molecule
_ELEMENTS = np.array([6] * 7 + [1] * 9 + [8] * 2 + [7] * 2, np.uint8)

Line = dict[str, Any]


def write_ani1x(folder: Path, structures: int, random: np.random.Generator) -> Path:
    """Write an HDF5 file in the layout of ANI-1x, with energies and forces at one level."""
    import h5py

    path = folder / "ani1x-release.h5"
    with h5py.File(path, "w") as file:
        for index in range(structures // _CONFORMERS):
            group = file.create_group(f"C7H9N2O2X{index}")
            group["atomic_numbers"] = _ELEMENTS
            group["coordinates"] = _positions(_CONFORMERS, random)
            group["wb97x_dz.energy"] = -400 + random.normal(scale=0.1, size=_CONFORMERS)
            group["wb97x_dz.forces"] = random.normal(scale=0.02, size=(_CONFORMERS, ATOMS, 3)).astype(np.float32)
            group["wb97x_dz.dipole"] = np.full((_CONFORMERS, 3), np.nan, np.float32)
    return path


def write_rmd17(folder: Path, structures: int, random: np.random.Generator) -> Path:
    """Write an npz file in the layout of revised MD17."""
    path = folder / "rmd17_aspirin.npz"
    arrays: dict[str, Any] = {
        "nuclear_charges": _ELEMENTS,
        "coords": _positions(structures, random).astype(np.float64),
        "energies": -400_000 + random.normal(size=structures),
        "forces": random.normal(scale=10, size=(structures, ATOMS, 3)),
        "old_indices": np.arange(structures),
        "old_energies": np.zeros(structures),
        "old_forces": np.zeros((structures, ATOMS, 3)),
    }
    np.savez(path, **arrays)
    return path


def write_extxyz(folder: Path, structures: int, random: np.random.Generator) -> Path:
    """Write an extxyz file with energies and forces."""
    from ase import Atoms
    from ase.io import write

    frames = []
    for positions in _positions(structures, random):
        atoms = Atoms(_ELEMENTS, positions, info={"REF_energy": -400.0 + random.normal()})
        atoms.arrays["REF_forces"] = random.normal(size=(ATOMS, 3))
        frames.append(atoms)
    write(folder / "molecules.xyz", frames, format="extxyz")
    return folder / "molecules.xyz"


# source -> (writer, options of the reader, how many fewer structures: text is slow)
SOURCES: dict[str, tuple[Callable[[Path, int, np.random.Generator], Path], dict[str, str], int]] = {
    "ani1x": (write_ani1x, {"levels": "wb97x_631gd"}, 1),
    "rmd17": (write_rmd17, {}, 1),
    "ase": (write_extxyz, {"fidelity": "pbe"}, 50),
}


def measure(source: str, structures: int, folder: Path) -> Iterator[Line]:
    """Yield the lines of one source."""
    write, options, fewer = SOURCES[source]
    count = structures // fewer
    path = write(folder, count, np.random.default_rng(0))
    reader = open_source(source, options)
    config = BuildConfig("bench", split=_all_train, max_energy_deviation=1e9)
    place: Line = {"source": source, "format": path.suffix[1:], "structures": count, "atoms": ATOMS}
    with _timed() as spent:
        manifest = build(reader, [path], folder / source, config)
    megabytes = sum(shard.bytes for shard in manifest.shards) / 1e6
    yield place | {"name": "build_structures_per_s", "megabytes": round(megabytes, 1)} | _rates(count, spent)
    (fidelity,) = reader.fidelities
    for name, cutoff in (("stream_structures_per_s", None), ("graph_structures_per_s", CUTOFF)):
        stream = _stream(folder / source, fidelity, 0, 1)
        batcher = Batcher({fidelity: 0}, cutoff, BUDGET)
        _take((batch for samples in stream for batch, _ in batcher.add(samples)), count // 10)  # the first block
        with _timed() as spent:
            taken = _take((batch for samples in stream for batch, _ in batcher.add(samples)), count)
        yield place | {"name": name} | _rates(taken, spent)
    loader = BatchLoader(
        [lambda rank, world: _stream(folder / source, fidelity, rank, world)],
        {fidelity: 0},
        CUTOFF,
        BUDGET,
        num_workers=1,
    )
    _take(loader, count // 10)
    with _timed() as spent:
        taken = _take(loader, count)
    loader.close()
    yield place | {"name": "loader_structures_per_s", "wall_structures_per_s": round(taken / spent["wall"])}


def corpus_sizes() -> list[int]:
    """Return the structures of the datasets of a large corpus: geometric, the largest a hundred times the smallest."""
    shares = np.geomspace(100, 1, CORPUS_DATASETS)
    counts = (CORPUS_STRUCTURES * shares / shares.sum()).astype(int)
    counts[0] += CORPUS_STRUCTURES - counts.sum()
    return [int(count) for count in counts]


def corpus_manifest(name: str, structures: int) -> Manifest:
    """Return the manifest of a dataset of this many labelled structures, in shards of about 100 MB."""
    shards: list[ShardInfo] = []
    for start in range(0, structures, _SHARD_STRUCTURES):
        size = min(_SHARD_STRUCTURES, structures - start)
        counts = [min(PACK_STRUCTURES, size - first) for first in range(0, size, PACK_STRUCTURES)]
        file, digest = f"train-{len(shards):06d}.tar", f"{len(shards):064x}"
        sizes = (600 * size, len(counts), size, ATOMS * size, 240 * size)  # bytes, packs, structures, atoms, edges
        shards.append(ShardInfo(file, digest, *sizes, "train", {"pbe": counts}))
    count = {"train": structures}
    entry = FidelityEntry(Fidelity("pbe", "PBE"), count, count, "train")
    nowhere = ("", "", "", "", "")  # source, doi, licence, citation, description
    return Manifest(name, "1", *nowhere, CUTOFF, {"pbe": entry}, {6: ATOMS * structures}, ("train",), shards)


def measure_corpus(folder: Path) -> Line:
    """Return the line of the large corpus."""
    names = [f"set{index}" for index in range(CORPUS_DATASETS)]
    for name, size in zip(names, corpus_sizes(), strict=True):
        (folder / name).mkdir()
        write_manifest(corpus_manifest(name, size), folder / name)
    with _timed() as spent:
        totals = [sum(sum(s.labels["pbe"]) for s in read_manifest(folder / name).shards) for name in names]
    world = CORPUS_RANKS * CORPUS_WORKERS
    with _timed() as dealt:
        loads = [
            sum(share.stop - share.start for total in totals for share in Dealing(total, 1, rank, world).start().todo)
            for rank in range(0, world, 8)
        ]
    return {
        "name": "corpus_startup_s",
        "structures": sum(totals),
        "datasets": len(totals),
        "consumers": world,
        "seconds": round(spent["wall"], 2),
        "manifest_megabytes": round(sum((folder / name / MANIFEST_FILE).stat().st_size for name in names) / 1e6, 2),
        "imbalance": (max(loads) - min(loads)) / (sum(loads) / len(loads)),
        "deal_microseconds": round(1e6 * dealt["wall"] / len(loads), 1),
    }


def machine() -> Line:
    """Return what the rates were measured on."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.machine()
    command = " ".join(["python -m rung.data.bench", *sys.argv[1:]])
    return {"name": "machine", "command": command, "commit": commit.stdout.strip(), "processor": processor}


def _positions(count: int, random: np.random.Generator) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (random.random((count, ATOMS, 3)) * _BOX).astype(np.float32)


def _all_train(group: str) -> str:
    return "train"


def _stream(folder: Path, fidelity: str, rank: int, world: int) -> MixedStream:
    return open_tasks([Task(str(folder), fidelity)], seed=0, rank=rank, world=world)


def _take(batches: Iterator[Batch], count: int) -> int:
    """Take batches until they hold at least `count` structures, and return how many they hold."""
    taken = 0
    while taken < count:
        taken += next(batches).num_structures
    return taken


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Give a dictionary that holds the seconds of the clock and of the processor afterwards."""
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent.update(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def _rates(count: int, spent: dict[str, float]) -> Line:
    return {
        "structures_per_s": round(count / spent["cpu"]),
        "wall_structures_per_s": round(count / spent["wall"]),
    }


def main() -> None:
    """Print the lines, and write them to a file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=100_000, help="of each source (text: a fiftieth)")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--corpus", action="store_true", help="open and deal the manifests of a large corpus, too")
    parser.add_argument("--out", type=Path, help="file for the lines")
    arguments = parser.parse_args()
    lines = [machine()]
    print(json.dumps(lines[0]), flush=True)
    with TemporaryDirectory() as folder:
        for source in arguments.sources:
            for line in measure(source, arguments.structures, Path(folder)):
                lines.append(line)
                print(json.dumps(line), flush=True)
        if arguments.corpus:
            lines.append(measure_corpus(Path(folder)))
            print(json.dumps(lines[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()

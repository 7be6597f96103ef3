"""Transition1x: organic reactions sampled along nudged elastic bands at wB97X/6-31G(d), in one HDF5 file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rung.data.fidelity import Fidelity
from rung.data.sources.common import gathered, labelled, of_one_size, slices
from rung.data.sources.hdf5 import Group, child, dataset, names_in, naming, opened, where
from rung.data.sources.source import Part, Source, SourceInfo, cut_groups, existing, span
from rung.data.table import StructureTable

_LEVEL = Fidelity("wb97x_631gd", "wB97X", "6-31G(d)", code="ORCA 5.0.2")
_ENERGY, _FORCES = "wB97x_6-31G(d).energy", "wB97x_6-31G(d).forces"  # eV, eV/angstrom
_ENDS = ("reactant", "product")
_SPLITS = ("train", "val", "test")
# Isolated atoms in eV, from the data set's own loader.
_ATOMS = {1: -13.62222753701504, 6: -1029.4130839658328, 7: -1484.8710358098756, 8: -2041.8396277138045}


@dataclass(frozen=True)
class Transition1x(Source):
    """Read every reaction once: its reactant, its product, and all images of its band.

    The group `data` holds all reactions; `train`, `val` and `test` hold the same ones again and are read only where
    `data` is missing. The transition state is one of the images. A molecule's isomers share reactants, so the identity
    by which the data are split is the formula, as in the published split.
    """

    info: ClassVar[SourceInfo] = SourceInfo(
        name="transition1x",
        title="Transition1x, configurations on and around reaction pathways",
        files="Transition1x.h5",
        layout="HDF5, data|train|val|test / formula / reaction: atomic_numbers [n], positions [M, n, 3] (angstrom), "
        "wB97x_6-31G(d).energy [M] (eV), wB97x_6-31G(d).forces [M, n, 3] (eV/angstrom); the same in the sub-groups "
        "reactant, product and transition_state; neutral singlets",
        url="https://gitlab.com/matschreiner/Transition1x",
        doi="10.6084/m9.figshare.19614657.v4",
        citation="Schreiner, Bhowmik, Vegge, Busk, Winther, Transition1x, a dataset for building generalizable "
        "reactive machine learning potentials, Scientific Data 9, 779 (2022), 10.1038/s41597-022-01870-w",
        fidelities=(_LEVEL,),
        structures=9_644_740,
        size="6.6 GB",
        e0={_LEVEL.name: _ATOMS},
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return parts whose items are reactions."""
        return [part for path in existing(paths, self.info) for part in _parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        with opened(part.path) as file:
            reactions = _reactions(file)
            chosen = (reactions[index] for index in span(part, len(reactions)))
            yield from gathered(table for names in chosen for table in _tables(file, *names))


def _parts(path: Path) -> list[Part]:
    with opened(path) as file:
        reactions = (child(file, "/".join(names)) for names in _reactions(file))
        shapes = [dataset(reaction, "positions", (None, None, 3)).shape for reaction in reactions]
    return cut_groups(path, [len(_ENDS) + M for M, _, _ in shapes], [n for _, n, _ in shapes])


def _reactions(file: Group) -> list[tuple[str, str, str]]:
    """Return (split, formula, reaction) of every reaction once; raise ValueError for a file without any."""
    splits = ["data"] if "data" in file else [split for split in _SPLITS if split in file]
    if not splits:
        raise ValueError(f"{where(file)}: expected a group 'data' or {_SPLITS}, found {', '.join(file) or 'nothing'}")
    return [
        (split, formula, reaction)
        for split in splits
        for formula in names_in(child(file, split))
        for reaction in names_in(child(file, f"{split}/{formula}"))
    ]


def _tables(file: Group, split: str, formula: str, reaction: str) -> Iterator[StructureTable]:
    group = child(file, f"{split}/{formula}/{reaction}")
    for end in _ENDS:
        yield from _images(child(group, end), f"{formula}-{reaction}-{end}", formula)
    yield from _images(group, f"{formula}-{reaction}", formula)


def _images(group: Group, name: str, formula: str) -> Iterator[StructureTable]:
    numbers = dataset(group, "atomic_numbers", (None,), "iu")[()]
    n = len(numbers)
    positions = dataset(group, "positions", (None, n, 3))
    M = len(positions)
    energy, forces = dataset(group, _ENERGY, (M,)), dataset(group, _FORCES, (M, n, 3))
    for rows in slices(M):
        labels = {f"energy.{_LEVEL.name}": energy[rows], f"forces.{_LEVEL.name}": forces[rows]}
        with naming(group):
            table = of_one_size(name, rows.start, formula, numbers, positions[rows], labels)
        yield labelled(table, [_LEVEL.name])

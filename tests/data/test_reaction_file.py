"""Tables of relative energies: every way to name a geometry, units, groups, and a clear error for every fault."""

from __future__ import annotations

import re
from pathlib import Path

import ase.units
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write

from rung.data.reaction import Reaction, structures_of
from rung.data.reaction_file import is_reaction_file, reaction_sources, read_reactions, write_reactions
from rung.data.structure import Structure

COMBUSTION = "{CH4: 1, O2: 2, CO2: -1, H2O: -2}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file of named frames, and with single geometries."""
    frames = []
    for name in ("H2O", "CH4", "CO2", "O2"):
        atoms = molecule(name)
        atoms.info = {"name": name, "multiplicity": 3} if name == "O2" else {"name": name}
        write(tmp_path / f"{name}.xyz", Atoms(atoms.numbers, atoms.positions))
        frames.append(atoms)
    write(tmp_path / "frames.extxyz", frames)
    write(tmp_path / "OH.xyz", Atoms("OH", [[0, 0, 0], [0, 0, 0.97]]))
    return tmp_path


def read(folder: Path, text: str, name: str = "set.yaml") -> list[Reaction]:
    (folder / name).write_text(text)
    return read_reactions(folder / name, "ccsdt_cbs")


def table(*rows: str, structures: str = "structures: frames.extxyz", unit: str = "unit: kcal/mol") -> str:
    return "\n".join([unit, structures, "reactions:", *(f"  - {row}" for row in rows)])


def test_yaml_with_named_frames(folder: Path) -> None:
    text = table(
        f"{{name: combustion, energy: 191.8, structures: {COMBUSTION}}}",
        "{energy: -1e-1, unit: hartree, group: mine, structures: {O2: 1/2, H2O: -.5}, allow_unbalanced: true}",
    )
    first, second = read(folder, text)
    assert (first.key, first.group) == ("combustion", "CH4")  # of its largest structure
    assert first.energy == pytest.approx(191.8 * ase.units.kcal / ase.units.mol, rel=1e-7)
    assert [structure.key for structure in first.structures] == ["CH4", "O2", "CO2", "H2O"]
    assert first.coefficients == (1, 2, -1, -2) and first.composition() == {}
    assert first.structures[1].multiplicity == 3 and first.structures[0].multiplicity == 1
    assert (second.key, second.group, second.coefficients) == ("2", "mine", (0.5, -0.5))
    assert second.energy == pytest.approx(-0.1 * ase.units.Hartree, rel=1e-7)
    assert len(structures_of([first, second])) == 4  # shared, not read again
    np.testing.assert_allclose(first.structures[0].positions, molecule("CH4").positions, atol=1e-6)


def test_every_reference_to_a_geometry(folder: Path) -> None:
    structures = """structures:
  file: H2O.xyz
  same: H2O.xyz
  named: frames.extxyz#CH4
  counted: frames.extxyz@1
  01: {file: OH.xyz, charge: -1, group: hydroxide}
  "OH": {file: OH.xyz, multiplicity: 2}"""
    text = table(
        "{energy: 0, structures: {file: 1, same: 2, 01: 1, OH: -1}, allow_unbalanced: true}",
        "{energy: 0, structures: {named: 1, counted: -3}, allow_unbalanced: true}",
        structures=structures,
    )
    first, second = read(folder, text)
    assert [s.key for s in first.structures] == ["file", "01", "OH"] and first.coefficients == (3, 1, -1)
    ion, radical = first.structures[1:]
    assert (ion.charge, ion.multiplicity, ion.group) == (-1, 1, "hydroxide")
    assert (radical.charge, radical.multiplicity, radical.group) == (0, 2, "HO")
    assert [s.key for s in second.structures] == ["named"] and second.coefficients == (-2,)


def test_a_multiplicity_that_is_not_stated_is_the_smallest_possible(folder: Path) -> None:
    structures = """structures:
  radical: OH.xyz
  anion: {file: OH.xyz, charge: -1}
  quartet: {file: OH.xyz, multiplicity: 4}
  named: frames.extxyz#O2"""
    row = "{energy: 0, structures: {radical: 1, anion: 1, quartet: 1, named: 1}, allow_unbalanced: true}"
    (reaction,) = read(folder, table(row, structures=structures))
    assert [s.multiplicity for s in reaction.structures] == [2, 1, 4, 3]
    text = "name,energy,unit,structures,coefficients,allow_unbalanced\nr,1,eV,OH.xyz,1,true\n"
    (reaction,) = read(folder, text, "set.csv")
    assert reaction.structures[0].multiplicity == 2


def test_sources_are_the_table_and_the_geometries_in_use(folder: Path) -> None:
    read(folder, table(ROW, structures="structures: frames.extxyz"))
    assert reaction_sources(folder / "set.yaml") == [folder / "frames.extxyz", folder / "set.yaml"]
    species = "{O2: frames.extxyz#O2, CH4: CH4.xyz, CO2: CO2.xyz, H2O: H2O.xyz, unused: OH.xyz}"
    read(folder, table(ROW, structures=f"structures: {species}"))
    names = ("CH4.xyz", "CO2.xyz", "H2O.xyz", "frames.extxyz", "set.yaml")
    assert reaction_sources(str(folder / "set.yaml")) == [folder / name for name in names]


def test_csv_with_paths(folder: Path) -> None:
    rows = [
        "name,energy,unit,structures,coefficients,group",
        "combustion,191.8,kJ/mol,CH4.xyz; frames.extxyz#O2;CO2.xyz;H2O.xyz;H2O.xyz,1;2;-1;-1;-1,",
        'conformers,"5",meV,CH4.xyz;frames.extxyz@1,1;-1,methane',
    ]
    first, second = read(folder, "\n".join(rows), "set.csv")
    assert first.energy == pytest.approx(191.8 * ase.units.kJ / ase.units.mol, rel=1e-7)
    assert first.coefficients == (1, 2, -1, -2)  # water twice
    assert (second.key, second.group, second.energy) == ("conformers", "methane", pytest.approx(0.005))


def test_round_trip(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)

    def structure(key: str, symbols: str, **fields: object) -> Structure:
        numbers = Atoms(symbols).numbers.astype(np.uint8)
        positions = generator.normal(scale=3, size=(len(numbers), 3)).astype(np.float32)
        return Structure(key, f"group of {key}", numbers, positions, **fields)  # type: ignore[arg-type]

    box = {"cell": np.diag([4.0, 5, 6]).astype(np.float32), "pbc": np.array([True, True, False])}
    a, b = structure("01", "OH", charge=-1), structure('odd: "name" #1', "OH", multiplicity=2)
    c = structure("C=C[1]", "CH2", **box)
    reactions = [
        Reaction("1e3", "x", (a, b), (1.0, -1.0), 0.1 + 0.2),
        Reaction("conformers", "yes", (c,), (1 / 3,), -1e-7),
        Reaction.absolute(b, -2050.123456789),
    ]
    write_reactions(tmp_path / "set.yaml", reactions, "kcal/mol")
    again = read_reactions(tmp_path / "set.yaml", "ccsdt")
    assert [(r.key, r.group, r.coefficients) for r in again] == [(r.key, r.group, r.coefficients) for r in reactions]
    assert [r.energy for r in again] == pytest.approx([r.energy for r in reactions], rel=1e-15)
    assert len(structures_of(again)) == 3
    for mine, theirs in zip(structures_of(again), structures_of(reactions), strict=True):
        assert (mine.key, mine.group, mine.charge, mine.multiplicity) == (
            theirs.key,
            theirs.group,
            theirs.charge,
            theirs.multiplicity,
        )
        np.testing.assert_array_equal(mine.numbers, theirs.numbers)
        np.testing.assert_allclose(mine.positions, theirs.positions, atol=1e-8)
        np.testing.assert_array_equal(mine.pbc, theirs.pbc)
        np.testing.assert_allclose(mine.cell, theirs.cell)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    water = Structure("a", "a", np.array([8], np.uint8), np.zeros((1, 3), np.float32))
    other = Structure("a", "b", np.array([8], np.uint8), np.ones((1, 3), np.float32))
    reaction = Reaction("r", "a", (water, other), (1.0, -1.0), 0.0)
    with pytest.raises(ValueError, match="expected structures of different keys, found 'a' twice"):
        write_reactions(tmp_path / "set.yaml", [reaction])
    with pytest.raises(ValueError, match="expected reactions of different keys, found 'a' twice"):
        write_reactions(tmp_path / "set.yaml", [Reaction.absolute(water, 0.0)] * 2)
    with pytest.raises(ValueError, match=re.escape("expected a name that ends in .yaml")):
        write_reactions(tmp_path / "set.csv", [Reaction.absolute(water, 0.0)])
    radical = Structure("b", "b", np.array([1], np.uint8), np.zeros((1, 3), np.float32))  # a singlet
    with pytest.raises(ValueError, match="species 'b': expected an even multiplicity"):
        write_reactions(tmp_path / "set.yaml", [Reaction.absolute(radical, 0.0)])
    assert not list(tmp_path.iterdir())


ROW = f"{{name: r, energy: 1, structures: {COMBUSTION}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set.yaml: expected reactions, found an empty file"),
        ("a: [1", "set.yaml: not YAML"),
        (
            "unit: eV\nstructure: a.xyz\n",
            "unknown key 'structure'; known: unit, structures, allow_unbalanced, reactions",
        ),
        ("unit: eV\n", "expected a list under 'reactions', found unit"),
        (table().replace("reactions:", "reactions: []"), "expected at least one reaction, found none"),
        (table(ROW, ROW), "line 5: reaction 'r' is there twice; the first is"),
        (table(ROW, unit=""), "line 4: reaction 'r': unit: expected one of eV, meV, kcal/mol, kJ/mol, hartree, ryd"),
        (table(ROW, unit="unit: Kcal/mol"), "unknown unit 'Kcal/mol'; known: eV, meV, kcal/mol"),
        (table(ROW, unit="unit: Kcal/mol"), "did you mean 'kcal/mol'?"),
        (table(ROW.replace("energy: 1", "energy: .nan")), "energy: expected a number, found '.nan'"),
        (table(ROW.replace("energy: 1", "energy: inf")), "energy: expected a finite number, found 'inf'"),
        (table(ROW.replace("energy: 1, ", "")), "energy: expected a number, found ''"),
        (table(ROW.replace("energy: 1", "energi: 1")), "line 4: unknown key 'energi'; known: name, energy, unit"),
        (table(ROW.replace("O2: 2", "O3: 2")), "unknown species 'O3': no frame of that name in"),
        (table(ROW.replace("H2O", "h20")), "frames.extxyz; did you mean 'H2O'?"),
        (table(ROW.replace("O2: 2", "O2: two")), "coefficient of 'O2': expected a number or a fraction, found 'two'"),
        (table(ROW.replace("O2: 2", "O2: 0")), "coefficient of 'O2': expected one other than 0"),
        (table(ROW.replace("O2: 2", "O2: 2, O2: -2")), "the coefficients of 'O2' add up to 0"),
        (table(ROW.replace("O2: 2", "O2: 1")), "reaction 'r': expected the same atoms and charge on both sides, found"),
        (table(ROW.replace("O2: 2", "O2: 1.5")), "found O -1 from left to right"),
        (table("{energy: 1, structures: [CH4, O2]}"), "structures: expected species with their coefficients"),
        (table("{energy: 1, structures: {}}"), "reaction '1': structures: expected at least one species"),
        (table(ROW[:-1] + ", allow_unbalanced: yes}"), "allow_unbalanced: expected true or false, found 'yes'"),
        (table(ROW, structures="structures: {CH4: nowhere.xyz}"), "unknown species: no file"),
        (table(ROW, structures="structures: {CH4: CH3.xyz}"), "did you mean 'CH4.xyz'?"),
        (
            table(ROW, structures="structures: {CH4: frames.extxyz}"),
            "has 4 frames; name one, such as frames.extxyz#H2O",
        ),
        (table(ROW, structures="structures: {CH4: frames.extxyz@4}"), "has no frame 4; it has 4, counted from 0"),
        (table(ROW, structures="structures: {CH4: CH4.xyz, CH4: CO2.xyz}"), "line 2: 'CH4' is there twice"),
        (table(ROW, structures="structures: {CH4: {charge: 1}}"), "line 2: expected a structure's 'file', found none"),
        (
            table(ROW, structures="structures: {CH4: {file: CH4.xyz, charge: .5}}"),
            "charge of a structure: expected a whole number, found '.5'",
        ),
        (
            table(ROW, structures="structures: {CH4: CH4.xyz, H2O: H2O.xyz, CO2: CO2.xyz}"),
            "unknown species 'O2'; did you mean 'CO2'?",
        ),
        (table(ROW, structures=""), "unknown species: no file"),
        (
            table("{energy: 1, structures: {a: 1}}", structures="structures: {a: {file: OH.xyz, multiplicity: 1}}"),
            "species 'a': expected an even multiplicity (2S + 1) for its 9 electrons (charge 0), at most 10, found 1",
        ),
        (
            table("{energy: 1, structures: {a: 1}}", structures="structures: {a: {file: OH.xyz, multiplicity: 12}}"),
            "at most 10, found 12; correct the charge or the multiplicity",
        ),
        (
            table("{energy: 1, structures: {a: 1}}", structures="structures: {a: {file: OH.xyz, charge: 10}}"),
            "species 'a': expected a charge of at most 9, found 10",
        ),
        (
            table(
                "{energy: 1, structures: {a: 1, b: -1}}",
                structures="structures: {a: OH.xyz, b: {file: OH.xyz, charge: -1}}",
            ),
            "found charge +1 from left to right",
        ),
    ],
)
def test_faults_of_yaml_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(folder, text)
    assert str(caught.value).startswith(str(folder / "set.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: expected the columns name, energy, unit"),
        ("name,energy,structures,coefficients\n", "missing: unit"),
        ("name,energy,unit,structures,coefficients\n", "expected at least one reaction, found none"),
        ("name,energy,unit,structures,coefficients,groups\n", "unknown column 'groups'; known: name"),
        ("name,energy,unit,structures,coefficients\nr,1,eV,CH4.xyz,1;2\n", "line 2: expected as many coefficients as"),
        ("name,energy,unit,structures,coefficients\nr,1,eV,CH4.xyz\n", "line 2: expected 5 values, as in the header"),
        ("name,energy,unit,structures,coefficients\nr,1,,CH4.xyz,1\n", "line 2: reaction 'r': unit: expected one of"),
        ("name,energy,unit,structures,coefficients\nr,1,eV,CH4.xyz,1\n", "found H +4, C +1 from left to right"),
    ],
)
def test_faults_of_csv_are_named(folder: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(folder, text, "set.csv")
    assert str(caught.value).startswith(str(folder / "set.csv"))


def test_frames_of_one_name_are_refused_only_where_they_are_meant(folder: Path) -> None:
    write(folder / "twice.extxyz", [Atoms("H", info={"name": "a"}), Atoms("H", info={"name": "a"})])
    row = "{energy: 1, structures: {a: 1}, allow_unbalanced: true}"
    with pytest.raises(ValueError, match="species 'a': expected one frame of that name .*, found frames 0 and 1"):
        read(folder, table(row, structures="structures: twice.extxyz"))
    assert len(read(folder, table(row, structures="structures: {a: twice.extxyz@1}"))) == 1


def test_other_files(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml: no such file"):
        read_reactions(folder / "nowhere.yaml", "ccsdt")
    with pytest.raises(ValueError, match="frames.extxyz: expected a table of reactions"):
        read_reactions(folder / "frames.extxyz", "ccsdt")
    with pytest.raises(ValueError, match=re.escape("name 'CCSD(T)': expected lower-case")):
        read_reactions(folder / "frames.extxyz", "CCSD(T)")
    (folder / "set.yaml").write_bytes(b"unit: \xff")
    with pytest.raises(ValueError, match="set.yaml: expected text in UTF-8"):
        read_reactions(folder / "set.yaml", "ccsdt")
    assert is_reaction_file("set.csv") and is_reaction_file("a/set.yml")
    assert (
        not is_reaction_file("set/dataset.yaml") and not is_reaction_file("a.extxyz") and not is_reaction_file(folder)
    )

"""GMTKN55's layout, on small folders that are written as the published ones are."""

from __future__ import annotations

import re
from pathlib import Path

import ase.units
import pytest
from ase.build import molecule
from ase.io import write

from rung.data.reaction import Reaction, structures_of
from rung.data.reaction_file import is_reaction_file, reaction_sources, read_reactions

HEAD = 'if [ "$TMER" == "" ]\nthen\n  tmer=tmer2++\nelse\n  tmer=$TMER\nfi\nf=$1\nw=$2\n\n'


def species(folder: Path, name: str, formula: str, charge: int = 0, unpaired: int | None = None) -> None:
    (folder / name).mkdir(parents=True)
    write(folder / name / "struc.xyz", molecule(formula), format="xyz")
    if charge:
        (folder / name / ".CHRG").write_text(f"  {charge}\n")
    if unpaired is not None:
        (folder / name / ".UHF").write_text(f"{unpaired}\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, formula, charge, unpaired in (
        ("01", "H2O", 0, None),
        ("01A", "OH", 0, None),
        ("01B", "H", 0, 1),
        ("o2", "O2", 0, 2),
        ("ion", "H2O", 1, None),
    ):
        species(tmp_path / "SET", name, formula, charge, unpaired)
    return tmp_path / "SET"


def read(folder: Path, lines: str, name: str = ".res") -> list[Reaction]:
    (folder / name).write_text(HEAD + lines)
    return read_reactions(folder if name == ".res" else folder / name, "ccsdt_cbs")


def test_lines_of_species_and_coefficients(folder: Path) -> None:
    lines = "# bonds\n$tmer 01{A,B,}/$f  x  1 1 -1 $w    118.1 # W4\n$tmer 01A/$f 01/$f o2/$f x 4 -2 -1 $w -1.5 0 1\n"
    first, second = read(folder, lines)
    assert is_reaction_file(folder) and is_reaction_file(folder / ".res")
    assert (first.key, second.key) == ("SET-001", "SET-002")
    assert first.energy == pytest.approx(118.1 * ase.units.kcal / ase.units.mol, rel=1e-7)
    assert [s.key for s in first.structures] == ["01A", "01B", "01"] and first.coefficients == (1, 1, -1)
    assert [s.multiplicity for s in first.structures] == [2, 2, 1]  # the smallest possible where it is not said
    assert second.coefficients == (4, -2, -1) and second.structures[2].multiplicity == 3
    assert len(structures_of([first, second])) == 4 and first.group == "H2O"


def test_energies_relative_to_another_reaction(folder: Path) -> None:
    """As in RSE43: radicals by their stability relative to the first one, H atoms left out of every line."""
    for name, formula in (("E1", "CH4"), ("P1", "CH3"), ("E2", "C2H6"), ("P2", "C2H5")):
        species(folder, name, formula)
    shell = "d0=$( $tmer   {E,P}1/$f    x -1  1    $w $d0 | awk '{ print $6; }' )\n"
    (reaction,) = read(folder, shell + "$tmer {E,P}2/$f  x -1 1  $w $d0   -3.3\n")
    assert reaction.energy == pytest.approx(-3.3 * ase.units.kcal / ase.units.mol, rel=1e-7)
    assert [s.key for s in reaction.structures] == ["E2", "P2", "E1", "P1"]
    assert reaction.coefficients == (-1, 1, 1, -1) and reaction.composition() == {}


def test_charge_and_spin_in_turbomoles_file(folder: Path) -> None:
    for name, eht in (("oh-", "charge=-1 unpaired=0"), ("oh", "charge=0 unpaired=1")):
        (folder / name).mkdir()
        (folder / name / "coord").write_text(f"$coord\n 0.0 0.0 0.909 O\n 0.0 0.0 -0.909 H\n$eht {eht}\n$end\n")
    line = "$tmer oh{,-}/$f x 1 -1 $w 42\n"
    (reaction,) = read(folder, line)
    assert [(s.charge, s.multiplicity) for s in reaction.structures] == [(0, 2), (-1, 1)]
    assert reaction.structures[0].positions[0, 2] == pytest.approx(0.48102208471218, abs=1e-6)  # angstrom
    (folder / "oh-" / ".CHRG").write_text("1")
    with pytest.raises(ValueError, match="oh-: charge is 1 in .CHRG and -1 in coord; correct one"):
        read(folder, line)


def test_a_second_set_and_missing_electrons(folder: Path) -> None:
    (reaction,) = read(folder, "$tmer 01/$f ion/$f x -1 1 $w 291\n", ".resRC")
    assert reaction.key == "SETRC-001" and [s.charge for s in reaction.structures] == [0, 1]
    assert reaction.structures[1].multiplicity == 2


def test_protons_or_electrons_may_be_left_out_but_no_hydrogen_atom(folder: Path) -> None:
    for name, formula, charge in (("acid", "H2O", 0), ("base", "OH", -1)):
        species(folder, name, formula, charge)
    (affinity,) = read(folder, "$tmer {acid,base}/$f x -1 1 $w 390\n")  # acid -> base + H+
    assert affinity.composition() == {1: -1} and affinity.coefficients == (-1, 1)
    (affinity,) = read(folder, "$tmer {01A,ion}/$f x -1 1 $w -140\n")  # OH + H+ -> H2O+
    assert affinity.composition() == {1: 1}
    for line, found in (
        ("$tmer 01/$f 01A/$f x -1 1 $w 118", "found H -1 from left to right"),  # H2O -> OH + H
        ("$tmer ion/$f base/$f x -1 1 $w 118", "found H -1, charge -2 from left to right"),
    ):
        with pytest.raises(ValueError, match=re.escape(found)):
            read(folder, line + "\n")


def test_sources_are_the_files_that_are_read(folder: Path) -> None:
    read(folder, "$tmer 01{A,B,}/$f x 1 1 -1 $w 118\n$tmer {01,ion}/$f x -1 1 $w 291\n")
    names = (".res", "01/struc.xyz", "01A/struc.xyz", "01B/.UHF", "01B/struc.xyz", "ion/.CHRG", "ion/struc.xyz")
    assert reaction_sources(folder) == [folder / name for name in names]  # and none of o2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "expected at least one reaction, found none"),
        ("$tmer 01/$f -1 1 $w 1", "line 10: expected '$tmer SPECIES... x COEFFICIENT... $w ENERGY', found"),
        ("$tmer 01/$f x -1 1 $w 1", "line 10: expected as many coefficients as species, found 1 (01) and 2"),
        ("$tmer 01{A,B}{C,D}/$f x 1 1 1 1 $w 1", "expected at most one pair of braces"),
        ("$tmer 01C/$f x 1 $w 1", "line 10: reaction 'SET-001': unknown species '01C': no folder"),
        ("$tmer {ion,o2}/$f x -1 1 $w $d0 1", "energy: expected a number, found '$d0'"),
        ("$tmer 01/$f o2/$f x -1 1 $w 1", "expected the same atoms and charge on both sides, found H -2, O +1"),
        ("$tmer 01/$f bad/$f x -1 1 $w 1", "species 'bad': expected an odd multiplicity (2S + 1) for its 10 electrons"),
        ("$tmer 01/$f none/$f x -1 1 $w 1", "species 'none': expected struc.xyz or mol.xyz or coord in"),
        ("$tmer {ion,o2}/$f x -1 1 $w", "energy: expected a number, found ''"),
    ],
)
def test_faults_are_named(folder: Path, line: str, message: str) -> None:
    species(folder, "bad", "H2O", unpaired=1)
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read(folder, line + "\n")
    assert str(caught.value).startswith(str(folder / ".res"))

"""Sets of relative energies (`Reaction`s) in files: a YAML or CSV table beside the geometries that it names.

YAML, here with every kind of reference to a geometry:

    unit: kcal/mol                       # eV, meV, kcal/mol, kJ/mol, hartree or rydberg
    structures:                          # optional: short names; or one file, whose frames are then the names
      dimer: geometries/dimer.xyz        # relative to this table; any format that ASE reads
      water: monomers.extxyz#water       # the frame of that name (`key` or `name` in its info)
      methane: monomers.extxyz@3         # the frame of that number, from 0
      anion: {file: f.xyz, charge: -1, multiplicity: 1, group: fluoride}
    allow_unbalanced: false              # optional, also per reaction: for atomisation or absolute energies
    reactions:
      - name: dissociation               # optional: the row's number
        energy: 5.0                      # sum of coefficient x energy: products positive
        unit: kJ/mol                     # optional: instead of the table's
        group: water                     # optional: rows of a group are never on two sides of a split
        structures: {water: 2, dimer: -1}

CSV, with a header, lists separated by `;`, and references to geometries as above (`unit` in every row):

    name,energy,unit,structures,coefficients,group,allow_unbalanced
    dissociation,5.0,kcal/mol,monomer.xyz;dimer.xyz,2;-1,,

A frame without a name is called FILE-000012 after its file's stem and its number. Coefficients may be fractions (1/2).
A species that a row names twice counts with the sum of its coefficients. Charge and multiplicity (2S + 1) come from
the table, else from the frame as in `rung.data.sources.ase_file`; where neither states a multiplicity, it is the
smallest that the number of electrons allows, 1 or 2. A row that gives no group has that of its largest structure, whose
default is its formula. Energies that frames may carry are not read.

A folder with a `.res` file is a set in GMTKN55's layout: see `rung.data.gmtkn55`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from ase import Atoms
from ase.io import write

from rung.data.fidelity import check_name
from rung.data.gmtkn55 import is_gmtkn55, read_gmtkn55
from rung.data.manifest import MANIFEST_FILE
from rung.data.reaction import Reaction, structures_of
from rung.data.reaction_geometry import Geometries, possible_multiplicity
from rung.data.reaction_row import Row, hint, imbalance, reactions_of, unit_factor
from rung.data.shard import write_beside
from rung.data.structure import Structure

YAML_SUFFIXES = (".yaml", ".yml")
TABLE_KEYS = ("unit", "structures", "allow_unbalanced", "reactions")
ROW_KEYS = ("name", "energy", "unit", "group", "structures", "allow_unbalanced")
GEOMETRY_KEYS = ("file", "charge", "multiplicity", "group")
COLUMNS = ("name", "energy", "unit", "structures", "coefficients", "group", "allow_unbalanced")
OPTIONAL_COLUMNS = ("group", "allow_unbalanced")
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_.+()-]*")  # extxyz has no way to write any text


def is_reaction_file(path: str | Path) -> bool:
    """Tell a table of reactions (.yaml, .csv, or GMTKN55's layout) from a dataset and from a file of structures."""
    path = Path(path)
    is_table = path.suffix.lower() in (*YAML_SUFFIXES, ".csv") and path.name != MANIFEST_FILE and not path.is_dir()
    return is_table or is_gmtkn55(path)


def read_reactions(path: str | Path, fidelity: str) -> list[Reaction]:
    """Return the reactions of a table, energies in eV; `fidelity` is the level of theory at which they are.

    Every geometry is read once: reactions share the objects of the structures that they have in common, which carry no
    labels. Raises FileNotFoundError for a missing table, and ValueError naming file and line for a table without
    reactions, a row's name that is there twice, a unit that is unknown or not given, an energy that is not finite, an
    unknown species (with the nearest name), a multiplicity that a species' electrons cannot have, as many coefficients
    as there are not species, a coefficient that is 0, and for atoms or charge that are not balanced where that is not
    allowed.
    """
    check_name(fidelity)
    return _read(Path(path))[0]


def reaction_sources(path: str | Path) -> list[Path]:
    """Return every file that a set of relative energies is read from, sorted: the table and the geometries in use.

    Of a set in GMTKN55's layout, the geometry, `.CHRG` and `.UHF` of each species in use. The set is read to find
    them: raises what `read_reactions` raises.
    """
    return sorted(_read(Path(path))[1])


def _read(path: Path) -> tuple[list[Reaction], set[Path]]:
    """Return the reactions and the files that they were read from."""
    if is_gmtkn55(path):
        return read_gmtkn55(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a table of reactions, .yaml or .csv")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, found other bytes ({error})") from error
    geometries = Geometries(path)
    rows: Iterable[Row]
    if path.suffix.lower() in YAML_SUFFIXES:
        rows = _yaml_rows(path, text, geometries)
    elif path.suffix.lower() == ".csv":
        rows = _csv_rows(path, text)
    else:
        raise ValueError(f"{path}: expected a table of reactions, .yaml or .csv")
    reactions = reactions_of(str(path), rows, geometries.structure)
    return reactions, {path, *geometries.files}


def write_reactions(path: str | Path, reactions: Sequence[Reaction], unit: str = "eV") -> None:
    """Write reactions as PATH (.yaml) and their structures as an extxyz file beside it; `read_reactions` reads both.

    Labels of the structures are not written. Raises ValueError for an unknown unit, another suffix, and for two
    different structures, or two reactions, of one key, and for a multiplicity that a structure's electrons cannot have.
    """
    path = Path(path)
    factor = unit_factor(unit)
    if path.suffix.lower() not in YAML_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in .yaml")
    structures = structures_of(reactions)
    for what, keys in (("structures", [s.key for s in structures]), ("reactions", [r.key for r in reactions])):
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{path}: expected {what} of different keys, found '{twice[0]}' twice")
    for one in structures:
        possible_multiplicity(one.key, one.numbers, one.charge, one.multiplicity)
    frames = path.with_suffix(".extxyz")
    entries = {structure.key: _entry(structure, f"{frames.name}@{i}") for i, structure in enumerate(structures)}
    table = {"unit": unit, "structures": entries, "reactions": [_row(reaction, factor) for reaction in reactions]}
    text = io.StringIO()
    write(text, [_atoms(structure) for structure in structures], format="extxyz")
    write_beside(frames, text.getvalue().encode())
    write_beside(path, yaml.safe_dump(table, sort_keys=False, allow_unicode=True).encode())


def _entry(structure: Structure, file: str) -> dict[str, Any]:
    return {
        "file": file,
        "charge": structure.charge,
        "multiplicity": structure.multiplicity,
        "group": structure.group,
    }


def _row(reaction: Reaction, factor: float) -> dict[str, Any]:
    pairs = zip(reaction.structures, reaction.coefficients, strict=True)
    terms = {structure.key: coefficient for structure, coefficient in pairs}
    row = {"name": reaction.key, "energy": reaction.energy / factor, "group": reaction.group, "structures": terms}
    return row | ({"allow_unbalanced": True} if imbalance(reaction) else {})


def _atoms(structure: Structure) -> Atoms:
    info: dict[str, Any] = {"charge": structure.charge, "multiplicity": structure.multiplicity}
    if _PLAIN.fullmatch(structure.key):  # for people: the table refers to frames by number
        info["name"] = structure.key
    return Atoms(structure.numbers, structure.positions, cell=structure.cell, pbc=structure.pbc, info=info)


# CSV


def _csv_rows(path: Path, text: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    found = [name.strip() for name in reader.fieldnames or ()]
    reader.fieldnames = found
    if missing := [name for name in COLUMNS if name not in found and name not in OPTIONAL_COLUMNS]:
        raise ValueError(
            f"{path}: line 1: expected the columns {', '.join(COLUMNS)} (the last two are optional), found "
            f"{', '.join(found) or 'none'}; missing: {', '.join(missing)}"
        )
    _check_keys(f"{path}: line 1", found, COLUMNS, "column")
    for number, values in enumerate(reader, 1):
        where = f"{path}: line {reader.line_num}"
        if None in values or None in values.values():
            raise ValueError(f"{where}: expected {len(found)} values, as in the header, found more or fewer")
        row = {name: value.strip() for name, value in values.items()}
        species, coefficients = (
            [one.strip() for one in row[name].split(";") if one.strip()] for name in ("structures", "coefficients")
        )
        if len(species) != len(coefficients):
            counts = f"{len(species)} ({'; '.join(species)}) and {len(coefficients)} ({'; '.join(coefficients)})"
            raise ValueError(f"{where}: expected as many coefficients as structures, found {counts}")
        yield Row(
            where,
            row["name"] or str(number),
            row["energy"],
            row["unit"],
            tuple(zip(species, coefficients, strict=True)),
            row.get("group", ""),
            _flag(row.get("allow_unbalanced", ""), where, False),
        )


# YAML, as nodes: these have line numbers, and their numbers are still text, so that a species may be called 01


def _yaml_rows(path: Path, text: str, geometries: Geometries) -> list[Row]:
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if root is None:
        raise ValueError(f"{path}: expected reactions, found an empty file")
    table = _mapping(root, f"{path}", TABLE_KEYS)
    if "reactions" not in table or not isinstance(table["reactions"], yaml.SequenceNode):
        raise ValueError(f"{path}: expected a list under 'reactions', found {', '.join(table) or 'nothing'}")
    unit = _text(table["unit"], str(path)) if "unit" in table else ""
    unbalanced = _flag(_text(table["allow_unbalanced"], str(path)) if "allow_unbalanced" in table else "", str(path))
    if isinstance(structures := table.get("structures"), yaml.MappingNode):
        geometries.names = {name: _geometry(node, str(path)) for name, node in _mapping(structures, str(path)).items()}
    elif structures is not None:
        geometries.frames_file = _text(structures, str(path))
    rows = []
    for number, node in enumerate(table["reactions"].value, 1):
        where = _line(path, node)
        fields = _mapping(node, where, ROW_KEYS)
        values = {name: _text(value, where) for name, value in fields.items() if name != "structures"}
        rows.append(
            Row(
                where,
                values.get("name") or str(number),
                values.get("energy", ""),
                values.get("unit", unit),
                tuple((species, _text(value, where)) for species, value in _pairs(fields.get("structures"), where)),
                values.get("group", ""),
                _flag(values.get("allow_unbalanced", ""), where, unbalanced),
            )
        )
    return rows


def _geometry(node: yaml.Node, where: str) -> dict[str, str]:
    if isinstance(node, yaml.ScalarNode):
        return {"file": _text(node, where)}
    stated = {name: _text(value, where) for name, value in _mapping(node, where, GEOMETRY_KEYS).items()}
    if "file" not in stated:
        raise ValueError(f"{where}: line {node.start_mark.line + 1}: expected a structure's 'file', found none")
    return stated


def _line(path: Path, node: yaml.Node) -> str:
    return f"{path}: line {node.start_mark.line + 1}"


def _pairs(node: yaml.Node | None, where: str) -> list[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where}: structures: expected species with their coefficients, such as {{A: 2, B: -1}}")
    return [(_text(key, where), value) for key, value in node.value]


def _mapping(node: yaml.Node, where: str, known: Sequence[str] = ()) -> dict[str, yaml.Node]:
    """Return a mapping's nodes by key; raise ValueError for a key that is there twice, or that is not known."""
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{where}: expected 'name: value' lines, found {node.value!r:.80}")
    found: dict[str, yaml.Node] = {}
    for name, value in _pairs(node, where):
        if name in found:
            raise ValueError(f"{where}: line {value.start_mark.line + 1}: '{name}' is there twice")
        found[name] = value
    if known:
        _check_keys(where, list(found), known, "key")
    return found


def _check_keys(where: str, found: Sequence[str], known: Sequence[str], what: str) -> None:
    if unknown := [name for name in found if name not in known]:
        raise ValueError(f"{where}: unknown {what} '{unknown[0]}'; known: {', '.join(known)}{hint(unknown[0], known)}")


def _text(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(f"{where}: line {node.start_mark.line + 1}: expected one word or number, found a list or more")
    return str(node.value).strip()


def _flag(text: str, where: str, default: bool = False) -> bool:
    if text.lower() not in ("true", "false", ""):
        raise ValueError(f"{where}: allow_unbalanced: expected true or false, found {text!r}")
    return text.lower() == "true" if text else default

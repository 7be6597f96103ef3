"""Relative energies in GMTKN55's layout: a folder per subset, with a folder per species.

    S66/.res            lines of species and coefficients, written for the shell: `.resRC` is a second set
    S66/01A/struc.xyz   geometry (or `mol.xyz`, or Turbomole's `coord`), angstrom
    S66/01A/.CHRG       charge; without it that of `$eht charge=-1 unpaired=0` in `coord`, else the geometry's, else 0
    S66/01A/.UHF        number of unpaired electrons; without it as for the charge, else the smallest possible

A line of `.res` is `$tmer 01{A,B,}/$f x 1 1 -1 $w 4.92`: species (braces as in the shell), a lone x, one coefficient
each, and the reference energy in kcal/mol; what follows it is not read. Everything that starts with `$tmer` or `tmer2`
must have that form, or is an error; other lines are the shell's, but for `d0=$( $tmer ... )`: a reaction to which those
with `$w $d0 -15.3` are relative (RSE43). Electrons (ionisation potentials, G21IP) or protons (proton affinities, PA26),
whose energies are 0, may be left out of a line, but not both: H atoms are not.

Source: https://github.com/grimme-lab/GMTKN55; L. Goerigk et al., Phys. Chem. Chem. Phys. 19, 32184 (2017).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rung.data.reaction import Reaction
from rung.data.reaction_geometry import Geometries
from rung.data.reaction_row import Row, hint, reactions_of
from rung.data.structure import Structure

RES_FILES = (".res", ".resRC")
GEOMETRIES = ("struc.xyz", "mol.xyz", "coord")
_PROGRAM = re.compile(r"\$tmer\b|\"?\$\{?TMER\b|tmer2|tmer\s")
_ASSIGNMENT = re.compile(r"(\w+)=\$\(\s*\$tmer\s")
_BRACES = re.compile(r"([^{}]*)\{([^{}]*)\}([^{}]*)")
Terms = tuple[tuple[str, str], ...]  # species, coefficient


def is_gmtkn55(path: Path) -> bool:
    """Tell a `.res` file, or a folder with one."""
    return path.name in RES_FILES if not path.is_dir() else (path / RES_FILES[0]).is_file()


def read_gmtkn55(path: Path) -> tuple[list[Reaction], set[Path]]:
    """Return the reactions of a subset's folder (its `.res`), or of the `.res` or `.resRC` file given, and all files.

    Reactions are named FOLDER-007 by their number in the file. The files are those that were read.
    Raises FileNotFoundError, and ValueError naming file and line.
    """
    file = path / RES_FILES[0] if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected reactions in GMTKN55's layout")

    files = {file}

    @cache
    def structure_of(species: str) -> Structure:
        return _species(file.parent, species, files)

    return reactions_of(str(file), _rows(file), structure_of), files


def _rows(file: Path) -> Iterator[Row]:
    number = 0
    name = file.absolute().parent.name + file.name.removeprefix(RES_FILES[0])  # BH76, BH76RC
    origins: dict[str, Terms] = {}
    for line, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        where = f"{file}: line {line}"
        command = text.partition("#")[0].strip()
        if match := _ASSIGNMENT.match(command):
            origins[f"${match[1]}"] = _terms(command[match.end() :].split(), where)[0]
            continue
        words = command.split()
        if not words or not _PROGRAM.match(words[0] + " "):
            continue
        number += 1
        terms, values = _terms(words[1:], where)
        if values and values[0] in origins:
            origin = tuple((species, f"{-int(text)}") for species, text in origins[values[0]])
            terms, values = terms + origin, values[1:]
        energy = values[0] if values else ""
        yield Row(where, f"{name}-{number:03d}", energy, "kcal/mol", terms, allow_bare=True)


def _terms(words: list[str], where: str) -> tuple[Terms, list[str]]:
    """Return species with their coefficients, and what follows the weight."""
    try:
        before, after = words.index("x"), words.index("$w")
    except ValueError:
        expected, found = "SPECIES... x COEFFICIENT... $w ENERGY", " ".join(words)
        raise ValueError(f"{where}: expected '$tmer {expected}', found '{found}'") from None
    species = [one for word in words[:before] for one in _expand(word.removesuffix("/$f"), where)]
    coefficients = words[before + 1 : after]
    if len(species) != len(coefficients):
        found = f"{len(species)} ({', '.join(species)}) and {len(coefficients)}"
        raise ValueError(f"{where}: expected as many coefficients as species, found {found}")
    if unreadable := [text for text in coefficients if not re.fullmatch(r"[+-]?[0-9]+", text)]:
        raise ValueError(f"{where}: expected whole coefficients, found {unreadable[0]!r}")
    return tuple(zip(species, coefficients, strict=True)), words[after + 1 :]


def _expand(word: str, where: str) -> list[str]:
    """Return the names that the shell makes of a word with at most one pair of braces."""
    if "{" not in word and "}" not in word:
        return [word]
    match = _BRACES.fullmatch(word)
    if match is None:
        raise ValueError(f"{where}: expected at most one pair of braces in a species, found {word!r}")
    start, choices, end = match.groups()
    return [start + choice + end for choice in choices.split(",")]


def _species(folder: Path, species: str, files: set[Path]) -> Structure:
    """Return the structure of a species; the files that it is read from are added to `files`."""
    home = folder / species
    if not home.is_dir():
        known = [path.name for path in folder.iterdir() if path.is_dir()]
        raise ValueError(f"unknown species '{species}': no folder {home}{hint(species, known)}")
    file = next((home / name for name in GEOMETRIES if (home / name).is_file()), None)
    if file is None:
        raise ValueError(f"species '{species}': expected {' or '.join(GEOMETRIES)} in {home}, found neither")
    stated = {"file": f"{species}/{file.name}"}
    if (charge := _stated(home, ".CHRG", "charge")) is not None:
        stated["charge"] = str(charge)
    if (unpaired := _stated(home, ".UHF", "unpaired")) is not None:
        stated["multiplicity"] = str(unpaired + 1)
    files.update(path for path in (file, home / ".CHRG", home / ".UHF", home / "coord") if path.is_file())
    return Geometries(folder / RES_FILES[0], {species: stated}).structure(species)


def _stated(home: Path, name: str, word: str) -> int | None:
    """Return the number in a species' file `name`, or after `word` in its `coord`; the two must not differ."""
    found: dict[str, str] = {}
    if (home / name).is_file():
        found[name] = (home / name).read_text(encoding="utf-8").strip()
    if (home / "coord").is_file():
        match = re.search(rf"^\$eht\b.*\b{word}=(\S+)", (home / "coord").read_text(encoding="utf-8"), re.MULTILINE)
        if match:
            found["coord"] = match[1]
    values = {}
    for file, text in found.items():
        try:
            values[file] = int(text)
        except ValueError:
            raise ValueError(f"{home / file}: expected a whole number, found {text!r}") from None
    if len(set(values.values())) > 1:
        raise ValueError(f"{home}: {word} is {values[name]} in {name} and {values['coord']} in coord; correct one")
    return next(iter(values.values()), None)

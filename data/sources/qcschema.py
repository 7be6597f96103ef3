"""QCSchema: results of single calculations as QCEngine and QCArchive write them (AtomicResult, schema version 1)."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rung.data.fidelity import Fidelity, check_name
from rung.data.sources.common import formula
from rung.data.sources.json_stream import JsonStream, open_text
from rung.data.sources.records import array, number, numbers_of, tables, whole_number
from rung.data.sources.source import Part, Source, SourceInfo, existing, whole
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable
from rung.data.units import BOHR, HARTREE, HARTREE_BOHR

logger = logging.getLogger(__name__)

_KEYS = ("molecule", "driver", "model", "return_result")
_DRIVERS = ("energy", "gradient", "hessian", "properties")
_IDENTIFIERS = ("inchikey", "canonical_isomeric_smiles", "canonical_smiles", "smiles")


@dataclass(frozen=True)
class QCSchema(Source):
    """Results of the chosen `models`, written "method/basis" (or "method"), such as "B3LYP-D3BJ/def2-SVP".

    Fidelities are named after their model ("b3lypd3bj_def2svp") unless `fidelity` names the only one. `QCSchema.found`
    takes all models that files hold. Results of other models and failed ones are left out and counted in a warning.
    """

    models: tuple[str, ...] = ()
    fidelity: str = ""

    info: ClassVar[SourceInfo] = SourceInfo(
        name="qcschema",
        title="QCSchema results (QCEngine, QCArchive)",
        files="*.json, *.jsonl (or .gz): one result, a list of results, or one result a line",
        layout=(
            "AtomicResult, version 1: molecule {symbols, geometry in bohr, molecular_charge, molecular_multiplicity}, "
            "driver, model {method, basis}, return_result and properties in hartree and bohr; other properties are not "
            "read"
        ),
        url="https://github.com/MolSSI/QCSchema",
    )

    def __post_init__(self) -> None:
        if self.fidelity and len(self.models) != 1:
            raise ValueError(f"fidelity '{self.fidelity}': expected one model that it names, found {self.models}")
        if len(self._names()) != len({model.lower() for model in self.models}):
            raise ValueError(f"models: {', '.join(self.models)}: two have the same name as fidelities; choose one")

    @staticmethod
    def found(paths: Sequence[Path]) -> QCSchema:
        """Return a source of all models in these files; it reads them once."""
        found = {_model(record): None for path in existing(paths, QCSchema.info) for _, record in _results(path)}
        return QCSchema(models=tuple(sorted({model.lower(): model for model in found}.values())))

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        if not self.models:
            raise ValueError("qcschema: expected models such as 'B3LYP-D3BJ/def2-SVP', found none; or use those found")
        parts = {name: model.partition("/") for name, model in self._names().items()}
        return {name: Fidelity(name, method, basis) for name, (method, _, basis) in parts.items()}

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return one part per file."""
        for path in existing(paths, self.info):
            with open_text(path) as file:
                _first(JsonStream(file, path))
        return [whole(path) for path in paths]

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the results of a file; keys are the file's name and the place in it, groups the molecule's identifier.

        Without an InChIKey or SMILES the group is the formula.
        """
        yield from tables(self._structures(part.path))

    def _names(self) -> dict[str, str]:
        return {self.fidelity or fidelity_name(model): model for model in self.models}

    def _structures(self, path: Path) -> Iterator[Structure]:
        names = {model.lower(): name for name, model in self._names().items()}
        stem = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")
        others: dict[str, int] = {}
        for index, record in _results(path):
            if (model := _model(record)).lower() not in names:
                others[model] = others.get(model, 0) + 1
                continue
            try:
                yield _structure(f"{stem}-{index:06d}", names[model.lower()], record)
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise ValueError(f"{path}: result {index}: {error}") from error
        if others:
            counts = ", ".join(f"{model} ({count})" for model, count in sorted(others.items()))
            logger.warning("%s: results of other models are left out: %s", path, counts)


def fidelity_name(model: str) -> str:
    """Return the name of the fidelity of "method/basis"; "CCSD(T)/6-31G*" is "ccsdt_631gd", "GFN2-xTB" "gfn2_xtb".

    Raises ValueError for a model of other letters than ASCII's and omega.
    """
    method, _, basis = model.lower().replace("ω", "w").partition("/")
    if xtb := re.fullmatch(r"gfn(\w+?)-?xtb", method):
        method = f"gfn{xtb[1]} xtb"
    basis = basis.replace("**", "dp").replace("*", "d")
    words = [re.sub(r"[-()\[\],./']", "", word.replace("+", "p")) for word in (*method.split(), *basis.split())]
    name = "_".join(word for word in words if word)
    check_name(name)
    return name


def _first(stream: JsonStream) -> str:
    first = stream.peek()
    if first not in ("{", "["):
        raise stream.error(f"expected a result or a list of results, found {first or 'nothing'!r}")
    return first


def _results(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the place and the record of each result that succeeded; warn of how many failed."""
    failed = 0
    with open_text(path) as file:
        for index, record in enumerate(_records(JsonStream(file, path))):
            if isinstance(record, dict) and record.get("success") is False:
                failed += 1
                continue
            if not isinstance(record, dict) or any(key not in record for key in _KEYS):
                found = ", ".join(sorted(record)) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path}: result {index}: expected {', '.join(_KEYS)}, found {found}")
            yield index, record
    if failed:
        logger.warning("%s: %d failed calculations are left out", path, failed)


def _records(stream: JsonStream) -> Iterator[Any]:
    if _first(stream) == "[":
        yield from stream.elements()
    else:
        while stream.peek() == "{":
            yield stream.value()
    if rest := stream.peek():
        raise stream.error(f"expected the end of the file, found {rest!r}")


def _model(record: Mapping[str, Any]) -> str:
    model = record["model"]
    if not isinstance(model, dict) or not isinstance(model.get("method"), str):
        raise ValueError(f"model: expected an object with method and basis, found {model!r}")
    basis = model.get("basis") or ""
    if isinstance(basis, dict):  # a basis set written out: its name
        basis = basis.get("name", "")
    return f"{model['method']}/{basis}" if basis else str(model["method"])


def _structure(key: str, fidelity: str, record: Mapping[str, Any]) -> Structure:
    molecule = record["molecule"]
    if missing := [name for name in ("symbols", "geometry") if name not in molecule]:
        raise ValueError(f"molecule: expected {' and '.join(missing)}, found {', '.join(sorted(molecule))}")
    if not all(molecule.get("real") or [True]):
        raise ValueError("molecule: expected atoms that are all real, found ghost atoms")
    numbers = numbers_of(molecule["symbols"])
    positions = _per_atom(molecule["geometry"], len(numbers), "molecule.geometry") * BOHR
    identifiers = molecule.get("identifiers") or {}
    group = next((identifiers[name] for name in _IDENTIFIERS if identifiers.get(name)), None)
    return Structure(
        key=key,
        group=str(group or formula(numbers)),
        numbers=numbers,
        positions=positions.astype(np.float32),
        charge=whole_number(molecule.get("molecular_charge", 0), "molecule.molecular_charge"),
        multiplicity=whole_number(molecule.get("molecular_multiplicity", 1), "molecule.molecular_multiplicity"),
        labels={fidelity: _labels(record, len(numbers))},
    )


def _labels(record: Mapping[str, Any], num_atoms: int) -> Labels:
    driver, properties = record["driver"], record.get("properties") or {}
    if driver not in _DRIVERS:
        raise ValueError(f"driver: expected one of {', '.join(_DRIVERS)}, found {driver!r}")
    energy = record["return_result"] if driver == "energy" else properties.get("return_energy")
    gradient = record["return_result"] if driver == "gradient" else properties.get("return_gradient")
    value = number(energy, "energy")
    return Labels(
        energy=None if value is None else value * HARTREE,
        forces=None if gradient is None else _forces(gradient, num_atoms),
    )


def _forces(gradient: Any, num_atoms: int) -> Any:
    return (_per_atom(gradient, num_atoms, "gradient") * -HARTREE_BOHR).astype(np.float32)


def _per_atom(value: Any, num_atoms: int, name: str) -> Any:
    """Return [n, 3] of 3 n numbers, flat or not."""
    flat = isinstance(value, list) and value and not isinstance(value[0], list)
    return array(value, (3 * num_atoms,) if flat else (num_atoms, 3), name, np.float64).reshape(num_atoms, 3)

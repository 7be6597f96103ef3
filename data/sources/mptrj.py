"""MPtrj: relaxation trajectories of the Materials Project, PBE and PBE+U, from JSON or the zip of extxyz files."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rung.data.fidelity import Fidelity
from rung.data.sources.archive import read_texts, text_parts
from rung.data.sources.json_stream import JsonStream, open_text
from rung.data.sources.records import array, calculated, crystal, geometry, number, tables
from rung.data.sources.source import Part, Source, SourceInfo, existing, whole
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable
from rung.data.units import KBAR

PART_BYTES = 360_000_000  # of the JSON: about 50,000 of its 1,580,395 frames
_FRAMES = 11  # of a material, about
_PBE_U = Fidelity(
    "pbe_u", "PBE / PBE+U", code="VASP", description="Materials Project settings (MPRelaxSet), U for some oxides"
)
_MATERIAL_ID = re.compile(r"[A-Za-z]+-\d+")
_FRAME_ID = re.compile(r"[A-Za-z]+-\d+-\d+-\d+")
# A material begins where its key is followed by that of its first frame: a reader can start anywhere in the file.
_MATERIAL = re.compile(rf'"{_MATERIAL_ID.pattern}"\s{{0,99}}:\s{{0,99}}\{{\s{{0,99}}"{_FRAME_ID.pattern}"\s{{0,9}}:')


@dataclass(frozen=True)
class MPtrj(Source):
    """Frames grouped by material; `corrected` takes energies with the MP2020 corrections instead of VASP's."""

    corrected: bool = False

    info: ClassVar[SourceInfo] = SourceInfo(
        name="mptrj",
        title="MPtrj (Materials Project trajectories, 2022.9)",
        files="MPtrj_2022.9_full.json (or .json.gz), or the zip of one extxyz file per material",
        layout=(
            "{material: {frame: {structure (pymatgen), uncorrected_total_energy and corrected_total_energy in eV, "
            "force in eV/A, stress in kbar with VASP's sign}}}; the extxyz files hold the same with energy, forces and "
            "stress in eV and A (ASE's sign); magnetic moments and band gaps are not read"
        ),
        url="https://figshare.com/articles/dataset/23713842",
        doi="10.1038/s42256-023-00716-3",
        citation="B. Deng et al., Nat. Mach. Intell. 5, 1031 (2023)",
        fidelities=(_PBE_U,),
        structures=1_580_395,
        size="11.3 GB (JSON), 1.6 GB (zip of extxyz)",
    )

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        """Return byte ranges of JSON files and ranges of the files in a zip."""
        return [part for path in existing(paths, self.info) for part in _parts(path)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        """Yield the frames of the materials that begin in the part."""
        if part.path.suffix == ".zip":
            yield from tables(_zipped(part, self.corrected))
            return
        with open_text(part.path, "latin-1", part.start) as file:  # one byte a character: positions are bytes
            yield from tables(_frames(JsonStream(file, part.path, part.start), part, self.corrected))


def _parts(path: Path) -> list[Part]:
    size = path.stat().st_size
    if path.suffix == ".zip":
        return text_parts(path, ".extxyz", _FRAMES)
    if path.suffix == ".gz":
        return [whole(path)]
    with open_text(path) as file:
        JsonStream(file, path).take("{")
    return [Part(path, s, min(s + PART_BYTES, size), min(PART_BYTES, size - s)) for s in range(0, size, PART_BYTES)]


def _frames(stream: JsonStream, part: Part, corrected: bool) -> Iterator[Structure]:
    for material in _materials(stream, part):
        for frame in stream.members():
            if not _FRAME_ID.fullmatch(frame):
                raise stream.error(f"material {material}: expected a frame such as 'mp-123-0-5', found '{frame}'")
            record = stream.value()
            try:
                structure = _structure(material, frame, record, corrected)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{part.path}: frame {frame}: {error}") from error
            yield structure


def _materials(stream: JsonStream, part: Part) -> Iterator[str]:
    """Yield each material that begins in the part, the cursor at its frames."""
    if part.start == 0:
        stream.take("{")
    elif not stream.search(_MATERIAL):
        return
    while stream.peek() != "}":
        begin = stream.position
        material = stream.key()
        if not _MATERIAL_ID.fullmatch(material):
            raise stream.error(f"expected a material such as 'mp-123', found '{material}'")
        if 0 <= part.stop <= begin:
            _check_first_frame(stream)
            return
        yield material
        if stream.take(",", "}") == "}":
            return


def _check_first_frame(stream: JsonStream) -> None:
    """Raise ValueError unless the next part finds the material at the cursor by its first frame."""
    stream.take("{")
    if stream.peek() != "}" and not _FRAME_ID.fullmatch(frame := stream.key()):
        raise stream.error(f"expected a frame such as 'mp-123-0-5', found '{frame}'")


def _structure(material: str, frame: str, record: Mapping[str, Any], corrected: bool) -> Structure:
    energy_key = "corrected_total_energy" if corrected else "uncorrected_total_energy"
    for key in ("structure", energy_key):
        if key not in record:
            raise ValueError(f"expected '{key}', found {', '.join(record)}")
    atoms = crystal(record["structure"])
    forces, stress = record.get("force"), record.get("stress")
    labels = Labels(
        energy=number(record[energy_key], energy_key),
        forces=None if forces is None else array(forces, (len(atoms["numbers"]), 3), "force"),
        stress=None if stress is None else array(stress, (3, 3), "stress") * np.float32(-KBAR),
    )
    return Structure(key=f"{material}/{frame}", group=material, labels={_PBE_U.name: labels}, **atoms)


def _zipped(part: Part, corrected: bool) -> Iterator[Structure]:
    from ase.io import iread

    for material, text in read_texts(part, ".extxyz"):
        try:
            for atoms in iread(io.StringIO(text), index=":", format="extxyz"):
                yield _extxyz_structure(material, atoms, corrected)
        except Exception as error:  # ASE's reader raises anything: KeyError, IndexError, XYZError, ...
            message = f"{part.path}: {material}.extxyz: expected frames in extxyz with task_id, calc_id and ionic_step"
            raise ValueError(f"{message} ({type(error).__name__}: {error})") from error


def _extxyz_structure(material: str, atoms: Any, corrected: bool) -> Structure:
    info = atoms.info
    labels = calculated(atoms)
    if corrected:
        labels = dataclasses.replace(labels, energy=number(info["corrected_total_energy"], "corrected_total_energy"))
    return Structure(
        key=f"{material}/{info['task_id']}-{info['calc_id']}-{info['ionic_step']}",
        group=material,
        labels={_PBE_U.name: labels},
        **geometry(atoms),
    )

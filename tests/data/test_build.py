"""Builds of many parts: stopped anywhere and begun again, bad structures, reference energies, statistics, memory."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from rung.data.build import WORK_FOLDER, BuildConfig, build, build_dataset
from rung.data.fidelity import Fidelity
from rung.data.manifest import Manifest
from rung.data.read import read_any
from rung.data.sources.source import Part, Source, SourceInfo
from rung.data.split import SPLITS, SplitFractions
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable
from rung.data.verify import verify

E0 = {1: -13.6, 6: -1029.0, 8: -2041.0}
LEVELS = {name: Fidelity(name, name.upper()) for name in ("pbe", "ccsdt")}
NAN = float("nan")
Change = Callable[[StructureTable], StructureTable]


@dataclass(frozen=True, repr=False)
class Made(Source):
    """Parts that are made when they are read: clusters in groups of three, every third with a CCSD(T) energy."""

    info: ClassVar[SourceInfo] = SourceInfo("made", "clusters", "none", "none")

    num_parts: int = 3
    size: int = 24
    change: Change = lambda table: table  # what is done to the table of a part
    reading: Callable[[int], Any] = lambda part: None  # called with the number of a part before it is read

    def __repr__(self) -> str:
        return f"Made({self.num_parts}, {self.size})"  # the same in every process

    @property
    def fidelities(self) -> Mapping[str, Fidelity]:
        return LEVELS

    def parts(self, paths: Sequence[Path]) -> list[Part]:
        return [Part(Path("made"), index, index + 1) for index in range(self.num_parts)]

    def read(self, part: Part) -> Iterator[StructureTable]:
        self.reading(part.start)
        table = self.change(make_table(part.start, self.size))
        half = len(table) // 2
        yield table.part(0, half)
        yield table.part(half, len(table))


def make_table(part: int, size: int) -> StructureTable:
    rng = np.random.default_rng(part)
    num_atoms = rng.integers(2, 7, size)
    N = int(num_atoms.sum())
    numbers = rng.choice(list(E0), N)
    energy = np.add.reduceat(np.vectorize(E0.get)(numbers), np.cumsum(num_atoms) - num_atoms)
    energy = energy + 0.1 * num_atoms * rng.normal(size=size)
    return StructureTable.make(
        [f"p{part}-{i:05d}" for i in range(size)],
        [f"p{part}-group{i // 3}" for i in range(size)],
        num_atoms,
        numbers,
        rng.normal(size=(N, 3)) * 3,
        labels={
            "energy.pbe": energy,
            "forces.pbe": rng.normal(size=(N, 3)),
            "energy.ccsdt": np.where(np.arange(size) % 3 == 0, energy - 0.5 * num_atoms, NAN),
        },
    )


CONFIG = BuildConfig("clusters", SplitFractions(0.6, 0.2, 0.2), pack_atoms=60, shard_bytes=2500)


def make(folder: Path, source: Source | None = None, **options: Any) -> Manifest:
    return build(source or Made(), [], folder, replace(CONFIG, **options))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != WORK_FOLDER}


def pieces(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what tells whether a finished spill or shard was written again."""
    paths = [*(folder / WORK_FOLDER).glob("*.safetensors"), *(folder / WORK_FOLDER).glob("*.tar")]
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed build writes."""
    folder = tmp_path_factory.mktemp("whole")
    manifest = make(folder)
    assert len(manifest.shards) >= 5 and manifest.splits == SPLITS and verify(folder) == []
    assert not (folder / WORK_FOLDER).exists()
    return contents(folder)


def killed(run: Callable[[], Any], at: Callable[[str, Path], bool], nth: int = 0) -> bool:
    """Run in a child that is killed right before the nth change of a file for which `at` holds; return whether it was.

    Changes are those that a folder sees: "os.rename", "os.remove" and "os.rmdir", with the path that they lead to.
    """
    child = os.fork()
    if child == 0:
        left = nth

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("os.rename", "os.remove", "os.rmdir"):
                path = Path(os.fsdecode(arguments[event == "os.rename"]))
                if at(event, path):
                    left -= 1
                    if left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(hook)
            run()
            status = 0
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return bool(os.waitstatus_to_exitcode(status))


def anywhere(event: str, path: Path) -> bool:
    return True


def moving(event: str, path: Path) -> bool:
    """Whether a shard is moved into the dataset's folder."""
    return event == "os.rename" and path.suffix == ".tar" and path.parent.name != WORK_FOLDER


class TestStoppedBuild:
    @pytest.mark.slow
    def test_goes_on_from_wherever_it_was_stopped(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        nth, finished = 0, 0
        while killed(lambda: make(tmp_path / str(nth)), anywhere, nth):  # noqa: B023
            folder = tmp_path / str(nth)
            if (folder / "dataset.yaml").is_file():  # stopped while the work was tidied away
                assert contents(folder) == whole
                finished += 1
            else:
                make(folder)
                assert contents(folder) == whole and not (folder / WORK_FOLDER).exists()
            nth += 1
        assert nth > 30 and finished > 0

    @pytest.mark.slow
    def test_goes_on_with_replacing_a_dataset(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        nth = 0
        folder = tmp_path / "0"
        make(folder, name="former", shard_bytes=1500)
        former = contents(folder)
        assert set(former) > set(whole)
        while killed(lambda: make(folder, overwrite=True), lambda event, path: path.parent == folder, nth):  # noqa: B023
            assert contents(folder).keys() >= whole.keys() - {"dataset.yaml"}
            make(folder, overwrite=True)
            assert contents(folder) == whole and not (folder / WORK_FOLDER).exists()
            nth += 1
            folder = tmp_path / str(nth)
            folder.mkdir()
            for name, data in former.items():
                (folder / name).write_bytes(data)
        assert nth >= len(former)

    def test_finishes_with_overwrite_what_was_stopped_after_its_end(
        self, tmp_path: Path, whole: dict[str, bytes]
    ) -> None:
        assert killed(lambda: make(tmp_path), lambda event, path: event == "os.remove" and path.suffix == ".sample")
        assert contents(tmp_path) == whole
        with pytest.raises(FileExistsError, match="already holds a dataset"):
            make(tmp_path)
        make(tmp_path, overwrite=True)
        assert contents(tmp_path) == whole and not (tmp_path / WORK_FOLDER).exists()

    @pytest.mark.parametrize(
        ("first", "count"), [("part-000002.safetensors", 2), ("train-000002.tar", 5), ("train-000001.json", 5)]
    )
    def test_makes_no_finished_piece_again(self, tmp_path: Path, first: str, count: int) -> None:
        assert killed(lambda: make(tmp_path), lambda event, path: path.name == first)
        done = pieces(tmp_path)
        assert len(done) == count
        if first == "train-000001.json":  # this shard lies there, but its record does not
            del done["train-000001.tar"]
        assert killed(lambda: make(tmp_path), moving)
        assert {name: pieces(tmp_path)[name] for name in done} == done and len(pieces(tmp_path)) > count

    def test_makes_damaged_pieces_again(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert killed(lambda: make(tmp_path), moving)
        for name in ("part-000001.safetensors", "part-000002.sample", "train-000001.tar"):
            path = tmp_path / WORK_FOLDER / name
            data = bytearray(path.read_bytes())
            data[-5] ^= 1
            path.write_bytes(data)
            path.with_name(f".{name}.partial").write_bytes(data[:100])
        damaged = {"part-000000": "", "train-000000": "{", "val-000000": "[]", "test-000000": "{}"}
        for name, text in damaged.items():
            (tmp_path / WORK_FOLDER / f"{name}.json").write_text(text)
        make(tmp_path)
        assert contents(tmp_path) == whole

    def test_a_shard_that_was_moved_and_then_damaged_is_made_again(
        self, tmp_path: Path, whole: dict[str, bytes]
    ) -> None:
        assert killed(lambda: make(tmp_path), moving, 3)
        (tmp_path / "train-000000.tar").write_bytes(b"")
        make(tmp_path)
        assert contents(tmp_path) == whole

    def test_is_not_mixed_with_another(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert killed(lambda: make(tmp_path, split=SplitFractions(1, 0, 0)), moving)
        with pytest.raises(FileExistsError, match=r"unfinished build of other files or options \(other split\)"):
            make(tmp_path)
        with pytest.raises(FileExistsError, match=r"\(other source, split, parts\); .* discard it with --overwrite"):
            make(tmp_path, Made(2))
        make(tmp_path, overwrite=True)
        assert contents(tmp_path) == whole

    def test_keeps_its_spills_when_only_the_shards_are_to_be_others(
        self, tmp_path: Path, whole: dict[str, bytes]
    ) -> None:
        """Whoever corrects a limit, an E0 or a text after an error does not read everything again."""

        def spoil(table: StructureTable) -> StructureTable:
            table.positions[0, 0] = NAN
            return table

        with pytest.raises(ValueError, match="max_bad is 2"):
            make(tmp_path / "bad", Made(change=spoil), max_bad=2)
        again = Made(change=spoil, reading=lambda part: pytest.fail("it was read before") if part < 2 else None)
        assert make(tmp_path / "bad", again, max_bad=3).rejected == {"positions": 3}
        assert killed(lambda: make(tmp_path / "good", name="other", shard_bytes=10**6), moving)
        make(tmp_path / "good", Made(reading=lambda part: pytest.fail("it was read before")))
        assert contents(tmp_path / "good") == whole

    def test_without_its_description_counts_for_nothing(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert killed(lambda: make(tmp_path, Made(size=12)), moving)
        (tmp_path / WORK_FOLDER / "job.json").unlink()  # as a deletion that was stopped leaves it
        make(tmp_path)
        assert contents(tmp_path) == whole

    def test_is_not_discarded_by_structures_in_memory(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert killed(lambda: make(tmp_path), moving)
        with pytest.raises(FileExistsError, match="unfinished build of other files"):
            build_dataset([], tmp_path, name="clusters", fidelities=LEVELS)
        make(tmp_path, Made(reading=lambda part: pytest.fail("it was read before")))
        assert contents(tmp_path) == whole

    def test_that_failed_goes_on_where_it_failed(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        read: list[int] = []
        failing = iter([False, True])

        def reading(part: int) -> None:
            if next(failing, False):
                raise OSError("no space left")
            read.append(part)

        with pytest.raises(OSError, match="no space left"):
            make(tmp_path, Made(reading=reading))
        make(tmp_path, Made(reading=reading))
        assert contents(tmp_path) == whole and read == [0, 1, 2]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_has_one_build_at_a_time(tmp_path: Path, whole: dict[str, bytes], overwrite: bool) -> None:
    def second(part: int) -> None:
        with pytest.raises(FileExistsError, match="another build is writing there; wait for it or choose another"):
            make(tmp_path, name="second", overwrite=overwrite)
        with pytest.raises(FileExistsError, match="another build is writing there"):
            build_dataset([], tmp_path, name="second", fidelities=LEVELS)

    make(tmp_path, Made(reading=second))
    assert contents(tmp_path) == whole


def test_bytes_do_not_depend_on_the_parts(tmp_path: Path) -> None:
    """But for two estimates: of E0s, here given, from a sample of each part, and of how many shards are wanted."""
    options: dict[str, Any] = {"e0": {name: E0 for name in LEVELS}, "shard_bytes": 10**6}
    make(tmp_path / "a", **options)
    structures = [structure for part in range(3) for structure in make_table(part, 24)]
    known = {"name": "clusters", "split": CONFIG.split, "pack_atoms": CONFIG.pack_atoms}
    build_dataset(structures, tmp_path / "b", fidelities=LEVELS, **known, **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_part_of_any_size_is_spilled_in_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that cannot be entered in the middle is one part, whatever its size."""
    options: dict[str, Any] = {"e0": {name: E0 for name in LEVELS}, "shard_bytes": 10**6}
    make(tmp_path / "a", **options)
    monkeypatch.setattr("rung.data.build.PART_STRUCTURES", 12)  # a table of the source
    assert killed(lambda: make(tmp_path / "b", **options), moving)
    work = tmp_path / "b" / WORK_FOLDER
    assert len(list(work.glob("part-*.safetensors"))) == 6 and len(list(work.glob("part-*.json"))) == 3
    make(tmp_path / "b", **options)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


class TestBadStructures:
    """Parts 0 and 2 of three have bad ones: forces, energies, and positions that cannot be right."""

    @staticmethod
    def spoil(table: StructureTable) -> StructureTable:
        if table.keys[0].startswith("p1"):
            return table
        first = table.offsets
        table.labels["forces.pbe"][first[4]] = 1000
        table.labels["energy.pbe"][5] = np.inf
        table.positions[first[6] + 1, 2] = NAN
        table.labels["forces.pbe"][first[20], 0] = NAN
        return table

    def test_are_left_out_and_counted(self, tmp_path: Path) -> None:
        manifest = make(tmp_path, Made(change=self.spoil), max_bad=8)
        assert manifest.rejected == {"energy.pbe": 2, "forces.pbe": 4, "positions": 2}
        bad = {f"p{part}-{i:05d}" for part in (0, 2) for i in (4, 5, 6, 20)}
        expected = {f"p{part}-{i:05d}" for part in range(3) for i in range(24)} - bad
        assert {s.key for s in read_any(tmp_path)} == expected and verify(tmp_path) == []

    def test_are_named_when_there_are_too_many(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError) as caught:
            make(tmp_path, Made(change=self.spoil), max_bad=7)
        message = str(caught.value)
        assert "Found 8 such structure(s), max_bad is 7; correct them, or raise max_bad" in message
        for part in (0, 2):
            assert f"structure 'p{part}-00004': forces.pbe: expected |F| <= 300 eV/angstrom, found 1000;" in message
            assert f"structure 'p{part}-00020': forces.pbe: expected finite values, found 1 " in message
        make(tmp_path, Made(change=self.spoil), max_bad=8, overwrite=True)

    def test_refuse_the_first_by_default(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"Found 4 such structure\(s\), max_bad is 0"):
            make(tmp_path, Made(change=self.spoil))

    def test_a_part_may_have_nothing_else(self, tmp_path: Path) -> None:
        def spoil(table: StructureTable) -> StructureTable:
            good = not table.keys[0].startswith("p1")
            return table if good else replace(table, multiplicity=np.zeros(len(table), np.uint8))

        manifest = make(tmp_path, Made(change=spoil), max_bad=24)
        assert manifest.rejected == {"multiplicity": 24} and len(read_any(tmp_path)) == 48

    def test_a_part_may_be_empty(self, tmp_path: Path) -> None:
        make(tmp_path, Made(change=lambda table: table.part(0, 0 if table.keys[0].startswith("p1") else 24)))
        assert len(read_any(tmp_path)) == 48
        with pytest.raises(ValueError, match="expected at least one structure, found none"):
            make(tmp_path / "none", Made(change=lambda table: table.part(0, 0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.renamed("pbe", "pbe0"), "unknown fidelity 'pbe0'; known: pbe, ccsdt; did you mean 'pbe'?"),
        (lambda table: replace(table, labels={}), "fidelity 'pbe': no structure has a label at it"),
        (lambda table: table.at("pbe"), "fidelity 'ccsdt': no structure has a label at it"),
        (lambda table: make_table(0, 24), "build: key 'p0-000"),  # in every part
        (lambda table: table.take(np.array([0, 1, 1])), "build: key 'p0-00001' names two structures"),
    ],
)
def test_refuses(tmp_path: Path, change: Change, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(tmp_path, Made(change=change))


def test_a_descriptor_under_another_name_is_refused(tmp_path: Path) -> None:
    structures = [Structure("a", "a", np.array([1], np.uint8), np.zeros((1, 3), np.float32))]
    with pytest.raises(ValueError, match="fidelity 'pbe' is described under another name, 'mp2'"):
        build_dataset(structures, tmp_path, name="a", fidelities={"pbe": Fidelity("mp2", "MP2")})


def test_groups_and_keys_may_be_any_text(tmp_path: Path) -> None:
    table = make_table(0, 24)
    keys = [f"schlüssel {i}: expected, found 'x'\n" for i in range(24)]
    structures = [replace(s, key=key, group="") for s, key in zip(table, keys, strict=True)]
    build_dataset(structures, tmp_path, name="a", fidelities=LEVELS)
    assert {s.key for s in read_any(tmp_path)} == set(keys) and verify(tmp_path) == []


class TestReferenceEnergies:
    """A thousand structures in four parts: E0 by least squares without what cannot be right."""

    @staticmethod
    def make(folder: Path, change: Change = lambda table: table, **options: Any) -> Manifest:
        return make(folder, Made(4, 250, change), **{"pack_atoms": 10_000, "shard_bytes": 10**6, **options})

    def test_are_not_bent_by_wrong_energies(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        def spoil(table: StructureTable) -> StructureTable:
            table.labels["energy.pbe"][::50] += 8.0 * table.num_atoms[::50]  # of 20 structures: within the limit
            return table

        with caplog.at_level(logging.WARNING, "rung.data.build"):
            bent = self.make(tmp_path / "bent", spoil, split=SplitFractions(1, 0, 0))
        right = self.make(tmp_path / "right", split=SplitFractions(1, 0, 0))
        assert bent.entry("pbe").e0 == pytest.approx(right.entry("pbe").e0, abs=0.02)
        assert right.entry("pbe").e0 == pytest.approx(E0, abs=0.05)
        [message] = [record.getMessage() for record in caplog.records if "energy.pbe" in record.getMessage()]
        assert message.startswith("energy.pbe: 20 outliers (robust z-score over 10): 'p")
        assert len(re.findall(r"'p\d-00(\d[05]0)' by \+[78]\.\d+ eV/atom", message)) == 20

    def test_name_the_energies_beyond_the_limit_among_milder_ones(self, tmp_path: Path) -> None:
        def spoil(table: StructureTable) -> StructureTable:
            table.labels["energy.pbe"][::9] += 8.0 * table.num_atoms[::9]
            if table.keys[0].startswith("p3"):
                table.labels["energy.pbe"][77] -= 30.0 * table.num_atoms[77]
            return table

        with pytest.raises(ValueError, match=r"energy.pbe: .* found 1 beyond: 'p3-00077' by -[23]\d\.\d+ eV/atom; are"):
            self.make(tmp_path, spoil, shard_bytes=20_000)

    @staticmethod
    def rare(table: StructureTable) -> StructureTable:
        """Put one fluorine in place of the first atom of structure 123 of part 2, and one sulphur in group test."""
        if table.keys[0].startswith("p2"):
            for index, element, e0 in ((123, 9, -2700.0), (6, 16, -10800.0)):
                atom = table.offsets[index]
                for name in ("energy.pbe", "energy.ccsdt"):
                    table.labels[name][index] += e0 - E0[int(table.numbers[atom])]
                table.numbers[atom] = element
        return table

    def test_of_rare_elements(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rung.data.build.SAMPLE", 100)
        split: Callable[[str], str] = lambda group: "test" if group == "p2-group2" else "train"  # noqa: E731
        manifest = self.make(tmp_path, self.rare, split=split)
        entry = manifest.entry("pbe")
        assert manifest.elements[9] == manifest.elements[16] == 1
        assert list(entry.e0) == [1, 6, 8, 9]  # sulphur is in no structure that is trained on
        assert entry.e0[9] == pytest.approx(-2700, abs=1) and entry.e0[6] == pytest.approx(-1029, abs=0.2)
        assert entry.num_energies == {"train": 997, "test": 3}

    def test_of_a_sample_are_near_those_of_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        entire = self.make(tmp_path / "all")
        monkeypatch.setattr("rung.data.build.SAMPLE", 400)
        sampled = self.make(tmp_path / "sample")
        for name in LEVELS:
            assert sampled.entry(name).e0 == pytest.approx(entire.entry(name).e0, abs=0.05)
            assert sampled.entry(name).e0_residual == pytest.approx(entire.entry(name).e0_residual, abs=2e-3)
        assert sampled.entry("pbe").e0 != entire.entry("pbe").e0

    def test_given_ones_may_name_more_elements(self, tmp_path: Path) -> None:
        known = {**E0, 2: -79.0}
        manifest = self.make(tmp_path, e0={"pbe": known})
        assert manifest.entry("pbe").e0 == dict(sorted(known.items()))
        assert manifest.entry("pbe").e0_source == "isolated_atoms"
        assert manifest.entry("ccsdt").e0_source == "least_squares"


def test_statistics_of_many_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    known = {"pbe": E0, "ccsdt": E0}
    source = Made(5, 60, change=lambda t: t.part(0, 40) if t.keys[0].startswith("p3") else t)
    manifest = make(tmp_path, source, e0=known)
    structures = read_any(tmp_path)
    assert manifest.elements == Counter(int(z) for s in structures for z in s.numbers)
    assert sum(shard.structures for shard in manifest.shards) == len(structures) == 280
    for name in LEVELS:
        entry, train = manifest.entry(name), [s.labels[name] for s in read_any(tmp_path, name, "train")]
        residual = np.array([residual_of(s, name) for s in read_any(tmp_path, name, "train")])
        assert entry.num_energies["train"] == len(residual)
        assert entry.energy_mean == pytest.approx(residual.mean(), rel=1e-9, abs=1e-9)
        assert entry.energy_std == pytest.approx(residual.std(), rel=1e-9, abs=1e-9)
        assert entry.e0_residual == pytest.approx(np.sqrt((residual**2).mean()), rel=1e-9, abs=1e-9)
        forces = [labels.forces.astype(np.float64) for labels in train if labels.forces is not None]
        assert entry.num_forces["train"] == len(forces) == (0 if name == "ccsdt" else len(train))
        if forces:
            components = np.concatenate(forces).ravel()
            assert entry.force_rms == pytest.approx(np.sqrt((components**2).mean()), rel=1e-9, abs=1e-9)
            assert entry.force_max == pytest.approx(np.abs(components).max(), rel=1e-9)


def residual_of(structure: Structure, fidelity: str) -> float:
    energy = structure.labels[fidelity].energy
    assert energy is not None
    return (energy - sum(E0[z] for z in structure.numbers.tolist())) / structure.num_atoms


def test_unlabelled_structures_keep_their_place(tmp_path: Path) -> None:
    """A split and a shard may hold structures without any label."""
    bare = [replace(s, key=f"bare-{s.key}", group="bare", labels={}) for s in make_table(0, 12)]
    build_dataset(
        [*make_table(0, 24), *bare],
        tmp_path,
        name="a",
        fidelities={"pbe": LEVELS["pbe"], "ccsdt": LEVELS["ccsdt"]},
        split=lambda group: "test" if group == "bare" else "train",
        shard_bytes=2000,
    )
    assert [s.labels for s in read_any(tmp_path, split="test")] == [{}] * 12 and verify(tmp_path) == []


MEMORY = textwrap.dedent(
    """
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar

    import numpy as np

    from rung.data.build import BuildConfig, build
    from rung.data.fidelity import Fidelity
    from rung.data.sources.source import Part, Source, SourceInfo
    from rung.data.table import StructureTable

    @dataclass(frozen=True)
    class Molecules(Source):
        info: ClassVar[SourceInfo] = SourceInfo("molecules", "", "", "")
        count: int

        @property
        def fidelities(self):
            return {"pbe": Fidelity("pbe", "PBE")}

        def parts(self, paths):
            return [Part(Path("none"), start, start + 20_000) for start in range(0, self.count, 20_000)]

        def read(self, part):
            rng = np.random.default_rng(part.start)
            for start in range(part.start, part.stop, 5_000):
                keys = [f"m{index}" for index in range(start, start + 5_000)]
                grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)[:20] * 6
                forces = rng.normal(size=(5_000, 20, 3)).astype(np.float32)
                numbers = np.tile(np.arange(20) % 2 * 7 + 1, (5_000, 1))
                labels = {"energy.pbe": rng.normal(size=5_000), "forces.pbe": forces}
                yield StructureTable.make(keys, keys, np.full(5_000, 20), numbers, forces / 9 + grid, labels=labels)

    config = BuildConfig("molecules", shard_bytes=12_000_000)
    manifest = build(Molecules(int(sys.argv[1])), [], Path(sys.argv[2]), config)
    assert sum(shard.structures for shard in manifest.shards) == int(sys.argv[1])
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
)


@pytest.mark.slow
def test_memory_is_bounded_by_a_part_and_a_shard(tmp_path: Path) -> None:
    """Seven times the structures, 115 MB of positions and forces more, take little more memory."""
    peak = {}
    for count in (40_000, 280_000):
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / str(count))]
        peak[count] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout) / 1024
    assert peak[280_000] < peak[40_000] + 25, peak


def test_a_record_says_what_it_was_made_of(tmp_path: Path) -> None:
    """What an unfinished build holds can be read: the identity of the job and a record beside every piece."""
    assert killed(lambda: make(tmp_path), moving)
    work = tmp_path / WORK_FOLDER
    job = json.loads((work / "job.json").read_text())
    assert job["source"] == "Made(3, 24)" and job["parts"] == [["made", i, i + 1] for i in range(3)]
    records = {path.stem: json.loads(path.read_text()) for path in work.glob("*-*.json")}
    spills = [spill for record in records.values() for spill in record.get("spills", [])]
    assert sum(spill["structures"] for spill in spills) == 72
    assert {f"{name}.tar" for name in records if "part" not in name} == {path.name for path in work.glob("*.tar")}


def test_a_build_that_fails_at_once_leaves_nothing(tmp_path: Path) -> None:
    """The next try, with other options, is not held up by it."""

    def fail(part: int) -> None:
        raise ValueError("no such key")

    with pytest.raises(ValueError, match="no such key"):
        make(tmp_path / "out", Made(reading=fail))
    assert not (tmp_path / "out" / WORK_FOLDER).exists()
    make(tmp_path / "out", name="other")


def test_unfinished_work_is_not_taken_for_that_of_other_structures(tmp_path: Path) -> None:
    """Both are in memory, of the same size and called the same."""
    options: dict[str, Any] = {"name": "a", "fidelities": LEVELS, "split": CONFIG.split}
    assert killed(lambda: build_dataset(list(make_table(0, 24)), tmp_path, **options), moving)
    with pytest.raises(FileExistsError, match="unfinished build of other files or options .other source"):
        build_dataset(list(make_table(1, 24)), tmp_path, **options)
    build_dataset(list(make_table(1, 24)), tmp_path, **options, overwrite=True)
    assert {s.key for s in read_any(tmp_path)} == {s.key for s in make_table(1, 24)} and verify(tmp_path) == []


def test_what_cannot_be_read_back_replaces_nothing(tmp_path: Path, whole: dict[str, bytes]) -> None:
    make(tmp_path)
    before = contents(tmp_path)
    for text in ("\udc80", "a\r\nb\x07"):
        with pytest.raises(ValueError):
            make(tmp_path, description=text, overwrite=True)
        assert {name: data for name, data in contents(tmp_path).items() if name != WORK_FOLDER} == before


def test_bad_settings_are_named_before_any_work(tmp_path: Path) -> None:
    for name, value in (("shard_bytes", 0), ("pack_atoms", 0), ("max_bad", -1), ("max_energy_deviation", NAN)):
        with pytest.raises(ValueError, match=f"build: {name}: expected a number >= "):
            make(tmp_path / "out", **{name: value})
    with pytest.raises(ValueError, match="build: e0 of 'pbe': expected finite energies in eV"):
        make(tmp_path / "out", e0={"pbe": {1: NAN}})
    assert not (tmp_path / "out").exists()


def test_a_key_in_two_splits_is_found(tmp_path: Path) -> None:
    structures = list(make_table(0, 12))
    twin = replace(structures[1], key=structures[0].key, group="another group")
    options: dict[str, Any] = {"name": "a", "fidelities": LEVELS}
    with pytest.raises(ValueError, match="key 'p0-00000' names two structures"):
        build_dataset(
            [*structures, twin], tmp_path, split=lambda g: "val" if g == "another group" else "train", **options
        )


def test_elements_of_other_fidelities_do_not_touch_a_fit(tmp_path: Path) -> None:
    """Oxygen has forces at PBE, but no energy: it gets no E0, and what is fitted and found is as without it."""
    structures = list(make_table(0, 240))
    number, wrong = next((i, s) for i, s in enumerate(structures) if 8 not in s.numbers)
    energy = (wrong.labels["pbe"].energy or 0) + 5 * wrong.num_atoms
    structures[number] = replace(wrong, labels={**wrong.labels, "pbe": replace(wrong.labels["pbe"], energy=energy)})
    oxygen = [s for s in structures if 8 in s.numbers]
    others = [s for s in structures if 8 not in s.numbers]
    assert oxygen
    silent = [replace(s, labels={"pbe": replace(s.labels["pbe"], energy=None)}) for s in oxygen]
    options: dict[str, Any] = {"name": "a", "fidelities": {"pbe": LEVELS["pbe"]}, "split": lambda _: "train"}
    others = [replace(s, labels={"pbe": s.labels["pbe"]}) for s in others]
    without = build_dataset(others, tmp_path / "without", **options).entry("pbe")
    entry = build_dataset(others + silent, tmp_path / "with", **options).entry("pbe")
    assert set(entry.e0) == {1, 6} and entry.e0_note == without.e0_note == ""
    assert entry.e0 == without.e0 and entry.energy_std == without.energy_std


def test_a_fidelity_of_dipoles_alone(tmp_path: Path) -> None:
    structures = [
        replace(s, labels={"pbe": s.labels["pbe"], "ccsdt": Labels(dipole=np.ones(3, np.float32))})
        for s in make_table(0, 12)
    ]
    entry = build_dataset(structures, tmp_path, name="a", fidelities=LEVELS).entry("ccsdt")
    assert sum(entry.num_energies.values()) == sum(entry.num_forces.values()) == 0 and entry.e0 == {}
    assert verify(tmp_path) == []


def test_labels_are_told_from_missing_ones(tmp_path: Path) -> None:
    table = make_table(0, 6)
    structures = [replace(s, labels={"pbe": Labels(energy=NAN)}) if s.key == "p0-00003" else s for s in table]
    with pytest.raises(ValueError, match="'p0-00003': energy.pbe: expected a finite energy in eV, or None"):
        build_dataset(structures, tmp_path, name="a", fidelities=LEVELS)
    assert not (tmp_path / WORK_FOLDER).exists()

"""A dataset from structures to disk and back: split, shards, manifest, verification, report, command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rung.data.build import build_dataset
from rung.data.fidelity import Fidelity
from rung.data.manifest import Manifest, read_manifest, resolve_dataset
from rung.data.pack import decode
from rung.data.read import read_any
from rung.data.report import dataset_report
from rung.data.shard import ShardInfo, read_packs, write_shard
from rung.data.split import SplitFractions
from rung.data.structure import Labels, Structure
from rung.data.table import StructureTable, cut_by_atoms
from rung.data.verify import verify
from rung.launch.cli import run_module

E0 = {1: -13.6, 6: -1029.0, 8: -2041.0}
LEVELS = {name: Fidelity(name, name.upper()) for name in ("pbe", "ccsdt")}


def make_structures(count: int = 120) -> list[Structure]:
    """Random clusters in groups of four: all with PBE energies and forces, every third with a CCSD(T) energy."""
    rng = np.random.default_rng(0)
    structures = []
    for i in range(count):
        n = int(rng.integers(2, 7))
        numbers = rng.choice(list(E0), n).astype(np.uint8)
        energy = sum(E0[z] for z in numbers.tolist()) + 0.1 * n * rng.normal()
        labels = {"pbe": Labels(energy, rng.normal(size=(n, 3)).astype(np.float32))}
        if i % 3 == 0:
            labels["ccsdt"] = Labels(energy - 0.5 * n)
        positions = (rng.normal(size=(n, 3)) * 3).astype(np.float32)
        structures.append(Structure(f"s{i:03d}", f"molecule{i // 4}", numbers, positions, labels=labels))
    return structures


def build(folder: Path, structures: list[Structure] | None = None, **options: Any) -> Manifest:
    options = {"name": "clusters", "fidelities": LEVELS, "pack_atoms": 60, **options}
    return build_dataset(make_structures() if structures is None else structures, folder, **options)


def by_key(structures: list[Structure]) -> dict[str, dict[str, Any]]:
    return {s.key: asdict(s) for s in structures}


def write(structures: list[Structure], path: Path) -> ShardInfo:
    table = StructureTable.of(structures)
    return write_shard((table.part(*rows) for rows in cut_by_atoms(table.num_atoms, 60)), path, "train")


class TestSplit:
    def test_is_the_same_on_every_machine(self) -> None:
        splits = " ".join(SplitFractions()(f"molecule{i}") for i in range(8))
        assert splits == "train test train test test train train train"

    def test_shares_are_as_asked(self) -> None:
        split = SplitFractions(0.5, 0.3, 0.2, seed=3)
        counts = Counter(split(str(i)) for i in range(5000))
        assert counts["train"] / 5000 == pytest.approx(0.5, abs=0.03)
        assert counts["val"] / 5000 == pytest.approx(0.3, abs=0.03)

    def test_refuses_shares_that_do_not_sum_to_one(self) -> None:
        with pytest.raises(ValueError, match="three shares >= 0 that sum to 1"):
            SplitFractions(0.8, 0.1, 0.2)


class TestShards:
    def test_roll_over_and_keep_order(self, tmp_path: Path) -> None:
        shards = build(tmp_path, split=SplitFractions(1, 0, 0), pack_atoms=30, shard_bytes=5_000).shards
        assert len(shards) > 2 and [s.file for s in shards[:2]] == ["train-000000.tar", "train-000001.tar"]
        assert sum(s.structures for s in shards) == 120
        for shard in shards:
            names = [name for name, _ in read_packs(tmp_path / shard.file)]
            assert [name[:-21] for name in names] == [f"{shard.file[:-4]}-{i:06d}" for i in range(shard.packs)]
        assert not list(tmp_path.glob(".*"))

    def test_webdataset_reads_them(self, tmp_path: Path) -> None:
        from webdataset.tariterators import tar_file_iterator

        build(tmp_path, split=SplitFractions(1, 0, 0))
        with (tmp_path / "train-000000.tar").open("rb") as file:
            packs = [decode(member["data"], member["fname"]) for member in tar_file_iterator(file)]
        assert sorted(key for pack in packs for key in pack.keys.tolist()) == [f"s{i:03d}" for i in range(120)]

    def test_edges_agree_with_ase(self, tmp_path: Path) -> None:
        from ase import Atoms
        from ase.neighborlist import neighbor_list

        structures = make_structures(20)
        shard = write(structures, tmp_path / "train-000000.tar")
        expected = sum(len(neighbor_list("i", Atoms(s.numbers, s.positions), 5.0)) for s in structures)
        assert shard.edges == expected

    def test_a_truncated_tar_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "train-000000.tar"
        write(make_structures(), path)
        path.write_bytes(path.read_bytes()[:3000])
        with pytest.raises(ValueError, match=r"train-000000.tar: .*truncated"):
            list(read_packs(path))

    def test_a_damaged_pack_is_named(self, tmp_path: Path) -> None:
        write(make_structures(), tmp_path / "train-000000.tar")
        flip(tmp_path / "train-000000.tar")
        with pytest.raises(ValueError, match=r"train-000000.tar: train-000000-0000\d\d-.*: damaged: its CRC-32 is"):
            list(read_packs(tmp_path / "train-000000.tar"))

    def test_coincident_atoms_are_named(self, tmp_path: Path) -> None:
        twice = Structure("twin", "g", np.array([1, 1], np.uint8), np.zeros((2, 3), np.float32))
        with pytest.raises(ValueError, match="structure 'twin': positions: atoms"):
            write([twice], tmp_path / "train-000000.tar")


class TestBuild:
    def test_round_trip(self, tmp_path: Path) -> None:
        manifest = build(tmp_path)
        assert read_manifest(tmp_path) == manifest and verify(tmp_path) == []
        np.testing.assert_equal(by_key(read_any(tmp_path)), by_key(make_structures()))
        for split in manifest.splits:
            assert {SplitFractions()(s.group) for s in read_any(tmp_path, split=split)} == {split}

    def test_bytes_do_not_depend_on_the_order_of_input(self, tmp_path: Path) -> None:
        build(tmp_path / "a")
        build(tmp_path / "b", make_structures()[::-1])
        files = sorted(path.name for path in (tmp_path / "a").iterdir())
        assert files == ["dataset.yaml", "test-000000.tar", "train-000000.tar", "val-000000.tar"]
        assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)

    def test_counts_and_statistics(self, tmp_path: Path) -> None:
        manifest = build(tmp_path)
        entry = manifest.entry("ccsdt")
        assert sum(entry.num_energies.values()) == 40 and sum(entry.num_forces.values()) == 0
        assert entry.force_rms is None and entry.e0_source == "least_squares" and entry.statistics_split == "train"
        train = read_any(tmp_path, "pbe", "train")
        forces = np.concatenate([s.labels["pbe"].forces for s in train])
        assert manifest.entry("pbe").force_rms == pytest.approx(np.sqrt(np.mean(forces.astype(float) ** 2)), rel=1e-6)
        assert manifest.elements == dict(sorted(Counter(int(z) for s in make_structures() for z in s.numbers).items()))

    def test_isolated_atom_energies_are_kept(self, tmp_path: Path) -> None:
        entry = build(tmp_path, e0={"ccsdt": E0}).entry("ccsdt")
        assert (entry.e0, entry.e0_source) == (E0, "isolated_atoms")
        # What the atoms' binding adds per atom, -0.5 eV here, is part of the fit by composition.
        assert entry.e0_fit == pytest.approx({z: e0 - 0.5 for z, e0 in E0.items()}, abs=0.3)
        assert entry.energy_mean == pytest.approx(-0.5, abs=0.1)

    def test_a_stratified_split(self, tmp_path: Path) -> None:
        tested = {s.group for s in make_structures() if "ccsdt" in s.labels and s.key < "s040"}
        manifest = build(tmp_path, split=lambda group: "test" if group in tested else "train")
        assert manifest.splits == ("train", "test")
        assert {s.group for s in read_any(tmp_path, split="test")} == tested

    def test_a_dataset_without_train_states_so(self, tmp_path: Path) -> None:
        assert build(tmp_path, split=SplitFractions(0, 0, 1)).entry("pbe").statistics_split == "all"

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"structures": []}, "build: expected at least one structure, found none"),
            ({"structures": [*make_structures(8), *make_structures(1)]}, "key 's000' names two structures"),
            ({"fidelities": {"pbe": LEVELS["pbe"]}}, "unknown fidelity 'ccsdt'; known: pbe"),
            (
                {"fidelities": {**LEVELS, "mp2": Fidelity("mp2", "MP2")}},
                "fidelity 'mp2': no structure has a label at it",
            ),
            ({"split": lambda _: "holdout"}, "split: expected one of train, val, test, found 'holdout'"),
            ({"e0": {"pbe": {1: -13.6, 6: -1029.0}}}, "isolated-atom energies are given, but none for Z = [8]"),
            ({"e0": {"pbe": {1: -0.5, 6: -37.8, 8: -75.0}}}, "are both in eV and of the same method and code?"),
            ({"e0": {"pbee": E0}}, "unknown fidelity 'pbee'; known: pbe, ccsdt; did you mean 'pbe'?"),
            (
                {"structures": [replace(make_structures(1)[0], labels={"pbe": Labels(float("nan"))})]},
                "energy.pbe: expected a finite energy in eV, or None when absent, found nan",
            ),
            ({"name": "My Data"}, "name 'My Data': expected lower-case"),
        ],
    )
    def test_refuses(self, tmp_path: Path, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            build(tmp_path, **options)
        assert not list(tmp_path.iterdir())

    def test_refuses_hartree_among_ev_and_names_it(self, tmp_path: Path) -> None:
        structures = make_structures()
        wrong = replace(structures[5], labels={"pbe": Labels((structures[5].labels["pbe"].energy or 0) / 27.2114)})
        with pytest.raises(ValueError, match=r"energy.pbe: expected energies within 10 eV/atom .* 's005' by"):
            build(tmp_path, [*structures[:5], wrong, *structures[6:]])

    def test_replaces_only_when_asked(self, tmp_path: Path) -> None:
        build(tmp_path)
        with pytest.raises(FileExistsError, match="already holds a dataset"):
            build(tmp_path)
        build(tmp_path, split=SplitFractions(1, 0, 0), overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.yaml", "train-000000.tar"]

    def test_a_failed_replacement_leaves_the_old_dataset(self, tmp_path: Path) -> None:
        build(tmp_path)
        first = make_structures()[0]
        collapsed = replace(first, key="collapsed", positions=np.zeros_like(first.positions))
        with pytest.raises(
            ValueError, match="'collapsed'"
        ):  # found when its edges are counted, in the middle of writing
            build(tmp_path, [*make_structures(), collapsed], overwrite=True)
        assert verify(tmp_path) == []
        assert not list(tmp_path.glob(".building*"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


class TestVerify:
    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (cut, "train-000000.tar: manifest says .* bytes, found .*; truncated"),
            (flip, "train-000000.tar: SHA-256 .*, manifest says"),
            (Path.unlink, "train-000000.tar: missing"),
            (lambda path: path.with_name("stray.tar").touch(), "stray.tar: not in the manifest"),
        ],
    )
    def test_names_every_damaged_file(self, tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
        build(tmp_path)
        damage(tmp_path / "train-000000.tar")
        (fault,) = verify(tmp_path)
        assert re.match(message, fault)
        if "stray" not in message:
            with pytest.raises(ValueError, match=message):
                read_any(tmp_path)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("structures: 88", "structures: 89", "train-000000.tar: packs, structures, atoms: manifest says"),
            ("train: 30", "train: 31", "ccsdt: energies in split 'train': manifest says 31, found 30"),
        ],
    )
    def test_names_a_wrong_count(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        build(tmp_path)
        path = tmp_path / "dataset.yaml"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
        assert any(fault.startswith(message) for fault in verify(tmp_path))

    def test_names_a_group_in_two_splits(self, tmp_path: Path) -> None:
        manifest = build(tmp_path, split=SplitFractions(1, 0, 0))
        leak = [replace(make_structures(1)[0], key="leak")]
        shards = [*manifest.shards, replace(write(leak, tmp_path / "test-000000.tar"), split="test")]
        document = yaml.safe_load((tmp_path / "dataset.yaml").read_text())
        document["shards"] = [asdict(shard) for shard in shards]
        (tmp_path / "dataset.yaml").write_text(yaml.safe_dump(document))
        assert "test-000000.tar: group 'molecule0' is in split 'test' and in 'train'" in verify(tmp_path)


class TestManifest:
    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("licence:", "license:", "unknown key 'license'; did you mean 'licence'?"),
            ("format: 1", "format: 7", "format 7, this Rung reads 1; update Rung"),
            ("doi: ''\n", "", "key 'doi' is missing"),
            ("file: train-000000.tar", "file: ../train-000000.tar", "expected the plain name of a .tar file"),
            ("name: clusters", "name: [", "not readable YAML"),
            ("elements: {", "elements: 3 # {", "elements: expected a mapping, found 3"),
        ],
    )
    def test_names_what_is_wrong(self, tmp_path: Path, old: str, new: str, message: str) -> None:
        build(tmp_path)
        path = tmp_path / "dataset.yaml"
        path.write_text(path.read_text().replace(old, new, 1))
        with pytest.raises(ValueError, match=re.escape(message)):
            read_manifest(tmp_path)

    def test_resolves_folder_and_file(self, tmp_path: Path) -> None:
        build(tmp_path)
        assert resolve_dataset(tmp_path) == resolve_dataset(tmp_path / "dataset.yaml") == tmp_path
        with pytest.raises(FileNotFoundError, match="no dataset.yaml in .* or the word 'builtin'"):
            resolve_dataset(tmp_path / "elsewhere")

    def test_a_shard_must_have_a_plain_name(self) -> None:
        with pytest.raises(ValueError, match="expected the plain name"):
            ShardInfo("pipe:curl evil.tar", "", 0, 0, 0, 0, 0, "train", {})


class TestRead:
    def test_unknown_names_list_the_known(self, tmp_path: Path) -> None:
        build(tmp_path)
        with pytest.raises(ValueError, match="unknown fidelity 'ccsd'; known: pbe, ccsdt; did you mean 'ccsdt'"):
            read_any(tmp_path, "ccsd")
        with pytest.raises(ValueError, match="unknown split 'valid'; known: train, val, test"):
            read_any(tmp_path, split="valid")

    def test_selects_by_fidelity(self, tmp_path: Path) -> None:
        build(tmp_path)
        assert len(read_any(tmp_path / "dataset.yaml", "ccsdt")) == 40

    def test_a_file_needs_a_fidelity_and_has_no_split(self, tmp_path: Path) -> None:
        (tmp_path / "h.xyz").write_text("1\nProperties=species:S:1:pos:R:3 REF_energy=-13.6\nH 0 0 0\n")
        assert read_any(tmp_path / "h.xyz", "pbe")[0].labels["pbe"].energy == -13.6
        with pytest.raises(FileNotFoundError, match="h.xzy: no such file or dataset"):
            read_any(tmp_path / "h.xzy")
        with pytest.raises(ValueError, match="does not say at which fidelity its labels are; name it"):
            read_any(tmp_path / "h.xyz")
        with pytest.raises(ValueError, match="a file has no splits, so 'val' cannot be selected"):
            read_any(tmp_path / "h.xyz", "pbe", "val")


class TestReport:
    def test_shows_labels_outliers_and_duplicates(self, tmp_path: Path) -> None:
        structures = make_structures()
        other = next(s for s in structures if SplitFractions()(s.group) == "test")
        first = next(s for s in structures if SplitFractions()(s.group) == "train" and s.num_atoms > 2)
        odd = replace(
            first, labels={"pbe": replace(first.labels["pbe"], energy=(first.labels["pbe"].energy or 0) + 20)}
        )
        copy = replace(odd, key="copy", group=other.group, positions=odd.positions + np.float32(1.0))
        build(tmp_path, [odd if s.key == first.key else s for s in structures] + [copy])
        report = dataset_report([tmp_path])
        assert "energies: train" in report and "E0 in eV (least squares): H -13." in report
        assert re.search(rf"energy outliers at pbe .*: 2\n.*({first.key}|copy): \+", report)
        # The other pair is two H2 molecules of the same length.
        assert "duplicate geometries: 2, of which across splits or datasets: 2" in report


class TestCommandLine:
    def rung_data(self, *argv: object) -> int:
        return run_module("rung.data.cli", "rung data", [str(arg) for arg in argv])

    def extxyz(self, path: Path) -> Path:
        from ase import Atoms
        from ase.io import write

        frames = []
        for s in make_structures(40):
            atoms = Atoms(s.numbers, s.positions, info={"REF_energy": s.labels["pbe"].energy, "group": s.group})
            atoms.arrays["REF_forces"] = s.labels["pbe"].forces
            frames.append(atoms)
        write(path, frames, format="extxyz")
        return path

    def test_build_inspect_verify(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, out = self.extxyz(tmp_path / "mine.xyz"), tmp_path / "out"
        names = ("--name", "mine", "--fidelity", "pbe", "--method", "PBE", "--licence", "CC0-1.0")
        assert self.rung_data("build", source, "--out", out, *names, "--split", 0.5, 0.25, 0.25) == 0
        assert "dataset mine, version 1, licence CC0-1.0" in capsys.readouterr().out
        assert len(read_any(out)) == 40
        assert self.rung_data("inspect", out) == 0
        assert "fidelity pbe (PBE)" in capsys.readouterr().out
        assert self.rung_data("verify", out) == 0
        flip(out / "train-000000.tar")
        assert self.rung_data("verify", out) == 1
        assert "train-000000.tar: SHA-256" in capsys.readouterr().out

    def test_isolated_atoms_and_errors(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, out = self.extxyz(tmp_path / "mine.xyz"), tmp_path / "out"
        command = ("build", source, "--out", out, "--name", "mine", "--fidelity", "pbe")
        assert self.rung_data(*command, "--e0", "H=-13.6", "C=-1029", "O=-2041") == 0
        assert read_manifest(out).entry("pbe").e0 == E0
        assert self.rung_data(*command) == 2
        assert "rung data: error:" in capsys.readouterr().err
        assert self.rung_data("verify", tmp_path / "nothing") == 2
        with pytest.raises(SystemExit):
            self.rung_data(*command, "--e0", "Hh=-13.6")
        assert "expected SYMBOL=ENERGY such as H=-13.6, found 'Hh=-13.6'" in capsys.readouterr().err

    def test_runs_as_a_module(self, tmp_path: Path) -> None:
        command = [sys.executable, "-m", "rung.data", "inspect", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "python -m rung.data: error: dataset" in done.stderr

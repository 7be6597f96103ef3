"""The registry: every reader opens, describes itself fully and travels between processes; options come as text."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import rung.data.sources
from rung.data import cli
from rung.data.fidelity import Fidelity
from rung.data.sources.registry import open_source, source_class, source_names
from rung.data.sources.source import Source

REQUIRED = {
    "ase": {"fidelity": "pbe"},
    "aselmdb": {"fidelity": "pbe"},
    "deepmd": {"fidelity": "pbe"},
    "qcschema": {"models": "PBE/def2-SVP,GFN2-xTB"},  # it opens without any, but then has no level of theory
}
SPDX = {"CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "MIT"}
READER = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from rung.data.fidelity import Fidelity
from rung.data.sources.source import Source, SourceInfo

@dataclass(frozen=True)
class Mine(Source):
    info: ClassVar[SourceInfo] = SourceInfo("mine", "Mine", "*.mine", "text", fidelities=(Fidelity("pbe", "PBE"),))
    scale: float = 1.0
    count: int = 1

    def parts(self, paths): return []
    def read(self, part): yield from ()

class Other: pass
"""


@pytest.fixture(params=source_names())
def source(request: pytest.FixtureRequest) -> Source:
    return open_source(request.param, REQUIRED.get(request.param, {}))


def test_a_reader_describes_itself(source: Source) -> None:
    info = source.info
    assert info.title and info.files and info.layout and info.name in source_names()
    assert source_class(info.name) is type(source)
    assert not info.doi or re.fullmatch(r"10\.\d{4,9}/\S+", info.doi)
    assert not info.licence or info.licence in SPDX
    assert not info.url or re.fullmatch(r"https?://\S+", info.url)
    assert info.structures is None or info.structures > 0
    assert not info.fidelities or info.citation  # data, not a format
    names = [fidelity.name for fidelity in info.fidelities]
    assert len(set(names)) == len(names)
    assert info.e0.keys() <= set(names)
    for text in (info.title, info.files, info.layout, info.citation):
        assert text == " ".join(text.split())


def test_its_levels_are_among_those_it_describes(source: Source) -> None:
    levels = source.fidelities
    assert levels and all(name == level.name for name, level in levels.items())
    known = {level.name: level for level in source.info.fidelities}
    assert not known or levels.items() <= known.items()


def test_it_travels_between_processes(source: Source) -> None:
    again = pickle.loads(pickle.dumps(source))
    assert again == source and repr(again) == repr(source)


def test_its_repr_is_the_same_in_every_process() -> None:
    """A build that goes on knows its source by repr, so it may hold no address and no order of a set."""
    code = (
        "from rung.data.sources.registry import open_source, source_names\n"
        f"for name in source_names(): print(repr(open_source(name, {REQUIRED}.get(name, {{}}))))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == [repr(open_source(name, REQUIRED.get(name, {}))) for name in source_names()]


def test_levels_of_one_name_are_one_level() -> None:
    """Two sets at one fidelity are trained as one; only the program may differ."""
    by_name: dict[str, set[tuple[str, str]]] = {}
    for name in source_names():
        for level in source_class(name).info.fidelities:
            by_name.setdefault(level.name, set()).add((level.method, level.basis))
    assert {name: found for name, found in by_name.items() if len(found) > 1} == {}


def test_options_are_given_as_text() -> None:
    assert [open_source("mptrj", {"corrected": text}).corrected for text in ("true", "Yes", "0")] == [True, True, False]
    assert open_source("deepmd", {"fidelity": "pbe", "charge": "-1", "type_map": "Na,Cl"}) == source_class("deepmd")(
        "pbe", charge=-1, type_map=("Na", "Cl")
    )
    assert open_source("ani1x", {"levels": "ccsdt_cbs,hf_ccpvdz"}).levels == ("ccsdt_cbs", "hf_ccpvdz")
    assert open_source("qm7x", {"duplicates": "Dup,Mols.dat"}).duplicates == "Dup,Mols.dat"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ani1", {}, r"unknown source 'ani1'; known: aimnet2, ani1x, .*; did you mean 'ani1x'\?"),
        ("ani1x", {"level": "x"}, "source 'ani1x' has no option 'level'; its options: levels"),
        ("spice", {"levels": "x"}, "source 'spice' has no option 'levels'; its options: none"),
        ("ase", {}, "source 'ase' needs the option 'fidelity'"),
        ("mptrj", {"corrected": "maybe"}, "source option mptrj: corrected: expected true or false, found 'maybe'"),
        ("deepmd", {"fidelity": "pbe", "charge": "x"}, "source option deepmd: charge: expected a number, found 'x'"),
        ("ani1x", {"levels": "ccsdt"}, "unknown fidelity 'ccsdt'; known: .*; did you mean 'ccsdt_cbs'"),
        ("matpes", {"levels": ""}, "matpes: levels: expected at least one of pbe, r2scan, found none"),
        ("aselmdb", {"fidelity": "PBE"}, "name 'PBE': expected lower-case"),
    ],
)
def test_wrong_options_are_named(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(name, options)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package that registers readers, good and bad."""
    rows = {"mine": "rung_plugin:Mine", "other": "rung_plugin:Other", "lost": "rung_plugin:Lost", "bare": "no_such:X"}
    info = tmp_path / "rung_plugin-1.0.dist-info"
    info.mkdir()
    (tmp_path / "rung_plugin.py").write_text(READER)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rung_plugin\nVersion: 1.0\n")
    entries = "\n".join(f"{name} = {target}" for name, target in rows.items())
    (info / "entry_points.txt").write_text(f"[rung.sources]\n{entries}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rung_plugin", raising=False)


@pytest.mark.usefixtures("plugin")
def test_readers_of_other_packages() -> None:
    mine = open_source("mine", {"scale": "2.5e-1", "count": "3"})
    assert (mine.scale, mine.count) == (0.25, 3)
    assert mine.fidelities == {"pbe": Fidelity("pbe", "PBE")}
    with pytest.raises(ValueError, match="mine: scale: expected a number, found 'big'"):
        open_source("mine", {"scale": "big"})
    for name, message in (
        ("other", "source 'other': expected a dataclass that extends Source, found"),
        ("lost", "source 'lost': .*Lost.*; is its entry point right"),
        ("bare", "source 'bare' needs a library: .*no_such.*; install it with"),
    ):
        with pytest.raises(ValueError, match=message):
            source_class(name)


def test_the_package_lists_its_files() -> None:
    (folder,) = rung.data.sources.__path__
    files = {path.name for path in Path(folder).glob("*.py")} - {"__init__.py"}
    listed = re.findall(r"^    (\w+\.py) ", rung.data.sources.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted(files)
    assert importlib.util.find_spec("rung.data.sources.source")


def run(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return cli.run(parser.parse_args(arguments))


@pytest.mark.usefixtures("plugin")
def test_the_command_lists_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sources"]) == 0
    printed = capsys.readouterr().out
    for name in source_names():
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    assert re.search("^bare +source 'bare' needs a library", printed, re.MULTILINE)
    assert re.search(r"^ani1x +4,956,005  5 GB +CC0-1.0 +ANI-1x and ANI-1ccx", printed, re.MULTILINE)
    assert re.search(r"^geom .*not stated", printed, re.MULTILINE)


def test_the_command_describes_a_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sources", "qm7x", "ase"]) == 0
    printed = capsys.readouterr().out
    for text in (
        r"^qm7x$",
        "options: +levels .default pbe0_mbd., duplicates .default ''.$",
        "levels: +pbe0_mbd .PBE0/tight/MBD.; pbe0 .PBE0/tight.; dftb3_mbd .DFTB3/MBD.$",
        "levels: +as you name them$",
        "options: +fidelity .default none: give it., method",
        "licence: +CC-BY-4.0$",
    ):
        assert re.search(text, printed, re.MULTILINE), text
    with pytest.raises(ValueError, match="unknown source 'nothing'"):
        run(["sources", "nothing"])

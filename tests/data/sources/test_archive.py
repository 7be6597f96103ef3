"""Archives: a folder, a zip and tars of every compression give the same texts; damage is named, also at the end."""

from __future__ import annotations

import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from rung.data.sources import source as limits
from rung.data.sources.archive import read_texts, tar_members, text_parts
from rung.data.sources.source import Part

TEXTS = {f"set/{stem}.txt": f"text of {stem}" for stem in ("b", "a", "c", "ä")}
OTHERS = {"set/._a.txt": "\x00", "set/readme.md": "no data"}


def packed(folder: Path, kind: str, texts: dict[str, str]) -> Path:
    """Write the texts, among files that are no data, as a folder, a zip or a tar."""
    path = folder / f"texts.{kind}"
    if kind == "folder":
        for name, text in (texts | OTHERS).items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in (texts | OTHERS).items():
                archive.writestr(name, text)
    else:
        with tarfile.open(path, f"w:{kind.removeprefix('tar').removeprefix('.')}") as tar:
            for name, text in (texts | OTHERS).items():
                member = tarfile.TarInfo(name)
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
@pytest.mark.parametrize("per_part", [1, 3, 100])
def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, per_part: int) -> None:
    monkeypatch.setattr(limits, "PART_STRUCTURES", per_part)
    path = packed(tmp_path, kind, TEXTS)
    parts = text_parts(path, ".txt")
    assert len(parts) == (1 if kind.startswith("tar") else {1: 4, 3: 2, 100: 1}[per_part])
    found = [text for part in parts for text in read_texts(part, ".txt")]
    expected = [(stem, f"text of {stem}") for stem in ("b", "a", "c", "ä")]
    assert found == (expected if kind.startswith("tar") else sorted(expected))
    assert list(read_texts(Part(path), ".txt")) == found  # to the end
    if not kind.startswith("tar"):
        assert len(text_parts(path, ".txt", per_file=per_part)) == (4 if per_part > 1 else len(parts))


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(0)
    texts = {f"{i}.txt": rng.bytes(3000).hex() for i in range(9)}
    path = packed(tmp_path, kind, texts)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-6]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"texts.{kind}: .*truncated"):
            [text for part in text_parts(path, ".txt") for text in read_texts(part, ".txt")]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match=f"texts.{kind}: .*(damaged|truncated|expected UTF-8)"):
        [text for part in text_parts(path, ".txt") for text in read_texts(part, ".txt")]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_what_holds_no_data_is_named(tmp_path: Path, kind: str) -> None:
    path = packed(tmp_path, kind, {})
    with pytest.raises(ValueError, match=rf"texts.{kind}: expected \*.txt files, found none"):
        [text for part in text_parts(path, ".txt") for text in read_texts(part, ".txt")]


def test_other_files_are_named(tmp_path: Path) -> None:
    (path := tmp_path / "texts.zip").write_bytes(b"neither a zip nor a tar")
    expected = "expected a folder, a zip or a tar archive of *.txt files, found 23 bytes of something else"
    with pytest.raises(ValueError, match=re.escape(f"{path}: {expected}")):
        text_parts(path, ".txt")
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt: expected UTF-8 text"):
        list(read_texts(Part(tmp_path), ".txt"))


def test_a_tar_is_a_stream(tmp_path: Path) -> None:
    """Members come one after the other: the second is not needed for the first."""
    path = packed(tmp_path, "tar", {f"{i}.txt": "x" * 50_000 for i in range(3)})
    path.write_bytes(path.read_bytes()[:60_000])
    members = tar_members(path, ".txt")
    name, size, content = next(members)
    assert (name, size, len(content.read())) == ("0.txt", 50_000, 50_000)

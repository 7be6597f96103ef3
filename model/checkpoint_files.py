"""A checkpoint's files as bytes: read from a folder or a tar, held to their digests, written all at once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from rung.data.shard import tar_bytes, write_beside

WEIGHTS, RAW_WEIGHTS, UNCERTAINTY, INFO, EVALUATION, REFERENCE, CARD = (
    "model.safetensors",
    "raw.safetensors",
    "uncertainty.safetensors",
    "rung.yaml",
    "evaluation.json",
    "reference.json",
    "README.md",
)
DIGESTS = "SHA256SUMS"
REQUIRED = (WEIGHTS, INFO, EVALUATION, CARD)
OPTIONAL = (RAW_WEIGHTS, UNCERTAINTY, REFERENCE)


def read_files(path: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint folder, or of its tar, by name; every digest is verified.

    Files beside them that are none of Rung's are left alone; one that the list of digests names is read even when this
    Rung does not know it. Raises FileNotFoundError or ValueError, naming what is missing, damaged or not listed.
    """
    files = _of_folder(path) if path.is_dir() else _of_tar(path)
    expected = parse_digests(files[DIGESTS], f"checkpoint {path}") if DIGESTS in files else None
    if expected is None:
        raise ValueError(f"checkpoint {path}: expected a file {DIGESTS}, found none; is this a Rung checkpoint?")
    for name in sorted({*REQUIRED, *expected}):
        if name not in files:
            raise ValueError(f"checkpoint {path}: {name} is missing; copy the checkpoint again")
    for name in sorted({*files} - {DIGESTS}):
        _check(name, files[name], expected, path)
    return files


def parse_digests(data: bytes, source: str) -> dict[str, str]:
    """Return file name -> SHA-256 from a list of digests; raise ValueError that begins with `source`.

    Names come from anywhere, so one that is not the plain name of a file is refused.
    """
    digests: dict[str, str] = {}
    for line in data.decode(errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](\S+)", line)
        if match is None:
            raise ValueError(f"{source}: {DIGESTS}: expected lines of '<digest>  <file>', found '{line[:80]}'")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", match[2]):
            raise ValueError(f"{source}: {DIGESTS}: expected plain file names, found '{match[2]}'")
        digests[match[2]] = match[1]
    return digests


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` and their digests as `folder`, which appears only when it is complete; an older one is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial.{os.getpid()}")
    partial.mkdir()
    try:
        for name, data in files.items():
            write_beside(partial / name, data)
        sums = "".join(f"{sha256(data)}  {name}\n" for name, data in sorted(files.items()))
        write_beside(partial / DIGESTS, sums.encode())
        replace_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Move the folder `new` to `folder`: whoever looks there sees a whole checkpoint or none.

    Raises FileExistsError as `check_replaceable` does.
    """
    check_replaceable(folder)
    old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def check_replaceable(folder: Path) -> None:
    """Raise FileExistsError for a folder that exists and holds anything but the files of a checkpoint."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / INFO).is_file():
        raise FileExistsError(f"{folder} exists and is not a checkpoint: choose another folder or remove it")
    ours = {*REQUIRED, *OPTIONAL, DIGESTS, *_listed(folder)}
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in ours or not entry.is_file())
    if others:
        some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        raise FileExistsError(
            f"{folder} is not replaced, because it also holds what is no part of a checkpoint: {some}; "
            "choose another folder or move that away"
        )


def pack_files(folder: Path) -> Path:
    """Write the tar of a checkpoint folder beside it, as `<folder>.tar`, and return its path.

    The bytes depend on the files alone: no times, no owners.
    """
    target = folder.with_name(folder.name + ".tar")
    files = sorted(read_files(folder).items())
    write_beside(target, tar_bytes((f"{folder.name}/{name}", data) for name, data in files))
    return target


def _listed(folder: Path) -> Iterable[str]:
    """Return the names in a folder's list of digests; none when it cannot be read: damage may be replaced."""
    try:
        return parse_digests((folder / DIGESTS).read_bytes(), str(folder)).keys()
    except (OSError, ValueError):
        return ()


def _of_folder(folder: Path) -> dict[str, bytes]:
    names = {*REQUIRED, *OPTIONAL, DIGESTS}
    if (folder / DIGESTS).is_file():
        names |= parse_digests((folder / DIGESTS).read_bytes(), f"checkpoint {folder}").keys()
    return {name: (folder / name).read_bytes() for name in sorted(names) if (folder / name).is_file()}


def _of_tar(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist: expected a checkpoint folder or a .tar of one")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None:
                    files[Path(member.name).name] = content.read()
    except tarfile.TarError as error:
        raise ValueError(f"checkpoint {path}: not a whole tar file: {error}; copy it again") from error
    listed = parse_digests(files.get(DIGESTS, b""), f"checkpoint {path}")
    ours = {*REQUIRED, *OPTIONAL, DIGESTS, *listed}
    return {name: data for name, data in files.items() if name in ours}


def _check(name: str, data: bytes, expected: Mapping[str, str], path: Path) -> None:
    if name not in expected:
        raise ValueError(f"checkpoint {path}: {name} has no digest in {DIGESTS}, so it was not part of what was saved")
    if (found := sha256(data)) != expected[name]:
        raise ValueError(
            f"checkpoint {path}: {name}: expected SHA-256 {expected[name]}, found {found}: "
            "the file is damaged or was edited; copy the checkpoint again"
        )

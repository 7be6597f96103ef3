"""Headers of shards: what `tarfile` and `tar` write is read as they read it; what a pack cannot need is refused."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset.writer import TarWriter

import rung.data.tar
from rung.data.manifest import read_manifest, resolve_dataset
from rung.data.shard import tar_bytes
from rung.data.tar import Member, members

CONTENTS = [("a.safetensors", b"x" * 700), ("b/c-1.safetensors", b""), ("d.safetensors", b"y" * 512)]


def tar(*added: tarfile.TarInfo | str, form: int = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar of the members given, of 10 bytes each where they are regular."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for info in added:
            header = tarfile.TarInfo(info) if isinstance(info, str) else info
            header.size = 10 if header.isreg() else 0
            file.addfile(header, io.BytesIO(b"0123456789"))
    return buffer.getvalue()


def special(kind: bytes, name: str = "a.safetensors") -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, "/etc/passwd"
    return header


def edited(start: int, value: bytes, data: bytes | None = None) -> bytes:
    """Return a tar whose first header holds `value` at byte `start`, under a checksum that fits."""
    block = bytearray(tar("a.safetensors") if data is None else data)
    block[start : start + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


def listed(data: bytes) -> list[Member]:
    return members(io.BytesIO(data), "x.tar")


def by_tarfile(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as file:
        return [(member.name, member.offset_data, member.size) for member in file]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_agrees_with_tarfile(form: int) -> None:
    buffer = io.BytesIO()
    names = ["é.safetensors", "./plain.safetensors", "long" * 20 + "/" + "name" * 20 + ".safetensors"]
    if form != tarfile.USTAR_FORMAT:  # they write extension headers for these
        names = ["plain.safetensors"]
    with tarfile.open(fileobj=buffer, mode="w", format=form) as file:
        for name, content in [*CONTENTS, *((name, b"z" * 3) for name in names)]:
            header = tarfile.TarInfo(name)
            header.size, header.mtime, header.uname, header.mode = len(content), 1_700_000_000, "someone", 0o400
            file.addfile(header, io.BytesIO(content))
    assert listed(buffer.getvalue()) == by_tarfile(buffer.getvalue())


def test_contents_lie_where_it_says() -> None:
    data = tar_bytes(CONTENTS)
    assert [(name, data[start : start + size]) for name, start, size in listed(data)] == CONTENTS


@pytest.mark.parametrize(("command", "form"), [("tar", "ustar"), ("tar", "gnu"), ("bsdtar", "ustar")])
def test_agrees_with_the_tar_command(tmp_path: Path, command: str, form: str) -> None:
    if shutil.which(command) is None:
        pytest.skip(f"no {command} here")
    for name, content in CONTENTS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    names = [name for name, _ in CONTENTS]
    subprocess.run([command, f"--format={form}", "-cf", "x.tar", *names], cwd=tmp_path, check=True)
    data = (tmp_path / "x.tar").read_bytes()
    assert listed(data) == by_tarfile(data) and [member.name for member in listed(data)] == names


def by_webdataset(mtime: float) -> bytes:
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=mtime) as writer:
        for index in range(3):
            writer.write({"__key__": f"train-{index:06d}", "safetensors": b"0123456789"})
    return buffer.getvalue()


def test_reads_what_webdataset_writes() -> None:
    data = by_webdataset(mtime=0)
    assert [member.name for member in listed(data)] == [f"train-{i:06d}.safetensors" for i in range(3)]
    assert listed(data) == by_tarfile(data)
    with pytest.raises(ValueError, match="pax extension header"):  # in which it puts a time that is no whole number
        listed(by_webdataset(mtime=0.5))


def test_reads_the_builtin_dataset() -> None:
    folder = resolve_dataset("builtin")
    for shard in read_manifest(folder).shards:
        with (folder / shard.file).open("rb") as file:
            assert len(members(file, shard.file)) == shard.packs


def test_an_empty_tar_has_no_members() -> None:
    assert listed(tar()) == listed(bytes(1024)) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.LNKTYPE, "'a.safetensors' is a hard link"),
        (tarfile.SYMTYPE, "'a.safetensors' is a symbolic link"),
        (tarfile.CHRTYPE, "is a character device"),
        (tarfile.BLKTYPE, "is a block device"),
        (tarfile.DIRTYPE, "is a directory"),
        (tarfile.FIFOTYPE, "is a FIFO"),
        (tarfile.CONTTYPE, "is a contiguous file"),
        (tarfile.GNUTYPE_SPARSE, "is a GNU sparse file"),
        (b"V", "is of the unknown type b'V'"),
    ],
)
def test_refuses_all_but_regular_files(kind: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"x\.tar: member 1, at byte 1024: .*{message}; expected a tar of packs"):
        listed(tar("first.safetensors", special(kind)))


@pytest.mark.parametrize(
    ("form", "kind"),
    [(tarfile.PAX_FORMAT, "a pax extension header"), (tarfile.GNU_FORMAT, "a GNU long-name extension header")],
)
def test_refuses_extension_headers(form: int, kind: str) -> None:
    with pytest.raises(ValueError, match=f"member 0, at byte 0: '././@.*' is {kind}"):
        listed(tar("n" * 300 + ".safetensors", form=form))


def test_an_extension_header_is_not_read_whatever_size_it_states() -> None:
    for kind in (b"L", b"K", b"x", b"g"):
        data = edited(124, b"77777777777\0", edited(156, kind))
        with pytest.raises(ValueError, match="extension header"):
            listed(data)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/a.safetensors", "has an absolute path"),
        ("../a.safetensors", r"has '\.\.'"),
        ("b/../../a.safetensors", r"has '\.\.'"),
        ("b\\a.safetensors", "has a back-slash"),
        ("b\na.safetensors", r"'b\\na.safetensors' has control characters"),
        ("\x1b[2Ja.safetensors", r"'\\x1b\[2Ja.safetensors' has control characters"),
        ("a\u202ea.safetensors", "has control characters"),
        ("a.pkl", "'a.pkl' has no ending '.safetensors'"),
        ("", "'' has no ending '.safetensors'"),
    ],
)
def test_refuses_names_that_are_no_packs(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"x.tar: member 0, at byte 0: .*{message}"):
        listed(tar(name))


def test_dots_in_a_name_are_no_parent_folder() -> None:
    assert listed(tar("a..b.safetensors"))[0].name == "a..b.safetensors"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (edited(0, b"\xff"), "is not UTF-8"),
        (edited(0, b"a\0b"), "control characters"),  # readers that end a name at NUL see another one
        (edited(257, b"\0" * 8), "unknown tar format .magic"),  # the tar of before POSIX
        (edited(345, b"0123", tar("a.safetensors", form=tarfile.GNU_FORMAT)), "has a GNU extension in its header"),
        (edited(345, b".."), r"'\.\./a.safetensors' has '\.\.'"),
        (edited(124, b"\x80" + bytes(10) + b"\x0a"), "size: expected octal digits"),  # base 256
        (edited(124, b"-0000000001\0"), "size: expected octal digits"),
        (edited(124, b"0000_000001\0"), "size: expected octal digits"),
        (edited(124, b"00000000009\0"), "size: expected octal digits"),
        (edited(124, bytes(12)), "size: expected octal digits"),
        (edited(124, b"77777777777\0"), "truncated: 'a.safetensors' states 8589934591 bytes, 9728 are left"),
        (tar("a.safetensors", "b.safetensors", "a.safetensors"), "member 2.* a second member of the name 'a.safet"),
        (b"not a tar at all, " * 100, "checksum: expected octal digits, found"),
        (b"", "truncated: the file ends before the end-of-archive mark"),
    ],
)
def test_refuses_headers_that_are_not_plain(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(data)


def test_every_flipped_bit_of_a_header_is_found() -> None:
    data = tar("a.safetensors")
    for bit in range(0, 512 * 8, 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        if damaged[148:156].strip(b"\0 ") != data[148:156].strip(b"\0 ") or not 148 <= bit // 8 < 156:
            with pytest.raises(ValueError, match="x.tar: member 0"):
                listed(bytes(damaged))


def test_every_truncation_is_found() -> None:
    data = tar_bytes(CONTENTS)
    end = 3 * 512 + 1024 + 512  # three headers, 700 and 512 bytes of contents in whole blocks
    for size in range(0, end + 1024, 128):
        with pytest.raises(ValueError, match="x.tar: member .*: truncated"):
            listed(data[:size])
    assert listed(data[: end + 1024]) == listed(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data + tar("b.safetensors"), "something else than zeros after the end-of-archive mark"),
        (lambda data: data[:-1] + b"\n", "something else than zeros"),
        (lambda data: data[:1024] + bytes(512) + data[:1024] + bytes(1024), "something else than zeros"),
        (lambda data: data + bytes(2_000_000), "2008704 bytes after the end-of-archive mark, more than 1048576"),
    ],
)
def test_nothing_may_follow_the_end(change: Callable[[bytes], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listed(change(tar("a.safetensors")))


def test_the_number_of_members_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rung.data.tar, "MAX_MEMBERS", 3)
    names = [f"{index}.safetensors" for index in range(4)]
    assert len(listed(tar(*names[:3]))) == 3
    with pytest.raises(ValueError, match="more than 3 members"):
        listed(tar(*names))


class Counted(io.BytesIO):
    """A file that counts the bytes read of it."""

    num_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.num_read += len(data)
        return data


def test_reads_no_contents() -> None:
    data = tar_bytes([(f"{index}.safetensors", bytes(100_000)) for index in range(10)])
    file = Counted(data)
    assert len(members(file, "x.tar")) == 10
    assert file.num_read < 11 * 512 + 10_240

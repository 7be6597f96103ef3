"""JSON larger than the piece that is read: nothing lost at the seams."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from rung.data.sources import json_stream
from rung.data.sources.json_stream import JsonStream, open_text

RECORDS = [{"name": "ä" * k, "values": [k, -1.5e-3, None], "nested": {"}": "]"}} for k in range(9)]


@pytest.mark.parametrize("piece", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("suffix", [".json", ".json.gz", ".json.xz"])
def test_elements_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, suffix: str) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    path = tmp_path / f"list{suffix}"
    opener = {".json": open, ".json.gz": gzip.open, ".json.xz": lzma.open}[suffix]
    with opener(path, "wt", encoding="utf-8") as file:
        json.dump(RECORDS, file, indent=1)
    with open_text(path) as file:
        assert list(JsonStream(file, path).elements()) == RECORDS


@pytest.mark.parametrize("piece", [1, 16, 1 << 20])
def test_members_of_an_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_stream, "PIECE", piece)
    path = tmp_path / "object.json"
    path.write_text(json.dumps({str(k): record for k, record in enumerate(RECORDS)}), encoding="utf-8")
    with open_text(path) as file:
        stream = JsonStream(file, path)
        assert [(key, stream.value()) for key in stream.members()] == [(str(k), r) for k, r in enumerate(RECORDS)]
        assert stream.peek() == "" and stream.position == len(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": 2', "t.json: character 11: not readable JSON .* truncated"),
        ('[{"a": 1}', "t.json: character 9: expected ',' or ']', found 'the end of the file'"),
        ('[{"a": 1} {"a": 2}]', "t.json: character 10: expected ',' or ']', found '{'"),
        ("[12, 13]", "t.json: character 1: expected an object, a list or a text, found '12, 13]'"),
        ('{"a": 1}', r"t.json: character 0: expected '\[', found '{'"),
        ("", "t.json: the file is empty"),
    ],
)
def test_damage_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message), open_text(path) as file:
        list(JsonStream(file, path).elements())


def test_a_truncated_or_foreign_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    whole = gzip.compress(json.dumps([list(range(9999))]).encode())
    for data in (whole[: len(whole) // 2], b"[{}]"):
        path.write_bytes(data)
        message = r"t.json.gz: cannot be read .*; damaged or truncated\?"
        with pytest.raises(ValueError, match=message), open_text(path) as file:
            list(JsonStream(file, path).elements())


def test_a_record_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "PIECE", 100)
    monkeypatch.setattr(json_stream, "MAX_VALUE", 1000)
    path = tmp_path / "t.json"
    path.write_text('[{"a": "' + "x" * 100_000)
    with open_text(path) as file:
        stream = JsonStream(file, path)
        with pytest.raises(ValueError, match="not readable JSON"):
            list(stream.elements())
        assert len(stream.text) < 3000

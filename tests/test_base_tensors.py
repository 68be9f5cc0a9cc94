"""What safetensors' own library writes we read, and it reads what we write; the rest is refused."""

from __future__ import annotations

import json
import random
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_kit.base.tensors import INDEX, PIECE, stored, stored_in, write_file
from lora_kit.errors import UserError

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.uint16),
]


def some(seed: int) -> dict[str, Any]:
    """Tensors of any type and shape, empty ones and single numbers among them."""
    chooser = random.Random(seed)
    torch.manual_seed(seed)
    found = {}
    for number in range(chooser.randint(1, 12)):
        shape = [chooser.choice([0, 1, 2, 3, 7, 64]) for _ in range(chooser.randint(0, 3))]
        dtype = chooser.choice(DTYPES)
        values = torch.randint(0, 2 if dtype == torch.bool else 100, shape)
        found[f"{chooser.choice('abc')}.{number}.ü"] = values.to(dtype)
    return found


def same(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and torch.equal(one.double(), other.double())


@pytest.mark.parametrize("seed", range(40))
def test_the_library_and_we_read_each_other(tmp_path: Path, seed: int) -> None:
    wanted = some(seed)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    save_file(wanted, theirs)
    found = stored(theirs)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.shape == tuple(wanted[name].shape) and same(tensor.read(), wanted[name])
        parts = [tensor.read(rows.start, rows.stop) for rows in tensor.blocks()]
        if tensor.shape and tensor.size:
            assert same(torch.cat(parts), wanted[name])
        if tensor.shape:
            assert same(tensor.read(1, 3), wanted[name][1:3])
    write_file(ours, {n: (t.dtype, t.shape) for n, t in found.items()}, lambda name: [wanted[name]])
    read = load_file(ours)
    assert read.keys() == wanted.keys() and all(same(read[n], wanted[n]) for n in wanted)


def test_large_tensors_in_pieces_of_any_length(tmp_path: Path) -> None:
    whole = torch.randint(0, 256, (2 * PIECE + 4097,), dtype=torch.uint8)
    file = tmp_path / "file"
    blocks = {
        "a": whole.split([5, PIECE - 1, 4096, PIECE + 4097 - 4100]),
        "b": [torch.tensor(0.5)],
    }
    crc = write_file(file, {"a": ("U8", tuple(whole.shape)), "b": ("F32", ())}, blocks.__getitem__)
    read = load_file(file)
    assert torch.equal(read["a"], whole) and read["b"] == 0.5
    assert crc == zlib.crc32(file.read_bytes())
    found = stored(file)["a"]
    assert [rows.stop - rows.start for rows in found.blocks()] == [PIECE, PIECE, 4097]
    assert next(found.blocks(3)).stop == PIECE // 3 * 3
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        found.read()


def test_what_was_promised_must_be_written(tmp_path: Path) -> None:
    entries = {"a": ("F32", (2, 2)), "b": ("F32", (1,))}
    with pytest.raises(AssertionError, match=r"a is torch\.float64"):
        write_file(tmp_path / "1", entries, lambda _: [torch.zeros(2, 2).double()])
    with pytest.raises(AssertionError, match="a: 16 bytes declared, 20 written"):
        write_file(tmp_path / "2", entries, lambda _: [torch.zeros(5)])
    with pytest.raises(AssertionError, match="b: 4 bytes declared, 0 written"):
        write_file(tmp_path / "3", entries, lambda n: [torch.zeros(2, 2)] if n == "a" else [])
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "1", entries, lambda _: [])


def raw(file: Path, header: str | bytes, data: bytes = b"", length: int | None = None) -> Path:
    text = header.encode() if isinstance(header, str) else header
    count = len(text) if length is None else length
    file.write_bytes(count.to_bytes(8, "little") + text + data)
    return file


def entry(start: int, stop: int, shape: Any, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


FOUR = json.dumps(entry(0, 4, [4]))
BAD: dict[str, tuple[Any, bytes, int | None]] = {
    "a name twice": (f'{{"a": {FOUR}, "a": {FOUR}}}', b"1234", None),
    "overlap": (json.dumps({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}), b"123456", None),
    "the same bytes": (json.dumps({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}), b"1234", None),
    "gap": (json.dumps({"a": entry(0, 2, [2]), "b": entry(4, 6, [2])}), b"123456", None),
    "not from the start": (json.dumps({"a": entry(2, 4, [2])}), b"1234", None),
    "bytes left over": (json.dumps({"a": entry(0, 2, [2])}), b"1234", None),
    "truncated": (json.dumps({"a": entry(0, 4, [4])}), b"12", None),
    "shape and bytes differ": (json.dumps({"a": entry(0, 4, [5])}), b"1234", None),
    "negative": (json.dumps({"a": entry(0, 4, [-2, -2])}), b"1234", None),
    "no whole number": (json.dumps({"a": entry(0, 4, [4.0])}), b"1234", None),
    "true is no number": (json.dumps({"a": entry(0, 1, [True])}), b"1", None),
    "huge": (json.dumps({"a": entry(0, 4, [2**62, 2**62, 4])}), b"1234", None),
    "unknown type": (json.dumps({"a": entry(0, 4, [4], "X9")}), b"1234", None),
    "no entry": ('{"a": 5}', b"", None),
    "no object": ("[1, 2]", b"", None),
    "no json": ("{,}", b"", None),
    "no utf-8": (b'{"\xff": 1}', b"", None),
    "nested": ("[" * 20_000 + "]" * 20_000, b"", None),
    "header beyond the file": ("{}", b"", 2**40),
    "header too large": ("{}", b"", 2**63),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_file_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError) as raised:
        stored(raw(tmp_path / "model.safetensors", *BAD[name]))
    text = str(raised.value)
    assert "corrupt safetensors file" in text and "\n" not in text and len(text) < 400


@pytest.mark.parametrize("content", [b"", b"1234567", b"\x00" * 8])
def test_a_file_without_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UserError, match="corrupt"):
        stored(tmp_path / "file")
    with pytest.raises(UserError, match="cannot be read"):
        stored(tmp_path / "missing")


def test_any_flipped_byte_of_a_header_is_refused_or_read_as_the_library_does(
    tmp_path: Path,
) -> None:
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, tmp_path / "file")
    content = bytearray((tmp_path / "file").read_bytes())
    chooser, refused = random.Random(0), 0
    for _ in range(300):
        broken = bytearray(content)
        broken[chooser.randrange(len(content) - 48)] = chooser.randrange(256)
        (tmp_path / "broken").write_bytes(broken)
        try:
            found = {name: tensor.read() for name, tensor in stored(tmp_path / "broken").items()}
        except UserError:
            refused += 1
            continue
        theirs = load_file(tmp_path / "broken")
        assert found.keys() == theirs.keys() and all(same(found[n], theirs[n]) for n in found)
    assert 100 < refused < 300


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "../outside.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "outside of its folder"),
        ({"weight_map": {"a": "sub/model.safetensors"}}, "outside of its folder"),
        ({"weight_map": {"a": 5}}, "no index|outside"),
        ({"weight_map": {"a": ["x"]}}, "invalid shard index"),
        ({"weight_map": ["a"]}, "invalid shard index"),
        ({}, "invalid shard index"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
        ({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}, "is in two shards"),
    ],
)
def test_an_index_leads_nowhere_else(tmp_path: Path, index: Any, words: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for place in (tmp_path / "outside", model / "1", model / "2"):
        save_file({"a": torch.zeros(2)}, place.with_suffix(".safetensors"))
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        stored_in(model)


def test_shards_are_one_model(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "2.safetensors")
    names = {"a": "1.safetensors", "b": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    assert {name: tensor.file.name for name, tensor in stored_in(tmp_path).items()} == names
    (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        stored_in(tmp_path)

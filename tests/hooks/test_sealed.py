"""Sealed files: every bit of them is under their checksum, and what is no such file is refused before it is read."""

from __future__ import annotations

import json
import os
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

from hooks import sealed
from hooks.sealed import Unreadable

pytestmark = pytest.mark.contract

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1.5], dtype=torch.bfloat16)}
TEXT = {"format": "some-1", "card": json.dumps({"seal": "0" * 64, "n": [1, 2]})}


def refusal(read: Callable[[], Any]) -> str:
    with pytest.raises(Unreadable) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


def bits(data: bytes, every: bool) -> Iterable[int]:
    """Every bit of ``data``, or one by chance of each of its bytes."""
    rng = random.Random(len(data))
    return range(8 * len(data)) if every else (8 * i + rng.randrange(8) for i in range(len(data)))


EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.safetensors"
    path.write_bytes(sealed.pack(TENSORS, TEXT))
    return path


def believed(path: Path) -> bool:
    """Whether ``path`` is read as a sealed file."""
    try:
        return sealed.read(path).sealed
    except Unreadable as error:
        assert "\n" not in str(error)
        return False


def test_what_is_packed_comes_back(file: Path) -> None:
    stored = sealed.read(file)
    assert stored.sealed and stored.metadata == TEXT and stored.shapes == {"a": (2, 3), "b": (1,)}
    assert_close(stored.tensors(), TENSORS, rtol=0, atol=0)
    # Any reader of safetensors reads it.
    assert_close(safetensors.torch.load_file(file), TENSORS, rtol=0, atol=0)


@EVERY
def test_no_flipped_bit_is_believed(file: Path, every: bool) -> None:
    """In header, padding and tensors."""
    data = file.read_bytes()
    for bit in bits(data, every):
        file.write_bytes(flipped(data, bit))
        assert not believed(file), f"bit {bit % 8} of byte {bit // 8}"
    file.write_bytes(data)
    assert believed(file)


def test_no_cut_and_no_addition_is_believed(file: Path) -> None:
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        refusal(lambda: sealed.read(file))
    file.write_bytes(data + b"\0")
    assert "is damaged" in refusal(lambda: sealed.read(file))


@EVERY
def test_no_flipped_bit_of_json_is_believed(tmp_path: Path, every: bool) -> None:
    path = tmp_path / "file.json"
    value = {"inside": {"seal": "1" * 64}, "rows": [0.1, None, "Δ"]}
    path.write_text(sealed.pack_json(value, indent=2), encoding="utf-8")
    assert sealed.read_json(path) == (value, True)
    data = path.read_bytes()
    for bit in bits(data, every):
        path.write_bytes(flipped(data, bit))
        try:
            assert not sealed.read_json(path)[1], f"bit {bit % 8} of byte {bit // 8}"
        except Unreadable as error:
            assert "\n" not in str(error)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(lambda: sealed.read_json(path))


def test_what_has_no_seal_says_so(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"format": "pt"})
    stored = sealed.read(path)
    assert not stored.sealed and not stored.earlier(stored.tensors())
    (tmp_path / "file.json").write_text("[1]")
    assert sealed.read_json(tmp_path / "file.json") == ([1], False)


def test_the_earlier_format_is_read_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    metadata = {"format": sealed.EARLIER, "digest": sealed.digest(TENSORS)}
    safetensors.torch.save_file(TENSORS, path, metadata)
    stored = sealed.read(path)
    with pytest.warns(UserWarning, match="is of the earlier format mambascope-1") as said:
        assert stored.earlier(stored.tensors())
    assert "\n" not in str(said[0].message)
    assert stored.earlier(stored.tensors(), quiet=True)
    assert not stored.earlier({**stored.tensors(), "a": TENSORS["a"] + 1})


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    """A pipe has nobody at its other end, a device never ends."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    unix = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(unix)[-100:] if len(str(unix)) < 100 else "\0unused")
    for read in (sealed.read, sealed.read_json, sealed.content):
        assert "it is a pipe, not a regular file" in within(5, lambda read=read: refusal(lambda: read(pipe)))
        for device in ("/dev/zero", "/dev/urandom"):
            assert "it is a device" in within(5, lambda read=read, device=device: refusal(lambda: read(device)))
        assert "it is a folder" in refusal(lambda read=read: read(tmp_path))
        with pytest.raises(FileNotFoundError):
            read(tmp_path / "none")
        assert "cannot be read" in refusal(lambda read=read: read(tmp_path / ("n" * 300)))
        assert "cannot be read" in refusal(lambda read=read: read("a\0b"))


def within(seconds: float, ask: Callable[[], str]) -> str:
    """What ``ask`` gives, or an empty text where it does not come back."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else ""


def test_a_file_is_no_larger_than_its_header_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sparse"
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(10**13)  # ten terabytes, of which the disk holds nothing
    assert "its header is of 70" in refusal(lambda: sealed.read(path))
    many = (10**13 - 200) // 4 * 4
    header = json.dumps({"a": {"dtype": "F32", "shape": [many // 4], "data_offsets": [0, many]}}).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + many)
    assert "does not fit into memory" in refusal(lambda: sealed.read(path))
    assert "does not fit into memory" in refusal(lambda: sealed.content(path))
    assert "and 8 were saved" in refusal(lambda: sealed.content(path, 8))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 5000 + b"]" * 5000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,' + b"9" * 4000 + b"]}}",
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":"x","data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","data_offsets":[0,8]}}',
        b'{"a":[1]}',
        b'{"__metadata__":{"x":1},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"__metadata__":[1],"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,8]}}',
        b"{\xff}",
        b"{",
    ],
)
def test_headers_that_are_none(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    refusal(lambda: sealed.read(path).tensors())


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    path, rng = tmp_path / "file.safetensors", random.Random(0)
    for length in (*range(1, 40), 500, 5000):
        path.write_bytes(rng.randbytes(length))
        refusal(lambda: sealed.read(path))
        refusal(lambda: sealed.read_json(path))

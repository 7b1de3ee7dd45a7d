"""The guards that every test runs under can fail: network, shapes, what a test leaves behind."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from tests import shapes
from tests.conftest import NetworkUsed, attempts, changes, is_local, process_state

pytestmark = pytest.mark.hygiene


@pytest.fixture
def forgiven() -> Iterator[list[str]]:
    """The attempts on record; emptied afterwards, because here they were made on purpose."""
    yield attempts
    attempts.clear()


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_another_machine_is_refused(address: str, forgiven: list[str]) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as connection, pytest.raises(NetworkUsed, match="without a network"):
        connection.connect((address, 9))
    with socket.socket(family, socket.SOCK_DGRAM) as out, pytest.raises(NetworkUsed):
        out.sendto(b"x", (address, 9))
    assert len(forgiven) == 2


def test_a_name_is_not_looked_up(forgiven: list[str]) -> None:
    with pytest.raises(NetworkUsed):
        socket.create_connection(("example.invalid", 9))
    assert forgiven == ["socket.getaddrinfo example.invalid"]


def test_this_machine_is_reached() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(("localhost", server.getsockname()[1])) as client,
    ):
        server.accept()[0].close()
        assert client.recv(1) == b""
    assert not attempts


@pytest.mark.parametrize(
    ("host", "local"),
    [("::1", True), (b"127.3.2.1", True), (None, True), ("0.0.0.0", True), ("10.0.0.1", False)],
)
def test_what_counts_as_this_machine(host: object, local: bool) -> None:
    assert is_local(host) is local


def test_subprocesses_are_told_to_stay_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == os.environ["TRANSFORMERS_OFFLINE"] == "1"


PROBE = """
from __future__ import annotations
import dataclasses
from typing import Protocol
from jaxtyping import Float
from torch import Tensor

class Sized(Protocol):
    @property
    def size(self) -> int: ...

def dot(a: Float[Tensor, "batch d"], b: Float[Tensor, "d"]) -> Float[Tensor, "batch"]:
    return a @ b

def wrong(a: Float[Tensor, "batch d"]) -> Float[Tensor, "d batch"]:
    return a

def size(thing: Sized) -> int:
    return thing.size

@dataclasses.dataclass
class Pair:
    first: Float[Tensor, "n"]
    second: Float[Tensor, "n"]

def within():
    def double(x: int) -> int:
        return 2 * x
    return double
"""


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A package ``shape_probe`` with a checked and a compiled module, loaded under the checks."""
    folder = tmp_path / "shape_probe"
    folder.mkdir()
    (folder / "__init__.py").write_text(PROBE)
    (folder / "kernel.py").write_text("import numba\ndef twice(x: int) -> int:\n    return 2 * x\n")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    shapes.install(["shape_probe"])
    try:
        importlib.import_module("shape_probe.kernel")
        yield importlib.import_module("shape_probe")
    finally:
        for name in ("shape_probe", "shape_probe.kernel"):
            sys.modules.pop(name, None)


def test_shapes_are_checked(probe: Any) -> None:
    torch.testing.assert_close(probe.dot(torch.ones(2, 3), torch.ones(3)), torch.full((2,), 3.0))
    for call in (
        lambda: probe.dot(torch.ones(2, 3), torch.ones(2)),  # the axes disagree
        lambda: probe.dot(torch.ones(2, 3, dtype=torch.int64), torch.ones(3)),  # not floating
        lambda: probe.wrong(torch.ones(2, 3)),  # the result
        lambda: probe.size("no size"),  # a protocol
        lambda: probe.Pair(torch.ones(2), torch.ones(3)),  # fields
        lambda: probe.within()("ab"),  # a function within a function
    ):
        with pytest.raises(TypeCheckError, match="violates type hint"):
            call()


def test_the_first_calls_of_a_test_are_checked(probe: Any) -> None:
    for _ in range(shapes.CALLS):
        with pytest.raises(TypeCheckError, match="violates type hint"):
            probe.size("no size")
    with pytest.raises(AttributeError):  # what the function itself says
        probe.size("no size")
    shapes.afresh()
    with pytest.raises(TypeCheckError, match="violates type hint"):
        probe.size("no size")


def test_compiled_modules_are_left_as_written(probe: Any) -> None:
    assert probe.kernel.twice("ab") == "abab"
    assert not hasattr(probe.kernel.twice, "__wrapped__")
    assert hasattr(probe.dot, "__wrapped__")


def test_our_packages_are_checked(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--no-shape-checks"):
        pytest.skip("asked for with --no-shape-checks")
    from hooks.errors import unknown

    with pytest.raises(TypeCheckError, match="violates type hint"):
        unknown(1, "a", [])


@pytest.mark.parametrize("again", [False, True])
def test_every_test_begins_with_all_its_checks(again: bool, request: pytest.FixtureRequest) -> None:
    """The second finds none left if a test does not begin afresh."""
    if request.config.getoption("--no-shape-checks"):
        pytest.skip("asked for with --no-shape-checks")
    from hooks.errors import unknown

    for _ in range(shapes.CALLS):
        with pytest.raises(TypeCheckError, match="violates type hint"):
            unknown(1, "a", [])


def test_shapes_must_be_checked_from_the_start() -> None:
    with pytest.raises(RuntimeError, match="loaded before"):
        shapes.install(["tests"])


def test_what_is_left_behind_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = process_state()
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
        found = changes(before, process_state())
        handle.remove()
    assert [line.partition(":")[0] for line in found] == [
        "torch.is_grad_enabled()",
        "global forward hooks",
        "working directory",
    ]


CASES = """
import socket, torch

def test_tidy(): ...

def test_leaves_a_dtype():
    torch.set_default_dtype(torch.float64)

def test_swallows():
    try:
        socket.getaddrinfo("example.invalid", 9)
    except OSError:
        pass
"""


def test_a_test_that_leaves_something_fails(tmp_path: Path) -> None:
    """The fixture itself, in a pytest of its own."""
    here = Path(__file__).resolve().parent
    shutil.copy(here / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]")
    (tmp_path / "test_cases.py").write_text(CASES)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--no-shape-checks", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(here.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "3 passed, 2 errors" in run.stdout
    assert "left behind: torch.get_default_dtype(): torch.float32 → torch.float64" in run.stdout
    assert "tried the network: socket.getaddrinfo example.invalid" in run.stdout

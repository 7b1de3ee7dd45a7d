"""Fixtures for the tests that train."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def quick_disk() -> Iterator[None]:
    """No fsync: it guards against a power cut, which no test makes, and takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def signals() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal: tests that were started by nohup, or behind ``&``, would ignore them."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, quick_disk: None) -> Path:
    """The folder of a training that nothing interrupted."""
    # Not above: this file is loaded before the import hook that checks shapes is in place.
    from tests.interp import tiny

    out = tmp_path_factory.mktemp("unbroken")
    tiny.go(out)
    return out

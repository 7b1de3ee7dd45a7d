"""What every test runs under: no network, fixed threads, shapes checked, nothing left behind.

* **No network.** An audit hook refuses every connection and every name look-up that is not of this
  machine; the Hugging Face libraries are told that they are offline, subprocesses included.
* **Threads.** torch computes on one thread and the compiled scan on two, whatever the machine has:
  sums come out in the same order everywhere, and the parallel kernel is the one that is tested.
* **Shapes.** Every signature of our packages is checked at run time (``shapes.py``);
  ``--no-shape-checks`` turns it off, for timings.
* **Nothing left behind.** A test that changes process-wide state and does not put it back fails
  and says what it changed.
"""

from __future__ import annotations

import gc
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"
os.environ["TQDM_DISABLE"] = "1"  # under load a test may take longer than progress is silent
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("NUMBA_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # a thread without work leaves its core to the tests beside it

import matplotlib.colors
import pytest
import torch
from torch.nn.modules import module as torch_module

from tests.shapes import afresh, install

# A shell starts what runs in the background with Ctrl-C ignored, which every process below would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PACKAGES = ("hooks", "models", "interp", "analyses")


# --- no network -------------------------------------------------------------------------------


class NetworkUsed(OSError):
    """A test tried to reach another machine.

    An ``OSError``, so that a library with a fallback for machines without a network takes it; the
    attempt still fails the test, because it is written down in ``attempts``.
    """


attempts: list[str] = []


def is_local(host: object) -> bool:
    """Whether ``host`` (a name, an address, or what a socket call takes) means this machine.

    An empty or missing host does (every interface). Other names than ``localhost`` and this
    machine's own do not, because finding out would ask the network.
    """
    if isinstance(host, bytes | bytearray):
        host = bytes(host).decode("ascii", "replace")
    if host is None or host in ("", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def refuse_network(event: str, args: tuple[Any, ...]) -> None:
    """Audit hook: raises ``NetworkUsed`` before a socket call that would leave this machine.

    An audit hook and not a replaced ``socket.socket``: libraries keep their own references to the
    class, and C code calls the methods below it. It cannot be removed, so it lives as long as the
    test process.
    """
    if not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        connection, address = args[0], args[1]
        if connection.family not in (socket.AF_INET, socket.AF_INET6) or not address:
            return
        if is_local(address[0]):
            return
        asked = str(address)
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        if is_local(args[0]):
            return
        asked = str(args[0])
    else:
        return
    attempts.append(f"{event} {asked}")
    raise NetworkUsed(f"{event} {asked}: tests run without a network; make the data in the test")


sys.addaudithook(refuse_network)


# --- shapes in signatures ---------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-shape-checks",
        action="store_true",
        help="do not check shapes in signatures at run time (for timings)",
    )


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if not config.getoption("--no-shape-checks"):
        install(PACKAGES)
    from interp.machine.heap import look_for_cycles_seldom  # not before shapes are checked

    look_for_cycles_seldom()


def pytest_runtest_logstart() -> None:
    afresh()


def pytest_collection_finish() -> None:
    """What is loaded and collected by now lives as long as the process: no look for cycles goes through it again."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process is left with one of them while the others have nothing to do."""
    items.sort(key=lambda item: "tests/analyses/" not in item.nodeid)


# --- nothing left behind ----------------------------------------------------------------------


def process_state() -> dict[str, Any]:
    """Process-wide settings that a test could leave changed, by name."""
    return {
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "global forward hooks": len(torch_module._global_forward_hooks),
        "global forward pre-hooks": len(torch_module._global_forward_pre_hooks),
        "global backward hooks": len(torch_module._global_backward_hooks),
        "working directory": os.getcwd(),
        # By the dictionary below: asked for in the ordinary way, the back end would be chosen now.
        "matplotlib's settings": dict(dict.items(matplotlib.rcParams)),
        "matplotlib's short names of colours": [matplotlib.colors.to_rgb(code) for code in "bgrcmyk"],
    }


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each entry that differs; of a dictionary, for each of its entries."""
    found = []
    for name, one in before.items():
        other = after[name]
        if isinstance(one, dict):
            found += changes(one, other)
        elif one != other:
            found.append(f"{name}: {one} → {other}")
    return found


@pytest.fixture(autouse=True)
def fixed_and_tidy() -> Iterator[None]:
    """The same global seed for every test (initialisers read it), and a look at what it left."""
    torch.manual_seed(0)
    before = process_state()
    attempts.clear()
    yield
    faults = [f"tried the network: {attempt}" for attempt in attempts]
    faults += [f"left behind: {change}" for change in changes(before, process_state())]
    if faults:
        pytest.fail("\n".join(faults))

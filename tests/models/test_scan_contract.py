"""The scan functions as a door: refusals, threads and processes, what a process pays for, the CUDA wrapper."""

from __future__ import annotations

import inspect
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks.errors import BadArgument
from hooks.machine import threads as threading_of_kernels
from hooks.machine.native import compiled
from models.scan import cuda, reference, scan, selective_scan, selective_states
from tests.models.test_scan import NAMES, compare, gradients, operands
from tests.tolerances import assert_matches

# --- refusals ---------------------------------------------------------------------------------

unchecked_scan = inspect.unwrap(scan)  # below the tests' own shape checks
unchecked_selective_scan = inspect.unwrap(selective_scan)
unchecked_selective_states = inspect.unwrap(selective_states)


def spoiled(value: Tensor) -> Iterator[tuple[str, object]]:
    """Everything that an edit or a caller can get wrong about one operand."""
    yield "dtype", value.float()
    yield "dtype", value.long()
    yield "device", value.to("meta")
    yield "tensor", value.numpy()
    yield "shape", value[..., None]
    yield "shape", value[0]
    for axis in range(value.ndim):
        yield "shape", value.narrow(axis, 0, value.shape[axis] - 1)
        yield "shape", value.mean(axis, keepdim=True)
        yield "shape", value.narrow(axis, 0, 0)


@pytest.mark.contract
@pytest.mark.parametrize("name", NAMES)
def test_selective_operands_are_checked(name: str) -> None:
    for reason, wrong in spoiled(operands(3, 4, 5, 2)[name].detach()):
        given: dict[str, object] = {key: value.detach() for key, value in operands(3, 4, 5, 2).items()}
        unchecked_selective_scan(*given.values())
        given[name] = wrong
        with pytest.raises(BadArgument) as error:
            unchecked_selective_scan(*given.values())
        assert "\n" not in str(error.value) and (reason != "dtype" or "dtype" in str(error.value))
        if name != "C":
            del given["C"]
            with pytest.raises(BadArgument):
                unchecked_selective_states(*given.values())


@pytest.mark.contract
@pytest.mark.parametrize("name", ["decay", "write", "h0"])
def test_scan_operands_are_checked(name: str) -> None:
    right = {"decay": torch.rand(3, 4, 5, 2), "write": torch.rand(3, 4, 5, 2), "h0": torch.rand(3, 5, 2)}
    right = {key: value.double() for key, value in right.items()}
    for _, wrong in spoiled(right[name]):
        given: dict[str, object] = dict(right)
        unchecked_scan(*given.values())
        given[name] = wrong
        with pytest.raises(BadArgument, match=r"^[^\n]+$"):
            unchecked_scan(*given.values())


# --- threads ----------------------------------------------------------------------------------


def everything(given: dict[str, Tensor]) -> list[Tensor]:
    """Outputs and gradients of all three functions."""
    y, h_last = selective_scan(*given.values())
    grads = gradients((y, h_last), list(given.values()))
    states = selective_states(*[value for name, value in given.items() if name != "C"])
    decay = torch.sigmoid(states)
    again = scan(decay, states)
    return [y, h_last, *grads, states, again, *gradients((again,), [given["x"]])]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.law
@pytest.mark.parametrize("shape", [(1, 50, 200, 16), (30, 20, 40, 8)], ids=str)
def test_same_bits_for_any_number_of_threads(shape: tuple[int, int, int, int], threads: Callable[[int], None]) -> None:
    given = operands(*shape, dtype=torch.float32)
    threads(1)
    alone = everything(given)
    for number in (2, 3):
        threads(number)
        for one, other in zip(everything(given), alone, strict=True):
            assert torch.equal(one, other)
    from_other_threads: list[list[Tensor]] = []
    others = [threading.Thread(target=lambda: from_other_threads.append(everything(given))) for _ in range(2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(from_other_threads) == 2
    for found in from_other_threads:
        assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))


def in_a_child(given: dict[str, Tensor], answer: Callable[[list[np.ndarray]], None]) -> None:
    # torch's own pool does not survive a fork either, so its users set this in their workers
    torch.set_num_threads(1)
    answer([tensor.detach().numpy() for tensor in everything(given)])


@pytest.mark.law
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_computes_the_same(threads: Callable[[int], None]) -> None:
    given = operands(4, 40, 40, 16, dtype=torch.float32)
    threads(2)
    here = everything(given)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=in_a_child, args=(given, answers.put))
    child.start()
    found = answers.get()
    child.join(60)
    assert child.exitcode == 0
    for one, other in zip(found, here, strict=True):
        assert torch.equal(torch.from_numpy(one), other.detach())


@pytest.mark.law
def test_pool_serves_the_main_thread_of_the_importing_process_only(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands(4, 40, 40, 16, dtype=torch.float32)
    asked: list[int] = []
    pool = threading_of_kernels._pool
    monkeypatch.setattr(threading_of_kernels, "_pool", lambda number: asked.append(number) or pool(number))
    threads(2)
    selective_scan(*given.values())
    assert asked == [1]
    other = threading.Thread(target=lambda: selective_scan(*given.values()))
    other.start()
    other.join()
    monkeypatch.setattr(threading_of_kernels, "_IMPORTING_PROCESS", -1)
    selective_scan(*given.values())
    assert asked == [1]


# --- what a process pays for --------------------------------------------------------------------


@pytest.mark.law
@pytest.mark.slow
def test_numba_is_imported_by_the_first_scan_and_not_before() -> None:
    code = (
        "import sys, torch, models.scan as s; assert 'numba' not in sys.modules;"
        "one = torch.ones(1, 2, 1); s.scan(one, one); assert 'numba' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def kernel_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which machine code is kept."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    return tmp_path


def twice(number: int) -> int:
    return 2 * number


def hits(kernel: Any) -> int:
    """How often machine code was taken from disk, of a kernel that has been called."""
    assert kernel(4) == 8 and kernel(4.0) == 8
    return sum(kernel.stats.cache_hits.values())


def damages(content: bytes) -> Iterator[bytes]:
    yield b""
    yield content[: len(content) // 2]
    yield content[:-1]
    yield bytes([content[0] ^ 1]) + content[1:]
    yield content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]
    yield b"\x80\x05\x95" + bytes(100)  # the beginning of a pickle
    yield b"no pickle at all"


@pytest.mark.law
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_damaged_machine_code_is_compiled_anew(kernel_folder: Path, kind: str) -> None:
    assert hits(compiled(twice)) == 0 and hits(compiled(twice)) == 2
    for file in sorted(kernel_folder.rglob(f"*.{kind}")):
        content = file.read_bytes()
        for damaged in damages(content):
            file.write_bytes(damaged)
            assert hits(compiled(twice)) == (0 if kind == "nbi" else 1)
            assert hits(compiled(twice)) == 2, "it was not written again"


@pytest.mark.law
def test_without_a_folder_for_machine_code_it_is_compiled_each_time(
    kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numba.core import caching

    kernel = compiled(twice)
    assert kernel._cache.cache_path is not None

    def refused(*given: Any) -> None:
        raise PermissionError(13, "Permission denied")

    # The folder is there and can no longer be written to; a disk is full; a folder has gone.
    with monkeypatch.context() as patched:
        patched.setattr(caching.IndexDataCacheFile, "_open_for_write", refused)
        assert hits(kernel) == 0
    assert hits(compiled(twice)) == 0
    given = caching.CompileResultCacheImpl._locator_classes
    named = [one for one in given if one.__name__.strip("_") == "UserProvidedCacheLocator"]
    assert named, "else the next one would be tried, which writes beside this file"
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", named)
    shutil.rmtree(kernel_folder)
    kernel_folder.write_text("a file")
    assert hits(compiled(twice)) == 0
    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    assert hits(compiled(twice)) == 0


@pytest.mark.law
@pytest.mark.slow
def test_with_the_compiler_switched_off_it_is_the_definition_and_one_warning() -> None:
    code = """
import sys, warnings, torch, hooks, models
from interp.attention import matrix
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for name in ("mamba", "s4d", "s4", "linear_attention", "theory"):
        model = models.build(name, **({"d_in": 5} if name == "theory" else {"d_model": 8, "n_layers": 1, "d_in": 5}))
        x = torch.randn(2, 4, 5, requires_grad=True)
        model(x).sum().backward()
        hooks.record(model, x.detach(), "*.hook_state")
        hooks.record(model, x.detach(), "*.hook_write", grad=True)
        assert matrix(model, x.detach(), 0).relative_error < 1e-4
ours = [w for w in seen if "NUMBA_DISABLE_JIT" in str(w.message)]
assert len(ours) == 1 and ours[0].category is RuntimeWarning, seen
assert "models.scan.kernels" not in sys.modules and "models.scan.pair_kernels" not in sys.modules
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr


# --- CUDA: the wrapper, around a stand-in for mamba_ssm's function ------------------------------


@pytest.fixture
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A selective_scan_fn with mamba_ssm's layout, and without the derivatives that mamba_ssm does not have."""
    calls: list[str] = []

    def selective_scan_fn(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, return_last_state: bool
    ) -> tuple[Tensor, Tensor]:
        calls.append("mamba_ssm")
        u, delta, B, C = (tensor.transpose(1, 2) for tensor in (u, delta, B, C))
        y, h_last = reference.selective_scan(u, delta, delta, A, B, C)
        return y.transpose(1, 2), h_last.detach()

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[names[-1]].selective_scan_fn = selective_scan_fn  # type: ignore[attr-defined]
    monkeypatch.setattr(cuda, "_installed", lambda: True)
    return calls


@pytest.mark.definition
def test_mamba_ssm_is_used_where_it_applies(mamba_ssm: list[str]) -> None:
    given = operands(2, 9, 5, 3, dtype=torch.float32)
    delta = given["delta_decay"]
    x, A, B, C = (given[name] for name in ("x", "A", "B", "C"))

    def both(function: Callable[..., tuple[Tensor, Tensor]], last: bool) -> list[Tensor]:
        y, h_last = function(x, delta, delta, A, B, C, None)
        loss = y.square().sum() + (h_last.square().sum() if last else 0)
        first = torch.autograd.grad(loss, [x, delta, A, B, C], retain_graph=True)
        (slope,) = torch.autograd.grad(loss, delta, create_graph=True)
        return [y, h_last, *first, torch.autograd.grad(slope.square().sum(), delta)[0]]

    for last in (False, True):
        for one, other in zip(both(cuda.selective_scan, last), both(reference.selective_scan, last), strict=True):
            assert_matches(one, other)
    assert mamba_ssm == ["mamba_ssm"] * 2
    # two deltas, a carried state or float64 are beyond it
    cuda.selective_scan(x, delta, given["delta_write"], A, B, C, None)
    cuda.selective_scan(x, delta, delta, A, B, C, given["h0"])
    cuda.selective_scan(*(value.double() for value in (x, delta, delta, A, B, C)), None)
    assert mamba_ssm == ["mamba_ssm"] * 2


@pytest.mark.definition
def test_inside_a_transform_it_is_the_definition(mamba_ssm: list[str]) -> None:
    given = operands(2, 9, 5, 3, dtype=torch.float32)
    x, delta, A, B, C = (given[name].detach() for name in ("x", "delta_decay", "A", "B", "C"))

    def number(delta: Tensor) -> Tensor:
        return cuda.selective_scan(x, delta, delta, A, B, C, None)[0].square().sum()

    leaf = delta.clone().requires_grad_()
    (expected,) = torch.autograd.grad(number(leaf), leaf)
    assert mamba_ssm == ["mamba_ssm"]
    assert_matches(torch.func.grad(number)(delta), expected)
    assert_matches(torch.func.jacfwd(number)(delta), expected)
    assert_matches(torch.vmap(torch.func.grad(number))(delta[None])[0], expected)
    assert mamba_ssm == ["mamba_ssm"]
    both = torch.autograd.functional.jacobian(lambda d: torch.stack([number(d), 2 * number(d)]), delta, vectorize=True)
    assert_matches(both[1], 2 * expected)


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_the_definition() -> None:
    given = {name: value.detach().cuda().requires_grad_() for name, value in operands(2, 33, 16, 8).items()}
    compare(selective_scan, reference.selective_scan, given)

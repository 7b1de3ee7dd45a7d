"""Hooks are put on by one thread at a time, as a whole, and come off whatever happens."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import hooks
from hooks import placed
from hooks.errors import BadArgument
from hooks.point import unhooked
from interp.machine.workers import side_by_side

OUT, DELTA, STATE = "head.hook_out", "blocks.0.mixer.hook_delta", "blocks.1.mixer.hook_state"
HOOKED: dict[str, Callable[[Any, Tensor], Any]] = {
    "edit": lambda m, x: hooks.edit(m, {DELTA: hooks.zero()}).__enter__(),
    "a state": lambda m, x: hooks.edit(m, hooks.do_state(0, [1], 0.0)).__enter__(),
    "reference": lambda m, x: hooks.edit(m, {DELTA: hooks.mean("batch", reference=x)}).__enter__(),
    "expose": lambda m, x: hooks.expose(m).__enter__(),
    "record": lambda m, x: hooks.record(m, x, DELTA),
    "model.hooks": lambda m, x: m.hooks(fwd_hooks=[(DELTA, lambda t, hook: t)]).__enter__(),
    "run_with_hooks": lambda m, x: m.run_with_hooks(x, fwd_hooks=[(DELTA, lambda t, hook: t)]),
    "run_with_cache": lambda m, x: m.run_with_cache(x),
    "add_hook": lambda m, x: m.add_hook(DELTA, lambda t, hook: t),
    "add_caching_hooks": lambda m, x: m.add_caching_hooks(DELTA),
    "reset_hooks": lambda m, x: m.reset_hooks(),
    "a plain run": lambda m, x: m(x),
}


def elsewhere(run: Callable[[], Any]) -> Any:
    """What ``run()`` gives or raises in another thread."""
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(run())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, name="the other")
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.hygiene
@pytest.mark.parametrize("what", HOOKED)
def test_a_second_thread_is_told_and_changes_nothing(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]], what: str
) -> None:
    model = make()
    with hooks.edit(model, {OUT: hooks.zero()}):
        before = leftovers(model)
        error = elsewhere(lambda: HOOKED[what](model, x))
        assert isinstance(error, hooks.RunFailed), error
        assert "MainThread" in str(error) and "copy.deepcopy(model)" in str(error) and "\n" not in str(error)
        assert leftovers(model) == before
        assert_close(model(x), torch.zeros(4, 11, 2, dtype=x.dtype), rtol=0, atol=0)
        copied = copy.deepcopy(model)
        assert not isinstance(elsewhere(lambda: copied(x)), Exception)
    assert not isinstance(elsewhere(lambda: model(x)), Exception)


@pytest.mark.hygiene
def test_hooks_are_not_put_into_another_thread_s_run(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    inside, go_on = threading.Event(), threading.Event()

    def wait(*call: Any) -> None:
        inside.set()
        go_on.wait(10)

    handle = model.blocks[0].register_forward_pre_hook(wait)
    thread = threading.Thread(target=model, args=(x,))
    thread.start()
    assert inside.wait(10)
    with pytest.raises(hooks.RunFailed, match="another thread is running this model"):
        hooks.record(model, x, DELTA)
    go_on.set()
    thread.join()
    hooks.record(model, x, DELTA)
    handle.remove()


@pytest.mark.hygiene
def test_what_was_removed_meanwhile_does_not_come_back(make: Callable[..., Any], x: Tensor) -> None:
    """By its handle, and the end of another block: ``unhooked`` holds no list of its own of what was there."""
    model = make()
    clean = model(x)
    edit = hooks.edit(model, {OUT: hooks.zero(), STATE: hooks.scale(0.5)})
    handle = model.hook_dict[OUT].register_forward_hook(lambda *call: call[2] + 1)
    edit.__enter__()
    model(x)
    with unhooked(model):
        handle.remove()
        edit.__exit__(None, None, None)
        assert_close(model(x), clean)
    assert_close(model(x), clean)


@pytest.mark.hygiene
def test_what_a_stopped_thread_left_is_taken_off(
    make: Callable[..., Any], x: Tensor, leftovers: Callable[[Any], list[str]]
) -> None:
    model = make()
    clean = model(x)
    blocks: list[Any] = []

    def stopped() -> None:
        blocks.append(hooks.edit(model, {OUT: hooks.zero(), STATE: hooks.zero()}))
        blocks[-1].__enter__()  # and ended before the block was over

    elsewhere(stopped)
    assert leftovers(model)
    assert_close(model(x), clean)
    assert not leftovers(model)
    elsewhere(stopped)
    with hooks.edit(model, {DELTA: lambda delta: delta}):
        assert_close(model(x), clean, rtol=1e-10, atol=1e-10)


@pytest.mark.hygiene
def test_the_owner_is_no_part_of_the_model(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    names = set(model.state_dict())
    with hooks.edit(model, {OUT: hooks.zero()}):
        assert set(model.state_dict()) == names
        copied = copy.deepcopy(model)
        assert placed.owner(copied) is not placed.owner(model) is placed.owner(copy.copy(model))
        copied.reset_hooks()
        assert_close(copied(x), model.__class__.forward(copied, x))
        model(x)
        with pytest.raises(BadArgument, match=r"cannot be pickled \(.*\): leave the with block"):
            pickle.dumps(model)
    assert pickle.dumps(model)
    kept = copy.deepcopy(model)
    kept.add_hook(OUT, lambda value, hook: value * 2)
    assert_close(copy.deepcopy(kept)(x), kept(x))


@pytest.mark.hygiene
def test_copies_are_worked_on_side_by_side(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    copies = [copy.deepcopy(model) for _ in range(3)]

    def job(index: int) -> Tensor:
        with hooks.edit(copies[index], {OUT: hooks.add(float(index))}):
            return hooks.record(copies[index], x, OUT)[OUT]

    torch.set_num_threads(2)
    try:
        found = side_by_side([lambda index=index: job(index) for index in range(3)])
    finally:
        torch.set_num_threads(1)
    for index, values in enumerate(found):
        assert_close(values, model(x) + index)


@pytest.mark.hygiene
@pytest.mark.parametrize(
    "blocks",
    [
        ("edit:71", "hooks:131", "record:997", "cache:997", "expose:53", "reference:4999"),
        ("edit:1", "hooks:1", "record:7", "cache:7", "expose:1", "reference:61"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_leaves_nothing_on_a_model(blocks: tuple[str, ...]) -> None:
    root = Path(hooks.__file__).parents[1]
    command = [sys.executable, "-m", "tests.hooks.interrupts", *blocks]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [block.split(":")[0] for block in blocks]


@pytest.mark.hygiene
def test_a_handler_of_the_user_s_own_is_asked_and_put_back(make: Callable[..., Any], x: Tensor) -> None:
    model, asked = make(), []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    try:
        theirs = signal.getsignal(signal.SIGINT)
        with hooks.edit(model, {OUT: hooks.zero()}):
            model(x)
            signal.raise_signal(signal.SIGINT)
            assert asked == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) is theirs
        with hooks.edit(model, {OUT: hooks.zero()}):
            model(x)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "what was set inside the block stays"
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.hygiene
def test_an_interrupt_of_a_run_acts_at_once(make: Callable[..., Any], x: Tensor) -> None:
    """In the run of reference prompts too, which may be the longest part of setting up."""
    model = make()
    reached: list[str] = []

    def interrupt(*call: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append("the line after")

    for run in (
        lambda: hooks.record(model, x),
        lambda: hooks.edit(model, {DELTA: hooks.mean("batch", reference=x)}).__enter__(),
    ):
        handle = model.blocks[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
        handle.remove()
    assert not reached

"""What is put on a model for a while: by one thread at a time, as a whole, and taken off again whatever happens.

*One thread.* Hooks belong to the model and not to a thread: what one thread puts on acts in the runs of all. So a model
that one thread has hooks on can neither be hooked nor run by another. A deep copy of a model has an owner of its own.

*As a whole.* Ctrl-C comes between any two steps of the interpreter, so also between putting a hook on and noting that
it has to come off, and at the first step of an ``__exit__``. While something is on a model, SIGINT is therefore looked
at here: where it falls into a function that is not to be split (:func:`unsplit`) it waits until that is over, else it
acts at once, and then as it would have without us. Threads other than the main one are given no signals.
"""

from __future__ import annotations

import functools
import inspect
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, _GeneratorContextManager
from types import CodeType, FrameType
from typing import Any, ParamSpec, TypeVar, cast

from hooks.errors import RunFailed
from hooks.recompute import in_backward

P = ParamSpec("P")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_UNSPLIT: set[CodeType] = set()
_OPEN: set[CodeType] = set()
"""Where an interrupt acts at once although what called it is not to be split: :func:`opened`."""


def unsplit(function: F) -> F:
    """``function``, which no Ctrl-C splits while something is on a model; one that came meanwhile acts at its end."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        _deliver(sys._getframe(1))
        return result

    _UNSPLIT.add(inspect.unwrap(function).__code__)
    return cast(F, call)


def whole(function: Callable[P, Iterator[T]]) -> Callable[P, _GeneratorContextManager[T]]:
    """``contextlib.contextmanager``, with nothing left undone by a Ctrl-C on the way into the block or out of it."""
    _UNSPLIT.add(inspect.unwrap(function).__code__)

    @functools.wraps(function)
    def make(*args: P.args, **kwargs: P.kwargs) -> _GeneratorContextManager[T]:
        return _Whole(function, args, kwargs)  # type: ignore[arg-type]  # an iterator made by a generator function

    return make


def opened(run: Callable[[], T]) -> T:
    """``run()``, which may take long: an interrupt acts in it although what calls this is not to be split."""
    return run()


_OPEN.add(inspect.unwrap(opened).__code__)


class _Whole(_GeneratorContextManager):  # type: ignore[type-arg]
    def __enter__(self) -> Any:
        try:
            value = super().__enter__()
            _deliver(sys._getframe(1))
            return value
        except BaseException:
            self.gen.close()
            raise

    def __exit__(self, *error: Any) -> Any:
        try:
            return super().__exit__(*error)
        finally:
            _deliver(sys._getframe(1))


class Placed:
    """A block at whose end everything comes off ``model`` that was put on through it.

    Raises :class:`RunFailed` where another thread has something on the model, or runs it.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.owner, self.undos = model, owner(model), ExitStack()

    def __enter__(self) -> Placed:
        try:
            _guard(self)
            self.owner.take(self)
            _deliver(sys._getframe(1))
            return self
        except BaseException:
            self.close()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            self.close()
        finally:
            _deliver(sys._getframe(1))

    @unsplit
    def put(self, change: Callable[[], T], undo: Callable[[], object]) -> T:
        """``change()``; at the end of the block ``undo()``."""
        self.undos.callback(undo)
        return change()

    @unsplit
    def hook(self, point: Any, fn: Callable[..., Any], direction: str = "fwd", reads: bool = False) -> None:
        """Put ``fn`` on a HookPoint; ``reads`` promises that it changes nothing."""
        handle = point.add_hook(fn, direction)
        self.undos.callback(_remove, point, handle, direction)
        if reads:
            point.__dict__.setdefault("readers", set()).add(handle.hook.id)

    def close(self) -> None:
        """Take everything off, the last first."""
        try:
            self.undos.close()
        finally:
            self.owner.give(self)
            _unguard(self)


_UNSPLIT.update(
    inspect.unwrap(function).__code__
    for function in (_Whole.__enter__, _Whole.__exit__, Placed.__enter__, Placed.__exit__, Placed.close)
)


def _remove(point: Any, handle: Any, direction: str) -> None:
    handle.hook.remove()
    getattr(point, "readers", set()).discard(handle.hook.id)
    # Looked up now: TransformerLens puts a new list in its place whenever it removes hooks.
    listed = point.fwd_hooks if direction == "fwd" else point.bwd_hooks
    listed[:] = [kept for kept in listed if kept is not handle]


# --- one thread -------------------------------------------------------------------------------


class Owner:
    """Which thread has something on a model."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.thread: threading.Thread | None = None
        self.placed: list[Placed] = []

    def check(self, what: str) -> None:
        """Raise :class:`RunFailed` where another thread has something on the model."""
        other = self.thread
        if other is not None and other is not threading.current_thread() and other.is_alive():
            raise RunFailed(
                f'this model cannot be {what} here: the thread "{other.name}" has hooks or edits on it, which act in '
                "every thread; give each thread a copy (copy.deepcopy(model)), or wait for the end of its with block"
            )

    def tidy(self) -> None:
        """Take off what a thread has left that was stopped where it was."""
        with self.lock:
            if self.thread is not None and not self.thread.is_alive():
                for left in reversed(self.placed.copy()):
                    left.close()

    def take(self, placed: Placed) -> None:
        """The thread that this is called from has something on the model from now on."""
        with self.lock:
            self.check("hooked")
            _check_runs(placed.model)
            self.tidy()
            self.thread = threading.current_thread()
            self.placed.append(placed)

    def give(self, placed: Placed) -> None:
        """``placed`` is over."""
        with self.lock:
            if placed in self.placed:
                self.placed.remove(placed)
            if not self.placed:
                self.thread = None


_owners: weakref.WeakKeyDictionary[Any, Owner] = weakref.WeakKeyDictionary()
_owners_lock = threading.RLock()


def owner(model: Any) -> Owner:
    """The :class:`Owner` of ``model``: that of its first point, so that who shares the points shares the owner."""
    first = next(iter(model.hook_dict.values()), model)
    found = _owners.get(first)
    if found is None:
        with _owners_lock:
            found = _owners.setdefault(first, Owner())
    return found


def run_alone(model: Any, run: Callable[[], T]) -> T:
    """``run()``, a run of ``model``; raises :class:`RunFailed` where another thread has something on it.

    A run that is made again for the backward pass is the other's own: on a GPU it is made by a thread of autograd's.
    """
    held = owner(model)
    if held.thread is not None and not in_backward():
        held.check("run")
        held.tidy()
    return run()


def _check_runs(model: Any) -> None:
    """Raise :class:`RunFailed` where another thread is in the middle of a run of ``model``."""
    if threading.active_count() == 1:
        return
    runs, me = inspect.unwrap(run_alone).__code__, threading.get_ident()
    for thread, top in sys._current_frames().items():
        frame: FrameType | None = top
        while frame is not None and thread != me:
            if frame.f_code is runs and frame.f_locals.get("model") is model:
                raise RunFailed(
                    "another thread is running this model, and hooks act in every thread: "
                    "give each thread a copy (copy.deepcopy(model)), or wait for the end of that run"
                )
            frame = frame.f_back


# --- as a whole -------------------------------------------------------------------------------

_blocks: set[int] = set()
_ours: list[Callable[..., None]] = []
"""The handler that is installed, if one is."""
_waiting: list[tuple[Callable[..., Any], int]] = []


def _interrupted(before: Callable[..., Any], number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT while something is on a model, in the place of ``before``."""
    at = frame
    while at is not None and at.f_code not in _OPEN:
        if at.f_code in _UNSPLIT:
            _waiting.append((before, number))
            return
        at = at.f_back
    before(number, frame)


def _deliver(frame: FrameType) -> None:
    """Let a Ctrl-C that has waited act in ``frame``, unless that is part of what is not to be split either."""
    if _waiting and threading.current_thread() is threading.main_thread():
        before, number = _waiting.pop()
        _waiting.clear()
        _interrupted(before, number, frame)


def _guard(block: object) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGINT)
    if not _blocks and callable(before):
        _ours[:] = [functools.partial(_interrupted, before)]
        signal.signal(signal.SIGINT, _ours[0])
    _blocks.add(id(block))


def _unguard(block: object) -> None:
    if id(block) not in _blocks or threading.current_thread() is not threading.main_thread():
        return
    _blocks.discard(id(block))
    if not _blocks and _ours and signal.getsignal(signal.SIGINT) is _ours[0]:
        signal.signal(signal.SIGINT, _ours.pop().args[0])  # type: ignore[attr-defined]

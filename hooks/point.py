"""HookPoint and HookedModule: TransformerLens' classes, with what they leave silent made loud.

What is added to ``HookedRootModule``:

* names that match nothing raise :class:`UnknownSite` in every entry point (``hooks``, ``add_hook``,
  ``run_with_hooks``, ``run_with_cache``, ``get_caching_hooks``, ``add_caching_hooks``), and a hook or a cache whose
  site never fires raises :class:`DidNotFire`;
* ``run_with_cache`` returns an ``ActivationCache``, takes ``fwd_hooks`` and ``bwd_hooks``, slices positions
  on each site's own axis (``pos_slice``) and refuses what would not fit in memory (``max_memory``);
* :func:`emit` calls a point and conforms what comes out to the site's shape, because a compiled scan does not check
  shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint
from transformer_lens.utilities.slice import Slice

from hooks.cache import Cache
from hooks.errors import BadArgument, DidNotFire, NonFinite, told
from hooks.finite import check_divisor, note
from hooks.gradients import check_gradient, trace
from hooks.inputs import no_gradients, readable
from hooks.memory import check_memory
from hooks.onlookers import state_edits, tracing, watched
from hooks.placed import Placed, owner, unsplit, whole
from hooks.recompute import in_backward, passed
from hooks.vocabulary import HEAD_OUT, SITES, Pattern, resolve

Hook = Callable[..., Any]
HookList = Sequence[tuple[Pattern, Hook]]
DIVISORS = ("hook_scale", "hook_norm")
"""Sites that divide what follows: an inf in one is a 0 behind it, finite and wrong."""


class Point(HookPoint):
    """TransformerLens' HookPoint; what comes out of it is a tensor like the one that went in, or it is an error.

    ``shared`` says that somebody else needs the value as it is (the caller, another site, autograd for its own
    backward): then a hook that writes in place is given a copy. ``divides``: what follows is divided by it.
    ``listed``: what it is listed as, where that is not its ``name``.
    """

    shared = False
    divides = False
    listed: str | None = None

    def __call__(self, value: Tensor) -> Tensor:
        return emit(self, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Point:
        """A copy with its hooks, as of any module."""
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and ``torch.save``, which cannot take what TransformerLens makes of a hook."""
        if self.fwd_hooks or self.bwd_hooks:
            raise BadArgument(
                f"a model with hooks or edits on it cannot be pickled ({self.listed or self.name} has one): leave the "
                "with block or call model.reset_hooks() first; copy.deepcopy(model) takes them along"
            )
        return self.__dict__.copy()

    @unsplit
    def add_hook(self, hook: Hook, dir: Literal["fwd", "bwd"] = "fwd", *options: Any, **more: Any) -> Any:  # type: ignore[override]
        """TransformerLens' ``add_hook``; what a forward hook returns is checked before the next one is given it."""
        if dir != "fwd":
            return super().add_hook(hook, dir, *options, **more)
        handle = super().add_hook(cast(Any, _Conforming(hook)), dir, *options, **more)
        handle.user_hook = hook
        return handle


class _Conforming:
    """A forward hook whose result has the shape and dtype of what it was given (with heads apart, where it was)."""

    def __init__(self, hook: Hook) -> None:
        self.hook = hook

    def __call__(self, tensor: Tensor, *, hook: Any) -> Any:
        out = self.hook(tensor, hook=hook)
        return None if out is None else _conformed(out, tensor, hook.name)


def site(kind: str, *, parts: int = 1, axes: tuple[str, ...] | None = None) -> Point:
    """A hook point for a kind of site in the vocabulary, with its position axis set.

    ``parts`` is 2 where a complex tensor appears as real parts followed by imaginary parts on the last axis. ``axes``
    are the site's own where it has others than the vocabulary says (heads), with the position where it was.
    """
    point = Point()
    point.divides = kind in DIVISORS  # type: ignore[assignment]
    point.pos_dim = (HEAD_OUT if kind == "head.hook_out" else SITES[kind]).pos_dim
    point.parts = parts  # type: ignore[assignment]
    point.axes = axes  # type: ignore[assignment]
    point.exposed = 0  # type: ignore[assignment]
    point.interrupts = []  # type: ignore[assignment]
    return point


def as_ours(point: HookPoint, name: str) -> None:
    """Make a HookPoint of TransformerLens' a :class:`Point` listed as ``name``; who knows it goes on knowing it.

    It is ``shared``: there, one tensor goes through several points and past them.
    """
    if not isinstance(point, Point):
        point.__class__ = Point
        point.shared, point.divides = True, name.endswith(DIVISORS)  # type: ignore[assignment]
        point.listed = name  # type: ignore[assignment]


def emit(point: nn.Module, value: Tensor, *, shared: bool = False) -> Tensor:
    """What comes out of ``point``, conformed to the shape and dtype of ``value``.

    An edit may return something smaller that broadcasts (a mean with kept dimensions); it is expanded here.
    ``shared``: as an attribute of :class:`Point`.
    Raises :class:`BadArgument` for another number of axes, a shape that does not broadcast, another device, or
    something that is not a real tensor: a compiled scan would read out of bounds.
    """
    if not watched(point):
        if in_backward():
            passed(point, False)
        if getattr(point, "divides", False):
            check_divisor(point, value)
        if tracing(point):
            note(point, value)
        return value
    if shared or getattr(point, "shared", False):
        value = value.clone(memory_format=torch.contiguous_format)
    if value.requires_grad and "forward" in point.__dict__:
        # nnsight cuts a gradient by the strides of the value; autograd may hand it over with others.
        value.register_hook(_contiguous)
    version = None if value.is_inference() else value._version
    out = nn.Module.__call__(point, value) if isinstance(point, Point) else point(value)
    # An edit of the state has been made before the state gets here.
    changed = out is not value or version is None or value._version != version or bool(state_edits(point))
    if out is not value:
        out = _conformed(out, value, getattr(point, "listed", None) or getattr(point, "name", None) or "a hook point")
    if changed or in_backward():
        passed(point, changed)
    if changed or tracing(point):
        note(point, out)
    if getattr(point, "divides", False):
        check_divisor(point, out)
    return out


def _conformed(out: Any, value: Tensor, name: str) -> Tensor:
    if not isinstance(out, Tensor):
        raise BadArgument(
            f"the edit of {name} returned {type(out).__name__}: return a tensor like the one it was given"
        )
    if out.device != value.device:
        raise BadArgument(f"the edit of {name} returned a tensor on {out.device}, the model is on {value.device}")
    if out.ndim != value.ndim or any(a not in (1, b) for a, b in zip(out.shape, value.shape, strict=True)):
        raise BadArgument(f"the edit of {name} returned shape {tuple(out.shape)}, the site has {tuple(value.shape)}")
    if out.is_complex() or out.dtype == torch.bool:
        raise BadArgument(f"the edit of {name} returned {out.dtype}: the site holds {value.dtype}")
    out = out.to(value.dtype)
    return out if out.shape == value.shape else out.expand(value.shape).contiguous()


def _contiguous(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else gradient.contiguous()


class HookedModule(HookedRootModule):
    """Root of a model with sites. Call ``setup()`` last in ``__init__``.

    A subclass gives ``cfg`` (with ``n_layers`` and ``d_model``) and :meth:`axis_sizes`; its ``forward`` sets
    ``last_stop`` to the ``stop_at_layer`` that it ran with, ``tokens_before`` to how many tokens of the sequence came
    before (None where nobody knows), and counts its runs in ``runs``. A point may be listed under another name than its
    own (``aliases``: other name → listed name); hooks are told the listed one.
    """

    cfg: Any
    aliases: Mapping[str, str] = MappingProxyType({})
    runs: int = 0
    last_stop: int | None = None
    tokens_before: int | None = 0

    def axis_sizes(self) -> dict[str, int]:
        """Size of every named axis that does not depend on the input."""
        raise NotImplementedError

    def add_hook(
        self,
        name: Pattern,
        hook: Hook,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add ``hook`` to every site that ``name`` picks (name, glob, list or predicate); it stays until reset."""
        owner(self).check("hooked")
        for found in resolve(self, name):
            _attach(self, found, hook, dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def remove_all_hook_fns(
        self,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove hooks, and with all forward hooks the edits of ``hook_state`` that ``hooks.edit`` made."""
        owner(self).check("unhooked")
        super().remove_all_hook_fns(direction, including_permanent, level)
        if level is None and direction != "bwd":
            for point in self.hook_points():
                getattr(point, "interrupts", []).clear()

    @whole
    def hooks(  # type: ignore[override]
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedModule]:
        """Temporary hooks, TransformerLens' idiom: ``fwd_hooks=[(name or glob or predicate, fn(tensor, hook))]``.

        Raises :class:`UnknownSite` before anything is added, and :class:`DidNotFire` on a clean exit when the
        model ran inside and a hook did not fire (one of its matches, where it was a glob or a predicate).
        """
        groups: list[_Group] = []
        for direction, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
            for pattern, hook in pairs:
                groups.append(_Group(direction, resolve(self, pattern), hook))
        before = self.runs
        level = self.context_level + 1
        with Placed(self) as placed:
            placed.put(
                lambda: setattr(self, "context_level", level),
                lambda: self._leave(level, reset_hooks_end, clear_contexts),
            )
            for group in groups:
                for name in group.names:
                    _attach(self, name, group, group.direction, level=level)
            yield self
        if self.runs > before:
            for group in groups:
                if not group.fired and (group.direction == "fwd" or reset_hooks_end):
                    raise DidNotFire(why_silent(self, group.names, group.direction))

    def _leave(self, level: int, reset: bool, clear_contexts: bool) -> None:
        if reset:
            self.reset_hooks(clear_contexts, including_permanent=False, level=level)
        self.context_level = level - 1

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """The model's output under temporary hooks; TransformerLens' idiom.

        A backward hook needs ``reset_hooks_end=False`` here, or ``model.hooks(bwd_hooks=...)`` around both
        passes; otherwise it could never fire and :class:`BadArgument` says so.
        """
        if bwd_hooks and reset_hooks_end:
            raise BadArgument(
                "run_with_hooks would remove its bwd_hooks before a backward pass: use "
                "`with model.hooks(bwd_hooks=...)` around both passes, or reset_hooks_end=False"
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self.forward(*model_args, **model_kwargs)

    def run_with_cache(  # type: ignore[override]
        self,
        *model_args: Any,
        names_filter: Pattern = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        max_memory: int | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, Cache]:
        """``(output, ActivationCache)`` of one run; without a filter the cache holds every site.

        ``names_filter``: name, glob, list or predicate. ``pos_slice``: int, tuple, slice or list, taken on each
        site's own position axis (sites without positions are kept whole). ``fwd_hooks`` run before the cache
        reads. ``max_memory``: bytes that the cache may take, half of what is free by default.
        ``incl_bwd`` needs a model whose output is one number. Raises :class:`UnknownSite`, :class:`TooLarge` (before
        the forward), :class:`DidNotFire`, :class:`BadArgument` for an input that the model cannot read.
        """
        names = resolve(self, names_filter, "names_filter")
        given = model_args[0] if model_args else model_kwargs.get("x")
        tokens = readable(self, given, model_kwargs=model_kwargs)
        check_memory(self, tokens, names, max_memory, copies=2 if incl_bwd else 1)
        if remove_batch_dim and tokens.shape[0] != 1:
            raise BadArgument(f"remove_batch_dim needs one prompt, this batch has {tokens.shape[0]}")
        cache, forward, backward = self.get_caching_hooks(
            names, incl_bwd, device, remove_batch_dim=remove_batch_dim, pos_slice=pos_slice
        )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            for name, hook in forward:
                self.hook_dict[name].add_hook(hook, "fwd", level=self.context_level)
            for name, hook in backward:
                self.hook_dict[name].add_hook(hook, "bwd", level=self.context_level)
            output = self(*model_args, **model_kwargs)
            if incl_bwd:
                try:
                    _one_number(output).backward()
                except NonFinite as error:
                    others = {name: value for name, value in model_kwargs.items() if name != "x"}
                    trace(error, self, tokens, lambda again: again, **others)
        for direction, suffix in (("fwd", ""), *([("bwd", "_grad")] if incl_bwd else [])):
            silent = [name for name in names if name + suffix not in cache]
            if silent and (names_filter is not None or len(silent) == len(names)):
                raise DidNotFire(why_silent(self, silent, direction))
        return output, Cache(cache, self, has_batch_dim=not remove_batch_dim)

    def get_caching_hooks(  # type: ignore[override]
        self,
        names_filter: Pattern = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: Any = None,
    ) -> tuple[dict[str, Tensor], list[tuple[str, Hook]], list[tuple[str, Hook]]]:
        """``(cache, forward hooks, backward hooks)`` that fill ``cache`` when they run; adds nothing to the model."""
        store: dict[str, Tensor] = {} if cache is None else cache
        names = resolve(self, names_filter, "names_filter")
        cut = Slice.unwrap(pos_slice)
        saves = {
            name: partial(
                _save,
                name=name,
                pos_dim=self.hook_dict[name].pos_dim,
                store=store,
                device=device,
                drop_batch=remove_batch_dim,
                pos_slice=cut,
            )
            for name in names
        }
        forward: list[tuple[str, Hook]] = [(name, partial(save, suffix="")) for name, save in saves.items()]
        backward: list[tuple[str, Hook]] = [(name, partial(save, suffix="_grad")) for name, save in saves.items()]
        return store, forward, backward if incl_bwd else []

    def add_caching_hooks(  # type: ignore[override]
        self,
        names_filter: Pattern = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """A dict that later runs fill; the hooks stay until ``reset_hooks()``."""
        owner(self).check("hooked")
        store, forward, backward = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for name, hook in forward:
            self.hook_dict[name].add_hook(hook, "fwd")
        for name, hook in backward:
            self.hook_dict[name].add_hook(hook, "bwd")
        return store


def _one_number(output: Any) -> Tensor:
    """``output``, if a backward pass can start at it; else :class:`BadArgument`."""
    if not isinstance(output, Tensor) or output.numel() != 1:
        raise BadArgument(
            f"incl_bwd=True starts a backward pass at the output, which is {told(output)} and not one number: take "
            "the three of get_caching_hooks(names, incl_bwd=True) and call backward() on a loss inside model.hooks(…)"
        )
    if not output.requires_grad:
        raise BadArgument(f"incl_bwd=True has no gradient to follow: {no_gradients()}")
    return output


class _Group:
    """One user hook on the sites that one pattern picked; knows whether it ever fired."""

    def __init__(self, direction: Any, names: list[str], hook: Hook) -> None:
        self.direction, self.names, self.hook, self.fired = direction, names, hook, 0

    def __call__(self, tensor: Tensor, hook: Any) -> Any:
        self.fired += 1
        if self.direction == "bwd":
            check_gradient(tensor, hook.name)
        return self.hook(tensor, hook=hook)


def one_gradient(made: Any) -> Any:
    """What a backward hook made, without the tuple that torch's own hooks return it in."""
    return made[0] if isinstance(made, tuple) and len(made) == 1 else made


def _backward(gradient: Tensor, hook: Any, *, made_by: Hook) -> Any:
    return one_gradient(made_by(gradient, hook=hook))


def _attach(model: Any, name: str, hook: Hook, direction: Any, **options: Any) -> None:
    point = model.hook_dict[name]
    if direction == "bwd":  # TransformerLens takes heads apart where a site has them, and knows tensors only
        hook = partial(_backward, made_by=hook)
    point.add_hook(hook, direction, alias_names=None if point.name == name else [name], **options)


def _save(
    tensor: Tensor,
    hook: Any,
    *,
    name: str,
    pos_dim: int | None,
    store: dict[str, Tensor],
    suffix: str,
    device: Any,
    drop_batch: bool,
    pos_slice: Slice,
) -> None:
    if suffix:
        check_gradient(tensor, name)
    value = tensor.detach().to(device)
    if pos_dim is not None:
        value = pos_slice.apply(value, dim=pos_dim)
    store[name + suffix] = value[0] if drop_batch else value


def why_silent(model: Any, names: Sequence[str], direction: str = "fwd", ran: bool = True) -> str:
    """One line on why the sites ``names`` did not fire; ``ran`` says whether the model was run at all."""
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    if not ran:
        return f"{shown} did not fire: the model was not run inside"
    if direction == "bwd":
        return (
            f"no gradient reached {shown}: was backward() called inside, does the output depend on it, "
            "and is it not overwritten by a constant edit?"
        )
    stop = getattr(model, "last_stop", None)
    if stop is not None:
        return f"{shown} did not fire: the run ended at stop_at_layer={stop}"
    return f"{shown} did not fire: the model was not run inside, or this run does not pass there"


@whole
def unhooked(model: Any) -> Iterator[None]:
    """Inside the block no hook and no edit is on the sites of ``model``; afterwards those are that were not removed."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "interrupts")
    held = [
        (point.__dict__, table) for point in model.hook_dict.values() for table in tables if table in point.__dict__
    ]
    with Placed(model) as placed:
        for own, table in held:
            # Another in its place, and not emptied: handles remove from the very object that is held here.
            full = own[table]
            placed.put(partial(own.__setitem__, table, type(full)()), partial(own.__setitem__, table, full))
        yield

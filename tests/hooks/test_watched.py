"""Which path the scan takes: the materialised one exactly where somebody looks at a 4-D site, else the fused one."""

# ruff: noqa: SIM117, for nnsight needs its `with` on a line of its own

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from nnsight import NNsight
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import hooks

VARIANTS = ["mamba", "lti", "s4d"]
FULL = ["hook_decay", "hook_write", "hook_state"]
LAYER = "blocks.1.mixer."


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FULL)
def test_reading_a_full_site_takes_the_layer_off_the_fused_path_and_no_longer(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], variant: str, kind: str
) -> None:
    model = make(variant)
    fused = model(x)
    assert count_fused() == 2, "nobody looks: both layers fused"
    found = hooks.record(model, x, LAYER + kind)
    assert count_fused() == 1, "one layer is looked at"
    torch.testing.assert_close(found.output, fused)
    hooks.record(model, x, "*." + kind)
    assert count_fused() == 0
    model(x)
    assert count_fused() == 2, "and fused again"


@pytest.mark.hygiene
@pytest.mark.parametrize("kind", ["hook_delta", "hook_B", "hook_y", "hook_x", "hook_state_init"])
def test_3d_sites_leave_the_fused_path_alone(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], kind: str
) -> None:
    model = make()
    hooks.record(model, x, "*." + kind)
    assert count_fused() == 2
    with hooks.edit(model, {"*." + kind: hooks.add(0.5)}):
        assert not torch.allclose(model(x), hooks.record(model, x, "*." + kind).output * 0)
    assert count_fused() == 4


@pytest.mark.hygiene
@pytest.mark.parametrize(
    "kind", ["hook_delta_pre", "hook_delta", "hook_delta_decay", "hook_delta_write", "hook_state_init"]
)
@pytest.mark.parametrize("variant", ["lti", "s4d"])
def test_sites_that_the_convolution_would_skip_fire(
    make: Callable[..., Any], x: Tensor, variant: str, kind: str
) -> None:
    """The time-invariant models are one convolution where nobody looks; looking or editing must not be in vain."""
    model = make(variant)
    name = LAYER + kind
    if name not in model.hook_dict:
        with pytest.raises(hooks.UnknownSite):
            hooks.record(model, x, name)
        return
    clean = model(x)
    torch.testing.assert_close(hooks.record(model, x, name).output, clean)
    edit = hooks.add(0.5) if kind == "hook_state_init" else hooks.scale(1.5, pos=[2, 5])
    with hooks.edit(model, {name: edit}):
        assert not torch.allclose(model(x), clean)


def forward_hook(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_forward_hook(lambda module, args, out: note())


def forward_hook_with_keywords(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_forward_hook(lambda module, args, kwargs, out: note(), with_kwargs=True)


def forward_hook_always_called(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_forward_hook(lambda module, args, out: note(), always_call=True)


def forward_pre_hook(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_forward_pre_hook(lambda module, args: note())


def backward_hook(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_full_backward_hook(lambda module, inputs, outputs: note())


def backward_pre_hook(point: nn.Module, note: Callable[..., Any]) -> Any:
    return point.register_full_backward_pre_hook(lambda module, outputs: note())


TORCH_HOOKS = [
    forward_hook, forward_hook_with_keywords, forward_hook_always_called, forward_pre_hook, backward_hook,
    backward_pre_hook,
]  # fmt: skip


@pytest.mark.hygiene
@pytest.mark.parametrize("register", TORCH_HOOKS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_hooks_of_every_kind(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], variant: str, register: Any
) -> None:
    model = make(variant)
    for kind in FULL:
        seen: list[int] = []
        handle = register(model.hook_dict[LAYER + kind], lambda seen=seen: seen.append(1))
        model(x).sum().backward()
        assert seen == [1], kind
        assert count_fused() == 1, kind
        handle.remove()
        model(x).sum().backward()
        assert seen == [1] and count_fused() == 2, kind


@pytest.mark.hygiene
@pytest.mark.parametrize(
    "register",
    [
        torch_module.register_module_forward_hook,
        torch_module.register_module_forward_pre_hook,
        torch_module.register_module_full_backward_hook,
        torch_module.register_module_full_backward_pre_hook,
    ],
    ids=lambda function: function.__name__,
)
def test_global_hooks(make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], register: Any) -> None:
    model = make()
    point, seen = model.hook_dict[LAYER + "hook_state"], []

    def note(module: nn.Module, *rest: Any) -> None:
        if module is point:
            seen.append(1)

    handle = register(note)
    try:
        model(x).sum().backward()
    finally:
        handle.remove()
    assert seen == [1] and count_fused() == 0
    model(x)
    assert seen == [1] and count_fused() == 2


class Halved(nn.Module):
    """Stands in a slot as a sparse autoencoder would: another class, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, value: Tensor) -> Tensor:
        return value * self.factor


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", FULL)
def test_another_module_in_the_slot(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], variant: str, kind: str
) -> None:
    model = make(variant)
    with hooks.edit(model, {LAYER + kind: hooks.scale(0.5)}, readout_only=kind == "hook_state"):
        expected = model(x)
    count_fused()
    mixer, point = model.blocks[1].mixer, model.hook_dict[LAYER + kind]
    spliced = Halved()
    setattr(mixer, kind, spliced)
    output, _ = model(x, return_state=True)
    assert count_fused() == 1
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert bool(spliced.factor.grad)
    setattr(mixer, kind, point)
    assert not torch.allclose(model(x), expected) and count_fused() == 2


@pytest.mark.hygiene
def test_another_module_in_a_3d_slot(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    with hooks.edit(model, {LAYER + "hook_delta": hooks.scale(0.5)}):
        expected = model(x)
    point = model.blocks[1].mixer.hook_delta
    model.blocks[1].mixer.hook_delta = Halved()
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(hooks.DidNotFire), hooks.edit(model, {LAYER + "hook_delta": hooks.zero()}):
        model(x)  # the point that has this name is no longer in the model
    model.blocks[1].mixer.hook_delta = point


@pytest.mark.hygiene
def test_a_forward_of_the_instance(make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int]) -> None:
    model = make()
    for kind in FULL:
        with hooks.edit(model, {LAYER + kind: hooks.scale(0.5)}, readout_only=kind == "hook_state"):
            expected = model(x)
        count_fused()
        point = model.hook_dict[LAYER + kind]
        point.forward = lambda value: value * 0.5
        torch.testing.assert_close(model(x), expected)
        assert count_fused() == 1
        del point.forward
        assert not torch.allclose(model(x), expected) and count_fused() == 2


@pytest.mark.hygiene
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_nnsight_trace_that_reads_a_full_site(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], variant: str
) -> None:
    """Parked there, or not wanted there; and fused again when the trace is over, though the wrapper stays installed."""
    model = make(variant)
    expected = hooks.record(model, x)
    count_fused()
    wrapped = NNsight(model)
    model(x)
    assert count_fused() == 2, "wrapped, no trace"
    with wrapped.trace(x):
        output = wrapped.output.save()
    assert count_fused() == 2, "a trace that wants other things"
    torch.testing.assert_close(output, expected.output)
    with wrapped.trace(x):
        state = wrapped.blocks[1].mixer.hook_state.output.save()
    assert count_fused() == 1
    torch.testing.assert_close(state, expected[LAYER + "hook_state"])
    with wrapped.trace(x):
        early = wrapped.blocks[1].mixer.hook_x.output.save()
        decay = wrapped.blocks[1].mixer.hook_decay.input.save()
    assert count_fused() == 1, "parked on an earlier site of the same mixer first"
    torch.testing.assert_close(early, expected[LAYER + "hook_x"])
    torch.testing.assert_close(decay, expected[LAYER + "hook_decay"])
    model(x)
    assert count_fused() == 2, "the trace is over"


@pytest.mark.hygiene
def test_an_nnsight_cache_gets_every_site(make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int]) -> None:
    """Relying on nnsight's own errors would not do: its cache is silently empty where a site is skipped."""
    model = make()
    expected = hooks.record(model, x)
    count_fused()
    wrapped = NNsight(model)
    with wrapped.trace(x) as tracer:
        cache = tracer.cache()
    assert count_fused() == 0
    for name in model.hook_dict:
        torch.testing.assert_close(cache[f"model.{name}"].output, expected[name])
    with wrapped.trace(x) as tracer:
        cache = tracer.cache(modules=[wrapped.blocks[1].mixer.hook_write])
    assert count_fused() == 1
    torch.testing.assert_close(cache["model." + LAYER + "hook_write"].output, expected[LAYER + "hook_write"])
    with wrapped.trace(x) as tracer:
        tracer.cache(modules=[wrapped.blocks[1].mixer.hook_delta])
    assert count_fused() == 2


@pytest.mark.hygiene
def test_an_nnsight_trace_that_raises_leaves_the_fused_path(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int]
) -> None:
    model = make()
    wrapped = NNsight(model)
    with pytest.raises(Exception, match="mine"):
        with wrapped.trace(x):
            wrapped.blocks[0].mixer.hook_state.output.save()
            raise KeyError("mine")
    count_fused()
    model(x)
    assert count_fused() == 2


@pytest.mark.hygiene
def test_expose_forces_the_path_and_changes_no_value(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], leftovers: Callable[[Any], list[str]]
) -> None:
    """Trap 10: fused and materialised differ by rounding; with both exposed, patching clean into clean is nothing."""
    model = make()
    fused = model(x)
    count_fused()
    with hooks.expose(model):
        first, clean = model(x), hooks.record(model, x, "*.hook_state")
        with hooks.expose(model, "blocks.0.*"):
            assert count_fused() == 0
        with hooks.edit(model, {"*.hook_state": hooks.resample(source=clean)}, readout_only=True):
            patched = model(x)
        with hooks.edit(model, {"*.hook_delta": hooks.scale(1.0)}):
            identity = model(x)
    torch.testing.assert_close(first, fused)
    torch.testing.assert_close(patched, first, rtol=0, atol=0)
    torch.testing.assert_close(identity, first, rtol=0, atol=0)
    with hooks.expose(model, "blocks.0.*"):
        count_fused()
        model(x)
        assert count_fused() == 1
    with pytest.raises(KeyError), hooks.expose(model):
        raise KeyError
    assert leftovers(model) == []
    model(x)
    assert count_fused() == 2
    with pytest.raises(hooks.UnknownSite), hooks.expose(model, "*.hook_sate"):
        pytest.fail("the body must not run")
    with pytest.raises(hooks.BadArgument, match="hook_decay"), hooks.expose(model, "*.hook_delta"):
        pytest.fail("the body must not run")


@pytest.mark.hygiene
def test_what_a_propagating_edit_needs_is_formed(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int]
) -> None:
    model = make()
    for edit in (hooks.zero(pos=3), torch.tanh):
        with hooks.edit(model, {LAYER + "hook_state": edit}):
            model(x)
        assert count_fused() == 1
    model(x)
    assert count_fused() == 2


@pytest.mark.hygiene
def test_deep_copies_do_not_share_hooks(
    make: Callable[..., Any], x: Tensor, count_fused: Callable[[], int], leftovers: Callable[[Any], list[str]]
) -> None:
    """A flag set by ``add_hook`` would be set on the wrong one of the two."""
    model = make()
    clean = model(x)
    NNsight(model)
    twin = copy.deepcopy(model)
    handle = twin.hook_dict[LAYER + "hook_state"].register_forward_hook(lambda module, args, out: out * 0)
    count_fused()
    torch.testing.assert_close(model(x), clean)
    assert count_fused() == 2
    assert not torch.allclose(twin(x), clean) and count_fused() == 1
    handle.remove()
    with hooks.edit(model, {"*.hook_state": torch.tanh, "*.hook_delta": hooks.zero()}):
        torch.testing.assert_close(twin(x), clean)
        assert not torch.allclose(model(x), clean)
        inside = copy.deepcopy(model)
    torch.testing.assert_close(model(x), clean)
    assert not torch.allclose(inside(x), clean), "a copy of an edited model is edited, as torch copies hooks"
    inside.reset_hooks()
    assert leftovers(inside) == []
    torch.testing.assert_close(inside(x), clean)
    with torch.no_grad():
        twin.blocks[0].mixer.D.zero_()
    torch.testing.assert_close(model(x), clean)
    assert not torch.allclose(twin(x), clean), "the copy runs on its own weights"


@pytest.mark.hygiene
def test_trap_13_threads_with_a_copy_each(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    edits = [{"*.hook_state": hooks.scale(0.1 * i, pos=i)} for i in range(1, 5)]
    expected = []
    for edit in edits:
        with hooks.edit(model, edit):
            expected.append(model(x).detach())
    results: list[list[Tensor]] = [[] for _ in edits]

    def work(i: int, own: Any) -> None:
        for _ in range(5):
            with hooks.edit(own, edits[i]):
                results[i].append(own(x).detach())

    threads = [threading.Thread(target=work, args=(i, copy.deepcopy(model))) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, outputs in enumerate(results):
        assert len(outputs) == 5
        for output in outputs:
            torch.testing.assert_close(output, expected[i])
    assert not torch.allclose(expected[0], expected[3])


CHANGES: list[Callable[[Tensor], Tensor]] = [
    lambda v: v * 0.5,
    lambda v: v + 0.1,
    lambda v: v.mean(0, keepdim=True),
    lambda v: v.flip(0),
    lambda v: torch.where(v > 0, v, 0.1 * v),
    lambda v: v.clone().index_fill_(1, torch.tensor([0]), 0.3),
]


@contextmanager
def by_edit(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with hooks.edit(model, {name: change}, readout_only=name.endswith("hook_state")):
        yield


@contextmanager
def by_propagating_edit(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with hooks.edit(model, {name: change}):
        yield


@contextmanager
def by_transformer_lens(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    with model.hooks(fwd_hooks=[(name, lambda value, hook: change(value))]):
        yield


@contextmanager
def by_torch(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = model.hook_dict[name].register_forward_hook(lambda module, args, out: change(out))
    yield
    handle.remove()


@contextmanager
def by_torch_before(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = model.hook_dict[name].register_forward_pre_hook(lambda module, args: (change(args[0]),))
    yield
    handle.remove()


@contextmanager
def by_instance_forward(model: Any, name: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    point = model.hook_dict[name]
    if "forward" in point.__dict__:
        before = point.__dict__["forward"]
        point.forward = lambda value: change(before(value))
        yield
        point.forward = before
    else:
        point.forward = change
        yield
        del point.forward


IDIOMS = [by_edit, by_propagating_edit, by_transformer_lens, by_torch, by_torch_before, by_instance_forward]


@pytest.mark.law
@pytest.mark.parametrize("variant", VARIANTS)
def test_random_combinations_equal_an_always_exposed_copy(make: Callable[..., Any], x: Tensor, variant: str) -> None:
    """Whatever is edited, by whichever idiom, and whatever is read: the path taken is not seen in any number."""
    model = make(variant)
    exposed = copy.deepcopy(model)
    names, clean = list(model.hook_dict), model(x)
    draw, different = random.Random(7), 0
    with hooks.expose(exposed):
        for _ in range(30):
            edits = [(draw.choice(IDIOMS), draw.choice(names), draw.choice(CHANGES)) for _ in range(draw.randrange(4))]
            reads = draw.sample(names, draw.randrange(4)) or ["hook_embed"]
            results = []
            for subject in (model, exposed):
                with ExitStack() as stack:
                    for idiom, name, change in edits:
                        stack.enter_context(idiom(subject, name, change))
                    bare = subject(x)
                    found = hooks.record(subject, x, reads)
                results.append((bare, found.output, dict(found)))
            story = [(idiom.__name__, name) for idiom, name, _ in edits], reads
            torch.testing.assert_close(results[0], results[1], msg=lambda m, s=story: f"{s}: {m}")
            different += not torch.allclose(results[0][0], clean)
    assert different > 15, "the edits do something"

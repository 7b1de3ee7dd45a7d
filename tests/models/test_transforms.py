"""Every architecture and operation under ``torch.func`` and forward-mode derivatives, against plain autograd in fp64.

Plain autograd is held to the definitions elsewhere; that it is right here as well is seen by finite differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import hooks
import models
from hooks.errors import NonFinite
from models.scan import (
    constant_pair_states,
    pair,
    pair_scan,
    reference,
    scan,
    selective_scan,
    selective_scan_states,
    selective_states,
)
from tests.interp.recurrences import VARIANTS, build, prompts
from tests.tolerances import assert_matches

pytestmark = [
    pytest.mark.definition,
    # torch has no batching rule for some of its own derivatives (of glu, of a sliding window) and loops over them.
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

MIXER = "blocks.0.mixer."
X = prompts(2, 5)
ALONG = torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(4))


def made(variant: str) -> Any:
    if variant == "transformer":
        return models.build("transformer", d_model=8, n_layers=1, n_heads=2, d_in=5, d_out=2).double().eval()
    return build(variant, **({} if variant == "theory" else {"n_layers": 1}))


@contextmanager
def looked_at(model: Any, how: str) -> Iterator[None]:
    """Paths of the mixers: fused, all states, everything materialised, edited."""
    if how == "fused":
        yield
    elif how == "states":
        points = [point for name, point in model.hook_dict.items() if name.endswith("hook_state")]
        for point in points:
            point.add_hook(lambda state, hook: None)
        try:
            yield
        finally:
            model.reset_hooks()
    elif how == "exposed":
        with hooks.expose(model):
            yield
    elif how == "edited":
        edits = {MIXER + "hook_state": hooks.scale(0.5, pos=[1, 3]), MIXER + "hook_x": hooks.add(0.2, pos=2)}
        with hooks.edit(model, edits):
            yield
    elif how == "interrupted":
        edit = hooks.Edit("bent", lambda region, whole, site: torch.tanh(region), pos=2)
        with hooks.edit(model, {MIXER + "hook_state": edit}):
            yield


CASES: list[Any] = [(v, "fused") for v in VARIANTS]
CASES += [
    pytest.param(v, how, marks=() if v in some else pytest.mark.slow)
    for how, some in (("edited", ("mamba", "s4")), ("exposed", ("mamba",)))
    for v in VARIANTS
]
# Where there is a path of its own for the states, and where an interrupted scan is another.
CASES += [
    pytest.param(v, how, marks=() if v == "mamba" else pytest.mark.slow)
    for v in ("mamba", "s4d")
    for how in ("states", "interrupted")
]
CASES.append(("transformer", "fused"))


@pytest.mark.parametrize(("variant", "how"), CASES)
def test_derivatives_by_the_input(variant: str, how: str) -> None:
    model = made(variant)

    def number(x: Tensor) -> Tensor:
        return model(x).sin().sum()

    def ends(x: Tensor) -> Tensor:
        return model(x)[:, -1].sum(-1)

    with looked_at(model, how):
        leaf = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(number(leaf), leaf, create_graph=True)
        (bend,) = torch.autograd.grad((slope * ALONG).sum(), leaf)
        slope = slope.detach()
        with torch.no_grad():
            step = 1e-5
            difference = (number(X + step * ALONG) - number(X - step * ALONG)) / (2 * step)
            torch.testing.assert_close((slope * ALONG).sum(), difference, rtol=1e-6, atol=1e-8)
            moved = [grad(number)(X + sign * step * ALONG) for sign in (1, -1)]
            torch.testing.assert_close(bend, (moved[0] - moved[1]) / (2 * step), rtol=1e-5, atol=1e-7)
        assert_matches(grad(number)(X), slope, "grad")
        assert_matches(jacrev(number)(X), slope, "jacrev")
        assert_matches(jvp(number, (X,), (ALONG,))[1], (slope * ALONG).sum(), "jvp")
        assert_matches(jvp(grad(number), (X,), (ALONG,))[1], bend, "forward over reverse")
        assert_matches(grad(lambda x: (grad(number)(x) * ALONG).sum())(X), bend, "reverse over reverse")
        one = torch.zeros((), dtype=X.dtype)
        assert_matches(hessian(lambda a: number(X + a * ALONG))(one), (bend * ALONG).sum(), "hessian")
        twice = jacfwd(jacfwd(lambda a: number(X + a * ALONG)))(one)
        assert_matches(twice, (bend * ALONG).sum(), "forward over forward")
        assert_matches(vmap(lambda x: model(x[None])[0])(X), model(X), "vmap")
        assert_matches(vmap(grad(lambda x: number(x[None])))(X), slope, "a gradient for each prompt")
        plain = jacobian(ends, X)
        assert_matches(jacobian(ends, X, vectorize=True), plain, "jacobian(vectorize=True)")
        assert_matches(jacobian(ends, X, vectorize=True, strategy="forward-mode"), plain, "the same by forward mode")
        assert_matches(jacfwd(ends)(X), plain, "jacfwd")


@pytest.mark.parametrize("variant", [*VARIANTS, "transformer"])
def test_derivatives_by_the_parameters(variant: str) -> None:
    model = made(variant)
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def number(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, (x,)).sin().sum()

    before = model(X).detach()
    slopes = torch.autograd.grad(model(X).sin().sum(), list(model.parameters()), allow_unused=True)
    expected = {
        name: torch.zeros_like(value) if slope is None else slope
        for (name, value), slope in zip(given.items(), slopes, strict=True)
    }
    for name, found in grad(number)(given, X).items():
        assert_matches(found, expected[name], name)
    for name, found in vmap(grad(lambda p, x: number(p, x[None])), (None, 0))(given, X).items():
        assert found.shape == (2, *given[name].shape)
        assert_matches(found.sum(0), expected[name], f"{name}, prompt by prompt")
    several = {name: torch.stack([value, 1.1 * value]) for name, value in given.items()}
    outputs = vmap(lambda p: functional_call(model, p, (X,)))(several)
    assert_matches(outputs[0], before, "several models at once")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert_matches(outputs[1], model(X), "several models at once")


@pytest.mark.parametrize("variant", VARIANTS)
def test_several_models_at_once_on_a_long_prompt(variant: str) -> None:
    """S4 has another way to go through more than 128 tokens."""
    model, x = made(variant), prompts(1, 140)
    given = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for chosen in ([name] for name in given if "mixer" in name):
        several = {name: torch.stack([given[name], 1.1 * given[name]]) for name in chosen}
        outputs = vmap(lambda p: functional_call(model, {**given, **p}, (x,)))(several)
        for i, output in enumerate(outputs):
            one = functional_call(model, {**given, **{name: value[i] for name, value in several.items()}}, (x,))
            torch.testing.assert_close(output, one, rtol=1e-8, atol=1e-10, msg=lambda m, n=chosen: f"{n}: {m}")


@pytest.mark.law
def test_functional_call_leaves_the_model_as_it_was() -> None:
    """The transformer's parts stand at two places each; each weight is exchanged once, and put back."""
    model, ours = made("transformer"), dict(made("transformer").named_parameters())
    before = model(X).detach(), {name: parameter for name, parameter in model.named_parameters()}
    found = functional_call(model, ours, (X,))
    assert_matches(model(X).detach(), before[0])
    assert all(parameter is before[1][name] for name, parameter in model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(ours[name])
    assert_matches(found.detach(), model(X).detach())
    assert not torch.equal(before[0], found)


# --- operations -----------------------------------------------------------------------------------


def drawn(*shape: int, low: float = -1.0) -> Tensor:
    return low + (1 - low) * torch.rand(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))
    )


BATCH, LENGTH, WIDTH, N = 2, 18, 3, 2  # longer than one chunk of the kernels
SELECTIVE = {
    "x": drawn(BATCH, LENGTH, WIDTH),
    "delta_decay": drawn(BATCH, LENGTH, WIDTH, low=0.1),
    "delta_write": drawn(BATCH, LENGTH, WIDTH, low=0.2),
    "A": -drawn(WIDTH, N, low=0.1),
    "B": drawn(BATCH, LENGTH, N),
    "C": drawn(BATCH, LENGTH, N, low=-0.9),
    "h0": drawn(BATCH, WIDTH, N),
}
MATERIALISED = {
    "decay": drawn(BATCH, LENGTH, WIDTH, 2 * N) / 2,
    "write": drawn(BATCH, LENGTH, WIDTH, 2 * N, low=-0.5),
    "h0": drawn(BATCH, WIDTH, 2 * N),
}
PAIR_WEIGHTS = {name: drawn(WIDTH, 2 * N, low=low) / 2 for name, low in (("decay", -1), ("gain", -0.9), ("read", -0.8))}
CONSTANT = {"x": SELECTIVE["x"], **PAIR_WEIGHTS, "h0": MATERIALISED["h0"]}
WITHOUT_C = {name: value for name, value in SELECTIVE.items() if name != "C"}


def constant_pairs(x: Tensor, decay: Tensor, gain: Tensor, read: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    write = gain * x[..., None]
    states = pair.by_definition(decay.expand_as(write), write, h0)
    return (states * read).sum(-1), states


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, Tensor]]] = {
    "selective_scan": (selective_scan, reference.selective_scan, SELECTIVE),
    "selective_states": (selective_states, reference.selective_states, WITHOUT_C),
    "selective_scan_states": (selective_scan_states, reference.selective_scan_states, SELECTIVE),
    "scan": (scan, reference.scan, MATERIALISED),
    "pair_scan": (pair_scan, pair.by_definition, MATERIALISED),
    "constant_pair_states": (constant_pair_states, constant_pairs, CONSTANT),
}


PARTS = ("selective_states", "selective_scan_states")
"""Their operands are those of the selective scan."""


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        pytest.param(name, o, marks=pytest.mark.slow if name in PARTS and o != "x" else ())
        for name, (_, _, given) in OPERATIONS.items()
        for o in given
    ],
)
def test_operations(name: str, operand: str) -> None:
    run, definition, given = OPERATIONS[name]

    def number_of(function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def number(value: Tensor) -> Tensor:
            out = (
                function(**{**given, operand: value})
                if function is not pair.by_definition
                else function(*{**given, operand: value}.values())
            )
            return sum((part.sin().sum() for part in (out if isinstance(out, tuple) else (out,))), torch.zeros(()))

        return number

    ours, number = number_of(run), number_of(definition)
    value = given[operand]
    along = drawn(*value.shape, low=-0.7)
    leaf = value.clone().requires_grad_()
    (slope,) = torch.autograd.grad(number(leaf), leaf, create_graph=True)
    (bend,) = torch.autograd.grad((slope * along).sum(), leaf)
    slope = slope.detach()
    (found,) = torch.autograd.grad(ours(leaf), leaf, create_graph=True)
    assert_matches(found.detach(), slope, "autograd")
    assert_matches(torch.autograd.grad((found * along).sum(), leaf)[0], bend, "autograd twice")
    assert_matches(grad(ours)(value), slope, "grad")
    assert_matches(jacrev(ours)(value), slope, "jacrev")
    assert_matches(jacfwd(ours)(value), slope, "jacfwd")
    assert_matches(jvp(grad(ours), (value,), (along,))[1], bend, "forward over reverse")
    assert_matches(grad(lambda v: jvp(ours, (v,), (along,))[1])(value), bend, "reverse over forward")
    assert_matches(
        jvp(lambda v: jvp(ours, (v,), (along,))[1], (value,), (along,))[1], (bend * along).sum(), "twice forward"
    )
    both = torch.stack([value, 0.9 * value])
    assert_matches(vmap(ours)(both), torch.stack([number(each) for each in both]), "vmap")
    each = [torch.autograd.grad(number(v := one.clone().requires_grad_()), v)[0] for one in both]
    assert_matches(vmap(grad(ours))(both), torch.stack(each), "vmap of grad")
    twice = vmap(vmap(ours))(torch.stack([both, 0.8 * both]))
    assert_matches(
        twice, torch.stack([torch.stack([number(v) for v in (1.0 * both, 0.8 * both)[k]]) for k in (0, 1)]), "twice"
    )
    assert_matches(
        jacobian(lambda v: torch.stack([ours(v), 2 * ours(v)]), value, vectorize=True)[0], slope, "vectorize"
    )


def test_a_scalar_for_each_seed_of_a_second_derivative() -> None:
    """``jacobian(vectorize=True)`` of a gradient: what reaches the gradient's own backward stands for many."""
    delta = SELECTIVE["delta_decay"]

    def slope(value: Tensor) -> Tensor:
        y, _ = selective_scan(**{**SELECTIVE, "delta_decay": value})
        return torch.autograd.grad(y.sin().sum(), value, create_graph=True)[0][0, :3].sum(-1)

    assert_matches(jacobian(slope, delta, vectorize=True), jacobian(slope, delta))


# --- verbs inside a transform -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_record_and_edit_inside_a_transform(variant: str) -> None:
    model = made(variant)
    site = MIXER + ("hook_x" if variant in ("linear", "theory") else "hook_delta")

    def last_state(value: Tensor, x: Tensor) -> Tensor:
        with hooks.edit(model, {site: hooks.set_to(value, pos=2)}):
            return hooks.record(model, x, MIXER + "hook_state", grad=True)[MIXER + "hook_state"][:, -1].sum()

    with torch.no_grad():
        value = hooks.record(model, X, site)[site][:, 2:3] + 0.1
    leaf = value.clone().requires_grad_()
    (slope,) = torch.autograd.grad(last_state(leaf, X), leaf)
    assert float(slope.abs().max()) > 0
    assert_matches(grad(last_state)(value, X), slope, "grad")
    assert_matches(jacfwd(last_state)(value, X), slope, "jacfwd")
    found = vmap(grad(lambda v, x: last_state(v[None], x[None])))(value, X)
    assert_matches(found, slope, "vmap of grad")
    seen = vmap(lambda x: hooks.record(model, x[None], MIXER + "hook_state")[MIXER + "hook_state"][0])(X)
    assert_matches(seen, hooks.record(model, X, MIXER + "hook_state")[MIXER + "hook_state"], "vmap of record")


@pytest.mark.parametrize(
    "how", [vmap, lambda f: grad(lambda x: f(x[0]).sum()), lambda f: jacfwd(f)], ids=["vmap", "grad", "jacfwd"]
)
def test_nan_is_an_error_inside_a_transform(how: Callable[..., Any]) -> None:
    model = made("mamba")
    broken = X.clone()
    broken[0, 3, 0] = torch.nan
    run = how(lambda x: model(x[None] if x.ndim == 2 else x))
    with pytest.raises(NonFinite, match=r"^the input holds NaN"):
        run(broken)
    edit = hooks.Edit("broken", lambda region, whole, site: region / 0, pos=1)
    with hooks.edit(model, {MIXER + "hook_B": edit}), pytest.raises(NonFinite, match=r"first seen at .*hook_B"):
        run(X)


def test_delta_that_is_one_number_but_moves_token_by_token() -> None:
    """S4's shortcut for a constant Δ holds for numbers; a forward-mode change of Δ differs from token to token."""
    for variant in ("s4d", "s4"):
        model = made(variant)
        start = hooks.record(model, X, MIXER + "hook_delta")[MIXER + "hook_delta"]

        def output(delta: Tensor, model: Any = model) -> Tensor:
            with hooks.edit(model, {MIXER + "hook_delta": hooks.set_to(delta)}):
                return model(X).sum()

        leaf = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad(output(leaf), leaf)
        assert float((slope - slope[:, :1]).abs().max()) > 1e-3
        assert_matches(jvp(output, (start,), (slope,))[1], slope.square().sum(), variant)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_the_factor_of_an_edit_has_its_slope_also_at_zero(value: float) -> None:
    """The output is a function of the factor, smooth at 0 and 1 too, where an edit takes its shortcuts."""
    model = made("mamba")

    def output(factor: Tensor) -> Tensor:
        with hooks.edit(
            model, {MIXER + "hook_x": hooks.scale(factor, pos=2), MIXER + "hook_state": hooks.scale(factor)}
        ):
            return model(X).sum()

    at = torch.tensor(value, dtype=torch.float64)
    with torch.no_grad():
        expected = (output(at + 1e-6) - output(at - 1e-6)) / 2e-6
    leaf = at.clone().requires_grad_()
    found = {
        "autograd": torch.autograd.grad(output(leaf), leaf)[0],
        "grad": grad(output)(at),
        "jvp": jvp(output, (at,), (torch.ones_like(at),))[1],
        "vmap": vmap(grad(output))(torch.stack([at, at + 1]))[0],
    }
    assert float(expected.abs()) > 1e-3
    for name, slope in found.items():
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")

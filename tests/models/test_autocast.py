"""Recurrences under autocast: in the precision of their operands, looked at or not.

Linear layers and convolutions may be in half precision; what is compared is the recurrence alone. Its operands are read
off a run with every site watched, and multiplied out token by token in fp64. A path has to give that to fp32's
tolerance, plus one rounding where the site is in half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks.precision import exact
from tests.interp.recurrences import VARIANTS, build, prompts
from tests.tolerances import TOLERANCE

pytestmark = pytest.mark.definition

MIXER = "blocks.0.mixer."
HALF = [torch.bfloat16, torch.float16]


def close(found: Tensor, expected: Tensor, what: str) -> None:
    """Within fp32's tolerance of ``expected`` (fp64), and then rounded once to the dtype of ``found``."""
    expected = expected.detach()
    size = max(1.0, float(expected.abs().max()))
    least = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).smallest_normal
    rounding = torch.finfo(found.dtype).eps / 2 * expected.abs() + least
    allowed = TOLERANCE[torch.float32] * size + rounding
    missed = float(((found.double() - expected).abs() - allowed).max())
    assert missed <= 0, f"{what}: {missed} more than allowed"


def operands(model: Any, x: Tensor, state: Any) -> dict[str, Tensor]:
    """What the recurrence of the first layer is made of, in fp64, from a run with everything watched."""
    with hooks.expose(model):
        found = hooks.record(model, x, MIXER + "*", state=state)
    return {name.removeprefix(MIXER): value.double() for name, value in found.items()}


def multiplied_out(model: Any, seen: dict[str, Tensor], start: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y, all states, and the write as a leaf."""
    write = seen["hook_write"].requires_grad_()
    h = torch.zeros_like(write[:, 0]) if start is None else start.double()
    parts, states = model.blocks[0].mixer.hook_state.parts, []

    def turned(a: Tensor, h: Tensor) -> Tensor:
        if parts == 1:
            return a * h
        product = torch.complex(*a.chunk(2, -1)) * torch.complex(*h.chunk(2, -1))
        return torch.cat([product.real, product.imag], -1)

    for t in range(write.shape[1]):
        if "hook_transition" in seen:
            a, u, q = seen["hook_transition"][:, t].unbind(-2)
            h = turned(a, h) + u * (q * h).sum(-1, keepdim=True) + write[:, t]
        else:
            h = turned(seen["hook_decay"][:, t], h) + write[:, t]
        states.append(h)
    mixer = deepcopy(model.blocks[0].mixer).double()
    C = [seen["hook_C"]] if "hook_C" in seen else []
    return mixer.read(torch.stack(states, 1), *C), torch.stack(states, 1), write


IDENTITY = hooks.Edit("the same", lambda region, whole, site: region * 1)
LOOKS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "not looked at": ([], {}),
    "states": (["hook_state"], {}),
    "everything": (["hook_write", "hook_state"], {}),
    "an edit that is folded": ([], {MIXER + "hook_state": hooks.scale(1.0, pos=0)}),
    "an edit that interrupts": ([], {MIXER + "hook_state": IDENTITY}),
    "an edited write": ([], {MIXER + "hook_write": hooks.add(0.0)}),
}


def run(model: Any, x: Tensor, look: str, **keywords: Any) -> tuple[hooks.Record, Any]:
    sites, edits = LOOKS[look]
    with hooks.edit(model, edits, positions="run") if edits else hooks.edit(model, {"hook_embed": hooks.scale(1.0)}):
        found = hooks.record(model, x, [MIXER + kind for kind in ("hook_y", *sites)], return_state=True, **keywords)
    return found, found.output[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_looked_at_or_not_it_is_one_recurrence(variant: str, dtype: torch.dtype) -> None:
    model = build(variant, torch.float32)
    x = prompts(length=70, dtype=torch.float32)  # more than one tile of linear attention
    with torch.autocast("cpu", dtype):
        state = None
        for piece in (x[:, :66], x[:, 66:69], x[:, 69:]):  # a prompt, a chunk, a step of decoding
            seen = operands(model, piece, state)
            y, states, _ = multiplied_out(model, seen, None if state is None else state[0].h)
            alone = hooks.record(model, piece, MIXER + "hook_y", state=state)
            close(alone[MIXER + "hook_y"], y, "y, no state returned")
            for look in LOOKS:
                found, after = run(model, piece, look, state=state)
                close(found[MIXER + "hook_y"], y, f"y, {look}")
                assert after[0].h.dtype == torch.float32
                close(after[0].h, states[:, -1], f"the state, {look}")
                if MIXER + "hook_state" in found:
                    close(found[MIXER + "hook_state"], states, f"hook_state, {look}")
            state = after


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
@pytest.mark.parametrize("look", ["not looked at", "states", "everything"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_too(variant: str, look: str, inside: bool) -> None:
    """Of what enters the recurrence and nothing else: x, or B where Δ is made of x, or where x is the token itself."""
    model, x = build(variant, torch.float32), prompts(length=70, dtype=torch.float32)
    kind = "hook_B" if variant in ("mamba", "theory") else "hook_x"
    seeds = torch.randn(3, 70, 1, generator=torch.Generator().manual_seed(3))
    # Without its cache: in torch 2.6 a weight that was cast without gradients first has none afterwards.
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        seen = operands(model, x, None)
        found = hooks.record(model, x, [MIXER + k for k in (kind, "hook_y", *LOOKS[look][0])], grad=True)
        ends = (found[MIXER + "hook_y"], found[MIXER + kind])
        if inside:
            (slope,) = torch.autograd.grad(*ends, seeds.to(ends[0].dtype).expand_as(ends[0]))
    if not inside:
        (slope,) = torch.autograd.grad(*ends, seeds.to(ends[0].dtype).expand_as(ends[0]))
    y, _, write = multiplied_out(model, seen, None)
    (by_write,) = torch.autograd.grad(y, write, seeds.to(ends[0].dtype).double().expand_as(y))
    expected = (by_write * write).sum(2 if kind == "hook_B" else -1) / seen[kind]
    close(slope, expected.detach(), look)


def test_hidden_attention_under_autocast() -> None:
    """M by products of matrices (complex states) and by rows, against what the run's own operands give in fp64."""
    from interp.attention import matrix

    for variant in ("s4d", "linear"):
        model, x = build(variant, torch.float32), prompts(length=20, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            seen = operands(model, x, None)
            found = matrix(model, x, 0)
        y, _, _ = multiplied_out(model, seen, None)
        close(found.values.mul(found.source[:, :, None]).double().sum(-1).float(), y.mT.detach(), variant)
        assert found.relative_error < 1e-5


@pytest.mark.parametrize("order", [1, 2])
def test_a_product_is_exact_forward_and_backward(order: int) -> None:
    a, b = (torch.randn(3, 40, 40, requires_grad=True) for _ in range(2))

    def slopes(product: Callable[..., Tensor], *given: Tensor) -> list[Tensor]:
        loss = product(*given).sin().sum()
        for _ in range(order):
            found = torch.autograd.grad(loss, given, create_graph=order > 1)
            loss = sum(slope.square().sum() for slope in found)
        return list(found)

    with torch.autocast("cpu", torch.bfloat16):
        rounded = slopes(torch.matmul, a, b)
        found = slopes(lambda a, b: exact(torch.matmul, a, b), a, b)
    double = slopes(torch.matmul, a.double(), b.double())
    for one, other, coarse in zip(
        *([slope.detach() for slope in each] for each in (found, double, rounded)), strict=True
    ):
        assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
        assert float((coarse - other).abs().max()) > 1e-3 * float(other.abs().max()), "autocast is on"

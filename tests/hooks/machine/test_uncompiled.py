"""torch.compile leaves the models' forward alone, and costs nothing where nobody compiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.machine.uncompiled import never_compiled

pytestmark = pytest.mark.edit


def test_a_hook_that_comes_after_compiling_fires(make: Callable[..., Any], x: Tensor) -> None:
    model = make("mamba", n_layers=1)
    compiled = torch.compile(model, backend="eager")
    clean = compiled(x)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_gate", lambda gate, hook: gate * 0)]):
        edited = compiled(x)
        torch.testing.assert_close(edited, model(x), rtol=0, atol=0)
    assert not torch.equal(clean, edited)


def test_what_is_not_marked_is_compiled() -> None:
    """The control: the same call is traced where the mark is missing, and left alone where it stands."""
    traced: list[bool] = []

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            traced.append(torch.compiler.is_compiling())
            return x + 1

    class Marked(nn.Module):
        @never_compiled
        def forward(self, x: Tensor) -> Tensor:
            traced.append(torch.compiler.is_compiling())
            return x + 1

    for module in (Plain(), Marked()):
        torch.compile(module, backend="eager")(torch.zeros(2))
    assert traced == [True, False]


@pytest.mark.slow
def test_importing_the_models_does_not_load_the_compiler() -> None:
    """Beyond what the libraries below load by themselves: torch 2.6 brings it along with them."""
    code = (
        "import sys, transformer_lens, nnsight; before = 'torch._dynamo' in sys.modules; import hooks, models; "
        "raise SystemExit('torch._dynamo' in sys.modules and not before)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

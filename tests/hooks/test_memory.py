"""The size of what is asked for is known before the forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import memory

STATE = "blocks.1.mixer.hook_state"


@pytest.mark.law
@pytest.mark.parametrize("variant", ["mamba", "lti", "s4d"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sizes_are_those_of_the_tensors(make: Callable[..., Any], x: Tensor, variant: str, dtype: torch.dtype) -> None:
    model, x = make(variant, dtype=dtype), x.to(dtype)
    values = hooks.record(model, x)
    for name, value in values.items():
        assert memory.site_bytes(model, x, name) == value.numel() * value.element_size(), name
    total = memory.check_memory(model, x, list(values), None)
    assert total == sum(value.numel() * value.element_size() for value in values.values())


@pytest.mark.law
def test_half_precision_is_not_underestimated(make: Callable[..., Any], x: Tensor) -> None:
    """The sites of the scan are in fp32 whatever the weights are in."""
    model, x = make(dtype=torch.bfloat16), x.bfloat16()
    values = hooks.record(model, x)
    assert values[STATE].dtype == torch.float32
    for name, value in values.items():
        assert memory.site_bytes(model, x, name) >= value.numel() * value.element_size(), name


@pytest.mark.law
def test_fact_4_the_size_of_a_state_is_linear_in_the_length(make: Callable[..., Any]) -> None:
    model = make()
    sizes = [memory.site_bytes(model, torch.empty(3, length, 5), STATE) for length in (100, 200, 400)]
    assert sizes == [3 * length * 16 * 4 * 8 for length in (100, 200, 400)]


@pytest.mark.hygiene
def test_a_refusal_comes_before_the_forward_and_says_what_would_fit(make: Callable[..., Any], x: Tensor) -> None:
    model = make()
    need = memory.check_memory(model, x, list(model.hook_dict), None)
    runs = model.runs
    with pytest.raises(
        hooks.TooLarge, match=r"take 313 kB, allowed are 200 kB \(max_memory\): without the sites of the scan"
    ):
        model.run_with_cache(x, max_memory=200_000)
    with pytest.raises(hooks.TooLarge, match="fewer"):
        model.run_with_cache(x, names_filter="*.hook_state", max_memory=1000)
    with pytest.raises(hooks.TooLarge):
        model.run_with_cache(x, max_memory=need - 1)
    with pytest.raises(hooks.TooLarge):
        model.run_with_cache(x, incl_bwd=True, max_memory=2 * need - 1)  # values and gradients
    assert model.runs == runs
    assert len(model.run_with_cache(x, max_memory=need)[1]) == len(model.hook_dict)
    advice = lambda name: name.rsplit(".", 1)[-1] not in ("hook_decay", "hook_write", "hook_state")  # noqa: E731
    model.run_with_cache(x, names_filter=advice, max_memory=200_000)


@pytest.mark.hygiene
def test_the_default_is_half_of_what_is_free(
    make: Callable[..., Any], x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    need = memory.check_memory(model, x, list(model.hook_dict), None)
    assert memory.free_memory(torch.device("cpu")) > 10**7
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * need)
    hooks.record(model, x)
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * need - 2)
    for call in (lambda: hooks.record(model, x), lambda: model.run_with_cache(x), lambda: hooks.show(model, x)):
        with pytest.raises(hooks.TooLarge, match=r"max_memory"):
            call()
    hooks.record(model, x, "*.hook_delta")


@pytest.mark.hygiene
def test_free_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    there = memory.free_memory(torch.device("cpu"))
    monkeypatch.setattr("builtins.open", missing)
    elsewhere = memory.free_memory(torch.device("cpu"))
    assert elsewhere > 0 and 0.1 < elsewhere / there < 10

"""The size of what is asked for is known before the forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
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


GB = 10**9
UNLIMITED = 9223372036854771712
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")
HOST = 64 * GB


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Free memory as psutil says it on any system, and control groups as a folder of the test shows them."""
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=HOST))
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "cgroup")
    for newest, root in ((True, tmp_path / "v2"), (False, tmp_path / "v1")):
        monkeypatch.setitem(memory._FILES, newest, (root, *memory._FILES[newest][1:]))
    return tmp_path


def group(folder: Path, files: tuple[str, str, str], limit: int | str, used: int, droppable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / files[0]).write_text(f"{limit}\n")
    (folder / files[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - droppable}\n{files[2]} {droppable}\n")


@pytest.mark.law
def test_without_control_groups_it_is_what_the_system_has_free(elsewhere: Path) -> None:
    """macOS and Windows have no /proc."""
    assert memory.free_memory(torch.device("cpu")) == HOST


@pytest.mark.law
@pytest.mark.parametrize(
    ("own", "groups", "free"),
    [
        ("0::/\n", [("v2", V2, 4 * GB, 3 * GB, GB)], 2 * GB),  # a container sees its own group as the root
        ("0::/a/b\n", [("v2/a/b", V2, "max", GB, 0), ("v2/a", V2, 5 * GB, 4 * GB, 0)], GB),  # the limit is above
        ("0::/a/b\n", [("v2/a/b", V2, 3 * GB, GB, 0), ("v2/a", V2, 50 * GB, GB, 0)], 2 * GB),
        ("0::/a\n", [("v2/a", V2, "max", GB, 0)], HOST),
        ("0::/a\n", [("v2/a", V2, 500 * GB, GB, 0)], HOST),
        ("0::/a\n", [("v2/a", V2, GB, 2 * GB, 0)], 0),
        ("4:memory:/job\n3:cpu:/\n", [("v1/job", V1, 3 * GB, GB, 0), ("v1", V1, UNLIMITED, GB, 0)], 2 * GB),
        ("2:cpu,memory:/docker/0f\n", [("v1", V1, 3 * GB, 2 * GB, GB)], 2 * GB),  # the path is the host's
        ("4:memory:/job\n0::/\n", [("v1/job", V1, UNLIMITED, GB, 0)], HOST),
        ("0::/gone\n", [], HOST),
        ("0::/a\n", [("v2/a", V2, "no number", GB, 0)], HOST),
    ],
)
def test_a_limit_of_the_container_or_the_job_wins_where_it_is_lower(
    elsewhere: Path, own: str, groups: list[Any], free: int
) -> None:
    (elsewhere / "cgroup").write_text(own)
    for place, files, limit, used, droppable in groups:
        group(elsewhere / place, files, limit, used, droppable)
    assert memory.free_memory(torch.device("cpu")) == free


@pytest.mark.law
def test_the_default_follows_the_container(make: Callable[..., Any], x: Tensor, elsewhere: Path) -> None:
    model = make()
    hooks.record(model, x)
    (elsewhere / "cgroup").write_text("0::/\n")
    group(elsewhere / "v2", V2, 10**6, 10**6 - 1000, 0)
    with pytest.raises(hooks.TooLarge, match="allowed are 500 B"):
        hooks.record(model, x)


@pytest.mark.law
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="compares with Linux' own account")
def test_free_memory_is_what_linux_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "none")
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    assert 0.5 < memory.free_memory(torch.device("cpu")) / (int(line.split()[1]) * 1024) < 2


@pytest.mark.hygiene
@pytest.mark.parametrize("wrong", ["x", "1GB", -1, float("nan"), float("inf"), True, torch.ones(3)])
def test_a_bound_that_is_none_is_refused_in_one_line(make: Callable[..., Any], x: Tensor, wrong: Any) -> None:
    """By what every function asks that takes the bound; their own annotations refuse it earlier in the tests."""
    model = make()
    with pytest.raises(hooks.BadArgument, match=r"max_memory is .* give a number of bytes") as refused:
        memory.check_memory(model, x, list(model.hook_dict), wrong)
    assert "\n" not in str(refused.value)
    memory.check_memory(model, x, list(model.hook_dict), 2e9)


@pytest.mark.hygiene
@pytest.mark.parametrize("wrong", ["x", 1.0, True, 3, -3, [1], torch.ones(2)])
def test_a_layer_that_is_none_is_refused_in_one_line(make: Callable[..., Any], x: Tensor, wrong: Any) -> None:
    model = make()
    assert len(model.blocks) == 2
    for name in ("stop_at_layer", "start_at_layer"):
        with pytest.raises(hooks.BadArgument, match=f"{name}=.*2 layers") as refused:
            model._layer(wrong, name)
        assert "\n" not in str(refused.value)
    assert torch.equal(model(x, stop_at_layer=-1), model(x, stop_at_layer=1))

"""The state from which a killed training goes on: one sealed safetensors file, renamed into place whole.

Weights and optimizer sit in the *same* file, so no moment exists at which they belong to different
steps. accelerate's ``save_state`` is not used: it pickles, and writes several files one by one.
The lines of metrics.jsonl are in it too, so that what is gone on from is under its one checksum.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from hooks import sealed
from hooks.errors import BadArgument, told
from interp.machine.files import strict_json, write_whole

try:
    import fcntl
except ImportError:  # Windows has no flock: there two runs in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

FORMAT = "mambascope-resume-2"
START = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_count": 0, "best": None, "stale": 0}
"""The progress of a training before its first step."""
COUNTS = ("step", "loss_count", "stale", "processes")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class State(NamedTuple):
    """``tensors``: weights, optimizer moments, RNG; ``progress``: step, seconds, sums; ``metrics``: lines so far."""

    tensors: dict[str, Tensor]
    progress: dict[str, Any]
    metrics: str = ""


def pack(model: nn.Module, optimizer: torch.optim.Optimizer, rng: Tensor) -> dict[str, Tensor]:
    """Everything that a step reads and writes, under names that say whose it is.

    ``rng`` is (process, bytes) uint8, the generator of every process. The schedules and the data
    streams are functions of the step and have nothing to save.
    """
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{key}/{name}"] = value
    tensors["rng"] = rng
    return {name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()}


def unpack(tensors: Mapping[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Put back what :func:`pack` took, and return the (process, bytes) RNG states.

    Raises ``RuntimeError`` or ``KeyError`` where ``tensors`` are those of another model.
    """
    prefix = "model/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        for key in MOMENTS:
            saved = tensors.get(f"optimizer/{key}/{name}")
            if saved is not None:
                shape = () if key == "step" else tuple(parameter.shape)
                if tuple(saved.shape) != shape:
                    raise RuntimeError(f"optimizer/{key}/{name} has shape {tuple(saved.shape)}, not {shape}")
                optimizer.state[parameter][key] = saved.to(parameter.device)
    return tensors["rng"]


def write(path: Path, state: State) -> None:
    """Write ``state`` so that ``path`` is the old file or the new one, never a part of either."""
    header = {"format": FORMAT, "progress": strict_json(state.progress), "metrics": state.metrics}
    write_whole(path, sealed.pack(state.tensors, header))


def read(path: Path) -> State:
    """The state in ``path``, checked; a damaged or foreign file is refused in one line."""
    try:
        stored = sealed.read(path)
        kind = stored.metadata.get("format")
        if not stored.sealed or kind != FORMAT:
            earlier = "; an earlier version wrote it" * (kind == "mambascope-resume-1")
            raise sealed.Unreadable(path, f"is of format {told(kind)}, not {told(FORMAT)} with its checksum{earlier}")
        progress = sealed.parsed(stored.metadata.get("progress", ""), path, "its progress")
        reason = _wrong(progress)
        if reason:
            raise sealed.Unreadable(path, f"is damaged: {reason}")
        return State(stored.tensors(), progress, stored.metadata.get("metrics", ""))
    except (sealed.Unreadable, FileNotFoundError) as error:
        reason = f"it {error.reason}" if isinstance(error, sealed.Unreadable) else "it is not there"
        raise BadArgument(
            f"the resume file {path} cannot be used: {reason}; delete that file to train from "
            "step 0 in the same folder, or give another --out"
        ) from error


def _wrong(progress: Any) -> str:
    """What is no progress in ``progress``, or nothing."""
    if not isinstance(progress, dict):
        return "its progress is no JSON object"
    for name in (*START, "processes"):
        value = progress.get(name, 0)
        whole = type(value) is int and value >= 0
        number = whole or (type(value) is float and math.isfinite(value))
        if not (whole if name in COUNTS else number or (name == "best" and value is None)):
            return f"{name} of its progress is {told(value)}"
    return "" if "processes" in progress else "its progress does not say of how many processes it is"


def keep(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    metrics: str = "",
) -> None:
    """Write where the training stands, and its ``metrics`` so far. Every process calls it; the main one writes."""
    mine = torch.get_rng_state()
    if accelerator.device.type == "cuda":
        mine = torch.cat([mine, torch.cuda.get_rng_state(accelerator.device)])
    rng = accelerator.gather(mine[None].to(accelerator.device)).cpu()
    if accelerator.is_main_process:
        saved = {**progress, "processes": accelerator.num_processes}
        write(path, State(pack(model, optimizer, rng), saved, metrics))
    accelerator.wait_for_everyone()


def go_on(
    path: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[dict[str, Any], str]:
    """(progress, lines of the metrics) in ``path``, with model, optimizer and generator put back; else a start.

    Raises :class:`BadArgument` for a file that is damaged, of another model, of more than ``steps``, or of another
    number of processes.
    """
    if not os.path.lexists(path):
        return dict(START), ""
    state = read(path)
    progress = state.progress
    if progress["processes"] != accelerator.num_processes:
        raise BadArgument(
            f"{path} was written by {progress['processes']} process(es) and this is "
            f"{accelerator.num_processes}: the prompts would differ; start as many as before or "
            "give another --out"
        )
    again = "delete it to train from step 0"
    if progress.get("step", 0) > steps:
        raise BadArgument(
            f"the resume file {path} is of another training: it is at step {progress['step']} of {steps}; {again}"
        )
    try:
        rng = unpack(state.tensors, model, optimizer)
    except (RuntimeError, KeyError) as error:
        raise BadArgument(f"the resume file {path} is of another model: {sealed.one_line(error)}; {again}") from error
    try:
        _set_random_state(rng, accelerator)
    except (RuntimeError, TypeError, IndexError) as error:
        raise BadArgument(
            f"the state of the random numbers in the resume file {path} is none: {sealed.one_line(error)}; {again}"
        ) from error
    return {key: progress.get(key, at_first) for key, at_first in START.items()}, state.metrics


def _set_random_state(rng: Tensor, accelerator: Accelerator) -> None:
    size = torch.get_rng_state().numel()
    mine = rng[accelerator.process_index]
    # Copies: torch reads a state from the start of its storage, whatever the view's offset.
    torch.set_rng_state(mine[:size].clone())
    if accelerator.device.type == "cuda" and mine.numel() > size:
        torch.cuda.set_rng_state(mine[size:].clone(), accelerator.device)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; the system lets go when the process ends, however it ends.

    A second training in the same folder is refused: the two would overwrite each other's
    checkpoints and mix their metrics.
    """
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadArgument(
                    f"another training is running in {folder.parent}; wait for it or give another --out"
                ) from error
        yield
    finally:
        os.close(descriptor)


class Metrics:
    """metrics.jsonl: one strict JSON object a line, in the order of the steps, no step twice."""

    def __init__(self, path: Path, kept: str) -> None:
        """Begin ``path`` with the lines ``kept``, whatever it holds: a killed training may have gone further."""
        self.path, self.text = path, kept
        write_whole(path, kept)

    def append(self, row: Mapping[str, Any]) -> None:
        line = strict_json(row) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line)
        self.text += line

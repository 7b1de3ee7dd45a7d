"""The state from which a killed training goes on: one safetensors file, renamed into place whole.

Weights and optimizer sit in the *same* file, so no moment exists at which they belong to different
steps. accelerate's ``save_state`` is not used: it pickles, and writes several files one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hooks.errors import BadArgument
from interp.files import strict_json, write_whole

try:
    import fcntl
except ImportError:  # Windows has no flock: there two runs in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

FORMAT = "mambascope-resume-1"
START = {"step": 0, "seconds": 0.0, "loss_sum": 0.0, "loss_count": 0, "best": None, "stale": 0}
"""The progress of a training before its first step."""


class State(NamedTuple):
    """``tensors``: weights, optimizer moments and RNG; ``progress``: step, seconds, sums."""

    tensors: dict[str, Tensor]
    progress: dict[str, Any]


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
    """Put back what :func:`pack` took, and return the (process, bytes) RNG states."""
    prefix = "model/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights)
    for name, parameter in model.named_parameters():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            saved = tensors.get(f"optimizer/{key}/{name}")
            if saved is not None:
                optimizer.state[parameter][key] = saved.to(parameter.device)
    return tensors["rng"]


def write(path: Path, state: State) -> None:
    """Write ``state`` so that ``path`` is the old file or the new one, never a part of either."""
    header = {
        "format": FORMAT,
        "progress": strict_json(state.progress),
        "digest": _digest(state.tensors),
    }
    write_whole(path, safetensors.torch.save(state.tensors, metadata=header))


def read(path: Path) -> State:
    """The state in ``path``, checked; a damaged or foreign file is refused in one line."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
        if header.get("digest") != _digest(tensors):
            raise ValueError("its content does not match its checksum")
        return State(tensors, json.loads(header["progress"]))
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise BadArgument(
            f"the resume file {path} cannot be used: {reason}; delete that file to train from "
            "step 0 in the same folder, or give another --out"
        ) from error


def keep(
    path: Path,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
) -> None:
    """Write where the training stands. Every process calls it; the main one writes."""
    mine = torch.get_rng_state()
    if accelerator.device.type == "cuda":
        mine = torch.cat([mine, torch.cuda.get_rng_state(accelerator.device)])
    rng = accelerator.gather(mine[None].to(accelerator.device)).cpu()
    if accelerator.is_main_process:
        saved = {**progress, "processes": accelerator.num_processes}
        write(path, State(pack(model, optimizer, rng), saved))
    accelerator.wait_for_everyone()


def go_on(path: Path, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The progress in ``path``, with model, optimizer and generator put back; else a start.

    Raises :class:`BadArgument` for a file that is damaged, of another model, or of another number
    of processes.
    """
    if not path.exists():
        return dict(START)
    state = read(path)
    progress = state.progress
    if progress["processes"] != accelerator.num_processes:
        raise BadArgument(
            f"{path} was written by {progress['processes']} process(es) and this is "
            f"{accelerator.num_processes}: the prompts would differ; start as many as before or "
            "give another --out"
        )
    try:
        rng = unpack(state.tensors, model, optimizer)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise BadArgument(
            f"the resume file {path} is of another model: {reason}; delete it to train from step 0"
        ) from error
    size = torch.get_rng_state().numel()
    mine = rng[accelerator.process_index]
    # Copies: torch reads a state from the start of its storage, whatever the view's offset.
    torch.set_rng_state(mine[:size].clone())
    if accelerator.device.type == "cuda" and mine.numel() > size:
        torch.cuda.set_rng_state(mine[size:].clone(), accelerator.device)
    return {key: progress.get(key, at_first) for key, at_first in START.items()}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes: safetensors would not see a flipped bit."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


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

    def __init__(self, path: Path, keep: int) -> None:
        """Open ``path`` and drop every line after step ``keep`` (and a line cut short)."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= keep:
                        kept.append(line + "\n")
        write_whole(path, "".join(kept))
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(strict_json(row) + "\n")

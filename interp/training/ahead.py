"""What a training will take, told before its first step: the steps of the search and of the run, and the time."""

from __future__ import annotations

import math
import time

from hooks.errors import NonFinite
from interp.training.fit import Objective, Run, initial_model, training_batch, validation
from interp.training.recipe import TrainConfig


def steps(config: TrainConfig) -> str:
    """``config``'s steps in words, and where the search is shorter than it asks, or left out."""
    rates, each = len(config.learning_rates), config.search_each
    training = f"training: {config.steps} steps"
    if rates == 1:
        return f"{training} at learning rate {config.learning_rates[0]:g}"
    if each == 0:
        few = f"no search, {config.steps} steps are too few to try {rates} rates"
        return f"{training} at learning rate {config.middle_rate:g}; {few}"
    short = f" (not {config.search_steps}: no search is longer than its training)" * (each < config.search_steps)
    return f"search: {rates} learning rates, {each} steps each{short}; then {training} at the best"


def told(run: Run) -> str:
    """``steps`` of the recipe, and how long they take if all are as long as one step on whole prompts, tried here.

    It leaves torch's generator elsewhere. Two steps, of which the first compiles what is compiled, and an evaluation.
    """
    config, accelerator = run.config, run.accelerator
    model = initial_model(run)
    objective = Objective(model, run.tasks)
    seconds = evaluation = math.nan
    try:
        for _ in range(2):
            began = time.perf_counter()
            batch = training_batch(run, config.steps - 1, config.steps)
            with accelerator.autocast():
                loss = objective(*batch)
            loss.backward()
            float(loss.detach())  # waits for a GPU
            seconds = time.perf_counter() - began
        began = time.perf_counter()
        validation(run)(model)
        evaluation = time.perf_counter() - began
    except NonFinite:  # the training itself will say where
        return steps(config)
    parts = [config.search_each] * len(config.learning_rates) if len(config.learning_rates) > 1 else []
    whole = sum(part * seconds + math.ceil(part / config.eval_every) * evaluation for part in [*parts, config.steps])
    before = ", less what is done already" * (run.folder / "resume" / "search.json").exists()
    before = before or ", less what is done already" * (run.folder / "resume" / "state.safetensors").exists()
    return f"{steps(config)}; {_words(whole)} at most ({seconds:.2g} s a step){before}"


def _words(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"about {seconds / size:.0f} {unit}"
    return f"about {max(seconds, 1):.0f} s"

"""The paper's lens: what a model would answer if it stopped after each block.

The residual stream r_l at the query, after block l (l = 0: before the first), goes through the model's own final norm
and head: ŷ_l = head(norm(r_l)). For every prompt and block apart, y ≈ a_l ŷ_l + b_l is fitted on m queries and judged
on others that share the context. Each query is a run of its own: the context is read once and its state forked, so no
query ever sees another. Source: arXiv 2402.03170 §3.2, which fits on m = 10 points.

A feature that knows nothing has, after such a fit, the squared error (1 + 1/m)(m − 2)/(m − 3) times the labels'
variance, and not 1: ``floor``. That is exact for Gaussian features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

import hooks
from hooks.brief import brief
from hooks.errors import BadArgument
from interp.arguments import whole_number
from interp.stats import Interval, bootstrap
from interp.tasks.base import Batch, Task

RESIDUALS = ("blocks.0.hook_resid_pre", "blocks.*.hook_resid_post")
LEAST_M = 6
"""Below 6 points the fit's error has no variance that an interval could be made of."""

Residuals = Float[Tensor, "block batch query d_model"]
Decoded = Float[Tensor, "block batch query"]


def query_tokens(batch: Batch) -> Float[Tensor, "batch n_pairs d_token"]:
    """Every example as the token that asks for its label, uncontaminated where the task contaminates examples.

    Interleaved tokens: x itself. Joint tokens: (x, 0). What is asked of a contaminated example is in ``truth``.
    """
    paired = joint(batch)
    names = ("asked", "clean", "clean_x") if paired else ("clean_x",)
    found = [batch.truth[name] for name in names if name in batch.truth]
    x = (found[0] if found else batch.x).to(batch.tokens)
    return torch.cat([x, torch.zeros_like(x[..., :1])], dim=-1) if paired else x


def context_tokens(batch: Batch, k: int) -> Float[Tensor, "batch pos d_token"]:
    """The tokens of the first ``k`` examples; none for k = 0."""
    return batch.tokens[:, : k if joint(batch) else 2 * k]


def asked(batch: Batch, examples: slice) -> Batch:
    """The batch of these examples only, as clean queries: what ``task.error`` compares their predictions with."""
    n_pairs = batch.targets.shape[1]
    truth = {
        name: value[:, examples] if value.ndim > 1 and value.shape[1] == n_pairs else value
        for name, value in batch.truth.items()
    }
    labels = truth.get("clean_y", batch.targets[:, examples])
    if "weight" in truth:
        truth["weight"] = torch.ones_like(labels)
    return dataclasses.replace(batch, targets=labels, x=batch.x[:, examples], y=batch.y[:, examples], truth=truth)


@dataclass(frozen=True)
class Forks:
    """One context, many queries: what the model held at each of them.

    residual   after 0, 1, … L blocks
    decoded    the same through the model's final norm and head
    asked      the queries as a batch: ``asked.targets`` are their labels
    """

    residual: Residuals
    decoded: Decoded
    asked: Batch


def forks(model: Any, batch: Batch, k: int, chunk: int = 2048) -> Forks:
    """The first ``k`` examples of each prompt as the context, and every later one as a query of its own.

    A model that takes ``state`` reads the context once; any other is run on context + query for each query. No more
    than ``chunk`` runs are held at once. Raises ``BadArgument`` for a k that leaves no query, ``UnknownSite`` for a
    model without residual sites.
    """
    whole_number("k", k, 0, batch.targets.shape[1] - 1)
    batch = batch.fed(model)
    context, queries = context_tokens(batch, k), query_tokens(batch)[:, k:]
    count = queries.shape[1]
    step = max(1, chunk // count)
    parts = []
    for start in range(0, len(batch), step):
        some = slice(start, start + step)
        runs = rearrange(queries[some], "batch query d -> (batch query) 1 d")
        held = _after(model, context[some], runs, count)
        parts.append(rearrange(held, "block (batch query) d -> block batch query d", query=count))
    residual = torch.cat(parts, dim=1)
    return Forks(residual, decode(model, residual), asked(batch, slice(k, None)))


def along(model: Any, batch: Batch, chunk: int = 256) -> Residuals:
    """The residual stream at the query of every example k = 0 … n_pairs − 1, after 0, 1, … L blocks.

    One forward where all examples are read in one (interleaved tokens, integers). Otherwise a model that takes
    ``state`` walks through the context once and is forked at each k; any other is run on each prefix.
    """
    parts = []
    for start in range(0, len(batch), chunk):
        some = batch.take(slice(start, start + chunk)).fed(model)
        if not joint(some):
            stacked = _stacked(hooks.record(model, some.tokens, RESIDUALS))
            parts.append(
                stacked[:, torch.arange(len(some), device=stacked.device)[:, None], some.read.expand(len(some), -1)]
            )
            continue
        queries, count = query_tokens(some), some.targets.shape[1]
        each, state = [], None
        for k in range(count):
            query = queries[:, k : k + 1]
            if not hasattr(model, "step"):
                each.append(_after(model, context_tokens(some, k), query, 1))
                continue
            each.append(_stacked(hooks.record(model, query, RESIDUALS, state=state))[:, :, -1])
            with torch.no_grad():
                _, state = model(some.tokens[:, k : k + 1], state=state, return_state=True)
        parts.append(torch.stack(each, dim=2))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def through_head(model: Any, residual: Residuals) -> Float[Tensor, "block batch query d_out"]:
    """head(norm(r)) of the model itself, or head(r) where it has no norm, in at least fp32.

    After the last block it is exactly the model's output.
    """
    norm = getattr(model, "ln_final", lambda r: r)
    made = torch.stack([model.head(norm(r)) for r in residual])
    return made.to(torch.promote_types(made.dtype, torch.float32))


def decode(model: Any, residual: Residuals) -> Decoded:
    """``through_head`` of a model whose output is one number: its prediction."""
    return through_head(model, residual)[..., 0]


@dataclass(frozen=True)
class Affine:
    """y ≈ a ŷ + b for every block and prompt: ``scale`` a, ``shift`` b, and ``corrected`` at the queries not used."""

    scale: Float[Tensor, "block batch"]
    shift: Float[Tensor, "block batch"]
    corrected: Decoded

    __repr__ = brief


def affine(decoded: Decoded, labels: Float[Tensor, "batch query"], m: int) -> Affine:
    """The fit on the first ``m`` queries of each prompt, applied to the rest; in fp64.

    A feature that is the same at all m queries gets a = 0. Raises ``BadArgument`` for m below LEAST_M, or where no
    query is left to judge on.
    """
    whole_number("m", m, LEAST_M, labels.shape[1] - 1)
    feature, goal = decoded.double(), labels.double().expand(decoded.shape)
    centre, middle = feature[..., :m].mean(-1, keepdim=True), goal[..., :m].mean(-1, keepdim=True)
    offset = feature[..., :m] - centre
    spread = offset.square().sum(-1, keepdim=True)
    # fp32 features that are equal differ by rounding, 1e-7 of their size.
    tiny = spread <= m * (1e-6 * centre).square()
    scale = (offset * (goal[..., :m] - middle)).sum(-1, keepdim=True) / spread.masked_fill(tiny, torch.inf)
    shift = middle - scale * centre
    return Affine(scale[..., 0], shift[..., 0], scale * feature[..., m:] + shift)


def floor(m: int) -> float:
    """(1 + 1/m)(m − 2)/(m − 3): squared error ÷ label variance of a feature that knows nothing, after the fit."""
    whole_number("m", m, least=4)
    return (1 + 1 / m) * (m - 2) / (m - 3)


def errors(
    task: Task, prediction: Float[Tensor, "block batch query *out"], batch: Batch
) -> Float[Tensor, "block batch query"]:
    """``task.error`` of every block's prediction; ``batch.targets`` has the labels."""
    kept = batch.targets.dtype if batch.targets.is_floating_point() else torch.float32
    return torch.stack([task.error(one.to(batch.targets.device, kept), batch) for one in prediction])


@dataclass(frozen=True)
class Profile:
    """How the error falls over depth: each block's share of the total decrease, and what that allows to be said.

    share    of the error's decrease; sums to 1
    factor   of the decrease of the error's logarithm; sums to 1, or NaN where an error is 0
    total    error before the first block minus error after the last
    words, log_words   "steady", "stepwise", "flat", "neither steady nor stepwise", or why nothing can be said
    """

    share: Interval
    factor: Interval
    total: Interval
    words: str
    log_words: str

    __repr__ = brief


FEWEST_BLOCKS = 4


def profile(error: Float[Tensor, "block batch"], n_boot: int = 1000, seed: int = 0) -> Profile:
    """The profile of errors by block (the first row: before any block) and prompt.

    With L blocks and 95 % intervals over prompts, a profile is called
      flat       if the interval of the total decrease holds 0
      steady     if every block's share lies between 1/(3 L) and 3/L, its interval included
      stepwise   if the quarter of the blocks (rounded up) with the largest shares has more than 3/4 of the decrease,
                 its interval included
    and nothing is said of fewer than FEWEST_BLOCKS blocks: a share of 1/3 can be neither even nor a step.
    """
    values = error.T.double().cpu().numpy()
    blocks = values.shape[1] - 1
    if blocks < 1:
        raise BadArgument("a profile needs the errors before and after at least one block")
    total = bootstrap(values[:, 0] - values[:, -1], n_boot, seed=seed)
    top = -(-blocks // 4)
    # A resample's mean can be 0 where the data's is not; half of the smallest mean that could be seen stands for it.
    tiny = values[values > 0].min() / (2 * len(values)) if (values > 0).any() else 1.0
    logarithm = bool((values.mean(axis=0) > 0).all())

    def parts(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = sample.mean(axis=0)
        return np.concatenate([_shares(mean), _shares(np.log(np.maximum(mean, tiny)))])

    order = parts(values)
    largest = [np.argsort(-half, kind="stable")[:top] for half in (order[:blocks], order[blocks:])]

    def statistic(sample: NDArray[np.float64]) -> NDArray[np.float64]:
        both = parts(sample)
        return np.concatenate([both, [both[:blocks][largest[0]].sum(), both[blocks:][largest[1]].sum()]])

    found = bootstrap(values, n_boot, seed=seed, statistic=statistic)
    share, factor = (_part(found, slice(i * blocks, (i + 1) * blocks)) for i in (0, 1))
    words = [_words(part, float(found.low[2 * blocks + i]), total, blocks) for i, part in enumerate((share, factor))]
    if not logarithm:
        none = np.full(blocks, np.nan)
        factor = Interval(none, none, none, found.n, found.level)
        words[1] = "an error of 0 has no logarithm"
    return Profile(share, factor, total, *words)


def _words(share: Interval, top_low: float, total: Interval, blocks: int) -> str:
    if float(total.low) <= 0 <= float(total.high):
        return "flat"
    if float(total.high) < 0:
        return "rising"
    if blocks < FEWEST_BLOCKS:
        return f"too few blocks ({blocks}) to say"
    if float(share.low.min()) >= 1 / (3 * blocks) and float(share.high.max()) <= 3 / blocks:
        return "steady"
    return "stepwise" if top_low > 0.75 else "neither steady nor stepwise"


def _shares(level: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each step down as a share of the whole way down; even where there is no way, so that a resample has a value."""
    steps = level[:-1] - level[1:]
    whole = steps.sum()
    return steps / whole if whole != 0 else np.full(len(steps), 1 / len(steps))


def _part(interval: Interval, of: slice) -> Interval:
    return Interval(interval.mean[of], interval.low[of], interval.high[of], interval.n, interval.level)


def _after(
    model: Any,
    context: Float[Tensor, "batch pos d_token"],
    queries: Float[Tensor, "runs 1 d_token"],
    count: int,
) -> Float[Tensor, "block runs d_model"]:
    """The residuals at ``count`` queries for each context, in the order of the contexts."""
    if not context.shape[1]:
        return _stacked(hooks.record(model, queries, RESIDUALS))[:, :, -1]
    if not hasattr(model, "step"):
        prompts = torch.cat([context.repeat_interleave(count, dim=0), queries], dim=1)
        return _stacked(hooks.record(model, prompts, RESIDUALS))[:, :, -1]
    with torch.no_grad():
        _, state = model(context, return_state=True)
    return _stacked(hooks.record(model, queries, RESIDUALS, state=_repeated(state, count)))[:, :, -1]


def joint(batch: Batch) -> bool:
    """Whether one token holds x and y together."""
    return batch.tokens.ndim == 3 and batch.tokens.shape[-1] > batch.x.shape[-1]


def _stacked(record: hooks.Record) -> Float[Tensor, "block batch pos d_model"]:
    return torch.stack(list(record.values()))


def _repeated(state: Any, count: int) -> Any:
    """The state with every row of its first axis ``count`` times."""
    return tree_map(lambda part: part.repeat_interleave(count, dim=0) if isinstance(part, Tensor) else part, state)

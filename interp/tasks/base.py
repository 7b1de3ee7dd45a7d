"""What a task is: prompts, the loss of each in-context example, and the truth behind them.

Example k (k = 0 … n_pairs - 1) is the prediction of y_k by a model that has seen the k pairs
before it and x_k. Every error in this project has the axes (batch, example k).

Tokens are vectors (``Task``) or integers (``TokenTask``). Of integers a prediction is the logarithm of a probability
for each token of the vocabulary, (batch, example k, vocabulary), and the loss is -log p(target), in nats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor
from torch.utils._pytree import tree_map

from hooks.brief import brief
from hooks.errors import BadArgument
from hooks.inputs import fed, first_weight

Model = Callable[..., Any]
"""``model(tokens) -> (batch, pos, d_out)``; may have ``step(token, state) -> (out, state)``."""


@dataclass(frozen=True)
class Batch:
    """Prompts, and what lies behind them.

    tokens   what the model is called with: vectors (batch, pos, d_token), or integers (batch, pos)
    targets  what example k is compared with
    read     positions of ``tokens`` at which predictions are read: one for each example, or only
             the last example's where the query is a token of its own kind
    kinds    for each position of ``tokens``, the index of its kind in ``task.kinds``
    x, y     the pairs, each label with its input; where tokens are integers, the token at which example k is
             read (batch, n_pairs, 1) and its target
    truth    what the sampler drew and the model is not told; the first axis is the prompt

    ``read`` and ``kinds`` are one row for all prompts, or a row for each prompt where the places differ.
    """

    tokens: Real[Tensor, "batch pos *d_token"]
    targets: Real[Tensor, "batch n_pairs"]
    read: Int[Tensor, "... n_read"]
    kinds: Int[Tensor, "... pos"]
    x: Real[Tensor, "batch n_pairs d"]
    y: Real[Tensor, "batch n_pairs"]
    truth: Mapping[str, Tensor]

    __repr__ = brief

    def __len__(self) -> int:
        """The number of prompts."""
        return self.tokens.shape[0]

    def take(self, prompts: slice | Tensor) -> Batch:
        """The batch of only these prompts; ``prompts`` is a slice or a tensor of indices."""
        return dataclasses.replace(
            self,
            tokens=self.tokens[prompts],
            targets=self.targets[prompts],
            read=self.read if self.read.ndim == 1 else self.read[prompts],
            kinds=self.kinds if self.kinds.ndim == 1 else self.kinds[prompts],
            x=self.x[prompts],
            y=self.y[prompts],
            truth={name: value[prompts] for name, value in self.truth.items()},
        )

    def last(self) -> Batch:
        """The same prompts of which only the last example is asked: ``targets``, ``x``, ``y`` and ``read`` of it."""
        return dataclasses.replace(
            self, targets=self.targets[:, -1:], x=self.x[:, -1:], y=self.y[:, -1:], read=self.read[..., -1:]
        )

    def to(self, where: torch.device | str | torch.dtype) -> Batch:
        """The same batch with every tensor on a device, or with every real one in a dtype: tokens that are integers,
        positions, kinds and flags stay what they are.
        """

        def moved(tensor: Tensor) -> Tensor:
            stays = isinstance(where, torch.dtype) and not tensor.is_floating_point()
            return tensor if stays else tensor.to(where)

        truth = {name: moved(value) for name, value in self.truth.items()}
        names = [part.name for part in dataclasses.fields(self) if part.name != "truth"]
        return Batch(**{name: moved(getattr(self, name)) for name in names}, truth=truth)

    def fed(self, model: Any) -> Batch:
        """The batch as ``model`` reads it: on its device, and its tokens in the dtype of its weights.

        Labels keep theirs: in a half-precision model they would otherwise be rounded like the predictions, and the
        error would come out too small.
        """
        batch = self if (weight := first_weight(model)) is None else self.to(weight.device)
        return dataclasses.replace(batch, tokens=fed(model, batch.tokens))


@runtime_checkable
class Task(Protocol):
    """A family of prompts. ``tasks.build(task.name, **task.config)`` gives an equal task."""

    @property
    def name(self) -> str:
        """The key in ``tasks.TASKS``."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """Every option with its value, defaults resolved; JSON keeps it."""
        ...

    @property
    def d(self) -> int:
        """Number of coordinates of one input x."""
        ...

    @property
    def n_pairs(self) -> int:
        """Number of (x, y) pairs of a prompt, the queried one included."""
        ...

    @property
    def d_token(self) -> int:
        """Width of one token, the model's ``d_in``; 1 where tokens are integers."""
        ...

    @property
    def d_out(self) -> int:
        """Width of the model's output."""
        ...

    @property
    def scale(self) -> float:
        """E[y²], so that predicting zero has error 1 after division by it; 1 where the loss is in nats.

        Of a shifted task it is the unshifted one's, so that their errors are in one unit.
        """
        ...

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the kinds of token."""
        ...

    @property
    def metric(self) -> str:
        """What a figure writes on the axis of ``error``."""
        ...

    @property
    def query_only(self) -> bool:
        """Whether only the last example of a prompt is trained and reported, so that one forward measures a model."""
        ...

    @property
    def report_ks(self) -> tuple[int, ...]:
        """The numbers k of examples seen at which a table gives the error; each below ``n_pairs``."""
        ...

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        d_active: int | None = None,
        n_pairs: int | None = None,
    ) -> Batch:
        """``n`` fresh prompts. Coordinates from ``d_active`` on are zero in x; ``n_pairs`` pairs
        instead of the task's own (a curriculum has fewer, a test of length more).
        """
        ...

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same inputs and shapes with the task variable, hence the labels, drawn anew."""
        ...

    def predict(self, model: Model, batch: Batch) -> Float[Tensor, "batch n_pairs *out"]:
        """The model's prediction of every example; no gradient is switched off here."""
        ...

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """The errors that one training step averages, out of one forward of the model.

        It is ``loss(predict(model, batch), batch)`` where one forward predicts every example. Where
        the query is a token of its own kind a forward predicts one, and ``generator`` draws which.
        """
        ...

    def loss(self, prediction: Float[Tensor, "batch n_pairs *out"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """What is trained (squared error, hinge, nats) for each example, not divided by ``scale``."""
        ...

    def error(self, prediction: Float[Tensor, "batch n_pairs *out"], batch: Batch) -> Float[Tensor, "batch n_pairs"]:
        """What is reported for each example: squared error ÷ ``scale`` in regression, 0/1 in classification, nats
        where the answer is random.
        """
        ...

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """The truth that a probe may look for; the first axis is the prompt."""
        ...

    def baselines(self, batch: Batch) -> dict[str, Float[Tensor, "batch n_pairs"]]:
        """``error`` × ``scale`` of the estimators that a model is compared with, with the axes of ``loss``."""
        ...


@runtime_checkable
class TokenTask(Task, Protocol):
    """A task whose tokens are integers: its model is a language model over its vocabulary (``head="lm"``)."""

    @property
    def vocabulary(self) -> int:
        """Number of different tokens, 0 … vocabulary - 1; ``d_out`` is the same number."""
        ...


def model_shape(task: Task) -> dict[str, Any]:
    """The fields of a model's config that the task settles: ``d_in``, ``d_out``, and ``head`` for integer tokens."""
    shape: dict[str, Any] = {"d_in": task.d_token, "d_out": task.d_out}
    return {**shape, "head": "lm"} if isinstance(task, TokenTask) else shape


def guess(task: Task, batch: Batch) -> Float[Tensor, "batch n_pairs *out"]:
    """A prediction that knows nothing: 0, or the same probability for every token of the vocabulary."""
    if isinstance(task, TokenTask):
        shape = (*batch.targets.shape, task.vocabulary)
        return torch.full(shape, -math.log(task.vocabulary), dtype=torch.float32, device=batch.targets.device)
    return torch.zeros_like(batch.targets)


def least_by_constant(task: Task, batch: Batch) -> float:
    """The smallest mean error of a prediction that is the same for every example, chosen with the labels in hand.

    Of the labels' mean, which is the best one for squared errors, their median and 0; where symbols are predicted, of
    their frequencies. Labels that have a mean are predicted in part by it, by who knows nothing of the prompt.
    """
    if isinstance(task, TokenTask):
        counts = torch.bincount(batch.targets.flatten(), minlength=task.vocabulary).double()
        usual = (counts / counts.sum()).clamp(min=1e-300).log().to(guess(task, batch))
        return float(task.error(usual.expand_as(guess(task, batch)), batch).mean())
    flat = batch.targets.flatten(0, 1)
    each = (guess(task, batch), flat.mean(0).expand_as(batch.targets), flat.median(0).values.expand_as(batch.targets))
    return min(float(task.error(constant, batch).mean()) for constant in each)


def outputs(model: Model, tokens: Real[Tensor, "batch pos *d_token"], d_out: int) -> Float[Tensor, "batch pos d_out"]:
    """``model(tokens)``, the tokens in the model's dtype, once it is sure that the model fits the task.

    Raises ``BadArgument`` if ``model.cfg.d_in`` is not the width of a token (torch would only say
    that two matrices do not match), if tokens are integers and the model is no language model, or
    if the output is not (batch, pos, d_out): indexing and broadcasting would carry on with another
    shape and give a number.
    """
    if tokens.ndim == 2:
        _check_head(model, d_out)
    else:
        _check_width(model, tokens.shape[-1])
    out = model(fed(model, tokens, device=False))
    wanted = (*tokens.shape[:2], d_out)
    if not isinstance(out, Tensor) or tuple(out.shape) != wanted:
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        head = 'head="lm"' if tokens.ndim == 2 else "a regression head"
        raise BadArgument(
            f"the model gave {found} for tokens {tuple(tokens.shape)}; the task needs {wanted} "
            f"(batch, pos, d_out): build the model with {head} of d_out={d_out}"
        )
    return out


def at_the_query(model: Model, batch: Batch, d_out: int) -> Float[Tensor, "batch 1"]:
    """The prediction of the last example of each prompt, out of one forward; compare it with ``batch.last()``.

    In every layout of tokens the last position is the query of the last example.
    """
    return outputs(model, batch.tokens, d_out)[:, -1:, 0]


def same_shape(prediction: Tensor, batch: Batch) -> None:
    """Nothing, or ``BadArgument``: broadcasting would turn another shape into a number."""
    if prediction.shape != batch.targets.shape:
        raise BadArgument(
            f"the prediction is {tuple(prediction.shape)} and the targets are "
            f"{tuple(batch.targets.shape)}; give one prediction for each example"
        )


def log_probabilities(model: Model, batch: Batch, d_out: int) -> Float[Tensor, "batch n_pairs d_out"]:
    """log p of every token of the vocabulary at each example, out of one forward; in at least fp32.

    ``batch.read`` has one position for each example.
    """
    logits = outputs(model, batch.tokens, d_out)
    read = batch.read.expand(len(batch), -1)
    picked = logits.gather(1, read[..., None].expand(-1, -1, d_out))
    return picked.to(torch.promote_types(picked.dtype, torch.float32)).log_softmax(dim=-1)


def nats(
    prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch, vocabulary: int
) -> Float[Tensor, "batch n_pairs"]:
    """-log p(target) of each example."""
    _check_vocabulary(prediction, batch, vocabulary)
    return -prediction.gather(-1, batch.targets[..., None])[..., 0]


def wrong(
    prediction: Float[Tensor, "batch n_pairs vocabulary"], batch: Batch, vocabulary: int
) -> Float[Tensor, "batch n_pairs"]:
    """1 where the most probable token is not the target, 0 where it is; 1 - 1/m where m tokens share that place."""
    _check_vocabulary(prediction, batch, vocabulary)
    best = prediction == prediction.amax(dim=-1, keepdim=True)
    hit = best.gather(-1, batch.targets[..., None])[..., 0]
    return 1 - hit.to(prediction) / best.sum(dim=-1)


def token_batch(
    tokens: Int[Tensor, "batch pos"],
    targets: Int[Tensor, "batch n_pairs"],
    read: Int[Tensor, "... n_pairs"],
    kinds: Int[Tensor, "... pos"],
    truth: Mapping[str, Tensor],
) -> Batch:
    """The batch of integer tokens with these targets; x is the token at which each example is read."""
    x = tokens.gather(1, read.expand(len(tokens), -1))
    return Batch(tokens, targets, read, kinds, x=x[..., None], y=targets, truth=truth)


def _check_vocabulary(prediction: Tensor, batch: Batch, vocabulary: int) -> None:
    """Nothing, or ``BadArgument``: gathering would read another shape's numbers."""
    wanted = (*batch.targets.shape, vocabulary)
    if tuple(prediction.shape) != wanted:
        raise BadArgument(
            f"the prediction is {tuple(prediction.shape)} and the task needs {wanted}; give one prediction for each "
            f"example, with log p of each of the {vocabulary} tokens"
        )


def at_each_query(
    model: Model,
    context: Float[Tensor, "batch n_context d_token"],
    queries: Float[Tensor, "batch n_pairs d_token"],
    d_out: int,
) -> Float[Tensor, "batch n_pairs d_out"]:
    """The output at query k after the first k context tokens, for every k = 0 … n_pairs - 1.

    A model with ``step`` walks through the context once; at each k its state is copied and the copy
    reads the query, so that no query is ever part of a later query's past. The copy matters even
    though ``step`` returns a new state: recurrent caches are often updated in place.
    A model without ``step`` (a transformer, a plain function) is called on each of the n_pairs
    prefixes instead, which is the definition, and costs O(n_pairs²) tokens.
    """
    _check_width(model, queries.shape[-1])
    context, queries = (fed(model, part, device=False) for part in (context, queries))
    n_pairs = queries.shape[1]
    if context.shape[1] < n_pairs - 1:
        raise BadArgument(f"{n_pairs} queries need {n_pairs - 1} context tokens; there are {context.shape[1]}")
    out: list[Tensor] = []
    if hasattr(model, "step"):
        state: Any = None
        for k in range(n_pairs):
            out.append(model.step(queries[:, k], _copy(state))[0])
            if k + 1 < n_pairs:
                _, state = model.step(context[:, k], state)
    else:
        for k in range(n_pairs):
            prompt = torch.cat([context[:, :k], queries[:, k : k + 1]], dim=1)
            out.append(outputs(model, prompt, d_out)[:, -1])
    return torch.stack(out, dim=1)


def _check_width(model: Model, d_token: int) -> None:
    """Nothing, unless the model says which width it reads and that is another."""
    d_in = getattr(getattr(model, "cfg", None), "d_in", None)
    if d_in is not None and d_in != d_token:
        raise BadArgument(
            f"the model reads tokens of width {d_in} and the task makes them {d_token} wide; build "
            f"the task with the config in model.card, or the model with d_in={d_token}"
        )


def _check_head(model: Model, d_out: int) -> None:
    """Nothing, unless the model says what it reads and that is not integers, or another vocabulary."""
    cfg = getattr(model, "cfg", None)
    head, size = getattr(cfg, "head", "lm"), getattr(cfg, "d_out", d_out)
    if (head, size) != ("lm", d_out):
        raise BadArgument(
            f'the model has head="{head}" of d_out={size} and the task makes integer tokens of a vocabulary of '
            f'{d_out}; build the model with head="lm", d_out={d_out}'
        )


def _copy(state: Any) -> Any:
    """The same nest of lists, tuples and dicts with every tensor cloned; gradients flow through."""
    return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, state)

"""Shifts at test time: a regression task whose prompts differ from those of training in one stated way, or in several.

    task = shifts.apply(tasks.build("linreg", d=5), ["orthogonal_query", ("label_noise", {"sigma": 0.5})])

The result is a task. The same generator gives it the functions and the inputs of the task without shifts, before they
are shifted, so that the two are compared prompt by prompt. In the order in which things happen:

    skewed_inputs, scaled_inputs       every x
    random_quadrants, orthogonal_query, overlapping_query      the query apart from its context; one of them at most
    (labels are made of these x)
    label_noise, scaled_labels         every y
    longer_context                     more pairs than in training

Shifts of one line act in the order in which they are given. Source: arXiv 2208.01066 §5 and its released code.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from hooks.errors import BadArgument, told
from interp import seeds
from interp.arguments import between, chosen, listed, whole_number
from interp.tasks import inputs
from interp.tasks.base import Batch, Model, Task, at_the_query
from interp.tasks.regression import Regression, true_or_false

X = Float[Tensor, "batch n_pairs d"]
Y = Float[Tensor, "batch n_pairs"]
Asked = str | tuple[str, Mapping[str, Any]] | list[Any]
"""A shift: its name, or (name, options)."""


@dataclass(frozen=True)
class Shift:
    """One shift: what it does where, and where it makes no sense.

    inputs       x and a generator → the x of every pair
    query        x and a generator → x with another last example, and what was drawn for ``truth``
    labels       y, targets, standard normal noise, E[y²] of the task's labels → y, targets
    noisy        whether ``labels`` uses the noise
    longer       the task's own number of pairs → the number instead
    within_rank  the prompt has at most as many pairs as its inputs have dimensions
    least_pairs  the prompt has at least so many pairs
    isotropic    the task's inputs have to be isotropic
    refused      tasks by name, with the reason why it makes no sense there
    """

    name: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[X, torch.Generator], X] | None = None
    query: Callable[[X, torch.Generator], tuple[X, dict[str, Tensor]]] | None = None
    labels: Callable[[Y, Y, Tensor | None, float], tuple[Y, Y]] | None = None
    noisy: bool = False
    longer: Callable[[int], int] | None = None
    within_rank: bool = False
    least_pairs: int = 1
    isotropic: bool = False
    refused: Mapping[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The names that ``build`` takes."""
    return list(SHIFTS)


def build(name: str, **config: Any) -> Shift:
    """The shift called ``name`` with these options, its defaults resolved.

    Raises ``BadArgument`` for a name or an option that does not exist, with the nearest that does.
    """
    made = chosen("shift", name, SHIFTS, config)(**config)
    options = inspect.signature(SHIFTS[name]).bind(**config)
    options.apply_defaults()
    return dataclasses.replace(made, name=name, config=options.arguments)


def _asked(one: Any) -> Shift:
    """The shift of a name, or of (name, options)."""
    if isinstance(one, str):
        return build(one)
    if isinstance(one, tuple | list) and len(one) == 2 and isinstance(one[1], Mapping):
        return build(one[0], **one[1])
    raise BadArgument(f'a shift is a name, or (name, {{option: value}}), not {told(one)}; e.g. "label_noise"')


def apply(task: Task, asked: Asked | Sequence[Asked]) -> Task:
    """``task`` under this shift or these, each a name or (name, options); the task itself if there are none.

    ``apply(tasks.build(…), shifted.config["shifts"])`` with the rest of its config is an equal task.
    Raises ``BadArgument`` with the reason where a shift or the combination makes no sense.
    """
    alone = isinstance(asked, tuple | list) and len(asked) == 2 and isinstance(asked[1], Mapping)
    each: Sequence[Any] = [asked] if alone else listed("shifts", asked)
    given = [_asked(one) for one in each]
    if not given:
        return task
    if isinstance(task, Shifted):
        return Shifted(task.base, (*task.shifts, *given))
    if not isinstance(task, Regression):
        if all(shift.longer for shift in given):
            raise BadArgument(
                f'"{task.name}" has no shifts; its longer contexts are task.sample(n, generator, n_pairs=…), and '
                "--longer of learning_curves"
            )
        raise BadArgument(
            f'shifts move the x and y of a function that is drawn for each prompt; the task "{task.name}" is made '
            f"otherwise: give linreg, sparse_linreg, polynomial, relu_net, decision_tree or single_index"
        )
    return Shifted(task, tuple(given))


def label_noise(sigma: float = 1.0, renormalise: bool = False, noisy_targets: bool = False) -> Shift:
    """Gaussian noise of standard deviation ``sigma`` on every label.

    renormalise    labels then times sqrt(S / (S + sigma²)), S = E[y²] of the task without shifts
    noisy_targets  whether the target has the noise of its label. By default it has none, so that the error says how
                   well the function is known. The papers' curves have both options on: their error cannot fall below
                   sigma² / (S + sigma²) of S.
    """
    between("sigma", sigma, 0.0)
    true_or_false("renormalise", renormalise)
    true_or_false("noisy_targets", noisy_targets)

    def noisy(y: Y, targets: Y, normal: Tensor | None, mean_square: float) -> tuple[Y, Y]:
        assert normal is not None
        factor = (mean_square / (mean_square + sigma**2)) ** 0.5 if renormalise else 1.0
        noise = sigma * normal
        return factor * (y + noise), factor * (targets + noise if noisy_targets else targets)

    return Shift(labels=noisy, noisy=True)


def scaled_labels(factor: float) -> Shift:
    """Every label, and so the target, times ``factor``."""
    _positive(factor)
    return Shift(labels=lambda y, targets, normal, mean_square: (factor * y, factor * targets))


def scaled_inputs(factor: float) -> Shift:
    """Every x times ``factor``; the labels are those of the scaled x."""
    _positive(factor)
    return Shift(inputs=lambda x, generator: factor * x)


def skewed_inputs() -> Shift:
    """Inputs with eigenvalues ∝ i⁻², trace d, along axes of each prompt's own (``inputs.draw``).

    The released code draws the axes once for an evaluation, so that its interval over prompts is too narrow.
    """
    return Shift(inputs=lambda x, generator: inputs.stretch(x, "skewed", generator), isotropic=True)


def random_quadrants() -> Shift:
    """The context lies in one quadrant: a coordinate has one random sign in every x of a prompt but the query's."""

    def quadrant(x: X, generator: torch.Generator) -> tuple[X, dict[str, Tensor]]:
        signs = seeds.signs((len(x), 1, x.shape[-1]), generator)
        return torch.cat([x[:, :-1].abs() * signs, x[:, -1:]], dim=1), {}

    why = "a tree splits at 0, so that a context in one quadrant falls into one leaf and says nothing of the others"
    return Shift(query=quadrant, refused={"decision_tree": why})


def orthogonal_query() -> Shift:
    """The query is orthogonal to every x of its context, with the length that it had. Only for k < d: there is no such
    direction otherwise. A prediction linear in the query, by weights in the span of the context, is 0.
    """
    why = "a tree asks for the sign of one coordinate, which being orthogonal to the context says nothing of"
    return Shift(query=_across_context, within_rank=True, refused={"decision_tree": why})


def overlapping_query() -> Shift:
    """The query is one of the earlier x, each as probable; ``truth`` has its number as "overlaps". Only for k ≥ 1."""

    def repeat(x: X, generator: torch.Generator) -> tuple[X, dict[str, Tensor]]:
        earlier = seeds.integers(0, x.shape[1] - 1, (len(x),), generator)
        prompt = torch.arange(len(x), device=x.device)
        return torch.cat([x[:, :-1], x[prompt, earlier][:, None]], dim=1), {"overlaps": earlier}

    return Shift(query=repeat, least_pairs=2)


def longer_context(n_pairs: int | None = None) -> Shift:
    """Prompts of ``n_pairs`` pairs, more than the task's own; None: twice as many."""
    if n_pairs is not None:
        whole_number("n_pairs", n_pairs, least=2)
    return Shift(longer=lambda own: 2 * own if n_pairs is None else n_pairs)


SHIFTS: dict[str, Callable[..., Shift]] = {
    "label_noise": label_noise,
    "scaled_inputs": scaled_inputs,
    "scaled_labels": scaled_labels,
    "random_quadrants": random_quadrants,
    "orthogonal_query": orthogonal_query,
    "overlapping_query": overlapping_query,
    "skewed_inputs": skewed_inputs,
    "longer_context": longer_context,
}


@dataclass(frozen=True)
class Shifted:
    """``base`` under ``shifts``: a task of the same name and the same tokens.

    ``scale`` is that of ``base``, as in the papers: every curve of a task is in the same unit. Predicting zero has an
    error other than 1 where a shift changes E[y²]; it is among the ``baselines``.

    A shift that treats the query apart makes it ``query_only``: a prompt has one such query, its last, and error
    against k is measured with ``sample(n, generator, n_pairs=k + 1)``.

    The parameters in ``truth`` and ``variables`` are those of the function before its labels were scaled.
    """

    base: Regression
    shifts: tuple[Shift, ...]

    def __post_init__(self) -> None:
        base, given = self.base, [shift.name for shift in self.shifts]
        for shift in self.shifts:
            if given.count(shift.name) > 1:
                raise BadArgument(f"{shift.name} is given twice; give it once, with what both should do together")
            if base.name in shift.refused:
                raise BadArgument(f'{shift.name} makes no sense on "{base.name}": {shift.refused[base.name]}')
            if shift.isotropic and base.covariance != "isotropic":
                raise BadArgument(
                    f'{shift.name} is a shift of isotropic inputs, and covariance="{base.covariance}"; build the task '
                    f'with covariance="isotropic"'
                )
            if shift.longer and shift.longer(base.n_pairs) <= base.n_pairs:
                raise BadArgument(
                    f"{shift.name} with n_pairs={shift.longer(base.n_pairs)} is no longer than the task's own "
                    f"{base.n_pairs}; give more, or no shift: a prefix of a prompt is a prompt"
                )
        special = [shift.name for shift in self.shifts if shift.query]
        if len(special) > 1:
            raise BadArgument(f"{' and '.join(special)} both say what the query is; give one of them")
        if self._most is not None and any(shift.longer for shift in self.shifts):
            raise BadArgument(
                f"{special[0]} needs at most {self._most} pairs (the dimensions of the inputs), so there is no "
                f"longer_context with it"
            )
        if self.n_pairs < self._least:
            raise BadArgument(f"{special[0]} needs at least {self._least} pairs and the task has {self.n_pairs}")

    @property
    def name(self) -> str:
        """The name of the task without shifts."""
        return self.base.name

    @property
    def config(self) -> dict[str, Any]:
        """The config of the task without shifts, and ``shifts``: [[name, options], …]."""
        return {**self.base.config, "shifts": [[shift.name, dict(shift.config)] for shift in self.shifts]}

    @property
    def d(self) -> int:
        """Number of coordinates of x."""
        return self.base.d

    @property
    def n_pairs(self) -> int:
        """The task's own number of pairs, unless a shift makes it longer or admits only fewer."""
        for shift in self.shifts:
            if shift.longer:
                return shift.longer(self.base.n_pairs)
        return self.base.n_pairs if self._most is None else min(self._most, self.base.n_pairs)

    @property
    def d_token(self) -> int:
        """Width of one token."""
        return self.base.d_token

    @property
    def d_out(self) -> int:
        """One number is predicted."""
        return self.base.d_out

    @property
    def scale(self) -> float:
        """That of the task without shifts."""
        return self.base.scale

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of token."""
        return self.base.kinds

    @property
    def metric(self) -> str:
        """The axis of ``error``; E[y²] is that of the task without shifts."""
        return self.base.metric

    @property
    def query_only(self) -> bool:
        """Whether a shift treats the query apart."""
        return any(shift.query for shift in self.shifts)

    @property
    def report_ks(self) -> tuple[int, ...]:
        """Those of the task at this length, and the last k if the prompt is longer; only the last if ``query_only``."""
        last = (self.n_pairs - 1,)
        if self.query_only:
            return last
        ks = dataclasses.replace(self.base, n_pairs=self.n_pairs).report_ks
        return tuple(sorted({*ks, *last})) if self.n_pairs > self.base.n_pairs else ks

    def sample(
        self,
        n: int,
        generator: torch.Generator,
        *,
        d_active: int | None = None,
        n_pairs: int | None = None,
    ) -> Batch:
        """``n`` shifted prompts of ``n_pairs`` pairs, the last one the special query if there is one.

        Raises ``BadArgument`` as the task without shifts does, and where there is no such query for so many pairs.
        """
        length = self.n_pairs if n_pairs is None else n_pairs
        batch = self.base.sample(n, generator, d_active=d_active, n_pairs=length)
        active = self.d if d_active is None else d_active
        self._check_length(length, active)
        x, truth = batch.x, dict(batch.truth)
        for shift in self.shifts:
            x = shift.inputs(x, generator) if shift.inputs else x
        x = torch.cat([x[..., :active], torch.zeros_like(x[..., active:])], dim=-1)
        for shift in self.shifts:
            if shift.query:
                x, drawn = shift.query(x, generator)
                truth |= drawn
        if any(shift.noisy for shift in self.shifts):
            truth["label_noise"] = seeds.normal(x.shape[:2], generator)
        return self._prompts(x, truth)

    def corrupt(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The same x and noise under another function, shifted alike."""
        return self._prompts(batch.x, self.base.redraw(batch, generator))

    def predict(self, model: Model, batch: Batch) -> Y:
        """The prediction of every example; the last one is the special query, if there is one."""
        return self.base.predict(model, batch)

    def training_loss(self, model: Model, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch n_read"]:
        """That of the task, or of the last example alone if ``query_only``."""
        if self.query_only:
            return self.loss(at_the_query(model, batch, self.d_out), batch.last())
        return self.base.training_loss(model, batch, generator)

    def loss(self, prediction: Y, batch: Batch) -> Y:
        """(prediction - target)² of each example."""
        return self.base.loss(prediction, batch)

    def error(self, prediction: Y, batch: Batch) -> Y:
        """``loss`` ÷ the ``scale`` of the task without shifts."""
        return self.base.error(prediction, batch)

    def variables(self, batch: Batch) -> dict[str, Tensor]:
        """Those of the task: sums over the shifted pairs, and the function before its labels were scaled."""
        return self.base.variables(batch)

    def baselines(self, batch: Batch) -> dict[str, Y]:
        """Those of the task, on the shifted pairs."""
        return self.base.baselines(batch)

    @property
    def _least(self) -> int:
        return max(shift.least_pairs for shift in self.shifts)

    @property
    def _most(self) -> int | None:
        """The largest number of pairs for which there is such a query; None if there is no bound."""
        bounded = any(shift.within_rank for shift in self.shifts)
        return inputs.rank(self.base.covariance, self.d) if bounded else None

    def _check_length(self, length: int, active: int) -> None:
        """Nothing, or ``BadArgument``: there is no such query for so many pairs."""
        special = " and ".join(shift.name for shift in self.shifts if shift.query)
        if length < self._least:
            raise BadArgument(f"{special} with n_pairs={length}: give at least {self._least}")
        most = length if self._most is None else min(self._most, active)
        if length > most:
            raise BadArgument(
                f"{special} with n_pairs={length}: {length - 1} inputs leave no direction of {most}; give at most "
                f"n_pairs={most}"
            )

    def _prompts(self, x: X, truth: Mapping[str, Tensor]) -> Batch:
        """The batch for these inputs, already shifted, and this truth."""
        y, targets = self.base.labels(x, truth)
        mean_square = self.base.functions.scale + self.base.noise.size**2
        for shift in self.shifts:
            if shift.labels:
                y, targets = shift.labels(y, targets, truth.get("label_noise"), mean_square)
        return self.base.layout.batch(x, y, targets, truth)


def _across_context(x: X, generator: torch.Generator) -> tuple[X, dict[str, Tensor]]:
    """x with its last example projected off the span of the others, and brought back to its length; in fp64."""
    context, query = x[:, :-1].double(), x[:, -1].double()
    basis, _ = torch.linalg.qr(context.mT)
    across = query
    for _ in range(2):  # once leaves rounding of the size of the query's part along the context
        across = across - einsum(basis, einsum(basis, across, "b i k, b i -> b k"), "b i k, b k -> b i")
    across = across * (query.norm(dim=-1, keepdim=True) / across.norm(dim=-1, keepdim=True))
    return torch.cat([x[:, :-1], across[:, None].to(x)], dim=1), {}


def _positive(factor: float) -> None:
    """Nothing, or ``BadArgument``: by 0 everything would be the same, by less it would be turned round."""
    if between("factor", factor, 0.0) == 0:
        raise BadArgument("factor=0 leaves nothing; give a positive number")

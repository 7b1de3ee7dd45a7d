"""Attribution: how much of one number of the output is owed to each entry of a site.

Three first-order answers, from the cheapest to the one that sums to what it explains:

    gradient × activation    a ⊙ ∂f/∂a                                   exact where f is linear in the site
    attribution patching     (a_clean − a_corrupted) ⊙ ∂f/∂a             exact where f is linear between the two runs
    integrated gradients     (a − a₀) ⊙ ∫₀¹ ∂f/∂a (a₀ + α (a − a₀)) dα   sums to f(a) − f(a₀), up to the gap it returns

f is ``metric(output)``, one number for each prompt. None of the three runs the model without the entry: where f is not
linear (norms, gates) ``patch.activations`` says what really happens then.

At ``hook_state``, as everywhere, h_t stands for itself and for all that follows from it: its gradient is the one that
arrives over later states too, which is the gradient of ``hook_write`` (h_t = ā_t h_{t−1} + w_t). ``readout_only=True``
counts only what is read out at t. Since h_t holds much of h_{t−1}, values of several positions are not to be added up.

A model in train mode is refused: dropout gives another gradient at each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import hooks
from hooks.brief import brief
from hooks.edits import Index, region_of
from hooks.errors import BadArgument, told
from hooks.gradients import check_gradient, refuse_gradients
from hooks.inputs import gradients_can_be, readable
from hooks.vocabulary import Pattern, kind_of
from interp.arguments import whole_number
from interp.machine.progress import progress
from interp.metric import Metric, kind, one_arithmetic, one_number


def gradients(
    model: Any, x: Tensor, sites: Pattern, metric: Metric, *, readout_only: bool = False, **model_kwargs: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """``(values, gradients)``: a and ∂f/∂a of each site, in its shape, by one forward and one backward for all sites.

    The weights need no gradients of their own. Edits that are on the model act as they are. Raises
    :class:`BadArgument` for a model in train mode, and for a metric that is not one number for each prompt or that no
    gradient leads back from to any of the sites; where only some are without a path their gradient is zero. Raises
    :class:`NonFinite` for a gradient that holds NaN or inf, with the place where it first appears on the way back.
    """
    gradients_can_be("attribution")
    names = hooks.resolve(model, sites)
    _refuse_training(model)
    readable(model, x, model_kwargs=model_kwargs)
    enters = {name: name if readout_only else _where_it_enters(name) for name in names}
    tapped = hooks.resolve(model, {*names, *enters.values()})
    found: dict[str, Tensor] = {}

    def keep(region: Tensor, whole: Tensor, site: str) -> Tensor:
        # A tensor of its own: what else reads ``whole`` (the residual stream beside a branch) does not pass this site.
        found[site] = whole.view_as(whole) if whole.requires_grad else whole.detach().requires_grad_()
        return found[site]

    edits = dict.fromkeys(tapped, hooks.Edit("attribution", keep))
    with torch.enable_grad():
        with hooks.edit(model, edits, readout_only=any(kind(name) == "hook_state" for name in tapped)):
            output = model(x, **model_kwargs)
        total = one_number(metric, output, x.shape[0]).sum()
        if not total.requires_grad:
            raise BadArgument(
                "the metric carries no gradient: make it of the model's output, by torch and not detached"
            )
        slopes = torch.autograd.grad(total, [found[enters[name]] for name in names], allow_unused=True)
    if all(slope is None for slope in slopes):
        raise BadArgument(f"no gradient reaches {names[0]}: what the metric reads does not depend on it")
    values = {name: found[name].detach() for name in names}
    filled = {
        name: torch.zeros_like(value) if slope is None else slope
        for (name, value), slope in zip(values.items(), slopes, strict=True)
    }
    refuse_gradients(filled, model, x, lambda output: one_number(metric, output, x.shape[0]).sum(), **model_kwargs)
    return values, filled


def gradient_x_activation(
    model: Any, x: Tensor, sites: Pattern, metric: Metric, *, readout_only: bool = False, **model_kwargs: Any
) -> dict[str, Tensor]:
    """a ⊙ ∂f/∂a of each site, in its shape: the first-order guess of what zeroing each entry would take away.

    Raises as :func:`gradients`. (Shrikumar et al. 2016)
    """
    values, slopes = gradients(model, x, sites, metric, readout_only=readout_only, **model_kwargs)
    return {name: values[name] * slopes[name] for name in values}


def attribution_patching(
    model: Any,
    clean: Tensor,
    corrupted: Tensor,
    sites: Pattern,
    metric: Metric,
    *,
    readout_only: bool = False,
    **model_kwargs: Any,
) -> dict[str, Tensor]:
    """(a_clean − a_corrupted) ⊙ ∂f/∂a of each site, in its shape, with the gradient of the corrupted run.

    Summed over a position (:func:`by_position`) it is the first-order guess of f_patched − f_corrupted where that
    position takes its clean value, for every site and position at once out of two forwards and one backward;
    ``patch.activations`` runs the model for each. Raises as :func:`gradients`, and :class:`BadArgument` for prompts of
    two shapes. (Nanda 2023; Syed et al. 2023)
    """
    readable(model, clean, "clean", model_kwargs)
    readable(model, corrupted, "corrupted", model_kwargs)
    if clean.shape != corrupted.shape:
        raise BadArgument(
            f"clean prompts {tuple(clean.shape)}, corrupted ones {tuple(corrupted.shape)}: give one shape"
        )
    with one_arithmetic(model):
        values, slopes = gradients(model, corrupted, sites, metric, readout_only=readout_only, **model_kwargs)
        source = hooks.record(model, clean, list(values), **model_kwargs)
    return {name: (source[name] - values[name]) * slopes[name] for name in values}


@dataclass(frozen=True)
class Integrated:
    """Integrated gradients of one site.

    values    attribution of each entry, in the site's shape (of its region, where ``pos`` or ``channels`` picked one)
    total     f(a) − f(a₀), (batch,): what the values explain
    gap       sum of the values − total, (batch,): by how much they fail to; more steps make it smaller
    baseline  a₀, in the shape of ``values``
    """

    values: Float[Tensor, "batch *site"]
    total: Float[Tensor, " batch"]
    gap: Float[Tensor, " batch"]
    baseline: Float[Tensor, "batch *site"]

    __repr__ = brief


def integrated_gradients(
    model: Any,
    x: Tensor,
    site: str,
    metric: Metric,
    *,
    baseline: Tensor | float = 0.0,
    pos: Index = None,
    channels: Index = None,
    steps: int = 32,
    readout_only: bool = False,
    batch_size: int | None = None,
    **model_kwargs: Any,
) -> Integrated:
    """(a − a₀) ⊙ ∫₀¹ ∂f/∂a dα along the straight line from ``baseline`` to the run's own value of ``site``.

    By captum, with Gauss–Legendre quadrature over ``steps`` points. ``baseline`` is a value of *this site* and
    broadcasts to it: 0, a mean, what a record of other prompts holds. Where ``pos`` or ``channels`` pick a region,
    only that moves and the rest is what it becomes. captum's own delta compares whole inputs, which means nothing at
    an interior site; the gap here is against f with the site at ``baseline``. The weights of the quadrature are fp32
    in captum, so the gap stays above some 1e-7 of the terms. ``batch_size`` bounds the prompts of one forward
    (``steps`` times the batch unless given).

    Raises :class:`BadArgument` for a pattern of several sites, a baseline that does not fit, a model in train mode.
    (Sundararajan et al. 2017)
    """
    # Here, because captum loads matplotlib, which first has to be safe from a back end that is not there.
    import interp.plot.backend  # noqa: F401, I001
    from captum.attr import IntegratedGradients

    gradients_can_be("attribution")
    name, *more = hooks.resolve(model, site)
    _refuse_training(model)
    readable(model, x, model_kwargs=model_kwargs)
    whole_number("steps", steps, least=1)
    if more:
        raise BadArgument(f'"{site}" matches {len(more) + 1} sites, {name} first: integrate over one at a time')
    if readout_only and kind(name) != "hook_state":
        raise BadArgument(f"readout_only=True is about hook_state, not about {name}")
    size = x.shape[0]
    value = region_of(hooks.record(model, x, name, **model_kwargs)[name], pos, channels, name)
    start = _fitted(baseline, value, name)

    def along(values: Tensor, tokens: Tensor) -> Float[Tensor, " points"]:
        given = {key: _repeat(argument, len(values) // size) for key, argument in model_kwargs.items()}
        change = hooks.set_to(values, pos=pos, channels=channels)
        with hooks.edit(model, {name: change}, readout_only=readout_only):
            output = model(tokens, **given)
        tick()
        # The metric may hold the labels of these prompts, so it is asked about one copy of the batch at a time.
        return torch.cat([one_number(metric, part, size) for part in output.split(size)])

    with progress(None, "integrated gradients") as tick:  # captum decides in how many forwards
        # Before the steps, so that a metric that does not work is known at once.
        with torch.no_grad():
            total = along(value, x) - along(start, x)
        # captum makes the points of its quadrature on torch's default device.
        with torch.enable_grad(), torch.device(value.device):
            values = IntegratedGradients(along).attribute(
                value, start, additional_forward_args=(x,), n_steps=steps, internal_batch_size=batch_size
            )
    values = values.detach()
    check_gradient(values, name)
    return Integrated(values, total, values.flatten(1).sum(1) - total, start)


def by_position(values: Tensor, site: str) -> Float[Tensor, "batch pos"]:
    """``values`` of a site (its full name or kind) summed over all axes but prompt and position.

    Raises :class:`BadArgument` where the site has no position axis.
    """
    row = kind_of(site)
    axis = 1 if row is None else row.pos_dim
    if axis is None:
        raise BadArgument(f"{site} has no position axis")
    return values.movedim(axis, 1).flatten(2).sum(2) if values.ndim > 2 else values


def _where_it_enters(name: str) -> str:
    """The site whose gradient is that of ``name`` with everything that follows from it."""
    return name.removesuffix("hook_state") + "hook_write" if kind(name) == "hook_state" else name


def _refuse_training(model: Any) -> None:
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise BadArgument(
            f"{training[0]} is in train mode, where dropout changes what is attributed: call model.eval()"
        )


def _fitted(baseline: Tensor | float, value: Tensor, name: str) -> Tensor:
    try:
        start = torch.as_tensor(baseline, dtype=value.dtype, device=value.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise BadArgument(f"baseline is {told(baseline)}: give a number, or a tensor of {tuple(value.shape)}") from None
    try:
        return start.expand(value.shape).clone()
    except RuntimeError as error:
        raise BadArgument(f"the baseline {tuple(start.shape)} does not fit {name}, {tuple(value.shape)}") from error


def _repeat(argument: Any, times: int) -> Any:
    """A model argument for ``times`` copies of the batch: the tensors of a state are repeated, the rest stays."""
    if isinstance(argument, Tensor):
        return argument.repeat(times, *[1] * (argument.ndim - 1))
    if isinstance(argument, tuple) and hasattr(argument, "_fields"):
        return type(argument)(*(_repeat(part, times) for part in argument))
    if isinstance(argument, list | tuple):
        return type(argument)(_repeat(part, times) for part in argument)
    return argument

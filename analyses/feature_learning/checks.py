"""What must hold of a study of feature learning for its numbers to mean anything."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analyses.feature_learning.rows import All
    from analyses.feature_learning.study import Subject
    from interp.result import Check


def all_checks(every: All) -> list[Check]:
    """What must hold for the numbers to mean anything."""
    import numpy as np
    import torch

    import hooks
    from analyses.feature_learning.transform import exact, features, transform
    from hooks.inputs import fed
    from interp import cards, evaluate
    from interp.metric import FP32, rounding
    from interp.probe import lucky
    from interp.result import Check

    asked, checks, model = every.asked, [], every.trained.subject.model
    for one in every.found:
        if one.subject.how not in ("trained", "retrained"):
            continue
        errors = {k: one.error[:, k] for k in asked.task.report_ks}
        for k, gap in cards.gaps(one.subject.model.card, errors).items():
            label = f"{one.subject.variant or 'model'}: error at k={k} against the card, in standard errors"
            checks.append(Check.at_most(label, gap, 4.0))

    own = evaluate.errors(model, asked.task, batch=asked.batch.take(slice(0, 8)))
    gap = float((every.trained.error[:8] - own).abs().max() / own.abs().max())
    checks.append(
        Check.at_most("errors of all queries at once against those one by one, relative", gap, rounding(model, FP32))
    )
    tokens = fed(model, asked.some.tokens[:16])
    with torch.no_grad():
        clean = model(tokens)
        with hooks.edit(model, {"*.hook_delta": hooks.scale(1.0), "*.hook_gate": hooks.scale(1.0)}):
            checks.append(
                Check.at_most("identity edit, largest change", float((model(tokens) - clean).abs().max()), 0.0)
            )
        for one in every.changed:
            if one.subject.how == "ablated":
                with one.subject.edited():
                    edited = model(tokens)
                own = _twin(one.subject)(tokens)
                gap = float((edited - own).abs().max() / own.abs().max())
                label = f"{one.subject.variant}: edit against the config with the same weights, relative"
                checks.append(Check.at_most(label, gap, rounding(model, FP32)))

    shuffled = float(np.mean([probe.controls["shuffled"].mean for probe in every.trained.reading.values()]))
    bound = lucky(asked.truth.numpy(), asked.split, copies=5)
    checks.append(Check.at_most(f"probes of shuffled {asked.target}: mean R²", shuffled, bound))

    phi = features(asked.asked.inside, asked.order)[..., :1]
    y = asked.asked.labels.y.expand(phi.shape[:3])[..., None]

    def planted(label: Any) -> Any:
        return transform(label(y) * phi, asked.asked, asked.order, asked.order, seed=asked.seed)

    # Nothing is random here but the transform's own x, which cancels: what is left is the grid's error.
    off = float(np.abs(planted(_bent).share.mean - exact(asked.task, _bent) ** 2)[1:4].max())
    checks.append(Check.at_most("planted transform y σ(y − 1): shares against quadrature", off, 0.03))
    followed = float(planted(_without) is not None)
    checks.append(Check.at_most("planted write without the label: what follows it", followed, 0.0))
    return checks


def _bent(y: Any) -> Any:
    import torch

    return y * torch.sigmoid(y - 1)


def _without(y: Any) -> Any:
    import torch

    return torch.ones_like(y)


def _twin(subject: Subject) -> Any:
    """The model of the variant's config, with the weights of the one that is edited."""
    import torch

    import models
    from analyses.feature_learning.variants import VARIANTS

    model = subject.model
    assert subject.variant is not None
    with torch.random.fork_rng(devices=[]):
        twin = models.build(model.architecture, **{**asdict(model.cfg), **VARIANTS[subject.variant]})
    weights = dict(model.state_dict())
    if subject.variant == "constant-step":
        for i in range(len(model.blocks)):
            stem = f"blocks.{i}.mixer."
            step = subject.means[f"{stem}hook_delta"].double().mean((0, 1))
            weights[f"{stem}x_proj.weight"] = weights[f"{stem}x_proj.weight"][model.cfg.rank :]
            weights[f"{stem}dt_bias"] = (step + torch.log(-torch.expm1(-step))).to(weights[f"{stem}D"])
            del weights[f"{stem}dt_proj.weight"], weights[f"{stem}dt_proj.bias"]
    twin.load_state_dict(weights)
    return twin.to(next(model.parameters())).eval()

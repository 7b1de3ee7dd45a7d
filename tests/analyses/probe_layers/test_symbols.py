"""The lens on symbols: its identity, its fit, its sums, and counting estimators that are told apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import models
from analyses.probe_layers import matching, readings, symbols
from analyses.probe_layers.families import Where
from interp import estimators, evaluate, lens, seeds, tasks
from interp.estimators.chains import forgetting

RIVALS = {"n_symbols": 3, "switch": 0.0}


def chain(n: int = 40, n_pairs: int = 24, **config: float) -> tuple[tasks.Task, tasks.Batch]:
    task = tasks.build("markov", **{"n_symbols": 3, "n_pairs": n_pairs, **config})
    return task, task.sample(n, seeds.generator("probe", 0))


@pytest.mark.law
@pytest.mark.parametrize(
    ("name", "config"),
    [("markov", {"n_pairs": 7}), ("mqar", {"n_pairs": 3}), ("selective_copy", {"n_pairs": 3, "length": 12})],
)
@pytest.mark.parametrize("architecture", ["mamba", "transformer"])
def test_logits_after_the_last_block_are_the_models_own(architecture: str, name: str, config: dict[str, int]) -> None:
    task = tasks.build(name, **config)
    torch.manual_seed(0)
    model = models.build(architecture, d_model=8, n_layers=2, head="lm", d_in=1, d_out=task.d_out).eval()
    batch = task.sample(5, seeds.generator("probe", 0))
    found = symbols.logits(model, batch).log_softmax(-1)
    torch.testing.assert_close(found[-1], evaluate.predictions(model, task, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[-1], atol=1e-2), "blocks do change the answer"


@pytest.mark.planted
def test_the_fit_finds_the_scale_and_shifts_that_made_the_symbols() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 4000, 5, 3).double()
    scale, shift = torch.tensor([0.5, 2.0]), torch.tensor([[0.7, -0.2, 0.0], [0.0, 1.0, -1.0]])
    p = (scale[:, None, None, None] * z + shift[:, None, None]).softmax(-1)
    for block in range(2):
        drawn = torch.multinomial(p[block].flatten(0, 1), 1, generator=torch.Generator().manual_seed(1))
        found = symbols.calibrate(z[[block]], drawn.reshape(4000, 5))
        assert float(found.scale) == pytest.approx(float(scale[block]), abs=0.06)
        offset = found.shift[0] - found.shift[0].mean()
        torch.testing.assert_close(offset, (shift[block] - shift[block].mean()).double(), atol=0.06, rtol=0)
        again = symbols.scales(z[[block]], drawn.reshape(4000, 5))
        assert again.shape == (1, symbols.GROUPS) and float(again.std()) > 0
        assert float(again.mean()) == pytest.approx(float(scale[block]), abs=0.06)


@pytest.mark.law
def test_a_feature_that_knows_nothing_gets_the_frequencies_of_the_symbols() -> None:
    goal = torch.tensor([[0, 0, 0, 1], [0, 2, 2, 1]])
    log_p = symbols.calibrate(torch.zeros(1, 2, 4, 4), goal)(torch.zeros(1, 2, 4, 4))
    expected = torch.tensor([4, 2, 2]).double() / 8
    torch.testing.assert_close(log_p[0, 0, 0, :3].exp(), expected, atol=1e-3, rtol=0)
    assert float(log_p[0, 0, 0, 3].exp()) < 1e-3, "a symbol that never comes"


@pytest.mark.planted
def test_sums_count_symbols_up_to_the_one_that_is_read() -> None:
    task, batch = chain(n=4, n_pairs=9)
    found = symbols.sums(batch, 5, task.d_out)
    for prompt in range(4):
        seen = batch.tokens[prompt, :6]
        counts = torch.bincount(seen, minlength=4).float()
        last = torch.nn.functional.one_hot(seen[-1], 4).float()
        torch.testing.assert_close(found[prompt], torch.cat([counts, last]))


PLANTED = {
    "add-β, order 1 (β = 0.7)": estimators.build("add_beta", beta=0.7, **RIVALS),
    "add-β, order 2 (β = 0.4)": estimators.build("add_beta", order=2, beta=0.4, **RIVALS),
    "frequencies (β = 3)": forgetting(0, 3.0, **RIVALS),
    "fading add-β (keeps 0.93, β = 0.2)": forgetting(1, 0.2, 0.93, **RIVALS),
}
"""Counting estimators at settings that are in no list of ours."""


@pytest.mark.planted
@pytest.mark.parametrize("how", ["raw", "squared"])
def test_a_counting_estimator_is_found_and_no_other(how: str) -> None:
    """As it is, and with logits twice as large: p² ÷ Σ p². Noise beside them is none of these."""
    task, batch = chain(n=60)
    nothing = symbols.uniform(task, batch).exp()
    p = torch.stack([predictor(batch).exp() for predictor in PLANTED.values()])
    p = p if how == "raw" else p.square() / p.square().sum(-1, keepdim=True)
    noise = torch.randn(1, 60, 24, 4, generator=torch.Generator().manual_seed(0))
    found = symbols.candidates(task, batch)
    *planted, (random,) = matching.match(torch.cat([p - nothing, noise]), found, range(1, 24))
    for said, (one,) in zip(PLANTED, planted, strict=True):
        assert one.named.clear and one.named.said() == (said if how == "raw" else f"{said} to the power 2")
        assert float(one.named.best.distance.mean) < 1e-8 < 1 <= float(one.raw["zero"].distance.mean)
        if how == "raw":
            assert one.as_it_is == one.named
        else:
            assert one.as_it_is.name in (matching.NONE, said.split(" (")[0]), "sharper is no other estimator"
    assert random.as_it_is.name == random.named.name == matching.NONE


@pytest.mark.definition
@pytest.mark.parametrize("switch", [0.0, 0.2])
def test_families_of_counts_are_the_estimators(switch: float) -> None:
    task, batch = chain(n=5, switch=switch)
    options = {"n_symbols": 3, "switch": switch}
    where = Where(slice(1, 4), torch.tensor([0, 3, 4, 23]))
    nothing = symbols.uniform(task, batch).exp().double()
    found = symbols.candidates(task, batch)
    for family, scaled in zip(found.families[1:], found.scaled, strict=True):
        beta, *fades = family.starts[-1].tolist()
        order = 0 if family.name == "frequencies" else int(family.name[-1]) if "order" in family.name else 1
        keep = math.exp(-fades[0]) if fades else 1.0
        expected = forgetting(order, beta, keep, **options)(batch).double().exp()
        torch.testing.assert_close(
            family.predict(family.starts[-1][None, None], where)[0],
            (expected - nothing)[1:4][:, where.ks], rtol=1e-5, atol=1e-6,
        )  # fmt: skip
        power = torch.tensor([beta, *fades, 3.0]).double()
        sharper = expected**3 / (expected**3).sum(-1, keepdim=True)
        torch.testing.assert_close(
            scaled.predict(power[None, None], where)[0], (sharper - nothing)[1:4][:, where.ks], rtol=1e-5, atol=1e-6
        )


@pytest.mark.law
@pytest.mark.parametrize(("order", "keep"), [(0, 1.0), (1, 0.5), (2, 0.8)])
def test_fading_counts_are_those_of_a_loop(order: int, keep: float) -> None:
    _, batch = chain(n=3, n_pairs=10, switch=0.2)
    found = forgetting(order, 0.5, keep, n_symbols=3, switch=0.2)(batch).exp()

    def by_hand(y: list[int], k: int) -> list[float]:
        start = max([i + 1 for i in range(k) if y[i] == 3], default=0)
        counts = [0.5] * 3
        if k - start >= order:
            for j in range(start + order, k):
                if y[j - order : j] == y[k - order : k]:
                    counts[y[j]] += keep ** (k - 1 - j)
        return [0.8 * count / sum(counts) for count in counts] + [0.2]

    expected = [[by_hand(y, k) for k in range(10)] for y in batch.y.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.law
def test_who_knows_nothing_knows_the_rate_of_switches() -> None:
    task, batch = chain(n=2, n_pairs=3, switch=0.1)
    torch.testing.assert_close(symbols.uniform(task, batch).exp()[0, 0], torch.tensor([0.3, 0.3, 0.3, 0.1]))
    recall = tasks.build("mqar", n_pairs=3)
    flat = symbols.uniform(recall, recall.sample(2, torch.Generator()))
    assert flat.unique().tolist() == pytest.approx([-math.log(recall.d_out)])


@pytest.mark.planted
def test_the_lens_sees_the_block_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of nothing, then twice the Bayes predictor's, then its own: the fit undoes the factor, ``raw`` has it."""
    task = tasks.build("markov", n_symbols=3, n_pairs=24)
    model = models.build("mamba", d_model=8, n_layers=2, head="lm", d_in=1, d_out=4).eval()
    bayes = estimators.build("add_beta", **RIVALS)

    def planted(_: models.Stack, batch: tasks.Batch) -> Tensor:
        best = bayes(batch).clamp(min=-9.0)
        return torch.stack([torch.zeros_like(best), 2 * best, best])

    monkeypatch.setattr(symbols, "logits", planted)
    subject = readings.Subject("planted", model, model, task, 23, 0)
    seen = readings.through_lens(subject, 200, 10, 12)
    fitted, raw = seen.fitted.mean(1), seen.raw.mean(1)
    best = float(seen.rivals["bayes"].mean())
    torch.testing.assert_close(fitted[1:].float(), torch.full((2,), best), atol=0.01, rtol=0)
    assert float(raw[1]) > best + 0.05 and float(raw[2]) == pytest.approx(best, abs=1e-3)
    assert float(fitted[0]) == pytest.approx(seen.floor) == pytest.approx(math.log(3), abs=0.02)
    torch.testing.assert_close(seen.scale.mean(1).float(), torch.tensor([1.0, 0.5, 1.0]), atol=0.05, rtol=0)
    assert float(seen.other_labels[2].mean()) > seen.floor + 0.1
    assert seen.profile.share.mean[0] == pytest.approx(1.0, abs=0.02)
    assert lens.floor(10) > 1, "the formula of the other floor is not for symbols"

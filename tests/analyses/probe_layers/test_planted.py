"""Names through the whole command: models that are an algorithm, set by hand. ``test_probe_layers`` has one of none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from analyses import probe_layers
from analyses.probe_layers import families
from analyses.probe_layers.matching import NONE
from hooks.point import emit, site
from interp import estimators, evaluate, tasks
from interp.estimators.chains import forgetting
from interp.result import Result
from models.theory import online_gradient

D, N_PAIRS = 3, 9
ONES: dict[str, tuple[str, dict[str, Any]]] = {
    "k-NN": ("knn", {"neighbours": 3}),
    "ridge": ("ridge", {"alpha": 0.37}),
    "GD": ("gd", {"steps": 3, "rate": 0.237}),
    "GD on sums": ("gd", {"steps": 2, "rate": 0.017, "over": "sums"}),
    "Newton": ("newton", {"steps": 4}),
    "online GD": ("online_gd", {"rate": 0.19}),
    "online GD of labels": ("online_gd", {"rate": 0.05, "forgetting": 0.8, "form": "label"}),
    "GD++": ("gdpp", {"steps": 2, "rate": 0.5, "gamma": 0.1}),
    "averaging": ("averaging", {}),
    "least squares": ("ols", {}),
}
"""One algorithm for each block of ``Planted``."""


@dataclass(frozen=True)
class PlantedConfig:
    d_in: int = D
    d_model: int = D + 1
    d_out: int = 1
    n_layers: int = len(ONES)
    scale: float = 1.0
    shift: float = 0.0
    head: str = "regression"


class PlantedBlock(nn.Module):
    """The last channel becomes what one algorithm says of each x, times ``on``; a fresh block says what x_0 is."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.estimate = estimators.build(ONES[name][0], **ONES[name][1])
        self.on = nn.Parameter(torch.zeros(()))
        self.hook_resid_pre, self.hook_resid_post = site("hook_resid_pre"), site("hook_resid_post")

    def forward(self, r: Tensor) -> Tensor:
        r = emit(self.hook_resid_pre, r, shared=True).clone()
        x, y = r[:, 0::2, :D], torch.zeros_like(r[:, 0::2, 0])
        y[:, : r.shape[1] // 2] = r[:, 1::2, 0]
        said = self.estimate(SimpleNamespace(x=x.double(), y=y.double())).to(r)
        r[:, 0::2, -1] = self.on * said + (1 - self.on) * x[..., 0]
        return emit(self.hook_resid_post, r)


class Planted(models.Root):
    """Interleaved tokens; the answer is ``scale`` times what the last block's algorithm says, plus ``shift``."""

    architecture = "planted"

    def __init__(self, cfg: PlantedConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(PlantedBlock(name) for name in list(ONES)[: cfg.n_layers])
        self.ln_final, self.head = nn.Identity(), nn.Linear(cfg.d_model, 1)
        self.embed.linear.requires_grad_(False)
        with torch.no_grad():
            self.embed.linear.weight.copy_(torch.eye(cfg.d_model, cfg.d_in))
            self.embed.linear.bias.zero_()
            self.head.weight.zero_()[0, -1] = cfg.scale
            self.head.bias.fill_(cfg.shift)
        self.setup()

    def axis_sizes(self) -> dict[str, int]:
        return {"d_model": self.cfg.d_model, "d_out": 1}

    def _run(self, x: Tensor, *_: Any) -> tuple[Tensor, list[Any]]:
        r = emit(self.hook_embed, self.embed(x))
        for block in self.blocks:
            r = block(r)
        return self.head(self.ln_final(r)), []


@pytest.fixture(autouse=True)
def few_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solvers of at most six steps; of all that there are in the slow tests."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(families, "STEPS", 6)


@pytest.fixture(autouse=True)
def planted_is_an_architecture(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(models.ARCHITECTURES, "planted", Planted)
    monkeypatch.setitem(models.CONFIGS, "planted", PlantedConfig)
    yield


def ran(model: models.Root, folder: Path, name: str = "linreg", **options: Any) -> Result:
    """The command on ``model``, saved with a card that tells the truth about it."""
    task = tasks.build(name, **{"n_pairs": N_PAIRS, **options})
    measured = {f"k={k}": row for k, row in evaluate.summary(model.eval(), task).items()}
    card = {"task": name, "task_config": task.config, "measured": {"model": measured, "n": 1280}}
    models.save(model, folder / "planted.safetensors", card)
    config = probe_layers.Config(task=name, model=str(folder / "planted.safetensors"), prompts=32, queries=4, m=6)
    return probe_layers.run(config)


@pytest.mark.planted
@pytest.mark.parametrize(
    ("scale", "shift"), [pytest.param(*case, marks=pytest.mark.slow) for case in [(1.0, 0.0), (2.0, -1.0)]]
)
def test_every_block_of_a_planted_model_has_its_algorithms_name(scale: float, shift: float, tmp_path: Path) -> None:
    """As it is under its own name; with a scale and a shift under none as it is, and under its own with them."""
    model = Planted(PlantedConfig(scale=scale, shift=shift))
    for block in model.blocks:
        block.on.data.fill_(1.0)
    found = ran(model, tmp_path, d=D)
    assert found.ok or scale != 1, [check for check in found.checks if not check.ok]
    assert found.arrays["match_name"][0] == NONE, "before the first block there is only x"
    for block, own in enumerate(ONES, start=1):
        assert found.arrays["match_name"][block] == (own if scale == 1 else NONE)
        assert found.arrays["match_scaled_name"][block] == own
        assert found.arrays["match_scaled_nearest"][0, block] < 1e-5
    last = found.provenance["last block"]
    title = probe_layers.plot(found).get_suptitle()
    if scale == 1:
        assert last["as it is"]["name"] == "least squares"
        assert "the last block's predictions, as they are, fit least squares" in title
    else:
        assert last["as it is"]["name"] == NONE and last["with a scale"]["said"].startswith("least squares × 2 − 1")
        assert "none of the algorithms tried fits the last block's predictions as they are" in title
        assert "scaled, least squares × 2 − 1" in title
    rows = found.table[(found.table.part == "match") & found.table.k.isna()]
    last_rows = rows[rows.block == len(ONES)]
    assert {"as it is: " + last["as it is"]["name"], "with a scale: least squares"} <= set(last_rows.what)
    assert {"least squares", "least squares, scaled", "the labels themselves"} <= set(last_rows.what)


@pytest.mark.slow
@pytest.mark.planted
def test_with_a_scale_alone_no_block_has_another_algorithms_name(tmp_path: Path) -> None:
    model = Planted(PlantedConfig(scale=0.6))
    for block in model.blocks:
        block.on.data.fill_(1.0)
    found = ran(model, tmp_path, d=D)
    for block, own in enumerate(ONES, start=1):
        # 0.6 of averaging is a step of descent at rate 0.6, the same function.
        names = {own, "GD"} if own == "averaging" else {own}
        assert found.arrays["match_name"][block] in {*names, NONE}, own
        assert found.arrays["match_scaled_name"][block] in names
    assert "least squares × 0.6" in probe_layers.plot(found).get_suptitle()


def gradient_steps(steps: int, rate: float) -> models.Root:
    """Linear attention of ``steps`` blocks that is exactly so many steps of gradient descent on Σ ½ (y − w·x)².

    Channels: x, y, a vector v that starts at the query, and the prediction. The convolution lets keys and values see
    the token before, so that a query is not among its own examples. A block: v ← v − η Σ x_i ⟨x_i, v⟩, prediction +=
    η Σ y_i ⟨x_i, v⟩. With eps of 1e8 the norms do nothing but divide by 1e4, which their weights undo.
    """
    width, x, y, v, answer = 2 * D + 2, slice(0, D), D, slice(D + 1, 2 * D + 1), 2 * D + 1
    model = models.build(
        "linear_attention", d_model=width, n_layers=steps, n_heads=1, feature="identity", normalise=False, d_mlp=0,
        d_conv=2, norm_eps=1e8, d_in=D + 1, d_out=1,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.linear.weight[: D + 1] = torch.eye(D + 1)
        model.embed.linear.weight[v, :D] = torch.eye(D)
        for block in model.blocks:
            block.norm.weight.fill_(1e4)
            mixer = block.mixer
            mixer.conv1d.weight[: D + 1, ..., 0] = 1.0
            mixer.conv1d.weight[D + 1 :, ..., 1] = 1.0
            mixer.v_proj.weight[: D + 1, : D + 1] = torch.eye(D + 1)
            mixer.k_proj.weight[x, x] = torch.eye(D)
            mixer.q_proj.weight[x, v] = width * torch.eye(D)
            mixer.out_proj.weight[v, x] = -rate * torch.eye(D)
            mixer.out_proj.weight[answer, y] = rate
        model.ln_final.weight.fill_(1e4)
        model.head.linear.weight[0, answer] = 1.0
    return model


@pytest.mark.planted
def test_linear_attention_that_descends_on_sums_is_called_that_after_every_block(tmp_path: Path) -> None:
    model = gradient_steps(3, 0.023)
    found = ran(model, tmp_path, d=D, tokens="joint")
    task = tasks.build("linreg", d=D, n_pairs=N_PAIRS, tokens="joint")
    batch = task.sample(4, torch.Generator().manual_seed(0))
    exact = estimators.build("gd", steps=3, rate=0.023, over="sums")(batch)
    torch.testing.assert_close(task.predict(model, batch), exact, rtol=1e-4, atol=1e-4)
    assert list(found.arrays["match_said"][1:]) == [
        "GD on sums (rate 0.023, 1 step)", "GD on sums (rate 0.023, 2 steps)", "GD on sums (rate 0.023, 3 steps)",
    ]  # fmt: skip
    assert "a constant" in found.arrays["match_said"][0], "before the first block it says 0 to every prompt"
    assert found.ok, [check for check in found.checks if not check.ok]


@pytest.mark.planted
@pytest.mark.slow
def test_the_papers_online_descent_is_called_that(tmp_path: Path) -> None:
    """arXiv 2509.23779: forgetting 2^(−1/n); its query's decay is a factor of the rate, β (1 − α) α."""
    found = ran(online_gradient(D, N_PAIRS), tmp_path, d=D, tokens="joint")
    keep = 2 ** (-1 / N_PAIRS)
    c1, c2 = keep / 2, ((1 - keep) * keep) ** 2 * (1 - keep ** (2 * N_PAIRS)) / (1 - keep**2)
    rate = keep * (1 - keep) * c1 / (c1**2 + (D + 1) * c2)
    said = f"online GD of labels (rate {rate:.3g}, forgetting {keep:.3g})"
    assert found.arrays["match_said"][1] == said == found.provenance["last block"]["as it is"]["said"]
    assert said in probe_layers.plot(found).get_suptitle()


@pytest.mark.planted
@pytest.mark.slow
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_a_model_that_counts_is_called_that(power: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of nothing after no block, then of two estimators; with logits twice as large, under none as it is."""
    from analyses.probe_layers import symbols
    from interp import evaluate as judged

    torch.manual_seed(0)
    model = models.build("mamba", d_model=8, n_layers=2, head="lm", d_in=1, d_out=3)
    counts = [forgetting(1, 0.7, 0.8, n_symbols=2), estimators.build("add_beta", beta=0.7, n_symbols=2)]

    def planted(_: Any, batch: tasks.Batch) -> Tensor:
        each = [one(batch).clamp(min=-40) for one in counts]
        return torch.stack([torch.zeros_like(each[0]), *(power * one for one in each)])

    monkeypatch.setattr(symbols, "logits", planted)
    monkeypatch.setattr(
        judged, "predictions", lambda model, task, batch, *_, **__: planted(model, batch)[-1].log_softmax(-1)
    )
    found = ran(model, tmp_path, "markov", n_pairs=24)
    to = "" if power == 1 else " to the power 2"
    assert list(found.arrays["match_scaled_said"][1:]) == [
        f"fading add-β (keeps 0.8, β = 0.7){to}", f"add-β, order 1 (β = 0.7){to}",
    ]  # fmt: skip
    if power == 1:
        assert list(found.arrays["match_name"][1:]) == ["fading add-β", "add-β, order 1"]
        assert "fit add-β, order 1 (β = 0.7)" in probe_layers.plot(found).get_suptitle()
    else:
        assert found.arrays["match_name"][-1] in (NONE, "add-β, order 1")


def test_the_planted_configuration_is_what_was_asked() -> None:
    assert asdict(PlantedConfig())["n_layers"] == len(ONES) == len(Planted(PlantedConfig()).blocks)

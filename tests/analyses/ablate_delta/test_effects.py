"""An ablation replaces what its name says, and nothing else."""

from __future__ import annotations

import pytest
import torch

import hooks
import models
from analyses.ablate_delta import controls as ablation_controls
from analyses.ablate_delta import effects as ablation
from analyses.ablate_delta.effects import Ablation, Cell, Reference
from hooks.errors import BadArgument
from interp import evaluate, tasks


@pytest.fixture(scope="module")
def runs() -> Ablation:
    torch.manual_seed(3)
    task = tasks.build("linreg", d=3, n_pairs=7)
    model = models.build("mamba", d_model=8, n_layers=3, d_state=4, d_in=3, d_out=1).double().eval()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.dt_proj.weight.mul_(20)
            block.mixer.x_proj.weight.mul_(5)
    reference = Reference(model, _double(evaluate.prompts(task, 30, 0, "reference")), task.kinds)
    return Ablation(model, task, _double(evaluate.prompts(task, 12, 0, "ablate")), reference)


def _double(batch: tasks.Batch) -> tasks.Batch:
    import dataclasses

    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(
        batch, **{k: v.double() for k, v in fields.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    )


def under(runs: Ablation, cell: Cell, pattern: str) -> torch.Tensor:
    """The site's values while the cell's edits are on."""
    with hooks.edit(runs.model, ablation.edits(cell, runs.model, runs.reference)):
        return hooks.record(runs.model, runs.batch.tokens, pattern)[pattern]


@pytest.mark.law
@pytest.mark.parametrize("mode", ["mean", "position-mean", "token-mean"])
def test_the_mean_of_a_constant_step_is_that_step_to_the_last_bit(mode: str) -> None:
    """In fp32 a sum over thousands of equal numbers is rounded; S4D would then take the path of a varying Δ."""
    task = tasks.build("linreg", d=3, n_pairs=21)
    model = models.build("s4d", d_model=8, n_layers=1, d_state=4, d_in=3, d_out=1).eval()
    found = Reference(model, evaluate.prompts(task, 100, 0, "reference"), task.kinds)
    mean = found.mean(mode, "blocks.0.mixer.hook_delta")
    step = model.blocks[0].mixer.log_dt.detach().exp()
    assert torch.equal(mean.expand(1, 41, 8), step.expand(1, 41, 8))


@pytest.mark.edit
@pytest.mark.parametrize("role", ["both", "decay", "write"])
@pytest.mark.parametrize("mode", ["mean", "position-mean", "token-mean"])
def test_means_come_from_the_reference_and_reach_the_role_that_is_named(runs: Ablation, mode: str, role: str) -> None:
    delta = runs.reference.record["blocks.1.mixer.hook_delta"]
    expected = torch.empty(delta.shape[1:], dtype=delta.dtype)
    for t in range(delta.shape[1]):
        same = {"mean": range(13), "position-mean": [t], "token-mean": range(t % 2, 13, 2)}[mode]
        expected[t] = delta[:, list(same)].mean((0, 1))
    cell = Cell(mode, "delta", role, layer=1)
    clean = hooks.record(runs.model, runs.batch.tokens, "blocks.1.mixer.hook_delta*")
    for kind in ("decay", "write"):
        name = f"blocks.1.mixer.hook_delta_{kind}"
        want = expected.expand(12, -1, -1) if role in ("both", kind) else clean[name]
        torch.testing.assert_close(under(runs, cell, name), want, rtol=1e-10, atol=1e-12)


@pytest.mark.edit
def test_resample_takes_another_prompts_value(runs: Ablation) -> None:
    name = "blocks.0.mixer.hook_delta"
    clean = hooks.record(runs.model, runs.batch.tokens, name)[name]
    found = under(runs, Cell("resample", layer=0), name)
    for i in range(12):
        sources = [j for j in range(12) if torch.equal(found[i], clean[j])]
        assert len(sources) == 1 and sources[0] != i


@pytest.mark.edit
def test_freeze_neither_writes_nor_forgets_the_tokens_of_its_kind(runs: Ablation) -> None:
    state = under(runs, Cell("freeze:y"), "blocks.2.mixer.hook_state")
    torch.testing.assert_close(state[:, 1::2], state[:, 0:-1:2], rtol=0, atol=0)
    clean = hooks.record(runs.model, runs.batch.tokens, "blocks.2.mixer.hook_state")["blocks.2.mixer.hook_state"]
    assert (clean[:, 1::2] - clean[:, 0:-1:2]).abs().max() > 1e-4


@pytest.mark.edit
def test_scale_and_all_mean(runs: Ablation) -> None:
    name = "blocks.0.mixer.hook_delta"
    clean = hooks.record(runs.model, runs.batch.tokens, name)[name]
    torch.testing.assert_close(under(runs, Cell("scale×0.25", layer=0), name), clean * 0.25)
    for kind in ("hook_delta", "hook_B", "hook_C"):
        values = under(runs, Cell("mean", "delta,B,C"), f"blocks.2.mixer.{kind}")
        assert values.std((0, 1)).max() < 1e-12  # time-invariant, and the same for every prompt


@pytest.mark.law
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_run_that_starts_at_its_layer_equals_the_whole_run(runs: Ablation, layer: int) -> None:
    cell = Cell("position-mean", layer=layer)
    changes = ablation.edits(cell, runs.model, runs.reference)
    torch.testing.assert_close(runs.run(cell), runs.under(changes), rtol=1e-10, atol=1e-12)
    assert (runs.run(cell) - runs.clean).abs().max() > 1e-9


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_sweep_on_copies_finds_what_each_cell_alone_does(runs: Ablation, threads: int) -> None:
    cells = [Cell(mode, "delta", "both", layer) for layer in (None, 1) for mode in ("mean", "resample", "scale×2")]
    seen: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = runs.sweep(cells, lambda: seen.append(1))
    finally:
        torch.set_num_threads(before)
    assert list(found) == cells and len(seen) == len(cells)
    for cell in cells:
        assert torch.allclose(found[cell], runs.run(cell), rtol=0, atol=1e-12), cell


@pytest.mark.edit
def test_identity_changes_no_bit_and_its_neighbour_does(runs: Ablation) -> None:
    changes = ablation_controls.identity(runs.model)
    assert torch.equal(runs.under(changes), runs.clean)
    changes["blocks.0.mixer.hook_C"] = hooks.scale(1.001)
    assert not torch.equal(runs.under(changes), runs.clean)


@pytest.mark.planted
def test_with_the_taps_cut_a_frozen_token_reaches_nothing_later() -> None:
    """One layer: freezing alone leaves a frozen y token visible through the convolution; cutting the taps hides it."""
    torch.manual_seed(0)
    task = tasks.build("linreg", d=3, n_pairs=7)
    model = models.build("mamba", d_model=8, n_layers=1, d_state=4, d_in=3, d_out=1).double().eval()
    batch = _double(evaluate.prompts(task, 5, 0, "ablate"))
    runs = Ablation(model, task, batch, Reference(model, batch, task.kinds))
    other = batch.tokens.clone()
    other[:, 1::2] += 1.0
    with torch.no_grad():
        freeze = ablation.edits(Cell("freeze:y"), model, runs.reference)
        with hooks.edit(model, freeze):
            assert (model(other) - model(batch.tokens))[:, 0::2].abs().max() > 1e-4
        with hooks.edit(model, ablation_controls.freeze_and_cut_taps(runs, "y")):
            torch.testing.assert_close(model(other)[:, 0::2], model(batch.tokens)[:, 0::2], rtol=0, atol=1e-12)


@pytest.mark.planted
def test_tap_share_of_planted_taps() -> None:
    """Only the tap of lag 1 is open, so every x token after the first holds a y token and nothing else."""
    torch.manual_seed(0)
    task = tasks.build("linreg", d=3, n_pairs=7)
    model = models.build("mamba", d_model=8, n_layers=1, d_state=4, d_in=3, d_out=1).eval()
    with torch.no_grad():
        model.blocks[0].mixer.conv1d.weight.zero_()[:, 0, 2] = 1.0
    batch = evaluate.prompts(task, 5, 0, "ablate")
    runs = Ablation(model, task, batch, Reference(model, batch, task.kinds))
    assert ablation_controls.tap_share(runs, "y").mean[0] == pytest.approx(1.0)
    with torch.no_grad():
        model.blocks[0].mixer.conv1d.weight.zero_()[:, 0, 1] = 1.0
    assert ablation_controls.tap_share(runs, "y").mean[0] == pytest.approx(0.0)
    found = []
    for sign in (1.0, -1.0):  # taps that cancel leave as much in them as taps that add up
        with torch.no_grad():
            weight = model.blocks[0].mixer.conv1d.weight.zero_()
            weight[:, 0, 2], weight[:, 0, 3] = 1.0, sign
        found.append(float(ablation_controls.tap_share(runs, "y").mean[0]))
    assert 0 < found[0] < 1 and found[0] == pytest.approx(found[1])


@pytest.mark.statistics
def test_noise_has_the_size_of_the_content_it_is_matched_to(runs: Ablation) -> None:
    name = "blocks.1.mixer.hook_delta"
    log_delta = runs.reference.record[name].log()
    noisy = ablation_controls.noise(runs, seed=0)[name]
    delta = runs.reference.record[name]
    draws = torch.stack([(noisy(delta) / delta).log() for _ in range(40)])
    for kind in (0, 1):
        wanted = log_delta[:, kind::2].var(0, unbiased=False).mean(0)
        torch.testing.assert_close(draws[:, :, kind::2].square().mean((0, 1, 2)), wanted, rtol=0.15, atol=1e-12)


@pytest.mark.planted
def test_the_channel_with_planted_content_is_picked(runs: Ablation) -> None:
    name = "blocks.2.mixer.hook_delta"
    record = runs.reference.record
    saved = record[name].clone()
    try:
        record[name][:, :, 5] *= (3 * torch.randn(30, 13, generator=torch.Generator().manual_seed(0))).exp()
        sets = ablation_controls.channel_sets(runs, share=1 / 16, seed=0)
    finally:
        record[name].copy_(saved)
    assert sets["most content"][name].channels.tolist() == [5]
    assert len(sets) == 6 and all(len(edits[name].channels) == 1 for edits in sets.values())


@pytest.mark.contract
def test_what_there_is_not_is_refused_in_one_line(runs: Ablation) -> None:
    model, kinds = runs.model, runs.task.kinds
    for modes, layers, message in (
        (["meen"], [], 'no mode is called "meen"; did you mean "mean"'),
        (["freeze:z"], [], "freeze:"),
        ([], [3], "no layer 3: the model has layers 0 to 2"),
    ):
        with pytest.raises(BadArgument, match=message) as error:
            ablation.cells_of(model, kinds, (2.0,), modes, layers)
        assert "\n" not in str(error.value)
    with pytest.raises(BadArgument, match="no role of B"):
        ablation.edits(Cell("mean", "B", "decay"), model, runs.reference)


@pytest.mark.contract
def test_signals_that_a_model_lacks_are_left_out() -> None:
    kinds = ("x", "y")
    s4d = models.build("s4d", d_model=8, n_layers=2, d_state=4, d_in=3, d_out=1)
    cells = ablation.cells_of(s4d, kinds, (2.0,))
    assert {cell.signal for cell in cells} == {"delta"}
    assert ablation.lacking(s4d) == [
        "no hook_B: B cannot be replaced",
        "no hook_C: C cannot be replaced",
        "no hook_gate: the output gate cannot be replaced",
        "no hook_B, hook_C: Δ, B and C together cannot be replaced",
    ]
    with pytest.raises(BadArgument, match="nothing is left of the modes all-mean: no hook_B"):
        ablation.cells_of(s4d, kinds, (2.0,), ["all-mean"])
    mamba = models.build("mamba", d_model=8, n_layers=2, d_state=4, d_in=3, d_out=1)
    assert {cell.signal for cell in ablation.cells_of(mamba, kinds, (2.0,))} == {"delta", "delta,B,C", "B", "C", "gate"}
    assert ablation.lacking(mamba) == []


@pytest.mark.contract
def test_no_prompt_is_left_alone_in_its_chunk(runs: Ablation) -> None:
    """Where the last chunk would hold one prompt, there would be no other one to take a value from."""
    batch = runs.batch.take(slice(0, 9))
    chunked = Ablation(runs.model, runs.task, batch, runs.reference, chunk=4)
    assert chunked.run(Cell("resample")).shape == (9, 7)
    whole = Ablation(runs.model, runs.task, batch, runs.reference)
    for cell in (Cell("mean"), Cell("freeze:y", layer=1)):
        torch.testing.assert_close(chunked.run(cell), whole.run(cell), rtol=1e-10, atol=1e-12)

"""Are we the same model as upstream? Hugging Face, mambapy and, where it can be imported,
mamba_ssm; no download.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from mambapy.mamba import Mamba as MambapyMamba
from mambapy.mamba import MambaConfig as MambapyConfig
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MambaModel,
)
from transformers.models.mamba import modeling_mamba

import hooks
import models
from hooks.errors import BadArgument
from models import checkpoint, pretrained
from models.checkpoint import CheckpointError

pytestmark = pytest.mark.parity

VOCABULARY = 29


def hugging_face(kind: type = MambaForCausalLM, **config: Any) -> Any:
    """A tiny random model whose every weight matters: initial values of 0 and 1 are moved."""
    fields = {"vocab_size": VOCABULARY, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 3}
    module = kind(MambaConfig(**{**fields, **config})).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module


def tokens(length: int, batch: int = 2) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 33])
def test_logits_and_states_equal_hugging_face(length: int) -> None:
    module = hugging_face()
    model, ids = models.load(module), tokens(length)
    with torch.no_grad():
        theirs = module(ids, use_cache=True)
        ours, state = model(ids, return_state=True)
    assert_close(ours, theirs.logits, rtol=1e-5, atol=1e-5)
    for layer, mine in enumerate(state):
        cache = theirs.cache_params.layers[layer]
        # Hugging Face keeps d_conv columns of the convolution, of which the oldest is never used
        # again.
        assert_close(mine.conv, cache.conv_states[0][:, :, 1:], rtol=1e-5, atol=1e-5)
        assert_close(mine.h, cache.recurrent_states[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"use_bias": True, "use_conv_bias": False},
        {"conv_kernel": 2, "expand": 3, "time_step_rank": 4},
        {"tie_word_embeddings": False},
        {"layer_norm_epsilon": 1e-2},
    ],
)
def test_variants_of_the_configuration(config: dict[str, Any]) -> None:
    module = hugging_face(**config)
    model, ids = models.load(module), tokens(9)
    assert_close(model(ids), module(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.cfg.norm_eps == module.config.layer_norm_epsilon
    assert model.cfg.tie_embeddings == module.config.tie_word_embeddings
    assert (model.head.linear.weight is model.embed.table.weight) == model.cfg.tie_embeddings
    back = pretrained.to_hugging_face(model)
    assert_close(back(ids).logits, module(ids).logits, rtol=1e-5, atol=1e-5)
    for name, value in module.state_dict().items():
        assert_close(back.state_dict()[name], value, rtol=0, atol=0)


def test_gradients_equal_hugging_face() -> None:
    module = hugging_face(tie_word_embeddings=False)
    model, ids = models.load(module), tokens(7)
    weight = torch.randn(2, 7, VOCABULARY)
    (module(ids).logits * weight).sum().backward()
    (model(ids) * weight).sum().backward()
    theirs = {pretrained._ours(pretrained._canonical(n)): p.grad for n, p in module.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, theirs[name], rtol=1e-3, atol=1e-4)


def test_a_bare_model_reads_out_with_its_own_table() -> None:
    module = hugging_face(MambaModel)
    model, ids = models.load(module), tokens(6)
    hidden = module(ids).last_hidden_state
    assert_close(model(ids), hidden @ module.embeddings.weight.T, rtol=1e-5, atol=1e-5)
    names = ["blocks.*.hook_resid_post", "ln_final.hook_normalized"]
    record, theirs = (
        hooks.record(model, ids, names),
        module(ids, output_hidden_states=True).hidden_states,
    )
    assert_close(record["ln_final.hook_normalized"] * model.ln_final.weight, hidden, rtol=1e-5, atol=1e-5)
    for layer in range(2):
        assert_close(record[f"blocks.{layer}.hook_resid_post"], theirs[layer], rtol=1e-5, atol=1e-5)


def test_a_loaded_model_is_a_copy_with_a_card() -> None:
    module = hugging_face()
    model = models.load(module)
    assert not model.training and model.architecture == "mamba" and model.cfg.head == "lm"
    assert model.card["source"] == "transformers MambaForCausalLM" and model.card["parity"] <= 1e-4
    assert model.card["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    checkpoint.check_card(model.card)
    before = checkpoint.digest(model)
    with torch.no_grad():
        module.backbone.layers[0].mixer.D += 1
    assert checkpoint.digest(model) == before != checkpoint.digest(models.load(module))


def test_the_source_is_left_as_it_was() -> None:
    module = hugging_face().train()
    module.backbone.norm_f.eval()
    functions, random = vars(modeling_mamba).copy(), torch.get_rng_state()
    models.load(module)
    assert module.training and module.backbone.layers[0].training and not module.backbone.norm_f.training
    assert torch.equal(random, torch.get_rng_state())
    assert vars(modeling_mamba) == functions


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Half precision is widened without loss; what is compared is the source in fp32."""
    module = hugging_face().to(dtype)
    model = models.load(module)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {wanted}
    assert_close(model.blocks[1].mixer.D, module.backbone.layers[1].mixer.D.to(wanted), rtol=0, atol=0)
    assert module.dtype == dtype
    ids = tokens(5)
    assert_close(model(ids).float(), copy.deepcopy(module).to(wanted)(ids).logits, rtol=1e-4, atol=1e-4)


def test_kernels_that_fail_on_a_cpu_are_stepped_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers binds an importable mamba_ssm also where there is no GPU; its own forward then
    raises.
    """
    module = hugging_face()
    for name in ("mamba_selective_scan", "causal_conv1d_fn"):
        original = getattr(modeling_mamba, name)

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("selective_scan_cuda is not installed")

        broken.__wrapped__ = original  # type: ignore[attr-defined]
        monkeypatch.setattr(modeling_mamba, name, broken)
    with pytest.raises(RuntimeError, match="selective_scan_cuda"):
        module(tokens(4))
    model = models.load(module)
    monkeypatch.undo()
    assert_close(model(tokens(4)), module(tokens(4)).logits, rtol=1e-5, atol=1e-5)


def falcon() -> nn.Module:
    return FalconMambaForCausalLM(
        FalconMambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=1)
    )


def mamba2() -> nn.Module:
    return Mamba2ForCausalLM(
        Mamba2Config(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 16,
                "state_size": 4,
                "num_hidden_layers": 1,
            },
            **{"num_heads": 4, "head_dim": 8, "n_groups": 1},
        )
    )


def clamped() -> nn.Module:
    module = hugging_face()
    module.config.time_step_limit = (0.01, 0.1)
    return module


def elsewhere() -> nn.Module:
    return hugging_face().to("meta")


@pytest.mark.parametrize(
    "make, reason",
    [
        (falcon, "a FalconMambaForCausalLM is not converted: it normalises Δ, B and C"),
        (mamba2, "a Mamba2ForCausalLM is not converted: it is Mamba-2"),
        (lambda: hugging_face(hidden_act="gelu"), 'its activation is "gelu", Mamba has SiLU'),
        (clamped, r"it clamps Δ to (0.01, 0.1)"),
        (elsewhere, "its weights are on meta"),
    ],
)
def test_what_is_another_function_is_refused(make: Any, reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        models.load(make())
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def swap_b_and_c(mixer: Any) -> None:
    rank, n = mixer.cfg.rank, mixer.cfg.d_state
    low, B, C = mixer.x_proj.weight.clone().split([rank, n, n])
    mixer.x_proj.weight.copy_(torch.cat([low, C, B]))


def reverse_taps(mixer: Any) -> None:
    mixer.conv1d.weight.copy_(mixer.conv1d.weight.flip(-1))


def transpose_channels_and_taps(mixer: Any) -> None:
    weight = mixer.conv1d.weight
    weight.copy_(weight[:, 0].mT.reshape(weight.shape))


def lose_the_skip(mixer: Any) -> None:
    mixer.D.fill_(1)


def shift_one_skip(mixer: Any) -> None:
    mixer.D[3] *= 1.01


def shift_the_steps(mixer: Any) -> None:
    mixer.dt_proj.bias += 0.01


def shift_the_rates(mixer: Any) -> None:
    mixer.A_log += 0.01


MISTAKES = (
    swap_b_and_c, reverse_taps, transpose_channels_and_taps, lose_the_skip, shift_one_skip, shift_the_steps,
    shift_the_rates,
)  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_conversion_does_not_get_through(mistake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, right = hugging_face(), pretrained.from_state_dict

    def convert(tensors: Any, **options: Any) -> Any:
        model = right(tensors, **options)
        with torch.no_grad():
            mistake(model.blocks[1].mixer)
        return model

    monkeypatch.setattr(pretrained, "from_state_dict", convert)
    with pytest.raises(CheckpointError, match=r"is wrong: backbone\.layers\.1\.mixer\..* has other values here"):
        models.load(module)
    monkeypatch.setattr(pretrained, "from_state_dict", right)
    models.load(module)


@pytest.mark.parametrize("depth", [3, *(pytest.param(deep, marks=pytest.mark.slow) for deep in (24, 64))])
def test_the_comparison_of_functions_alone_finds_it_at_any_depth(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where both sides have the same numbers and read them differently: the weights are not looked at here."""
    module = hugging_face(num_hidden_layers=depth)
    model = models.load(module)
    monkeypatch.setattr(pretrained, "to_state_dict", lambda model: {})
    right = copy.deepcopy(model.blocks[depth - 2])
    for mistake in MISTAKES:
        with torch.no_grad():
            mistake(model.blocks[depth - 2].mixer)
        with pytest.raises(CheckpointError, match=f"is wrong: what layer {depth - 2} adds differ by"):
            pretrained._compare(model, module)
        model.blocks[depth - 2].load_state_dict(right.state_dict())
    pretrained._compare(model, module)


def test_a_forward_that_is_more_than_its_parts_is_refused() -> None:
    module = hugging_face()
    own = module.backbone.forward
    module.backbone.forward = lambda *args, **kwargs: _scaled(own(*args, **kwargs))
    with pytest.raises(CheckpointError, match="its forward is not its blocks one after the other"):
        models.load(module)


def _scaled(out: Any) -> Any:
    out.last_hidden_state = out.last_hidden_state * 1.01
    return out


def random_hugging_face(layers: int, width: int, vocabulary: int = VOCABULARY) -> Any:
    """As initialised by Hugging Face, moved by as much again: the logits of deep ones drift apart by rounding."""
    torch.manual_seed(1)
    config = MambaConfig(vocab_size=vocabulary, hidden_size=width, state_size=16, num_hidden_layers=layers)
    module = MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter += parameter.std() * torch.randn_like(parameter)
    return module


DEEP = {(64, torch.float16)}
"""Of three depths and three types this is tried by default."""


@pytest.mark.parametrize(
    "layers, dtype",
    [
        pytest.param(*case, marks=() if case in DEEP else pytest.mark.slow)
        for case in itertools.product((24, 48, 64), (torch.float32, torch.bfloat16, torch.float16))
    ],
)
def test_deep_models_are_converted(layers: int, dtype: torch.dtype) -> None:
    module = random_hugging_face(layers, 16).to(dtype)
    model = models.load(module)
    assert model.cfg.n_layers == layers and model.card["parity"] < pretrained.TOLERANCE
    with (
        torch.no_grad()
    ):  # a part of our own in fp64 says how right both are: nothing is hidden by the other's rounding
        block, wide = model.blocks[layers - 1], copy.deepcopy(model.blocks[layers - 1]).double()
        r = torch.randn(2, 9, 16)
        exact = wide.mixer(wide.norm(r.double()), None, False)[0]
        assert_close(block.mixer(block.norm(r), None, False)[0].double(), exact, rtol=1e-5, atol=1e-6)
    back = pretrained.to_hugging_face(model)
    assert torch.equal(back.state_dict()["lm_head.weight"], module.state_dict()["lm_head.weight"].float())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_130m_shape_is_converted(dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    module = MambaForCausalLM(MambaConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=24)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model = models.load(module.to(dtype))
    assert model.card["parity"] < pretrained.TOLERANCE / 3
    with torch.no_grad():
        model.blocks[20].mixer.D[5] *= 1.01
    with pytest.raises(CheckpointError, match="is wrong"):
        pretrained._compare(model, module)


@pytest.mark.parametrize("tied", [True, False])
def test_mamba_ssm_names_there_and_back(tied: bool) -> None:
    model = models.build("mamba", d_model=16, n_layers=2, d_state=3, head="lm", d_out=VOCABULARY, tie_embeddings=tied)
    named = pretrained.to_state_dict(model)
    assert {"backbone.embedding.weight", "backbone.norm_f.weight", "lm_head.weight"} <= set(named)
    assert named["backbone.layers.1.mixer.conv1d.weight"].shape == (32, 1, 4)
    assert named["backbone.layers.1.mixer.in_proj.weight"].shape == (64, 16)
    assert sum(name.startswith("backbone.layers.0.mixer.") for name in named) == 9
    back = pretrained.from_state_dict(named)
    assert back.cfg == models.MambaConfig(**{**vars(model.cfg), "dt_rank": 1})
    assert_close(back(tokens(5)), model(tokens(5)), rtol=0, atol=0)
    assert_close(pretrained.to_state_dict(back), named, rtol=0, atol=0)


def test_state_dicts_that_are_no_mamba_are_refused() -> None:
    good = pretrained.to_state_dict(models.build("mamba", d_model=16, n_layers=2, head="lm", d_out=VOCABULARY))
    layer = "backbone.layers.1.mixer."
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({f"{layer}dt_bias": torch.zeros(2)}, "it is Mamba-2"),
        ({f"{layer}B_bias": torch.zeros(2)}, "it is Mamba-3"),
        ({"backbone.layers.0.norm2.weight": torch.zeros(2)}, "its blocks have an MLP"),
        ({f"{layer}D": None}, f"the state dict lacks {layer}D"),
        ({"backbone.embedding.weight": None}, "the state dict lacks backbone.embedding.weight"),
        (
            {"backbone.layers.0.mixer.A_log": torch.zeros(36, 16)},
            "36 channels are no multiple of d_model=16",
        ),
        ({f"{layer}extra": torch.zeros(2)}, f"the state dict has {layer}extra"),
        (
            {f"{layer}D": torch.zeros(3)},
            f"{layer}D has shape (3,), by the other tensors it is (32,)",
        ),
        ({f"{layer}D": torch.full((32,), torch.nan)}, f"{layer}D holds NaN or inf"),
        ({f"{layer}D": torch.zeros(32, dtype=torch.int8)}, "quantised weights are not converted"),
    ]
    for change, reason in cases:
        changed = {name: value for name, value in {**good, **change}.items() if value is not None}
        with pytest.raises(CheckpointError) as caught:
            pretrained.from_state_dict(changed)
        assert reason in str(caught.value) and "\n" not in str(caught.value)
    pretrained.from_state_dict(good)


@pytest.mark.parametrize(
    "build, reason",
    [
        (
            lambda: models.build("mamba", d_model=16, n_layers=1),
            'head="regression" has no counterpart',
        ),
        (
            lambda: models.build("mamba", d_model=16, n_layers=1, head="lm", d_out=5, selective=False),
            "selective=False",
        ),
        (
            lambda: models.build("s4d", d_model=16, n_layers=1, head="lm", d_out=5),
            "a S4D has no counterpart",
        ),
    ],
)
def test_what_has_no_counterpart_is_not_exported(build: Any, reason: str) -> None:
    for export in (pretrained.to_state_dict, pretrained.to_hugging_face):
        with pytest.raises(BadArgument, match=reason):
            export(build())


@pytest.mark.parametrize("length", [2, 5, 33])
def test_mambapy_computes_the_same(length: int) -> None:
    """A second implementation, with its own scan: residual stream after the last block, and its
    states token by token.
    """
    model = models.build("mamba", d_model=24, n_layers=2, d_state=5, d_conv=3, d_in=4).eval()
    theirs = MambapyMamba(MambapyConfig(d_model=24, n_layers=2, d_state=5, d_conv=3)).eval()
    weights = {n.replace("blocks.", "layers."): v for n, v in model.state_dict().items() if n.startswith("blocks.")}
    theirs.load_state_dict(weights)
    x = torch.randn(2, length, 4)
    entering = model.embed(x)
    with torch.no_grad():
        ours, state = model(x, return_state=True, stop_at_layer=2)
        assert_close(ours, theirs(entering), rtol=1e-5, atol=1e-5)
        caches: list[Any] = [(None, torch.zeros(2, 48, 2)) for _ in range(2)]
        for t in range(length):
            out, caches = theirs.step(entering[:, t], caches)
        assert_close(ours[:, -1], out, rtol=1e-5, atol=1e-5)
    for mine, (h, inputs) in zip(state, caches, strict=True):
        assert_close(mine.h, h, rtol=1e-5, atol=1e-5)
        assert_close(mine.conv, inputs, rtol=1e-5, atol=1e-5)


def test_mamba_ssm_reference_computes_the_same() -> None:
    """The published definition of the scan, fed with what our sites hold."""
    interface = pytest.importorskip(
        "mamba_ssm.ops.selective_scan_interface",
        reason="mamba_ssm needs its compiled CUDA extension to be imported",
        exc_type=ImportError,
    )
    model = models.build("mamba", d_model=24, n_layers=1, d_state=5, d_in=4).double().eval()
    mixer, x = model.blocks[0].mixer, torch.randn(2, 19, 4, dtype=torch.float64)
    record = hooks.record(model, x, ["blocks.0.mixer.*"])
    site = {name: record[f"blocks.0.mixer.hook_{name}"].transpose(1, 2).float() for name in
            ("x", "delta_pre", "B", "C", "gate_pre", "gated")}  # fmt: skip
    out, last = interface.selective_scan_ref(
        *(site["x"], site["delta_pre"], -torch.exp(mixer.A_log).float(), site["B"], site["C"]),
        D=mixer.D.float(),
        z=site["gate_pre"],
        delta_softplus=True,
        return_last_state=True,
    )
    assert_close(out, site["gated"], rtol=1e-5, atol=1e-5)
    assert_close(last, record["blocks.0.mixer.hook_state"][:, -1].float(), rtol=1e-5, atol=1e-5)

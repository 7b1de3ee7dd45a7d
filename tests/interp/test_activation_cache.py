"""TransformerLens' ActivationCache on our models: parts sum to what they are parts of, states and M are the run's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformer_lens import ActivationCache

import hooks
import models
from hooks.errors import BadArgument
from interp import attention
from tests.interp.verbs import TINY, batches, tiny
from tests.tolerances import assert_matches

pytestmark = pytest.mark.law

STACKS = ["mamba", "twin", "s4d", "s4", "linear_attention", "transformer"]
X = batches(3)[0].tokens.double()


def cached(architecture: str) -> tuple[Any, torch.Tensor, Any]:
    model = tiny(architecture, torch.float64)
    out, cache = model.run_with_cache(X)
    return model, out.detach(), cache


def final(architecture: str, cache: Any) -> torch.Tensor:
    return cache["blocks.1.hook_resid_post"]


@pytest.mark.parametrize("architecture", STACKS)
def test_the_parts_of_the_residual_stream_sum_to_it(architecture: str) -> None:
    _, _, cache = cached(architecture)
    assert isinstance(cache, ActivationCache)
    has_mlp = architecture in ("linear_attention", "transformer")
    parts, labels = cache.decompose_resid(return_labels=True)
    each = ["0_attn_out", *(["0_mlp_out"] if has_mlp else []), "1_attn_out", *(["1_mlp_out"] if has_mlp else [])]
    assert labels == ["embed", *each]
    assert_matches(parts.sum(0), final(architecture, cache))
    assert_matches(cache.decompose_resid(1).sum(0), cache["blocks.1.hook_resid_pre"])
    one = cache.decompose_resid(pos_slice=-1, mode="attn", incl_embeds=False)
    assert one.shape == (2, 3, 8)
    if has_mlp:
        mid = "blocks.1.hook_resid_mid" if architecture == "linear_attention" else "blocks.1.ln2.hook_in"
        assert_matches(cache.decompose_resid(1, mlp_input=True).sum(0), cache[mid])


@pytest.mark.parametrize("architecture", STACKS)
def test_what_the_parts_say_of_an_output_sums_to_it(architecture: str) -> None:
    model, out, cache = cached(architecture)
    normalised = cache.decompose_resid(apply_ln=True).sum(0)
    assert_matches(normalised, cache["ln_final.hook_normalized"])
    said = cache.logit_attrs(cache.decompose_resid(), tokens=0).sum(0)
    after = model.ln_final.bias if architecture == "transformer" else torch.zeros(8, dtype=torch.float64)
    bias = model.head.linear.bias + model.head.linear.weight @ after
    assert_matches(said, (out - bias)[..., 0].detach())


@pytest.mark.parametrize("architecture", STACKS)
def test_the_accumulated_stream_ends_in_the_last_block(architecture: str) -> None:
    model, out, cache = cached(architecture)
    stack, labels = cache.accumulated_resid(return_labels=True)
    assert labels == ["0_pre", "1_pre", "final_post"]
    assert torch.equal(stack[-1], final(architecture, cache))
    read = model.head(cache.accumulated_resid(apply_ln=True)[-1])
    assert_matches(read.detach(), out)
    assert torch.equal(cache.stack_activation("resid_post")[1], stack[-1])


@pytest.mark.parametrize("architecture", [name for name in TINY if name != "transformer"])
def test_recurrent_layers_are_seen(architecture: str) -> None:
    model, _, cache = cached(architecture)
    layers = [0] if architecture == "theory" else [0, 1]
    assert cache.ssm_layers() == layers
    states = cache.compute_ssm_state()
    for layer in layers:
        expected = hooks.record(model, X)[f"blocks.{layer}.mixer.hook_state"]
        assert torch.equal(states[layer], expected)
        assert torch.equal(cache.compute_ssm_state(layer, time_step=4), expected[:, 4])


@pytest.mark.parametrize("architecture", ["mamba", "twin", "s4d", "linear_attention", "theory"])
def test_the_effective_attention_is_the_hidden_attention(architecture: str) -> None:
    model, _, cache = cached(architecture)
    if architecture == "theory":  # a query's own label is 0, so that what it writes is nothing for each unit of it
        with pytest.raises(BadArgument, match=r"an x of 0.*interp\.attention\.matrix"):
            cache.compute_ssm_effective_attention(0)
        return
    found = cache.compute_ssm_effective_attention()
    assert_matches(found[1], attention.matrix(model, X, 1).values.to(found.dtype))


def test_an_edited_run_has_its_own_attention() -> None:
    model = tiny("mamba", torch.float64)
    edits = {"*.hook_delta_decay": hooks.scale(0.5)}
    with hooks.edit(model, edits):
        _, cache = model.run_with_cache(X)
    found = cache.compute_ssm_effective_attention(0)
    assert_matches(found, attention.matrix(model, X, 0, edits=edits).values)
    assert not torch.allclose(found, attention.matrix(model, X, 0).values)
    with hooks.edit(model, hooks.do_state(0, [2], 0.5)):
        _, cache = model.run_with_cache(X)
    with pytest.raises(BadArgument, match=r"reads more than M x.*interp\.attention\.matrix"):
        cache.compute_ssm_effective_attention(0)


def test_what_a_cache_lacks_is_named() -> None:
    model = tiny("mamba", torch.float64)
    _, cache = model.run_with_cache(X, names_filter="*.hook_resid_post")
    with pytest.raises(BadArgument, match="the cache holds no hook_embed: let names_filter pick it"):
        cache.decompose_resid()
    with pytest.raises(BadArgument, match=r"holds no blocks\.0\.mixer\.hook_state"):
        cache.compute_ssm_state()
    with pytest.raises(BadArgument, match="no layer of this model carries a recurrent state"):
        cached("transformer")[2].compute_ssm_state()
    with pytest.raises(BadArgument, match="mixed by a matrix"):
        cached("s4")[2].compute_ssm_effective_attention(0)
    with pytest.raises(BadArgument, match="no residual sum"):
        cached("theory")[2].decompose_resid()
    with pytest.raises(BadArgument, match="picked by number"):
        cached("mamba")[2].logit_attrs(cached("mamba")[2].decompose_resid(), tokens=torch.tensor(0.5))


@pytest.mark.parametrize("method", ["stack_head_results", "stack_neuron_results", "get_full_resid_decomposition"])
def test_what_is_about_heads_is_of_a_transformer(method: str) -> None:
    _, _, cache = cached("mamba")
    with pytest.raises(BadArgument, match=rf"^{method}\(\) is about .*, and this is a mamba: decompose_resid\(\)"):
        getattr(cache, method)(1)
    _, _, cache = cached("transformer")
    if method == "get_full_resid_decomposition":
        with pytest.raises(BadArgument, match=r"take decompose_resid\(\), stack_head_results\(\)"):
            cache.get_full_resid_decomposition(1)
    else:
        assert isinstance(getattr(cache, method)(1), torch.Tensor)


@pytest.mark.parametrize(
    "architecture",
    [name if name in ("mamba", "transformer") else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)
def test_a_backward_hook_may_return_a_tuple_at_every_site(architecture: str) -> None:
    model = tiny(architecture, torch.float64)
    for name in model.hook_dict:
        slopes = []
        for made in (lambda grad: (2 * grad,), lambda grad: 2 * grad):
            x = X.clone().requires_grad_()
            backward = [(name, lambda grad, hook, made=made: made(grad))]
            with contextlib.suppress(hooks.DidNotFire), model.hooks(bwd_hooks=backward):  # none at an initial state
                model(x).square().sum().backward()
            slopes.append(x.grad)
        assert torch.equal(*slopes), name


def test_tokens_of_a_language_model_have_directions() -> None:
    model = models.build("mamba", d_model=8, n_layers=1, head="lm", d_out=5)
    assert model.tokens_to_residual_directions(torch.tensor([[1, 2]])).shape == (1, 2, 8)

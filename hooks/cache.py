"""TransformerLens' ``ActivationCache`` of a run of our models: what it takes apart, stacks and scales is found here.

Our mixer stands where its attention does, so "attn" in a ``mode`` means the mixer. States and hidden attentions are
those of the run that was cached, edits included; they are in the axes of our sites, with position on axis 1.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformer_lens import ActivationCache
from transformer_lens.utilities.slice import Slice

from hooks.errors import BadArgument, told

REBUILT = 1e-3
"""How far values · x may be from ``hook_y``, relative to the largest: rounding of fp32 and of half precision; what is
beyond it an initial state or an edit of the state has put there."""


class Cache(ActivationCache):
    """What ``run_with_cache`` returns: site name → tensor, with TransformerLens' methods."""

    model: Any

    def __getitem__(self, key: Any) -> Tensor:
        """A site by its name or by TransformerLens' short ones; another name of a site counts as its own."""
        aliases = getattr(self.model, "aliases", {})
        if isinstance(key, str) and key not in self.cache_dict and aliases.get(key) in self.cache_dict:
            key = aliases[key]
        found: Tensor = super().__getitem__(key)
        return found

    def decompose_resid(  # type: ignore[override]
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: str = "all",
        apply_ln: bool = False,
        pos_slice: Any = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Any:
        """What has been added to the residual stream before block ``layer`` (None: before the final norm), stacked:
        the embedding, each mixer's and each MLP's output. They sum to ``hook_resid_pre`` of that block.

        ``mlp_input`` takes the block's own mixer in; ``mode`` is "all", "attn" (mixers) or "mlp". Raises
        :class:`BadArgument` for a model without a residual sum, and for a site that the cache does not hold.
        """
        last = self._layer(layer)
        if mode not in ("all", "attn", "mlp"):
            raise BadArgument(f"mode={told(mode)}: there is all, attn (the mixers), mlp")
        if getattr(self.model, "architecture", "") == "theory":
            raise BadArgument("a theory model has no residual sum: its one mixer's output is all there is")
        parts = [("embed", "hook_embed")] if incl_embeds else []
        for i in range(last + int(mlp_input)):
            if mode != "mlp":
                parts.append((f"{i}_attn_out", self._one_of(i, "mixer.hook_out", "hook_attn_out")))
            if mode != "attn" and i < last and (name := self._one_of(i, "mlp.hook_mlp_out", "hook_mlp_out")):
                parts.append((f"{i}_mlp_out", name))
        parts = [(label, name) for label, name in parts if name]
        if not parts:
            raise BadArgument(
                f'decompose_resid(layer={layer}, mode="{mode}") has no part: the model has no such outputs'
            )
        stack = torch.stack([_slice(pos_slice).apply(self._held(name), dim=-2) for _, name in parts])
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, last, mlp_input=mlp_input, pos_slice=pos_slice)
        return (stack, [label for label, _ in parts]) if return_labels else stack

    def apply_ln_to_stack(  # type: ignore[override]
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Any = None,
        batch_slice: Any = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """Each part of the stack over the scale that the norm before ``layer`` had in this run, so that the parts sum
        to ``hook_normalized``; of a LayerNorm the mean is taken off first. The norm's weight is in
        ``model.tokens_to_residual_directions``. ``recompute_ln``: the final norm of each part by itself.
        """
        last = self._layer(layer)
        at, which = _slice(pos_slice), _slice(batch_slice)
        stack = which.apply(residual_stack, dim=1) if has_batch_dim else residual_stack
        final = last == self.model.cfg.n_layers
        if recompute_ln and final:
            return torch.stack([self.model.ln_final(part) for part in stack])
        norm = ("norm_mlp.hook_scale", "ln2.hook_scale") if mlp_input else ("norm.hook_scale", "ln1.hook_scale")
        name = "ln_final.hook_scale" if final else self._one_of(last, *norm)
        scale = at.apply(self._held(name), dim=-2)
        scale = which.apply(scale) if self.has_batch_dim else scale
        centred = getattr(self.model, "architecture", "") == "transformer"
        return (stack - stack.mean(-1, keepdim=True) if centred else stack) / scale

    def stack_head_results(self, *given: Any, **options: Any) -> Any:
        """As TransformerLens', of a transformer; :class:`BadArgument` for a model without attention heads."""
        self._of_a_transformer("stack_head_results")
        return super().stack_head_results(*given, **options)

    def stack_neuron_results(self, *given: Any, **options: Any) -> Any:
        """As TransformerLens', of a transformer; :class:`BadArgument` for a model without its neurons."""
        self._of_a_transformer("stack_neuron_results")
        return super().stack_neuron_results(*given, **options)

    def get_full_resid_decomposition(self, *given: Any, **options: Any) -> Any:
        """Always :class:`BadArgument`: it asks a configuration of TransformerLens' own for what ours does not have."""
        self._of_a_transformer("get_full_resid_decomposition")
        raise BadArgument(
            "get_full_resid_decomposition() reads TransformerLens' own configuration, which this model does not have: "
            "take decompose_resid(), stack_head_results() and stack_neuron_results()"
        )

    def _of_a_transformer(self, asked: str) -> None:
        kind = getattr(self.model, "architecture", "")
        if kind != "transformer":
            raise BadArgument(
                f"{asked}() is about a transformer's attention heads and neurons, and this is a {kind}: "
                "decompose_resid() has what each mixer and each MLP adds"
            )

    def ssm_layers(self, mixer_type: Any = None) -> list[int]:
        """The layers that carry a recurrent state."""
        return [
            i
            for i, block in enumerate(self.model.blocks)
            if f"blocks.{i}.mixer.hook_state" in self.model.hook_dict
            and (mixer_type is None or isinstance(block.mixer, mixer_type))
        ]

    def compute_ssm_state(self, layer: int | None = None, time_step: int | None = None) -> Any:
        """``hook_state`` of one layer (batch, pos, d_inner, d_state), without pos at one ``time_step``; of all stacked.

        It is read from the cache and not computed anew. Raises :class:`BadArgument` where the cache does not hold it.
        """

        def one(i: int) -> Tensor:
            states = self._held(f"blocks.{i}.mixer.hook_state")
            return states if time_step is None else states[..., time_step, :, :]

        return self._each(one, layer)

    def compute_ssm_effective_attention(
        self, layer: int | None = None, include_dt_scaling: bool = True, per_state_coord: bool = False
    ) -> Any:
        """M of the scan, with y = M x (Ali et al. 2024): (batch, d_inner, query, pos); of all layers stacked.

        From the decays, writes and read-outs of the run. It is what is written for each unit of x, so Δ is always in
        it. Raises :class:`BadArgument` where the cache lacks a site, and where M x is not ``hook_y`` (an initial state,
        an x of 0, an edit of the state): ``interp.attention.matrix`` splits those.
        """
        if per_state_coord or not include_dt_scaling:
            raise BadArgument(
                "here M is what x is multiplied by: with Δ in it, and summed over the state's coordinates"
            )
        return self._each(self._attention, layer)

    @torch.no_grad()
    def _attention(self, layer: int) -> Float[Tensor, "batch d_inner query pos"]:
        mixer, prefix = self.model.blocks[layer].mixer, f"blocks.{layer}.mixer."
        if not self.has_batch_dim:
            raise BadArgument("the batch axis was taken off this cache: run without remove_batch_dim")
        instead = f"ask interp.attention.matrix(model, x, {layer})"
        if prefix + "hook_transition" in self.model.hook_dict:
            raise BadArgument(f"the states of layer {layer} are mixed by a matrix at each token: {instead}")
        x, decay, write, y = (self._held(prefix + kind) for kind in ("hook_x", "hook_decay", "hook_write", "hook_y"))
        C = self._held(prefix + "hook_C") if prefix + "hook_C" in self.model.hook_dict else None
        gain = write / x.to(write.dtype)[..., None]
        rows, carried = [], gain[:, :0]
        for t in range(x.shape[1]):
            kept = decay[:, t : t + 1]
            if getattr(mixer.hook_state, "parts", 1) == 2:
                (a, b), (p, q) = kept.chunk(2, -1), carried.chunk(2, -1)
                carried = torch.cat([a * p - b * q, a * q + b * p], dim=-1)
            else:
                carried = kept * carried
            carried = torch.cat([carried, gain[:, t : t + 1]], dim=1)
            read = () if C is None else (C[:, t : t + 1].expand(-1, t + 1, *C.shape[2:]),)
            rows.append(F.pad(mixer.read(carried, *read), (0, 0, 0, x.shape[1] - 1 - t)))
        found = torch.stack(rows, dim=1)
        off = ((found * x[:, None]).sum(2) - y).abs().max() / y.abs().max().clamp(min=1e-30)
        if not off < (REBUILT if y.dtype.itemsize >= 4 else 20 * REBUILT):
            raise BadArgument(f"layer {layer} reads more than M x (an initial state, an edit, an x of 0): {instead}")
        return found.permute(0, 3, 1, 2)

    def _each(self, one: Any, layer: int | None) -> Any:
        layers = self.ssm_layers()
        if layer is not None:
            if layer not in layers:
                raise BadArgument(f"layer {told(layer)} carries no recurrent state; those that do: {layers or 'none'}")
            return one(layer)
        if not layers:
            raise BadArgument("no layer of this model carries a recurrent state")
        found = {i: one(i) for i in layers}
        return torch.stack(list(found.values())) if len(found) == len(self.model.blocks) else found

    def _one_of(self, layer: int, *kinds: str) -> str:
        """The site of the block that the model has; "" for none."""
        return next((name for kind in kinds if (name := f"blocks.{layer}.{kind}") in self.model.hook_dict), "")

    def _held(self, name: str) -> Tensor:
        if name not in self.cache_dict:
            raise BadArgument(f"the cache holds no {name or 'norm before that layer'}: let names_filter pick it")
        return self.cache_dict[name]

    def _layer(self, layer: int | None) -> int:
        count: int = self.model.cfg.n_layers
        if layer is None or layer == -1:
            return count
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= count:
            raise BadArgument(f"layer={told(layer)}: give a layer from 0 to {count}")
        return layer


def _slice(given: Any) -> Slice:
    """As TransformerLens' own methods read it: a number takes its axis away."""
    return given if isinstance(given, Slice) else Slice(given)

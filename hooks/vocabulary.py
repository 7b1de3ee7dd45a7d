"""The vocabulary: what every site is called, its axes, its equation, its range; and how patterns pick sites.

A *site* is a named tensor of a model that can be read and edited. Its full name is a path
(``blocks.3.mixer.hook_delta``); its last part is its *kind*, and :data:`SITES` has one row for each kind.
Position is axis 1 wherever a site has one, save where the row says otherwise.

Two gates, never one word: the *selection gate* is Δ (``hook_delta_decay`` forgets, ``hook_delta_write``
writes); the *output gate* is SiLU(z), ``hook_gate``.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hooks.errors import BadArgument, UnknownSite, short, told

Pattern = str | Iterable[Any] | Callable[[str], Any] | None


@dataclass(frozen=True)
class Kind:
    """One row of the vocabulary: axes by name, equation, range."""

    axes: tuple[str, ...]
    equation: str
    range: str = "real"
    note: str = ""

    @property
    def pos_dim(self) -> int | None:
        """The axis that counts positions, or None where the site has no position."""
        return self.axes.index("pos") if "pos" in self.axes else None

    @property
    def channel_dim(self) -> int:
        """The axis that ``channels=`` of an edit counts: heads where there are some, else the one after position."""
        return self.axes.index("head") if "head" in self.axes else (self.pos_dim or 0) + 1


_MODEL = ("batch", "pos", "d_model")
_INNER = ("batch", "pos", "d_inner")
_STATE = ("batch", "pos", "d_state")
_FULL = ("batch", "pos", "d_inner", "d_state")
_HEAD = ("batch", "pos", "head", "d_head")
_PATTERN = ("batch", "head", "pos", "pos_k")

SITES: dict[str, Kind] = {
    "hook_embed": Kind(_MODEL, "r_0 = read-in(token)"),
    "hook_resid_pre": Kind(_MODEL, "r, before the block"),
    "hook_scale": Kind(("batch", "pos", "1"), "sqrt(mean r² + eps)", "> 0", "a LayerNorm takes the mean off r first"),
    "hook_normalized": Kind(_MODEL, "r / scale", "real", "before the norm's weight"),
    "hook_x_in": Kind(_INNER, "x of [x; z] = W_in r̂"),
    "hook_gate_pre": Kind(_INNER, "z of [x; z] = W_in r̂"),
    "hook_conv_init": Kind(("batch", "d_inner", "taps"), "the taps before the prompt", "real", "zero unless given"),
    "hook_x_pre": Kind(_INNER, "causal depthwise convolution of x"),
    "hook_x": Kind(
        _INNER, "SiLU(x_pre)", ">= -0.28", "the scan's input; S4D: the normalised residual; theory: the label"
    ),
    "hook_delta_pre": Kind(_INNER, "W_Δ W_r x + b_Δ"),
    "hook_delta": Kind(_INNER, "Δ = softplus(delta_pre)", "> 0", "after the softplus; constant in S4D"),
    "hook_delta_decay": Kind(_INNER, "Δ as it forgets", "> 0", "equals Δ unless edited"),
    "hook_delta_write": Kind(_INNER, "Δ as it writes", "> 0", "equals Δ unless edited"),
    "hook_B": Kind(_STATE, "B = W_B x", "real", "the write key"),
    "hook_C": Kind(_STATE, "C = W_C x", "real", "the read key"),
    "hook_state_init": Kind(("batch", "d_inner", "d_state"), "h_0", "real", "zero unless given"),
    "hook_decay": Kind(_FULL, "ā = exp(Δ_decay A)", "(0, 1]", "what survives of the past"),
    "hook_transition": Kind(
        ("batch", "pos", "d_inner", "factor", "d_state"),
        "Ā h = a ⊙ h + u ⟨q, h⟩: a, u, q",
        "real",
        "S4: in the place of hook_decay; ⟨q, h⟩ = Re(qᴴ h)",
    ),
    "hook_write": Kind(
        _FULL,
        "w = B̄ x",
        "real",
        "Mamba: Δ_write B x (Euler); S4D: (e^{ΔA} − 1)/A x (ZOH); theory: (1 − e^{−Δ_write}) B x (ZOH)",
    ),
    "hook_state": Kind(
        _FULL, "h_t = ā_t h_{t−1} + w_t", "real", "hooks.edit propagates; a raw hook changes one read-out"
    ),
    "hook_y": Kind(_INNER, "C h"),
    "hook_norm": Kind(("batch", "pos", "head"), "Σ_s C · B_s", "real", "what a linear attention divides y by"),
    "hook_skip": Kind(_INNER, "D x"),
    "hook_gate": Kind(_INNER, "SiLU(z)", ">= -0.28", "the output gate"),
    "hook_gated": Kind(_INNER, "(y + D x) SiLU(z)"),
    "hook_out": Kind(_MODEL, "W_out ·", "real", "the mixer's output; head.hook_out: the prediction (batch pos out)"),
    "hook_resid_mid": Kind(_MODEL, "r, between the mixer and the MLP"),
    "hook_post": Kind(("batch", "pos", "d_mlp"), "GELU(W_in r̂ + b)", "real", "as TransformerLens"),
    "hook_mlp_out": Kind(_MODEL, "W_out · + b", "real", "the MLP's output"),
    "hook_resid_post": Kind(_MODEL, "r + mixer(norm(r))"),
}
HEAD_OUT = Kind(("batch", "pos", "d_out"), "read-out(norm(r))", "real", "the prediction")

# TransformerLens' own sites of a softmax transformer, by the end of their names (a kind alone says too little there).
TRANSFORMER: dict[str, Kind] = {
    "ln1.hook_in": Kind(_MODEL, "r, as the norm reads it"),
    "ln1.hook_out": Kind(_MODEL, "r̂ = normalized · weight + bias"),
    "attn.hook_in": Kind(_MODEL, "r̂, as q, k and v read it"),
    "attn.q.hook_in": Kind(_MODEL, "r̂, as q alone reads it"),
    "attn.hook_q": Kind(_HEAD, "q = W_Q r̂ + b"),
    "attn.k.hook_in": Kind(_MODEL, "r̂, as k alone reads it"),
    "attn.hook_k": Kind(_HEAD, "k = W_K r̂ + b"),
    "attn.v.hook_in": Kind(_MODEL, "r̂, as v alone reads it"),
    "attn.hook_v": Kind(_HEAD, "v = W_V r̂ + b"),
    "attn.hook_attn_scores": Kind(
        _PATTERN, "q · k / sqrt(d_head)", "real", "before the causal mask; what lies after the query counts for nothing"
    ),
    "attn.hook_pattern": Kind(_PATTERN, "softmax over pos_k ≤ pos", "[0, 1]"),
    "attn.hook_z": Kind(_HEAD, "Σ_s pattern v_s"),
    "attn.o.hook_out": Kind(_MODEL, "W_O z + b"),
    "hook_attn_out": Kind(_MODEL, "W_O z + b", "real", "the attention's output, as it is added to r"),
    "ln2.hook_in": Kind(_MODEL, "r after the attention, as the norm reads it", "real", "r itself goes on unedited"),
    "ln2.hook_out": Kind(_MODEL, "r̂ = normalized · weight + bias"),
    "mlp.hook_in": Kind(_MODEL, "r̂, as the MLP reads it"),
    "mlp.in.hook_in": Kind(_MODEL, "r̂, as W_in reads it"),
    "mlp.hook_pre": Kind(("batch", "pos", "d_mlp"), "W_in r̂ + b"),
    "mlp.out.hook_out": Kind(_MODEL, "W_out · + b"),
    "ln_final.hook_in": Kind(_MODEL, "r, as the norm reads it"),
    "ln_final.hook_out": Kind(_MODEL, "r̂ = normalized · weight + bias"),
}


def kind_of(name: str) -> Kind | None:
    """The vocabulary row of a full site name, or None for a site that is not ours."""
    if name == "head.hook_out":
        return HEAD_OUT
    parts = name.split(".")
    for length in (3, 2, 1):
        if (tail := ".".join(parts[-length:])) in TRANSFORMER:
            return TRANSFORMER[tail]
    return SITES.get(parts[-1])


@dataclass(frozen=True)
class Site:
    """One site of one model: full name, axes, axis sizes (None where they depend on the input), row."""

    name: str
    axes: tuple[str, ...]
    shape: tuple[int | None, ...]
    equation: str
    range: str
    note: str


class SiteTable(tuple[Site, ...]):
    """The sites of a model in the order in which they fire; prints as a table."""

    @property
    def names(self) -> list[str]:
        """Full names, in firing order."""
        return [site.name for site in self]

    def __repr__(self) -> str:
        rows = [("site", "axes", "equation", "range")]
        rows += [(s.name, " ".join(s.axes), s.equation, s.range) for s in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
        )


def sites(model: Any) -> SiteTable:
    """Every site of ``model`` in firing order, with axes, equation and range.

    Works on any object with a ``hook_dict`` of hook points: our models, and TransformerLens models, whose
    own sites are listed under their own names without an equation.
    """
    named = points(model)
    sizes: dict[str, int] = model.axis_sizes() if hasattr(model, "axis_sizes") else {}
    found = []
    for name in named:
        row = kind_of(name)
        if row is None:
            found.append(Site(name, (), (), "", "", "not in the vocabulary"))
        else:
            axes = axes_of(model, name)
            shape = tuple(_size(model, name, axis, sizes) for axis in axes)
            found.append(Site(name, axes, shape, row.equation, row.range, row.note))
    return SiteTable(found)


def points(model: Any) -> Mapping[str, Any]:
    """Full site name → hook point, in firing order.

    Raises :class:`BadArgument` for what has no sites; what wraps a model with sites is told how to take it out.
    """
    try:
        found: Mapping[str, Any] = model.hook_dict
    except AttributeError:
        inside = getattr(model, "module", None)  # DataParallel and whatever else trains on several devices
        if hasattr(inside, "hook_dict"):
            hint = f"it wraps a {type(inside).__name__}: give model.module"
        else:
            hint = "give a model of models.build or models.load, or a TransformerLens one"
        raise BadArgument(f"{told(model)} has no sites: {hint}") from None
    return found


def axes_of(model: Any, name: str) -> tuple[str, ...]:
    """The axes of one site of ``model``: the point's own where it has others than the vocabulary's; () if unknown."""
    row = kind_of(name)
    own: tuple[str, ...] | None = getattr(model.hook_dict[name], "axes", None)
    return own or (() if row is None else row.axes)


def _size(model: Any, name: str, axis: str, sizes: dict[str, int]) -> int | None:
    if axis == "1":
        return 1
    # A complex state shows as real and imaginary parts: the point knows its own factor.
    factor = getattr(model.hook_dict[name], "parts", 1) if axis == "d_state" else 1
    return None if axis not in sizes else sizes[axis] * factor


def resolve(model: Any, pattern: Pattern, what: str = "site") -> list[str]:
    """The names of the sites that ``pattern`` picks, in firing order; never an empty list.

    ``pattern`` is a full name, a glob (``"*.hook_delta"``, ``"blocks.[0-3].mixer.*"``), a list, tuple or set
    of those, a predicate on names, or None for every site. Where nothing matches, a model's other names for its sites
    (``model.aliases``: other name → name) are looked at in the same way.

    Raises :class:`UnknownSite` where nothing matches (for each entry of a list), with the near names.
    """
    names = list(points(model))
    if pattern is None:
        return names
    if isinstance(pattern, nn.Module):
        # A module is callable, so it would pass for a predicate that is true everywhere.
        raise BadArgument(f'a {what} is picked by its name: "{getattr(pattern, "name", None)}", not by the module')
    if isinstance(pattern, str):
        found = [pattern] if pattern in model.hook_dict else fnmatch.filter(names, pattern)
        if not found and (aliases := getattr(model, "aliases", {})):
            others = [pattern] if pattern in aliases else fnmatch.filter(aliases, pattern)
            meant = {aliases[other] for other in others}
            found = [name for name in names if name in meant]
        if not found:
            raise UnknownSite(_no_match(pattern, names, what))
        return found
    if callable(pattern):
        found = [name for name in names if _says(pattern, name, what)]
        if not found:
            raise UnknownSite(f"the {what} filter matches none of the {len(names)} sites: see hooks.show(model)")
        return found
    if isinstance(pattern, Iterable) and not hasattr(pattern, "shape"):
        entries = list(pattern)
        if not entries:
            raise UnknownSite(f"an empty list of {what}s was asked for: see hooks.show(model)")
        picked = {name for entry in entries for name in resolve(model, entry, what)}
        return [name for name in names if name in picked]
    raise BadArgument(f"a {what} pattern is a name, a glob, a list or a predicate, not {told(pattern)}")


def _says(filter: Callable[[str], Any], name: str, what: str) -> bool:
    """What the filter says of ``name``; raises :class:`BadArgument` where it cannot, as a metric in its place does."""
    try:
        return bool(filter(name))
    except Exception as error:
        raise BadArgument(
            f'the function that picks {what}s fails on "{name}" ({type(error).__name__}: {short(str(error))}): it '
            "takes a name and says True or False; a metric, which takes the output, is another argument"
        ) from error


def _no_match(pattern: str, names: list[str], what: str) -> str:
    pattern = short(pattern, 100)
    kinds = sorted({name.rsplit(".", 1)[-1] for name in names})
    tail = pattern.rsplit(".", 1)[-1]
    prefix = pattern[: len(pattern) - len(tail)]
    near = [prefix + kind for kind in difflib.get_close_matches(tail, kinds, n=2, cutoff=0.7)]
    near = [guess for guess in near if guess in names or fnmatch.filter(names, guess)]
    near = near or difflib.get_close_matches(pattern, names, n=2, cutoff=0.75)
    guess = "; did you mean " + " or ".join(f'"{name}"' for name in near) + "?" if near else ""
    return f'no {what} matches "{pattern}"{guess} ({len(names)} sites: hooks.show(model))'

"""Read-in and read-out: what turns a stack of blocks into a regressor, a classifier or a language model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.errors import BadArgument, short
from hooks.point import emit, site

HEADS = ("regression", "classification", "lm")


class LinearReadIn(nn.Module):
    """W x + b, one map for every kind of token (Grazzi et al. 2024, §3)."""

    def __init__(self, d_in: int, d_model: int) -> None:
        super().__init__()
        self.expects = d_in
        self.linear = nn.Linear(d_in, d_model)

    def forward(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_model"]:
        return self.linear(x)


class TokenReadIn(nn.Module):
    """A row of the embedding table for each token."""

    expects = None

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, x: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.table(x)


def read_in(cfg: Any) -> LinearReadIn | TokenReadIn:
    """The read-in that ``cfg.head`` asks for: a table for a language model, else a linear map."""
    if cfg.head not in HEADS:
        raise BadArgument(f'head="{short(str(cfg.head))}": there is {", ".join(HEADS)}')
    return TokenReadIn(cfg.d_out, cfg.d_model) if cfg.head == "lm" else LinearReadIn(cfg.d_in, cfg.d_model)


class TiedLinear(nn.Module):
    """r ↦ E r, with the embedding table E itself: what replaces, wraps or frees the table does so for both its uses.

    It holds no parameter of its own, so a model has one table whatever is done to it (``load_state_dict(assign=True)``,
    ``to_empty``, a parametrisation), and lists it once. ``weight`` is the table.
    """

    embed: TokenReadIn
    bias = None

    def __init__(self, embed: TokenReadIn) -> None:
        super().__init__()
        self.follow(embed)

    def follow(self, embed: TokenReadIn) -> None:
        """Read out with the table of ``embed`` from now on."""
        # Beside the module tree: the table belongs to the read-in.
        self.__dict__["embed"] = embed

    @property
    def weight(self) -> Tensor:
        """The table (vocabulary, d_model)."""
        return self.embed.table.weight

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif value is not self.weight:  # ``weight *= 2`` hands back the tensor that it has written to
            raise BadArgument(
                "the read-out of this model is its embedding table (tie_embeddings=True): set embed.table.weight, or "
                "build the model with tie_embeddings=False"
            )

    def forward(self, r: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        return F.linear(r, self.weight)


class ReadOut(nn.Module):
    """Linear map of the normalised residual stream to the prediction at every position.

    regression: values (batch, pos, d_out), with a bias; classification: logits of d_out classes, with a bias; lm:
    logits of d_out tokens without a bias, by the embedding table itself where ``cfg.tie_embeddings``.
    """

    def __init__(self, cfg: Any, embed: LinearReadIn | TokenReadIn) -> None:
        super().__init__()
        self.d_out = cfg.d_out
        # Drawn also where it is not kept: the weights that are drawn after it are then the same for one seed.
        own = nn.Linear(cfg.d_model, cfg.d_out, bias=cfg.head != "lm")
        self.linear: nn.Module = own
        if isinstance(embed, TokenReadIn) and cfg.tie_embeddings:
            self.linear = TiedLinear(embed)
        self.hook_out = site("head.hook_out")

    def forward(self, r: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        return emit(self.hook_out, self.linear(r))

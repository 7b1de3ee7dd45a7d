"""Read-in and read-out: what turns a stack of blocks into a regressor, a classifier or a language model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.errors import BadArgument, unknown
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
        raise BadArgument(unknown("head", cfg.head, HEADS))
    return TokenReadIn(cfg.d_out, cfg.d_model) if cfg.head == "lm" else LinearReadIn(cfg.d_in, cfg.d_model)


class ReadOut(nn.Module):
    """Linear map of the normalised residual stream to the prediction at every position.

    regression: values (batch, pos, d_out), with a bias; classification: logits of d_out classes, with a bias; lm:
    logits of d_out tokens without a bias, by the embedding table itself where ``cfg.tie_embeddings``.
    """

    def __init__(self, cfg: Any, embed: LinearReadIn | TokenReadIn) -> None:
        super().__init__()
        self.d_out = cfg.d_out
        self.linear = nn.Linear(cfg.d_model, cfg.d_out, bias=cfg.head != "lm")
        if isinstance(embed, TokenReadIn) and cfg.tie_embeddings:
            self.linear.weight = embed.table.weight
        self.hook_out = site("head.hook_out")

    def forward(self, r: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_out"]:
        return emit(self.hook_out, self.linear(r))

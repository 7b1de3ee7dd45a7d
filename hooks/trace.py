"""nnsight on our models: ``NNsight(model).trace(x)`` works as it is; :func:`nnsight` also takes several inputs in one trace."""

from __future__ import annotations

from typing import Any

import torch


def nnsight(model: Any) -> Any:
    """An nnsight wrapper of ``model`` whose traces accept several invokes, batched along axis 0.

    The plain ``NNsight(model)`` refuses a second input in one trace. Inputs of one trace have the same length. nnsight is
    imported here, on the first call, because most sessions do not need it.
    """
    from nnsight import NNsight

    class BatchedNNsight(NNsight):
        """NNsight with the two batching methods: rows of an input, and how inputs are joined."""

        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            return int(inputs[0].shape[0]) if inputs else 0

        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            if not invokes:
                return (), {}
            keywords: dict[str, Any] = {}
            for _, given in invokes:
                keywords.update(given)
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), keywords

    return BatchedNNsight(model)

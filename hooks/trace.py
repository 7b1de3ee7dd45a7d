"""nnsight on our models: ``NNsight(model).trace(x)`` works as it is; :func:`nnsight` also takes several inputs in one trace."""

from __future__ import annotations

from typing import Any

import torch

from hooks.errors import BadArgument


def nnsight(model: Any) -> Any:
    """An nnsight wrapper of ``model`` whose traces accept several invokes, batched along axis 0.

    The plain ``NNsight(model)`` refuses a second input in one trace. Inputs of one trace have the same length and the same
    keywords (raises :class:`BadArgument` otherwise). nnsight is imported here, on the first call, because most
    sessions do not need it.
    """
    from nnsight import NNsight

    class BatchedNNsight(NNsight):
        """NNsight with the two batching methods: rows of an input, and how inputs are joined."""

        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            return int(inputs[0].shape[0]) if inputs else 0

        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            if len(invokes) < 2:
                return invokes[0] if invokes else ((), {})
            (_, keywords), *others = invokes
            tensors = [value for _, given in invokes for value in given.values() if not _plain(value)]
            if tensors or any(given != keywords for _, given in others) or any(len(inputs) > 1 for inputs, _ in invokes):
                raise BadArgument("the invokes of one trace differ in their input only: no state, the same plain keywords")
            lengths = {tuple(inputs[0].shape[1:]) for inputs, _ in invokes}
            if len(lengths) > 1:
                raise BadArgument(f"the inputs of one trace have the same length; here there are {sorted(lengths)}")
            return (torch.cat([inputs[0] for inputs, _ in invokes]),), keywords

    return BatchedNNsight(model)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)

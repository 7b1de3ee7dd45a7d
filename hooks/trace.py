"""nnsight on our models: ``NNsight(model).trace(x)`` works as it is; :func:`nnsight` takes several inputs as well."""

from __future__ import annotations

from typing import Any

import torch

from hooks.errors import BadArgument


def nnsight(model: Any) -> Any:
    """An nnsight wrapper of ``model`` whose traces accept several invokes, batched along axis 0.

    The plain ``NNsight(model)`` refuses a second input in one trace. Inputs of one trace have the same length and the
    same keywords (raises :class:`BadArgument` otherwise). nnsight is imported here, on the first call, because most
    sessions do not need it.
    """
    from nnsight import NNsight

    class BatchedNNsight(NNsight):
        """NNsight with the two batching methods: rows of an input, and how inputs are joined."""

        def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
            if kwargs.get("remote"):
                raise BadArgument("remote=True: this model is here and on no server; trace(x) without it runs here")
            given = inputs[0] if inputs else kwargs.get("x")
            return 0 if given is None else int(given.shape[0])

        def _batch(self, invokes: list[Any], fn: Any) -> Any:
            if len(invokes) < 2:
                return invokes[0] if invokes else ((), {})
            tensors, keywords = [], []
            for inputs, given in invokes:
                others = {name: value for name, value in given.items() if name != "x"}
                tensors.append(inputs[0] if inputs else given["x"])
                keywords.append(others)
                if len(inputs) > 1 or others != keywords[0] or not all(map(_plain, others.values())):
                    raise BadArgument(
                        "the invokes of one trace differ in their input only: no state, the same plain keywords"
                    )
            lengths = sorted({tuple(tensor.shape[1:]) for tensor in tensors})
            if len(lengths) > 1:
                raise BadArgument(f"the inputs of one trace have the same length; here there are {lengths}")
            return (torch.cat(tensors),), keywords[0]

    return BatchedNNsight(model)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)

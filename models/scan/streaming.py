"""Stores that go past the caches, for results larger than any of them.

An ordinary store first fetches the line that it is about to overwrite. For all states of one layer, which nobody
reads before they have long left the caches again, that fetch is more than half of the time.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from models.scan.pages import VECTOR


@intrinsic
def stream(context: Any, to: Any, offset: Any, source: Any, size: Any) -> Any:
    """Copy ``size`` elements from the pointer ``source`` to ``to.flat[offset:]``; both in whole vectors of ``to``."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, args[0])
        item = signature.args[0].dtype.bitwidth // 8
        pointer = ir.VectorType(context.get_data_type(signature.args[0].dtype), VECTOR // item).as_pointer()
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        index = args[1].type
        with cgutils.for_range_slice(builder, index(0), args[3], index(VECTOR // item)) as (i, _):
            value = builder.load(builder.bitcast(builder.gep(args[2], [i]), pointer), align=item)
            place = builder.bitcast(builder.gep(array.data, [builder.add(args[1], i)]), pointer)
            builder.store(value, place, align=VECTOR).set_metadata("nontemporal", hint)
        return context.get_dummy_value()

    return types.none(to, types.intp, source, types.intp), codegen


@intrinsic
def fence(context: Any) -> Any:
    """Everything stored so far is seen by other threads before anything that comes later."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), codegen

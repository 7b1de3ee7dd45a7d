"""An exponential that the compiler can make vector instructions of.

The math library's exp is a call, which keeps the loop around it scalar; the scan spends most of its time in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic, overload

from hooks.machine.native import inlined


@intrinsic
def _reinterpret(context: Any, value: Any) -> Any:
    """The bits of a float as an integer of its width, or the other way round."""
    pairs = {types.float32: types.int32, types.float64: types.int64}
    pairs |= {integer: real for real, integer in pairs.items()}

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(signature.return_type))

    return pairs[value](value), codegen


# Coefficients of 2 e^r on |r| ≤ ln(2) / 2: twice 1 + r q(r), q the Chebyshev interpolation of (e^r − 1) / r.
_F = np.float32
_P32 = (_F(2), _F(2), _F(1), _F(0.3333301), _F(0.083332933), _F(0.016738297), _F(0.0027867283))
_LOW32, _HIGH32 = _F(-87.4), _F(89.5)  # 2^−126 and 2^129, between which the exponent bits are valid
_INVERSE32, _ROUND32 = _F(1 / np.log(2)), _F(1.5 * 2**23)
_LN2_HIGH32, _LN2_LOW32 = _F(0.693359375), _F(-0.00021219444005469057)
_SHIFT32, _BIAS32 = np.int32(23), np.int32(126 << 23)

_P64 = (
    2.0, 2.0, 1.000000000000001, 0.3333333333333334, 0.08333333333314628, 0.016666666666652282,
    0.0027777777864977198, 0.00039682539749600986, 4.960300869399537e-05, 5.511451085149287e-06,
    5.525271448289445e-07, 5.021041274791402e-08,
)  # fmt: skip
_LOW64, _HIGH64 = -708.6, 710.5
_INVERSE64, _ROUND64 = float(1 / np.log(2)), 1.5 * 2.0**52
_LN2_HIGH64, _LN2_LOW64 = 0.6931471787393093, 1.8206359985041462e-09
_SHIFT64, _BIAS64 = np.int64(52), np.int64(1022 << 52)


@inlined
def exp32(value):  # type: ignore[no-untyped-def]
    """e^value in float32, as 2 e^r · 2^(k−1) with k = round(value / ln 2): a polynomial and the exponent bits.

    Adding 1.5 · 2^23 rounds to an integer and leaves it in the low bits. Doubling the polynomial puts both ends
    right at no cost: above the range the product overflows to inf, below 2^−126 the power is 0. e^0 is exactly
    1, e^−inf exactly 0, and NaN stays NaN, since both comparisons are false for it. Error under 1.5 ulp.
    """
    value = _HIGH32 if value > _HIGH32 else value
    value = _LOW32 if value < _LOW32 else value
    shifted = value * _INVERSE32 + _ROUND32
    k = shifted - _ROUND32
    r = value - k * _LN2_HIGH32
    r = r - k * _LN2_LOW32
    p = _P32[6]
    p = p * r + _P32[5]
    p = p * r + _P32[4]
    p = p * r + _P32[3]
    p = p * r + _P32[2]
    p = p * r + _P32[1]
    p = p * r + _P32[0]
    return p * _reinterpret(np.int32(np.int32(_reinterpret(shifted) << _SHIFT32) + _BIAS32))


@inlined
def exp64(value):  # type: ignore[no-untyped-def]
    """e^value in float64, made like ``exp32``."""
    value = _HIGH64 if value > _HIGH64 else value
    value = _LOW64 if value < _LOW64 else value
    shifted = value * _INVERSE64 + _ROUND64
    k = shifted - _ROUND64
    r = value - k * _LN2_HIGH64
    r = r - k * _LN2_LOW64
    p = _P64[11]
    p = p * r + _P64[10]
    p = p * r + _P64[9]
    p = p * r + _P64[8]
    p = p * r + _P64[7]
    p = p * r + _P64[6]
    p = p * r + _P64[5]
    p = p * r + _P64[4]
    p = p * r + _P64[3]
    p = p * r + _P64[2]
    p = p * r + _P64[1]
    p = p * r + _P64[0]
    return p * _reinterpret((_reinterpret(shifted) << _SHIFT64) + _BIAS64)


def exp(value):  # type: ignore[no-untyped-def]
    """e^value, for either dtype, in compiled code."""
    raise NotImplementedError("exp has a meaning in compiled code only")


@overload(exp)
def _exp(value):  # type: ignore[no-untyped-def]
    if value == types.float32:
        return lambda value: exp32(value)
    return lambda value: exp64(value)

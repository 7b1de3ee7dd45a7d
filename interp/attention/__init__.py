"""The hidden attention of a recurrence: y = M x + D x, and what each token adds to one number.

    matrix(model, x, layer)                    M, one for each channel             hidden
    contributions(model, x, layer, scalar=f)   each token's part of one scalar     tokens

``INSIDE`` names what may be taken into M: the scan, the convolution's taps, the output gate (``inside``).
"""

from interp.attention.hidden import Attention, matrix
from interp.attention.inside import INSIDE
from interp.attention.tokens import Contributions, contributions

__all__ = ["INSIDE", "Attention", "Contributions", "contributions", "matrix"]

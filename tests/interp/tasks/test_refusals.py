"""Values that cannot be are refused in one line that names them, by every task."""

from __future__ import annotations

from typing import Any

import pytest

from hooks.errors import BadArgument
from interp import tasks

pytestmark = pytest.mark.contract

WRONG: dict[str, list[tuple[dict[str, Any], str]]] = {
    "linreg": [
        ({"d": 0}, "at least 1"),
        ({"d": True}, "d=True"),
        ({"n_pairs": 0}, "n_pairs=0"),
        ({"tokens": "interleave"}, '"interleaved"'),
        ({"covariance": "diagonal"}, "isotropic, skewed"),
        ({"covariance": "half_subspace", "d": 1}, "d of at least 2"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"renormalise": True}, "noise=0; give noise above 0"),
        ({"noisy_targets": True}, "noise=0; give noise above 0"),
    ],
    "sparse_linreg": [
        ({"sparsity": 0}, "sparsity=0 .* from 1 to 10"),
        ({"d": 2}, "sparsity=3 .* from 1 to 2"),
        ({"tokens": "interleave"}, '"interleaved"'),
    ],
    "polynomial": [({"degree": 4}, "degree=4 .* from 2 to 3"), ({"degree": True}, "degree=True")],
    "relu_net": [({"hidden": 0}, "hidden=0"), ({"covariance": "skew"}, '"skewed"')],
    "decision_tree": [({"depth": 0}, "depth=0 .* from 1 to 16")],
    "single_index": [
        ({"r": 17}, "r=17 .* from 2 to 16"),
        ({"r": 1}, "r=1 "),
        ({"link": "he_3"}, '"he3"'),
        ({"link": [1.0]}, "Hermite coefficients"),
        ({"link": [1.0, 0.0]}, "constant"),
        ({"link": [0.0, float("nan")]}, "a coefficient of link=nan"),
        ({"tau": -0.1}, "tau=-0.1"),
        ({"noise_form": "normal"}, "gaussian, sign"),
        ({"subspace_seed": -1}, "subspace_seed=-1"),
    ],
    "outlier_linreg": [
        ({"p": 1.2}, "p=1.2 .* from 0 to 1"),
        ({"p": -0.1}, "p=-0.1"),
        ({"d": 2}, "d=2 leaves no room"),
        ({"d": 0}, "at least 1"),
        ({"outlier": "one"}, '"ones"'),
        ({"outlier": "ones", "per": "prompt"}, 'outlier="ones" is all ones'),
        ({"orthogonal_to": "w"}, "own, fresh"),
        ({"r": -1.0}, "r=-1.0"),
        ({"tokens": "interleave"}, '"interleaved"'),
    ],
    "outliers": [
        ({"alpha": 1.01}, "alpha=1.01 .* from 0 to 1"),
        ({"alpha": -0.1}, "alpha=-0.1 .* from 0 to 1"),
        ({"p_a": 1.5}, "p_a=1.5 .* from 0 to 1"),
        ({"p_a": float("nan")}, "p_a=nan"),
        ({"K": 0.6}, "K=0.6 .* from 0 to 0.5; .*k_test"),
        ({"d": 18}, "M1 \\+ M2 \\+ V .* at least 19"),
        ({"M1": 1}, "M1=1 .* at least 2"),
        ({"beta": 0.5}, "beta=0.5"),
        ({"rule": "coins"}, '"coin"'),
        ({"alpha": 0.5, "placement": "near"}, "random, far, close"),
        ({"placement": "far"}, "needs a share alpha"),
        ({"outside": True, "V": 2}, "3 outlier patterns, and V=2"),
        ({"outside": [[1.0, 0.0]]}, "rows of V=3"),
        ({"outside": []}, "rows of V=3"),
        ({"outside": [[1.0, 0.0, True]]}, "rows of V=3"),
        ({"d": 19, "orthogonal": 1.0}, "at least 20"),
        ({"kappa_test": -1.0}, "kappa_test=-1.0"),
    ],
    "sparse_parity": [
        ({"d": 1}, "d=1 .* at least 2"),
        ({"k": 0}, "k=0 .* at least 1"),
        ({"k": 10}, "k=10 of d=10 .* at most 9"),
        ({"n_pairs": 0}, "n_pairs=0"),
    ],
    "markov": [
        ({"order": 0}, "order=0 .* at least 1"),
        ({"n_symbols": 1}, "n_symbols=1 .* at least 2"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"switch": 1.0}, "switch=1.0 .* from 0 to 0.99"),
        ({"order": 9, "n_symbols": 9}, "try a smaller order or fewer symbols"),
        ({"n_pairs": True}, "n_pairs=True"),
    ],
    "mqar": [
        ({"length": 31}, "length=31 .* at least 32"),
        ({"length": 33}, "length=33 is odd.*try 34"),
        ({"n_keys": 7}, "n_keys=7 is too few for n_pairs=8"),
        ({"n_values": 1}, "n_values=1"),
        ({"power": 0.0}, "power=0.0"),
        ({"power": 1.5}, "power=1.5"),
    ],
    "selective_copy": [({"length": 7}, "length=7 .* at least 8"), ({"n_symbols": 1}, "n_symbols=1 .* at least 2")],
}


@pytest.mark.parametrize(
    ("name", "config", "says"),
    [(name, config, says) for name, cases in WRONG.items() for config, says in cases],
)
def test_a_value_that_cannot_be_is_refused(name: str, config: dict[str, Any], says: str) -> None:
    with pytest.raises(BadArgument, match=says) as refused:
        tasks.build(name, **config)
    assert "\n" not in str(refused.value)


def test_every_task_has_a_value_to_refuse() -> None:
    assert WRONG.keys() == set(tasks.names())

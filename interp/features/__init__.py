"""Behind ``analyses.feature_learning``: whether, and by what, the direction of a single-index function is found.

study      the measurements: error against k, the direction in the states, what each variant loses
rivals     kernel ridge, and the methods that know the subspace or the direction
transform  Hermite coefficients of the label transform that the selection gate applies
variants   a constant step, a tangent step, a linear gate: retrained, or put into a trained model
rows       the table
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

"""Behind ``analyses.attribute_outliers``: which part of a model keeps outliers out of its answer.

prompts  prompts with and without outliers that differ in nothing else
parts    the measurements: weights of tokens, gates, interventions by token kind
factors  a token's contribution as a product of factors, and each factor's share
gate     the selection gate at outliers and at clean tokens
edits    what is replaced at outliers only, with controls
rows     the table
figure   the figure
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

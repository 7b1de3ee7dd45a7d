"""Behind ``analyses.learning_curves``: error against the number of examples, beside the classical methods.

errors     of models and rivals on a task, its shifts and longer prompts
rivals     the classical methods by name, each on the prompts that a model saw
published  the numbers of the papers, with their settings
rows       the table
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

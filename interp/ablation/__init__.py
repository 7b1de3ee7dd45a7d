"""Behind ``analyses.ablate_delta``: what is lost when a signal inside a recurrence may no longer be chosen.

effects   the ways to replace a signal, and the runs that measure what it costs
controls  identities, other places and other prompts, for each replacement
rows      the table
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

"""Behind ``analyses.sweep``: a grid of trainings from one file, on this machine or many.

cells    the file, and the recipe of each cell
local    processes of this machine
cluster  the same commands as tasks of a Ray cluster
rows     the table
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

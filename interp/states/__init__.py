"""Behind ``analyses.compare_states``: what the states of recurrences hold, and for how long.

reading     recording, positions, ranks, norms, reach
forgetting  the write kernel, half-lives, forgetting by content against fixed forgetting
study       the measurements: decoding, similarity, swaps
rows        the table
figure      the figure
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

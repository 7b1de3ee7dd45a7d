"""Behind ``analyses.probe_layers``: what each block adds to the answer, and which algorithm that looks like.

lens      the residual after a block through the model's own head, rescaled on a few points
matching  predictions after each block against solvers and classical methods
readings  the measurements: lens with floors, probes, map over blocks and examples
rows      the table
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

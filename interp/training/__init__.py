"""Training that can be killed at any moment: the same command goes on and ends in the same weights.

train   a whole training: the search for a rate, the run, the card
fit     one run: steps, evaluations, saving
recipe  what is trained and how, as data
resume  what a killed run goes on from
"""

__all__: list[str] = []  # its modules are imported by name, so that a command loads only what it needs

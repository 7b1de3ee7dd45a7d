"""One file per question, each with a command line; ``python -m analyses`` lists them."""

__all__: list[str] = []

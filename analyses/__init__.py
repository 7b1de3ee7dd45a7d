"""One file per question, each with a command line; ``python -m analyses`` lists them."""

"""``python -m analyses.train``."""

import analyses.train as question
from interp import cli

raise SystemExit(cli.main(question))

"""``python -m analyses.learning_curves``."""

import analyses.learning_curves as question
from interp import cli

raise SystemExit(cli.main(question))

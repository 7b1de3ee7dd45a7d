"""``python -m analyses.zoo``."""

import analyses.zoo as question
from interp import cli

raise SystemExit(cli.main(question))

"""``python -m analyses.sweep``."""

import analyses.sweep as question
from interp import cli

raise SystemExit(cli.main(question))

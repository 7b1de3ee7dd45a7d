"""``python -m analyses.compare_states``."""

import analyses.compare_states as question
from interp import cli

raise SystemExit(cli.main(question))

"""``python -m analyses.ablate_delta``."""

import analyses.ablate_delta as question
from interp import cli

raise SystemExit(cli.main(question))

"""``python -m analyses.probe_layers``."""

import analyses.probe_layers as question
from interp import cli

raise SystemExit(cli.main(question))

"""``python -m analyses.feature_learning``."""

import analyses.feature_learning as question
from interp import cli

raise SystemExit(cli.main(question))

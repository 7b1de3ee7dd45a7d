"""``python -m analyses.attribute_outliers``."""

import analyses.attribute_outliers as question
from interp import cli

raise SystemExit(cli.main(question))

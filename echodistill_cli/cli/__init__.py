"""The command line: the only package that knows Typer and rich."""

import sys

try:
    from echodistill_cli.cli.app import app as app
    from echodistill_cli.cli.app import main as main
except KeyboardInterrupt:
    sys.exit(130)

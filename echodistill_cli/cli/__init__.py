"""The command line."""

from echodistill_cli.cli.app import app as app
from echodistill_cli.cli.app import main as main

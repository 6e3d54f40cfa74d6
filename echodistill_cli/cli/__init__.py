"""The command line: the only package that knows Typer and rich."""

from echodistill_cli.cli.app import app as app
from echodistill_cli.cli.app import main as main

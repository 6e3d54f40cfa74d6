"""`python -m echodistill`."""

from echodistill_cli.cli.app import main

main()

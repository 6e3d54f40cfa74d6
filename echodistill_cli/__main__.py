"""`python -m echodistill_cli`."""

from echodistill_cli.cli.app import main

main()

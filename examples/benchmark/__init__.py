"""The benchmark. Imported before torch, so that waiting threads sleep: two runs side by side starved each other."""

from echodistill_cli.libraries import prepare_libraries

prepare_libraries(offline=False, quiet=True)

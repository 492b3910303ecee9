"""`python -m fraqat_compiler` is `fraqat`."""

from fraqat_compiler.cli import main

main()

"""`python -m postgrad` is the command `postgrad`."""

from postgrad.cli import main

main(prog_name="postgrad")

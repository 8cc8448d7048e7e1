"""`python -m moewh`: the command, for a Python whose scripts are not on the PATH."""

from moewh.cli.main import main

if __name__ == "__main__":
    main(prog_name="moewh")

"""`python -m fewstep` is the same program as `fewstep`."""

from fewstep.cli.main import main

if __name__ == "__main__":
    main()

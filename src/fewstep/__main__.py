"""``python -m fewstep`` is the ``fewstep`` program."""

from fewstep.cli.main import main

if __name__ == "__main__":
    main()

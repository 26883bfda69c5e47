"""`python -m minitune` is the command line."""

from minitune.cli import main

if __name__ == "__main__":
    main()

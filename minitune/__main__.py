"""`python -m minitune` and `minitune` are the command line."""

import sys


def main() -> None:
    """Run the command line. One line and exit code 2 where a library of it is not installed."""
    try:
        from minitune.cli import main as run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "minitune":
            raise
        print(f"minitune: the command line needs {error.name}, which is not installed; say: pip install {error.name}",
              file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()

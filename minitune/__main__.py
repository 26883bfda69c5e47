"""`python -m minitune` and `minitune` are the command line."""

import io
import signal
import sys


def main() -> None:
    """Run the command line. One line and exit code 2 where a library of it is not installed."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)        # until cli.py has loaded all that is large
    for stream in (sys.stdout, sys.stderr):     # a model may write what the terminal's encoding does not have
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        from minitune.cli import main as run

        run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "minitune":
            raise
        print(f"minitune: the command line needs {error.name}, which is not installed; say: pip install {error.name}",
              file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

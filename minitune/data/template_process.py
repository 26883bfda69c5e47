"""Starts and feeds the process that renders chat templates (template_child.py), one for the whole program."""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitune.errors import InputError


class TemplateProcess:
    """The renderer: started at the first use, and anew after a template has brought it down, anything else, or a fork.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()
        if hasattr(os, "register_at_fork"):     # a thread that is not there any more may have held the lock
            os.register_at_fork(after_in_child=self._unlock)

    def _unlock(self) -> None:
        self._lock = threading.Lock()

    def render(self, source: str, variables: Mapping[str, Any], now: datetime,
               requests: Sequence[bytes]) -> list[dict[str, Any]]:
        """The answers to `requests` (template_child.py tells both) under the template `source`; `now` is what it writes
        where it calls strftime_now.

        Where a request ends the process, its answer is {"error": …} and the last one of the list.
        """
        header = json.dumps({"source": source, "variables": dict(variables), "now": now.isoformat(),
                             "n": len(requests)}).encode()
        with self._lock:
            process = self._started()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(b"\n".join([header, *requests, b""]))
                process.stdin.flush()
                answers: list[dict[str, Any]] = []
                while len(answers) < len(requests) and (line := process.stdout.readline()):
                    answers.append(json.loads(line))
                if len(answers) < len(requests):
                    answers.append({"error": self._cause(process)})
                    self._close()
                return answers
            except BrokenPipeError as error:
                self._close()
                raise InputError("the process that renders chat templates does not start; is jinja2 installed? "
                                 "(pip install 'jinja2>=3.1.6')") from error
            except BaseException:       # an answer may be on its way that nobody will ask for
                self._close()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is not None:
            self._close()       # it was ended from without while it had nothing to do
        if self._process is None or self._owner != os.getpid():
            jinja2 = find_spec("jinja2")
            if jinja2 is None or jinja2.origin is None:
                raise InputError("chat templates need jinja2, which is not installed: pip install 'jinja2>=3.1.6'")
            child = Path(__file__).with_name("template_child.py")
            self._owner = os.getpid()
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(child), str(Path(jinja2.origin).parents[1])], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        return self._process

    @staticmethod
    def _cause(process: subprocess.Popen[bytes]) -> str:
        code = process.wait()
        if hasattr(signal, "SIGPROF") and code == -signal.SIGPROF:
            return "it takes too long"
        return f"it ends its process (code {code}), most likely by the memory that it takes"

    def close(self) -> None:
        """Ends the process; the next use starts another."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:     # what was still to be written went down with it
                    continue
        process.wait()


PROCESS = TemplateProcess()
atexit.register(PROCESS.close)

__all__ = ["PROCESS", "TemplateProcess"]

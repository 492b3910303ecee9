"""Our side of the process in which QNN runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from fraqat_compiler.errors import TargetError

WORKER = Path(__file__).with_name("worker.py")
NO_FALLBACK = {"session.disable_cpu_ep_fallback": "1"}
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
QUIET = 3


class QnnError(TargetError):
    """The library refused or crashed; `log` is what it printed.

    Attributes:
        log: the library's own log of the call.
    """

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


class QnnProcess:
    """A process with the QNN library in it; ends with this object."""

    def __init__(self) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        command_read, command_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._process = subprocess.Popen(
            # by its path, for importing it would import the whole package, and torch, before it
            [sys.executable, "-P", str(WORKER), str(command_read), str(answer_write)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=(command_read, answer_write),
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        os.close(command_read)
        os.close(answer_write)
        self._commands = Connection(command_write, readable=False)
        self._answers = Connection(answer_read, writable=False)
        weakref.finalize(self, _end, self._process, self._commands, self._answers)

    def load(
        self,
        model: Path,
        provider: Mapping[str, str],
        config: Mapping[str, str],
        severity: int = QUIET,
        *,
        content: bytes | None = None,
        root: Path | None = None,
        beside: bool = False,
    ) -> list[str]:
        """Open a session on a model or context binary; returns its output names.

        Args:
            model: its file.
            provider, config: options of the provider and of the session; paths in them are absolute.
            severity: of the log that the library keeps.
            content: the model to take in place of what the file holds; weights are read from the files beside that.
            root: a folder above the model, by default its own; the path from there gives the compiled graph its name.
            beside: keep the sessions that are open.
        """
        path = model.resolve()
        base = root.resolve() if root else path.parent
        name = str(path.relative_to(base))
        if content is not None:
            config = {**config, WEIGHTS_FOLDER: str(path.parent.relative_to(base))}
        given = name if content is None else content
        answer: list[str] = self._call("load", str(base), given, dict(provider), dict(config), severity, beside)
        return answer

    def run(self, inputs: dict[str, Any], index: int = -1) -> dict[str, Any]:
        """One inference of a session, by default the one that was loaded last."""
        outputs: dict[str, Any] = self._call("run", inputs, index)
        return outputs

    def unload(self) -> None:
        """Drop the session, which writes a profile."""
        self._call("close")

    @property
    def log(self) -> str:
        """What the library printed during the last call."""
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")

    def _call(self, method: str, *arguments: Any) -> Any:
        """One command and its answer.

        Raises:
            QnnError: the library refused, or its process died.
        """
        os.ftruncate(self._log.fileno(), 0)
        self._log.seek(0)
        try:
            self._commands.send((method, arguments))
            status, result = self._answers.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            code = self._process.wait()
            raise QnnError(f"the QNN library's process ended with status {code}", self.log) from None
        except BaseException:  # Ctrl-C: the answer that is under way would be taken for that of the next command
            self._process.kill()
            raise
        if status == "error":
            raise QnnError(str(result), self.log)
        return result


def _end(process: subprocess.Popen[bytes], *pipes: Connection) -> None:
    for pipe in pipes:
        pipe.close()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

"""The process in which QNN runs: `python -P worker.py READ_FD WRITE_FD`.

The library prints to stdout, and may crash on a graph that it does not like: in a process of its own it does neither
to us. Commands and answers are pairs over two pipes; the process's stdout and stderr go to a log file.
"""

from __future__ import annotations

import os
import sys
from multiprocessing.connection import Connection
from typing import Any

import onnxruntime as ort
import onnxruntime_qnn

PROVIDER = "QNNExecutionProvider"


class Worker:
    """Holds the sessions that are loaded."""

    def __init__(self) -> None:
        ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
        self._device = next(device for device in ort.get_ep_devices() if device.ep_name == PROVIDER)
        self._sessions: list[ort.InferenceSession] = []

    def load(
        self,
        folder: str,
        model: str | bytes,
        provider: dict[str, str],
        config: dict[str, str],
        severity: int,
        beside: bool,
    ) -> list[str]:
        """Open a session, which compiles the model when it is no context binary. Returns the output names.

        Args:
            folder: what paths are relative to.
            model: path of its file, or its content.
            provider, config: options of the provider and of the session.
            severity: of the log.
            beside: keep the sessions that are open; without it they are dropped.
        """
        os.chdir(folder)  # the library puts the path it is given into the binary: an absolute one would differ by place
        ort.set_default_logger_severity(severity)
        options = ort.SessionOptions()
        options.log_severity_level = severity
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        backend = {"backend_path": onnxruntime_qnn.get_qnn_htp_path()}
        options.add_provider_for_devices([self._device], backend | provider)
        if not beside:
            self._sessions.clear()  # the library holds one graph at a time in less memory than two
        self._sessions.append(ort.InferenceSession(model, options))
        return [output.name for output in self._sessions[-1].get_outputs()]

    def run(self, inputs: dict[str, Any], index: int) -> dict[str, Any]:
        """One inference of a loaded session."""
        session = self._sessions[index]
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, inputs), strict=True))

    def close(self) -> None:
        """Drop the sessions; a profile is written to its file then."""
        self._sessions.clear()


def serve(commands: Connection, answers: Connection) -> None:
    """Answer commands until the pipe closes: (method, arguments) -> ("ok", result) or ("error", text)."""
    worker = Worker()
    while True:
        try:
            method, arguments = commands.recv()
        except EOFError:
            return
        try:
            answers.send(("ok", getattr(worker, method)(*arguments)))
        except Exception as error:  # the other side turns the text into a TargetError
            answers.send(("error", f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False))

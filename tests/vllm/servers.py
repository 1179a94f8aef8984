"""vLLM's OpenAI server, started and stopped."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import openai


@contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[openai.OpenAI]:
    """A client of a server in a process of its own, which calls the model tiny."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options]
    command += ["--model", str(model), "--served-model-name", "tiny", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--kv-cache-memory-bytes", str(512 << 20)]
    # Its engine is a process of its own, as by default.
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=120
    )
    try:
        wait(client, process, log)
        yield client
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait(client: openai.OpenAI, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            client.models.list()
        except openai.APIConnectionError:
            time.sleep(1)
        else:
            return
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-5000:]}")

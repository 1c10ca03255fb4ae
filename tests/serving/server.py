"""A real `vllm serve` on loopback, and questions to it over HTTP."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Offline, on a CPU, with a KV cache of 1 GiB; threads are left to the tests' own machine.
ENV = {
    **os.environ,
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
PATIENCE = 300  # seconds until a server must be up, on a busy machine


class Server:
    """A running server; ends with the `with` block."""

    def __init__(self, model: str, log: Path, *arguments: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        command = [str(Path(sys.executable).parent / "vllm"), "serve", model, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
        command += arguments
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=ENV, start_new_session=True
            )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.kill()

    def kill(self) -> None:
        """End all its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait_until_up(self) -> None:
        """Return when it answers; fail with the end of its log where it ends before."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError(f"not up after {PATIENCE} s: {self.log.read_text()[-3000:]}")

    def ask(self, question: str, images=(), **more) -> dict:
        """The answer: "text", "prompt" tokens, those "cached" and those of "image"s; or "status" and "error"."""
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
        content.append({"type": "text", "text": question})
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
        body |= {"temperature": 0, **more}
        url, headers = f"http://127.0.0.1:{self.port}/v1/chat/completions", {"Content-Type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                found = json.load(response)
        except urllib.error.HTTPError as error:
            return {"status": error.code, "error": error.read().decode()}
        usage = found["usage"]
        details = usage.get("prompt_tokens_details") or {}
        return {
            "text": found["choices"][0]["message"]["content"].strip(),
            "prompt": usage["prompt_tokens"],
            "cached": details.get("cached_tokens") or 0,
            "image": (details.get("multimodal_tokens") or {}).get("image", 0),
        }

    def ask_all(self, asked) -> list[dict]:
        """Answers to (question, images, more), all at once."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: self.ask(one[0], one[1], **one[2]), asked))

    def lines(self, pattern: str) -> list[str]:
        """Lines of its log that match."""
        return [line for line in self.log.read_text().splitlines() if re.search(pattern, line)]


def data_url(image) -> str:
    """A picture within a request."""
    data = io.BytesIO()
    image.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

"""A vLLM server on loopback, and requests to it whose tokens are timed as they come."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tokprune.integrations.vllm import KEY

from tokprune.core.errors import RunError

HOST, PATIENCE_S, ENDING_S = "127.0.0.1", 900, 60


@dataclass
class Timed:
    """One answered request.

    Args:
        begun_s, first_s, last_s: when it was sent, and its first and last token came.
        n_prompt, n_image, n_new: tokens, as the server counts them.
    """

    begun_s: float
    first_s: float
    last_s: float
    n_prompt: int
    n_image: int
    n_new: int


class Server:
    """A running `vllm serve`; ends with the `with` block, with all of its processes.

    Args:
        model: a local folder or a hub id.
        arguments: more of `vllm serve`.

    Raises:
        RunError: it ends before it answers, or does not answer in time.
    """

    def __init__(self, model: str, *arguments: str):
        with socket.socket() as free:
            free.bind((HOST, 0))
            self.port = free.getsockname()[1]
        self.model, self._ends = model, contextlib.ExitStack()
        self._log = self._ends.enter_context(tempfile.TemporaryFile("w+"))  # noqa: SIM115
        words = ["serve", model, "--host", HOST, "--port", str(self.port), *arguments]
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", *words]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> Server:
        try:
            self.wait_until_up()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *ignored: Any) -> None:
        self.end()

    def end(self) -> None:
        """End all of its processes."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDING_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ends.close()

    def wait_until_up(self) -> None:
        """Return when it answers.

        Raises:
            RunError: it has ended, or does not answer in time.
        """
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            if self._process.poll() is not None:
                raise RunError(f"vLLM cannot serve {self.model!r}: {self._last_line()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=5):
                return
            time.sleep(0.5)
        raise RunError(f"vLLM does not serve {self.model!r} after {PATIENCE_S} s: {self._last_line()}")

    def _last_line(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        marks = (f"{KEY}: ", "rror")  # ours, or the last error of vLLM
        found = (line for mark in marks for line in reversed(lines) if mark in line)
        return next(found, lines[-1] if lines else "it said nothing")

    def ask(self, body: bytes) -> Timed:
        """One request of `body_of`, streamed.

        Raises:
            RunError: the server refuses it.
        """
        connection, ticks, usage = http.client.HTTPConnection(HOST, self.port, timeout=PATIENCE_S), [], {}
        begun = time.perf_counter()
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise RunError(f"the server answers {response.status}: {response.read().decode(errors='replace')[:500]}")
        for line in response:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                usage = event.get("usage") or usage
                ticks += [time.perf_counter()] if event["choices"] else []
        connection.close()
        details = usage.get("prompt_tokens_details") or {}
        n_image = (details.get("multimodal_tokens") or {}).get("image", 0)
        return Timed(begun, ticks[0], ticks[-1], usage["prompt_tokens"], n_image, usage["completion_tokens"])

    def ask_all(self, bodies: Sequence[bytes], concurrency: int) -> list[Timed]:
        """All requests, so many at a time."""
        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(self.ask, bodies))


def body_of(model: str, picture: Image.Image, question: str, n_new: int, budget: dict[str, Any]) -> bytes:
    """A request for exactly so many tokens about a picture, under a budget of its own."""
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": n_new, "temperature": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    return json.dumps({**body, "mm_processor_kwargs": {KEY: budget}}).encode()


def random_model(folder: Path, write_processor: Callable[[Path], Any]) -> dict[str, Any]:
    """Write the configuration of a LLaVA of 134 million parameters that sees 576 tokens; its weights are left out.

    Args:
        folder: to write to.
        write_processor: writes tokenizer and processor; they are changed to pictures of 336 pixels.

    Returns:
        The configuration.
    """
    write_processor(folder)
    side = {"shortest_edge": 336}, {"height": 336, "width": 336}
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = json.loads((folder / name).read_text())
        pictures = settings.get("image_processor", settings)
        pictures["size"], pictures["crop_size"] = side
        settings |= {"patch_size": 14} if "patch_size" in settings else {}
        (folder / name).write_text(json.dumps(settings))
    config = json.loads((folder / "config.json").read_text())
    layers = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = {**layers, "num_key_value_heads": 12, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 4096}
    tower = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
    config["text_config"] |= {**text, "tie_word_embeddings": False}
    config["vision_config"] |= {**tower, "image_size": 336, "patch_size": 14, "projection_dim": 512}
    config |= {"image_seq_length": 576, "tie_word_embeddings": False, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return config

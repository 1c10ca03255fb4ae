"""Starting lmms-eval, and real requests about documents of our own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import changed
from lmms_eval.api.instance import Instance
from tokprune.eval.models import path_of
from tokprune.integrations.lmms_eval.model import TokPrune

MODEL = path_of("tiny-llava")
METHODS = "vtc_cls,fastv,random:seed=1,visionzip"
N_SAMPLES = 24


def lmms_eval(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """lmms-eval as a user starts it."""
    command = [sys.executable, *launcher, "-m", "lmms_eval", "--model", "tokprune", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def instances(lm: TokPrune, docs: list[dict], kind: str = "generate_until", **arguments) -> list[Instance]:
    """Requests about documents with "text", "images" and, where it is not the same for all, "arguments" or "target"."""
    lm.task_dict["own"] = {"test": docs}
    made = []
    for i, doc in enumerate(docs):
        asked = doc["target"] if kind == "loglikelihood" else {**arguments, **doc.get("arguments", {})}
        made.append(
            Instance(
                request_type=kind,
                arguments=(doc["text"], asked, lambda d: d["images"], i, "own", "test"),
                idx=0,
                metadata={"task": "own", "doc_id": i, "repeats": 1, "split": "test"},
            )
        )
    return made


def asked(out: Path, *more: str, methods: str = METHODS) -> list[str]:
    """Arguments of `tokprune` for a run of findit."""
    said = ["eval", "--suite", "lmms-eval", "--tasks", "findit", "--methods", methods, "--keep", "0.25"]
    return changed([*said, "--limit", str(N_SAMPLES), "--batch-size", "8", "--out", str(out)], *more)

"""`tokprune compare --backend vllm` answers, counts and costs as transformers does, question by question."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest
from server import ENV

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

ASKED = ["--model", "tiny-llava", "--task", "findit", "--limit", "24", "--batch-size", "8"]
METHODS = ["--methods", "vtc_cls,visionzip", "--keep", "0.25,0.11"]


QWEN = ["--model", "tiny-qwen", "--task", "watchit", "--limit", "12", "--batch-size", "6", "--no-controls"]


def compare(out, *more: str) -> subprocess.CompletedProcess:
    asked = [] if "--model" in more else ASKED
    command = [sys.executable, "-m", "tokprune.cli", "compare", *asked, "--out", str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(folder) -> dict[tuple[str, str], dict]:
    return {(r["config"], r["sample"]): r for r in lines(folder / "samples.jsonl")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for backend in ("transformers", "vllm"):
        found[backend] = tmp_path_factory.mktemp("compare") / backend
        done = compare(found[backend], *METHODS, "--backend", backend)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return found


def test_every_answer_and_every_count_is_that_of_transformers(folders):
    want, got = answers(folders["transformers"]), answers(folders["vllm"])
    assert len(want) == 24 * 8  # unpruned, other pictures, two methods and the control at two budgets
    assert got == {key: {**row, "backend": "vllm"} for key, row in want.items()}
    assert {r["n_visual_after"] for (config, _), r in got.items() if config == "vtc_cls@0.11"} == {16}
    texts = {c: [r["answer"] for (config, _), r in got.items() if config == c] for c in ("none", "vtc_cls@0.11")}
    assert texts["none"] != texts["vtc_cls@0.11"]  # the answers can differ


def test_rows_say_what_ran_the_model(folders):
    rows = [r for r in lines(folders["vllm"] / "rows.jsonl") if r["method"] != "question only"]
    assert {r["backend"] for r in rows} == {"vllm"}
    assert {r["attn_implementation"].split()[0] for r in rows} == {"vLLM"}
    assert all(r["prefill_ms_p50"] > 0 for r in rows)
    first = next(r for r in lines(folders["transformers"] / "rows.jsonl") if r["method"] == "none")
    assert first["backend"] == "transformers"


def test_a_run_goes_on_with_another_budget_and_under_its_own_backend_alone(folders):
    before = answers(folders["vllm"])
    done = compare(folders["vllm"], "--methods", "vtc_cls", "--keep", "0.5", "--no-controls", "--backend", "vllm")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(before)} answers are in" in done.stdout
    assert len(answers(folders["vllm"])) == len(before) + 24
    refused = compare(folders["vllm"], *METHODS)
    assert refused.returncode != 0
    assert "backend" in refused.stderr
    assert "--overwrite" in refused.stderr


def test_what_vllm_cannot_serve_is_refused_or_left_out(tmp_path):
    refused = compare(tmp_path / "a", "--methods", "vtc_cls,fastv", "--keep", "0.25", "--backend", "vllm")
    assert refused.returncode != 0
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("tokprune: ")]
    assert "'fastv' cuts between decoder layers" in line
    assert "leave --backend vllm out" in line
    assert not (tmp_path / "a").exists()


def test_videos_are_answered_as_in_transformers(tmp_path):
    found = {}
    for backend in ("transformers", "vllm"):
        out = tmp_path / backend
        done = compare(out, *QWEN, "--methods", "vidcom2,divprune", "--keep", "0.25", "--backend", backend)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        found[backend] = answers(out)
    want = {key: {**row, "backend": "vllm"} for key, row in found["transformers"].items()}
    assert found["vllm"] == want
    assert {row["n_visual_after"] for (config, _), row in want.items() if config == "vidcom2@0.25"} == {16}

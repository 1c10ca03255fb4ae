"""`tokprune serve`: the command line of vLLM that it stands for, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shlex

import pytest
from commands import refusal, tokprune_cli
from tokprune.eval.models import path_of
from transformers import AutoModelForImageTextToText

import tokprune


def shown(*arguments: str) -> list[str]:
    return shlex.split(tokprune_cli("serve", *arguments, "--show").stdout)


def key(words: list[str]):
    return json.loads(words[words.index("--mm-processor-kwargs") + 1])["tokprune"]


def test_it_is_vllm_serve_with_our_key():
    words = shown("llava-hf/llava-1.5-7b-hf", "--method", "vtc_cls:start_layer=16", "--keep", "0.25")
    assert words[:3] == ["vllm", "serve", "llava-hf/llava-1.5-7b-hf"]
    assert key(words) == {"method": "vtc_cls:start_layer=16", "keep_ratio": 0.25}
    assert "--enable-prompt-tokens-details" in words


def test_an_embedded_model_a_number_of_tokens_and_options_of_vllm():
    done = tokprune_cli(
        "serve", "tiny-llava", "--method", "fopru", "--keep-tokens", "36", "--show", "--", "--port", "81"
    )
    words = shlex.split(done.stdout)
    assert words[2] == str(path_of("tiny-llava"))
    assert key(words) == {"method": "fopru", "keep_tokens": 36}
    assert words[-2:] == ["--port", "81"]


def test_without_a_method_nothing_is_pruned():
    assert "--mm-processor-kwargs" not in shown("tiny-llava")


def test_a_saved_folder(tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(path_of("tiny-llava"))
    with tokprune.attach(model, "vtc_cls", keep_tokens=20) as attachment:
        attachment.save(tmp_path / "deploy")
    assert key(shown("tiny-llava", "--config", str(tmp_path / "deploy"))) == {"config": str(tmp_path / "deploy")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "vtc_cls"), "--keep 0.25 or --keep-tokens 64"),
        (("--keep", "0.25"), "use --method vtc_cls"),
        (("--method", "vtc_cls", "--keep", "0.25", "--keep-tokens", "3"), "give one budget"),
        (("--method", "vtc_cls", "--keep", "0.25,0.5"), "one budget"),
        (("--method", "vtc_clss", "--keep", "0.25"), "Did you mean 'vtc_cls'"),
        (("--method", "vtc_cls", "--keep", "25"), "0.25"),
        (("--config", "/no/such", "--keep", "0.5"), "leave --method, --keep and --keep-tokens out"),
    ],
)
def test_what_cannot_be_served_is_one_line(arguments, message):
    assert message in refusal(tokprune_cli("serve", "tiny-llava", *arguments, "--show"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_where_vllm_is_missing_it_says_how_to_install_it():
    line = refusal(tokprune_cli("serve", "tiny-llava", "--method", "vtc_cls", "--keep", "0.25"))
    assert "pip install 'vllm==" in line

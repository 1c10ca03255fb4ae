"""One real server over its HTTP interface: counts, caches, budgets, crowds, bad requests; servers that do not start."""

from __future__ import annotations

import importlib.util
import json

import pytest
from questions import asked
from server import Server
from tokprune.eval.models import path_of

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm")

ARGUMENTS = (
    "--limit-mm-per-prompt",
    '{"image": 4}',
    "--max-num-seqs",
    "64",
    "--block-size",  # a short prompt has whole blocks to share
    "32",
    "--enable-prompt-tokens-details",
    "--trust-request-mm-kwargs",
)
KEY = ("--mm-processor-kwargs", '{"tokprune": {"method": "vtc_cls", "keep_ratio": 0.25}}')
QUESTION = "what color is the circle?"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(path_of("tiny-llava"), log, *ARGUMENTS, *KEY) as running:
        running.wait_until_up()
        yield running


@pytest.fixture(scope="module")
def samples():
    return asked("findit", 60)


@pytest.fixture(scope="module")
def pictures(samples):
    return list({s.image_id: image for s, image, _ in samples}.values())


def budget(**given) -> dict:
    return {"mm_processor_kwargs": {"tokprune": given}}


def test_the_log_says_what_is_pruned(server):
    assert len(server.lines(r"tokprune: vtc_cls keep_ratio=0.25: 144 -> 36 tokens a picture")) == 1


def test_prompts_have_the_tokens_that_were_promised(server, pictures):
    text = server.ask(QUESTION)
    assert text["image"] == 0
    for n in (1, 2, 4):
        found = server.ask(QUESTION, pictures[:n])
        assert found["image"] == 36 * n
        assert found["prompt"] == text["prompt"] + 36 * n
    assert server.ask(QUESTION, pictures[:5])["status"] == 400


@pytest.mark.parametrize(
    ("given", "n"),
    [({"keep_tokens": 16}, 16), ({"keep_ratio": 0.11}, 16), ({"keep_ratio": 1.0}, 144), ({"keep_tokens": 500}, 144)],
)
def test_a_request_has_its_own_budget(server, pictures, given, n):
    assert server.ask(QUESTION, pictures[:1], **budget(**given))["image"] == n
    assert server.ask(QUESTION, pictures[:1])["image"] == 36


def test_the_prefix_cache_knows_picture_and_budget(server, pictures):
    first = server.ask(QUESTION, [pictures[20]])
    again = server.ask(QUESTION, [pictures[20]])
    assert first["cached"] == 0
    assert again["cached"] >= 32
    assert again["text"] == first["text"]
    assert server.ask("what shape is red?", [pictures[20]])["cached"] >= 32
    assert server.ask(QUESTION, [pictures[21]])["cached"] == 0
    assert server.ask(QUESTION, [pictures[20]], **budget(keep_tokens=37))["cached"] == 0
    assert server.ask(QUESTION, [pictures[20]], **budget(keep_tokens=37))["cached"] >= 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokprune": {"keep_ratio": 25}}, "Did you mean keep_ratio=0.25"),
        ({"tokprune": {"kep_tokens": 3}}, "did you mean keep_tokens"),
        ({"tokprune": {"method": "fopru", "keep_ratio": 0.25}}, "start another server for another method"),
        ({"tokprune": "vtc_cls"}, "is not an object"),
        ({"tokprun": {"keep_ratio": 0.25}}, "nothing pruned; did you mean 'tokprune'"),
    ],
)
def test_bad_requests_are_answered_with_what_to_type(server, pictures, given, message):
    found = server.ask(QUESTION, pictures[:1], mm_processor_kwargs=given)
    assert found["status"] == 400
    assert message in json.loads(found["error"])["error"]["message"]
    assert server.ask(QUESTION, pictures[:1])["image"] == 36


def test_a_crowd_is_answered_as_one_by_one(server, samples):
    given = [(s.question, [image], {}) for s, image, _ in samples[:50]]
    singles = [server.ask(question, images) for question, images, _ in given]
    together = server.ask_all(given)
    assert [a["text"] for a in together] == [a["text"] for a in singles]
    assert {a["image"] for a in together} == {36}
    assert sum(a["text"] == s.answer for a, (s, *_) in zip(together, samples, strict=False)) >= 40


def test_a_mixed_crowd_is_answered_as_one_by_one(server, samples, pictures):
    given = []
    for i, (s, image, _) in enumerate(samples[:50]):
        images = [[image], [image, pictures[i % 7]], []][i % 3]
        given.append((s.question, images, budget(keep_tokens=(16, 36, 100)[i % 3]) if i % 2 else {}))
    singles = [server.ask(question, images, **more) for question, images, more in given]
    together = server.ask_all(given)
    assert [(a["text"], a["image"]) for a in together] == [(a["text"], a["image"]) for a in singles]
    assert {a["image"] for a in together} >= {0, 16, 36, 72}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (KEY[:1] + ('{"tokprun": {"method": "vtc_cls", "keep_ratio": 0.25}}',), "did you mean 'tokprune'"),
        (KEY[:1] + ('{"tokprune": {"method": "vtc_clss", "keep_ratio": 0.25}}',), "Did you mean 'vtc_cls'"),
        (KEY[:1] + ('{"tokprune": {"method": "fastv", "keep_ratio": 0.25}}',), "cuts between decoder layers"),
        ((*KEY, "--model-impl", "transformers"), "leave --model-impl out"),
    ],
)
def test_a_server_that_would_not_prune_does_not_start(tmp_path, more, message):
    with Server(path_of("tiny-llava"), tmp_path / "log", *more) as ended:
        assert ended.process.wait(300) != 0
    last = ended.log.read_text().splitlines()[-4:]
    assert any("tokprune: " in line and message in line for line in last), last


def test_a_server_without_the_key_is_vllms_own(tmp_path, pictures, samples):
    """It refuses the key of a request, and comes back after it was killed."""
    for attempt in range(2):
        with Server(path_of("tiny-llava"), tmp_path / f"log{attempt}", *ARGUMENTS) as plain:
            plain.wait_until_up()
            assert plain.ask(QUESTION, pictures[:1])["image"] == 144
            refused = plain.ask(QUESTION, pictures[:1], **budget(keep_tokens=16))
            assert refused["status"] == 400
            assert "start it with --mm-processor-kwargs" in refused["error"]
            plain.kill()

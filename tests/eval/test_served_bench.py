"""Throughput of a server, with a server that is a few lines: what is asked, how it is counted, what is refused."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import refusal, tokprune_cli
from rich.console import Console
from tokprune.eval.bench import serving
from tokprune.eval.bench.break_even import length_of_saving
from tokprune.eval.bench.server import Server, Timed, body_of
from transformers import AutoConfig

from tokprune.core.errors import RunError, TokPruneError

SETTINGS = serving.Settings(model="tiny-llava", keep=(0.25,), concurrency=(1, 3), new_tokens=4, rounds=2, warmup=1)


class Asked(list):
    """What a server was asked, and the arguments that it was started with."""

    arguments: tuple[str, ...] = ()


class Answers(BaseHTTPRequestHandler):
    """Streams as many events as tokens are asked for."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        keep = body["mm_processor_kwargs"]["tokprune"]["keep_ratio"]
        usage = {"prompt_tokens": 9 + round(144 * keep), "completion_tokens": body["max_tokens"]}
        usage["prompt_tokens_details"] = {"multimodal_tokens": {"image": round(144 * keep)}}
        self.send_response(200)
        self.end_headers()
        for _ in range(body["max_tokens"]):
            self.wfile.write(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n')
        self.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())

    def log_message(self, *ignored):
        pass


@pytest.fixture
def bodies(monkeypatch):
    """What a server was asked, which is started instead of vLLM."""
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    listening.asked = Asked()
    threading.Thread(target=listening.serve_forever, daemon=True).start()

    def started(self, model, *arguments):
        self.model, self.port, listening.asked.arguments = model, listening.server_address[1], arguments

    monkeypatch.setattr(Server, "__init__", started)
    monkeypatch.setattr(Server, "__enter__", lambda self: self)
    monkeypatch.setattr(Server, "__exit__", lambda self, *ignored: None)
    monkeypatch.setattr(serving, "refuse_without_vllm", lambda: None)
    monkeypatch.setattr(serving, "conditions_of", dict)
    yield listening.asked
    listening.shutdown()
    listening.server_close()


def test_budgets_are_asked_in_turn_with_pictures_that_nobody_has_seen(bodies, tmp_path):
    rows = serving.ServeBench(SETTINGS, tmp_path / "rows.jsonl", Console(quiet=True)).run()
    assert [(r.concurrency, r.keep_ratio) for r in rows] == [(1, 1.0), (1, 0.25), (3, 1.0), (3, 0.25)]
    assert [(r.n_image, r.n_prompt) for r in rows] == [(144, 153), (36, 45)] * 2
    assert {len(r.requests_s) for r in rows} == {len(r.first_ms) for r in rows} == {2}
    assert all(r.tokens_s[0] == pytest.approx(4 * r.requests_s[0]) for r in rows)
    assert rows[0].prefill_flops_ratio == 1
    assert 0.3 < rows[1].prefill_flops_ratio < 0.6
    pictures = [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert len(pictures) == len(set(pictures)) == 3 * 2 * (4 + 6)
    assert {(b["ignore_eos"], b["max_tokens"], b["temperature"]) for b in bodies} == {(True, 4, 0)}
    keeps = [body["mm_processor_kwargs"]["tokprune"]["keep_ratio"] for body in bodies]
    turns = [(1.0, 0.25), (0.25, 1.0), (1.0, 0.25)]  # every round begins with the next budget
    assert keeps == [keep for turn in turns for n in (4, 6) for keep in turn for _ in range(n)]
    assert {"--no-enable-prefix-caching", "--enable-prompt-tokens-details"} <= set(bodies.arguments)
    assert bodies.arguments[bodies.arguments.index("--max-num-seqs") + 1] == "3"
    assert bodies.arguments[bodies.arguments.index("--mm-processor-cache-gb") + 1] == "0"
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [serving.Row(**r) for r in written] == rows
    with pytest.raises(RunError, match="--overwrite"):
        serving.ServeBench(SETTINGS, tmp_path / "rows.jsonl", Console(quiet=True)).run()
    lines = serving.lines_of(rows)
    assert [line[5] for line in lines if line[1] == "1"] == ["1.00 [1.00, 1.00]"] * 2


class Together(Answers):
    """Answers as soon as three requests are there."""

    def do_POST(self):
        self.server.three.wait(60)
        super().do_POST()


def test_requests_are_open_together_and_their_tokens_are_timed_in_order():
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Together)
    listening.asked, listening.three = [], threading.Barrier(3)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    server = object.__new__(Server)
    server.port = listening.server_address[1]
    picture = next(iter(serving.noise(0, 1)))
    found = server.ask_all([body_of("m", picture, "?", 4, {"keep_ratio": 0.25})] * 3, 3)
    assert all(t.begun_s < t.first_s < t.last_s for t in found)
    assert [(t.n_prompt, t.n_image, t.n_new) for t in found] == [(45, 36, 4)] * 3
    listening.shutdown()
    listening.server_close()


def test_rows_are_relative_to_the_unpruned_requests_of_their_concurrency(tmp_path):
    bare, pruned = Timed(0, 1.01, 1.31, 153, 144, 4), Timed(0, 0.5, 0.83, 45, 36, 4)
    slower = Timed(0, 9.0, 9.3, 153, 144, 4)
    found = {(1, 0.25): [[pruned]], (1, 1.0): [[bare]], (3, 0.25): [[pruned]], (3, 1.0): [[slower]]}
    bench = serving.ServeBench(SETTINGS, tmp_path / "rows.jsonl", Console(quiet=True))
    config = AutoConfig.from_pretrained(serving.path_of("tiny-llava"))
    plans = {keep: serving.plan_of(config, bench._key(keep)) for keep in (1.0, 0.25)}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(serving, "conditions_of", dict)
        rows = bench._rows(found, config, plans)
    assert [(r.concurrency, r.keep_ratio) for r in rows] == [(1, 1.0), (1, 0.25), (3, 1.0), (3, 0.25)]
    assert [r.under_saving for r in rows] == [1, 32, 1, 538]  # 459.5 ms, or 8050, in steps of 15
    assert [line[5].split()[0] for line in serving.lines_of(rows)] == ["1.00", "1.58", "1.00", "11.20"]
    assert [line[9] for line in serving.lines_of(rows)] == ["", "31 tokens", "", "537 tokens"]


def test_what_vllm_cannot_serve_is_refused_before_a_server_starts(bodies, tmp_path):
    given = serving.Settings(model="tiny-llava", method="fastv")
    with pytest.raises(TokPruneError, match="cuts between decoder layers") as refused:
        serving.ServeBench(given, tmp_path / "rows.jsonl", Console(quiet=True)).run()
    assert "\n" not in str(refused.value)
    assert not bodies


def test_times_are_those_of_the_requests():
    asked = [Timed(0.0, 1.0, 3.0, 9, 4, 5), Timed(1.0, 3.0, 5.0, 9, 4, 5)]
    assert serving.seconds(asked) == 5
    assert serving.first_ms(asked) == 1500
    assert serving.token_ms(asked) == 500
    assert [serving.requests_of(n) for n in (1, 4, 16, 64, 200)] == [4, 8, 32, 64, 200]


@pytest.mark.parametrize(
    ("pruned", "bare", "length"),
    [
        ((50.0, 10.0), (100.0, 10.0), 92),  # 45 of them are left after 90 tokens of 0.5
        ((50.0, 9.0), (100.0, 10.0), None),
        ((96.0, 10.0), (100.0, 10.0), 1),
    ],
)
def test_the_length_from_which_less_is_saved(pruned, bare, length):
    assert length_of_saving(pruned, bare, 0.05) == length

    def saved(n: int) -> float:
        return 1 - (pruned[0] + (n - 1) * pruned[1]) / (bare[0] + (n - 1) * bare[1])

    if length and length > 1:
        assert saved(length) < 0.05 <= saved(length - 1) + 1e-12


def test_the_random_model_sees_576_tokens(tmp_path):
    with serving._folder("") as (folder, more):
        config = AutoConfig.from_pretrained(folder)
        plan = serving.plan_of(config, {"method": "vtc_cls", "keep_ratio": 0.25})
    assert plan.family.largest.n_visual == 576
    assert more == ["--load-format", "dummy"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (["--shape", "llava-1.5-7b"], "--shape cannot be given with --serve"),
        (["--batch-size", "2"], "--batch-size cannot"),
        (["--methods", "vtc_cls,fopru"], "--methods takes one value"),
        (["--concurrency", "0"], "--concurrency"),
        (["--new-tokens", "1"], "--new-tokens"),
    ],
)
def test_options_that_a_server_does_not_take_are_refused(more, word, tmp_path):
    assert word in refusal(tokprune_cli("bench", "--serve", "--out", str(tmp_path / "rows.jsonl"), *more))

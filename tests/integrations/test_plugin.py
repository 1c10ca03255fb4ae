"""The plug-in itself: arguments, prompts, batches, stops, log-likelihoods, what it records."""

from __future__ import annotations

import io
import json
import random

import processors
import prompt_snapshot
import pytest
import tiny
import torch
from folders import write_folder, write_model
from lmms_eval.models import get_model
from lmms_requests import MODEL, instances
from tokprune.eval.models import EMBEDDED, path_of
from tokprune.eval.run.rows import Config
from tokprune.eval.tasks import load_task
from tokprune.integrations.lmms_eval import prompts
from tokprune.integrations.lmms_eval.model import TokPrune
from tokprune.integrations.lmms_eval.options import cut

import tokprune
from tokprune.core.errors import RunError

METHODS = {
    "none": {},
    "vtc_cls": {"keep_ratio": "0.25"},
    "fastv": {"keep_ratio": "0.25"},
    "random:seed=1": {"keep_ratio": "0.11"},
    "visionzip": {"keep_tokens": "16"},
    "damro_filter+vtc_cls+fastv": {"keep_ratio": "0.5/0.5"},
}


def test_lmms_eval_finds_the_plug_in_by_itself():
    assert get_model("tokprune") is TokPrune


# ---- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "vtc_cls"}, "give exactly one budget: keep_ratio"),
        ({"method": "vtc_cls", "keep_ratio": "50"}, "Did you mean keep_ratio=0.5"),
        ({"pretrained": "no/such/model"}, "cannot load pretrained=no/such/model: .* Use pretrained=FOLDER"),
        ({"device": "cuda"}, "use --device cpu"),
        ({"record": "/proc/no/such.jsonl"}, "cannot write /proc/no/such.jsonl: .* record=FILE"),
    ],
)
def test_a_model_that_cannot_be_is_refused_before_any_task(load, arguments, message):
    with pytest.raises(tokprune.TokPruneError, match=message):
        load(**arguments)


@pytest.mark.parametrize("more", [{}, {"trust_remote_code": "True"}])
def test_code_of_a_model_is_never_run(load, tmp_path, monkeypatch, more):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    model = write_model(tmp_path / "foreign", ["config.json", "processor_config.json"], model_type="mine")
    with pytest.raises(tokprune.TokPruneError, match="tokprune (never runs|runs no code)"):
        load(pretrained=str(model), **more)
    assert not (model / "marker").exists()


def test_a_command_line_that_cannot_be_ends_with_one_line():
    with pytest.raises(SystemExit, match="tokprune: .* Did you mean 'keep_ratio'") as ended:
        TokPrune.create_from_arg_string(f"pretrained={MODEL},keep_rati=0.5", {"batch_size": 1})
    assert ended.value.code  # a text: printed, and the process ends with 1


def test_lmms_evals_flags_are_arguments_too():
    lm = TokPrune.create_from_arg_string(f"pretrained={MODEL}", {"batch_size": "4", "device": "cpu"})
    assert (lm.batch_size, lm.device.type, lm.model.dtype) == (4, "cpu", torch.float32)


# ---- prompts


@pytest.mark.parametrize("model", EMBEDDED)
def test_prompts_are_those_of_the_snapshot(model, load, tmp_path):
    lm = load(pretrained=path_of(model))
    snapshot = json.loads(prompt_snapshot.SNAPSHOT.read_text())[model]
    for name, want in snapshot.items():
        task = load_task(str(write_folder(tmp_path)) if name == "folder" else name)
        found = prompt_snapshot.of(lm.model, lm.processor, lambda question, kind: lm.prompt(question, [kind]), task)
        assert found == want


def test_without_a_template_the_prompt_is_that_of_llava(load):
    lm = load()
    lm.processor.chat_template = None
    assert lm.prompt("why?", ["image"]) == "USER: <image>\nwhy? ASSISTANT:"
    assert lm.prompt("why?", ["image", "image"]) == "USER: <image>\n<image>\nwhy? ASSISTANT:"
    assert lm.prompt("why?", []) == "USER: why? ASSISTANT:"
    assert lm.prompt("is <image> like <image>?", ["image", "image"]) == "USER: is <image>\n like <image>\n? ASSISTANT:"
    assert prompts.prompt(lm.processor, "why?", ["image"], "Be kind.") == "Be kind. USER: <image>\nwhy? ASSISTANT:"


def test_a_literal_placeholder_is_text_where_it_marks_no_picture(load, docs):
    lm = load()
    assert lm.prompt("what does <image> mean?", []) == lm.prompt("what does image mean?", [])
    assert lm.prompt("an <image> of <image>?", ["image"]) == lm.prompt("an image of image?", ["image"])
    assert lm.prompt("what is in <image>?", ["image"]).count("<image>") == 1
    (answer,) = lm.generate_until(instances(lm, [{**docs[0], "text": "<image> <image> what?"}], max_new_tokens=2))
    assert isinstance(answer, str)


def test_suffix_and_system_prompt(load, tmp_path):
    (tmp_path / "system.txt").write_text("be kind\n")
    for system in ("be kind", str(tmp_path / "system.txt")):
        lm = load(suffix=" one word", system_prompt=system)
        assert lm.prompt("why?", ["image"]) == "SYSTEM: be kind USER: <image>\nwhy? one word ASSISTANT:"


@pytest.mark.parametrize("visual", ["sound.wav", {"array": [0.0]}])
def test_other_media_are_refused_by_name(load, visual):
    lm = load()
    with pytest.raises(RunError, match="the task own gives .*leave the task out"):
        lm.generate_until(instances(lm, [{"text": "why?", "images": [visual]}]))


@pytest.mark.parametrize("kind", ["llava_onevision", "internvl"])
def test_families_whose_video_part_needs_torchvision_take_pictures(kind, load, docs, tmp_path):
    tiny.model(kind).save_pretrained(tmp_path)
    processors.processor(kind).save_pretrained(tmp_path)
    said = [{"text": "what is it ?", "images": doc["images"]} for doc in docs[:3]]
    record = tmp_path / "record.jsonl"
    lm = load(pretrained=str(tmp_path), method="fopru", keep_ratio="0.5", batch_size="3", record=str(record))
    assert len(lm.generate_until(instances(lm, said, max_new_tokens=2))) == 3
    seen = [json.loads(line) for line in record.read_text().splitlines()]
    assert [s["n_images"] for s in seen] == [1, 2, 0]
    for row in seen[:2]:
        assert 0 < row["n_visual_after"] < row["n_visual_before"]


def test_videos_are_answered_and_pruned(load, tmp_path):
    task = load_task("watchit")
    samples = task.samples()[:6]
    for sample in samples:
        folder = tmp_path / sample.image_id
        folder.mkdir(exist_ok=True)
        for i, frame in enumerate(task.image(sample.image_id).frames):
            frame.save(folder / f"{i}.png")
    docs = [{"text": s.question, "images": [str(tmp_path / s.image_id)]} for s in samples]
    record = tmp_path / "record.jsonl"
    lm = load(pretrained=path_of("tiny-qwen"), batch_size="6", frames="8")
    bare = lm.generate_until(instances(lm, docs, max_new_tokens=2))
    assert sum(s.is_right(answer) for s, answer in zip(samples, bare, strict=True)) >= 4
    lm = load(pretrained=path_of("tiny-qwen"), batch_size="6", method="fopru", keep_ratio="0.5", record=str(record))
    lm.generate_until(instances(lm, docs, max_new_tokens=2))
    for line in map(json.loads, record.read_text().splitlines()):
        assert (line["n_visual_before"], line["n_visual_after"]) == (64, 32)
        assert line["costs"]["llm_flops_after"] < line["costs"]["llm_flops_before"]


# ---- answers


@pytest.mark.parametrize("method", METHODS)
def test_batches_answer_as_singles_do(load, docs, method, tmp_path):
    """One picture, two and none in one batch, left-padded; also what was seen of each."""
    found = []
    for batch_size in (8, 1):
        path = tmp_path / f"{batch_size}.jsonl"
        lm = load(method=method, batch_size=batch_size, record=str(path), **METHODS[method])
        answers = lm.generate_until(instances(lm, docs, max_new_tokens=4))
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        counts = {
            line["doc_id"]: {
                k: v for k, v in line.items() if k.startswith(("n_", "llm_", "costs", "answer", "stopped"))
            }
            for line in lines
        }
        assert [counts[i]["answer"] for i in range(len(docs))] == answers
        found.append(counts)
    assert found[0] == found[1]
    assert {c["n_visual_before"] for c in found[0].values()} == {0, 144, 288}
    assert [c["n_images"] for _, c in sorted(found[0].items())] == [len(d["images"]) for d in docs]


def test_answers_are_those_of_our_own_harness(load, runner, findit):
    """Also for a seeded method, given the same salts."""
    task, samples = findit
    docs = [{"text": s.question, "images": [task.image(s.image_id)]} for s in samples]
    for method, budget in METHODS.items():
        if "/" in budget.get("keep_ratio", "") or "keep_tokens" in budget:
            continue
        lm = load(method=method, batch_size=8, **budget)
        requests = instances(lm, docs, max_new_tokens=8)
        answers = lm.generate_until(requests)
        salts = [lm._request(r, r.args[2]).salts[0] for r in requests]
        config = Config(method, float(budget["keep_ratio"]) if budget else None)
        tokens, _, _ = runner.answer(runner.prepare(task, samples, [s.image_id for s in samples]), config, salts)
        texts = runner.processor.batch_decode(tokens, skip_special_tokens=True)
        assert answers == [t.strip() for t in texts], method


def test_salts_are_one_a_document_and_picture(load, docs):
    lm = load()
    salts = [lm._request(r, r.args[2]).salts for r in instances(lm, docs)]
    assert [len(s) for s in salts] == [len(d["images"]) for d in docs]
    flat = [salt for own in salts for salt in own]
    assert len(set(flat)) == len(flat)
    assert salts == [lm._request(r, r.args[2]).salts for r in instances(lm, docs)]


def test_answers_come_back_in_the_order_of_the_requests(load, docs):
    lm = load(batch_size=4)
    for i, doc in enumerate(docs):
        doc["arguments"] = {"max_new_tokens": 1 + i % 2}
    requests = instances(lm, docs)
    whole = lm.generate_until(requests)
    shuffled = random.Random(0).sample(requests, len(requests))
    assert lm.generate_until(shuffled) == [whole[r.doc_id] for r in shuffled]
    assert len(set(whole)) > 2


def test_until_ends_an_answer(load, docs):
    lm = load(batch_size=8)
    tokenizer = lm.tokenizer
    free = lm.generate_until(instances(lm, docs, max_new_tokens=4, until=["no such text", ""]))
    assert free == lm.generate_until(instances(lm, docs, max_new_tokens=4))
    i = next(i for i, answer in enumerate(free) if len(answer) > 3)
    stop = free[i][2]
    ended = lm.generate_until(instances(lm, docs, max_new_tokens=4, until=[tokenizer.eos_token, stop]))
    assert ended == [cut(answer, [stop]).strip() for answer in free]
    assert ended == lm.generate_until(instances(lm, docs, max_new_tokens=4, until=stop))
    assert ended[i] != free[i]
    with pytest.raises(RunError, match="until="):
        lm.generate_until(instances(lm, docs[:1], until=[3]))


def test_until_ends_the_generation_of_its_row_alone(load, docs, tmp_path):
    """A row that has come to its end gets no more tokens; the others go on."""
    lm = load(batch_size=8, record=str(tmp_path / "r.jsonl"))
    lm._model.generation_config.eos_token_id = 10**6  # nothing else ends an answer
    asked = {"max_new_tokens": 6}
    long = lm.generate_until(instances(lm, docs, **asked))
    other = next(i for i, text in enumerate(long) if text[:2] != long[0][:2] and long[0][:2] not in text)
    for part in ([docs[0]], [docs[0], docs[other]]):
        lm.generate_until(instances(lm, part, until=[long[0][:2]], **asked))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()][len(docs) :]
    assert [(line["answer"], line["stopped"]) for line in lines] == [("", True), ("", True), (long[other], False)]
    assert [line["decode_s_per_token"] is None for line in lines] == [True, False, False]  # one token, and six


def test_beams_and_samples_run(load, docs, tmp_path):
    lm = load(method="vtc_cls", keep_ratio="0.25", batch_size=4, record=str(tmp_path / "r.jsonl"))
    beams = lm.generate_until(instances(lm, docs, max_new_tokens=3, num_beams=2))
    torch.manual_seed(0)
    lm.generate_until(instances(lm, docs, max_new_tokens=3, temperature=5.0))
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    counts = [[line[k] for k in ("n_visual_after", "llm_columns_after")] for line in lines]
    assert counts[: len(docs)] == counts[len(docs) :]
    assert [line["answer"] for line in lines[: len(docs)]] == beams


def test_several_rounds_are_refused():
    with pytest.raises(NotImplementedError, match="several rounds"):
        TokPrune.generate_until_multi_round(None, [])


# ---- log-likelihoods


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_loglikelihood_of_a_greedy_answer_is_that_of_generating_it(load, docs, method):
    lm = load(method=method, **METHODS[method])
    for doc in docs[:4]:
        (request,) = instances(lm, [doc])
        own = lm._request(request, request.args[2])
        with lm._attached() as attachment:
            lm._salt(attachment, [own])
            out = lm.model.generate(
                **lm._inputs([own]), max_new_tokens=4, output_logits=True, return_dict_in_generate=True, do_sample=False
            )
        ids = out.sequences[0, -len(out.logits) :]
        if lm.model.generation_config.eos_token_id in ids.tolist():
            ids = ids[: ids.tolist().index(lm.model.generation_config.eos_token_id)]
        target = " " + lm.tokenizer.decode(ids).strip()
        assert lm._continuation(own, target)[0].tolist() == ids.tolist()
        losses = [-step[0].log_softmax(-1)[i].item() for step, i in zip(out.logits, ids.tolist(), strict=False)]
        ((loss, greedy),) = lm.loglikelihood(instances(lm, [{**doc, "target": target}], "loglikelihood"))
        assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert greedy is True
        ((worse, other),) = lm.loglikelihood(instances(lm, [{**doc, "target": " cross cross"}], "loglikelihood"))
        assert worse > loss
        assert other is False


@torch.no_grad()
def test_loglikelihood_is_the_loss_of_labels(load, docs):
    """For a method that looks at the picture alone, one pass over prompt and answer says the same."""
    lm = load(method="vtc_cls", keep_ratio="0.25")
    doc = {**docs[0], "target": " top left"}
    (request,) = instances(lm, [doc], "loglikelihood")
    own = lm._request(request, request.args[2])
    text = lm.prompt(doc["text"], ["image"])
    inputs = lm.processor(images=[doc["images"]], text=[text + doc["target"]], return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : -lm._continuation(own, doc["target"]).shape[1]] = -100
    with lm._attached():
        want = lm.model(**inputs, labels=labels).loss.item()
    ((loss, _),) = lm.loglikelihood([request])
    assert loss == pytest.approx(want, abs=1e-5)


def test_selection_does_not_see_the_answer_that_is_asked_about(load, docs, tmp_path):
    """FastV looks at the last token of the prompt: of two answers, neither may be it."""
    path = tmp_path / "r.jsonl"
    lm = load(method="fastv", keep_ratio="0.25", record=str(path))
    kept = []
    lm.recorder.add, add = (lambda *a: (kept.append(seen_attachment.kept), add(*a))), lm.recorder.add
    for target in (" yes", " no"):
        with lm._attached() as seen_attachment:
            (request,) = instances(lm, [{**docs[0], "target": target}], "loglikelihood")
            lm._judged(lm._request(request, request.args[2]), target, seen_attachment)
    first, second = kept
    assert all(torch.equal(first[0][layer], second[0][layer]) for layer in first[0])
    assert [json.loads(line)["n_visual_after"] for line in path.read_text().splitlines()] == [36, 36]


def test_loglikelihood_refuses_what_it_cannot_judge(load, docs):
    lm = load()
    (request,) = instances(lm, [{**docs[0], "target": ""}], "loglikelihood")
    with pytest.raises(RunError, match="is empty"):
        lm.loglikelihood([request])
    request.arguments = ("", "yes")
    with pytest.raises(RunError, match="acc_mutual_info"):
        lm.loglikelihood([request])


# ---- what is recorded


def test_the_bare_model_is_bare_and_recording_changes_nothing(load, docs, tmp_path):
    lm, recorded = load(batch_size=8), load(batch_size=8, record=str(tmp_path / "r.jsonl"))
    with lm._attached() as attachment:
        assert attachment is None
    answers = [one.generate_until(instances(one, docs, max_new_tokens=4)) for one in (lm, recorded)]
    assert answers[0] == answers[1]
    inputs = lm._inputs([lm._request(r, r.args[2]) for r in instances(lm, docs)])
    with recorded._attached(), torch.no_grad():
        assert torch.equal(recorded.model(**inputs).logits, lm.model(**inputs).logits)


def test_padding_of_a_rank_is_answered_and_not_recorded(load, docs, tmp_path):
    path = tmp_path / "r.jsonl"
    lm = load(batch_size=8, record=str(path))
    requests = instances(lm, docs[:3], max_new_tokens=2)
    requests[2].metadata["__padding_only__"] = True
    assert len(lm.generate_until(requests)) == 3
    assert [json.loads(line)["doc_id"] for line in path.read_text().splitlines()] == [0, 1]


def test_every_rank_has_a_record_of_its_own(load, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert load(record=str(tmp_path / "r.jsonl")).recorder.path == tmp_path / "r.rank1.jsonl"

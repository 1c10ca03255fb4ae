"""Answers of vLLM in this process, to compare with `reference.py`: `engine.py MODEL N OUT`.

Standard input holds a list of arguments of `vllm.LLM`, for one engine each. All questions are asked one by one, and
then at once.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is in this process

from questions import N_TOKENS, asked, frames_of, model_of, shown, task_of
from tokprune.eval.models import path_of
from tokprune.integrations.vllm.pruning import Pruner
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def in_placeholders(index, layout):
    """Without tokens of text among them, as `tokprune.attach` counts kept rows."""
    places = {i: place for place, i in enumerate(layout.visual)}
    return [places[i] for i in index if i in places]


def seen_kept(kept):
    """Let the worker tell what it keeps."""
    prune = Pruner.prune

    def told(self, encode, items, numbers):
        found = prune(self, encode, items, numbers)
        for layout, k in zip(self.plan.family.layouts(items), found, strict=True):
            kept.append(
                in_placeholders(k.index.tolist(), layout) if self.plan.family.keeps_breaks else k.index.tolist()
            )
        return found

    Pruner.prune = told


def row(sample, out):
    first = out.outputs[0].logprobs[0]
    return {
        "id": sample.id,
        "ids": list(out.outputs[0].token_ids),
        "logprobs": {token: value.logprob for token, value in first.items()},
        "prompt": len(out.prompt_token_ids),
    }


def media_of(images, clips):
    videos = [(frames, {**told, "do_sample_frames": False}) for frames, told in map(frames_of, clips)]
    return {name: items for name, items in (("image", images), ("video", videos)) if items}


def answer(llm, samples, kept):
    """Rows of questions asked one by one, and of all at once."""
    params = SamplingParams(temperature=0, max_tokens=N_TOKENS, logprobs=64)
    requests = [{"prompt": prompt, "multi_modal_data": media_of(images, clips)} for _, images, clips, prompt in samples]
    singles = []
    for (sample, images, clips, _), request in zip(samples, requests, strict=True):
        before = len(kept)
        (out,) = llm.generate(request, params, use_tqdm=False)
        one, new = row(sample, out), kept[before:]
        one["kept"] = new if len(new) == len(images + clips) else None  # features may come from the encoder cache
        singles.append(one)
    llm.reset_prefix_cache()
    together = [row(s[0], a) for s, a in zip(samples, llm.generate(requests, params, use_tqdm=False), strict=True)]
    return {"singles": singles, "together": together}


def main(model_name: str, n: int, out: str) -> None:
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_logprobs": 64, "seed": 0}
    kept: list = []
    seen_kept(kept)
    samples, found = shown(model_name, asked(task_of(model_name), n)), []
    for options in json.load(sys.stdin):  # engines one after the other: most of a start is importing vLLM
        llm = LLM(path_of(model_of(model_name)), **arguments, **options)
        found.append(answer(llm, samples, kept))
        del llm
        cleanup_dist_env_and_memory()
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

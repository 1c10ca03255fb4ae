"""Answers of vLLM in this process, to compare with `reference.py`: `engine.py MODEL N OUT`.

Standard input holds arguments of `vllm.LLM`. All questions are asked one by one, and then at once.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model is in this process

from questions import N_TOKENS, asked, shown, task_of
from tokprune.eval.models import path_of
from tokprune.integrations.vllm.pruning import Pruner
from vllm import LLM, SamplingParams


def seen_kept(kept):
    """Let the worker tell what it keeps."""
    prune = Pruner.prune

    def told(self, encode, items, numbers):
        found = prune(self, encode, items, numbers)
        kept.extend(k.index.tolist() for k in found)
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


def main(model_name: str, n: int, out: str) -> None:
    arguments = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_logprobs": 64, "seed": 0}
    llm = LLM(path_of(model_name), **arguments, **json.load(sys.stdin))
    kept: list = []
    seen_kept(kept)
    params = SamplingParams(temperature=0, max_tokens=N_TOKENS, logprobs=64)
    samples, singles = shown(model_name, asked(task_of(model_name), n)), []
    requests = [{"prompt": prompt, "multi_modal_data": {"image": images}} for _, images, prompt in samples]
    for (sample, images, _), request in zip(samples, requests, strict=True):
        before = len(kept)
        (answer,) = llm.generate(request, params, use_tqdm=False)
        one = row(sample, answer)
        new = kept[before:]
        one["kept"] = new if len(new) == len(images) else None  # features may come from the encoder cache
        singles.append(one)
    llm.reset_prefix_cache()
    together = [row(s[0], a) for s, a in zip(samples, llm.generate(requests, params, use_tqdm=False), strict=True)]
    with open(out, "w") as file:
        json.dump({"singles": singles, "together": together}, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

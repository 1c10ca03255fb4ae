"""Answers of transformers with `tokprune.attach`, to compare a serving engine with: `reference.py MODEL TASK N OUT`.

Standard input holds a list of settings, each an object of arguments of `attach` with "method", or {} for none. Written
are, for every setting, rows with the tokens of the answer, log-probabilities of the first one, and the kept rows.
"""

from __future__ import annotations

import json
import sys

import torch
from questions import N_TOKENS, asked, frames_of, model_of, salt, shown, task_of
from tokprune.eval.models import path_of
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokprune


def rows(model, processor, samples, attachment):
    for sample, images, clips, prompt in samples:
        frames = [frames_of(clip) for clip in clips]
        inputs = inputs_of(processor, images, frames, prompt)
        if attachment is not None:
            attachment.salts = tuple(salt(shown) for shown in [*images, *(values for values, _ in frames)])
        made = model.generate(
            **inputs, max_new_tokens=N_TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        yield {
            "id": sample.id,
            "ids": made.sequences[0, inputs["input_ids"].shape[1] :].tolist(),
            "logprobs": made.logits[0][0].float().log_softmax(-1).tolist(),
            "kept": None if attachment is None else [kept.tolist() for kept in attachment.kept],
            "right": processor.decode(made.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            .strip()
            .casefold()
            == sample.answer,
        }


def inputs_of(processor, images, frames, prompt):
    given = {"images": images} if images else {}
    if frames:
        videos, metadata = zip(*frames, strict=True)
        given |= {"videos": list(videos), "video_metadata": list(metadata), "do_sample_frames": False}
    inputs = processor(text=prompt, return_tensors="pt", **given)
    inputs.pop("token_type_ids", None)  # vLLM on a CPU lets no token of a picture of Gemma 3 see a later one
    return inputs


def main(model_name: str, n: int, out: str) -> None:
    torch.set_num_threads(1)
    folder = path_of(model_of(model_name))
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    samples, found = shown(model_name, asked(task_of(model_name), n)), []
    for setting in json.load(sys.stdin):
        attachment = tokprune.attach(model, **setting) if setting else None
        found.append(list(rows(model, processor, samples, attachment)))
        if attachment is not None:
            attachment.detach()
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])

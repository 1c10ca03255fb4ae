"""Options that several commands take: spelled and described once, and shown in groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

MODEL, METHODS, QUESTIONS, RUNNING, OUTPUT = "Model", "Methods and budgets", "Questions", "Running", "Output"


def option(group: str, text: str, *names: str, **more: Any) -> Any:
    """An option in a group of a command's help."""
    return typer.Option(*names, help=text, rich_help_panel=group, **more)


Model = Annotated[
    str, option(MODEL, "tiny-llava, tiny-llava-next or tiny-qwen (embedded), a local folder, or a hub id.")
]
DeviceMap = Annotated[
    str | None, option(MODEL, "auto spreads a large model over GPUs, memory and disk (as in transformers).")
]
Dtype = Annotated[str, option(MODEL, "Of the weights. Default: float32 on a CPU, the checkpoint's own on a GPU.")]
Attn = Annotated[str, option(MODEL, "Attention: sdpa, eager or flash_attention_2.")]
Backend = Annotated[
    str, option(RUNNING, "What runs the model: transformers, or vllm (pip install vllm), which starts once a method.")
]
Device = Annotated[str, option(MODEL, "cpu or cuda. Default: the GPU if there is one.")]

Methods = Annotated[
    str,
    option(
        METHODS,
        "Names, specifications or ./file.py:Class, separated by commas; the unpruned model is included.",
        "--methods",
        "--method",
    ),
]
Saved = Annotated[
    list[Path] | None,
    option(METHODS, "A folder that attachment.save() wrote, with its own budget; repeatable.", "--config"),
]
Keep = Annotated[str, option(METHODS, "Fractions of the visual tokens to keep, separated by commas.")]
KeepTokens = Annotated[
    str,
    option(
        METHODS,
        "Or numbers of tokens to keep, separated by commas; llava-1.5 stands for 192,128,64 and llava-next for "
        "640,320,160, as in papers.",
    ),
]

Limit = Annotated[int | None, option(QUESTIONS, "Limit the questions per task, for a quick look.")]
Frames = Annotated[int, option(QUESTIONS, "Frames to take of a video in a folder, evenly spaced.", min=1)]
Suffix = Annotated[str, option(QUESTIONS, "Text added to every question, such as ' Answer with one word.'")]
Metric = Annotated[
    str,
    option(
        QUESTIONS,
        "How answers are graded: exact, normalized, contains, choice, relaxed, vqa, anls, or your own as "
        "file.py:function or module:function. Default: what each question asks for, else exact.",
    ),
]
MaxNewTokens = Annotated[int, option(QUESTIONS, "Maximum length of an answer, in tokens.")]

BatchSize = Annotated[int, option(RUNNING, "Questions per batch.")]
Overwrite = Annotated[bool, option(OUTPUT, "Start over if there is a run already.", "--overwrite")]
Form = Annotated[str, option(OUTPUT, "Print the table as latex, markdown or csv, and nothing else.", "--format")]
Strict = Annotated[
    bool,
    option(OUTPUT, "End with exit code 1 where a method changed no answer or made answers alike (alarms).", "--strict"),
]

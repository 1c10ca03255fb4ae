"""What the first questions of every task become for every embedded model. `python tests/prompt_snapshot.py` writes it.

A prompt that drifts is another benchmark: look at what changed before writing the file anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokprune.integrations.transformers import inputs_of

from tokprune.prune.videos import Clip

SNAPSHOT = Path(__file__).parent / "snapshots" / "prompts.json"
N_SAMPLES = 3


def first_samples(task: Any) -> list[Any]:
    drawn = hasattr(task, "n_scenes")  # of all scenes, the first ones are enough
    return (type(task)(n_scenes=N_SAMPLES) if drawn else task).samples()[:N_SAMPLES]


def of(model: Any, processor: Any, prompt_of: Callable[[str, str], str], task: Any) -> list[dict[str, Any]]:
    """Prompt, its tokens as text without the placeholders, and their number, of a task's first questions."""
    kind, found = kind_of(task), []
    placeholder = model.config.video_token_id if kind == "video" else model.config.image_token_id
    for sample in first_samples(task):
        prompt = prompt_of(sample.question, kind)
        ids = inputs_of(processor, [prompt], [[task.image(sample.image_id)]])["input_ids"][0].tolist()
        found.append(
            {
                "prompt": prompt,
                "text": processor.tokenizer.decode([i for i in ids if i != placeholder]),
                "placeholders": ids.count(placeholder),
            }
        )
    return found


def kind_of(task: Any) -> str:
    """What a task is about: "image" or "video"."""
    return "video" if isinstance(task.image(first_samples(task)[0].image_id), Clip) else "image"


def by_harness(folder: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Of tokprune's own harness, by model and task; of videos, where the model takes them."""
    from tokprune.eval.models import EMBEDDED
    from tokprune.eval.run.runner import Runner
    from tokprune.eval.tasks import TASKS, load_task

    found = {}
    for model in EMBEDDED:
        runner = Runner.load(model)
        tasks = {**{name: load_task(name) for name in TASKS.own_names()}, "folder": load_task(str(folder))}
        takes = ("image", "video") if hasattr(runner.processor, "video_token") else ("image",)
        found[model] = {
            name: of(runner.model, runner.processor, runner.prompt, task)
            for name, task in tasks.items()
            if kind_of(task) in takes
        }
    return found


if __name__ == "__main__":
    import tempfile

    from folders import write_folder

    with tempfile.TemporaryDirectory() as folder:
        SNAPSHOT.write_text(json.dumps(by_harness(write_folder(Path(folder))), indent=1) + "\n")

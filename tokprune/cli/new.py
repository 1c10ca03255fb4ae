"""`tokprune new`: a file to begin with, and a test that passes as it is."""

from __future__ import annotations

import keyword
from pathlib import Path
from string import Template

import tokprune

from ..core.errors import RunError

METHOD = Template('''"""A method of one's own: tokprune explain picture.png --method ./$name.py:$cls"""

from __future__ import annotations

from dataclasses import dataclass

from tokprune.methods.base import ScoreMethod


@dataclass(frozen=True)
class $cls(ScoreMethod):
    """Keep the rows with the largest norm.

    Source:   none yet.

    Args:
        power: of the norm.
    """

    power: float = 2.0

    def score(self, tokens):
        """Features (images, tokens, width) to scores (images, tokens); higher is kept. No loop over images."""
        return tokens.features.float().norm(p=self.power, dim=-1)
''')
METHOD_TEST = Template('''"""pytest test_$name.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import tokprune
import torch
from tokprune.core import grid_layout
from tokprune.prune import Picture

METHOD = f"{Path(__file__).parent / '$name.py'}:$cls"


def pictures(n=3):
    generator = torch.Generator().manual_seed(0)
    return [Picture(torch.randn(64, 32, generator=generator), grid_layout(8, 8)) for _ in range(n)]


@pytest.mark.parametrize("keep", [0.1, 0.5, 1.0])
def test_it_keeps_as_many_as_asked(keep):
    for kept in tokprune.select(pictures(), METHOD, keep_ratio=keep):
        assert len(kept.index) == int(64 * keep + 0.5)


def test_a_batch_keeps_what_its_pictures_keep_alone():
    together = tokprune.select(pictures(), METHOD, keep_ratio=0.25)
    for picture, kept in zip(pictures(), together, strict=True):
        (alone,) = tokprune.select([picture], METHOD, keep_ratio=0.25)
        assert torch.equal(kept.index, alone.index)
''')
TASK = Template('''"""A task of one's own: tokprune compare --task ./$name.py:$cls"""

from __future__ import annotations

from PIL import Image
from tokprune.eval.tasks import Sample


class $cls:
    """What color is a picture?"""

    name = "$name"  # results go by it

    def samples(self):
        """The questions, always in the same order."""
        colors = ("red", "green", "blue")
        return [Sample(c, image_id=c, question="what color is the picture?", answer=c) for c in colors]

    def image(self, image_id):
        """The picture of a question, RGB; or a tokprune.prune.videos.Clip."""
        return Image.new("RGB", (96, 96), image_id)

    def train_samples(self):
        """Questions for the question-only floor, or None."""
        return None
''')
TASK_TEST = Template('''"""pytest test_$name.py"""

from __future__ import annotations

from pathlib import Path

import tokprune
from tokprune.eval.tasks import load_task

TASK = f"{Path(__file__).parent / '$name.py'}:$cls"


def test_questions_are_unique_and_have_pictures():
    task = load_task(TASK)
    samples = task.samples()
    assert len({s.id for s in samples}) == len(samples) > 0
    assert all(task.image(s.image_id).mode == "RGB" for s in samples)


def test_it_can_be_compared_on():
    compared = tokprune.compare("tiny-llava", task=TASK, methods=["uniform"], keep=[0.5])
    assert {row.task for row in compared.rows} == {"$name"}
''')
FAMILY = Template('''"""A model family of one's own: models whose config.model_type is "$name".

A package makes it known in its pyproject.toml; tokprune.attach and every command then take such models:

    [project.entry-points."tokprune.families"]
    $name = "$name:$cls"
"""

from __future__ import annotations

from typing import ClassVar

from tokprune.integrations.transformers.families.base import TowerKind
from tokprune.integrations.transformers.families.llava import Llava


class $cls(Llava):
    """A model like LLaVA: one crop a picture, a projector of two linear layers, one row a patch.

    What differs is overridden; tokprune.integrations.transformers.families.base.ModelFamily says what each part means:

    - the tower, its layers, the projector or the language model lie elsewhere: `tower`, `vision_layers`,
      `attention_module`, `read_layer`, `projector`, `language_model_name`
    - rows of a picture lie otherwise, in crops or with newlines: `layouts`, `pack`, `crops_of`, `crop_patches`
    - several patches become one row: `one_patch_a_row`
    - another projector, or anything else that computes: `shape_of`, which the test compares with torch's flop counter
    """

    model_type = "$name"
    # Functions of the base model that turn pictures into rows, and where the configuration has their placeholder's id.
    encode_functions: ClassVar = {"get_image_features": "image_token_id"}
    # By vision_config.model_type: a name, and whether a [CLS] row comes first.
    towers: ClassVar = {"clip_vision_model": TowerKind("CLIP", True), "siglip_vision_model": TowerKind("SigLIP", False)}
''')
FAMILY_TEST = Template('''"""pytest test_$name.py"""

from __future__ import annotations

from pathlib import Path

import pytest
import tokprune
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE, N_TOKENS = 90, 36  # the placeholder, and rows of a picture


@pytest.fixture(autouse=True)
def installed(tmp_path, monkeypatch):
    """As if a package with the entry point were installed."""
    info = tmp_path / "$name-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: $name\\nVersion: 0.1\\n")
    (info / "entry_points.txt").write_text("[tokprune.families]\\n$name = $name:$cls\\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)


class Config(LlavaConfig):
    """Stands in for the configuration of the model that the family is for."""

    model_type = "$name"


@pytest.fixture
def model():
    """Such a model in small; put the real class and its configuration here."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=3, num_attention_heads=4)
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=48, image_size=24, patch_size=4, **sizes)
    text = LlamaConfig(hidden_size=64, intermediate_size=96, vocab_size=99, pad_token_id=0, **sizes)
    config = Config(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=N_TOKENS)
    model = LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")  # which the flop counter knows on every device
    return model


@pytest.fixture
def inputs():
    """One prompt with one picture."""
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * N_TOKENS, 7, 8, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_it_is_known():
    assert "$name" in tokprune.list_models()


@torch.no_grad()
def test_keeping_all_changes_nothing(model, inputs):
    bare = model(**inputs).logits
    with tokprune.attach(model, "divprune", keep_ratio=1.0):
        torch.testing.assert_close(model(**inputs).logits, bare)


@torch.no_grad()
@pytest.mark.parametrize("method", ["divprune", "vtc_cls"])
def test_an_answer_is_that_of_the_shorter_prompt(method, model, inputs):
    """The kept rows are gathered here by hand."""
    features = model.model.get_image_features(inputs["pixel_values"])
    rows = list(getattr(features, "pooler_output", features))[0].reshape(N_TOKENS, -1)
    with tokprune.attach(model, method, keep_ratio=0.25) as attachment:
        pruned = model(**inputs).logits[0, -1]
        (kept,) = attachment.kept
    assert len(kept) == N_TOKENS // 4
    words = model.get_input_embeddings()(inputs["input_ids"])[0]
    (place,) = torch.where(inputs["input_ids"][0] == IMAGE)
    shorter = torch.cat([words[: place[0]], rows[kept], words[place[-1] + 1 :]])[None]
    states = model.model.language_model(inputs_embeds=shorter).last_hidden_state
    torch.testing.assert_close(pruned, model.lm_head(states[0, -1]), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_ledger_is_what_torch_counts(model, inputs):
    with tokprune.attach(model, "divprune", keep_ratio=0.25) as attachment:
        with FlopCounterMode(display=False) as pruned:
            model(**inputs, logits_to_keep=1)
        report = attachment.report
    with FlopCounterMode(display=False) as bare:
        model(**inputs, logits_to_keep=1)
    assert report.ledger_unpruned.prefill.flops == pytest.approx(bare.get_total_flops(), rel=0.01)
    without_selector = report.ledger.llm + report.ledger.before_llm
    selector = report.ledger.selector.flops
    assert without_selector.flops + selector == pytest.approx(pruned.get_total_flops(), rel=0.02)
''')
KINDS = {"method": (METHOD, METHOD_TEST), "task": (TASK, TASK_TEST), "family": (FAMILY, FAMILY_TEST)}


def write(kind: str, name: str, folder: Path) -> list[Path]:
    """Write the file and its test; what is there is never replaced.

    Args:
        kind: "method", "task" or "family".
        name: of the file, in small letters; its class is named alike.
        folder: where to write.

    Raises:
        RunError: no such kind, a name that Python cannot import or that a family has, or a file that is there already.
    """
    if kind not in KINDS:
        raise RunError(f"invalid kind {kind!r}: use method, task or family")
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise RunError(f"invalid name {name!r}: use small letters, digits and underscores, such as my_{kind}")
    if kind == "family" and name in tokprune.list_models():
        raise RunError(f"there is a model family {name!r} already; use the model_type of your model")
    files = [folder / f"{name}.py", folder / f"test_{name}.py"]
    there = [file for file in files if file.exists()]
    if there:
        raise RunError(f"{there[0]} is there already; use another name")
    cls = "".join(part.capitalize() for part in name.split("_"))
    try:
        for file, template in zip(files, KINDS[kind], strict=True):
            file.write_text(template.substitute(name=name, cls=cls), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {error.filename}: {error.strerror}; use another folder with --folder") from error
    return files

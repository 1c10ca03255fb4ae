"""The same questions asked through vLLM: one engine for each method, which ends before the next one starts.

Tokens and columns of a pruned prompt are counted in what the engine ran. Costs come from the same ledger as those of
transformers; the model is built there without weights, for its configuration, its layouts and its placeholders.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokprune.integrations.transformers import family_of, load_processor
from tokprune.integrations.vllm import (
    FAMILIES,
    KEY,
    Engine,
    Plan,
    conditions_of,
    plan_of,
    quiet,
    refuse_without_vllm,
    release,
)
from transformers import AutoConfig, AutoModelForImageTextToText

from tokprune.core.errors import BudgetError, RunError, TokPruneError, why_unloadable
from tokprune.core.layout import Layout
from tokprune.cost.flops import Ops
from tokprune.prune.saved import is_saved
from tokprune.prune.videos import Clip

from ..models import path_of
from ..tasks import Sample, Task
from .rows import BARE, VLLM, Config, Crops, conditions
from .runner import Asked, Replies, Runner, size_of

INSTEAD = "leave --backend vllm out"


def served_family(config: Any) -> Any:
    """The class of facts about a model that vLLM prunes; None for another model."""
    name = (config.architectures or [""])[0]
    return FAMILIES.load(name) if name in FAMILIES.names() else None


def refuse_uncounted(config: Any) -> None:
    """Raise RunError for a model whose tokens are not counted in what vLLM ran."""
    family = served_family(config)
    if family is not None and not family.counted:
        raise RunError(f"the tokens of {config.architectures[0]} are not counted in prompts of vLLM; {INSTEAD}")


@dataclass
class ServedRunner(Runner):
    """A model that vLLM runs.

    Args:
        path: a local folder or a hub id.
        dtype: of the weights, as vLLM takes it.
    """

    path: str = ""
    dtype: str = "auto"
    backend: ClassVar[str] = VLLM
    _engines: dict[str, Engine] = field(default_factory=dict)  # at most one, by method

    @classmethod
    def load(
        cls,
        path: str,
        device_map: str | None = None,
        dtype: str = "",
        attn: str = "",
        device: str = "",
        **options: Any,
    ) -> ServedRunner:
        """As `Runner.load`; the weights are loaded when the first question is asked.

        Raises:
            RunError: vLLM is not installed, the model cannot be loaded, or an option is one of transformers.
        """
        refuse_without_vllm()
        given = {"--device-map": device_map, "--attn": attn, "--device": device}
        if name := next((name for name, value in given.items() if value), ""):
            raise RunError(f"{name} is an option of transformers, and vLLM decides itself: leave {name} out")
        path = path_of(path)
        try:
            processor = load_processor(path)
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            refuse_uncounted(config)
            gpu = torch.cuda.is_available()
            kind = getattr(torch, dtype or "") if dtype else config.dtype if gpu and config.dtype else torch.float32
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
        except RunError:
            raise
        except Exception as error:  # whatever a broken or foreign checkpoint makes transformers raise
            raise RunError(f"cannot load {path!r}: {why_unloadable(error)}") from error
        processor.tokenizer.padding_side = "left"
        return cls(model, processor, path=path, dtype=dtype or ("auto" if gpu else "float32"), **options)

    def close(self) -> None:
        """End vLLM."""
        while self._engines:
            self._engines.popitem()[1].close()

    # ---- what can be asked

    def plan(self, config: Config) -> Plan:
        """How vLLM prunes under a configuration.

        Raises:
            TokPruneError: it cannot.
        """
        key = self._key(config)
        if key not in self._plans:
            self._plans[key] = plan_of(self.model.config, dict(key))
        return self._plans[key]

    @functools.cached_property
    def _plans(self) -> dict[tuple[tuple[str, Any], ...], Any]:
        return {}

    def _key(self, config: Config) -> tuple[tuple[str, Any], ...]:
        if is_saved(config.method):
            return (("config", str(Path(config.method).resolve())),)
        return (("method", config.method), *config.budget.items())

    def missing(self, configs: Sequence[Config]) -> dict[str, str]:
        """Configurations that vLLM cannot serve for this model, with the reason; nothing is run for it."""
        reasons = {}
        for config in configs:
            try:
                if config.method not in BARE and config.flops_ratio is None:
                    self.plan(config)
            except TokPruneError as error:
                reasons[config.method] = f"{str(error).removeprefix(f'{KEY}: ')}; or {INSTEAD}"
        return reasons

    def out_of_reach(self, task: Task, samples: Sequence[Sample], configs: Sequence[Config]) -> dict[str, str]:
        """Labels of configurations whose budget in FLOPs this model cannot be held to, with the reason."""
        reasons: dict[str, str] = {}
        pictures = {task.image(s.image_id).size: task.image(s.image_id) for s in samples}
        for picture in pictures.values():
            layout = self.layout(self.inputs(["?"], [picture]))
            for config in configs:
                if config.flops_ratio is not None and config.label not in reasons:
                    try:
                        self.plan(config).n_keep(layout)
                    except BudgetError as error:
                        reasons[config.label] = str(error)
        return reasons

    def ordered(self, todo: list[tuple[int, list[Config]]]) -> list[tuple[int, list[Config]]]:
        """Method by method, so that every engine starts once."""
        found = []
        for method in dict.fromkeys(self._engine_of(c) for _, configs in todo for c in configs):
            parts = [(batch, [c for c in configs if self._engine_of(c) == method]) for batch, configs in todo]
            found += [(batch, own) for batch, own in parts if own]
        return found

    # ---- what is asked

    def asked_about(
        self, task: Task, samples: Sequence[Sample], image_ids: Sequence[str], config: Config | None = None
    ) -> Asked:
        """Questions about pictures, with what the processor of transformers makes of them unpruned."""
        pictures = [self.shown(task.image(i), config) for i in image_ids]
        if not self._takes_videos and any(isinstance(picture, Clip) for picture in pictures):
            raise RunError(f"{task.name} is about videos, which are not pruned in vLLM for this model; {INSTEAD}")
        asked = super().asked_about(task, samples, image_ids, config)
        return replace(asked, inputs=pictures)

    @functools.cached_property
    def _takes_videos(self) -> bool:
        family = served_family(self.model.config)
        return family is not None and "video" in family.modalities

    def replies(self, samples: Sequence[Sample], config: Config, asked: Asked) -> Replies:
        """What vLLM answers to a batch, and the tokens that it ran."""
        pictures, bare, engine = asked.inputs, config.method in BARE, self._engine(config)
        budget = None if bare or is_saved(config.method) else config.budget
        kinds = ["video" if isinstance(picture, Clip) else "image" for picture in pictures]
        prompts = [self.prompt(s.question, kind) for s, kind in zip(samples, kinds, strict=True)]
        found = engine.answer(prompts, pictures, budget, self.max_new_tokens)
        n_kept = [int(self.placeholders(torch.tensor(reply.prompt_ids)).sum()) for reply in found]
        begun, first = min(r.scheduled_s for r in found), max(r.first_s for r in found)
        steps = max(len(r.token_ids) for r in found) - 1
        return Replies(
            tokens=[reply.token_ids for reply in found],
            stopped=[reply.stopped for reply in found],
            n_kept=n_kept,
            n_mean=n_kept,
            columns=[[len(reply.prompt_ids)] for reply in found],
            spent=[Ops()] * len(found) if bare else self._spent(config, samples, pictures),
            prefill_s=first - begun,
            decode_s_per_token=(max(r.last_s for r in found) - first) / steps if steps else None,
            peak_bytes=None,
        )

    def _spent(self, config: Config, samples: Sequence[Sample], pictures: Sequence[Any]) -> list[Ops]:
        plan, family = self.plan(config), family_of(self.model)
        layouts = [self._layout_of(s, picture) for s, picture in zip(samples, pictures, strict=True)]
        return [plan.spent(layout, family.shape, family.crop_patches(layout)) for layout in layouts]

    def _layout_of(self, sample: Sample, picture: Any) -> Layout:
        size = size_of(picture)
        if size not in self._layouts:
            self._layouts[size] = self.layout(self._processed([sample], [picture]))
        return self._layouts[size]

    @functools.cached_property
    def _layouts(self) -> dict[tuple[int, ...], Layout]:
        return {}

    def _engine_of(self, config: Config) -> str:
        """Which engine answers: one without our key, or one of a method."""
        return "" if config.method in BARE else config.method

    def _engine(self, config: Config) -> Engine:
        name = self._engine_of(config)
        if name not in self._engines:
            self.close()
            with quiet():
                self._engines[name] = Engine(self.path, dict(self._key(config)) if name else None, self.dtype)
        return self._engines[name]

    # ---- the model without weights

    @property
    def device(self) -> torch.device:
        """Where inputs are counted."""
        return torch.device("cpu")

    def layout(self, inputs: Any) -> Layout:
        """Where the rows of a picture or video lie, from the shapes of what its encoder would be given."""
        family, pixels = family_of(self.model), {k: v for k, v in inputs.items() if k in _PIXELS}
        features: list[Any] = []
        if "video_grid_thw" in pixels:
            (layout,) = family.layouts("get_video_features", pixels, features)
            return layout
        if "image_grid_thw" not in pixels:  # says it without the tower
            given = {**pixels, "pixel_values": pixels["pixel_values"].to("meta")}
            features = family.encode("get_image_features", **given)
        (layout,) = family.layouts("get_image_features", pixels, features)
        return layout

    def _crops_of(self, inputs: Any) -> Crops:
        layout = self.layout(inputs)
        return Crops(layout.n_crops, family_of(self.model).crop_patches(layout))

    def conditions(self) -> dict[str, Any]:
        """As those of transformers, with the device of vLLM and its own attention."""
        return conditions(self.model) | {"attn_implementation": f"vLLM {release()}", **conditions_of()}

    def fingerprint(self) -> str:
        """A checksum of the heads of the weight files, or the revision of a hub id."""
        files = sorted(Path(self.path).glob("*.safetensors"))
        if not files:
            return str(getattr(self.model.config, "_commit_hash", None))
        total = 0
        for file in files:
            with file.open("rb") as head:
                total = zlib.crc32(f"{file.name} {file.stat().st_size}".encode() + head.read(1 << 20), total)
        return f"{total:08x}"


_PIXELS = ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw", "video_grid_thw")

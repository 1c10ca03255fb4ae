"""Runs a model over samples under several configurations, batch by batch, one JSONL row a sample.

All configurations answer a batch before the next batch is prepared: pictures are processed once, and times
are compared on the same inputs minutes, not hours, apart.
"""

from __future__ import annotations

import difflib
import functools
import os
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar

import torch
from PIL import Image
from tokprune.integrations.transformers import family_of, inputs_of, load_processor, shape_from_config
from transformers import AutoModelForImageTextToText

import tokprune
from tokprune.core.budget import Budget
from tokprune.core.errors import BudgetError, MissingSignalError, RunError, UnsupportedModelError, why_unloadable
from tokprune.cost.flops import Ops, Shape
from tokprune.prune.videos import Clip

from ..models import DEFAULT, EMBEDDED, path_of
from ..tasks import Sample, Task
from ..tasks.base import EXACT
from ..tasks.grading import AS_ASKED, Grading
from .controls import Seen, Size, smaller
from .rows import BARE, FRAMES, LESS, TRANSFORMERS, BatchTime, Config, Costs, Crops, SampleRow, conditions
from .stopwatch import Stopwatch

EMBEDDED_MODEL = Path(path_of(DEFAULT))


@dataclass
class Runner:
    """A model with its processor, ready to answer.

    Args:
        model: any model that `tokprune.attach` takes.
        processor: its processor.
        max_new_tokens: where an answer is cut.
        suffix: added to every question, such as " Answer with a single word or phrase."
        grading: how answers are graded.
    """

    model: torch.nn.Module
    processor: Any
    max_new_tokens: int = 8
    suffix: str = ""
    grading: Grading = AS_ASKED
    backend: ClassVar[str] = TRANSFORMERS

    @classmethod
    def load(
        cls,
        path: str,
        device_map: str | None = None,
        dtype: str = "",
        attn: str = "",
        device: str = "",
        **options: Any,
    ) -> Runner:
        """An embedded model by its name, or from a local folder or a hub id.

        It goes to this process' GPU where there is one; with `device_map`, such as "auto", over all that there is. Code
        that a folder or a hub id brings along is never run.

        Args:
            path: the name, the folder or the hub id.
            device_map: as in transformers.
            dtype: of the weights; empty for float32 on a CPU and the checkpoint's own on a GPU.
            attn: attention implementation; empty for transformers' choice.
            device: "cpu" or "cuda"; empty for the GPU if there is one.
            **options: fields of this class.

        Raises:
            RunError: it cannot be loaded.
        """
        gpu, path = _on_gpu(device), path_of(path)
        placed = {} if device_map is None else {"device_map": device_map}
        placed |= {"attn_implementation": attn} if attn else {}
        try:
            processor = load_processor(path)
            model = AutoModelForImageTextToText.from_pretrained(
                path, trust_remote_code=False, dtype=dtype or ("auto" if gpu else torch.float32), **placed
            )
        except Exception as error:  # whatever a broken or foreign checkpoint makes transformers raise
            near = difflib.get_close_matches(path, EMBEDDED, n=1)
            hint = f"Did you mean {near[0]!r}? " if near else ""
            raise RunError(
                f"cannot load {path!r}: {why_unloadable(error)} {hint}Type {' or '.join(EMBEDDED)} (embedded), "
                f"a local folder, or a hub id of: {', '.join(tokprune.list_models())}"
            ) from error
        processor.tokenizer.padding_side = "left"
        if device_map is None:
            model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu")
        return cls(model.eval(), processor, **options)

    def missing(self, configs: Sequence[Config]) -> dict[str, str]:
        """Configurations that this model cannot run, with the reason; nothing is run for it.

        Raises:
            TokPruneError: a reason that no other model would mend, such as an option that does not exist.
        """
        reasons = {}
        for config in configs:
            if config.method in BARE:
                continue
            try:
                tokprune.attach(self.model, config.method, **config.budget).detach()
            except MissingSignalError as error:
                reasons[config.method] = str(error)
        return reasons

    def out_of_reach(self, task: Task, samples: Sequence[Sample], configs: Sequence[Config]) -> dict[str, str]:
        """Labels of configurations whose budget in FLOPs this model cannot be held to, with the reason.

        What is in reach depends on the layout of a picture, so one of every size is tried.
        """
        pictures = {s.image_id: s for s in samples}
        sizes = {size_of(task.image(image_id)): sample for image_id, sample in pictures.items()}
        reasons: dict[str, str] = {}
        for sample in sizes.values():
            inputs = self.prepare(task, [sample], [sample.image_id])
            for config in configs:
                if config.flops_ratio is not None and config.label not in reasons:
                    try:
                        self.answer(inputs, config, (0,), max_new_tokens=1)
                    except BudgetError as error:
                        reasons[config.label] = str(error)
        return reasons

    def text_tokens(self, samples: Sequence[Sample]) -> int:
        """Median number of prompt tokens beside the picture."""
        prompts = [self.prompt(s.question) for s in samples]
        ids = self.processor.tokenizer(prompts)["input_ids"]
        return round(median(int((~self.placeholders(torch.tensor(row))).sum()) for row in ids))

    def prompt(self, question: str, visual: str = "image") -> str:
        """The question in the processor's chat template, or in LLaVA 1.5's where there is none.

        Args:
            question: without placeholder.
            visual: "image" or "video".

        Raises:
            RunError: it holds a placeholder of its own.
        """
        question += self.suffix
        if "<image>" in question:
            raise RunError(f"leave <image> out of the question {question!r}; the prompt puts it in place")
        if getattr(self.processor, "chat_template", None):
            content = [{"type": visual}, {"type": "text", "text": question}]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        return f"USER: <image>\n{question} ASSISTANT:"

    def prepare(self, task: Task, samples: Sequence[Sample], image_ids: Sequence[str]) -> dict[str, torch.Tensor]:
        """Left-padded inputs on the model's device."""
        return self._processed(samples, [task.image(i) for i in image_ids])

    def _processed(self, samples: Sequence[Sample], pictures: Sequence[Image.Image | Clip]) -> dict[str, torch.Tensor]:
        return self.inputs([s.question for s in samples], pictures)

    def inputs(self, questions: Sequence[str], pictures: Sequence[Image.Image | Clip]) -> dict[str, torch.Tensor]:
        """Left-padded inputs on the model's device: questions, each about its picture or video."""
        pairs = zip(questions, pictures, strict=True)
        text = [self.prompt(q, "video" if isinstance(p, Clip) else "image") for q, p in pairs]
        return inputs_of(self.processor, text, [[p] for p in pictures]).to(self.device, self.model.dtype)

    @property
    def device(self) -> torch.device:
        """Where inputs go; weights of a model spread by `device_map` may lie elsewhere between passes."""
        hook = getattr(self.model.get_input_embeddings(), "_hf_hook", None)
        placed = getattr(hook, "execution_device", None)
        return self.model.device if placed is None else torch.device(placed)

    @functools.cached_property
    def shape(self) -> Shape | None:
        """The model as the ledger sees it; None where its cost is not known."""
        try:
            return shape_from_config(self.model.config)
        except UnsupportedModelError:
            return None

    def conditions(self) -> dict[str, Any]:
        """Where and with what it answers; the columns of a row that describe it."""
        return conditions(self.model)

    def ordered(self, todo: list[tuple[int, list[Config]]]) -> list[tuple[int, list[Config]]]:
        """Batches with their configurations, in the order in which they are best asked."""
        return todo

    def close(self) -> None:
        """Free what is not this process' own."""

    def fingerprint(self) -> str:
        """A checksum of the weights' names, shapes and some of their values: tells checkpoints apart."""
        total = 0
        for name, weight in _weights(self.model):
            head = weight.flatten()[:256].float().cpu().numpy().tobytes()
            total = zlib.crc32(f"{name} {tuple(weight.shape)}".encode() + head, total)
        return f"{total:08x}"

    def prompt_fingerprint(self) -> str:
        """A checksum of the prompt and of the processor's settings."""
        return f"{zlib.crc32((self.prompt('?') + self.processor.to_json_string()).encode()):08x}"

    @torch.no_grad()
    def answer(
        self, inputs, config: Config, salts: Sequence[int], max_new_tokens: int | None = None
    ) -> tuple[torch.Tensor, Any, Stopwatch]:
        """New tokens, the report (None for the bare model), and the times."""
        n_new = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        bare = config.method in BARE
        with nullcontext() if bare else tokprune.attach(self.model, config.method, **config.budget) as attachment:
            if attachment is not None:
                attachment.salts = list(salts)
            with Stopwatch(self.model) as watch:
                out = self.model.generate(**inputs, max_new_tokens=n_new, do_sample=False)
            report = None if attachment is None else attachment.report
        return out[:, inputs["input_ids"].shape[1] :], report, watch

    def rows(
        self,
        task: Task,
        samples: Sequence[Sample],
        config: Config,
        asked: Asked,
        whole: Asked,
        batch: int = 0,
    ) -> tuple[list[SampleRow], BatchTime]:
        """One row a sample of a batch, and its times; what pruning saves is counted from `whole`."""
        found = self.replies(samples, config, asked)
        texts = [t.strip() for t in self.processor.batch_decode(found.tokens, skip_special_tokens=True)]
        values = [self.grading.value(s, text) for s, text in zip(samples, texts, strict=True)]
        rows = [
            SampleRow(
                task=task.name,
                config=config.label,
                batch=batch,
                method=config.method,
                keep_ratio=config.keep_ratio,
                flops_ratio=config.flops_ratio,
                keep_tokens=config.keep_tokens,
                sample=s.id,
                kind=s.kind,
                expected=s.expected,
                answer=text,
                right=self.grading.is_right(value),
                words_right=s.begins_right(text),
                stopped=found.stopped[i],
                n_visual_before=whole.n_visual[i],
                n_visual_after=found.n_kept[i],
                n_visual_mean=found.n_mean[i],
                llm_columns_before=whole.columns[i],
                llm_columns_after=found.columns[i][-1],
                costs=self._costs((whole, asked), i, (whole.columns[i], found.columns[i]), found.spent[i]),
                value=None if self.grading.name_of(s) == EXACT else value,
                metric=self.grading.name_of(s),
                question=s.question,
                backend=self.backend,
            )
            for i, (s, text, value) in enumerate(zip(samples, texts, values, strict=True))
        ]
        times = found.prefill_s, found.decode_s_per_token, found.peak_bytes
        return rows, BatchTime(task.name, config.label, batch, len(rows), *times)

    def replies(self, samples: Sequence[Sample], config: Config, asked: Asked) -> Replies:
        """What the model answers to a batch, and what its language model saw."""
        salts = [zlib.crc32(s.id.encode()) for s in samples]
        tokens, report, watch = self.answer(asked.inputs, config, salts)
        after = (report.prefills[0].rows if report else None) or asked.columns
        counted = report.encoded if report and self.shape else []
        encoded, stops = report.encoded if report else [], _stop_ids(self.model)
        return Replies(
            tokens=tokens.tolist(),
            stopped=[bool(set(row) & stops) for row in tokens.tolist()],
            n_kept=[i.n_kept + i.n_special_kept for i in encoded] if report else asked.n_visual,
            n_mean=[mean(i.placeholders_by_layer(self.n_layers)) for i in encoded] if report else asked.n_visual,
            columns=report.row_layers(0, after) if report else [[n] for n in after],
            spent=[i.spent_before_llm(self.shape) for i in counted] or [Ops()] * len(samples),
            prefill_s=watch.prefill_s,
            decode_s_per_token=watch.decode_s / (tokens.shape[1] - 1) if tokens.shape[1] > 1 else None,
            peak_bytes=watch.peak_bytes,
        )

    def _costs(self, asked: tuple[Asked, Asked], i: int, columns: tuple[int, list[int]], spent: Ops) -> Costs:
        if len(columns[1]) == 1:  # the bare model: the same in every layer
            columns = columns[0], columns[1] * self.n_layers
        if not all(a.crops for a in asked):
            return Costs()
        before, after = (a.crops[i] for a in asked)
        return Costs.of(self.shape, columns, spent, self.model.dtype.itemsize, (before, after))

    def asked_about(
        self, task: Task, samples: Sequence[Sample], image_ids: Sequence[str], config: Config | None = None
    ) -> Asked:
        """Prepared questions about pictures, or about what a control shows of them."""
        pictures = [self.shown(task.image(i), config) for i in image_ids]
        inputs = self._processed(samples, pictures)
        columns = inputs["attention_mask"].sum(1).tolist()
        n_visual = self.placeholders(inputs["input_ids"]).sum(1).tolist()
        if not self._known:
            return Asked(inputs, columns, n_visual, [])
        # Pictures of one size with equally many tokens are cut into equal crops: the model is asked once for each kind.
        kinds = [(n, size_of(picture)) for n, picture in zip(n_visual, pictures, strict=True)]
        for sample, picture, kind in zip(samples, pictures, kinds, strict=True):
            if kind not in self._crops:
                self._crops[kind] = self._crops_of(self._processed([sample], [picture]))
        return Asked(inputs, columns, n_visual, [self._crops[kind] for kind in kinds])

    def shown(self, picture: Image.Image | Clip, config: Config | None) -> Image.Image | Clip:
        """The picture or video, or what a control shows of it; without a budget half the height and width."""
        if config is None or config.method not in LESS:
            return picture
        if not config.budget:
            return picture.resize(tuple(max(1, round(side / 2)) for side in picture.size), Image.Resampling.BICUBIC)
        n_visual = self.seen(picture, picture.size).n_visual
        wanted = Budget(**config.budget).n_keep(n_visual)
        if isinstance(picture, Clip) and config.method == FRAMES:
            return picture.some_frames(wanted / n_visual)
        key = (size_of(picture), wanted)
        if key not in self._smaller:
            self._smaller[key] = smaller(picture.size, wanted, functools.partial(self.seen, picture))
        return picture.resize(self._smaller[key], Image.Resampling.BICUBIC)

    def seen(self, picture: Image.Image | Clip, size: Size) -> Seen:
        """What the processor makes of a picture or video of another size, whatever it shows."""
        n_frames = len(picture.frames) if isinstance(picture, Clip) else 0
        if (size, n_frames) not in self._seen:
            blank = Image.new("RGB", size)
            inputs = self.inputs(["?"], [Clip((blank,) * n_frames) if n_frames else blank])
            pixels = next(value for name, value in inputs.items() if name.startswith("pixel_values"))
            # A step of time is two frames of a Qwen, also where it is given a picture.
            shown = n_frames or (getattr(self.processor.image_processor, "temporal_patch_size", 1))
            n_visual = int(self.placeholders(inputs["input_ids"]).sum())
            self._seen[size, n_frames] = Seen(n_visual, pixels.numel() // 3 // shown)
        return self._seen[size, n_frames]

    @functools.cached_property
    def _seen(self) -> dict[tuple[Size, int], Seen]:
        return {}

    @functools.cached_property
    def _smaller(self) -> dict[tuple[tuple[int, ...], int], Size]:
        return {}

    @torch.no_grad()
    def _crops_of(self, inputs) -> Crops:
        """Crops of the picture of one row, asked of the model itself; also the first run, which is always slow."""
        with tokprune.attach(self.model, "uniform", keep_ratio=1) as attachment:
            self.model(**inputs, logits_to_keep=1)
            (image,) = attachment.report.encoded
            return Crops(image.layout.n_crops, image.n_patches)

    def placeholders(self, ids: torch.Tensor) -> torch.Tensor:
        """Which ids stand for visual tokens, bool."""
        return family_of(self.model).is_placeholder(ids) if self._known else ids == self.model.config.image_token_id

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    @functools.cached_property
    def _known(self) -> bool:
        """Whether the model can be attached to; otherwise its crops are unknown."""
        return self.model.config.model_type in tokprune.list_models()

    @functools.cached_property
    def _crops(self) -> dict[tuple, Crops]:
        return {}

    def run(
        self,
        task: Task,
        samples: Sequence[Sample],
        configs: Sequence[Config],
        batch_size: int = 32,
    ) -> Iterator[tuple[Config, list[SampleRow], BatchTime]]:
        """Rows and times of all configurations on all samples, as they come."""
        parts = [list(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size)]
        yield from self.run_batches(task, parts, batches(len(parts), configs))

    def run_batches(
        self, task: Task, parts: Sequence[Sequence[Sample]], todo: Iterable[tuple[int, list[Config]]]
    ) -> Iterator[tuple[Config, list[SampleRow], BatchTime]]:
        """Rows and times of batches, by their numbers among `parts`, under the configurations of each."""
        samples = [s for part in parts for s in part]
        others = dict(zip((s.id for s in samples), _other_pictures(samples), strict=True))
        for batch, open_ in todo:
            part = parts[batch]
            ids = [s.image_id for s in part]
            whole = self.asked_about(task, part, ids)
            for config in open_:
                if config.shuffled:
                    other = self.asked_about(task, part, [others[s.id] for s in part])
                    yield config, *self.rows(task, part, config, other, other, batch)
                else:
                    seen = self.asked_about(task, part, ids, config) if config.method in LESS else whole
                    yield config, *self.rows(task, part, config, seen, whole, batch)


def batches(n: int, configs: Sequence[Config], done: Container[tuple[str, int]] = ()) -> list[tuple[int, list[Config]]]:
    """Numbers of n batches with the configurations that have not answered them; (label, batch) in `done` have."""
    found = []
    for batch in range(n):
        turn = batch % len(configs)  # no configuration is always first
        open_ = [c for c in [*configs[turn:], *configs[:turn]] if (c.label, batch) not in done]
        if open_:
            found.append((batch, open_))
    return found


def _on_gpu(device: str) -> bool:
    """Whether a model goes to a GPU.

    Raises:
        RunError: no such device here.
    """
    if device not in ("", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise RunError(f"invalid --device {device!r}: use cpu" + (" or cuda" if torch.cuda.is_available() else ""))
    return torch.cuda.is_available() and device != "cpu"


@dataclass
class Replies:
    """Answers to a batch, one entry a question.

    Args:
        tokens: that are new.
        stopped: whether the stop token came.
        n_kept, n_mean: placeholders left in the last decoder layer, and their mean over the layers.
        columns: of the prompt by decoder layer; one number where it is the same in all.
        spent: what selecting computed, less what tower and projector were spared.
        prefill_s, decode_s_per_token, peak_bytes: as in `BatchTime`.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    n_kept: Sequence[int]
    n_mean: Sequence[float]
    columns: list[list[int]]
    spent: list[Ops]
    prefill_s: float
    decode_s_per_token: float | None
    peak_bytes: int | None


@dataclass
class Asked:
    """Prepared questions: columns and placeholders of every row, and the crops of its picture, where known."""

    inputs: Any
    columns: list[int]
    n_visual: list[int]
    crops: list[Crops]


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights, fetched one module at a time where they are offloaded."""
    if not any(p.is_meta for p in model.parameters()):
        yield from model.state_dict().items()
        return
    from accelerate.utils import align_module_device

    kept = set(model.state_dict())
    for prefix, module in model.named_modules():
        with align_module_device(module):
            own = (*module.named_parameters(prefix, recurse=False), *module.named_buffers(prefix, recurse=False))
            yield from ((name, weight.detach()) for name, weight in own if name in kept)


def _stop_ids(model: torch.nn.Module) -> set[int]:
    stop = model.generation_config.eos_token_id
    return set(stop) if isinstance(stop, list) else {stop}


def size_of(picture: Image.Image | Clip) -> tuple[int, ...]:
    """Width and height, and of a video the number of frames."""
    return (*picture.size, len(picture.frames)) if isinstance(picture, Clip) else picture.size


def _other_pictures(samples: Sequence[Sample]) -> list[str]:
    """For every sample the picture of the sample half the list further on; a neighbour where it is the same."""
    ids = [s.image_id for s in samples]
    n = len(ids)
    others = []
    for i in range(n):
        steps = (ids[(i + n // 2 + k) % n] for k in range(n))
        others.append(next((other for other in steps if other != ids[i]), ids[i]))
    return others

"""The model `tokprune` of lmms-eval: a Hugging Face model, pruned while it answers."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tokprune.integrations.transformers import as_cache, cache_of, inputs_of, load_processor
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

import tokprune
from tokprune.core.errors import RunError, TokPruneError, why_unloadable
from tokprune.prune.videos import Clip

from .options import Options, Until, cut, generation, merged, split_arguments
from .prompts import Visual, pictures, prompt
from .record import Recorder, Stopwatch, conditions, seen, world


@dataclass(frozen=True)
class Request:
    """One document as a task asks about it.

    Args:
        key: task, split and number of the document.
        text: the task's text.
        images: its pictures and videos.
        is_padding: whether it only pads a rank, so that its answer is not used.
    """

    key: tuple[str, str, int]
    text: str
    images: list[Visual]
    is_padding: bool = False

    @property
    def kinds(self) -> list[str]:
        """For each visual "image" or "video"."""
        return ["video" if isinstance(v, Clip) else "image" for v in self.images]

    @property
    def salts(self) -> list[int]:
        """One per picture for seeded methods, the same in every batch and on every rank."""
        return [zlib.crc32("/".join(map(str, self.key)).encode()) + i for i in range(len(self.images))]


class Loss(GenerationResult, tuple):
    """The pair (loss, whether greedy decoding gives it), in a type that lmms-eval 0.7 does not turn into text."""

    def __init__(self, pair: tuple[float, bool]):
        super().__init__(text=tuple(pair))  # type: ignore[arg-type]


class TokPrune(lmms):
    """A model from `pretrained`, with the method and budget of `options.Options`.

    Args:
        **given: the fields of `Options`, as values or as texts.

    Raises:
        TokPruneError: an invalid argument, a model that cannot be loaded, or a method that it cannot run.
    """

    is_simple = True

    def __init__(self, **given: Any):
        super().__init__()
        self.options = options = Options.of(given)
        self._rank, local, self._world_size = world()
        self._device = torch.device(_device(options.device, local))
        self.recorder = Recorder(options.record, self._rank, self._world_size) if options.record else None
        self.processor, self._model = self._loaded()
        self.system = _text_or_file(options.system_prompt)
        with self._attached():  # fails before any data set is loaded if the model cannot run the method
            pass

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> TokPrune:
        """From `--model_args` and lmms-eval's own flags.

        Raises:
            SystemExit: with a one-line message. lmms-eval exits with 0 after any other error.
        """
        try:
            return cls(**merged(split_arguments(arg_string), additional_config or {}))
        except TokPruneError as error:
            raise SystemExit(f"tokprune: {error}") from error

    def _loaded(self) -> tuple[Any, torch.nn.Module]:
        options, on_gpu = self.options, self._device.type == "cuda"
        name, more = options.pretrained, {}
        if options.revision:
            more["revision"] = options.revision
        loading = {**more, "dtype": options.dtype or ("auto" if on_gpu else "float32")}
        loading |= {"device_map": options.device_map} if options.device_map else {}
        loading |= {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
        try:
            processor = load_processor(name, **more)
            model = AutoModelForImageTextToText.from_pretrained(name, trust_remote_code=False, **loading).eval()
        except Exception as error:  # whatever a broken or foreign checkpoint makes transformers raise
            raise RunError(
                f"cannot load pretrained={name}: {why_unloadable(error)} Use pretrained=FOLDER, or a hub id of: "
                f"{', '.join(tokprune.list_models())}"
            ) from error
        processor.tokenizer.padding_side = "left"
        if processor.tokenizer.pad_token_id is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        if not options.device_map:
            model.to(self._device)
        return processor, model

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self._model.device if hasattr(self, "_model") else self._device

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    def prompt(self, text: str, kinds: Sequence[str]) -> str:
        """The prompt for a task's text and its visuals, each "image" or "video"."""
        return prompt(self.processor, text + self.options.suffix, kinds, self.system)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers in the order of the requests; those of one task and one kind of generation share batches."""
        groups: dict[tuple, list[int]] = {}
        for i, instance in enumerate(requests):
            kind = json.dumps(instance.args[1], sort_keys=True, default=str)
            groups.setdefault((*instance.args[4:6], kind), []).append(i)
        answers = [""] * len(requests)
        with self._attached() as attachment, self._progress(len(requests)) as bar:
            for members in groups.values():
                for start in range(0, len(members), self.batch_size):
                    part = members[start : start + self.batch_size]
                    batch = [self._request(requests[i], requests[i].args[2]) for i in part]
                    texts = self._answered(batch, requests[part[0]].args[1], attachment)
                    for i, text in zip(part, texts, strict=True):
                        answers[i] = text
                    bar.update(len(part))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The mean negative log-likelihood of a continuation by token, and whether greedy decoding gives it.

        It is the loss, not its negative, as in lmms-eval's own models: its multiple choice takes the lowest. The prompt
        runs first, and tokens are selected then; the continuation uses its KV cache. So a method that looks at the end
        of the prompt never sees the answer.

        Raises:
            RunError: a request without a document (acc_mutual_info).
        """
        found = []
        with self._attached() as attachment, self._progress(len(requests)) as bar:
            for instance in requests:
                if len(instance.args) != 6:
                    raise RunError("acc_mutual_info needs answers without a picture; use the metric acc instead")
                own = self._request(instance, instance.args[2])
                found.append(Loss(self._judged(own, instance.args[1], attachment)))
                bar.update(1)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "several rounds are not supported; leave out tasks with output_type generate_until_multi_round"
        )

    @contextlib.contextmanager
    def _attached(self) -> Iterator[Any]:
        """The attachment, or None for the bare model. With `record` a bare model keeps all tokens, to count them."""
        options = self.options
        if not options.is_bare:
            with tokprune.attach(self.model, options.method, **options.attach) as attachment:
                yield attachment
        elif self.recorder and self.model.config.model_type in tokprune.list_models():
            with tokprune.attach(self.model, "uniform", keep_ratio=1) as attachment:
                yield attachment
        else:
            yield None

    def _progress(self, total: int) -> Any:
        return logging.tqdm(total=total, disable=self.rank != 0, desc="Model Responding")

    def _request(self, instance: Instance, doc_to_visual: Any) -> Request:
        text, doc_id, task, split = instance.args[0], *instance.args[3:6]
        images = pictures(doc_to_visual(self.task_dict[task][split][doc_id]), task, self.options.frames)
        return Request((task, split, doc_id), text, images, bool(instance.metadata.get("__padding_only__")))

    def _inputs(self, batch: Sequence[Request]) -> Any:
        """Left-padded."""
        text = [self.prompt(r.text, r.kinds) for r in batch]
        return inputs_of(self.processor, text, [r.images for r in batch]).to(self.device, self.model.dtype)

    @torch.no_grad()
    def _answered(self, batch: Sequence[Request], wanted: dict[str, Any], attachment: Any) -> list[str]:
        eos = self.tokenizer.eos_token or ""
        arguments, stops = generation(wanted, self.options.max_new_tokens, eos)
        inputs = self._inputs(batch)
        n_prompt = inputs["input_ids"].shape[1]
        if stops:
            arguments["stopping_criteria"] = [Until(stops, self.tokenizer, n_prompt)]
        self._salt(attachment, batch)
        with Stopwatch(self.model) as watch:
            out = self.model.generate(**inputs, **arguments, pad_token_id=self.tokenizer.pad_token_id)
        new = out[:, n_prompt:]
        watch.n_new = new.shape[1]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        answers = [cut(text, stops).strip() for text in texts]
        ended = [bool(set(row) & self._stop_ids) for row in new.tolist()]
        ended = [end or cut(text, stops) != text for end, text in zip(ended, texts, strict=True)]
        said = [{"request": "generate_until", "answer": a, "stopped": e} for a, e in zip(answers, ended, strict=True)]
        self._record(batch, said, inputs, attachment, watch)
        return answers

    @torch.no_grad()
    def _judged(self, request: Request, target: Any, attachment: Any) -> tuple[float, bool]:
        if callable(target):
            task, split, doc_id = request.key
            target = str(target(self.task_dict[task][split][doc_id]))
        inputs, wanted = self._inputs([request]), self._continuation(request, target)
        self._salt(attachment, [request])
        with Stopwatch(self.model) as watch:
            first = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits = [first.logits[:, -1:]]
        if wanted.shape[1] > 1:
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(wanted[:, 1:])], 1)
            rest = self.model(input_ids=wanted[:, :-1], attention_mask=mask, **as_cache(self.model, cache_of(first)))
            logits.append(rest.logits)
        chances = torch.cat(logits, 1).float().log_softmax(-1)[0]
        loss = -chances.gather(1, wanted[0, :, None]).mean().item()
        greedy = bool((chances.argmax(-1) == wanted[0]).all())
        said = {"request": "loglikelihood", "answer": target.strip(), "stopped": None, "loss": loss, "greedy": greedy}
        self._record([request], [said], inputs, attachment, watch)
        return loss, greedy

    def _continuation(self, request: Request, target: str) -> torch.Tensor:
        """Token ids of an answer as they follow the prompt, (1, T).

        Raises:
            RunError: the answer is empty.
        """
        asked = self.prompt(request.text, request.kinds)
        head = self.tokenizer(asked)["input_ids"]
        whole = self.tokenizer(asked + target)["input_ids"]
        joined = whole[: len(head)] == head
        ids = whole[len(head) :] if joined else self.tokenizer(target, add_special_tokens=False)["input_ids"]
        if not ids:
            raise RunError(f"an answer of the task {request.key[0]} is empty: {target!r}")
        return torch.tensor([ids], device=self.device)

    @property
    def _stop_ids(self) -> set[int]:
        stop = self.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop}

    def _salt(self, attachment: Any, batch: Sequence[Request]) -> None:
        if attachment is not None:
            attachment.salts = [salt for request in batch for salt in request.salts] or [0]

    def _record(self, batch: Sequence[Request], said: list[dict], inputs: Any, attachment: Any, watch: Any) -> None:
        if self.recorder is None:
            return
        n_images = [len(r.images) for r in batch]
        rows = seen(inputs, n_images, self.model, attachment.report if attachment else None)
        names = [dict(zip(("task", "split", "doc_id"), r.key, strict=True)) for r in batch]
        lines = [{**name, **answer} for name, answer in zip(names, said, strict=True)]
        shared = {
            **conditions(self.model, attachment.positions if attachment else "auto"),
            "world_size": self.world_size,
        }
        own = [i for i, r in enumerate(batch) if not r.is_padding]
        self.recorder.add([lines[i] for i in own], [rows[i] for i in own], watch, shared)


def _device(asked: str | None, local_rank: int) -> str:
    """The device of this process: `asked`, or its own GPU, or the CPU.

    Raises:
        RunError: a GPU was requested and there is none.
    """
    there = torch.cuda.is_available()
    if asked is None:
        return f"cuda:{local_rank}" if there else "cpu"
    if asked.startswith("cuda") and not there:
        raise RunError(f"device={asked}, but torch finds no GPU; use --device cpu, or leave it out")
    return f"cuda:{local_rank}" if asked == "cuda" else asked


def _text_or_file(text: str) -> str:
    """A system prompt, or the content of the file of that name."""
    try:
        is_file = bool(text) and Path(text).is_file()
    except OSError:  # too long for a name
        is_file = False
    return Path(text).read_text(encoding="utf-8").strip() if is_file else text

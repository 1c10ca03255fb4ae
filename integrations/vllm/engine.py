"""A model in vLLM that answers batches of prompts, with one method or none: what evaluations ask."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokprune.core.errors import RunError
from tokprune.prune.videos import Clip

from .compat import end_engine, release, why_not
from .options import KEY


@dataclass
class Reply:
    """What vLLM says of one prompt.

    Args:
        prompt_ids: tokens of the prompt as the engine ran it: placeholders that were cut are not there.
        token_ids: of the answer, with the stop token.
        stopped: whether the stop token ended it.
        scheduled_s, first_s, last_s: on the engine's clock, when its prefill began, and its first and last token came.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    stopped: bool
    scheduled_s: float
    first_s: float
    last_s: float


class Engine:
    """A running vLLM; it ends with `close`.

    Nothing is cached between prompts: every picture is encoded for every question, as transformers does.

    Args:
        model: a local folder or a hub id.
        given: the value of our key; None for vLLM's own model.
        dtype: of the weights, as vLLM takes it.
        **options: more arguments of `vllm.LLM`.

    Raises:
        RunError: vLLM is not installed, is a release that is not tested, or does not start.
    """

    def __init__(self, model: str, given: Mapping[str, Any] | None = None, dtype: str = "auto", **options: Any):
        refuse_without_vllm()
        from vllm import LLM

        fixed = {"enforce_eager": True, "max_model_len": -1, "limit_mm_per_prompt": {"image": 1, "video": 1}, "seed": 0}
        uncached = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
        key = {} if given is None else {"mm_processor_kwargs": {KEY: dict(given)}}
        options = {**fixed, **uncached, "disable_log_stats": False, **key, **options}
        try:
            self._llm = LLM(model, dtype=dtype, **options)
        except Exception as error:  # whatever a model or a machine makes vLLM raise
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(f"vLLM cannot run {model!r}: {said[-1].strip()}; its log above says why") from error

    def answer(
        self, prompts: Sequence[str], pictures: Sequence[Any], budget: Mapping[str, Any] | None, n_new: int
    ) -> list[Reply]:
        """Answers to prompts, each about one picture or video, all at once.

        Args:
            prompts: with a placeholder each.
            pictures: PIL images, or clips.
            budget: instead of the engine's own, such as {"keep_ratio": 0.5}; None for the engine's own.
            n_new: tokens at which an answer is cut.
        """
        from vllm import SamplingParams

        asked = [
            {"prompt": prompt, "multi_modal_data": _media(picture)}
            for prompt, picture in zip(prompts, pictures, strict=True)
        ]
        told = {} if not budget else {"mm_processor_kwargs": {KEY: dict(budget)}}
        greedy = SamplingParams(temperature=0, max_tokens=n_new)
        return [_reply(out) for out in self._llm.generate(asked, greedy, use_tqdm=False, **told)]

    def close(self) -> None:
        """End its processes and free its memory; a second call does nothing."""
        llm, self._llm = self._llm, None
        if llm is not None:
            end_engine(llm)


def refuse_without_vllm() -> None:
    """Raise RunError where there is no vLLM, or one that was not tested."""
    if why := why_not(release()):
        raise RunError(why)


@contextlib.contextmanager
def quiet(level: str = "ERROR") -> Any:
    """Let vLLM's own log, also that of its processes, say no more than this; a level that a user has set stays."""
    before = os.environ.get("VLLM_LOGGING_LEVEL")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)
    try:
        yield
    finally:
        if before is None:
            del os.environ["VLLM_LOGGING_LEVEL"]


def conditions_of() -> dict[str, Any]:
    """The device that vLLM runs on, where it is a GPU."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike():
        return {}
    name = current_platform.get_device_name()
    return {"device": name, "gpu": name}


def _media(picture: Any) -> dict[str, Any]:
    if not isinstance(picture, Clip):
        return {"image": picture}
    n = len(picture.frames)  # frames were chosen when they were read
    told = {"fps": picture.fps, "total_num_frames": n, "frames_indices": list(range(n)), "do_sample_frames": False}
    return {"video": [(np.stack([np.asarray(frame) for frame in picture.frames]), told)]}


def _reply(out: Any) -> Reply:
    answer, times = out.outputs[0], out.metrics
    return Reply(
        list(out.prompt_token_ids),
        list(answer.token_ids),
        answer.finish_reason == "stop",
        times.scheduled_ts,
        times.first_token_ts,
        times.last_token_ts,
    )

"""A video whose steps last less than a second gets one time for all of them (Qwen2.5-VL with --video-pruning-rate)."""

from types import SimpleNamespace

import torch
from vllm.model_executor.models import qwen2_5_vl

SECONDS, STEPS, SIDE = 0.5, 6, 4  # 4 frames a second: a step of 2 frames lasts half a second


def times() -> list[int]:
    """Of every step, as they are sent with the rows of a video that keeps half."""
    model = SimpleNamespace(
        visual=SimpleNamespace(spatial_merge_size=2),
        config=SimpleNamespace(vision_config=SimpleNamespace(tokens_per_second=4)),
        video_pruning_rate=0.5,
    )
    shown = {"video_grid_thw": torch.tensor([[STEPS, SIDE, SIDE]]), "second_per_grid_ts": torch.tensor([SECONDS])}
    rows = torch.randn(STEPS * SIDE * SIDE // 4, 8, generator=torch.Generator().manual_seed(0))
    (found,) = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration._postprocess_video_embeds_evs(model, (rows,), shown)
    return sorted(set(found[:, -4].int().tolist()))


if __name__ == "__main__":
    found, right = times(), [int(step * SECONDS * 4) for step in range(STEPS)]
    verdict = "ok" if set(found) <= set(right) and len(found) > 1 else f"WRONG, should be among {right}"
    print(f"times of {STEPS} steps of {SECONDS} s: {found}: {verdict}")

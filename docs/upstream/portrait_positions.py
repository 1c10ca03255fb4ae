"""Text behind a portrait picture gets positions that the picture already has (Qwen2.5-VL with pruning on)."""

import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

START, IMAGE, TEXT, MERGE = 1, 2, 3, 2


def positions_of(rows: int, columns: int) -> tuple[int, int]:
    """The largest position of a picture, and the first one of the text behind it."""
    media = compute_mrope_for_media([1, rows * MERGE, columns * MERGE], MERGE).T
    n = rows * columns
    ids = torch.tensor([START, *[IMAGE] * n, TEXT, TEXT])
    given = torch.arange(len(ids)).expand(3, -1).clone()
    found, _ = recompute_mrope_positions(ids, [media], given, 0, START, IMAGE, 4)
    return int(found[:, 1 : 1 + n].max()), int(found[0, 1 + n])


if __name__ == "__main__":
    for rows, columns in ((2, 6), (6, 2)):
        last, text = positions_of(rows, columns)
        right = last + 1
        verdict = "ok" if text == right else f"WRONG, should be {right}"
        print(f"{rows} x {columns}: picture up to {last}, text from {text}: {verdict}")

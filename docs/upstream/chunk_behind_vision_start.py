"""A prefill chunk that ends right behind <|vision_start|> takes the positions of another picture, or fails."""

import torch
from vllm.multimodal.video_prune.evs import compute_mrope_for_media, recompute_mrope_positions

START, IMAGE, TEXT, VIDEO, SIDE = 1, 2, 3, 4, 2


def run(n_pictures: int, picture: int) -> str:
    """Give the rows of one picture where the chunk before ended with its <|vision_start|>."""
    n = SIDE * SIDE
    ids = torch.tensor([TEXT, TEXT, *[START, *[IMAGE] * n, TEXT] * n_pictures])
    start = 2 + picture * (n + 2)
    media = compute_mrope_for_media([1, 2 * SIDE, 2 * SIDE], 2).T
    before = torch.arange(len(ids)).expand(3, -1).clone()
    try:
        after, _ = recompute_mrope_positions(ids, [media], before.clone(), start + 1, START, IMAGE, VIDEO)
    except IndexError as error:
        return f"IndexError: {error}"
    changed = (after != before).any(0).nonzero()[:, 0].tolist()
    return f"its rows are columns {start + 1} to {start + n}; written were columns {changed[0]} and later"


if __name__ == "__main__":
    print("one picture: ", run(1, 0))
    print("two pictures:", run(2, 0))

"""easy-VQA: the public data set of Victor Zhou (2019, MIT), from the PyPI package `easy-vqa`, with its own split."""

from __future__ import annotations

import functools

from PIL import Image

from tokprune.prune.pictures import open_picture

from .base import Sample


def kind_of(answer: str) -> str:
    """The stratum of a question, from its answer: yes/no, shape or colour."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"


class EasyVQA:
    """The task: 9,673 test questions on 1,000 pictures of one shape each, 64 x 64."""

    name = "easyvqa"
    calibration_split = "train"  # what settings are found on; the package has no other

    def __init__(self, split: str = "test"):
        self.split = split

    def samples(self) -> list[Sample]:
        """All questions of the split, in the order of the package."""
        return _samples(self.split)

    def train_samples(self) -> list[Sample]:
        return _samples("train")

    def image(self, image_id: str) -> Image.Image:
        return open_picture(_paths(self.split)[int(image_id)])


@functools.lru_cache(maxsize=2)
def _samples(split: str) -> list[Sample]:
    import easy_vqa

    read = easy_vqa.get_test_questions if split == "test" else easy_vqa.get_train_questions
    return [
        Sample(f"{split}-{i}", str(image), question, answer, kind_of(answer))
        for i, (question, answer, image) in enumerate(zip(*read(), strict=True))
    ]


@functools.lru_cache(maxsize=2)
def _paths(split: str) -> dict[int, str]:
    import easy_vqa

    return easy_vqa.get_test_image_paths() if split == "test" else easy_vqa.get_train_image_paths()

"""Two servers with different --mm-processor-kwargs give a picture the same hash."""

from types import SimpleNamespace

from PIL import Image
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.multimodal.processing.inputs import ProcessorInputs


def hash_on(options: dict) -> str:
    """The hash of a red picture on a server with these options, for a request without its own."""
    config = SimpleNamespace(mm_hasher_algorithm="sha256", mm_processor_kwargs=options)
    info = SimpleNamespace(model_id="model", ctx=SimpleNamespace(get_mm_config=lambda: config))
    picture = MultiModalDataItems({"image": ImageProcessorItems([Image.new("RGB", (8, 8), "red")])})
    inputs = ProcessorInputs([1, 2, 3], picture)
    return BaseMultiModalProcessor._get_mm_hashes(SimpleNamespace(info=info), inputs)["image"][0]


if __name__ == "__main__":
    one, other = hash_on({"num_crops": 4}), hash_on({"num_crops": 16})
    print("the same hash: WRONG" if one == other else "different hashes: ok")

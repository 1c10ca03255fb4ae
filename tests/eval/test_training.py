"""The training script: labels are true, and what is trained is what is used."""

from __future__ import annotations

import numpy as np
import torch
from tokprune.eval.models.training import language, recipe, tower
from tokprune.eval.tasks import findit


def test_patch_labels_show_the_shapes():
    _, shapes = findit.draw("train", 3)
    whole, patches = tower.scene_labels(shapes)
    kind, colour, centre = patches
    assert int(centre.sum()) == len(shapes)
    for s in shapes:
        place = int(s.y // 8) * 12 + int(s.x // 8)
        assert centre[place]
        assert tower.SHAPES[kind[place]] == s.kind
        assert tower.COLOURS[colour[place]] == s.colour
    pairs = {(s.kind, s.colour) for s in shapes}
    assert int(whole[:30].sum()) == len(pairs)
    assert int(whole[30:35].sum()) == len({k for k, _ in pairs})


def test_easyvqa_labels_follow_from_the_answers():
    questions = [
        ("is there a red shape?", "no", ""),
        ("is there not a circle in the image?", "yes", ""),
        ("does the image contain a teal shape?", "yes", ""),
        ("what shape is in the image?", "triangle", ""),
    ]
    shape, colour = tower.easyvqa_label(questions)
    assert (recipe.EASYVQA_SHAPES[shape], recipe.EASYVQA_COLOURS[colour]) == ("triangle", "teal")
    assert tower.easyvqa_label(questions[:2]) == (-100, -100)


def test_every_word_of_both_tasks_is_known():
    for split in ("train", "test"):
        for s in findit.FindIt(split, n_scenes=300).samples():
            language.encode(f"{s.question} {s.answer}")
    for asked in tower.easyvqa_questions():
        for question, answer, _ in asked:
            language.encode(f"{question} {answer}")


@torch.no_grad()
def test_packed_questions_equal_single_prompts():
    """What the packed, masked row computes is what `generate` will compute for each question alone."""
    torch.manual_seed(0)
    model = recipe.build_model().eval()
    trainer = language.LanguageTrainer(model)
    questions = [[("what color is the ring?", "red", "colour"), ("where is the red ring?", "top left", "position")]]
    x = torch.randn(1, recipe.N_VISUAL, 128)
    text = language.pack(questions)
    for contiguous in (False, True):
        kept = torch.arange(0, recipe.N_VISUAL, 5)[None]
        packed = trainer(x, kept, contiguous, text)
        single = []
        for question, answer, _ in questions[0]:
            ids = language.encode(question) + [recipe.ASSISTANT] + language.encode(answer)
            words = model.get_input_embeddings()(torch.tensor([[recipe.BOS, recipe.USER, *ids]]))
            visual = model.model.multi_modal_projector(x)[:, kept[0]]
            embeds = torch.cat([words[:, :2], visual, words[:, 2:]], 1)
            n = embeds.shape[1]
            positions = torch.arange(n) if contiguous else torch.arange(2 + recipe.N_VISUAL + len(ids))
            if not contiguous:
                positions = torch.cat([positions[:2], kept[0] + 2, positions[2 + recipe.N_VISUAL :]])
            out = model.model.language_model(
                inputs_embeds=embeds, position_ids=positions[None], attention_mask=torch.ones(1, n), use_cache=False
            )
            n_answer = len(language.encode(answer)) + 1  # and the stop token
            single.append(model.lm_head(out.last_hidden_state)[0, -n_answer:])
        torch.testing.assert_close(packed, torch.cat(single), rtol=1e-4, atol=1e-5)


def test_dropped_subsets_are_ascending_and_favour_no_size():
    rng, sizes, contiguous = np.random.default_rng(0), set(), 0
    torch.manual_seed(0)
    for _ in range(200):
        kept, renumbered = language.draw_kept(rng, torch.randn(2, recipe.N_VISUAL, 8), drops=True)
        assert (kept.diff(dim=1) > 0).all()
        sizes.add(kept.shape[1])
        contiguous += renumbered
    assert {0, recipe.N_VISUAL} <= sizes
    assert len(sizes) > 40
    assert 40 < contiguous < 110
    kept, renumbered = language.draw_kept(rng, torch.randn(2, recipe.N_VISUAL, 8), drops=False)
    assert (kept.shape[1], renumbered) == (recipe.N_VISUAL, False)


def test_processor_pictures_are_the_trained_ones():
    """The exported image processor makes of a picture what training made of it."""
    from PIL import Image

    image, _ = findit.draw("train", 0)
    trained = tower.pixels(image[None])
    processed = recipe.build_processor().image_processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, trained, rtol=1e-4, atol=1e-4)


def test_first_weights_suit_the_width():
    """With deviations of 1 / sqrt(fan-in) a layer keeps the scale of its input; with 0.02 attention starts uniform."""
    torch.manual_seed(0)
    trainer = language.LanguageTrainer(recipe.build_model())
    language.initialise(trainer)
    layer = trainer.language_model.layers[0]
    x = torch.randn(64, 160)
    assert 0.9 < float(layer.self_attn.q_proj(x).std()) < 1.1
    assert 0.9 < float(layer.mlp.down_proj(torch.randn(64, 432)).std()) < 1.1
    assert 0.14 < float(trainer.language_model.embed_tokens.weight.std()) < 0.16

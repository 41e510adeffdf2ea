"""The fast forward against clip's own, and the precision it runs in."""

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, gradients, grown, make_batch, relative, tiny_model

import indofashion_clip as ic

PIXELS = make_batch(6).pixels
TITLES = ["saree", "a very long title " * 12, "", "blue silk saree", "men's kurta", "word " * 99]


def test_the_forward_equals_clips_own_and_so_does_every_gradient():
    model, tokens, found = grown(tiny_model()), clip.tokenize(TITLES, truncate=True), []
    plain = model.encode_image((PIXELS / 255 - model.mean) / model.std), model.encode_text(tokens)
    plain = [F.normalize(features, dim=-1) for features in plain]
    images = ic.encode_images(model, torch.float32, PIXELS)
    for features in (plain, (images, ic.encode_texts(model, torch.float32, tokens))):
        model.zero_grad()
        ic.clip_loss(*features, model.logit_scale).backward()
        found.append(gradients(model) | {"images": features[0], "texts": features[1]})
    assert found[0].keys() == found[1].keys() > dict(model.named_parameters()).keys()
    assert max(relative(found[1][name], found[0][name]) for name in found[0]) <= 1e-5


def test_the_gradients_are_the_same_to_the_bit_each_time():
    """With enough tokens for two threads: plain indexing would add up gradients in any order."""
    model, runs, threads = grown(tiny_model()), [], torch.get_num_threads()
    torch.set_num_threads(2)
    tokens = clip.tokenize([f"Navy Blue Silk Saree Number {i}" for i in range(120)])
    for _ in range(3):
        model.zero_grad()
        ic.encode_texts(model, torch.float32, tokens)[:, 0].sum().backward()
        runs.append(gradients(model))
    torch.set_num_threads(threads)
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in runs[0])


def test_autocast_stays_near_float32_and_features_are_float32():
    model, tokens = tiny_model(), clip.tokenize(TITLES, truncate=True)
    for encode, inputs in ((ic.encode_images, PIXELS), (ic.encode_texts, tokens)):
        exact, rough = (encode(model, dtype, inputs) for dtype in (torch.float32, torch.bfloat16))
        assert rough.dtype == torch.float32 and 0 < relative(rough, exact) < 0.02
        assert torch.allclose(rough.norm(dim=-1), torch.ones(6))


@pytest.mark.parametrize("amx, avx", [(True, False), (False, True), (False, False)])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, amx, avx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert ic.choose_precision(CPU) == (torch.bfloat16 if amx or avx else torch.float32)

"""Loading each kind of weights, and the fast forward against clip's own."""

import os
from unittest.mock import Mock
from urllib.error import URLError

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, gradients, grown, make_batch, relative, tiny_model

import indofashion_clip as ic

PIXELS = make_batch(6).pixels
TITLES = ["saree", "a very long title " * 12, "", "blue silk saree", "men's kurta", "word " * 99]


def plain_images(model):
    return F.normalize(model.encode_image((PIXELS / 255 - model.mean) / model.std), dim=-1)


# ---- The forward ----
def test_the_forward_equals_clips_own_and_so_does_every_gradient():
    model, tokens, found = grown(tiny_model()), clip.tokenize(TITLES, truncate=True), []
    plain = plain_images(model), F.normalize(model.encode_text(tokens), dim=-1)
    images = ic.encode_images(model, torch.float32, PIXELS)
    for features in (plain, (images, ic.encode_texts(model, torch.float32, tokens))):
        model.zero_grad()
        ic.clip_loss(*features, model.logit_scale).backward()
        found.append(gradients(model) | {"images": features[0], "texts": features[1]})
    assert found[0].keys() == found[1].keys() > dict(model.named_parameters()).keys()
    assert max(relative(found[1][name], found[0][name]) for name in found[0]) <= 1e-5


def test_the_gradients_are_the_same_to_the_bit_each_time():
    """With enough tokens for two threads: adding them up by indexing would not be."""
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


# ---- Weights ----
def tiny_resnet():
    torch.manual_seed(0)
    return clip.model.CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)


def save_archive(model, path):
    """A traced CLIP saved as a TorchScript archive, with the three numbers that OpenAI's have."""
    del model.mean, model.std
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.rand(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int32))
    torch.jit.trace(model, inputs, check_trace=False).save(path)


def save_dict(model, path):
    torch.save(model.state_dict(), path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "new, save",
    [(tiny_model, save_archive), (tiny_model, save_dict), (tiny_resnet, save_dict)],
)
def test_weights_are_loaded_not_rounded_and_clip_reads_the_same_file(tmp_path, new, save):
    model, path = grown(new()), str(tmp_path / "clip.pt")
    save(grown(new()), path)
    loaded, (by_clip, preprocess) = ic.load_clip(path), clip.load(path, device="cpu")
    weights = model.state_dict()
    assert not loaded.training and loaded.state_dict().keys() == weights.keys()
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name])
    assert loaded.visual.input_resolution == preprocess.transforms[0].size == 64
    tokens = clip.tokenize(["a saree", "men's kurta"])
    assert relative(by_clip.encode_text(tokens), model.encode_text(tokens)) < 5e-3
    assert relative(by_clip.encode_image(PIXELS / 255), model.encode_image(PIXELS / 255)) < 5e-3
    assert relative(ic.encode_images(loaded, torch.float32, PIXELS), plain_images(loaded)) < 1e-5


def test_a_name_is_loaded_by_clip(monkeypatch):
    models = {"RN50": tiny_model().half()}
    monkeypatch.setattr(clip, "load", lambda name, device: (models[name], None))
    assert {p.dtype for p in ic.load_clip("RN50").parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["no.pt", "cut.pt", "empty.pt", "foreign.pt", ".", "RN50"])
def test_weights_that_cannot_be_had_are_one_clear_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    torch.save(tiny_model().state_dict(), "cut.pt")
    os.truncate("cut.pt", 100_000)
    torch.save({"layer.weight": torch.ones(3)}, "foreign.pt")
    (tmp_path / "empty.pt").touch()
    monkeypatch.setattr(clip, "load", Mock(side_effect=URLError("no\ninternet")))
    with pytest.raises(SystemExit, match=f"MODEL.*{name}.*internet.*ViT-B/32") as stop:
        ic.load_clip(name)
    assert "\n" not in str(stop.value)


# ---- Precision ----
@pytest.mark.parametrize("amx, avx", [(True, False), (False, True), (False, False)])
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, amx, avx):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert ic.choose_precision(CPU) == (torch.bfloat16 if amx or avx else torch.float32)

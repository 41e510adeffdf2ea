"""Loading each kind of weights, and the fast forward against clip's own."""

import urllib.error
import warnings

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model

import indofashion_clip as ic

CPU = torch.device("cpu")


def grown(model):
    """The same model away from its initial values, where biases and norms would hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.5)
    return model.eval()


def relative(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_forward_equals_clips_own_and_so_does_every_gradient():
    model = grown(tiny_model())
    torch.manual_seed(2)
    images, ids = torch.rand(6, 3, 64, 64), torch.arange(6)
    tokens, _ = ic.tokenize(
        ["saree", "a very long title " * 12, "red", "blue silk saree", "men's kurta", "word " * 99]
    )

    def loss(image_features, text_features):
        return ic.clip_loss(image_features, text_features, model.logit_scale, ids)

    plain = loss(
        F.normalize(model.encode_image((images - model.mean) / model.std), dim=-1),
        F.normalize(model.encode_text(tokens), dim=-1),
    )
    expected = gradients(model, plain)
    fast = loss(
        ic.encode_images(model, images, torch.float32), ic.encode_captions(model, tokens, torch.float32)
    )
    found = gradients(model, fast)
    assert abs(fast.item() - plain.item()) <= 1e-5 * plain.item()
    assert max(relative(found[name], expected[name]) for name in expected) <= 1e-5


def test_an_rn_model_keeps_working_by_its_own_image_tower():
    torch.manual_seed(0)
    model = clip.model.CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1).eval()
    model.register_buffer("mean", torch.zeros(3, 1, 1), persistent=False)
    model.register_buffer("std", torch.ones(3, 1, 1), persistent=False)
    images = torch.rand(3, 3, 64, 64)
    expected = F.normalize(model.encode_image(images), dim=-1)
    assert torch.equal(ic.encode_images(model, images, torch.float32), expected)


def test_the_gradients_are_the_same_to_the_bit_each_time():
    """On a CPU, with enough tokens for several threads: adding them up by indexing would not be."""
    model = grown(tiny_model())
    tokens, _ = ic.tokenize([f"Navy Blue Silk Saree Number {i}" for i in range(120)])
    first, *others = (
        gradients(model, ic.encode_captions(model, tokens, torch.float32)[:, 0].sum()) for _ in range(6)
    )
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_autocast_stays_near_float32_and_features_are_float32():
    model = tiny_model()
    images = torch.rand(4, 3, 64, 64)
    exact, rough = (ic.encode_images(model, images, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.float32 and 0 < relative(rough, exact) < 0.02
    assert torch.allclose(rough.norm(dim=-1), torch.ones(4))


def save_archive(model, path):
    """A traced CLIP saved as a TorchScript archive, with the three numbers that OpenAI's have."""
    del model.mean, model.std
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            model, (torch.rand(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int32)), check_trace=False
        )
        torch.jit.save(traced, path)


def test_weights_from_a_torchscript_archive(tmp_path):
    model = tiny_model()
    expected = {name: w.clone() for name, w in model.state_dict().items()}
    save_archive(model, str(tmp_path / "clip.pt"))
    loaded = ic.load_clip(str(tmp_path / "clip.pt"), CPU)
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(w, expected[name]) for name, w in loaded.state_dict().items())


def test_weights_from_a_state_dict_are_not_rounded(tmp_path):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "best.pt")
    loaded = ic.load_clip(str(tmp_path / "best.pt"), CPU)
    assert not loaded.training
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, model.state_dict()[name])


def test_clip_load_reads_the_same_file(tmp_path):
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "best.pt")
    images, tokens = torch.rand(4, 3, 64, 64), clip.tokenize(["a saree", "men's kurta"])
    by_clip, preprocess = clip.load(str(tmp_path / "best.pt"), device="cpu")
    assert preprocess.transforms[0].size == 64
    assert relative(by_clip.encode_image(images), model.encode_image(images)) < 2e-3
    assert relative(by_clip.encode_text(tokens), model.encode_text(tokens)) < 2e-3
    by_clip.load_state_dict(torch.load(tmp_path / "best.pt", weights_only=True))
    assert torch.equal(by_clip.encode_image(images), model.encode_image(images))
    assert torch.equal(by_clip.encode_text(tokens), model.encode_text(tokens))


def test_a_name_is_loaded_by_clip(monkeypatch):
    model = tiny_model().half()
    monkeypatch.setattr(clip, "load", lambda name, device: (model, None) if name == "RN50" else 1 / 0)
    loaded = ic.load_clip("RN50", CPU)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "name, make, words",
    [
        ("no/such.pt", None, "no such file"),
        ("ViT-Z/99", None, "ViT-B/32"),
        ("cut.pt", lambda whole: whole[: len(whole) // 2], "cannot load"),
        ("empty.pt", lambda whole: b"", "cannot load"),
        ("text.pt", lambda whole: b"<html>404</html>", "cannot load"),
    ],
)
def test_weights_that_cannot_be_had_are_one_clear_line(tmp_path, name, make, words):
    torch.save(tiny_model().state_dict(), tmp_path / "whole.pt")
    path = name
    if make:
        path = str(tmp_path / name)
        (tmp_path / name).write_bytes(make((tmp_path / "whole.pt").read_bytes()))
    with pytest.raises(ic.Stop, match="MODEL") as stop:
        ic.load_clip(path, CPU)
    assert words in str(stop.value) and "\n" not in str(stop.value)


def test_foreign_weights_are_one_clear_line(tmp_path):
    torch.save({"layer.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(ic.Stop, match="MODEL"):
        ic.load_clip(str(tmp_path / "other.pt"), CPU)


def test_a_download_that_fails_is_one_clear_line(monkeypatch):
    def fail(name, device):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(clip, "load", fail)
    with pytest.raises(ic.Stop, match="MODEL.*ViT-B/32.*internet"):
        ic.load_clip("ViT-B/32", CPU)


@pytest.mark.parametrize("native, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_precision_on_a_gpu_never_trusts_emulation(monkeypatch, native, expected):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
    )
    assert ic.choose_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    "amx, avx, expected",
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32)],
)
def test_precision_on_a_cpu_follows_its_instructions(monkeypatch, amx, avx, expected):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert ic.choose_precision(CPU) == expected

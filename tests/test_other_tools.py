"""best.pt in clip, open_clip and transformers, by the README's lines: the features are this script's."""

from types import SimpleNamespace

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from test_model import grown
from test_readme import code

import indofashion_clip as ic

FILES = sorted((ROOT / "data/sample/images/test").iterdir())[:3]
TITLES = ["Navy Blue Silk Saree", "a photo of a men's kurta", "Mojari " * 100]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """(the folder with outputs/best.pt of a ViT-B/32, this script's image_features and text_features)."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "outputs").mkdir()
    torch.manual_seed(0)
    model = grown(clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)).eval()
    ic.save_best(SimpleNamespace(model=model, best=folder / "outputs/best.pt"))
    ic.add_normalisation(model)
    with torch.no_grad():
        images = ic.to_images(torch.stack([ic.load_image(file, 224) for file in FILES]), "cpu")
        image_features = ic.encode_images(model, images, torch.float32)
        text_features = ic.encode_captions(model, ic.tokenize(TITLES)[0], torch.float32)
    return folder, image_features, text_features


def run_lines(heading, folder, monkeypatch):
    """The variables that the README's lines leave."""
    monkeypatch.chdir(folder)
    variables = {}
    exec(code(heading), variables)
    return variables


def assert_equal(expected, image_features, text_features):
    for ours, theirs in zip(expected[1:], (image_features, text_features)):
        theirs = F.normalize(theirs.float(), dim=-1)
        assert ((theirs - ours).norm(dim=-1) / ours.norm(dim=-1)).max() < 1e-4
        assert (ours[0] - ours[1]).norm() > 0.01  # the features tell the inputs apart


def pictures(preprocess):
    return torch.stack([preprocess(Image.open(file).convert("RGB")) for file in FILES])


@torch.no_grad()
def test_clip(expected, monkeypatch):
    lines = run_lines("### clip", expected[0], monkeypatch)
    model, tokens = lines["model"], clip.tokenize(TITLES, truncate=True)
    assert_equal(expected, model.encode_image(pictures(lines["preprocess"])), model.encode_text(tokens))


@torch.no_grad()
def test_open_clip(expected, monkeypatch):
    lines = run_lines("### open_clip", expected[0], monkeypatch)
    model, tokens = lines["model"].eval(), lines["tokenizer"](TITLES)
    assert_equal(expected, model.encode_image(pictures(lines["preprocess"])), model.encode_text(tokens))


@torch.no_grad()
def test_transformers(expected, monkeypatch):
    lines = run_lines("### transformers", expected[0], monkeypatch)
    _, preprocess = clip.load(str(expected[0] / "outputs/best.pt"), device="cpu")
    tokens = clip.tokenize(TITLES, truncate=True)
    output = lines["model"](input_ids=tokens, pixel_values=pictures(preprocess))
    assert_equal(expected, output.image_embeds, output.text_embeds)

"""The metrics against counting by hand."""

import math
from unittest.mock import Mock

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_state, weights

import indofashion_clip as ic

CLASSES = ["blouse", "gowns", "saree", "t_shirt"]


def make_data(pixels, captions):
    """Rows of all classes but the first."""
    rows = enumerate(captions)
    records = [ic.Record(i + 1, i, "x", text, CLASSES[1 + i % 3], True) for i, text in rows]
    return ic.FashionDataset(records, pixels, CLASSES)


DATA = make_data(make_batch(24).pixels, [f"title {i % 17}" for i in range(24)])


def look(_model, _precision, pixels):
    return F.normalize(pixels[:, :, 0, :4].flatten(1).float() - 128, dim=-1)


def read(_model, _precision, tokens):
    return F.normalize(torch.sin(tokens.float() @ torch.arange(77 * 12.0).view(77, 12)), dim=-1)


@pytest.fixture
def encoders(monkeypatch):
    """Instead of CLIP, which untrained takes all pictures for one class: as good as random."""
    monkeypatch.setattr(ic, "encode_images", look)
    monkeypatch.setattr(ic, "encode_texts", read)


def recall(similarity, right, k):
    """The share of queries with a right answer among the k most similar, one query at a time."""
    found = (sorted(range(len(row)), key=lambda i: -row[i])[:k] for row in similarity.tolist())
    hits = [not answers.isdisjoint(near) for answers, near in zip(right, found, strict=True)]
    return pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("rows, captions", [(50, 17), (3, 2), (1, 1), (1100, 1050)])
def test_recall_is_as_counted_by_hand(rows, captions):
    torch.manual_seed(rows)
    images, texts = (F.normalize(torch.randn(n, 8), dim=-1) for n in (rows, captions))
    ids = torch.cat([torch.arange(captions), torch.randint(captions, (rows - captions,))])
    owners = [set((ids == caption).nonzero().flatten().tolist()) for caption in range(captions)]
    found = ic.retrieval_recall(images, texts, ids)
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == recall(
            images @ texts.T, [{i} for i in ids.tolist()], k
        )
        assert found[f"text_to_image_r{k}"] == recall(texts @ images.T, owners, k)


def test_the_metrics_are_as_counted_by_hand(encoders):
    state, labels, ids = make_state(batch_size=24, chunk=7), DATA.labels.tolist(), DATA.caption_ids
    metrics, confusion, images, texts = ic.evaluate(state, DATA)
    assert torch.equal(images, look(0, 0, DATA.pixels))
    assert torch.equal(texts, read(0, 0, clip.tokenize([f"title {i}" for i in range(17)])))
    prompts = [read(0, 0, clip.tokenize(ic.class_prompts(label))).mean(0) for label in CLASSES]
    guesses = (images @ F.normalize(torch.stack(prompts), dim=-1).T).argmax(1).tolist()
    pairs = list(zip(labels, guesses, strict=True))
    assert confusion.tolist() == [[pairs.count((i, j)) for j in range(4)] for i in range(4)]
    right = [pairs.count((i, i)) for i in range(4)]
    f1 = [2 * right[i] / (labels.count(i) + guesses.count(i)) for i in (1, 2, 3)]  # that have rows
    loss = ic.clip_loss(images, texts[ids], state.model.logit_scale).item()
    found = {"loss": loss, "accuracy": sum(right) / 24, "macro_f1": sum(f1) / 3}
    found |= ic.retrieval_recall(images, texts, ids)
    assert 0 in guesses and found == pytest.approx({name: metrics[name] for name in found})


def test_the_loss_is_the_mean_over_rows_in_batches_of_training_size(encoders):
    alike = make_data(make_batch(1).pixels.expand(10, -1, -1, -1), ["one title"] * 10)
    loss = ic.evaluate(make_state(batch_size=4), alike)[0]["loss"]
    assert loss == pytest.approx((8 * math.log(4) + 2 * math.log(2)) / 10)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_signal_between_batches_ends_it_saved(encoders, tmp_path, monkeypatch, epoch):
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))
    monkeypatch.setattr(ic, "NUM_EPOCHS", 1)
    monkeypatch.setattr(ic, "encode_images", spy := Mock(wraps=look))
    alike = make_data(torch.zeros(600, 3, 64, 64, dtype=torch.uint8), ["one title"] * 600)
    with pytest.raises(SystemExit) as stop:
        ic.evaluate(make_state(chunk=999, signals=[15], epoch=epoch), alike)
    assert stop.value.code == 143 and spy.call_count == 1
    saved = tmp_path / "last.pt"  # not after training: other weights are evaluated then
    assert weights(saved)["epoch"] == 1 if epoch == 1 else not saved.exists()


def test_the_best_line_is_the_first_of_equals():
    names = ("accuracy", "image_to_text_r5", "text_to_image_r5")
    lines = [dict.fromkeys(names, score) | {"loss": 9 - score} for score in (0.1, 0.5, 0.5, 0.4)]
    assert ic.best_line(lines) is lines[1] and ic.best_line(lines[::-1]) is lines[2]

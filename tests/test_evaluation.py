"""The metrics against counting by hand."""

import math
from unittest.mock import Mock

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_state, toy_dataset, weights

import indofashion_clip as ic

CLASSES = ["blouse", "gowns", "saree", "t shirt"]


def make_data(pixels, captions):
    """Images of all classes but the first."""
    labels = [CLASSES[1 + i % 3] for i in range(len(captions))]
    return toy_dataset(labels, captions, pixels, CLASSES)


DATA = make_data(make_batch(24).pixels, [f"title {i % 17}" for i in range(24)])


def look(_model, _precision, pixels):
    return F.normalize(pixels[:, :, 0, :4].flatten(1).float() - 128, dim=-1)


def read(_model, _precision, tokens):
    return F.normalize(torch.sin(tokens.float() @ torch.arange(77 * 12.0).view(77, 12)), dim=-1)


@pytest.fixture
def encoders(monkeypatch):
    """In place of CLIP, which untrained takes all images for one class: random features."""
    monkeypatch.setattr(ic, "encode_images", look)
    monkeypatch.setattr(ic, "encode_texts", read)


def recall(similarity, right, k):
    """The fraction of queries with a right answer among the k most similar, one at a time."""
    found = (sorted(range(len(row)), key=lambda i: -row[i])[:k] for row in similarity.tolist())
    hits = [not answers.isdisjoint(near) for answers, near in zip(right, found, strict=True)]
    return pytest.approx(sum(hits) / len(hits))


@pytest.mark.parametrize("images, captions", [(50, 17), (3, 2), (1, 1), (1100, 1050), (30, 150)])
def test_recall_is_as_counted_by_hand(images, captions):
    """Some images have several captions, some none: they are found, but ask and answer nothing."""
    torch.manual_seed(images)
    looks, texts = (F.normalize(torch.randn(n, 8), dim=-1) for n in (images, captions))
    pairs = {(i % max(1, images - images // 5), i % captions) for i in range(2 * captions)}
    pairs |= {(0, caption) for caption in range(captions)}
    found = ic.retrieval_recall(looks, texts, torch.tensor(sorted(pairs)))
    titled = sorted({image for image, _ in pairs})
    of_image = [{c for i, c in pairs if i == image} for image in titled]
    of_caption = [{i for i, c in pairs if c == caption} for caption in range(captions)]
    assert images == 1 or images < 5 or len(titled) < images
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == recall(looks[titled] @ texts.T, of_image, k)
        assert found[f"text_to_image_r{k}"] == recall(texts @ looks.T, of_caption, k)


def test_perfect_features_of_five_captions_an_image_score_1():
    """The form of Flickr8k, and an image without a caption."""
    images = torch.eye(6)[:, :5]
    captions = images[:5].repeat_interleave(5, 0)
    pairs = torch.stack([torch.arange(5).repeat_interleave(5), torch.arange(25)], 1)
    assert set(ic.retrieval_recall(images, captions, pairs).values()) == {1.0}


def test_the_metrics_are_as_counted_by_hand(encoders):
    state, labels = make_state(batch_size=24, chunk=7), DATA.labels.tolist()
    metrics, predicted, images, texts = ic.evaluate(state, DATA)
    assert torch.equal(images, look(0, 0, DATA.pixels))
    assert torch.equal(texts, read(0, 0, clip.tokenize([f"title {i}" for i in range(17)])))
    prompts = [read(0, 0, clip.tokenize(ic.class_prompts(name))).mean(0) for name in CLASSES]
    guesses = (images @ F.normalize(torch.stack(prompts), dim=-1).T).argmax(1).tolist()
    assert predicted.tolist() == guesses
    pairs = list(zip(labels, guesses, strict=True))
    right = [pairs.count((i, i)) for i in range(4)]
    f1 = [2 * right[i] / (labels.count(i) + guesses.count(i)) for i in (1, 2, 3)]  # with images
    loss = ic.clip_loss(images, texts[DATA.text_ids], state.model.logit_scale).item()
    found = {"loss": loss, "accuracy": sum(right) / 24, "macro_f1": sum(f1) / 3}
    found |= ic.retrieval_recall(images, texts, DATA.pairs)
    assert 0 in guesses and found == pytest.approx({name: metrics[name] for name in found})


def test_what_a_split_lacks_is_not_measured(encoders):
    pixels = make_batch(9).pixels
    without_titles = ic.evaluate(make_state(), toy_dataset("xyzxyzxyz", [()] * 9, pixels)).metrics
    without_classes = toy_dataset([""] * 9, [f"title {i}" for i in range(9)], pixels)
    without_classes = ic.evaluate(make_state(), without_classes).metrics
    always = {"loss", "seconds", "pairs_per_second"}
    assert without_titles.keys() == always | {"accuracy", "macro_f1"}
    recalls = {f"{way}_r{k}" for way in ic.DIRECTIONS for k in (1, 5, 10)}
    assert without_classes.keys() == always | recalls


def test_of_images_with_and_without_a_class_those_with_one_are_classified(encoders):
    pixels = make_batch(9).pixels
    some = toy_dataset([*"xyzxyz", "", "", ""], [f"title {i}" for i in range(9)], pixels)
    metrics, predicted, *_ = ic.evaluate(make_state(), some)
    right = (predicted[:6] == torch.tensor([0, 1, 2, 0, 1, 2])).double().mean().item()
    assert metrics["accuracy"] == pytest.approx(right) and len(predicted) == 9


def test_twenty_thousand_classes_take_no_table_of_all_by_all(monkeypatch):
    drawn, count = [], 20_000
    monkeypatch.setattr(ic, "save_figure", lambda name, figure: drawn.append(figure))
    labels = torch.arange(count).repeat_interleave(2)[1:]
    predicted = labels.roll(1)
    scores = ic.classification_scores(labels, predicted, count)
    assert scores["accuracy"] == pytest.approx((count - 1) / len(labels))
    data = Mock(labels=labels, class_names=[f"class {i}" for i in range(count)])
    ic.draw_confusion(data, [ic.Evaluation(scores, predicted, None, None)] * 2)
    assert drawn[0].axes[0].images[0].get_array().shape == (60, 60)


def test_the_loss_is_the_mean_over_images_in_batches_of_training_size(encoders):
    alike = make_data(make_batch(1).pixels.expand(10, -1, -1, -1), ["one title"] * 10)
    loss = ic.evaluate(make_state(batch_size=4), alike).metrics["loss"]
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


@pytest.mark.parametrize("names", [("accuracy",), ("image_to_text_r5", "text_to_image_r5")])
def test_the_best_line_is_the_first_of_equals(names):
    lines = [dict.fromkeys(names, score) | {"loss": 9 - score} for score in (0.1, 0.5, 0.5, 0.4)]
    assert ic.best_line(lines) is lines[1] and ic.best_line(lines[::-1]) is lines[2]

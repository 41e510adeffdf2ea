"""The metrics against counting by hand."""

import math

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, make_state, mixed_dataset, toy_dataset

import indofashion_clip as ic

CLASSES = ["blouse", "gowns", "saree", "t shirt"]
LABELS = ["" if i % 8 == 7 else CLASSES[1 + i % 3] for i in range(24)]  # none of the first
DATA = toy_dataset(LABELS, [f"title {i % 17}" for i in range(24)], make_batch(24).pixels, CLASSES)


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


def test_the_losses_are_means_over_batches_of_training_size(encoders, monkeypatch):
    """Image by image, among those of its batch."""
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.7)
    state, data, losses = make_state(chunk=7), mixed_dataset(31), []
    images, scale = look(0, 0, data.pixels), state.model.logit_scale.exp().item()
    texts, prompts = read(0, 0, data.tokens), read(0, 0, data.prompts[:, 0])
    for rows in ic.shuffled(len(data)).split(8):
        titled = [i for i in rows.tolist() if data.examples[i].captions]
        pairs = scale * images[titled] @ texts[data.first_texts[titled]].T
        of_pairs = -(pairs.log_softmax(1) + pairs.log_softmax(0)).diagonal() / 2
        classes = sorted({data.labels[i].item() for i in rows} - {-1})
        of_classes = []
        for i in rows[data.labels[rows] >= 0].tolist():
            logits = scale * images[i] @ prompts[classes].T
            of_classes.append(-logits.log_softmax(0)[classes.index(data.labels[i])])
        losses.append([of_pairs.mean().item(), torch.stack(of_classes).mean().item()])
    caption_loss, class_loss = torch.tensor(losses).mean(0).tolist()
    expected = {"loss": caption_loss + 0.7 * class_loss}
    expected |= {"caption_loss": caption_loss, "class_loss": class_loss}
    metrics, _ = ic.evaluate(state, data)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_the_metrics_and_the_images_found_are_as_counted_by_hand(encoders):
    """Images without a class are classified too, but count for no score."""
    images = look(0, 0, DATA.pixels)
    metrics, view = ic.evaluate(make_state(chunk=7), DATA)
    prompts = [read(0, 0, clip.tokenize(ic.class_prompts(name))).mean(0) for name in CLASSES]
    guesses = (images @ F.normalize(torch.stack(prompts), dim=-1).T).argmax(1).tolist()
    assert view["predicted"].tolist() == guesses
    pairs = [pair for pair in zip(LABELS, [CLASSES[i] for i in guesses], strict=True) if pair[0]]
    labels, guesses = zip(*pairs, strict=True)
    right = {name: pairs.count((name, name)) for name in CLASSES}
    f1 = [2 * right[name] / (labels.count(name) + guesses.count(name)) for name in CLASSES[1:]]
    found = {"accuracy": sum(right.values()) / 21, "macro_f1": sum(f1) / 3}
    captions = read(0, 0, clip.tokenize([f"title {i}" for i in range(17)]))
    found |= ic.retrieval_recall(images, captions, torch.tensor([(i, i % 17) for i in range(24)]))
    assert CLASSES[0] in guesses and found == pytest.approx({name: metrics[name] for name in found})
    queries = read(0, 0, clip.tokenize(list(DATA.queries.values())))
    similarity = (queries @ images.T).tolist()
    nearest = [sorted(range(24), key=lambda i: -row[i])[:5] for row in similarity]
    assert len(nearest) == 8 and view["found"].tolist() == nearest


def test_what_a_split_lacks_is_not_measured(encoders):
    always = {"loss", "caption_loss", "class_loss", "seconds", "pairs_per_second"}
    recalls = {f"{way}_r{k}" for way in ic.DIRECTIONS for k in (1, 5, 10)}
    metrics, view = ic.evaluate(make_state(), toy_dataset("xyzxyzxyz", [()] * 9))
    assert metrics.keys() == always | {"accuracy", "macro_f1"} and view.keys() == {"predicted"}
    metrics, view = ic.evaluate(make_state(), toy_dataset([""] * 9, ["a title"] * 9))
    assert metrics.keys() == always | recalls and view.keys() == {"found"}


@pytest.mark.parametrize("precision", [torch.float16, torch.float32])
def test_a_loss_that_is_not_finite_ends_the_run_in_a_line(encoders, monkeypatch, precision):
    monkeypatch.setattr(ic, "encode_images", lambda *inputs: look(*inputs) * math.inf)
    words = f"not finite at step 0 of epoch 0, in {str(precision)[6:]}: lower LR"
    with pytest.raises(SystemExit, match=words) as stop:
        ic.evaluate(make_state(precision=precision), DATA)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("names", [("accuracy",), ("image_to_text_r5", "text_to_image_r5")])
def test_the_best_line_is_the_first_of_equals(names):
    other = {"loss": 9.0, "split": "val"}
    lines = [dict.fromkeys(names, score) | other for score in (0.1, 0.5, 0.5, 0.4)]
    assert ic.best_line(lines) is lines[1] and ic.best_line(lines[::-1]) is lines[2]
    assert ic.best_line([*lines, lines[1] | {"split": "test", names[0]: 0.9}]) is lines[1]

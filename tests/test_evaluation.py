"""The metrics against brute force."""

import random

import pytest
import torch
import torch.nn.functional as F

import indofashion_clip as ic


def brute_force_recall(similarity, right, k):
    """The share of queries with a right answer among the k most similar, one query at a time."""
    hits = 0
    for scores, answers in zip(similarity.tolist(), right):
        first = sorted(range(len(scores)), key=lambda i: -scores[i])[:k]
        hits += any(i in answers for i in first)
    return hits / len(right)


@pytest.mark.parametrize("rows, captions", [(40, 40), (50, 17), (3, 2), (1, 1), (1100, 1050)])
def test_recall_counts_captions(rows, captions):
    generator = torch.Generator().manual_seed(rows)
    images = F.normalize(torch.randn(rows, 8, generator=generator), dim=-1)
    texts = F.normalize(torch.randn(captions, 8, generator=generator), dim=-1)
    ids = torch.cat(
        [torch.arange(captions), torch.randint(captions, (rows - captions,), generator=generator)]
    )
    found = ic.retrieval_recall(images, texts, ids)
    pictures_of = [{i for i, own in enumerate(ids.tolist()) if own == caption} for caption in range(captions)]
    for k in (1, 5, 10):
        assert found[f"image_to_text_r{k}"] == pytest.approx(
            brute_force_recall(images @ texts.T, [{i} for i in ids.tolist()], k)
        )
        assert found[f"text_to_image_r{k}"] == pytest.approx(
            brute_force_recall(texts @ images.T, pictures_of, k)
        )


def test_class_metrics_against_counting():
    rng = random.Random(0)
    pairs = [(rng.randrange(4), rng.randrange(3)) for _ in range(60)]  # class 3 is never predicted
    confusion = torch.zeros(5, 5, dtype=torch.int64)  # and class 4 has no rows
    for true, predicted in pairs:
        confusion[true, predicted] += 1
    accuracy, precision, recall, f1 = ic.class_metrics(confusion)
    assert accuracy.item() == pytest.approx(sum(t == p for t, p in pairs) / 60)
    for c in range(5):
        right = sum(t == p == c for t, p in pairs)
        predicted, rows = sum(p == c for _, p in pairs), sum(t == c for t, _ in pairs)
        assert precision[c].item() == pytest.approx(right / predicted if predicted else 0)
        assert recall[c].item() == pytest.approx(right / rows if rows else 0)
        assert f1[c].item() == pytest.approx(2 * right / (predicted + rows) if predicted + rows else 0)

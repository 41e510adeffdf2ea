"""The bundled sample is what its generator draws, and has the real files' quirks."""

import json
import re
import subprocess
import sys

import PIL
import pytest
from conftest import ROOT

SAMPLE = ROOT / "data/sample"


def rows(split):
    return [json.loads(line) for line in open(SAMPLE / f"{split}_data.json", encoding="utf-8")]


def test_the_generator_rewrites_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        subprocess.run([sys.executable, ROOT / "data/make_sample.py", tmp_path / name], check=True)
    files = sorted(path.relative_to(SAMPLE) for path in SAMPLE.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "one")
        for path in (tmp_path / "one").rglob("*")
        if path.is_file()
    )
    [drawn_with] = re.findall(
        r"Pillow (\d[\d.]*\d)", (ROOT / "data/make_sample.py").read_text(encoding="utf-8")
    )
    for file in files:
        again = (tmp_path / "one" / file).read_bytes()
        assert again == (tmp_path / "two" / file).read_bytes()
        if file.suffix == ".json" or PIL.__version__ == drawn_with:
            assert again == (SAMPLE / file).read_bytes(), file
    assert sum((SAMPLE / file).stat().st_size for file in files) <= 4_000_000


@pytest.mark.parametrize("split, count", [("train", 16), ("val", 5), ("test", 5)])
def test_every_class_has_its_pictures(split, count):
    labels = [row["class_label"] for row in rows(split)]
    assert len(set(labels)) == 15 and all(labels.count(label) == count for label in labels)
    assert all((SAMPLE / row["image_path"]).is_file() for row in rows(split))


def test_the_real_files_quirks_are_there():
    titles = [row["product_title"] for row in rows("train")]
    assert (
        "N/A" in titles
        and any("&amp;" in title for title in titles)
        and len(set(titles)) < len(titles)
    )
    assert any("color" in row for row in rows("train")) and any(
        "color" not in row for row in rows("train")
    )
    assert {row["image_path"].split(".")[-1] for row in rows("train")} >= {"jpeg", "jpg", "png"}

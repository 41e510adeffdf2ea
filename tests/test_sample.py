"""The bundled sample is what its generator draws, and has the real files' quirks."""

import re
import subprocess
import sys

import PIL
from conftest import ROOT, read_lines

SAMPLE, GENERATOR = ROOT / "data/sample", ROOT / "data/make_sample.py"


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_the_generator_rewrites_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, GENERATOR, tmp_path], check=True)
    assert files(SAMPLE) == files(tmp_path)
    [drawn_with] = re.findall(r"Pillow (\d[\d.]*\d)", GENERATOR.read_text(encoding="utf-8"))
    for file in files(SAMPLE):
        if file.suffix == ".json" or PIL.__version__ == drawn_with:
            assert (tmp_path / file).read_bytes() == (SAMPLE / file).read_bytes(), file
    assert sum((SAMPLE / file).stat().st_size for file in files(SAMPLE)) <= 4_000_000


def test_every_class_has_its_pictures_and_train_the_real_files_quirks():
    for split, count in {"val": 5, "test": 5, "train": 32}.items():
        rows = read_lines(SAMPLE / f"{split}_data.json")
        labels = [row["class_label"] for row in rows]
        assert len(set(labels)) == 15 and all(labels.count(label) == count for label in labels)
        assert all((SAMPLE / row["image_path"]).is_file() for row in rows)
    titles = [row["product_title"] for row in rows]
    assert "N/A" in titles and any("&amp;" in title for title in titles)
    assert len(set(titles)) < len(titles) and {"color" in row for row in rows} == {True, False}
    assert {row["image_path"].split(".")[-1] for row in rows} >= {"jpeg", "jpg", "png"}

"""The pictures of a run, drawn from awkward datasets without a screen or a warning."""

import json
import shutil

import pytest
import torch
from PIL import Image

import indofashion_clip as ic
from conftest import ROOT, quick, read_metrics, run_script, write_rows

TITLES = [
    "साड़ी Red & Gold सिल्क Saree",  # its Devanagari is in no font that matplotlib brings
    "लाल रेशमी साड़ी",
    "Women's $100 Kurta_set, 50% off: ^best^ \\frac{1}{2} price$",
    "Navy Blue Embroidered Semi-Stitched Georgette Lehenga Choli with Dupatta and Matching " * 4,
    "Supercalifragilistic" * 20,
    "שמלה Платье φόρεμα 😀 सफ़ेद",
    "N/A",
]


def make_awkward(folder, classes, val_rows):
    """Rows whose titles and labels are hard to draw, over a few pictures of the sample."""
    (folder / "images").mkdir(parents=True)
    files = sorted((ROOT / "data/sample/images/train").iterdir())[:20]
    for file in files:
        shutil.copy(file, folder / "images")
    labels = [f"class_{i}_of_many" if i % 3 else "पुरुषों_की_शेरवानी" + "ा" * i for i in range(classes)]
    for split, count in {"train": max(16, classes), "val": val_rows}.items():
        rows = [
            {
                "image_path": f"images/{files[i % 20].name}",
                "product_title": TITLES[i % 7],
                "class_label": labels[i % classes],
            }
            for i in range(count)
        ]
        write_rows(folder / f"{split}_data.json", rows)
    return folder


@pytest.mark.parametrize("classes, val_rows", [(1, 1), (1, 9), (3, 3), (40, 80)])
@pytest.mark.filterwarnings("error")
def test_awkward_datasets(tmp_path, classes, val_rows):
    data = make_awkward(tmp_path / "data", classes, val_rows)
    output = run_script(tmp_path / "run", **quick(data, NUM_EPOCHS=1))
    assert "Glyph" not in output
    for name in ("curves", "confusion", "retrieval"):
        with Image.open(tmp_path / "run/outputs" / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 250 and max(picture.size) < 4000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_without_val_only_the_curves(tmp_path):
    data = make_awkward(tmp_path / "data", 3, 3)
    (data / "val_data.json").unlink()
    run_script(tmp_path / "run", **quick(data))
    assert sorted(file.name for file in (tmp_path / "run/outputs").glob("*.png")) == ["curves.png"]
    lines = read_metrics(tmp_path / "run")
    assert [(line["epoch"], line["split"]) for line in lines] == [(1, "train"), (2, "train")]
    assert lines[1]["train_loss"] < lines[0]["train_loss"]


def test_what_can_be_drawn():
    assert ic.drawable(TITLES[0], 40, "?") == "… Red & Gold … Saree"
    assert ic.drawable(TITLES[1], 40, "a photo of a saree") == "a photo of a saree"
    assert ic.drawable(TITLES[5], 40, "?") == "שמלה Платье φόρεμα 😀 …"
    assert [len(line) <= 40 for line in ic.drawable(TITLES[3], 40, "?").split("\n")] == [True, True]
    assert ic.drawable(TITLES[4], 40, "?").endswith("…")


def test_the_searched_rows(settings, tmp_path):
    """One row a class while there are classes, titles before class prompts, no caption twice."""
    records = [
        ic.Record(i, "", caption, label, titled)
        for i, (caption, label, titled) in enumerate(
            [("a", "x", True), ("a", "x", True), ("b", "x", True), ("a photo of a y", "y", False)] * 2
            + [("c", "y", True), ("d", "z", True)]
        )
    ]
    data = ic.FashionDataset("val", records, settings, 64, None, None, 0)
    rows = ic.rows_to_search(data, 0)
    assert sorted(records[row].caption for row in rows) == ["a", "a photo of a y", "b", "c", "d"]
    assert sorted(records[row].class_label for row in rows[:3]) == ["x", "y", "z"]
    assert all(records[row].titled for row in rows[:3])
    assert len(ic.rows_to_search(data, 0, count=2)) == 2


def test_frames_tell_right_from_wrong(settings):
    """Dark around the caption's own picture, light around one of its class, white around others."""
    records = [
        ic.Record(i, "", caption, label, True)
        for i, (caption, label) in enumerate([("a", "x"), ("b", "x"), ("c", "y")])
    ]
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    data = ic.FashionDataset("val", records, settings, 64, pixels, [0, 1, 2], 0)
    strip = ic.picture_strip(data, [0, 1, 2], records[0])
    assert strip.shape == (72, 3 * 76, 3) and strip.dtype == "uint8"
    dark, light, white = (strip[1, 76 * i + 1].sum() for i in range(3))
    assert dark < light < white == 3 * 255 and strip[36, 36].sum() == 0


def test_the_view_is_of_the_nearest_pictures(tmp_path):
    """What evaluate says was found is what comparing every picture with the caption finds."""
    data = make_awkward(tmp_path / "data", 3, 12)
    run_script(tmp_path / "run", **quick(data, NUM_EPOCHS=1, CACHE_PATH=""))
    state = torch.load(tmp_path / "run/outputs/last.pt", weights_only=True)
    view = state["views"]["best"]
    model = ic.load_clip(str(tmp_path / "run/outputs/best.pt"), torch.device("cpu"))
    rows = [json.loads(line) for line in open(data / "val_data.json", encoding="utf-8")]
    images = torch.stack([ic.load_image(data / row["image_path"], 64) for row in rows])
    precision = ic.choose_precision(torch.device("cpu"))
    with torch.no_grad():
        images = ic.encode_images(model, ic.to_images(images, "cpu"), precision)
        for row, found in zip(view["searched"].tolist(), view["found"].tolist()):
            if rows[row]["product_title"] == "N/A":
                continue
            tokens, _ = ic.tokenize([ic.clean(rows[row]["product_title"])])
            nearness = (images @ ic.encode_captions(model, tokens, precision)[0]).tolist()
            assert [nearness[i] for i in found] == pytest.approx(sorted(nearness)[:-6:-1], abs=2e-3)
    assert view["confusion"].sum() == 12

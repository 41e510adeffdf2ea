"""The script as a user runs it: a copy with edited constants, what it prints, writes and draws."""

import io
import json
import os
import re
import sys
from itertools import count, cycle, islice

import pytest
import torch
import tqdm.std
from conftest import ROOT, edited_script, launch, quick, read_lines, run_script, toy_dataset
from matplotlib.colors import to_rgba
from PIL import Image

import indofashion_clip as ic

LOSSES = {"loss", "caption_loss", "class_loss"}
FIELDS = LOSSES | {"epoch", "split", "seconds", "pairs_per_second", "accuracy", "macro_f1"}
FIELDS |= {f"{way}_r{k}" for way in ic.DIRECTIONS for k in (1, 5, 10)}
TRAINED = {f"train_{name}" for name in (*LOSSES, "pairs_per_second")}
FILES = {"best.pt", "last.pt", "metrics.jsonl", "skipped.jsonl"}
FILES |= {"curves.png", "confusion.png", "retrieval.png"}


# ---- What comes out ----
def test_the_outputs_also_where_the_console_lacks_a_letter(tmp_path, dataset):
    """A Windows console or notebook writes in a code page that has no →."""
    script = edited_script(tmp_path, **quick(dataset))
    output = launch(script, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert "image?text R@1" in output
    *val, test = read_lines(tmp_path / "outputs/metrics.jsonl")
    assert [(line["epoch"], line["split"]) for line in val] == [(0, "val"), (1, "val"), (2, "val")]
    assert test["split"] == "test" and test["epoch"] == ic.best_line(val)["epoch"]
    for line, trained in zip((*val, test), (set(), TRAINED, TRAINED, set()), strict=True):
        assert line.keys() == FIELDS | trained
        assert line["pairs_per_second"] * line["seconds"] == pytest.approx(10)  # images
    state = torch.load(tmp_path / "outputs/best.pt", weights_only=True)
    assert state.keys() == ic.load_clip("tiny").state_dict().keys()
    assert all(w.dtype == torch.float32 for w in state.values())
    assert "Traceback" not in output and "Warning" not in output and "\r" not in output
    assert "24 images, 2 of them without a title; 22 captions; 0 rows skipped" in output
    assert ": 2 epochs of 3 steps of 8 images, 8 at a time; output in outputs\n" in output
    assert 'clip.load("outputs/best.pt")' in output.splitlines()[-1]
    assert set(os.listdir(tmp_path / "outputs")) == FILES


# ---- Progress ----
def go_on(monkeypatch, seconds):
    """300 of 1,200 images are done; ten a second come on, on a clock of the test's."""
    clock = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: clock[0])
    with ic.progress("training", 1200, done=300) as bar:
        for clock[0] in range(1, seconds + 1):  # noqa: B020
            bar.set_postfix_str("loss 1.250", refresh=False)
            bar.update(10)


def test_without_a_terminal_progress_is_a_line_a_minute(monkeypatch, capsys):
    go_on(monkeypatch, 59)
    assert capsys.readouterr() == ("", "")
    go_on(monkeypatch, 89)
    lines = [line.strip() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[0] == "training: 900 of 1200, loss 1.250, 10.00 images/s, 00:30 left"
    assert len(lines) <= 2  # tqdm repeats itself at the end
    monkeypatch.setattr(ic, "RANK", 1)
    go_on(monkeypatch, 89)
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_progress_is_a_bar_and_lines_go_above_it(monkeypatch, capsys):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    go_on(monkeypatch, 5)
    ic.say("above")
    bar = r"training: +2\d%\|#+.*\| 3\d0/1200 .*loss 1.250"
    assert re.search(bar, terminal.getvalue()) and " of " not in terminal.getvalue()
    assert capsys.readouterr().out == "above\n"


def test_decoding_training_and_evaluating_show_their_progress(tmp_path, dataset, monkeypatch):
    """Each look at the clock finds another minute gone."""
    monkeypatch.setattr(tqdm.std, "time", count(0, 61).__next__)
    output = run_script(tmp_path, **quick(dataset, BATCH_SIZE=2, NUM_EPOCHS=1))
    for task in ("decoding", "training", "evaluating"):
        assert re.search(rf"^\r?{task}: \d+ of \d+.*, .* left$", output, re.M), task
    assert re.search("^\r?training: .*, loss [0-9.]+, ", output, re.M)


# ---- Without a dataset ----
def test_the_bundled_sample_is_learned(tmp_path):
    """The README's first command, without its set-up."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    output = run_script(tmp_path)
    lines = read_lines(tmp_path / "outputs/sample/metrics.jsonl")
    assert "kaggle" in output and "SAMPLE_RUN" in output and lines[0]["accuracy"] <= 0.2
    assert lines[-1]["accuracy"] >= 0.85 and lines[-1]["text_to_image_r5"] >= 0.5


# ---- Constants that cannot work ----
PATHS = "IMAGE_PATH", "JSON_PATH", "OUTPUT_PATH", "CACHE_PATH"
NUMBERS = {"BATCH_SIZE": 1, "NUM_EPOCHS": 1.5, "LR": 0, "WARMUP": 1.1, "MAX_GRAD_NORM": 0}
NUMBERS |= {"CLASS_WEIGHT": float("inf"), "SEED": 0.5}
WRONG = dict.fromkeys(PATHS, [None, 3.5, "", "a_file/below", "nul\0"])
WRONG |= {name: [value, -1, "1", None, float("nan")] for name, value in NUMBERS.items()}
WRONG |= {"MODEL": [None, "", 32, "ViT-Z/99", "missing.pt", "a_file"], "CHUNK_SIZE": [0, 1.5, "32"]}
WRONG["PROMPTS"] = [(), "a photo", "a {}", ("a {}", "a photo"), ("a {}", 5), 5, None]
WRONG["CLASS_NAMES"] = [None, {"saree": 5}, {"saree": " "}, ["saree"]]


@pytest.mark.parametrize("name", " ".join(ic.RULES).split())
def test_a_constant_that_cannot_work_is_one_line_that_names_it(tmp_path, monkeypatch, name):
    """Before anything is read, so also where there is a dataset with nothing in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "a_file").write_text("not a folder")
    (tmp_path / "data/train_data.json").write_text("")
    for constant, value in quick(tmp_path / "data").items():
        monkeypatch.setattr(ic, constant, value)
    for value in WRONG[name]:
        with monkeypatch.context() as one:
            one.setattr(ic, name, value)
            with pytest.raises(SystemExit, match=name) as stop:
                ic.check_constants()
                ic.load_clip(ic.MODEL)
        message = str(stop.value)
        assert "\n" not in message and len(message) < 800 and repr(value) in message
        if name.endswith("PATH") and value and "\0" not in str(value):
            assert f"({tmp_path / str(value)})" in message


# ---- Figures ----
COLUMNS = "image_path", "product_title", "class_label"
TITLES = [
    "साड़ी Red & Gold सिल्क Saree",  # in letters that matplotlib's font lacks
    "Women's $100 Kurta_set, 50% off: ^best^ \\frac{1}{2} price$",
    "Navy Blue Embroidered Semi-Stitched Georgette Lehenga Choli with Dupatta and " * 4,
    "שמלה Платье φόρεμα 😀 सफ़ेद" + "Supercalifragilistic" * 20,
    "N/A",
]


@pytest.mark.parametrize(
    "classes, images, titled", [(1, 1, 1), (3, 16, 0), (60, 80, 1), (61, 61, 1)]
)
@pytest.mark.filterwarnings("error")
def test_awkward_datasets_are_learned_and_drawn(tmp_path, classes, images, titled):
    """Without a screen or a warning, with odd prompts, and without training where untitled."""
    titles = TITLES if titled else [""]
    files = sorted(map(str, (ROOT / "data/sample/images/train").iterdir()))
    labels = [f"class_{i}_of_$^$" if i % 3 else "पुरुषों_की" + "ा" * (i // 3) for i in range(classes)]
    (tmp_path / "data").mkdir()
    turns = islice(zip(files, cycle(titles), cycle(labels), strict=False), images)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in turns]
    for split in ("train", "val"):
        (tmp_path / f"data/{split}_data.json").write_text(json.dumps(rows))
    odd = {"PROMPTS": ["{}", "{{x}} {}"], "NUM_EPOCHS": titled}
    assert "Glyph" not in run_script(tmp_path, **quick(tmp_path / "data", **odd))
    names = {"curves", *["retrieval"] * titled, *["confusion"] * (1 < classes <= 60)}
    assert {path.stem for path in (tmp_path / "outputs").glob("*.png")} == names
    for name in names:
        with Image.open(tmp_path / f"outputs/{name}.png") as picture:
            assert min(picture.size) > 150 and max(picture.size) < 5000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_frames_tell_the_captions_image_and_its_class_from_others(monkeypatch):
    monkeypatch.setattr(ic, "save", (figures := {}).__setitem__)
    titles, found = ["one", "two", "three", "four"], torch.tensor([[0, 1, 2], [3, 2, 1]] * 2)
    pixels = torch.arange(4).view(4, 1, 1, 1).expand(4, 3, 64, 64).byte()  # each its number
    data = toy_dataset(["x", "x", "y", ""], titles, pixels)
    ic.draw_retrieval(data, {"before": {"found": found}, "after": {"found": found.flip(1)}})
    axes = figures["retrieval.png"].axes
    texts = [panel.get_title(loc="left") for panel in axes if panel.get_title(loc="left")]
    assert texts == list(data.queries.values()) and sorted(texts) == sorted(titles)
    panels = [panel for panel in axes if panel.images]
    shown = torch.stack([found, found.flip(1)], 1).flatten().tolist()  # before, then after
    for place, (image, panel) in enumerate(zip(shown, panels, strict=True)):
        own = titles.index(texts[place // 6])
        assert int(panel.images[0].get_array().max()) == image
        color = "#148232" if image == own else "#a5dcaa" if {own, image} == {0, 1} else "white"
        assert panel.spines["top"].get_edgecolor() == to_rgba(color), (own, image)

"""The script as a user runs it: a copy with edited constants, what it prints, writes and draws."""

import os
from itertools import cycle, islice
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    ROOT,
    edited_script,
    launch,
    make_dataset,
    quick,
    read_lines,
    read_metrics,
    run_driver,
    run_script,
    tiny_model,
    toy_dataset,
    weights,
    write_lines,
)
from PIL import Image

import indofashion_clip as ic

FIELDS = {"epoch", "split", "loss", "accuracy", "macro_f1", "seconds", "pairs_per_second"}
SHARES = {f"{way}_r{k}" for way in ic.DIRECTIONS for k in (1, 5, 10)} | {"accuracy", "macro_f1"}


# ---- What comes out ----
def test_the_outputs_also_where_the_console_lacks_a_letter(tmp_path, dataset):
    """A Windows console or notebook writes in a code page that has no →."""
    script = edited_script(tmp_path, **quick(dataset))
    output = launch(script, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert "image?text R@1" in output
    *val, test = read_metrics(tmp_path)
    assert [(line["epoch"], line["split"]) for line in val] == [(0, "val"), (1, "val"), (2, "val")]
    for line in (*val, test):
        assert line.keys() >= FIELDS | SHARES and all(0 <= line[name] <= 1 for name in SHARES)
        trained = line["split"] == "val" and line["epoch"] > 0
        assert ("train_loss" in line) == ("train_pairs_per_second" in line) == trained
        images = {"val": 10, "test": 10}[line["split"]]  # seconds are the evaluation's, always
        assert line["pairs_per_second"] * line["seconds"] == pytest.approx(images)
    assert test["split"] == "test" and test["epoch"] == ic.best_line(val)["epoch"]
    assert read_lines(tmp_path / "outputs/skipped.jsonl") == []
    state = weights(tmp_path / "outputs/best.pt")
    assert state.keys() == tiny_model().state_dict().keys()
    assert all(w.dtype == torch.float32 for w in state.values())
    assert "Traceback" not in output and "Warning" not in output
    assert "24 images, 2 of them" in output and "2 epochs of 3 steps of 8 pairs" in output
    assert ", 8 pairs at a time" in output
    assert 'clip.load("outputs/best.pt")' in output.splitlines()[-1]
    names = {path.name for path in (tmp_path / "outputs").iterdir()} - {".lock"}
    pictures = {"curves.png", "confusion.png", "retrieval.png"}
    assert names == {"best.pt", "last.pt", "metrics.jsonl", "skipped.jsonl"} | pictures


@pytest.mark.parametrize("prompts, epochs", [("a {}", 0), (["{}"], 1), (("a {}", "{{x}} {}"), 2)])
def test_one_image_a_split_with_prompts_of_any_kind(tmp_path, prompts, epochs):
    data = make_dataset(tmp_path / "data", train=1, val=1, test=1)
    row = read_lines(data / "test_data.json")[0] | {"class_label": "another"}
    write_lines(data / "test_data.json", [row])
    run_script(tmp_path, **quick(data, PROMPTS=prompts, NUM_EPOCHS=epochs))
    assert [line["image_to_text_r1"] for line in read_metrics(tmp_path)] == [1.0] * (epochs + 2)


def test_what_is_said_is_read_at_once_in_a_pipe(tmp_path):
    lines = """
        import os
        ic.prepare_machine()
        ic.say("heard")
        os._exit(0)  # as a kill: nothing is flushed
    """
    assert run_driver(tmp_path, lines, {}) == "heard\n"


# ---- Without a dataset ----
def test_the_bundled_sample_is_learned(tmp_path):
    """The README's first command, without its set-up."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    output = run_script(tmp_path)
    lines = read_lines(tmp_path / "outputs/sample/metrics.jsonl")
    assert "kaggle" in output and "SAMPLE_RUN" in output and lines[0]["accuracy"] <= 0.2
    assert lines[-1]["accuracy"] >= 0.85 and lines[-1]["text_to_image_r5"] >= 0.5


def test_a_path_that_the_user_set_is_never_replaced_by_the_sample(tmp_path):
    output = run_script(tmp_path, code=1, IMAGE_PATH="my/pictures")
    assert "IMAGE_PATH" in output and "my/pictures" in output and "sample" not in output


# ---- Constants that cannot work ----
WRONG = {
    "IMAGE_PATH": [None, 3, "", "nowhere"],
    "JSON_PATH": [None, "", "nowhere/{split}.json"],
    "OUTPUT_PATH": [None, "", "a_file", "a_file/below", "nul\0"],
    "CACHE_PATH": [None, "", "a_file", "a_file/below"],
    "MODEL": [None, "", 32, "ViT-Z/99", "missing.pt", "a_file"],
    "BATCH_SIZE": [0, 1, -4, "64", 6.5, None, True],
    "NUM_EPOCHS": [-1, 1.5, "6", None],
    "LR": [0, -1e-5, "1e-5", None, float("nan"), float("inf")],
    "WARMUP": [-0.1, 1.1, "0.1", None],
    "MAX_GRAD_NORM": [0, -1.0, None, "1"],
    "CLASS_PROMPT_SHARE": [-0.1, 1.5, "half", None],
    "MIN_CROP": [0, 1.2, "0.9", None],
    "SEED": ["x", -1, 0.5, None],
    "PROMPTS": [(), "a photo", ("a photo",), ("a {}", 5), 5, None],
    "CHUNK_SIZE": [0, -2, 1.5, "32"],
    "CLASS_NAMES": [None, {"saree": 5}, ["saree"]],
    "SAMPLE_RUN": [None, "tiny"],
}


def test_every_constant_of_the_user_is_covered():
    own = {"BAR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "HYPERPARAMETERS", "PROGRESS", "DIRECTIONS"}
    own |= {"LOCAL_WORLD_SIZE", "HUB_NAMES", "PIXEL_MEAN", "PIXEL_STD", "CGROUP_FILES"}
    constants = {name for name in vars(ic) if name.isupper()} - own - {"F", "RULES"}
    assert constants == WRONG.keys() == set(" ".join(ic.RULES).split())


@pytest.mark.parametrize("name", WRONG)
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
        assert "\n" not in str(stop.value) and len(str(stop.value)) < 500


def test_a_wrong_constant_ends_the_run_before_anything_is_written(tmp_path, dataset):
    output = run_script(tmp_path, code=1, **quick(dataset, BATCH_SIZE="64"))
    assert output == "BATCH_SIZE is '64'; it must be a whole number from 2 on\n"
    assert sorted(os.listdir(tmp_path)) == ["data", "indofashion_clip.py"]


# ---- Pictures ----
TITLES = [
    "साड़ी Red & Gold सिल्क Saree",  # in letters that matplotlib's font lacks
    "लाल रेशमी साड़ी",
    "Women's $100 Kurta_set, 50% off: ^best^ \\frac{1}{2} price$",
    "Navy Blue Embroidered Semi-Stitched Georgette Lehenga Choli with Dupatta and " * 4,
    "Supercalifragilistic" * 20,
    "שמלה Платье φόρεμα 😀 सफ़ेद",
    "N/A",
]


@pytest.mark.parametrize("classes, val_rows", [(1, 1), (3, 3), (40, 80)])
@pytest.mark.filterwarnings("error")
def test_awkward_datasets_are_drawn(tmp_path, classes, val_rows):
    """Without a screen or a warning."""
    files = sorted((ROOT / "data/sample/images/train").iterdir())[:20]
    labels = [f"class_{i}_of_many" if i % 3 else "पुरुषों_की" + "ा" * i for i in range(classes)]
    (tmp_path / "data").mkdir()
    for split, count in {"train": max(16, classes), "val": val_rows}.items():
        paths = [tmp_path / f"data/{split}-{i}" for i in range(count)]
        for path, file in zip(paths, cycle(files), strict=False):
            path.symlink_to(file)
        columns = {"image_path": map(str, paths), "product_title": TITLES, "class_label": labels}
        turns = zip(*map(cycle, columns.values()), strict=True)
        rows = [dict(zip(columns, row, strict=True)) for row in islice(turns, count)]
        write_lines(tmp_path / f"data/{split}_data.json", rows)
    assert "Glyph" not in run_script(tmp_path, **quick(tmp_path / "data", NUM_EPOCHS=1))
    for name in ("curves", "retrieval", *["confusion"] * (classes > 1)):
        with Image.open(tmp_path / f"outputs/{name}.png") as picture:
            assert min(picture.size) > 200 and max(picture.size) < 4000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_frames_tell_right_from_wrong():
    """Dark around the caption's own image, light around one of its class, white around others."""
    strip = ic.image_strip(toy_dataset("xxy", "abc"), [0, 1, 2], 0, caption=0)
    assert strip.shape == (72, 3 * 76, 3) and strip.dtype == "uint8"
    dark, light, white = (int(strip[1, 76 * i + 1].sum()) for i in range(3))
    assert dark < light < white == 3 * 255 and strip[36, 36].sum() == 0


def test_of_many_classes_the_largest_are_drawn(monkeypatch):
    """A figure of a thousand classes would take gigabytes."""
    monkeypatch.setattr(ic, "save_figure", lambda name, figure: figures.append(figure))
    figures, names = [], [f"class {i}" for i in range(200)]
    labels = torch.arange(200).repeat_interleave(torch.arange(200))
    data = Mock(labels=labels, class_names=names)
    results = [ic.Evaluation({"accuracy": 0.5}, labels.roll(i), None, None) for i in (0, 1)]
    ic.draw_confusion(data, results)
    [figure] = figures
    before = figure.axes[0]
    assert [text.get_text() for text in before.get_xticklabels()] == names[-60:]
    assert max(figure.get_size_inches()) <= 50
    table = before.images[0].get_array()
    assert table.shape == (60, 60) and (table == torch.eye(60).numpy()).all()


def test_the_searched_captions_are_distinct_and_their_images_the_nearest(monkeypatch):
    monkeypatch.setattr(ic, "save_figure", lambda name, figure: titles.extend(figure.axes[::2]))
    monkeypatch.setattr(ic, "image_strip", spy := Mock(wraps=ic.image_strip))
    titles, captions = [], [("a", "b"), "A", *"cdefghij", ()]
    data = toy_dataset("xxyyzzxxyyz", captions)
    generator = torch.Generator().manual_seed(0)
    sizes = [(11, 4), (10, 4)]  # the images' features and the captions', before and after
    features = [[torch.randn(size, generator=generator) for size in sizes] for _ in range(2)]
    results = [ic.Evaluation({}, None, *pair) for pair in features]
    ic.draw_retrieval(data, results)
    drawn = [call.args[1:] for call in spy.call_args_list]
    queries = [caption for _, _, caption in drawn[::2]]
    assert len(queries) == len(set(queries)) == 8
    for (found, query, caption), (images, texts) in zip(drawn, features * 8, strict=True):
        nearness = (images @ texts[caption]).tolist()
        assert [nearness[i] for i in found] == sorted(nearness)[:-6:-1]
        assert caption in data.pairs[data.pairs[:, 0] == query, 1]
    words = [panel.get_title(loc="left") for panel in titles]
    assert [data.captions[data.pairs[:, 1].tolist().index(c)].lower() for c in queries] == [
        word.lower() for word in words
    ]


# ---- Two runs, and weights that would be overwritten ----
def test_a_second_run_in_one_folder_is_refused(tmp_path, dataset, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ic, "OUTPUT_PATH", "outputs")
    os.makedirs("outputs")
    lock = ic.lock_output()
    before = sorted(os.listdir("outputs"))
    output = run_script(tmp_path, code=1, **quick(dataset))
    assert output.endswith("wait for it, or set another OUTPUT_PATH\n")
    assert sorted(os.listdir("outputs")) == before
    lock.release()
    run_script(tmp_path, **quick(dataset, NUM_EPOCHS=0))

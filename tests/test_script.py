"""The script as a user runs it: a copy with edited constants, what it prints, writes and draws."""

import json
import runpy
import shutil

import pytest
import torch
from conftest import (
    ROOT,
    edited_script,
    make_dataset,
    quick,
    read_lines,
    read_metrics,
    run_driver,
    run_script,
    same_weights,
    tiny_model,
    weights,
    write_lines,
)
from PIL import Image

import indofashion_clip as ic

FIELDS = {"epoch", "split", "loss", "accuracy", "macro_f1", "seconds", "pairs_per_second"}
SHARES = {f"{way}_r{k}" for way in ic.DIRECTIONS for k in (1, 5, 10)} | {"accuracy", "macro_f1"}


# ---- What comes out ----
def test_the_outputs(tmp_path, dataset):
    output = run_script(tmp_path, inside=False, **quick(dataset))
    *val, test = read_metrics(tmp_path)
    assert [(line["epoch"], line["split"]) for line in val] == [(0, "val"), (1, "val"), (2, "val")]
    for line in (*val, test):
        assert line.keys() >= FIELDS | SHARES and all(0 <= line[name] <= 1 for name in SHARES)
        assert ("train_loss" in line) == (line["split"] == "val" and line["epoch"] > 0)
    assert test["split"] == "test" and test["epoch"] == ic.best_line(val)["epoch"]
    assert read_lines(tmp_path / "outputs/skipped.jsonl") == []
    state = weights(tmp_path / "outputs/best.pt")
    assert state.keys() == tiny_model().state_dict().keys()
    assert all(w.dtype == torch.float32 for w in state.values())
    assert "Traceback" not in output and "Warning" not in output
    assert "24 rows used" in output and "2 epochs of 3 steps of 8 pairs" in output
    assert 'clip.load("outputs/best.pt")' in output.splitlines()[-1]
    names = {path.name for path in (tmp_path / "outputs").iterdir()}
    pictures = {"curves.png", "confusion.png", "retrieval.png"}
    assert names == {"best.pt", "last.pt", "metrics.jsonl", "skipped.jsonl"} | pictures


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edited_script(tmp_path)
    runpy.run_path("indofashion_clip.py", run_name="not_main")
    assert capsys.readouterr().out == "" and len(list(tmp_path.iterdir())) == 1


def test_the_same_seed_gives_the_same_weights(tmp_path, monkeypatch):
    """On batches large enough that torch shares their work out over threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # the other tests' processes want the cores
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        sample = quick(ROOT / "data/sample", SEED=seed, BATCH_SIZE=96, NUM_EPOCHS=1)
        run_script(tmp_path / name, inside=False, **sample)
    one, two, other = (tmp_path / name / "outputs/best.pt" for name in ("one", "two", "other"))
    assert same_weights(one, two) and not same_weights(one, other)
    one, two = (read_metrics(tmp_path / name, times=False) for name in ("one", "two"))
    assert one == two


def test_weights_of_one_run_start_another(tmp_path, dataset):
    run_script(tmp_path / "first", **quick(dataset))
    best = str(tmp_path / "first/outputs/best.pt")
    run_script(tmp_path / "second", **quick(dataset, MODEL=best, NUM_EPOCHS=1))
    *first, test = read_metrics(tmp_path / "first")
    [same] = [line for line in first if line["epoch"] == test["epoch"]]
    before = read_metrics(tmp_path / "second")[0]
    assert before["accuracy"] == same["accuracy"]
    assert before["loss"] == pytest.approx(same["loss"], rel=1e-4)
    again = quick(dataset, MODEL=best, OUTPUT_PATH=str(tmp_path / "first/outputs"))
    assert "MODEL: this run would overwrite" in run_script(tmp_path / "third", code=1, **again)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_weights(tmp_path, dataset):
    output = run_script(tmp_path, code=1, **quick(dataset, LR=1e12))
    assert "is not finite by step" in output and "lower LR" in output
    for name in ("best.pt", "last.pt"):
        state = weights(tmp_path / "outputs" / name)
        assert all(w.isfinite().all() for w in state.get("model", state).values())


def test_one_picture_a_split(tmp_path):
    data = make_dataset(tmp_path / "data", train=1, val=1, test=1)
    run_script(tmp_path, **quick(data))
    assert read_metrics(tmp_path)[-1]["accuracy"] == 1.0


def test_without_val_and_test_files_some_of_train_is_held_out(tmp_path):
    data = make_dataset(tmp_path / "data", train=45, val=0, test=0)
    output = run_script(tmp_path, **quick(data))
    assert "2 rows of train are held out" in output
    assert {line["split"] for line in read_metrics(tmp_path)} == {"val"}
    assert "finished" in run_script(tmp_path, **quick(data))


def test_pictures_in_the_mirrors_layout_and_absolute_paths(tmp_path, dataset):
    """The JSON files elsewhere, a row with an absolute path, one that leads out of the folder."""
    (tmp_path / "metadata").mkdir()
    for split in ("train", "val", "test"):
        rows = read_lines(dataset / f"{split}_data.json")
        rows[0]["image_path"] = str(dataset / rows[0]["image_path"])
        rows[1]["image_path"] = "../data/" + rows[1]["image_path"]
        write_lines(tmp_path / f"metadata/{split}.json", rows)
    path = str(tmp_path / "metadata/{split}.json")
    output = run_script(tmp_path, **quick(dataset, JSON_PATH=path, NUM_EPOCHS=1))
    assert output.count("; 0 left out") == 3


# ---- Without a dataset ----
def test_the_bundled_sample_is_learned(tmp_path):
    """The README's first command, without its set-up."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    output = run_script(tmp_path)
    lines = read_lines(tmp_path / "outputs/sample/metrics.jsonl")
    assert "kaggle" in output and lines[0]["accuracy"] <= 0.2
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
    "WEIGHT_DECAY": [-0.1, 7, "0.1", None],
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


def test_every_constant_is_covered():
    constants = {name for name in vars(ic) if name.isupper() and name != "F"}
    assert constants - WRONG.keys() == {
        "BAR",
        "LOCAL_RANK",
        "PROGRESS",
        "RANK",
        "HYPERPARAMETERS",
        "DIRECTIONS",
        "WORLD_SIZE",
    }


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
        monkeypatch.setattr(ic, name, value)
        with pytest.raises(SystemExit, match=name) as stop:
            ic.check_constants()
            ic.load_clip(ic.MODEL)
        assert "\n" not in str(stop.value) and len(str(stop.value)) < 500


def test_a_wrong_constant_through_the_front_door(tmp_path, dataset):
    output = run_script(tmp_path, code=1, **quick(dataset, BATCH_SIZE="64"))
    assert output == "BATCH_SIZE is '64'; it must be a whole number from 2 to 2147483648\n"
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("prompts", ["a picture of a {}", ["{}"], ("a {}", "one {{x}} {}")])
def test_prompts_may_be_one_text_or_several(tmp_path, dataset, prompts):
    run_script(tmp_path, **quick(dataset, PROMPTS=prompts, NUM_EPOCHS=0))


def test_output_that_cannot_show_a_letter(tmp_path, dataset):
    """A Windows console or notebook writes in a code page that has no → and no Devanagari."""
    rows = read_lines(dataset / "train_data.json")
    write_lines(
        dataset / "train_data.json", [row | {"class_label": "साड़ी"} for row in rows[:4]] + rows
    )
    how = {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    output = run_driver(tmp_path, "ic.main()", quick(dataset, NUM_EPOCHS=1), **how)
    assert "image?text R@1" in output and "The best weights" in output


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


@pytest.mark.parametrize("classes, val_rows", [(1, 1), (1, 9), (3, 3), (40, 80)])
@pytest.mark.filterwarnings("error")
def test_awkward_datasets_are_drawn(tmp_path, classes, val_rows):
    """Without a screen or a warning."""
    files = sorted((ROOT / "data/sample/images/train").iterdir())[:20]
    (tmp_path / "data").mkdir()
    for file in files:
        shutil.copy(file, tmp_path / "data")
    labels = [f"class_{i}_of_many" if i % 3 else "पुरुषों_की" + "ा" * i for i in range(classes)]
    for split, count in {"train": max(16, classes), "val": val_rows}.items():
        titles = {"image_path": files, "product_title": TITLES, "class_label": labels}
        rows = [{k: v[i % len(v)] for k, v in titles.items()} for i in range(count)]
        rows = [row | {"image_path": row["image_path"].name} for row in rows]
        (tmp_path / f"data/{split}_data.json").write_text("\n".join(map(json.dumps, rows)))
    output = run_script(tmp_path, **quick(tmp_path / "data", NUM_EPOCHS=1))
    assert "Glyph" not in output
    for name in ("curves", "confusion", "retrieval"):
        with Image.open(tmp_path / f"outputs/{name}.png") as picture:
            assert min(picture.size) > 250 and max(picture.size) < 4000
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def toy_dataset(labels, captions):
    records = [
        ic.Record(i, i, "", caption, label, True)
        for i, (label, caption) in enumerate(zip(labels, captions, strict=True))
    ]
    pixels = torch.zeros(len(records), 3, 64, 64, dtype=torch.uint8)
    return ic.FashionDataset(records, pixels, sorted(set(labels)))


def test_frames_tell_right_from_wrong():
    """Dark around the caption's own picture, light around one of its class, white around others."""
    strip = ic.picture_strip(toy_dataset("xxy", "abc"), [0, 1, 2], 0)
    assert strip.shape == (72, 3 * 76, 3) and strip.dtype == "uint8"
    dark, light, white = (int(strip[1, 76 * i + 1].sum()) for i in range(3))
    assert dark < light < white == 3 * 255 and strip[36, 36].sum() == 0


def test_the_searched_captions_are_distinct_and_their_pictures_the_nearest(monkeypatch):
    drawn = []
    monkeypatch.setattr(ic, "save_figure", lambda name, figure: None)
    strip = ic.picture_strip
    record = lambda *found: drawn.append(found[1:]) or strip(*found)  # noqa: E731
    monkeypatch.setattr(ic, "picture_strip", record)
    data = toy_dataset("xxyyzzxxyyzz", ["a", "A", *"bcdefghijk"])
    generator = torch.Generator().manual_seed(0)
    features = [
        (torch.randn(12, 4, generator=generator), torch.randn(11, 4, generator=generator))
        for _ in range(2)
    ]
    ic.draw_retrieval(data, features)
    queries = [int(data.caption_ids[query]) for _, query in drawn[::2]]
    assert len(queries) == len(set(queries)) == 8 and len(drawn) == 16
    for (found, query), (images, texts) in zip(drawn, features * 8, strict=True):
        nearness = (images @ texts[data.caption_ids[query]]).tolist()
        assert [nearness[i] for i in found] == sorted(nearness)[:-6:-1]

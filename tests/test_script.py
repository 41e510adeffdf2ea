"""The script as a user runs it: a copy with edited constants."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    edited_script,
    make_dataset,
    quick,
    read_metrics,
    read_skipped,
    run_inside,
    run_script,
    same_weights,
    tiny_model,
    weights,
)

import indofashion_clip as ic

FIELDS = {
    "epoch",
    "split",
    "loss",
    "accuracy",
    "macro_f1",
    "image_to_text_r1",
    "image_to_text_r5",
    "image_to_text_r10",
    "text_to_image_r1",
    "text_to_image_r5",
    "text_to_image_r10",
    "seconds",
    "pairs_per_second",
}


def test_the_outputs(tmp_path, dataset):
    output = run_script(tmp_path, inside=False, **quick(dataset))
    lines = read_metrics(tmp_path)
    assert [(line["epoch"], line["split"]) for line in lines[:-1]] == [(0, "val"), (1, "val"), (2, "val")]
    assert lines[-1]["split"] == "test"
    for line in lines:
        assert FIELDS <= line.keys() and all(
            0 <= line[name] <= 1 for name in FIELDS if "_r" in name[-4:] or name in ("accuracy", "macro_f1")
        )
    best = max(
        lines[:-1], key=lambda line: line["accuracy"] + line["image_to_text_r5"] + line["text_to_image_r5"]
    )
    assert lines[-1]["epoch"] == best["epoch"]
    assert read_skipped(tmp_path) == []
    state = weights(tmp_path / "outputs/best.pt")
    assert state.keys() == tiny_model().state_dict().keys()
    assert all(w.dtype == torch.float32 for w in state.values())
    assert "Traceback" not in output and "Warning" not in output
    assert 'clip.load("outputs/best.pt")' in output.splitlines()[-1]
    assert "precision" in output and "mojaris" not in output and "blouse" in output


def test_importing_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    edited_script(tmp_path)
    import runpy

    runpy.run_path("indofashion_clip.py", run_name="not_main")
    assert capsys.readouterr().out == "" and [p.name for p in tmp_path.iterdir()] == ["indofashion_clip.py"]


def test_the_same_seed_gives_the_same_weights(tmp_path):
    """On batches large enough that torch shares their work out over threads."""
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run_script(tmp_path / name, **quick(ROOT / "data/sample", SEED=seed, BATCH_SIZE=96, NUM_EPOCHS=3))
    one, two, other = (tmp_path / name / "outputs/last.pt" for name in ("one", "two", "other"))
    one, two, other = (torch.load(path, weights_only=True)["model"] for path in (one, two, other))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_decoding_on_the_fly_is_the_same_training(tmp_path, dataset):
    run_script(tmp_path / "cached", **quick(dataset))
    run_script(tmp_path / "decoded", **quick(dataset, CACHE_PATH=""))
    assert same_weights(tmp_path / "cached/outputs/best.pt", tmp_path / "decoded/outputs/best.pt")
    assert not (tmp_path / "decoded/data").exists()


def test_weights_of_one_run_start_another(tmp_path, dataset):
    run_script(tmp_path / "first", **quick(dataset))
    best = str(tmp_path / "first/outputs/best.pt")
    run_script(tmp_path / "second", **quick(dataset, MODEL=best, NUM_EPOCHS=1))
    first, second = (
        read_metrics(tmp_path / "first", times=False),
        read_metrics(tmp_path / "second", times=False),
    )
    before = second[0]
    [same] = [line for line in first if line["epoch"] == first[-1]["epoch"] and line["split"] == "val"]
    assert before["accuracy"] == same["accuracy"] and before["loss"] == pytest.approx(same["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_weights(tmp_path, dataset):
    output = run_script(tmp_path, code=1, **quick(dataset, LR=1e30))
    assert "the loss is nan in step" in output and "lower LR" in output
    for name in ("best.pt", "last.pt"):
        state = weights(tmp_path / "outputs" / name)
        assert all(w.isfinite().all() for w in state.get("model", state).values())


def test_one_class_and_one_picture(tmp_path):
    make_dataset(tmp_path / "data", train=1, val=1, test=1)
    run_script(tmp_path, **quick(tmp_path / "data"))
    assert read_metrics(tmp_path)[-1]["accuracy"] == 1.0


def test_pictures_that_vanish_during_a_run(tmp_path, dataset, settings):
    """Without a cache, their rows are listed, and the next rows stand for them."""
    for name, value in quick(dataset, CACHE_PATH="", OUTPUT_PATH=str(tmp_path)).items():
        setattr(settings, name, value)
    data, _ = ic.load_split("train", str(dataset / "train_data.json"), settings, 64, 0)
    (tmp_path / "skipped.jsonl").write_text("")
    (dataset / data.records[3].image_path).unlink()
    (dataset / data.records[4].image_path).write_bytes(b"changed")
    pixels, tokens, row = data[3]
    assert row == 5 and torch.equal(pixels, data[5][0]) and torch.equal(tokens, data[5][1])
    skipped = [json.loads(line) for line in open(tmp_path / "skipped.jsonl")]
    assert [s["line"] for s in skipped] == [4, 5] and skipped[0]["split"] == "train"


def test_the_bundled_sample_is_learned(tmp_path):
    """The README's first command, without its set-up."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    output, code = run_inside(edited_script(tmp_path))
    assert code == 0, output
    lines = [json.loads(line) for line in open(tmp_path / "outputs/sample/metrics.jsonl")]
    assert "kaggle" in output and lines[0]["accuracy"] <= 0.2
    assert lines[-1]["accuracy"] >= 0.85 and lines[-1]["text_to_image_r5"] >= 0.5


def test_a_path_that_the_user_set_is_never_replaced_by_the_sample(tmp_path):
    output, code = run_inside(edited_script(tmp_path, IMAGE_PATH="my/pictures"))
    assert code == 1 and "my/pictures" in output and "sample" not in output


def test_what_is_going_to_happen_is_said_first(tmp_path, dataset):
    output = run_script(tmp_path, **quick(dataset, BATCH_SIZE=4, CHUNK_SIZE=3))
    assert "24 rows used, 0 left out" in output and "class prompts for missing titles" in output
    assert "5 classes; 2 epochs of 6 steps of 4 pairs, encoded 3 at a time; output in outputs" in output
    lines = output.splitlines()
    assert [lines[i - 1].split()[:2] for i, line in enumerate(lines) if line.endswith("to go")] == [["0", "val"]]


def test_the_time_left_is_that_of_the_whole_run(capsys):
    shown = []
    run = SimpleNamespace(
        settings=SimpleNamespace(NUM_EPOCHS=3, BATCH_SIZE=8),
        epoch=2,
        steps=10,
        step=4,
        evaluation_seconds=5.0,
        losses=[1.5],
        pace_said=False,
    )
    bar = SimpleNamespace(set_postfix_str=shown.append)
    for _ in range(2):
        ic.show_pace(run, bar, 20.0)  # 16 steps and 2 evaluations to come
    assert shown == ["loss 1.500, 0.4 pairs/s, 05:30 left"] * 2
    assert capsys.readouterr().out == "       0.4 pairs/s, 05:30 to go\n"

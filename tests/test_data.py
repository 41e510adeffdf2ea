"""Rows, captions, pictures, their cache and batches: what they become, and all that can go bad."""

import functools
import json
import os
import random
import shutil
import sys
import time
import tracemalloc
from unittest.mock import Mock

import clip
import pytest
import torch
from conftest import quick, read_lines, tiny_model, write_lines
from PIL import Image

import indofashion_clip as ic

FILE = "cache/train.u8"


@pytest.fixture
def place(dataset, tmp_path, monkeypatch):
    """A small dataset that the constants name, in a folder that the other paths are relative to."""
    monkeypatch.chdir(tmp_path)
    for name, value in quick(dataset, CACHE_PATH="cache", OUTPUT_PATH="outputs").items():
        monkeypatch.setattr(ic, name, value)
    ic.check_constants()
    return dataset


# ---- Rows ----
def row(title="Women's Silk Saree", path="images/train/0.jpeg", label="saree"):
    return {"image_path": path, "brand": "N/A", "product_title": title, "class_label": label}


@pytest.mark.parametrize(
    "title, caption",
    [
        ("Navy Blue &amp; Gold-Toned  Silk\tSaree ", "Navy Blue & Gold-Toned Silk Saree"),
        ("Aambal® Women’s Saree" + "e" * 60, "Aambal® Women’s Saree" + "e" * 60),
        ("bad \ud800 half", "bad half"),
        *((none, None) for none in ("N/A", "n/a", "NA", "", " \u3000", "&nbsp;", None, 7, ["Red"])),
    ],
)
def test_captions_are_cleaned_and_without_a_title_a_class_prompt(tmp_path, title, caption):
    write_lines(tmp_path / "rows.json", [row(title)])
    [record], skipped = ic.read_records(tmp_path / "rows.json")
    assert record.caption == (caption or "a photo of a saree") and not skipped
    assert record.titled == bool(caption)


def test_class_names_are_words():
    assert ic.class_prompts("kurta_men")[0] == "a photo of a men's kurta"
    assert ic.class_prompts("t_shirt") == [p.replace("{}", "t shirt") for p in ic.PROMPTS]


def test_unusable_rows_are_named_by_line_and_reason(tmp_path):
    bad = [row(path=None), row(path=[]), row(label=""), row(label={}), row(label="\ud800"), [1]]
    texts = [json.dumps(row()), "{not json", "[" * 100_000, "", *map(json.dumps, [*bad, row()])]
    (tmp_path / "rows.json").write_text("\ufeff" + "\r\n".join(texts), encoding="utf-8")
    records, skipped = ic.read_records(tmp_path / "rows.json")
    assert [record.line for record in records] == [1, 11]
    assert [line for line, _ in skipped] == [2, 3, 5, 6, 7, 8, 9, 10]
    assert all("image_path" in reason and "class_label" in reason for _, reason in skipped)


def numbered(captions, titled=lambda i: True):
    """A dataset of two classes whose pictures show the number of their row."""
    rows = [(caption, ("gowns", "saree")[i % 2], titled(i)) for i, caption in enumerate(captions)]
    records = [ic.Record(i + 1, i, "x", *about) for i, about in enumerate(rows)]
    pixels = torch.arange(len(records), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    return ic.FashionDataset(records, pixels, ["gowns", "saree"])


def test_tokens_are_clips_own_of_each_caption_once():
    captions = ["Blue Saree", "word " * 75, "word " * 76, "blue SAREE", "Blue Saree", "साड़ी"]
    captions.append("CafÃ© Saree")  # UTF-8 read as Latin-1: clip reads it as Café Saree
    data = numbered(captions)
    assert torch.equal(data[torch.arange(7)][1], clip.tokenize(captions, truncate=True).int())
    assert data.num_captions == 5 and data.caption_ids.tolist() == [0, 1, 2, 0, 0, 3, 4]
    assert len(data.tokens) == 5 + 2 * len(ic.PROMPTS)


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="it counts there")
def test_many_captions_open_no_files():
    before = len(os.listdir("/proc/self/fd"))
    data = numbered([f"saree number {i}" for i in range(5000)])
    assert data.num_captions == 5000 and len(os.listdir("/proc/self/fd")) == before


# ---- Pictures ----
def photo(size):
    colors = random.Random(0).randbytes(240)
    return Image.frombytes("RGB", (8, 10), colors).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(320, 420), (500, 300), (50, 40), (224, 224), (224, 1000)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_normalised_are_clips_preprocessing_bit_for_bit(tmp_path, size, mode):
    photo(size).convert(mode).save(tmp_path / "a.png")
    pixels, model = ic.load_image(tmp_path / "a.png", 224), tiny_model()
    expected = clip.clip._transform(224)(Image.open(tmp_path / "a.png"))
    assert torch.equal((pixels.float().div(255) - model.mean) / model.std, expected)


WIDE, GREY, FADING = photo((160, 100)), photo((100, 100)).convert("L"), photo((100, 100))
FADING.putalpha(Image.linear_gradient("L").resize((100, 100)))
ON_WHITE = Image.alpha_composite(Image.new("RGBA", (100, 100), "white"), FADING)
DEEP = Image.frombytes("I;16", GREY.size, bytes(byte for byte in GREY.tobytes() for _ in "16"))
(TURNED := Image.Exif())[0x0112] = 6  # the camera was turned: show it turned back by 90 degrees


@pytest.mark.parametrize(
    "name, saved, how, shown, tolerance",
    [
        ("cmyk.jpeg", WIDE.convert("CMYK"), {"quality": 100, "subsampling": 0}, WIDE, 8),
        ("palette.png", WIDE.quantize(256), {}, WIDE.quantize(256), 0),
        ("deep.png", DEEP, {}, GREY, 1),
        ("fading.png", FADING, {}, ON_WHITE, 0),
        ("turned.jpeg", WIDE, {"exif": TURNED}, WIDE.transpose(Image.Transpose.ROTATE_270), 3),
    ],
)
def test_pictures_load_as_a_viewer_shows_them(tmp_path, name, saved, how, shown, tolerance):
    saved.save(tmp_path / name, **how)
    shown.convert("RGB").save(tmp_path / "shown.png")
    pixels, expected = (ic.load_image(tmp_path / file, 64).float() for file in (name, "shown.png"))
    assert (pixels - expected).abs().mean() <= tolerance


def test_bad_pictures_are_left_out_and_listed_and_odd_paths_work(place, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # leave a GPU as it is
    ic.prepare_machine()  # a large picture is a mere warning otherwise
    rows = read_lines(place / "train_data.json")
    good = (place / rows[0]["image_path"]).read_bytes()
    contents = {"empty": b"", "text": b"<html>", "cut": good[:-500], "C:x": good, "../out": good}
    for name, content in contents.items():
        (place / f"{name}.jpg").write_bytes(content)
    for name, *size in (("bomb", 20_000, 20_000), ("large", 10_000, 10_000), ("strip", 2, 400)):
        Image.new("1", size).save(place / f"{name}.png")
    bad = {"empty.jpg": "cannot identify", "text.jpg": "cannot identify", "cut.jpg": "truncated"}
    bad |= {"bomb.png": "Bomb", "large.png": "Bomb", "strip.png": "strip"}
    nowhere = ("no.jpg", "", ".", "images", "a\0.jpg", "\ud800.jpg", "../../no.jpg", "/no.jpg")
    bad |= dict.fromkeys(nowhere, "no such file")
    odd = ["C:x.jpg", "images/../C:x.jpg", "../out.jpg", str(place.parent / "out.jpg")]
    odd += [row["image_path"] for row in rows[: len(bad) - len(odd)]]  # half of all is good
    write_lines(place / "train_data.json", [row(path=path) for path in [*bad, *odd]])
    expected = torch.stack([ic.load_image(place / path, 64) for path in odd])
    for process in (0, 1):  # of a machine: the second has all from the cache
        monkeypatch.setattr(ic, "LOCAL_RANK", process)
        train = ic.load_splits(64)["train"]
        assert [record.image_path for record in train.records] == odd
        assert torch.equal(train[torch.arange(len(odd))][0], expected)
        skipped = read_lines("outputs/skipped.jsonl")
        lines = [("train", line) for line in range(1, len(bad) + 1)]
        assert [(row["split"], row["line"]) for row in skipped] == lines
        assert all(why in row["reason"] for why, row in zip(bad.values(), skipped, strict=True))
        shutil.rmtree(place / "images", ignore_errors=True)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_damaged_pictures_are_decoded_or_the_reason_is_told(tmp_path, kind):
    photo((40, 48)).save(path := tmp_path / "damaged", kind)
    rng, whole, reasons = random.Random(kind), path.read_bytes(), set()
    for i in range(200):
        damaged = bytearray(whole[: rng.randrange(len(whole)) if i % 3 == 0 else None])
        for _ in range(i % 20 if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        pixels, reason = ic.decode(str(path), 32)
        assert pixels.shape == (3, 32, 32) and (reason is None or str(path) in reason)
        reasons.add(reason)
    assert len(reasons) > 1 and None in reasons


# ---- The cache ----
@pytest.fixture
def paths(place):
    return sorted(str(path) for path in (place / "images/train").iterdir())


def cached(paths):
    """The pictures' pixels by way of the cache."""
    ic.make_cache(FILE, paths, 64)
    return ic.open_cache(FILE, (len(paths), 3, 64, 64))[0]


def is_right(paths):
    """Whether the cache gives these pictures, and its folder holds nothing else."""
    expected = torch.stack([ic.load_image(path, 64) for path in paths])
    return torch.equal(cached(paths), expected) and os.listdir("cache") == ["train.u8"]


def test_the_cache_is_made_again_when_and_only_when_something_changed(paths, monkeypatch):
    def grow():
        with open(paths[3], "ab") as file:
            file.write(b"more")
        os.utime(paths[3], ns=(0, 0))  # as old as before

    def swap():
        paths[0] = shutil.copy2(paths[0], "as large and as old.jpeg")

    monkeypatch.setattr(ic, "load_image", spy := Mock(wraps=ic.load_image))
    age = functools.partial(os.utime, paths[3], ns=(0, 0))
    for change in (lambda: None, age, grow, paths.reverse, paths.pop, swap):
        change()
        spy.reset_mock()
        for _ in "12":
            cached(paths)
            assert spy.call_count == len(paths), change
    assert is_right(paths)


PIXELS = 24 * 3 * 64**2  # bytes; 64 that tell what they are of follow, and "[]"


@pytest.mark.parametrize("size", [0, 1000, PIXELS, PIXELS + 63, PIXELS + 65, 2**32])
def test_a_file_cut_off_or_larger_is_made_again_without_reading_it_whole(paths, size):
    cached(paths[::-1] if size > PIXELS + 65 else paths)
    os.truncate(FILE, size)  # larger: sparse, it takes no disk
    tracemalloc.start()
    assert is_right(paths) and tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()


def at_the_last(do, paths, monkeypatch):
    """Let do() happen whenever the last of the pictures is decoded."""
    load = ic.load_image
    monkeypatch.setattr(ic, "load_image", lambda p, r: (p == paths[-1] and do(), load(p, r))[1])


def test_of_two_that_write_at_once_the_first_to_finish_is_kept(paths, monkeypatch):
    def finish():
        during.undo()
        cached(paths)
        seen.append((len(os.listdir("cache")), os.stat(FILE).st_ino))

    seen = []
    with monkeypatch.context() as during:
        at_the_last(finish, paths, during)
        cached(paths)
    assert seen == [(2, os.stat(FILE).st_ino)]  # 2: each had a file of its own
    assert is_right(paths)


def test_nothing_is_left_by_a_signal_a_lack_of_disk_or_after_an_hour_a_kill(paths, monkeypatch):
    others = ["another program's.tmp", "train-64.u8.3500.tmp"]
    for name in (*others, "train-64.u8.3700.tmp"):
        open(f"cache/{name}", "x").close()
        age = 3500 if "3500" in name else 3700
        os.utime(f"cache/{name}", (time.time() - age,) * 2)
    at_the_last(lambda: sys.exit(143), paths, monkeypatch)  # as at a signal
    for words in ("143", "CACHE_PATH"):
        with pytest.raises(SystemExit, match=words):
            cached(paths)
        assert sorted(os.listdir("cache")) == others
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Mock(free=10))


# ---- Splits ----
@pytest.mark.parametrize("count, held_out", [(60, 3), (24, 1), (2, 1)])
def test_without_a_val_file_a_seeded_twentieth_of_train_is_val(place, monkeypatch, count, held_out):
    def lines(seed):
        monkeypatch.setattr(ic, "SEED", seed)
        splits = ic.load_splits(64)
        assert list(splits) == ["train", "val"]
        return [[record.line for record in data.records] for data in splits.values()]

    monkeypatch.setattr(ic, "JSON_PATH", str(place / "train_data.json"))  # {split} is not in it
    write_lines(place / "train_data.json", (read_lines(ic.JSON_PATH) * 3)[:count])
    train, val = lines(0)
    assert len(val) == held_out and sorted(train + val) == list(range(1, count + 1))
    assert lines(0) == [train, val] and any(lines(seed)[1] != val for seed in range(1, 9))


@pytest.mark.parametrize(
    "count, good, words",
    [(24, 11, "ine 12: .*.jpeg"), (24, 0, "ine 1: "), (0, 0, "no line"), (1, 1, "one usable row")],
)
def test_too_few_usable_rows_end_with_one_line(place, count, good, words):
    (place / "val_data.json").unlink()
    rows = read_lines(place / "train_data.json")[:count]
    write_lines(place / "train_data.json", rows)
    for wrong in rows[good:]:
        (place / wrong["image_path"]).unlink()
    with pytest.raises(SystemExit, match=f"_data.json: .*{words}") as stop:
        ic.load_splits(64)
    assert "\n" not in str(stop.value)


def test_pictures_that_may_be_read_at_last_are(place, monkeypatch):
    """As after chmod, which leaves a file's size and time alone."""
    with monkeypatch.context() as denied:
        denied.setattr(ic, "load_image", Mock(side_effect=PermissionError))
        with pytest.raises(SystemExit, match="most rows are bad.*PermissionError"):
            ic.load_splits(64)
    assert len(ic.load_splits(64)["train"]) == 24


# ---- Batches ----
def rows_of(batch):
    return batch.pixels[:, 0, 0, 0].tolist()


def test_batches_are_full_of_distinct_rows_and_follow_from_seed_and_epoch(monkeypatch):
    data = numbered([f"saree {i}" for i in range(23)])
    epochs = [list(ic.epoch_batches(data, epoch, 5)) for epoch in range(9)]
    for batches in epochs:
        assert [len(batch.pixels) for batch in batches] == [5] * 4
        assert len(set(sum(map(rows_of, batches), []))) == 20
    assert len(set(sum(map(rows_of, sum(epochs, [])), []))) == 23  # who waited had a turn
    monkeypatch.setattr(ic, "SEED", 1)
    for other in (epochs[2][0], next(ic.epoch_batches(data, 1, 5))):
        assert rows_of(other) != rows_of(epochs[1][0])
        assert not torch.equal(other.draws, epochs[1][0].draws)


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_share_of_the_titles_and_all_that_is_untitled_becomes_a_class_prompt(monkeypatch, share):
    monkeypatch.setattr(ic, "CLASS_PROMPT_SHARE", share)
    data = numbered([f"saree {i}" for i in range(240)], titled=lambda i: i % 3 > 0)
    replaced = []
    for epoch in range(20):
        [batch] = ic.epoch_batches(data, epoch, 240)
        rows, texts = torch.tensor(rows_of(batch)), batch.tokens[batch.inverse]
        own = (texts == data[rows][1]).all(1)
        prompts = (data.tokens[data.prompt_ids[data.labels[rows]]] == texts[:, None]).all(2)
        assert torch.equal(prompts.sum(1), (~own).long()) and not own[~data.titled[rows]].any()
        assert prompts.any(0).all()  # each of PROMPTS has its turn
        replaced.append((~own)[data.titled[rows]].double())
    bound = 0.025 if 0 < share < 1 else 0
    assert torch.cat(replaced).mean().item() == pytest.approx(share, abs=bound)

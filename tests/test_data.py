"""Rows, captions, images, their cache and batches: what becomes of them, and what can go wrong."""

import csv
import functools
import io
import json
import os
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import clip
import pytest
import torch
from conftest import quick, read_lines, run_script, tiny_model, toy_dataset, write_lines
from PIL import Image, features
from torch.utils.data import DataLoader

import indofashion_clip as ic


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


def read(folder, rows):
    write_lines(folder / "rows.json", rows)
    return ic.read_examples(folder / "rows.json")


@pytest.mark.parametrize(
    "title, captions",
    [
        ("Navy Blue &amp; Gold-Toned  Silk\tSaree ", ("Navy Blue & Gold-Toned Silk Saree",)),
        ("Aambal® Women’s Saree" + "e" * 60, ("Aambal® Women’s Saree" + "e" * 60,)),
        ("bad \ud800 half", ("bad half",)),
        (7, ("7",)),
        (["Red", "N/A", "Silk &amp; gold", "Red"], ("Red", "Silk & gold")),
        *((no, ()) for no in ("N/A", "n/a", "NA", "", " \u3000", "&nbsp;", None, [], {"a": 1})),
        *((no, ()) for no in ("nan", "NaN", float("nan"), "None", "NULL", "#N/A", "-", ["-"])),
    ],
)
def test_titles_are_cleaned_and_some_are_none(tmp_path, title, captions):
    [example], skipped, columns = read(tmp_path, [row(title)])
    assert example.captions == captions and not skipped and list(columns) == list(row())


def test_rows_of_one_image_are_one_example_with_all_captions(tmp_path):
    titles = ["a", "b", ["c", "d"], "a", "N/A"]
    rows = [row(title, path) for title in titles for path in ("1.jpg", "2.jpg")]
    rows[3] |= {"image_path": ".\\2.jpg".removeprefix(".\\"), "product": 501}
    examples, skipped, _ = read(tmp_path, rows)
    assert [(e.lines, e.image_path) for e in examples] == [
        ((1, 3, 5, 7, 9), "1.jpg"),
        ((2, 4, 6, 8, 10), "2.jpg"),
    ]
    assert [e.captions for e in examples] == [("a", "b", "c", "d")] * 2 and not skipped
    assert [e.products for e in examples] == [(), ("501",)]


def test_rows_of_one_image_with_different_classes_are_skipped_by_name(tmp_path):
    rows = [row(label="saree"), row(path="b.jpg"), row(label="gowns"), row(label=None)]
    [example], skipped, _ = read(tmp_path, rows)
    assert example.image_path == "b.jpg" and [line for line, _ in skipped] == [1, 3, 4]
    reason = "images/train/0.jpeg has several classes: saree, gowns"
    assert all(found == reason for _, found in skipped)


def test_labels_that_clip_reads_alike_are_one_class(tmp_path):
    labels = ["T-Shirt", "t-shirt ", "women_dress", "Women Dress", 3, "3", "N/A", None]
    examples, *_ = read(tmp_path, [row("x", f"{i}.jpg", label) for i, label in enumerate(labels)])
    names = [example.class_name for example in examples]
    assert names == ["t-shirt"] * 2 + ["women dress"] * 2 + ["3"] * 2 + [""] * 2
    assert ic.find_classes(examples) == ["3", "t-shirt", "women dress"]
    assert ic.find_classes(examples[:2]) == []


def test_class_names_are_words_and_two_classes_have_not_the_same(monkeypatch):
    assert ic.class_prompts("kurta men")[0] == "a photo of a men's kurta"
    assert ic.class_prompts("t shirt") == [p.replace("{}", "t shirt") for p in ic.PROMPTS]
    monkeypatch.setattr(ic, "CLASS_NAMES", {"gowns": "Saree"})
    examples = toy_dataset(["gowns", "saree"], "ab").examples
    with pytest.raises(SystemExit, match="CLASS_NAMES.*'gowns'.*'saree'"):
        ic.find_classes(examples)


def test_unusable_rows_are_named_by_line_and_reason(tmp_path):
    bad = [row(path=None), row(path=[]), [1], row(path=" ")]
    texts = [json.dumps(row()), "{not json", "[" * 100_000, "", *map(json.dumps, bad)]
    texts.append(json.dumps(row(path="b.jpg ")))
    (tmp_path / "rows.json").write_text("\ufeff" + "\r\n".join(texts), encoding="utf-8")
    examples, skipped, _ = ic.read_examples(tmp_path / "rows.json")
    assert [example.lines for example in examples] == [(1,), (9,)]
    assert examples[1].image_path == "b.jpg"
    assert skipped == [
        (2, "not a JSON object"),
        (5, "no image_path"),
        (6, "no image_path"),
        (7, "not a JSON object"),
        (8, "no image_path"),
    ]


# ---- Files of rows ----
ROWS = [
    row('Red, "fine" saree', "a.jpg"),
    row("साड़ी & gold; silk", "b.jpg"),
    row("Two\nlines", "c.jpg", "kurta"),
]


def as_csv(delimiter, first="", header=lambda name: name):
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([[header(name) for name in ROWS[0]], *(row.values() for row in ROWS)])
    return first + file.getvalue()


TEXTS = {
    "lines": "\n".join(json.dumps(row) for row in ROWS),
    "lines of letters": "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n",
    "array": json.dumps(ROWS),
    "indented": "\n" + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "comma": as_csv(","),
    "semicolon": as_csv(";", header=str.upper),
    "tab": as_csv("\t", header=lambda name: f" {name.title().replace('_', ' ')}"),
    "Excel's": as_csv(";", first="sep=;\r\n"),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("kind", TEXTS)
def test_all_kinds_of_files_give_the_same_examples(tmp_path, kind, encoding):
    (tmp_path / "rows").write_text(TEXTS[kind], encoding=encoding, newline="")
    examples, skipped, columns = ic.read_examples(tmp_path / "rows")
    expected, *_ = read(tmp_path, ROWS)
    assert [e._replace(lines=()) for e in examples] == [e._replace(lines=()) for e in expected]
    assert not skipped and list(columns) == list(ROWS[0])
    lines = {"indented": [3, 9, 15], "array": [1] * 3, "comma": [2, 3, 5], "Excel's": [3, 4, 6]}
    assert kind not in lines or [e.lines for e in examples] == [(line,) for line in lines[kind]]


@pytest.mark.parametrize("encoding", ["gbk", "cp1252", "latin-1"])
def test_other_bytes_stop_with_their_line_and_what_to_do(tmp_path, encoding):
    letters = "红色" if encoding == "gbk" else "Müller"
    text = f"image_path,product_title\na.jpg,plain\nb.jpg,{letters}\n"
    (tmp_path / "rows.csv").write_bytes(text.encode(encoding))
    with pytest.raises(SystemExit, match=r"rows.csv, line 3: not UTF-8. Save the file as UTF-8"):
        ic.read_examples(tmp_path / "rows.csv")


def test_a_row_of_too_many_cells_is_skipped_and_told(tmp_path):
    text = "image_path,product_title\na.jpg,red saree\nb.jpg,red, saree\n,,\nc.jpg,x,,\n"
    (tmp_path / "rows.csv").write_text(text)
    examples, skipped, _ = ic.read_examples(tmp_path / "rows.csv")
    assert [example.image_path for example in examples] == ["a.jpg", "c.jpg"]
    assert skipped == [(3, "3 cells for 2 columns")]


def test_without_an_image_path_the_columns_are_named(tmp_path):
    (tmp_path / "rows.csv").write_text("picture;titel\na.jpg;x\n")
    with pytest.raises(SystemExit, match="no row has an image_path.*columns are picture, titel"):
        ic.read_examples(tmp_path / "rows.csv")


def test_a_broken_object_costs_itself_not_the_rest_of_an_array_on_one_line(tmp_path):
    texts = [json.dumps(row(path=f"{i}.jpg")) for i in range(4)]
    texts[1] = texts[1].replace(": ", " ", 1)
    (tmp_path / "rows.json").write_text(f"[{', '.join(texts)}]")
    examples, skipped, _ = ic.read_examples(tmp_path / "rows.json")
    assert [example.image_path for example in examples] == ["0.jpg", "2.jpg", "3.jpg"]
    assert skipped == [(1, "not a JSON object")]


def test_a_wrong_json_path_is_named_not_the_image_path_made_of_it(tmp_path):
    output = run_script(tmp_path, code=1, JSON_PATH="nowhere/rows.csv")
    assert "JSON_PATH is 'nowhere/rows.csv'; it must be a file that exists" in output


# ---- Texts ----
def numbered(captions):
    """A dataset of two classes whose images show their number."""
    labels = [("gowns", "saree")[i % 2] for i in range(len(captions))]
    pixels = torch.arange(len(captions), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    return toy_dataset(labels, captions, pixels, ["gowns", "saree"])


def test_tokens_are_clips_own_of_each_caption_once():
    captions = ["Blue Saree", "word " * 75, "word " * 76, "blue SAREE", "Blue Saree", "साड़ी"]
    captions.append("CafÃ© Saree")  # UTF-8 read as Latin-1: clip reads it as Café Saree
    data = numbered([*captions, "Café Saree"])
    tokens = clip.tokenize(captions, truncate=True).int()
    assert torch.equal(data[torch.arange(7)][1], tokens)
    assert data.num_captions == 4 and data.text_ids.tolist() == [0, 1, 1, 0, 0, 2, 3, 3]
    assert len(data.tokens) == 4 + 2 * len(ic.PROMPTS)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_dataset_is_one(workers):
    data = numbered([f"saree {i}" for i in range(10)])
    pixels, tokens = data[3]
    assert pixels.shape == (3, 1, 1) and tokens.shape == (77,) and pixels[0, 0, 0] == 3
    for index, numbers in (([1, 2], [1, 2]), (slice(2, 9, 3), [2, 5, 8]), (torch.tensor([4]), [4])):
        pixels, tokens = data[index]
        assert pixels[:, 0, 0, 0].tolist() == numbers
        assert torch.equal(tokens, clip.tokenize([f"saree {i}" for i in numbers]).int())
    with pytest.raises(IndexError):
        data[10]
    batches = list(DataLoader(data, 4, num_workers=workers))
    assert torch.equal(torch.cat([pixels for pixels, _ in batches]), data[:][0])
    assert torch.equal(torch.cat([tokens for _, tokens in batches]), data[:][1])


# ---- Images ----
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


def large(exif=None):
    """A JPEG of 900 × 1,401 pixels, smooth as enlarged photographs are."""
    colors = random.Random(1).randbytes(3 * 9 * 14)
    image = Image.frombytes("RGB", (9, 14), colors).resize((900, 1401), Image.Resampling.BICUBIC)
    image.save(file := io.BytesIO(), "JPEG", quality=95, **({"exif": exif} if exif else {}))
    return file.getvalue()


@pytest.mark.parametrize("exif", [None, TURNED])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch, exif):
    (tmp_path / "a.jpg").write_bytes(large(exif))
    sizes, draft = [], Image.Image.draft
    found = ic.load_image(tmp_path / "a.jpg", 64).float()
    kind = type(Image.open(tmp_path / "a.jpg"))
    monkeypatch.setattr(kind, "draft", lambda self, *how: sizes.append(how) or draft(self, *how))
    whole = ic.load_image(tmp_path / "a.jpg", 64).float()  # Image's own draft does nothing
    assert sizes and (found - whole).abs().mean() < 2 and (found - whole).abs().max() < 20
    assert found.std() > 30


@pytest.mark.parametrize("kind, how", [("JPEG", {"dpi": (72, 72)}), ("JPEG", {}), ("PNG", {})])
def test_a_broken_exif_block_is_no_reason_to_skip(tmp_path, kind, how):
    photo((80, 80)).save(tmp_path / "a", kind, exif=b"Exif\0\0garbage", **how)
    photo((80, 80)).save(tmp_path / "b", kind)
    assert torch.equal(ic.load_image(tmp_path / "a", 64), ic.load_image(tmp_path / "b", 64))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
def test_avif_is_read_whatever_it_is_called(tmp_path):
    photo((80, 80)).save(tmp_path / "a.jpg", "AVIF", quality=100)
    photo((80, 80)).save(tmp_path / "b.png")
    pair = [ic.load_image(tmp_path / name, 64).float() for name in ("a.jpg", "b.png")]
    assert (pair[0] - pair[1]).abs().mean() < 3


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
    bad |= dict.fromkeys(nowhere, "no such file") | {"": "no image_path"}
    odd = ["C:x.jpg", "images/../C:x.jpg", "../out.jpg", str(place.parent / "out.jpg")]
    odd += [row["image_path"] for row in rows[: len(bad) - len(odd)]]  # half of all is good
    write_lines(place / "train_data.json", [row(path=path) for path in [*bad, *odd]])
    expected = torch.stack([ic.load_image(place / path, 64) for path in odd])
    for _process in (0, 1):  # of a machine: the second has all from the cache
        train = ic.load_splits(64)["train"]
        assert [example.image_path for example in train.examples] == odd
        assert torch.equal(train[torch.arange(len(odd))][0], expected)
        skipped = read_lines("outputs/skipped.jsonl")
        lines = [("train", line) for line in range(1, len(bad) + 1)]
        assert [(row["split"], row["line"]) for row in skipped] == lines
        assert all(why in row["reason"] for why, row in zip(bad.values(), skipped, strict=True))
        monkeypatch.setattr(ic, "load_image", None)


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
    """The images' pixels by way of the cache."""
    return ic.open_cache("train", paths, 64)[0]


def is_right(paths):
    return torch.equal(cached(paths), torch.stack([ic.load_image(path, 64) for path in paths]))


def files():
    return sorted(name for name in os.listdir("cache") if not name.endswith(".lock"))


def test_images_are_decoded_again_when_and_only_when_something_changed(paths, monkeypatch):
    def grow():
        with open(paths[3], "ab") as file:
            file.write(b"more")
        os.utime(paths[3], ns=(0, 0))  # as old as before

    def swap():
        paths[0] = shutil.copy2(paths[0], "as large and as old.jpeg")

    monkeypatch.setattr(ic, "load_image", spy := Mock(wraps=ic.load_image))
    age = functools.partial(os.utime, paths[3], ns=(0, 0))
    upgrade = functools.partial(monkeypatch.setattr, ic.Image, "__version__", "99.0")
    changes = (lambda: None, age, grow, paths.reverse, paths.pop, swap, upgrade)
    for number, change in enumerate(changes, 1):
        change()
        spy.reset_mock()
        for _ in "12":
            cached(paths)
            assert spy.call_count == len(paths), change
        assert len(files()) == number
    assert is_right(paths)


def test_of_two_at_once_one_decodes_and_the_other_waits(paths, monkeypatch):
    monkeypatch.setattr(ic, "load_image", spy := Mock(wraps=ic.load_image))
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(cached, [paths, paths])
    assert spy.call_count == len(paths) and torch.equal(one, other)
    assert len(files()) == 1 and is_right(paths)


def test_nothing_half_written_is_left_by_a_signal_or_taken_after_a_kill(paths, monkeypatch):
    cached(paths)
    [name] = files()
    os.replace(f"cache/{name}", f"cache/{name}.tmp")
    os.truncate(f"cache/{name}.tmp", 1000)  # what a kill leaves
    load = ic.load_image
    last = lambda path, size: sys.exit(143) if path == paths[-1] else load(path, size)  # noqa: E731
    with monkeypatch.context() as during:
        during.setattr(ic, "load_image", last)
        with pytest.raises(SystemExit, match="143"):
            cached(paths)
    assert files() == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Mock(free=10))
    with pytest.raises(SystemExit, match="CACHE_PATH: cache needs .* GB, has 0.0 free"):
        cached(paths)
    monkeypatch.undo()
    assert is_right(paths)


# ---- Splits ----
def made(count, products=lambda i: ()):
    return [ic.Example((i,), str(i), ("x",), "", tuple(products(i))) for i in range(count)]


@pytest.mark.parametrize("count, held_out", [(6000, 300), (1000, 100), (60, 12), (4, 1), (2, 1)])
def test_a_part_of_train_is_held_out_for_val(monkeypatch, count, held_out):
    found = ic.hold_out(made(count))
    assert (
        len(found) == held_out and found == ic.hold_out(made(count)) and found < set(range(count))
    )
    monkeypatch.setattr(ic, "SEED", 1)
    assert count < 10 or found != ic.hold_out(made(count))


def test_no_product_is_on_both_sides():
    """Products of three images; every tenth image belongs to the next product as well."""
    examples = made(300, lambda i: [str(i // 3)] + ([str(i // 3 + 1)] if i % 10 == 0 else []))
    held_out = ic.hold_out(examples)
    sides = [set(), set()]
    for i, example in enumerate(examples):
        sides[i in held_out].update(example.products)
    assert sides[0].isdisjoint(sides[1]) and 60 <= len(held_out) < 90


def test_a_held_out_val_shares_no_image_with_train(place, monkeypatch):
    rows = read_lines(place / "train_data.json")
    many = [
        row | {"product_title": f"{row['product_title']} {n}"} for n in range(5) for row in rows
    ]
    write_lines(place / "train_data.json", many)
    monkeypatch.setattr(ic, "JSON_PATH", str(place / "train_data.json"))  # {split} is not in it
    train, val = ic.load_splits(64).values()
    images = [{example.image_path for example in data.examples} for data in (train, val)]
    assert images[0].isdisjoint(images[1]) and len(train) + len(val) == len(rows) and len(val) == 4
    assert all(len(example.captions) == 5 for example in (*train.examples, *val.examples))


@pytest.mark.parametrize(
    "count, good, words",
    [
        (24, 11, "ine 12: .*.jpeg"),
        (24, 0, "ine 1: "),
        (0, 0, "it is empty"),
        (1, 1, "train and val"),
    ],
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


def test_images_that_may_be_read_at_last_are(place, monkeypatch):
    """As after chmod, which leaves a file's size and time alone."""
    with monkeypatch.context() as denied:
        denied.setattr(os, "access", lambda path, mode: False)
        denied.setattr(ic, "load_image", Mock(side_effect=PermissionError))
        with pytest.raises(SystemExit, match="most rows cannot be used.*PermissionError"):
            ic.load_splits(64)
    assert len(ic.load_splits(64)["train"]) == 24


def test_rows_are_compared_with_rows_and_all_of_an_image_are_skipped(place):
    """Four rows an image: three images have two classes, one has no file; four are left."""
    rows = [
        dict(row, product_title=f"{row['product_title']} {i}")
        for i in range(4)
        for row in read_lines(place / "train_data.json")[:8]
    ]
    for row in rows[:3]:
        row["class_label"] = "another"
    write_lines(place / "train_data.json", rows)
    (place / rows[3]["image_path"]).unlink()
    assert len(ic.load_splits(64)["train"]) == 4
    skipped = [line["line"] for line in read_lines("outputs/skipped.jsonl")]
    assert skipped == sorted(8 * part + image + 1 for part in range(4) for image in range(4))


# ---- What people's data lacks, through the front door ----
def change_rows(folder, change):
    for split in ("train", "val", "test"):
        path = folder / f"{split}_data.json"
        write_lines(path, [change(i, row) for i, row in enumerate(read_lines(path))])


def last_metrics(folder):
    return read_lines(folder / "outputs/metrics.jsonl")[-1]


def test_labels_that_read_alike_score_as_one_label(dataset, tmp_path):
    scores = []
    for number, labels in enumerate(
        (["saree", "t-shirt"], ["Saree", "saree", "T-Shirt", "t_shirt"])
    ):
        names = ("saree", "t-shirt") if number == 0 else labels

        def change(i, row, names=names):
            label = names[i % 2] if len(names) == 2 else names[(i % 2) * 2 + (i // 2) % 2]
            return row | {"class_label": label.replace("_", "-")}

        change_rows(dataset, change)
        shutil.rmtree(tmp_path / "outputs", ignore_errors=True)
        run_script(tmp_path, **quick(dataset, NUM_EPOCHS=1))
        scores.append(last_metrics(tmp_path)["accuracy"])
    assert scores[0] == scores[1] > 0


@pytest.mark.parametrize("labels", [{}, {"class_label": "saree"}])
def test_without_classes_search_is_learned_and_measured(dataset, tmp_path, labels):
    drop = ("class_label",)
    change_rows(dataset, lambda i, r: {k: v for k, v in r.items() if k not in drop} | labels)
    output = run_script(tmp_path, **quick(dataset))
    assert "No classes: fewer than two in class_label" in output and "brand" in output
    metrics = last_metrics(tmp_path)
    assert "accuracy" not in metrics and "macro_f1" not in metrics and "image_to_text_r1" in metrics
    outputs = os.listdir(tmp_path / "outputs")
    assert "confusion.png" not in outputs and "retrieval.png" in outputs
    skipped = read_lines(tmp_path / "outputs/skipped.jsonl")
    untitled = [s for s in skipped if "no title, and no class" in s["reason"]]
    assert skipped == untitled and untitled  # the sample has titles that are N/A


def test_a_misnamed_title_column_is_told_loudly(dataset, tmp_path):
    change_rows(
        dataset, lambda i, r: {"title" if k == "product_title" else k: v for k, v in r.items()}
    )
    output = run_script(tmp_path, **quick(dataset, NUM_EPOCHS=1))
    assert "NO TITLES: no row has a product_title" in output and ", title, " in output
    metrics = last_metrics(tmp_path)
    assert "accuracy" in metrics and "image_to_text_r1" not in metrics
    assert "retrieval.png" not in os.listdir(tmp_path / "outputs")
    change_rows(dataset, lambda i, r: r | {"class_label": "saree"})
    shutil.rmtree(tmp_path / "outputs")
    output = run_script(tmp_path, code=1, **quick(dataset))
    assert output.splitlines()[-1].startswith(
        "nothing to learn: no product_title and fewer than two"
    )


def test_absolute_paths_need_no_image_path_and_backslashes_are_read(dataset, tmp_path):
    (shop := tmp_path / "Ann's shop").mkdir()
    shutil.copytree(dataset, shop / "my data")
    data = shop / "my data"
    change_rows(data, lambda i, r: r | {"image_path": str(data / r["image_path"])})
    constants = {k: v for k, v in quick(data, NUM_EPOCHS=0).items() if k != "IMAGE_PATH"}
    output = run_script(tmp_path, **constants)
    assert "24 images" in output and "sample" not in output
    change_rows(data, lambda i, r: r | {"image_path": r["image_path"][len(str(data)) + 1 :]})
    change_rows(data, lambda i, r: r | {"image_path": r["image_path"].replace("/", "\\")})
    shutil.rmtree(tmp_path / "outputs")
    assert "24 images" in run_script(tmp_path, **constants)


# ---- Batches ----
def images_of(batch):
    return batch.pixels[:, 0, 0, 0].tolist()


def test_batches_are_full_of_distinct_images_and_follow_from_seed_and_epoch(monkeypatch):
    data = numbered([f"saree {i}" for i in range(23)])
    epochs = [list(ic.epoch_batches(data, epoch, 5)) for epoch in range(9)]
    for batches in epochs:
        assert [len(batch.pixels) for batch in batches] == [5] * 4
        assert len(set(sum(map(images_of, batches), []))) == 20
    assert len(set(sum(map(images_of, sum(epochs, [])), []))) == 23  # who waited had a turn
    again = list(ic.epoch_batches(data, 2, 5, first_step=3))
    assert len(again) == 1 and images_of(again[0]) == images_of(epochs[2][3])
    assert torch.equal(again[0].tokens, epochs[2][3].tokens)
    monkeypatch.setattr(ic, "SEED", 1)
    for other in (epochs[2][0], next(ic.epoch_batches(data, 1, 5))):
        assert images_of(other) != images_of(epochs[1][0])
        assert not torch.equal(other.draws, epochs[1][0].draws)


def test_an_image_is_taken_once_an_epoch_with_one_of_its_captions(monkeypatch):
    monkeypatch.setattr(ic, "CLASS_PROMPT_SHARE", 0)
    captions = [[f"{word} saree {i}" for word in ("red", "blue", "gold")] for i in range(20)]
    data, drawn = numbered(captions), [set() for _ in range(20)]
    for epoch in range(30):
        [batch] = ic.epoch_batches(data, epoch, 20)
        assert sorted(images_of(batch)) == list(range(20))
        for image, text in zip(images_of(batch), batch.tokens[batch.inverse], strict=True):
            own = [bool((clip.tokenize(c)[0] == text).all()) for c in captions[image]]
            assert sum(own) == 1
            drawn[image].add(own.index(True))
    assert all(seen == {0, 1, 2} for seen in drawn)


@pytest.mark.parametrize("share", [0, 0.25, 1])
def test_a_share_of_the_titles_and_all_that_is_untitled_becomes_a_class_prompt(monkeypatch, share):
    """In each batch of one template, so that the prompts of a class are one text."""
    monkeypatch.setattr(ic, "CLASS_PROMPT_SHARE", share)
    data = numbered([f"saree {i}" if i % 3 > 0 else () for i in range(240)])
    replaced, templates = [], set()
    for batch in (batch for epoch in range(20) for batch in ic.epoch_batches(data, epoch, 60)):
        rows, texts = torch.tensor(images_of(batch)), batch.tokens[batch.inverse]
        first = clip.tokenize([f"saree {i}" for i in rows]).int()
        own = (texts == first).all(1)
        prompts = (data.tokens[data.prompt_ids[data.labels[rows]]] == texts[:, None]).all(2)
        assert torch.equal(prompts.sum(1), (~own).long()) and not own[rows % 3 == 0].any()
        [template] = prompts.any(0).nonzero().flatten().tolist()
        templates.add(template)
        replaced.append((~own)[rows % 3 > 0].double())
    assert templates == set(range(len(ic.PROMPTS)))
    bound = 0.025 if 0 < share < 1 else 0
    assert torch.cat(replaced).mean().item() == pytest.approx(share, abs=bound)


def test_images_without_a_class_keep_their_titles(monkeypatch):
    monkeypatch.setattr(ic, "CLASS_PROMPT_SHARE", 1)
    data = toy_dataset([*"xyxy", ""], [f"saree {i}" for i in range(5)])
    list(ic.epoch_batches(data, 1, 5))
    assert data.text_ids[4] == data.ids[4] and (data.text_ids[:4] >= data.num_captions).all()

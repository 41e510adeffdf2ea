"""Rows, captions, images, their cache and batches: what becomes of them, and what can go wrong."""

import csv
import errno
import io
import json
import os
import random
import re
import shutil
import struct
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import clip
import pytest
import torch
from conftest import quick, read_lines, run_driver, tiny_model, toy_dataset, write_lines
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


def stop_of(function, *arguments):
    """The message that a call ends the run with: one short line."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    message = str(stop.value)
    assert "\n" not in message and 20 < len(message) < 1000, f"{len(message)}: {message[:2000]}"
    return message


def row(title="Women's Silk Saree", path="images/train/0.jpeg", label="saree", **more):
    return {"image_path": path, "brand": "N/A", "product_title": title, "class_label": label} | more


@pytest.fixture
def read(tmp_path, monkeypatch):
    """→ a function: rows, or a table's text, of images that exist → the examples."""
    monkeypatch.setattr(ic, "IMAGE_PATH", str(tmp_path / "images"))
    (tmp_path / "images").mkdir()
    for name in (*"abc", *map(str, range(99))):
        (tmp_path / f"images/{name}.jpg").touch()

    def examples_of(rows):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rows").write_text(text, encoding="utf-8", newline="")
        examples = ic.read_examples("train", tmp_path / "rows")
        assert not any(example.reason for example in examples)
        return examples

    return examples_of


# ---- Titles and classes ----
def test_titles_are_cleaned_and_some_are_none(read):
    titles = ["Women’s®  Silk\t&amp; Gold ", "bad \ud800 half", 7]
    titles.append(["Red", "N/A", "&lt; gold", "Red"])
    wanted = [("Women’s® Silk & Gold",), ("bad half",), ("7",), ("Red", "< gold")]
    missing = ["N/A", "n/a", "NA", "", " \u3000", "&nbsp;", None, [], {"a": 1}]
    missing += ["NaN", float("nan"), "None", "NULL", "#N/A", "-", ["-"]]
    examples = read([row(title, f"{i}.jpg") for i, title in enumerate(titles + missing)])
    assert [e.captions for e in examples] == wanted + [()] * len(missing)


def test_what_somebody_calls_a_class_is_one_and_empty_cells_are_none(read, monkeypatch):
    labels = ["none", "NA", "N/A", "-", "+", "nan", "null", "T-Shirt", 3.0, ["dress"], ["A", "a "]]
    names = ["none", "na", "n/a", "-", "+", "nan", "null", "t-shirt", "3.0", "dress", "a"]
    labels += ["women_dress", "Women__Dress", "women \t dress "]  # alike to CLIP
    missing = [None, float("nan"), "", " ", "_", [], [None, ""], {"a": 1}]
    examples = read([row("x", f"{i}.jpg", label) for i, label in enumerate(labels + missing)])
    wanted = [(name,) for name in [*names, *["women dress"] * 3]] + [()] * len(missing)
    assert [e.classes for e in examples] == wanted
    assert ic.class_prompts("kurta men")[0] == "a photo of a men's kurta"


def test_rows_of_one_image_however_written_are_one_example_with_all_captions(read, tmp_path):
    paths = ["a.jpg", "./a.jpg", "b/../a.jpg", ".\\a.jpg ", "b//..//a.jpg"]
    titles = ["a", "b", ["c", "d"], "a", "N/A"]
    rows = [row(title, path) for title, path in zip(titles, paths, strict=True)]
    rows.append(row("a", "b.jpg", product="saree", product_id=501))
    one, other = (str(tmp_path / f"images/{name}.jpg") for name in "ab")
    lines = (1, 2, 3, 4, 5)
    assert read(rows) == [
        ic.Example("train", one, "", ("a", "b", "c", "d"), ("saree",), "", lines),
        ic.Example("train", other, "", ("a",), ("saree",), "501", (6,)),
    ]


# ---- Tables ----
QUOTES = '15" chest, "fine" saree'
ROWS = [row(QUOTES, "a.jpg"), row("साड़ी & gold; silk | ü", "b.jpg")]
ROWS.append(row("Two\nlines, of\n\na title", "c.jpg", "kurta"))


def as_csv(delimiter, header=lambda name: name, ending="\n"):
    writer = csv.writer(file := io.StringIO(), delimiter=delimiter, lineterminator=ending)
    writer.writerows([[header(name) for name in ROWS[0]], *(row.values() for row in ROWS)])
    return file.getvalue()


TABLES = {  # and the lines of the rows
    "lines": ("\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), [1, 3, 5]),
    "array": ("\n" + json.dumps(ROWS, indent=2), [1, 2, 3]),
    "comma after blank lines": ("\n\n" + as_csv(","), [4, 5, 6]),
    "semicolon": (as_csv(";", str.upper, "\r\n"), [2, 3, 4]),
    "tab": (as_csv("\t", lambda name: f" {name.title().replace('_', ' ')}"), [2, 3, 4]),
    "bar, empty cells": (as_csv("|").replace("|saree\n", "|saree||\n") + "||||", [2, 3, 4]),
    "quotes in cells": (as_csv("|").replace('"15"" chest, ""fine"" saree"', QUOTES), [2, 3, 4]),
}


@pytest.mark.parametrize("text, lines", TABLES.values(), ids=TABLES)
def test_all_kinds_of_tables_give_the_same_examples(read, text, lines):
    expected = read(ROWS)
    for mark in ("", "\ufeff"):  # as Excel begins a CSV UTF-8
        for example, other, line in zip(read(mark + text), expected, lines, strict=True):
            assert example == replace(other, lines=(line,))


ONE = '{"image_path": "a.jpg"}'
COLUMNS = {name: {str(i): f"{i}.jpg" for i in range(500)} for name in row()}
FILES = {f"images/{i}.jpg": ["red saree", "a saree"] for i in range(20_000)}
WRONG = {  # the table, what is said
    "a list among objects": (f"{ONE}\n[1]\n", "line 2: no JSON object"),
    "no JSON": (f"{ONE}\n\n{{not json\n{ONE}", "line 3: .*JSON.*Mend that line"),
    "no JSON in an array": (f'[{ONE},\n{{"image_path" "b.jpg"}}]', "line 2: .*JSON"),
    "a deep array": ("[" * 100_000, "line 1: .*JSON"),
    "cells": ("image_path,title\na.jpg,red\n\nb.jpg,red, saree\n", "line 4: .*3 cells for 2 colu"),
    "columns of one name": ("image_path,x,X\na.jpg,y,z\n", "line 2: .*two columns are called x"),
    "a quote": ('image_path,title\n1,red\n2,"red\n3,red\n', "line 3: .*quote"),
    "a quote, paths last": ('title,image_path\n"a,1.jpg\nb,2.jpg\nc",3.jpg\n', "line 2: .*quote"),
    "a quote, paths first": ('image_path,title\n1.JPEG,"red\n2.JPEG,red"\n', "line 2: .*quote"),
    "a workbook": (b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xee\x9d\x7f", "CSV UTF-8"),
    "Chinese code page": ("image_path,title\na.jpg,x\nb.jpg,红色".encode("gbk"), "line 3: .*UTF-8"),
    "pandas by columns": (json.dumps(COLUMNS), "no path in image_path: {'0.*Rows are"),
    "captions by file": (json.dumps(FILES), "no path in image_path: None.*Rows are"),
    "an empty file": ("", "it is empty"),
    "long addresses": (json.dumps([row(path="https://a.b/" + "c" * 5000)]), "download the image"),
    "other columns": ("picture;titel\na.jpg;x\n", "no path in image_path"),
}


@pytest.mark.parametrize("content, words", WRONG.values(), ids=WRONG)
def test_what_is_no_table_or_a_broken_one_is_told_in_a_short_line(place, content, words):
    for name in "123":
        (place / f"{name}.jpg").write_bytes((place / "images/train/0.jpeg").read_bytes())
    table = place / "train_data.json"
    table.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = stop_of(ic.load_splits, 64)
    assert re.match(f"{table}.*{words}", message), message
    assert re.search("JSON objects|A row is an object|CSV UTF-8", message)


# ---- Folders ----
def test_a_folder_gives_images_at_any_depth_their_own_folders_as_classes(place, monkeypatch):
    """Links are followed; what is hidden is left alone."""
    names = ["1.jpg", "Dress/2.JPG", "Dress/old/3.png", "T-Shirt/4.webp", "T-Shirt/a.b.jpeg"]
    hidden = ["Dress/.2.jpg", "Dress/._2.jpg", ".cache/5.jpg", "a/.ipynb_checkpoints/6/5.jpg"]
    texts = {"1.txt": "", "Dress/2.txt": "Red dress\n\nSilk &amp; gold \nN/A\n"}
    texts |= {"Dress/other.txt": "no", "T-Shirt/a.b.txt": "\ufeffSummer", "notes.csv": "a,b"}
    shop, linked = place / "shop", place / "linked"
    for number, name in enumerate([*names, *hidden, *texts, linked / "6.jpg"]):
        (shop / name).parent.mkdir(parents=True, exist_ok=True)
        picture = as_bytes(Image.new("L", (64, 64), number), "PNG")
        (shop / name).write_bytes(texts[name].encode() if name in texts else picture)
    (shop / "Z").symlink_to(linked)
    examples = ic.read_examples("train", str(shop))
    assert [e.path for e in examples] == [str(shop / name) for name in (*names, "Z/6.jpg")]
    classes = [(), ("dress",), ("old",), ("t-shirt",), ("t-shirt",), ("z",)]
    assert [e.classes for e in examples] == classes
    captions = [(), ("Red dress", "Silk & gold"), (), (), ("Summer",), ()]
    assert [e.captions for e in examples] == captions
    monkeypatch.setattr(ic, "JSON_PATH", str(shop))  # all but the first have something to learn
    assert sum(map(len, ic.load_splits(64).values())) == 5


# ---- Paths ----
def test_a_home_folder_is_meant_by_a_tilde_in_each_path(place, tmp_path, monkeypatch):
    paths = {"JSON_PATH": "~/data/{split}_data.json", "OUTPUT_PATH": "~/out", "MODEL": "~/m.pt"}
    paths |= {"IMAGE_PATH": "~/data", "CACHE_PATH": "~/c/d"}
    for name, path in paths.items():
        monkeypatch.setattr(ic, name, path)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    ic.check_constants()
    assert all(getattr(ic, k) == path.replace("~", str(tmp_path)) for k, path in paths.items())
    assert not os.path.exists("~")


def test_a_wrong_path_is_named_with_what_to_do(place, monkeypatch):
    """A backslash that became a control character; what is not there, by its absolute path."""
    wrong = [("JSON_PATH", "my_shop\rows.csv"), ("IMAGE_PATH", "D:\new shop"), ("MODEL", "a\best")]
    wrong += [("OUTPUT_PATH", "outputs\new_run"), ("CACHE_PATH", "data\temp")]
    for name, path in [*wrong, ("JSON_PATH", "no/rows.csv"), ("IMAGE_PATH", "no/images")]:
        with monkeypatch.context() as patch:
            patch.setattr(ic, name, path)
            before, message = sorted(os.listdir(".")), stop_of(ic.check_constants)
        words = os.path.abspath(path) if path.startswith("no/") else "write /"
        assert message.startswith(f"{name} is {path!r}") and words in message
        assert sorted(os.listdir(".")) == before


# ---- Images ----
def photo(size):
    colors = random.Random(0).randbytes(240)
    return Image.frombytes("RGB", (8, 10), colors).resize(size, Image.Resampling.BICUBIC)


def as_bytes(image, kind, **how):
    image.save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


def loaded(path, content, size=64):
    """The pixels of an image of those bytes, and why it is left out."""
    path.write_bytes(content)
    pixels, _, reason = ic.decode(str(path), size)
    assert pixels.shape == (3, size, size) and (not reason or str(path) in reason)
    return pixels.float(), reason


@pytest.mark.parametrize("size", [(320, 420), (500, 300), (50, 40), (224, 224), (224, 1000)])
def test_pixels_normalised_are_clips_preprocessing_bit_for_bit(tmp_path, size):
    for mode in ("RGB", "L"):
        photo(size).convert(mode).save(path := tmp_path / f"{mode}.png")
        pixels, model = ic.load_image(path, 224), tiny_model()
        expected = clip.clip._transform(224)(Image.open(path))
        assert torch.equal((pixels.float().div(255) - model.mean) / model.std, expected)


WIDE, FADING = photo((160, 100)), photo((100, 100))
FADING.putalpha(Image.linear_gradient("L").resize((100, 100)))
ON_WHITE = Image.alpha_composite(Image.new("RGBA", (100, 100), "white"), FADING)
(TURNED := Image.Exif())[0x0112] = 6  # the camera was turned: show it turned back by 90 degrees
SHOWN = {  # what is saved and how, what is seen, the tolerance
    "CMYK": ("JPEG", WIDE.convert("CMYK"), {"quality": 100, "subsampling": 0}, WIDE, 8),
    "palette": ("PNG", WIDE.quantize(256), {}, WIDE.quantize(256), 0),
    "fading": ("PNG", FADING, {}, ON_WHITE, 0),
    "turned": ("JPEG", WIDE, {"exif": TURNED}, WIDE.transpose(Image.Transpose.ROTATE_270), 3),
    "JPEG with broken EXIF": ("JPEG", WIDE, {"exif": b"Exif\0\0garbage", "dpi": (72, 72)}, WIDE, 6),
    "PNG with broken EXIF": ("PNG", WIDE, {"exif": b"Exif\0\0garbage"}, WIDE, 0),
    "PGM": ("PPM", WIDE.convert("L"), {}, WIDE.convert("L"), 0),
    **{kind: (kind, WIDE, {}, WIDE, 0) for kind in ("PPM", "TGA", "TIFF", "BMP", "JPEG2000")},
}
if features.check("avif"):
    SHOWN["AVIF"] = "AVIF", WIDE, {"quality": 100}, WIDE, 3


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_load_as_a_viewer_shows_them_whatever_they_are_called(tmp_path, name):
    kind, saved, how, shown, tolerance = SHOWN[name]
    pixels, reason = loaded(tmp_path / "a.jpg", as_bytes(saved, kind, **how))
    expected, _ = loaded(tmp_path / "b.jpg", as_bytes(shown.convert("RGB"), "PNG"))
    assert not reason and (pixels - expected).abs().mean() <= tolerance


def ramp(peak, kind, channels=1):
    values = (peak * i // 4095 if isinstance(peak, int) else peak * i / 4095 for i in range(4096))
    return b"".join(struct.pack(kind, value) * channels for value in values)


def grey(kind, mode, order):
    return lambda peak: as_bytes(Image.frombytes(mode, (64, 64), ramp(peak, order)), kind)


def rgb_png(peak):
    """One of a palette, whose rows are stored as they are, with another header."""
    image = Image.frombytes("P", (384, 64), ramp(peak, ">H", 3))
    image.putpalette(bytes(768))
    content = as_bytes(image, "PNG")
    header = b"IHDR" + struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def rgb_tiff(peak):
    """One of 8 bits and twice the width, with both numbers changed."""
    content = as_bytes(Image.frombytes("RGB", (128, 64), ramp(peak, "<H", 3)), "TIFF")
    content = content.replace(struct.pack("<I", 128), struct.pack("<I", 64), 1)
    return content.replace(struct.pack("<3H", 8, 8, 8), struct.pack("<3H", 16, 16, 16), 1)


DEPTHS = {"grey PNG": grey("PNG", "I;16", "<H"), "RGB PNG": rgb_png, "RGB TIFF": rgb_tiff}
DEPTHS |= {"other endian": grey("TIFF", "I;16B", ">H"), "32 bits": grey("TIFF", "I", "<i")}


@pytest.mark.parametrize("kind", DEPTHS)
def test_sixteen_bits_are_read_and_eight_or_twelve_within_them_are_left_out(tmp_path, kind):
    for peak in (255, 4095):
        _, reason = loaded(tmp_path / "a", DEPTHS[kind](peak))
        assert reason and "16 bits" in reason, peak
    pixels, reason = loaded(tmp_path / "a", DEPTHS[kind](65535))
    expected = torch.frombuffer(bytearray(ramp(255, "B")), dtype=torch.uint8).view(64, 64)
    assert not reason and (pixels - expected.float()).abs().max() <= 1


@pytest.mark.parametrize("how", [{}, {"exif": TURNED}])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch, how):
    colors = random.Random(1).randbytes(3 * 9 * 14)  # smooth as enlarged photographs are
    image = Image.frombytes("RGB", (9, 14), colors).resize((900, 1401), Image.Resampling.BICUBIC)
    found, _ = loaded(tmp_path / "a.jpg", as_bytes(image, "JPEG", quality=95, **how))
    monkeypatch.setattr(type(Image.open(tmp_path / "a.jpg")), "draft", draft := Mock())
    whole = ic.load_image(tmp_path / "a.jpg", 64).float()
    assert draft.called and (found - whole).abs().mean() < 2 and (found - whole).abs().max() < 20
    assert found.std() > 30 and not torch.equal(found, whole)


def test_jpegs_of_up_to_200_megapixels_are_read_and_larger_images_named(tmp_path):
    def grey_square(kind, side):
        return loaded(tmp_path / "large", as_bytes(Image.new("L", (side, side), 128), kind))

    pixels, reason = grey_square("JPEG", 14_080)  # more than twice Pillow's own limit
    assert not reason and (pixels == 128).all()
    for kind, side in (("JPEG", 14_400), ("PNG", 9_500)):
        assert grey_square(kind, side)[1].startswith("too many pixels, make the image smaller")


def test_what_is_left_out_is_listed_and_told_by_kind_and_odd_paths_work(place, monkeypatch, capsys):
    rows = read_lines(place / "train_data.json")
    good = (place / rows[0]["image_path"]).read_bytes()
    contents = {"text": b"<html>", "cut": good[:-500], "C:x": good, "../out": good}
    contents |= {"eps": as_bytes(photo((80, 80)), "EPS"), "deep": DEPTHS["grey PNG"](4095)}
    contents |= {
        "x": good,
        "strip": as_bytes(Image.new("1", (2, 400)), "PNG"),
        "broken": rgb_png(9)[:-30],
    }
    contents |= {"float": grey("TIFF", "F", "<f")(1.0), "int": grey("TIFF", "I", "<i")(2**31 - 1)}
    for name, content in contents.items():
        (place / f"{name}.jpg").write_bytes(content)
    kinds = {  # their paths, the words for them, in the output with the first
        "there is no such file: .*no.jpg": ["no.jpg", ".", "images", "a\0.jpg", "\ud800.jpg"],
        "it cannot be decoded: .*text.jpg": ["text.jpg", "cut.jpg", "eps.jpg", "broken.jpg"],
        "less than a sixteenth of 16 bits": ["deep.jpg"],
        "floating point or 32 bits": ["float.jpg", "int.jpg"],
        "a strip more than": ["strip.jpg"],
        "an address, download the image first: https": ["https://a.b/c.jpg", " S3://shop/a.jpg"],
        "no path in image_path": [None, "", 0, ["a.jpg"], 7, {"b": "x"}],
    }
    bad = [(words, row(path=path)) for words, paths in kinds.items() for path in paths]
    labels = "saree", "gowns", None, ["gowns", "saree"]
    bad += [
        ("several classes: .*x.jpg is saree, gowns", row("", "x.jpg", label)) for label in labels
    ]
    bad.append(("no title, and no class", row("N/A", rows[0]["image_path"], None)))
    odd = ["C:x.jpg", "../out.jpg", str(place.parent / "out.jpg")]
    odd += [old["image_path"] for old in rows[1:]]
    usable = [row(path=path, label=f"dress, color {i}") for i, path in enumerate(odd)]
    write_lines(place / "train_data.json", [wrong for _, wrong in bad] + usable)
    expected = torch.stack([ic.load_image(place / path, 64) for path in odd])
    for _process in (0, 1):  # of a machine: the second has all from the cache
        train = ic.load_splits(64)["train"]
        assert [example.path for example in train.examples] == [
            os.path.join(place, path) for path in odd
        ]
        assert torch.equal(train[:][0], expected)
        skipped = read_lines("outputs/skipped.jsonl")
        assert [line["line"] for line in skipped] == list(range(1, len(bad) + 1))
        for (words, _), line in zip(bad, skipped, strict=True):
            assert line["reason"].startswith(words.partition(":")[0])
        splits, _, said = capsys.readouterr().out.partition("\ntest ")
        assert re.search(r"\b\d\d classes: .*dress, color 0, dress, color 1,", splits)
        for words, count in Counter(words for words, _ in bad).items():
            assert re.search(rf"\b{count} rows skipped.* line \d.*{words}.*skipped\.jsonl", said)
        monkeypatch.setattr(ic, "load_image", None)


# ---- The cache ----
@pytest.fixture
def paths(place):
    return sorted(str(path) for path in (place / "images/train").iterdir())


def cached(paths):
    """The images' pixels by way of the cache."""
    return ic.open_cache(paths, 64)[0]


def is_right(paths):
    return torch.equal(cached(paths), torch.stack([ic.load_image(path, 64) for path in paths]))


def files(ending=""):
    return [path for path in Path("cache").iterdir() if path.name.endswith(ending)]


def test_images_are_decoded_again_when_and_only_when_something_changed(paths, monkeypatch):
    def grow():
        Path(paths[3]).write_bytes(Path(paths[3]).read_bytes() + b"more")
        os.utime(paths[3], ns=(0, 0))  # as old as before

    def swap():
        paths[0] = shutil.copy2(paths[0], "as large and as old.jpeg")

    monkeypatch.setattr(ic, "load_image", spy := Mock(wraps=ic.load_image))
    changes = [lambda: None, lambda: os.utime(paths[3], ns=(0, 0)), grow, paths.reverse, paths.pop]
    changes += [swap, lambda: monkeypatch.setattr(ic.Image, "__version__", "99.0")]
    changes.append(lambda: monkeypatch.setattr(os, "access", lambda path, mode: False))
    for number, change in enumerate(changes, 1):
        change()
        spy.reset_mock()
        for _ in "12":
            cached(paths)
            assert spy.call_count == len(paths) and len(files(".u8")) == number, change
    assert is_right(paths)


def test_nothing_that_a_kill_left_half_written_is_taken_or_stays(paths, tmp_path):
    lines = f"""
        import os
        paths, load = {paths}, ic.load_image
        ic.load_image = lambda path, size: os._exit(9) if path == paths[-1] else load(path, size)
        ic.open_cache(paths, 64)
        """
    run_driver(tmp_path / "run", lines, {"CACHE_PATH": str(tmp_path / "cache")}, code=9)
    assert files(".tmp") and not files(".u8")
    assert is_right(paths) and not files(".tmp")
    files(".u8")[0].unlink()  # somebody has deleted the large ones
    assert is_right(paths)


def test_a_table_or_a_cache_out_of_reach_is_one_line(paths, monkeypatch):
    fail = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    for module in (ic, Path, io):
        monkeypatch.setattr(module, "open", fail, raising=False)
    assert re.search("cannot write cache/64-.*Read-only", stop_of(cached, paths))
    assert not files()
    assert re.search("train_data.json, .*Read-only", stop_of(ic.load_splits, 64))


# ---- Splits ----
def made(count, product=lambda i: "", digest=lambda i: i):
    """Examples of an image each, by default of products and pixels of their own."""
    return [
        ic.Example("train", str(i), product=str(product(i)), digest=digest(i)) for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(9))
def test_rows_that_are_added_never_move_what_was_trained_on_into_val(monkeypatch, seed):
    """Images alone, of products of some images, and of equal pixels, in any order."""
    monkeypatch.setattr(ic, "SEED", seed)
    rng, trained = random.Random(seed), set()
    shared = [rng.randrange(4 * max(30, i)) for i in range(4000)]
    products = [f"P{number}" if i % 3 == 1 else "" for i, number in enumerate(shared)]
    digests = [number if i % 3 == 2 else 10**6 + i for i, number in enumerate(shared)]
    examples = made(4000, products.__getitem__, digests.__getitem__)
    for size in (30, 33, 40, 80, 200, 700, 1500, 4000):
        train, val = ic.hold_out(rng.sample(examples[:size], size))
        groups = [{e.product or e.digest for e in side} for side in (train, val)]
        assert train and val and len(train) + len(val) == size and groups[0].isdisjoint(groups[1])
        assert trained.isdisjoint(e.path for e in val)
        asked = size * max(0.05, min(0.2, 100 / size))
        assert abs(len(val) - asked) < 6 * asked**0.5
        trained.update(e.path for e in train)


def test_a_product_id_of_few_large_products_is_named_and_few_images_are_shared(monkeypatch):
    """And equal pixels instead of it, such as those of a shop's placeholders."""
    for seed in range(200):
        monkeypatch.setattr(ic, "SEED", seed)
        assert all(all(ic.hold_out(made(count))) for count in (2, 3, 4)), seed
        for names in (["yes", "no"], ["one"]):
            few = made(100, lambda i, names=names: names[i % len(names)])
            assert "product_id" in stop_of(ic.hold_out, few)
        assert "share equal pixels" in stop_of(ic.hold_out, made(100, digest=lambda i: 7))


# ---- What is told ----
def test_files_of_rows_that_do_not_fit_each_other_are_told(place, tmp_path, monkeypatch, capsys):
    """Numbers written in three ways; images that train has: in another file, whose pixels count,
    by an absolute path, and by Windows' backslashes."""
    data = shutil.copytree(place, tmp_path / "Ann's shop/my data")
    for split, form in (("train", int), ("val", float), ("test", "0{}".format)):
        rows = read_lines(data / f"{split}_data.json")
        rows = [old | {"class_label": form(i % 4)} for i, old in enumerate(rows)]
        if split == "val":
            rows[3]["image_path"] = str(data / "other.png")
            Image.open(data / "images/train/0.jpeg").save(data / "other.png")
        if split == "test":
            rows[5]["image_path"] = "images\\train\\1.jpeg"
        write_lines(data / f"{split}_data.json", rows)
    monkeypatch.setattr(ic, "JSON_PATH", str(data / "{split}_data.json"))
    monkeypatch.setattr(ic, "IMAGE_PATH", str(data))
    ic.load_splits(64)
    output = capsys.readouterr().out
    assert "24 images" in output and "rows skipped, such" not in output
    assert "val: 4 classes that train lacks: 0.0, 1.0, 2.0, 3.0\n" in output
    assert "test: 4 classes that train lacks: 00, 01, 02, 03\n" in output
    assert re.search("val: 1 images? that train has too, such as .*other.png", output)
    assert re.search("test: 1 images? that train has too, such as .*images/train/", output)


def test_what_no_row_has_is_told_and_too_few_usable_rows_end_with_one_line(place, capsys):
    for split in ("val", "test"):
        (place / f"{split}_data.json").unlink()
    rows = read_lines(table := place / "train_data.json")
    write_lines(table, rows[:1])
    assert re.search("train and val", stop_of(ic.load_splits, 64))
    for label in (None, "saree"):  # nothing to tell from others
        write_lines(table, [old | {"class_label": label} for old in rows])
        assert (ic.load_splits(64)["train"].labels == -1).all()
        assert re.search("columns .*brand.*\n0 classes", capsys.readouterr().out)
    for old in rows:
        old["title"] = old.pop("product_title")
    write_lines(table, [old | {"class_label": "a"} for old in rows])
    words = "most rows cannot be used; line 1: no title, and no class to tell from others"
    assert words in stop_of(ic.load_splits, 64)
    assert re.search("columns .*, title[,\n]", capsys.readouterr().out)
    write_lines(table, rows)
    assert not len(ic.load_splits(64)["train"].pairs)
    output = capsys.readouterr().out
    assert re.search("columns .*, title[,\n]", output) and "24 of them without a title" in output
    for wrong in rows[11:]:
        (place / wrong["image_path"]).unlink()
    assert re.search("train_data.json.*line 12: .*.jpeg", stop_of(ic.load_splits, 64))


# ---- Dataset and batches ----
def numbered(captions, labels=None):
    """A dataset, by default of two classes in turns, whose images show their number."""
    labels = labels or [("gowns", "saree")[i % 2] for i in range(len(captions))]
    pixels = torch.arange(len(captions), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    return toy_dataset(labels, captions, pixels)


def test_tokens_are_clips_own_of_each_caption_once():
    captions = ["Blue Saree", "word " * 75, "blue SAREE", "Blue Saree", "साड़ी", "CafÃ© Saree"]
    data = numbered([*captions, ("BLUE saree", "blue saree", "red"), ()])
    tokens = clip.tokenize(captions, truncate=True).int()
    assert torch.equal(data[torch.arange(6)][1], tokens)
    assert torch.equal(data.tokens[[rows[0] for rows in data.captions[:6]]], tokens)
    assert len(data.tokens) == 5 + 1 and [*map(len, data.captions)] == [1] * 6 + [2, 1]
    prompts = [prompt for name in data.class_names for prompt in ic.class_prompts(name)]
    assert torch.equal(data.prompts.flatten(0, 1), clip.tokenize(prompts).int())
    captions = data.captions[:7]  # the eighth image has none
    assert data.pairs.tolist() == [[i, c] for i, rows in enumerate(captions) for c in rows]
    assert torch.equal(data[7][1], clip.tokenize("")[0].int())
    assert data.targets(slice(None))[0].titled.tolist() == list(range(7))


def test_the_dataset_is_one():
    data = numbered([f"saree {i}" for i in range(10)])
    pixels, tokens = data[3]
    assert pixels.shape == (3, 1, 1) and tokens.shape == (77,) and pixels[0, 0, 0] == 3
    for index, numbers in (([1, 2], [1, 2]), (slice(2, 9, 3), [2, 5, 8]), (torch.tensor([4]), [4])):
        pixels, tokens = data[index]
        assert pixels[:, 0, 0, 0].tolist() == numbers
        assert torch.equal(tokens, clip.tokenize([f"saree {i}" for i in numbers]).int())
    with pytest.raises(IndexError):
        data[10]
    pixels, tokens = map(torch.cat, zip(*DataLoader(data, 4, num_workers=1), strict=True))
    assert torch.equal(pixels, data[:][0]) and torch.equal(tokens, data[:][1])


def images_of(batch):
    return batch.pixels[:, 0, 0, 0].tolist()


def test_batches_are_full_of_distinct_images_and_follow_from_seed_and_epoch(monkeypatch):
    data = numbered([(f"saree {i}", f"red {i}", f"blue {i}") for i in range(23)])
    epochs = [list(ic.epoch_batches(data, epoch, 5)) for epoch in range(9)]
    for batches in epochs:
        assert [len(batch.pixels) for batch in batches] == [5] * 4
        assert len(set(sum(map(images_of, batches), []))) == 20
    assert len(set(sum(map(images_of, sum(epochs, [])), []))) == 23  # who waited had a turn
    for first in range(5):
        again = list(ic.epoch_batches(data, 2, 5, first_step=first))
        assert len(again) == 4 - first and repr(again) == repr(epochs[2][first:])
    monkeypatch.setattr(ic, "SEED", 1)
    others = epochs[2][0], next(ic.epoch_batches(data, 1, 5))
    assert all(images_of(other) != images_of(epochs[1][0]) for other in others)


def test_an_image_is_taken_once_an_epoch_with_one_of_its_captions():
    captions = [[f"{word} saree {i}" for word in ("red", "blue", "gold")] for i in range(20)]
    data, drawn = numbered(captions), [[] for _ in range(20)]
    for epoch in range(60):
        [batch] = ic.epoch_batches(data, epoch, 20)
        assert sorted(images_of(batch)) == list(range(20))
        for image, text in zip(images_of(batch), batch.tokens, strict=True):
            own = [bool((data.tokens[caption] == text).all()) for caption in data.captions[image]]
            assert sum(own) == 1
            drawn[image].append(own.index(True))
    assert all(min(map(seen.count, range(3))) > 8 for seen in drawn)
    assert len({tuple(seen) for seen in drawn}) == 20  # each on its own


def test_a_batch_has_its_classes_prompts_of_one_template_and_says_who_takes_part():
    labels = ["" if i % 7 == 6 and i % 5 < 4 else f"class {i % 9}" for i in range(90)]
    data = numbered([f"saree {i % 30}" if i % 5 < 4 else () for i in range(90)], labels)
    templates, names = set(), data.class_names
    prompts = clip.tokenize([prompt for name in names for prompt in ic.class_prompts(name)])
    prompts = prompts.view(len(names), len(ic.PROMPTS), 77).int()
    for batch in (batch for epoch in range(5) for batch in ic.epoch_batches(data, epoch, 12)):
        rows, targets = images_of(batch), batch.targets
        assert targets.titled.tolist() == [place for place, i in enumerate(rows) if i % 5 < 4]
        present = sorted({labels[i] for i in rows} - {""})
        assert batch.num_classes == len(present) == len(batch.prompts)
        labelled = [(place, present.index(labels[i])) for place, i in enumerate(rows) if labels[i]]
        assert list(zip(*(part.tolist() for part in targets[1:]), strict=True)) == labelled
        own = prompts[[names.index(name) for name in present]]
        [template] = (own == batch.prompts[:, None]).all(2).all(0).nonzero()
        templates.add(int(template))
    assert templates == set(range(len(ic.PROMPTS)))

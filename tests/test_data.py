"""Rows, captions, images, their cache and batches: what becomes of them, and what can go wrong."""

import csv
import errno
import functools
import gzip
import io
import json
import os
import random
import re
import shutil
import struct
import zlib
from pathlib import Path
from unittest.mock import Mock

import clip
import pytest
import torch
from conftest import quick, read_lines, run_driver, run_script, tiny_model, toy_dataset, write_lines
from PIL import EpsImagePlugin, Image, features
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


def read(folder, rows):
    """The examples of rows, or of a table's text, and those left out with their reasons."""
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows").write_text(text, encoding="utf-8", newline="")
    return ic.read_examples(folder / "rows")[:2]


# ---- Titles and classes ----
def test_titles_are_cleaned_and_some_are_none(tmp_path):
    TITLES = [
        ("Navy Blue &amp; Gold-Toned  Silk\tSaree ", ("Navy Blue & Gold-Toned Silk Saree",)),
        ("Aambal® Women’s Saree" + "e" * 60, ("Aambal® Women’s Saree" + "e" * 60,)),
        ("bad \ud800 half", ("bad half",)),
        (7, ("7",)),
        (["Red", "N/A", "Silk &amp; gold", "Red"], ("Red", "Silk & gold")),
        *((no, ()) for no in ("N/A", "n/a", "NA", "", " \u3000", "&nbsp;", None, [], {"a": 1})),
        *((no, ()) for no in ("nan", "NaN", float("nan"), "None", "NULL", "#N/A", "-", ["-"])),
    ]
    examples, skipped = read(tmp_path, [row(title, f"{i}") for i, (title, _) in enumerate(TITLES)])
    assert [e.captions for e in examples] == [captions for _, captions in TITLES] and not skipped


NAMES = ["none", "NA", "N/A", "-", "+", "nan", "null", "T-Shirt", 0, 3, 3.0, ["dress"], ["A", "a "]]
READ_AS = ["none", "na", "n/a", "-", "+", "nan", "null", "t-shirt", "0", "3", "3.0", "dress", "a"]
NO_NAMES = [None, float("nan"), "", " ", "_", [], [None, ""], {"a": 1}]


def test_what_somebody_calls_a_class_is_one_and_empty_cells_are_none(tmp_path, monkeypatch):
    labels = [*NAMES, "women_dress", "Women__Dress", "women \t dress ", *NO_NAMES]
    examples, skipped = read(tmp_path, [row("x", f"{i}", label) for i, label in enumerate(labels)])
    names = [*READ_AS, *["women dress"] * 3, *[""] * len(NO_NAMES)]  # which CLIP reads alike
    assert [e.class_name for e in examples] == names and not skipped
    assert ic.find_classes(examples) == sorted([*READ_AS, "women dress"])
    assert ic.find_classes(examples[13:]) == []  # one has nothing to be told from
    text = "".join(f"{i}.jpg;{label}\n" for i, label in enumerate([*NAMES[:8], "", " "]))
    examples, skipped = read(tmp_path, f"image_path;class_label\n{text}")
    assert [e.class_name for e in examples] == [*READ_AS[:8], "", ""] and not skipped
    assert ic.class_prompts("kurta men")[0] == "a photo of a men's kurta"
    monkeypatch.setattr(ic, "CLASS_NAMES", {"na": "T-SHIRT"})  # two of one name
    assert "CLASS_NAMES" in stop_of(ic.find_classes, examples)


def test_rows_of_one_image_however_written_are_one_example_with_all_captions(tmp_path):
    paths = ["a.jpg", "./a.jpg", "b/../a.jpg", ".\\a.jpg ", "b//..//a.jpg"]
    titles = ["a", "b", ["c", "d"], "a", "N/A"]
    rows = [row(title, path) for title, path in zip(titles, paths, strict=True)]
    [one, other], skipped = read(
        tmp_path, [*rows, row("a", "b/a.jpg", product="saree", product_id=501)]
    )
    assert one.image_path == "a.jpg" and one.lines == (1, 2, 3, 4, 5) and one.product == ""
    assert one.captions == ("a", "b", "c", "d") and not skipped
    assert (other.image_path, other.product, other.lines) == ("b/a.jpg", "501", (6,))


def test_rows_without_an_image_or_with_several_classes_are_left_out_with_the_reason(tmp_path):
    words = {
        "no image_path": [None, "", [], 0],
        "image_path is no text": [["a.jpg"], 7, {"b": "x"}],
    }
    words |= {"download the image first": ["https://a.b/c.jpg", " S3://shop/a.jpg"]}
    bad = [(word, row(path=path)) for word, paths in words.items() for path in paths]
    kinds = [("a.jpg", "saree"), ("a.jpg", "gowns"), ("a.jpg", None), ("c.jpg", ["gowns", "saree"])]
    bad += [(f"several classes: {path} is ", row("", path, label)) for path, label in kinds]
    [example], skipped = read(tmp_path, [row(path="b.jpg"), *(row for _, row in bad)])
    assert example.lines == (1,) and sorted(line for line, _ in skipped) == list(range(2, 15))
    assert all(word in why for (word, _), (_, why) in zip(bad, sorted(skipped), strict=True))


# ---- Tables ----
QUOTES = '15" chest, "fine" saree'
ROWS = [
    row(QUOTES, "a.jpg"),
    row("साड़ी & gold; silk | ü", "b.jpg"),
    row("Two\nlines, of\n\na title", "c.jpg", "kurta"),
]


def as_csv(delimiter, header=lambda name: name, ending="\n"):
    writer = csv.writer(file := io.StringIO(), delimiter=delimiter, lineterminator=ending)
    writer.writerows([[header(name) for name in ROWS[0]], *(row.values() for row in ROWS)])
    return file.getvalue()


TABLES = {  # and the lines of the rows
    "lines": ("\n".join(json.dumps(row) for row in ROWS), [1, 2, 3]),
    "letters": ("\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), [1, 3, 5]),
    "array": (json.dumps(ROWS), [1, 2, 3]),
    "indented array": ("\n" + json.dumps(ROWS, indent=2, ensure_ascii=False), [1, 2, 3]),
    "comma": (as_csv(","), [2, 3, 4]),
    "semicolon": (as_csv(";", str.upper, "\r\n"), [2, 3, 4]),
    "tab": (as_csv("\t", lambda name: f" {name.title().replace('_', ' ')}"), [2, 3, 4]),
    "bar, empty cells": (as_csv("|").replace("|saree\n", "|saree||\n") + "||||", [2, 3, 4]),
    "quotes in cells": (as_csv("|").replace('"15"" chest, ""fine"" saree"', QUOTES), [2, 3, 4]),
    "comma after blank lines": ("\n\n" + as_csv(","), [4, 5, 6]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_all_kinds_of_tables_give_the_same_examples(tmp_path, kind):
    text, lines = TABLES[kind]
    expected, _ = read(tmp_path, ROWS)
    for mark in ("", "\ufeff"):  # as Excel begins a CSV UTF-8
        examples, skipped = read(tmp_path, mark + text)
        assert [e.lines for e in examples] == [(line,) for line in lines] and not skipped
        assert [e[:4] for e in examples] == [e[:4] for e in expected]


def quoted(count, begin, end=None, delimiter=",", path="{}.jpg", turned=1):
    """A table where a quote before the title of row `begin` is closed after that of row `end`."""
    rows = [["image_path", "title"]] + [[path.format(i), f"saree {i}"] for i in range(1, count + 1)]
    rows[begin][1] = '"' + rows[begin][1]
    if end:
        rows[end][1] += '"'
    return "\n".join(delimiter.join(row[::turned]) for row in rows)


ONE = '{"image_path": "a.jpg"}'
BROKEN = {  # the table, the line, what is said
    "a list among objects": (f"{ONE}\n[1]\n", 2, "no JSON object"),
    "no JSON": (f"{ONE}\n\n{{not json\n{ONE}", 3, "JSON"),
    "a number in an array": (f"[{ONE}, 7, {{}}]", 2, "no JSON object"),
    "no JSON in an array": (f'[{ONE},\n{{"image_path" "b.jpg"}}]', 2, "JSON"),
    "a deep array": ("[" * 100_000, 1, "JSON"),
    "cells": ("image_path,title\na.jpg,red\n\nb.jpg,red, saree\n", 4, "3 cells for 2 columns"),
    "columns of one name": ("image_path,Title,x,title\na.jpg,red,y,z\n", 2, "one name.*title"),
    "a quote, comma": (quoted(40, 6), 7, "quote"),
    "a quote, tab": (quoted(40, 6, delimiter="\t"), 7, "quote"),
    "a quote, row 21 of 1,000": (quoted(1000, 21, None, ";", "{}"), 22, "quote"),
    "closed many rows below": (quoted(40, 6, 30), 7, "quote"),
    "closed, paths last": (quoted(40, 6, 30, turned=-1), 7, "quote"),
    "closed in the next row, paths last": (quoted(40, 6, 7, turned=-1), 7, "quote"),
    "closed, other endings": (quoted(40, 6, 9).replace("\n6.jpg", "\n6.jpeg"), 7, "quote"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_table_stops_with_file_line_and_what_to_do(tmp_path, kind):
    text, line, words = BROKEN[kind]
    message = stop_of(read, tmp_path, text)
    start = re.escape(f"{tmp_path / 'rows'}, line {line}: ")
    assert re.match(rf"{start}.*{words}", message) and "object" in message, message


COLUMNS = {name: {str(i): f"{i}.jpg" for i in range(500)} for name in row()}
COCO = {"info": {}, "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(500)]}
FILES = {f"images/{i}.jpg": ["red saree", "a saree"] for i in range(20_000)}
WRONG = {
    "a workbook": (
        b"PK\x03\x04\x14\0\x06\0\x08\0\0\0!\0\xee\x9d\x7f[Content_Types].xml",
        "CSV UTF-8",
    ),
    "parquet": (b"PAR1\x15\x04\x15\xd0\x0f\x15\x80\x08L\x15\xfa\x01\n" * 99, "CSV UTF-8"),
    "a packed table": (gzip.compress(as_csv(",").encode()), "CSV UTF-8"),
    "UTF-16": (as_csv(",").encode("utf-16"), "line 1: .*CSV UTF-8"),
    "Chinese code page": ("image_path,title\na.jpg,x\nb.jpg,红色".encode("gbk"), "line 3: .*UTF-8"),
    "pandas by columns": (json.dumps(COLUMNS), "image_path is no text.*Rows are"),
    "pandas by columns, indented": (json.dumps(COLUMNS, indent=1), "ows are JSON objects"),
    "COCO": (json.dumps(COCO), "no image_path.*Rows are JSON objects"),
    "captions by file": (json.dumps(FILES), "no image_path.*Rows are JSON objects"),
    "a list as image_path": (json.dumps([row(path=["a.jpg"])] * 9), "is no text.*path of an image"),
    "a number as image_path": (json.dumps(row(path=17)), "is no text.*path of an image"),
    "long addresses": (json.dumps([row(path="https://a.b/" + "c" * 5000)]), "download the image"),
    "other columns": ("picture;titel\na.jpg;x\n", "columns picture, titel.*image_path"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_no_table_of_images_ends_in_one_short_line_that_says_what_to_do(tmp_path, kind):
    content, words = WRONG[kind]
    (tmp_path / "rows").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = stop_of(ic.read_examples, tmp_path / "rows")
    assert str(tmp_path / "rows") in message and re.search(words, message), message


# ---- Folders ----
def test_a_folder_gives_images_at_any_depth_their_own_folders_as_classes(tmp_path):
    names = ["1.jpg", "Dress/2.JPG", "Dress/old/3.png", "T-Shirt/4.webp", "T-Shirt/a.b.jpeg"]
    hidden = ["Dress/.2.jpg", "Dress/._2.jpg", ".cache/5.jpg", "a/.ipynb_checkpoints/6/5.jpg"]
    texts = {"1.txt": "", "Dress/2.txt": "Red dress\n\nSilk &amp; gold \nN/A\n"}
    texts |= {"Dress/other.txt": "no", "T-Shirt/a.b.txt": "\ufeffSummer", "notes.csv": "a,b"}
    for name in [*names, *hidden, *texts]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(texts.get(name, ""), encoding="utf-8")
    examples, skipped, _ = ic.read_examples(str(tmp_path))
    assert [e.image_path for e in examples] == names and not skipped
    assert [e.class_name for e in examples] == ["", "dress", "old", "t-shirt", "t-shirt"]
    captions = (), ("Red dress", "Silk & gold"), (), (), ("Summer",)
    assert [e.captions for e in examples] == list(captions)
    assert str(tmp_path / "a") in stop_of(ic.read_examples, tmp_path / "a")  # has none to see


def test_folders_of_class_folders_are_learned(dataset, tmp_path):
    for split in ("train", "val", "test"):
        for i, old in enumerate(read_lines(dataset / f"{split}_data.json")):
            copy = tmp_path / "my_shop" / split / old["class_label"] / Path(old["image_path"]).name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(dataset / old["image_path"], copy)
            if i % 2:
                copy.with_suffix(".txt").write_text(f"{old['product_title']}\nanother {i}\n")
    constants = quick(dataset, NUM_EPOCHS=1, JSON_PATH="my_shop/{split}")
    output = run_script(tmp_path, **{k: v for k, v in constants.items() if k != "IMAGE_PATH"})
    assert re.search("train +24 images, 12 of them without a title", output)
    assert "5 classes: " in output and not read_lines(tmp_path / "outputs/skipped.jsonl")
    assert not re.search("sample|lacks|has too|rows skipped, such", output)
    lines = read_lines(tmp_path / "outputs/metrics.jsonl")
    assert len(lines) == 3 and {"accuracy", "image_to_text_r1"} <= lines[-1].keys()


# ---- Paths ----
def test_a_home_folder_is_meant_by_a_tilde_in_each_path(place, tmp_path, monkeypatch):
    paths = {"JSON_PATH": "~/data/{split}_data.json", "OUTPUT_PATH": "~/out", "MODEL": "~/m.pt"}
    paths |= {"IMAGE_PATH": "~/data", "CACHE_PATH": "~/c/d"}
    for name, path in paths.items():
        monkeypatch.setattr(ic, name, path)
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    ic.check_constants()
    assert all(getattr(ic, k) == path.replace("~", str(tmp_path)) for k, path in paths.items())
    assert len(ic.load_splits(64)["train"]) == 24 and not os.path.exists("~")


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


def change_rows(folder, change):
    for split in ("train", "val", "test"):
        path = folder / f"{split}_data.json"
        write_lines(path, [change(i, row) for i, row in enumerate(read_lines(path))])


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
    assert pixels.shape == (3, size, size) and (reason is None or str(path) in reason)
    return pixels.float(), reason


@pytest.mark.parametrize("size", [(320, 420), (500, 300), (50, 40), (224, 224), (224, 1000)])
def test_pixels_normalised_are_clips_preprocessing_bit_for_bit(tmp_path, size):
    for mode in ("RGB", "L"):
        photo(size).convert(mode).save(path := tmp_path / f"{mode}.png")
        pixels, model = ic.load_image(path, 224), tiny_model()
        expected = clip.clip._transform(224)(Image.open(path))
        assert torch.equal((pixels.float().div(255) - model.mean) / model.std, expected)


WIDE, GREY, FADING = photo((160, 100)), photo((100, 100)).convert("L"), photo((100, 100))
FADING.putalpha(Image.linear_gradient("L").resize((100, 100)))
ON_WHITE = Image.alpha_composite(Image.new("RGBA", (100, 100), "white"), FADING)
DEEP = Image.frombytes("I;16", GREY.size, bytes(byte for byte in GREY.tobytes() for _ in "16"))
(TURNED := Image.Exif())[0x0112] = 6  # the camera was turned: show it turned back by 90 degrees
SHOWN = {  # what is saved and how, what is seen, the tolerance
    "CMYK": ("JPEG", WIDE.convert("CMYK"), {"quality": 100, "subsampling": 0}, WIDE, 8),
    "palette": ("PNG", WIDE.quantize(256), {}, WIDE.quantize(256), 0),
    "deep": ("PNG", DEEP, {}, GREY, 1),
    "fading": ("PNG", FADING, {}, ON_WHITE, 0),
    "turned": ("JPEG", WIDE, {"exif": TURNED}, WIDE.transpose(Image.Transpose.ROTATE_270), 3),
    "JPEG with broken EXIF": ("JPEG", WIDE, {"exif": b"Exif\0\0garbage", "dpi": (72, 72)}, WIDE, 6),
    "PNG with broken EXIF": ("PNG", WIDE, {"exif": b"Exif\0\0garbage"}, WIDE, 0),
    "PGM": ("PPM", GREY, {}, GREY, 0),
    **{kind: (kind, WIDE, {}, WIDE, 0) for kind in ("PPM", "TGA", "TIFF", "BMP", "JPEG2000")},
}
if features.check("avif"):
    SHOWN["AVIF"] = "AVIF", WIDE, {"quality": 100}, WIDE, 3


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_load_as_a_viewer_shows_them_whatever_they_are_called(tmp_path, name):
    kind, saved, how, shown, tolerance = SHOWN[name]
    pixels, reason = loaded(tmp_path / "a.jpg", as_bytes(saved, kind, **how))
    expected, _ = loaded(tmp_path / "b.jpg", as_bytes(shown.convert("RGB"), "PNG"))
    assert reason is None and (pixels - expected).abs().mean() <= tolerance


def png(width, height, depth, color, data, channels=1):
    """A PNG of those big-endian samples, of which there may be fewer than width and height say."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    length = width * channels * depth // 8
    lines = b"".join(b"\0" + data[start : start + length] for start in range(0, len(data), length))
    content = b"\x89PNG\r\n\x1a\n"
    for kind, held in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        content += struct.pack(">I", len(held)) + kind + held
        content += struct.pack(">I", zlib.crc32(kind + held))
    return content


def tiff(data, channels, order):
    """A TIFF of 64 × 64 pixels with 16 bits a channel."""
    tags = {256: 64, 257: 64, 258: 16, 259: 1, 262: 1 + (channels > 1), 273: 26, 277: channels}
    entries, tags = b"", tags | {278: 64, 279: len(data)}
    for tag, value in tags.items():
        kind = 3, 3, 8  # three shorts, which lie there
        kind = kind if tag == 258 and channels == 3 else (4, 1, value)
        entries += struct.pack(f"{order}HHII", tag, *kind)
    start = struct.pack(f"{order}HI3H", 42, 26 + len(data), 16, 16, 16).ljust(24, b"\0")
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return {"<": b"II", ">": b"MM"}[order] + start + data + directory


def ramp(peak, kind=">H", channels=1):
    values = (peak * i // 4095 if isinstance(peak, int) else peak * i / 4095 for i in range(4096))
    return b"".join(struct.pack(kind, value) * channels for value in values)


DEPTHS = {
    "grey PNG": lambda peak: png(64, 64, 16, 0, ramp(peak)),
    "RGB PNG": lambda peak: png(64, 64, 16, 2, ramp(peak, channels=3), 3),
    "grey TIFF": lambda peak: tiff(ramp(peak, "<H"), 1, "<"),
    "RGB TIFF": lambda peak: tiff(ramp(peak, "<H", 3), 3, "<"),
    "grey big-endian TIFF": lambda peak: tiff(ramp(peak), 1, ">"),
}


@pytest.mark.parametrize("kind", DEPTHS)
def test_sixteen_bits_are_read_and_eight_or_twelve_within_them_are_left_out(tmp_path, kind):
    for peak in (255, 4095):
        _, reason = loaded(tmp_path / "a", DEPTHS[kind](peak))
        assert reason and "16 bits" in reason, peak
    pixels, reason = loaded(tmp_path / "a", DEPTHS[kind](65535))
    expected = torch.frombuffer(bytearray(ramp(255, "B")), dtype=torch.uint8).view(64, 64)
    assert reason is None and (pixels - expected.float()).abs().max() <= 1


def test_other_depths_and_what_starts_a_program_are_left_out_with_the_reason(tmp_path, monkeypatch):
    deep = {("F", 1.0): "floating point", ("F", 255.0): "floating point", ("I", 255): "16 bits"}
    for (mode, peak), words in (deep | {("I", 2**31 - 1): "32 bits", ("I", 11): "16 bits"}).items():
        image = Image.frombytes(mode, (64, 64), ramp(peak, "<i" if mode == "I" else "<f"))
        assert words in loaded(tmp_path / "a.tif", as_bytes(image, "TIFF"))[1]
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript := Mock())
    _, reason = loaded(tmp_path / "a.jpg", as_bytes(photo((80, 80)), "EPS"))
    assert "cannot be decoded" in reason and not ghostscript.called


@pytest.mark.parametrize("how", [{}, {"exif": TURNED}])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, monkeypatch, how):
    colors = random.Random(1).randbytes(3 * 9 * 14)  # smooth as enlarged photographs are
    image = Image.frombytes("RGB", (9, 14), colors).resize((900, 1401), Image.Resampling.BICUBIC)
    found, _ = loaded(tmp_path / "a.jpg", as_bytes(image, "JPEG", quality=95, **how))
    sizes, draft, kind = [], Image.Image.draft, type(Image.open(tmp_path / "a.jpg"))
    monkeypatch.setattr(kind, "draft", lambda self, *how: sizes.append(how) or draft(self, *how))
    whole = ic.load_image(tmp_path / "a.jpg", 64).float()  # Image's own draft does nothing
    assert sizes and (found - whole).abs().mean() < 2 and (found - whole).abs().max() < 20
    assert found.std() > 30


def huge_jpeg(side):
    """A grey JPEG: each block of 8 × 8 pixels is the same six bits."""
    content = as_bytes(Image.new("L", (16, 16), 128), "JPEG")
    start, size = content[: content.index(b"\xff\xda") + 10], content.index(b"\xff\xc0") + 5
    start = start[:size] + struct.pack(">HH", side, side) + start[size + 4 :]
    return start + b"\x28\xa2\x8a" * (side * side // 256) + b"\xff\xd9"


def test_jpegs_of_up_to_200_megapixels_are_read_and_larger_images_named(tmp_path):
    for side in (9_760, 14_080):  # 95 megapixels, and more than twice Pillow's limit
        pixels, reason = loaded(tmp_path / "a.jpg", huge_jpeg(side))
        assert reason is None and (pixels == 128).all()
    for content in (huge_jpeg(14_400), *(png(s, s, 1, 0, b"") for s in (9_500, 14_080, 20_000))):
        _, reason = loaded(tmp_path / "large", content)
        assert reason.startswith("too many pixels, make the image smaller")


@pytest.mark.filterwarnings("ignore")  # of what Pillow makes of them
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "PPM", "TGA"])
def test_damaged_pictures_are_decoded_or_the_reason_is_told(tmp_path, kind):
    rng, whole, reasons = random.Random(kind), as_bytes(photo((40, 48)), kind), set()
    for i in range(100):
        damaged = bytearray(whole[: rng.randrange(len(whole)) if i % 3 == 0 else None])
        for _ in range(i % 20 if damaged else 0):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        reasons.add(loaded(tmp_path / "damaged", damaged, 32)[1])
    assert len(reasons) > 1 and None in reasons


def test_bad_pictures_are_left_out_and_listed_and_odd_paths_work(place, monkeypatch):
    rows = read_lines(place / "train_data.json")
    good = (place / rows[0]["image_path"]).read_bytes()
    contents = {"empty": b"", "text": b"<html>", "cut": good[:-500], "C:x": good, "../out": good}
    for name, content in contents.items():
        (place / f"{name}.jpg").write_bytes(content)
    Image.new("1", (2, 400)).save(place / "strip.png")
    bad = {"empty.jpg": "cannot identify", "text.jpg": "cannot identify", "cut.jpg": "truncated"}
    nowhere = "no.jpg", "", ".", "images", "a\0.jpg", "\ud800.jpg", "../../no.jpg", "/no.jpg"
    bad |= dict.fromkeys(nowhere, "no such file") | {"": "no image_path", "strip.png": "strip"}
    odd = ["C:x.jpg", "../out.jpg", str(place.parent / "out.jpg")]
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


# ---- The cache ----
@pytest.fixture
def paths(place):
    return sorted(str(path) for path in (place / "images/train").iterdir())


def cached(paths):
    """The images' pixels by way of the cache."""
    return ic.open_cache("train", paths, 64)[0]


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
    age, change = functools.partial(os.utime, paths[3], ns=(0, 0)), monkeypatch.setattr
    upgrade = functools.partial(change, ic.Image, "__version__", "99.0")
    deny = functools.partial(change, os, "access", lambda path, mode: False)
    changes = (lambda: None, age, grow, paths.reverse, paths.pop, swap, upgrade, deny)
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
        ic.open_cache("train", paths, 64)
        """
    run_driver(tmp_path / "run", lines, {"CACHE_PATH": str(tmp_path / "cache")}, code=9)
    assert files(".tmp") and not files(".u8") and not files(".pt")
    assert is_right(paths) and not files(".tmp")
    for ending in (".pt", ".u8"):  # a kill between both; somebody who deleted the large ones
        files(".u8")[0].write_bytes(bytes(files(".u8")[0].stat().st_size))
        files(ending)[0].unlink()
        assert is_right(paths), ending


def test_a_table_or_a_cache_out_of_reach_is_one_line(paths, monkeypatch):
    fail = Mock(side_effect=OSError(errno.EROFS, "Read-only file system"))
    for module, call in ((ic, "open"), (os, "fsync")):
        with monkeypatch.context() as failing:
            failing.setattr(module, call, fail, raising=False)
            assert re.search("cannot write cache/train.*Read-only", stop_of(cached, paths))
        assert not files()
    for module in (Path, io, ic):
        monkeypatch.setattr(module, "open", fail, raising=False)
    assert re.search("train_data.json: .*Read-only", stop_of(ic.load_splits, 64))


def test_a_process_whose_first_one_failed_to_decode_ends_with_a_line(paths, monkeypatch):
    monkeypatch.setattr(ic, "LOCAL_RANK", 1)  # it waits for the first, and then finds nothing
    assert "cache" in stop_of(cached, paths)


# ---- Splits ----
def made(count, product=lambda i: "", digest=lambda i: i):
    """Examples of an image each, by default of products and pixels of their own."""
    rows = [(str(i), ("x",), "", str(product(i)), (i + 1,), i, digest(i)) for i in range(count)]
    return [ic.Example(*row) for row in rows]


def test_the_smallest_datasets_are_shared_by_train_and_val(monkeypatch):
    for count, seed in ((count, seed) for count in (2, 3, 4) for seed in range(200)):
        monkeypatch.setattr(ic, "SEED", seed)
        assert all(ic.hold_out(made(count))), f"{count} images, seed {seed}"


@pytest.mark.parametrize("seed", range(12))
def test_rows_that_are_added_never_move_what_was_trained_on_into_val(monkeypatch, seed):
    """Images alone, of products of some images, and of equal pixels, in any order."""
    monkeypatch.setattr(ic, "SEED", seed)
    rng, trained, examples = random.Random(seed), set(), []
    for size in (30, 33, 40, 80, 200, 700, 1500, 4000):
        for i in range(len(examples), size):
            kind, shared = rng.randrange(3), rng.randrange(4 * size)
            product, digest = f"P{shared}" if kind == 1 else "", shared if kind == 2 else 10**6 + i
            examples.append(ic.Example(f"{i}", ("x",), "", product, (i,), i, digest))
        rng.shuffle(examples)
        train, val = ic.hold_out(examples)
        groups = [{e.product or e.digest for e in side} for side in (train, val)]
        assert train and val and len(train) + len(val) == size and groups[0].isdisjoint(groups[1])
        assert trained.isdisjoint(e.image_path for e in val)
        asked = size * max(0.05, min(0.2, 100 / size))
        assert abs(len(val) - asked) < 6 * asked**0.5
        trained.update(e.image_path for e in train)


def test_a_product_id_of_few_large_products_is_named(monkeypatch):
    """And no such column where it is pictures that are alike, as a shop's placeholders."""
    groups = [(lambda i: "yes" if i % 2 else "no", int), (lambda i: "one", int)]
    groups += [(lambda i: "x" if i % 9 else i, int), (lambda i: "", lambda i: i * (i % 2))]
    stopped = set()
    for number, seed in ((number, seed) for number in range(4) for seed in range(9)):
        monkeypatch.setattr(ic, "SEED", seed)
        try:  # the large product of the third is held out, or not
            assert all(ic.hold_out(made(100, *groups[number])))
        except SystemExit as stop:
            assert ("product_id" in str(stop)) == (number < 3), str(stop)
            stopped.add(number)
    assert {0, 1, 2} <= stopped


def without_val(place, rows):
    """The examples of train and of the val that is held out of it."""
    for split in ("val", "test"):
        (place / f"{split}_data.json").unlink()
    write_lines(place / "train_data.json", rows)
    return [data.examples for data in ic.load_splits(64).values()]


def test_one_picture_of_three_names_is_on_one_side_and_val_lacks_its_class(place, capsys):
    """In other files, too: the pixels count. Each image has two titles, each picture a class."""
    rows = []
    for i, old in enumerate(read_lines(place / "train_data.json")):
        names = [old["image_path"], f"images/copy {i}.jpeg", f"images/{i}.png"]
        shutil.copy(place / names[0], place / names[1])
        Image.open(place / names[0]).save(place / names[2], format="PNG")
        new = [{"image_path": name, "product_title": f"{i} {n}"} for name in names for n in "ab"]
        rows += [old | changes | {"class_label": f"kind {i:02}"} for changes in new]
    train, val = without_val(place, rows)
    sides = [{example.class_name for example in side} for side in (train, val)]
    assert sides[0].isdisjoint(sides[1]) and len(sides[0]) + len(sides[1]) == 24
    assert len(train) + len(val) == 72 and all(len(e.captions) == 2 for e in train + val)
    told = f"val: {len(sides[1])} classes that train lacks: {', '.join(sorted(sides[1]))}\n"
    assert told in capsys.readouterr().out


TOO_FEW = [(24, 11, "line 12: .*.jpeg"), (24, 0, "line 1: ")]
TOO_FEW += [(0, 0, "it is empty"), (1, 1, "train and val")]


@pytest.mark.parametrize("count, good, words", TOO_FEW)
def test_too_few_usable_rows_end_with_one_line(place, count, good, words):
    (place / "val_data.json").unlink()
    rows = read_lines(place / "train_data.json")[:count]
    for wrong in rows[good:]:
        (place / wrong["image_path"]).unlink()
        if not good:  # the images are in the table
            wrong["image_path"] = "data:image/png;base64," + "iVBOR" * 9999
    write_lines(place / "train_data.json", rows)
    assert re.search(f"_data.json.*{words}", stop_of(ic.load_splits, 64))


# ---- What is told, through the front door ----
def test_files_of_rows_that_do_not_fit_each_other_are_told(dataset, tmp_path):
    """Numbers written in three ways, images that train has, under other names; paths are relative
    to the table, absolute, and with Windows' backslashes."""
    data = shutil.copytree(dataset, tmp_path / "Ann's shop/my data")
    forms = {"train": int, "val": float, "test": "0{}".format}
    rows = {split: read_lines(data / f"{split}_data.json") for split in forms}
    for i, old in enumerate(rows["train"][:3]):
        copy = shutil.copy(data / old["image_path"], data / f"other {i}.jpeg")
        rows["val"][i]["image_path"] = str(copy)
    rows["test"][5]["image_path"] = rows["train"][7]["image_path"].replace("/", "\\")
    for split, form in forms.items():
        labelled = [old | {"class_label": form(i % 4)} for i, old in enumerate(rows[split])]
        write_lines(data / f"{split}_data.json", labelled)
    constants = {k: v for k, v in quick(data, NUM_EPOCHS=0).items() if k != "IMAGE_PATH"}
    output = run_script(tmp_path, **constants)
    assert "24 images" in output and "rows skipped, such" not in output
    assert "val: 4 classes that train lacks: 0.0, 1.0, 2.0, 3.0\n" in output
    assert "test: 4 classes that train lacks: 00, 01, 02, 03\n" in output
    assert re.search("val: 3 images that train has too, such as .*other 0.jpeg", output)
    assert re.search("test: 1 images? that train has too, such as images/train/", output)


def test_what_is_left_out_is_told_by_kind_and_classes_are_counted_and_named(dataset, tmp_path):
    rows = read_lines(dataset / "train_data.json")
    for i, old in enumerate(rows):
        old["class_label"] = f"dress, color {i}"
    (dataset / "deep.png").write_bytes(png(64, 64, 16, 0, ramp(4095)))
    bad = [row(path=f"https://shop.example/{i}.jpg") for i in range(4)]
    bad += [row(path=f"no {i}.jpg") for i in range(3)] + [row(path="deep.png")]
    bad += [row(path="x.jpg", label="a"), row(path="x.jpg", label="b")]
    bad += [rows[-1] | {"product_title": "N/A", "class_label": None}, row(path=None)]
    write_lines(dataset / "train_data.json", rows[:-1] + bad)
    output = run_script(tmp_path, **quick(dataset, NUM_EPOCHS=0))
    kinds = {"download the image first: https://shop": 4, "no such file: .*no 0": 3}
    kinds |= {"16 bits.*deep.png": 1, "several classes: x.jpg is a, b": 2, "no title": 1}
    kinds |= {"no image_path": 1}
    said = output.partition("\ntest ")[2]  # after the splits' lines
    for words, count in kinds.items():
        assert re.search(rf"\b{count} rows skipped.* line \d.*{words}.*skipped\.jsonl", said), words
    assert len(read_lines(tmp_path / "outputs/skipped.jsonl")) == 12
    assert re.search(r"\b\d\d classes: .*dress, color 0, dress, color 1,", output)
    (dataset / "val_data.json").write_text("image_path,product_title\na.jpg,a saree, red\n")
    last = run_script(tmp_path, code=1, **quick(dataset)).splitlines()[-1]
    assert re.search(r"val_data\.json, line 2: .*Mend that line", last)


def test_what_no_row_has_is_told(place, capsys):
    for label in (None, "saree"):  # nothing to tell from others
        change_rows(place, lambda i, r, label=label: r | {"class_label": label})
        assert (ic.load_splits(64)["train"].labels == -1).all()
        assert re.search("columns .*brand.*; 0 classes", capsys.readouterr().out)
        skipped = read_lines("outputs/skipped.jsonl")  # the sample has titles that are N/A
        assert skipped and all("no title, and no class" in line["reason"] for line in skipped)
    change_rows(place, lambda i, r: r | {"title": r.pop("product_title")})
    words = "nothing to learn: no product_title and fewer than two.*, title"
    assert re.match(words, stop_of(ic.load_splits, 64))
    change_rows(place, lambda i, r: r | {"class_label": "ab"[i % 2]})
    assert not len(ic.load_splits(64)["train"].pairs)
    output = capsys.readouterr().out
    assert re.search("columns .*, title[,;]", output) and "24 of them without a title" in output


# ---- Dataset and batches ----
def numbered(captions, labels=None):
    """A dataset, by default of two classes in turns, whose images show their number."""
    labels = labels or [("gowns", "saree")[i % 2] for i in range(len(captions))]
    pixels = torch.arange(len(captions), dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 1, 1)
    return toy_dataset(labels, captions, pixels)


def test_tokens_are_clips_own_of_each_caption_once():
    captions = ["Blue Saree", "word " * 75, "word " * 76, "blue SAREE", "Blue Saree", "साड़ी"]
    captions.append("CafÃ© Saree")  # UTF-8 read as Latin-1: clip reads it as Café Saree
    data = numbered([*captions, ("Café Saree", "cafÃ© saree", "red"), ()])
    tokens = clip.tokenize(captions, truncate=True).int()
    assert torch.equal(data[torch.arange(7)][1], tokens)
    assert torch.equal(data.tokens[[rows[0] for rows in data.captions[:7]]], tokens)
    assert len(data.tokens) == 5 + 2 * len(ic.PROMPTS) and len(data.captions[7]) == 2
    prompts = [prompt for name in data.class_names for prompt in ic.class_prompts(name)]
    assert torch.equal(data.tokens[data.prompts.flatten()], clip.tokenize(prompts).int())
    captions = data.captions[:8]  # the ninth image has none, and a prompt of its class
    assert data.pairs.tolist() == [[i, c] for i, found in enumerate(captions) for c in found]
    assert torch.equal(data[8][1], clip.tokenize(prompts)[0].int())
    assert data.titled.tolist() == [True] * 8 + [False]


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


def images_of(batch):
    return batch.pixels[:, 0, 0, 0].tolist()


def same(one, other):
    pairs = zip([*one[:4], *one.parts[:2]], [*other[:4], *other.parts[:2]], strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def test_batches_are_full_of_distinct_images_and_follow_from_seed_and_epoch(monkeypatch):
    data = numbered([(f"saree {i}", f"red {i}", f"blue {i}") for i in range(23)])
    before = repr(vars(data))
    epochs = [list(ic.epoch_batches(data, epoch, 5)) for epoch in range(9)]
    for batches in epochs:
        assert [len(batch.pixels) for batch in batches] == [5] * 4
        assert len(set(sum(map(images_of, batches), []))) == 20
    assert len(set(sum(map(images_of, sum(epochs, [])), []))) == 23  # who waited had a turn
    for first in range(5):
        again = list(ic.epoch_batches(data, 2, 5, first_step=first))
        assert len(again) == 4 - first and all(map(same, again, epochs[2][first:]))
    assert repr(vars(data)) == before  # drawing captions has changed nothing
    monkeypatch.setattr(ic, "SEED", 1)
    others = epochs[2][0], next(ic.epoch_batches(data, 1, 5))
    assert all(images_of(other) != images_of(epochs[1][0]) for other in others)


def test_an_image_is_taken_once_an_epoch_with_one_of_its_captions():
    captions = [[f"{word} saree {i}" for word in ("red", "blue", "gold")] for i in range(20)]
    data, drawn = numbered(captions), [[] for _ in range(20)]
    for epoch in range(60):
        [batch] = ic.epoch_batches(data, epoch, 20)
        assert sorted(images_of(batch)) == list(range(20))
        for image, text in zip(images_of(batch), batch.tokens[batch.inverse], strict=True):
            own = [bool((data.tokens[caption] == text).all()) for caption in data.captions[image]]
            assert sum(own) == 1
            drawn[image].append(own.index(True))
    assert all(min(map(seen.count, range(3))) > 8 for seen in drawn)
    assert len({tuple(seen) for seen in drawn}) == 20  # each on its own


def test_a_batch_has_its_classes_prompts_of_one_template_and_says_who_takes_part(monkeypatch):
    labels = ["" if i % 7 == 6 and i % 5 < 4 else f"class {i % 9}" for i in range(90)]
    data = numbered([f"saree {i % 30}" if i % 5 < 4 else () for i in range(90)], labels)
    templates, names = set(), data.class_names
    prompts = clip.tokenize([prompt for name in names for prompt in ic.class_prompts(name)])
    prompts = prompts.view(len(names), len(ic.PROMPTS), 77).int()
    for batch in (batch for epoch in range(5) for batch in ic.epoch_batches(data, epoch, 12)):
        rows, parts = images_of(batch), batch.parts
        assert parts.titled.tolist() == [place for place, i in enumerate(rows) if i % 5 < 4]
        assert parts.counts == (len(parts.titled), sum(labels[i] > "" for i in rows))
        present = sorted({labels[i] for i in rows} - {""})
        assert batch.num_classes == len(present) == len(batch.prompts)
        classes = [present.index(labels[i]) if labels[i] else -100 for i in rows]
        assert parts.classes.tolist() == classes
        own = prompts[[names.index(name) for name in present]]
        templates |= {int(k) for k in (own == batch.prompts[:, None]).all(2).all(0).nonzero()}
        assert (own == batch.prompts[:, None]).all(2).all(0).sum() == 1
        assert len(batch.tokens.unique(dim=0)) == len(batch.tokens) == batch.inverse.max() + 1
    assert templates == set(range(len(ic.PROMPTS)))
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0)  # then no prompt is encoded
    batch = next(ic.epoch_batches(data, 1, 12))
    assert len(batch.prompts) == batch.num_classes == batch.parts.counts[1] == 0
    assert (batch.parts.classes == -100).all()

"""Rows, captions and pictures: the real files' quirks, and everything that can be wrong with them."""

import json
import random
import subprocess
import sys
from types import SimpleNamespace

import clip
import pytest
import torch
from conftest import (
    ROOT,
    edited_script,
    environment,
    make_dataset,
    quick,
    read_skipped,
    run_script,
    tiny_model,
    write_rows,
)
from hypothesis import given, settings as hypothesis_settings, strategies as st
from PIL import Image, ImageOps

import indofashion_clip as ic


def row(title="Women's Silk Saree", path="images/train/0.jpeg", label="saree", **more):
    return {
        "image_url": "N/A",
        "image_path": path,
        "brand": "N/A",
        "product_title": title,
        "class_label": label,
    } | more


@pytest.mark.parametrize(
    "title, caption",
    [
        ("Navy Blue &amp; Gold-Toned  Silk\tSaree ", "Navy Blue & Gold-Toned Silk Saree"),
        ("Aambal® Women’s Saree", "Aambal® Women’s Saree"),
        ("x" * 60 + " Red", "x" * 60 + " Red"),
        ("N/A", "a photo of a saree"),
        ("NA", "a photo of a saree"),
        ("", "a photo of a saree"),
        ("  ", "a photo of a saree"),
        (None, "a photo of a saree"),
        (7, "a photo of a saree"),
        ("bad \ud800 half", "bad half"),
    ],
)
def test_captions(tmp_path, settings, title, caption):
    write_rows(tmp_path / "rows.json", [row(title)])
    [record], skipped = ic.read_records(tmp_path / "rows.json", settings)
    assert record.caption == caption and not skipped
    assert record.titled == (not caption.startswith("a photo"))


def test_class_names(settings):
    assert ic.class_prompts("kurta_men", settings)[0] == "a photo of a men's kurta"
    assert ic.class_prompts("t_shirt", settings)[0] == "a photo of a t shirt"


def test_json_array_reads_as_json_lines(tmp_path, settings):
    rows = [row(), row("Red Saree", "images/train/1.jpeg")]
    write_rows(tmp_path / "lines.json", rows)
    (tmp_path / "array.json").write_text("\ufeff \n" + json.dumps(rows, indent=1), encoding="utf-8")
    assert ic.read_records(tmp_path / "lines.json", settings) == ic.read_records(
        tmp_path / "array.json", settings
    )


def test_unusable_rows(tmp_path, settings):
    good = row()
    lines = [
        "{not json",
        "[1, 2]",
        "",
        json.dumps(row(path=None)),
        json.dumps(row(label="")),
        json.dumps(row(path="/etc/passwd")),
        json.dumps(row(path="images/../../x.jpeg")),
        "[" * 100_000,
        json.dumps(good),
        json.dumps(row(path="images/a/../b.jpeg")),
    ]
    (tmp_path / "rows.json").write_text("\n".join(lines), encoding="utf-8")
    records, skipped = ic.read_records(tmp_path / "rows.json", settings)
    assert [record.line for record in records] == [9, 10]
    assert [line for line, _ in skipped] == [1, 2, 4, 5, 6, 7, 8]
    reasons = dict(skipped)
    assert reasons[1] == reasons[2] == "not a JSON object"
    assert reasons[4] == "no image_path" and reasons[5] == "no class_label"
    assert "outside IMAGE_PATH" in reasons[6] and "outside IMAGE_PATH" in reasons[7]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
field_names = st.sampled_from(["image_path", "class_label", "product_title", "color"])
almost_rows = st.dictionaries(field_names, json_values | st.text(), max_size=4)


@hypothesis_settings(max_examples=300, deadline=None)
@given(
    st.binary()
    | st.lists(almost_rows | json_values).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(almost_rows).map(lambda rows: json.dumps(rows).encode())
)
def test_any_bytes_give_records_or_reasons(tmp_path_factory, content):
    settings = SimpleNamespace(PROMPTS=ic.PROMPTS, CLASS_NAMES=ic.CLASS_NAMES)
    path = tmp_path_factory.mktemp("fuzz") / "rows.json"
    path.write_bytes(content)
    records, skipped = ic.read_records(path, settings)
    for record in records:
        assert record.caption and record.class_label and record.image_path
        record.caption.encode("utf-8")
        assert not record.image_path.startswith(("/", ".."))
    assert all(isinstance(line, int) and reason for line, reason in skipped)
    assert len({line for line, _ in skipped} | {r.line for r in records}) == len(skipped) + len(records)
    if records:
        ic.tokenize([record.caption for record in records])


def test_unreadable_file_raises_oserror(tmp_path, settings):
    with pytest.raises(OSError):
        ic.read_records(tmp_path / "missing.json", settings)


def test_tokens_are_clips_and_truncation_is_counted():
    captions = ["Navy Blue & Gold Saree", "word " * 75, "word " * 76, "word " * 500]
    tokens, truncated = ic.tokenize(captions)
    assert torch.equal(tokens.long(), clip.tokenize(captions, truncate=True))
    assert truncated == 2


def test_every_caption_is_tokenized_once(dataset, settings, monkeypatch):
    seen = []
    real = ic.tokenize
    monkeypatch.setattr(ic, "tokenize", lambda captions: seen.extend(captions) or real(captions))
    records = [ic.Record(i + 1, "x", f"caption {i % 3}", "saree", True) for i in range(9)]
    data = ic.FashionDataset("train", records, settings, 64, None, list(range(9)), 0)
    assert len(seen) == len(set(seen)) == 3 + len(settings.PROMPTS)
    assert data.captions == ["caption 0", "caption 1", "caption 2"]
    assert data.caption_ids.tolist() == [0, 1, 2] * 3


def photo(size=(320, 420), seed=0):
    rng = random.Random(seed)
    small = Image.new("RGB", (8, 10))
    small.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(80)])
    return small.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(320, 420), (500, 300), (50, 40), (224, 224), (224, 1000)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pixels_normalised_are_clips_preprocessing_bit_for_bit(tmp_path, size, mode):
    photo(size).convert(mode).save(tmp_path / "a.png")
    pixels = ic.load_image(tmp_path / "a.png", 224)
    model = tiny_model()
    expected = clip.clip._transform(224)(Image.open(tmp_path / "a.png"))
    assert torch.equal((pixels.float().div(255) - model.mean) / model.std, expected)


def close(path, expected, tolerance=3):
    pixels = ic.load_image(path, 64)
    expected.save(path.with_name("expected.png"))
    difference = (pixels.int() - ic.load_image(path.with_name("expected.png"), 64).int()).abs()
    return difference.float().mean() <= tolerance


def test_pictures_load_as_a_viewer_shows_them(tmp_path):
    original = photo((100, 100))
    original.convert("CMYK").save(tmp_path / "cmyk.jpeg", quality=100, subsampling=0)
    assert close(tmp_path / "cmyk.jpeg", original, 8)
    original.quantize(256).save(tmp_path / "palette.png")
    assert close(tmp_path / "palette.png", original.quantize(256).convert("RGB"), 0.1)
    original.quantize(64).save(tmp_path / "palette.gif")
    assert close(tmp_path / "palette.gif", original.quantize(64).convert("RGB"), 2)
    grey = original.convert("L")
    grey.save(tmp_path / "grey.jpeg", quality=100)
    assert close(tmp_path / "grey.jpeg", grey.convert("RGB"))
    deep = Image.new("I;16", grey.size)
    deep.putdata(
        [
            value * 257
            for value in list(
                grey.get_flattened_data() if hasattr(grey, "get_flattened_data") else grey.getdata()
            )
        ]
    )
    deep.save(tmp_path / "deep.png")
    assert close(tmp_path / "deep.png", grey.convert("RGB"), 1)
    half = original.convert("RGBA")
    half.putalpha(Image.linear_gradient("L").resize(half.size))
    half.save(tmp_path / "half.png")
    white = Image.new("RGBA", half.size, "white")
    assert close(tmp_path / "half.png", Image.alpha_composite(white, half).convert("RGB"), 0.1)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned back by 90 degrees
    wide = photo((160, 100))
    wide.save(tmp_path / "turned.jpeg", exif=exif, quality=100, subsampling=0)
    assert close(
        tmp_path / "turned.jpeg", ImageOps.exif_transpose(Image.open(tmp_path / "turned.jpeg")).convert("RGB")
    )
    assert close(tmp_path / "turned.jpeg", wide.transpose(Image.Transpose.ROTATE_270))


def break_pictures(data):
    """One of each kind of bad picture among the train rows → {line: a word of the reason}."""
    rows = [json.loads(line) for line in open(data / "train_data.json", encoding="utf-8")]
    paths = [data / r["image_path"] for r in rows]
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].write_bytes(photo().tobytes()[:5000])
    whole = (data / rows[3]["image_path"]).read_bytes()
    paths[3].write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(paths[4], "PNG")
    Image.new("RGB", (2, 4000)).save(paths[5], "PNG")
    return {1: "no image", 2: "empty", 3: "cannot identify", 4: "truncated", 5: "bomb", 6: "strip"}


@pytest.mark.parametrize("cache", ["cache", ""])
def test_bad_pictures_are_left_out_listed_and_counted(tmp_path, dataset, cache):
    expected = break_pictures(dataset)
    for _ in range(2):  # the second time from the cache
        (tmp_path / "outputs" / "last.pt").unlink(missing_ok=True)
        output = run_script(tmp_path, **quick(dataset, NUM_EPOCHS=1, CACHE_PATH=cache))
        skipped = read_skipped(tmp_path)
        assert {s["line"] for s in skipped} == set(expected) and {s["split"] for s in skipped} == {"train"}
        assert all(expected[s["line"]] in s["reason"] for s in skipped), skipped
        assert "18 rows used, 6 left out" in output


@pytest.mark.parametrize(
    "change, words",
    [
        ({"IMAGE_PATH": "nowhere"}, ["IMAGE_PATH", "nowhere"]),
        ({"JSON_PATH": "nowhere/{split}.json"}, ["JSON_PATH", "nowhere/train.json"]),
        ({"IMAGE_PATH": "."}, ["images/train/", "IMAGE_PATH", "24 of 24"]),
        ({"MODEL": "ViT-Z"}, ["MODEL", "ViT-Z", "ViT-B/32"]),
        ({"MODEL": "garbage.pt"}, ["MODEL", "garbage.pt"]),
    ],
)
def test_mistakes_stop_the_run_with_one_line(tmp_path, dataset, change, words):
    (tmp_path / "garbage.pt").write_bytes(b"PK\x03\x04 garbage" * 99)
    output = run_script(tmp_path, code=1, **quick(dataset) | change)
    last = output.strip().splitlines()[-1]
    assert all(word in last for word in words), output
    assert "Traceback" not in output


def test_no_usable_row_stops_the_run(tmp_path, dataset):
    (dataset / "train_data.json").write_text("")
    assert "Traceback" not in run_script(tmp_path, code=1, **quick(dataset))


def test_a_dataset_without_val_and_test_trains(tmp_path, dataset):
    (dataset / "val_data.json").unlink()
    (dataset / "test_data.json").unlink()
    output = run_script(tmp_path, **quick(dataset))
    assert "nothing is evaluated on it" in output and (tmp_path / "outputs/best.pt").exists()


def test_the_cache_is_rebuilt_when_and_only_when_something_changed(tmp_path, monkeypatch):
    make_dataset(tmp_path, train=6)
    paths = sorted(str(path) for path in (tmp_path / "images/train").iterdir())
    runs = []
    real = ic.decode_pictures
    monkeypatch.setattr(ic, "decode_pictures", lambda *a: runs.append(1) or real(*a))
    cache = str(tmp_path / "cache" / "train.u8")

    def pixels(resolution=64, files=paths):
        return ic.cache_pictures(files, resolution, cache, 0)[0]

    first = pixels().clone()
    assert torch.equal(first, torch.stack([ic.load_image(path, 64) for path in paths]))
    assert torch.equal(pixels(), first) and len(runs) == 1
    pixels(resolution=32)
    assert len(runs) == 2
    assert torch.equal(pixels(files=paths[::-1]), first.flip(0)) and len(runs) == 3
    photo((90, 90)).save(paths[0], "JPEG")
    assert not torch.equal(pixels()[0], first[0]) and len(runs) == 4
    open(cache, "r+b").truncate(1000)
    assert torch.equal(pixels()[1:], first[1:]) and len(runs) == 5


def test_a_failed_cache_leaves_nothing(tmp_path, monkeypatch):
    make_dataset(tmp_path, train=6)
    paths = sorted(str(path) for path in (tmp_path / "images/train").iterdir())
    monkeypatch.setattr(ic, "decode_pictures", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ic.cache_pictures(paths, 64, str(tmp_path / "cache/train.u8"), 0)
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], ["train.u8.lock"])


def test_two_runs_that_make_one_cache_take_turns(tmp_path):
    make_dataset(tmp_path, train=20)
    script = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import indofashion_clip as ic, glob\n"
        "paths = sorted(glob.glob(sys.argv[2] + '/images/train/*'))\n"
        "pixels, bad = ic.cache_pictures(paths, 224, sys.argv[2] + '/cache/train.u8', 2)\n"
        "assert not bad and torch.equal(pixels, torch.stack([ic.load_image(path, 224) for path in paths]))\n"
    )
    command = [sys.executable, "-c", script, str(ROOT), str(tmp_path)]
    runs = [subprocess.Popen(command, env=environment()) for _ in range(2)]
    assert [run.wait() for run in runs] == [0, 0]


def test_too_little_disk_says_what_to_do(tmp_path, monkeypatch):
    make_dataset(tmp_path, train=2)
    monkeypatch.setattr(ic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    paths = sorted(str(path) for path in (tmp_path / "images/train").iterdir())
    with pytest.raises(ic.Stop, match="CACHE_PATH.*Free some"):
        ic.cache_pictures(paths, 64, str(tmp_path / "cache/train.u8"), 0)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_mutated_pictures_are_decoded_or_listed(tmp_path, kind):
    rng = random.Random(kind)
    photo((40, 48)).save(tmp_path / "whole", kind)
    whole = (tmp_path / "whole").read_bytes()
    decoded = 0
    for number in range(600):
        mutated = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            mutated[rng.randrange(len(mutated))] = rng.randrange(256)
        if rng.random() < 0.2:
            mutated = mutated[: rng.randrange(len(mutated))]
        (tmp_path / "mutated").write_bytes(mutated)
        pixels = ic.read_image(str(tmp_path / "mutated"), 32)
        if isinstance(pixels, str):
            assert str(tmp_path / "mutated") in pixels
        else:
            assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.uint8
            decoded += 1
    assert 0 < decoded < 600


def test_spawned_workers_decode(tmp_path, dataset):
    """As on Windows and macOS, where a worker imports the script anew and is sent the dataset."""
    edited_script(tmp_path, **quick(dataset))
    (tmp_path / "spawn.py").write_text(
        "import os, torch, indofashion_clip as ic\n"
        "if __name__ == '__main__':\n"
        "    torch.multiprocessing.set_start_method('spawn')\n"
        "    settings = ic.read_settings()\n"
        "    os.makedirs(settings.OUTPUT_PATH)\n"
        "    settings.CACHE_PATH = ''\n"
        "    data, _ = ic.load_split('train', settings.JSON_PATH.replace('{split}', 'train'), settings, 64, 1)\n"
        "    pixels, tokens, rows = next(iter(torch.utils.data.DataLoader(data, 24, num_workers=1)))\n"
        "    assert pixels.shape == (24, 3, 64, 64) and rows.tolist() == list(range(24))\n"
    )
    subprocess.run([sys.executable, "spawn.py"], cwd=tmp_path, check=True, env=environment())


def test_91166_rows_are_read_and_their_pictures_numbered(tmp_path, settings):
    """Size only: the time is measured by the benchmark."""
    write_rows(
        tmp_path / "rows.json", [row(f"Saree {i % 7000}", f"images/train/{i}.jpeg") for i in range(91_166)]
    )
    records, skipped = ic.read_records(tmp_path / "rows.json", settings)
    assert len(records) == 91_166 and not skipped

"""Searching and classifying as a user does: data/search.py beside the script, its constants set."""

import csv
import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import clip
import pytest
import torch
from conftest import ROOT, edited_script, grown, launch, tiny_model
from PIL import Image

import indofashion_clip as ic

FILES = sorted((ROOT / "data/sample/images/test").iterdir())[:5]
LINE = re.compile(r"^  (-?\d\.\d{3})  (.*)$", flags=re.M)


@pytest.fixture
def shop(tmp_path):
    """The folder data/ beside the script, from which all is run: a model, photos/0.jpg to 4.jpg."""
    edited_script(tmp_path)
    (shop := tmp_path / "data" / "photos").mkdir(parents=True)
    for number, file in enumerate(FILES):
        shutil.copy(file, shop / f"{number}.jpg")
    torch.save(grown(tiny_model()).state_dict(), shop.parent / "best.pt")
    return shop.parent


def edited_search(shop, **constants):
    """search.py in that folder, with those constants."""
    source = (ROOT / "data/search.py").read_text(encoding="utf-8")
    constants = {"MODEL": "best.pt", "FOLDER": "photos", "CLASSES": []} | constants
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.M)
        assert count == 1, f"{name} is not one line of search.py"
    (script := shop / "search.py").write_text(source, encoding="utf-8")
    return script


def search(shop, *queries, code=0, encoding="utf-8", **constants):
    """What search.py prints."""
    console = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "PYTHONPATH": ""}
    return launch(edited_search(shop, **constants), *queries, code=code, **console)


def read_page(shop):
    """(search.html, the files of its photos, its heading)."""
    page = (shop / "search.html").read_text(encoding="utf-8")
    links = map(html.unescape, re.findall('src="(.*?)"', page))
    [heading] = re.findall("<h1>(.*?)</h1>", page)
    return page, [Path(unquote(urlsplit(link).path)) for link in links], html.unescape(heading)


@torch.no_grad()
def features(shop, *texts):
    """(the model, the photos' features, the texts')."""
    how = (model := ic.load_clip(str(shop / "best.pt"))), torch.float32
    pixels = torch.stack([ic.load_image(file, 64) for file in FILES])
    return model, ic.encode_images(*how, pixels), ic.encode_texts(*how, clip.tokenize(texts))


def test_words_and_a_photo_find_the_nearest(shop):
    _, images, texts = features(shop, "red lehenga choli")
    output = search(shop, "red lehenga choli", "photos/2.jpg", RESULTS=3)
    found = [(path, float(value)) for value, path in LINE.findall(output)]
    for rows, query in ((found[:3], texts[0]), (found[3:], images[2])):
        values, numbers = (images @ query).topk(3)
        assert [path for path, _ in rows] == [f"photos/{i}.jpg" for i in numbers]
        assert max(abs(a - b) for (_, a), b in zip(rows, values.tolist(), strict=True)) < 0.01
    _, photos, heading = read_page(shop)
    assert heading == "photos/2.jpg"
    assert [file.name for file in photos] == [Path(path).name for path, _ in found[3:]]
    assert output.count(str(shop / "search.html")) == 2 and not (shop / "classes.csv").exists()


def test_only_what_changed_is_encoded(shop):
    """A photo is replaced by noise that keeps its size and time: its features stay, too."""
    assert "5 images, 5 to encode; 0 gone" in (first := search(shop, "saree"))
    status = (photo := shop / "photos/0.jpg").stat()
    photo.write_bytes(bytes(status.st_size))
    os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = search(shop, "saree")
    assert "5 images, 0 to encode; 0 gone" in again and LINE.findall(again) == LINE.findall(first)
    shutil.copy(FILES[0], shop / "photos/new.jpg")
    shutil.copy(FILES[3], shop / "photos/1.jpg")
    (shop / "photos/4.jpg").unlink()
    assert "5 images, 2 to encode; 2 gone" in (changed := search(shop, "saree"))
    rows = {path: value for value, path in LINE.findall(changed)}
    assert rows["photos/1.jpg"] == rows["photos/3.jpg"] and "photos/4.jpg" not in rows
    torch.save(tiny_model().state_dict(), shop / "best.pt")  # trained anew
    assert "5 to encode" in search(shop, "saree")
    for file in (shop / "data/cache").iterdir():
        file.write_bytes(file.read_bytes()[:900])
    assert "5 to encode" in search(shop, "saree")


def test_ctrl_c_keeps_what_is_encoded(shop):
    for number in range(5, 80):
        shutil.copy(FILES[number % 5], shop / f"photos/{number}.jpg")
    script = shop.parent / "indofashion_clip.py"
    source = script.read_text(encoding="utf-8")
    lines = "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job ignores it
    lines += "def encode_images(*how, whole=encode_images, calls=[0, 2]):\n"  # Ctrl-C at the second
    lines += "    calls.pop() or signal.raise_signal(signal.SIGINT)\n    return whole(*how)\n"
    script.write_text(f"{source}\n\n{lines}", encoding="utf-8")
    assert search(shop, "saree") == "80 images, 80 to encode; 0 gone\n"
    script.write_text(source, encoding="utf-8")
    assert "80 images, 48 to encode; 0 gone" in search(shop, "saree")


def test_hostile_names_are_nothing_but_text(shop):
    names = ["<script>alert(1)<%2fscript>.jpg", "a&amp;\"b'.jpg", "50% off #1?.JPG", "{0} é 🥻.png"]
    for name in names:
        shutil.copy(FILES[0], shop / "photos" / name)
    query = "<img src=x onerror=alert(1)>&amp; साड़ी {1} " * 20  # 77 tokens of it are read
    assert "Traceback" not in search(shop, query, encoding="cp1252")
    page, photos, heading = read_page(shop)
    assert heading == query and all(f"</b> {html.escape(name)}</a>" in page for name in names)
    assert {*names} <= {file.name for file in photos} and all(map(Path.exists, photos))
    assert len(photos) == page.count("<img") == 9 and "<script" not in page


def test_a_folder_as_people_have_it(shop):
    """Links, hidden files, foreign files, broken images; of 16 bits and clear."""
    (other := shop / "other").mkdir()
    Image.new("I;16", (90, 64), 30000).save(other / "deep.png")
    Image.new("RGBA", (90, 64), (0, 0, 0, 0)).save(other / "clear.png")
    (shop / "photos/linked").symlink_to(other)
    shutil.copytree(other, shop / "photos/.hidden")
    shutil.copy(FILES[0], shop / "photos/._1.jpg")
    for name in ("Thumbs.db", "a.heic", "b.heic", "cut.jpg", "empty.jpg"):
        (shop / "photos" / name).write_bytes(FILES[0].read_bytes()[: 500 * (name == "cut.jpg")])
    output = search(shop, "saree")
    names = {"linked/deep.png", "linked/clear.png", *(f"{number}.jpg" for number in range(5))}
    assert {path for _, path in LINE.findall(output)} == {f"photos/{name}" for name in names}
    assert "2 left out, such as no image by its ending, .heic: photos/a.heic" in output
    assert "2 left out, such as it cannot be decoded: photos/cut.jpg" in output
    (shop / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        output = search(shop, "saree", FOLDER=folder, code=1)
        assert output == f"no images in {folder} ({shop / folder})\n"


def test_classes_csv_has_the_likeliest_class_and_its_probability(shop):
    names = ["saree", "kurta_men", "Palazzo, wide"]
    search(shop, "saree", CLASSES=names)
    assert (shop / "classes.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    rows = [*csv.reader((shop / "classes.csv").read_text(encoding="utf-8-sig").splitlines())]
    words = ["saree", "men's kurta", "palazzo, wide"]
    texts = [prompt.replace("{}", word) for word in words for prompt in ic.PROMPTS]
    model, images, prompts = features(shop, *texts)
    means = prompts.view(3, len(ic.PROMPTS), -1).mean(1)
    similarities = images @ means.T / means.norm(dim=1)
    best = (model.logit_scale.exp() * similarities).softmax(1).max(1)
    likeliest = [names[number] for number in best.indices.tolist()]
    assert [row[:2] for row in rows] == [[f"photos/{i}.jpg", likeliest[i]] for i in range(5)]
    assert max(abs(float(row[2]) - p) for row, p in zip(rows, best.values, strict=True)) < 0.01


@pytest.mark.parametrize("display", [{"DISPLAY": ":0"}, {}])
def test_a_terminal_asks_and_shows_the_first_answer(shop, display):
    pty = pytest.importorskip("pty")  # Windows has none
    script, (terminal, stdin) = edited_search(shop, FOLDER="~/photos"), pty.openpty()
    (browser := shop / "browser").write_text('#!/bin/sh\necho "$1" >> shown\n')
    browser.chmod(0o755)
    os.write(terminal, b"nowhere.jpg\nred saree\n'photos/1.jpg'\n\nnever\n")
    variables = {k: v for k, v in os.environ.items() if "DISPLAY" not in k} | display
    variables |= {"HOME": str(shop), "BROWSER": f"{browser} %s"}
    how = {"cwd": shop, "env": variables, "stdin": stdin, "encoding": "utf-8", "timeout": 300}
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, **how)
    answers = ["cannot be decoded: nowhere.jpg", "red saree:", "photos/1.jpg:"]
    assert all(text in done.stdout for text in answers) and "never" not in done.stdout
    shown = (shop / "shown").read_text() if (shop / "shown").exists() else ""
    assert shown == (f"{(shop / 'search.html').as_uri()}\n" if display else "")

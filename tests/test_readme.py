"""Every block of the README works as it stands; the files are formatted."""

import ast
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, edited_script, grown, run_script, tiny_model
from PIL import Image
from torch.distributed.run import get_args_parser

import indofashion_clip as ic

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = README + (ROOT / "data/README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", PAGES, flags=re.M | re.S)
FILES = sorted((ROOT / "data/sample/images/test").iterdir())[:3]
TOKENS = clip.tokenize(["Navy Blue Silk Saree", "men's kurta", "Mojari " * 100], truncate=True)


def block(words):
    """The one block of code with those words."""
    [found] = [code for code in BLOCKS if words in code]
    return found


# ---- Using the weights ----
@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(a folder with outputs/best.pt of a ViT-B/32, its image_features and text_features)."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "outputs").mkdir()
    torch.manual_seed(0)
    model = grown(clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12))
    torch.save(model.state_dict(), folder / "outputs/best.pt")
    model = ic.load_clip(str(folder / "outputs/best.pt"))
    pixels = torch.stack([ic.load_image(file, 224) for file in FILES])
    with torch.no_grad():
        image_features = ic.encode_images(model, torch.float32, pixels)
        return folder, image_features, ic.encode_texts(model, torch.float32, TOKENS)


def assert_equal(vit, image_features, text_features):
    for ours, theirs in zip(vit[1:], (image_features, text_features), strict=True):
        theirs = F.normalize(theirs.float(), dim=-1)
        assert (theirs - ours).norm(dim=-1).max() < 1e-4
        assert (ours[0] - ours[1]).norm() > 0.01  # the features tell the inputs apart


def pictures(preprocess):
    return torch.stack([preprocess(Image.open(file).convert("RGB")) for file in FILES])


@torch.no_grad()
def test_clip_gives_the_same_features(vit, monkeypatch):
    monkeypatch.chdir(vit[0])
    model, preprocess = clip.load("outputs/best.pt", device="cpu")
    [undo] = re.findall(r"`(model\.float\(\)\.load_state_dict\(.*?\))`", PAGES)
    exec(undo)
    assert_equal(vit, model.encode_image(pictures(preprocess)), model.encode_text(TOKENS))


@torch.no_grad()
def test_open_clip_gives_the_same_features(vit, monkeypatch):
    import open_clip

    monkeypatch.chdir(vit[0])
    exec(block("import open_clip"), variables := {})
    model = open_clip.create_model("ViT-B-32-quickgelu", pretrained="open_clip.pt").eval()
    images = model.encode_image(pictures(variables["preprocess"]))
    assert_equal(vit, images, model.encode_text(TOKENS))


@torch.no_grad()
def test_transformers_gives_the_same_features_and_its_pipeline_works(vit, monkeypatch):
    from transformers import CLIPModel, CLIPProcessor, pipeline

    monkeypatch.chdir(vit[0])
    exec(block("save_pretrained"), variables := {})
    model = CLIPModel.from_pretrained("clip-transformers").eval()
    output = model(input_ids=TOKENS, pixel_values=pictures(clip.clip._transform(224)))
    assert_equal(vit, output.image_embeds, output.text_embeds)
    processor, text = CLIPProcessor.from_pretrained("clip-transformers"), "Navy Blue Silk Saree"
    assert processor(text=[text])["input_ids"][0] == clip.tokenize(text)[0][:6].tolist()
    classify = pipeline("zero-shot-image-classification", "clip-transformers")
    [first, second] = classify(str(FILES[0]), candidate_labels=["saree", "kurta"])
    assert first["score"] > second["score"] and first["score"] + second["score"] < 1.001
    exec(block("load_file"), variables)  # the way back
    ours, back = (torch.load(f"{name}.pt") for name in ("outputs/best", "from_transformers"))
    assert ours.keys() == back.keys() and all(torch.equal(ours[name], back[name]) for name in ours)


def test_mixing_is_the_mean_of_start_and_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start, best = tiny_model(), grown(tiny_model()).state_dict()
    monkeypatch.setattr(ic, "load_clip", lambda name: start)
    (tmp_path / "outputs").mkdir()
    torch.save(best, "outputs/best.pt")
    exec(block("torch.lerp"), {})
    mixed = torch.load("mixed.pt")
    assert mixed.keys() == best.keys()
    for name, weight in start.state_dict().items():
        assert torch.allclose(mixed[name], (weight + best[name]) / 2, atol=1e-6)


# ---- Starting it ----
def test_ones_own_images_from_a_spreadsheet(tmp_path):
    """The README's table, saved as Excel saves it in Europe, with the constants that it names."""
    rows = re.findall(r"^\| (?:image_path|images/).*$", README, flags=re.M)
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    (folder := tmp_path / "my_shop").mkdir()
    (folder / "images").mkdir()
    for number in range(3):
        shutil.copy(FILES[number], folder / f"images/{number}.jpeg")
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=";").writerows(cells)
    constants = dict(re.findall(r'^([A-Z_]+) = "(.*)"$', block('"my_shop/rows.csv"'), flags=re.M))
    output = run_script(tmp_path, MODEL="tiny", NUM_EPOCHS=1, **constants)
    assert constants["OUTPUT_PATH"] in output and "3 images, 0 of them without a title" in output


@pytest.mark.skipif(sys.platform != "linux", reason="sed -i is another command elsewhere")
@pytest.mark.parametrize("rows", ["train_data.json", "rows.csv"])
def test_the_notebooks_cell_finds_the_rows(tmp_path, rows):
    """In a folder with a space and an apostrophe; nothing is installed or trained."""
    (shop := tmp_path / "input/Ann's shop").mkdir(parents=True)
    (shop / rows).touch()
    edited_script(tmp_path / "input/script")
    (working := tmp_path / "working").mkdir()
    cell = block("%%bash").replace("/kaggle/input", str(tmp_path / "input")).splitlines()[1:]
    cell = [line for line in cell if not line.startswith(("pip", "torchrun"))]
    subprocess.run(["bash", "-ec", "\n".join(cell)], check=True, cwd=working)
    constants = runpy.run_path(str(working / "indofashion_clip.py"))
    table = str(shop / rows.replace("train", "{split}"))
    paths = {"IMAGE_PATH": str(shop), "JSON_PATH": table, "CACHE_PATH": "/tmp/cache"}
    assert {name: constants[name] for name in paths} == paths


def test_the_command_lines_of_torchrun_are_such_and_ci_runs_that_of_the_tests():
    subprocess.run(["bash", "-n"], input=block("#SBATCH"), text=True, check=True)
    lines = re.findall(r"torchrun (.*? indofashion_clip\.py)", PAGES)
    assert len(lines) == 3
    for line in lines:
        words = line.replace("$(scontrol show hostnames | head -1)", "host").split()
        arguments = get_args_parser().parse_args(words)
        assert arguments.training_script == "indofashion_clip.py"
    assert block("pytest tests") in (ROOT / ".ci/run").read_text(encoding="utf-8")


def test_the_table_of_constants_gives_their_values():
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", README, flags=re.M)
    assert len(rows) >= 7
    for name, value in rows:
        assert str(getattr(ic, name)) == str(eval(value) if value[0].isdigit() else value), name


# ---- Figures ----
STUDIES = ROOT / "tests/studies"
STEP, FLOAT32 = "step of 64, bfloat16", "step of 64, float32"
PEAK = "this script, float32"
TEST, SLOWER = "test, 5 seeds", "this script is faster by"
QUOTES = {  # what the README says: (table, row, column)
    "learns {:.1f} images per second,": (PEAK, "batch 32", "pairs/s"),
    "per second, in {:.1f} GB of memory": (PEAK, "batch 32", "peak GB"),
    "open_clip takes {:.1f} times as long,": (STEP, "open_clip", SLOWER),
    "of transformers {:.1f}, of": (STEP, "transformers", SLOWER),
    "of sentence-transformers {:.1f} (": (STEP, "sentence_transformers", SLOWER),
    "with AMX {:.1f},": (f"{STEP}, with AMX", "open_clip", SLOWER),
    "in float32 {:.1f},": (FLOAT32, "open_clip", SLOWER),
    "{:.1f} and": (FLOAT32, "transformers", SLOWER),
    "and {:.1f})": (FLOAT32, "sentence_transformers", SLOWER),
    "before (zero-shot) | {} |": (TEST, "0% tuned", "accuracy"),
    "from scratch | {} |": (TEST, "from a random start", "accuracy"),
    "| fine-tuned | {} |": (TEST, "as it is", "accuracy"),
    "before and after | {} |": (TEST, "50% tuned", "accuracy"),
}


@pytest.mark.parametrize("file", sorted(path.name for path in STUDIES.glob("*.json")))
def test_the_tables_are_those_that_the_studies_wrote(monkeypatch, file):
    monkeypatch.syspath_prepend(STUDIES)
    from common import as_markdown

    text = (STUDIES / "README.md").read_text(encoding="utf-8")
    for part in json.loads((STUDIES / file).read_text(encoding="utf-8")).values():
        assert f"{part['date']}, {part['machine']}" in text
        for title, rows in part["tables"].items():
            assert as_markdown(title, rows) in text, title


@pytest.mark.parametrize("quote", QUOTES)
def test_the_readme_quotes_the_tables(quote):
    table, row, column = QUOTES[quote]
    files = [json.loads(file.read_text(encoding="utf-8")) for file in STUDIES.glob("*.json")]
    tables = {k: v for file in files for part in file.values() for k, v in part["tables"].items()}
    assert quote.format(tables[table][row][column]) in " ".join(README.split())


# ---- The files ----
@pytest.mark.parametrize("command", ["format --check", "check"])
def test_the_files_are_formatted_and_the_linter_finds_nothing(command):
    ruff = [sys.executable, "-m", "ruff", *command.split(), "--config", "tests/ruff.toml"]
    done = subprocess.run([*ruff, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_can_be_read_in_one_sitting():
    source = (ROOT / "indofashion_clip.py").read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    assert max(lengths.values()) <= 40, max(lengths, key=lengths.get)
    assert len(README.splitlines()) <= 200 and len(README.split()) <= 1600
    lines = source.splitlines()
    [training] = [i for i, line in enumerate(lines) if line.startswith("# ---- From here on")]
    claim = f"It has {round(len(lines), -1):,} lines; the first {round(training, -1)} are"
    assert claim in README

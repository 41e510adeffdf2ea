"""Every block of the README works as it stands; the files are formatted and where they belong."""

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
from conftest import ROOT, edited_script, grown, read_lines, run_script, tiny_model
from PIL import Image
from torch.distributed.run import get_args_parser

import indofashion_clip as ic

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w+\n(.*?)^```$", README, flags=re.M | re.S)
FILES = sorted((ROOT / "data/sample/images/test").iterdir())[:3]
TOKENS = clip.tokenize(["Navy Blue Silk Saree", "men's kurta", "Mojari " * 100], truncate=True)


def block(words):
    """The one block of code with those words."""
    [found] = [code for code in BLOCKS if words in code]
    return found


# ---- Using the weights ----
def test_searching_and_classifying(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    (tmp_path / "outputs/sample").mkdir(parents=True)
    torch.save(tiny_model().state_dict(), tmp_path / "outputs/sample/best.pt")
    monkeypatch.chdir(tmp_path)
    exec(block("classes.csv"), variables := {})
    printed = capsys.readouterr().out
    assert "red lehenga choli: ['data/sample/" in printed and "looks like ['data" in printed
    rows = (tmp_path / "classes.csv").read_text().splitlines()
    assert len(rows) == 75 and rows[0].startswith("data/sample/images/test/0.")
    Image.new("RGBA", (90, 64), (0, 0, 0, 0)).save("clear.png")
    expected = variables["preprocess"](Image.new("RGB", (64, 64), "white"))
    assert torch.allclose(variables["load"]("clear.png"), expected)


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
    [undo] = re.findall(r"`(model\.float\(\)\.load_state_dict\(.*?\))`", README)
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
def test_transformers_gives_the_same_features(vit, monkeypatch):
    from transformers import CLIPModel

    monkeypatch.chdir(vit[0])
    exec(block("save_pretrained"), {})
    model = CLIPModel.from_pretrained("clip-transformers").eval()
    output = model(input_ids=TOKENS, pixel_values=pictures(clip.clip._transform(224)))
    assert_equal(vit, output.image_embeds, output.text_embeds)


def test_mixing_is_the_mean_of_start_and_best(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip, "load", lambda name, device: (tiny_model(), None))
    start, best = tiny_model().state_dict(), grown(tiny_model()).state_dict()
    (tmp_path / "outputs").mkdir()
    torch.save(best, "outputs/best.pt")
    exec(block("torch.lerp"), {})
    for name, weight in ic.load_clip("mixed.pt").state_dict().items():
        assert torch.allclose(weight, (start[name] + best[name]) / 2, atol=1e-6)


# ---- Starting it ----
@pytest.mark.parametrize("delimiter, products, counts", [(",", 0, (8, 3)), (";", 4, (9, 3))])
def test_ones_own_pictures_from_a_spreadsheet(tmp_path, monkeypatch, delimiter, products, counts):
    """As Excel saves it, here and in Europe, where a product's pictures come in threes."""
    [text], data = re.findall(r"^`(\{.*\})`$", README, flags=re.M), tmp_path / "my_shop"
    row, names = json.loads(text), ["product"] if products else []
    (data / "images").mkdir(parents=True)
    shutil.copy(FILES[0], data / row["image_path"])
    with open(data / "rows.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow([*row, *names])
        for i in range(sum(counts)):
            writer.writerow([*row.values(), *[f"kurta {i // 3}" for _ in names]])
    monkeypatch.chdir(tmp_path)
    exec(block("DictReader"), {})
    paths = dict(re.findall(r'`([A-Z_]+_PATH) = "(my_shop.*?)"`', README))
    output = run_script(tmp_path, MODEL="tiny", NUM_EPOCHS=1, **paths)
    for split, count in zip(("train", "val"), counts, strict=True):
        assert f"{split:5} {count:7} rows used" in output
    split_of = [
        {row.get("product") for row in read_lines(data / f"{split}_data.json")} - {None}
        for split in ("train", "val")
    ]
    assert split_of[0].isdisjoint(split_of[1]) and sum(map(len, split_of)) == products


@pytest.mark.skipif(sys.platform != "linux", reason="sed -i is another command elsewhere")
def test_the_notebooks_cell_and_sed(tmp_path, dataset):
    """Where Kaggle's inputs are another folder, and nothing is installed."""
    edited_script(tmp_path / "script")
    cell = block("%%bash").replace("/kaggle/input", str(tmp_path)).splitlines()[1:]
    cell = [line for line in cell if not line.startswith(("pip", "torchrun"))]
    (folder := tmp_path / "working").mkdir()
    for line in ("\n".join(cell), *re.findall(r"`(sed [^`]*)`", README)):
        subprocess.run(["bash", "-ec", line], check=True, cwd=folder)
    script = folder / "indofashion_clip.py"
    constants = runpy.run_path(str(script))
    assert (constants["CACHE_PATH"], constants["LR"]) == ("/tmp/cache", 2e-5)
    where = {name: constants[name] for name in ("IMAGE_PATH", "JSON_PATH")}
    assert where == {"IMAGE_PATH": f"{dataset}", "JSON_PATH": f"{dataset}/{{split}}_data.json"}
    run_script(folder, MODEL="tiny", NUM_EPOCHS=1, **where)


def test_the_command_lines_of_torchrun_are_such():
    subprocess.run(["bash", "-n"], input=block("#SBATCH"), text=True, check=True)
    lines = re.findall(r"torchrun (.*? indofashion_clip\.py)", README)
    assert len(lines) == 3
    for line in lines:
        words = line.replace("$(scontrol show hostnames | head -1)", "host").split()
        arguments = get_args_parser().parse_args(words)
        assert arguments.training_script == "indofashion_clip.py"


def test_ci_runs_the_readmes_test_command():
    command = block("pytest tests").strip()
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_table_of_constants_gives_their_values():
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", README, flags=re.M)
    assert len(rows) >= 8
    for name, value in rows:
        assert str(getattr(ic, name)) == str(eval(value) if value[0].isdigit() else value), name


# ---- Figures ----
STUDIES = ROOT / "tests/studies"
SAMPLE, PHOTOS = "the bundled sample, 3 seeds", "1,435 photographs, 3 seeds"
STEP, PEAK = "step of 64, float32", "this script, float32"
INPUT = "input, 1,435 photographs of 15 KB"
SLOWER = "this script is faster by"
QUOTES = {  # what the README says: (table, row, column)
    "that is {:.1f} pairs a second": (PEAK, "batch 32", "pairs/s"),
    "a second in {:.1f} GB of memory": (PEAK, "batch 32", "peak GB"),
    "accuracy on the sample {} without,": (SAMPLE, "class prompts for 0%", "accuracy"),
    "without, {} with; on": (SAMPLE, "as it is", "accuracy"),
    "on photographs {} without": (PHOTOS, "class prompts for 0%", "accuracy"),
    "without, {} with |": (PHOTOS, "as it is", "accuracy"),
    "in chunks of 32 take {:.1f} GB,": (PEAK, "batch 256 in chunks of 32", "peak GB"),
    "GB, whole {:.1f}": (PEAK, "batch 256", "peak GB"),
    "sample's score is {},": (SAMPLE, "warm-up 0.0", "score"),
    "with it {} |": (SAMPLE, "warm-up 0.1", "score"),
    "a step take {:.1f} times as long;": (STEP, "this_script_of_77_tokens", SLOWER),
    "open_clip's takes {:.1f} times,": (STEP, "open_clip", SLOWER),
    "transformers' {:.1f}, sentence": (STEP, "transformers", SLOWER),
    "sentence-transformers' {:.1f} |": (STEP, "sentence_transformers", SLOWER),
    "{:,.0f} small pictures a second go in;": (INPUT, "pictures/s into the cache", ""),
    "training then waits {:.0f} ms,": (INPUT, "ms that training waits for 256 from memory", ""),
    "from the disk {:.0f} |": (INPUT, "ms that training waits for 256 from the disk", ""),
}


@pytest.mark.parametrize("file", ["benchmark.json", "ablation.json"])
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
    assert len(README.splitlines()) <= 200


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_nothing_else_at_the_top():
    files = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    folders = {"tests", "data", ".ci"}
    names = {"indofashion_clip.py", "requirements.txt", "README.md", ".gitignore"}
    assert {file.split("/")[0] for file in files} == folders | names

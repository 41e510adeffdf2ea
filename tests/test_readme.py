"""Every block of the README works as it stands; the files are formatted and where they belong."""

import ast
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, edited_script, grown, run_driver, run_script
from PIL import Image

import indofashion_clip as ic

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.M | re.S)
FILES = sorted((ROOT / "data/sample/images/test").iterdir())[:3]
TITLES = ["Navy Blue Silk Saree", "a photo of a men's kurta", "Mojari " * 100]


def block(*words):
    """The one block of code with those words."""
    [found] = [code for _, code in BLOCKS if all(word in code for word in words)]
    return found


def run_block(folder, monkeypatch, *words):
    """(the variables that the block leaves, what it prints)."""
    monkeypatch.chdir(folder)
    variables, printed = {}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(block(*words), variables)
    return variables, printed.getvalue()


# ---- Using the weights ----
def test_searching_and_classifying(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/sample").symlink_to(ROOT / "data/sample")
    run_driver(tmp_path, 'ic.SAMPLE_RUN["NUM_EPOCHS"] = 1\nic.main()', {})
    _, printed = run_block(tmp_path, monkeypatch, "csv")
    assert "red lehenga choli: ['data/sample/" in printed and "looks like ['data" in printed
    rows = (tmp_path / "classes.csv").read_text().splitlines()
    assert len(rows) == 75 and rows[0].startswith("data/sample/images/test/0.")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """(a folder with outputs/best.pt of a ViT-B/32, its image_features and text_features)."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "outputs").mkdir()
    torch.manual_seed(0)
    model = grown(clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12))
    torch.save(model.state_dict(), folder / "outputs/best.pt")
    model, pixels = ic.load_clip(str(folder / "outputs/best.pt")), map(load_224, FILES)
    with torch.no_grad():
        image_features = ic.encode_images(model, torch.float32, torch.stack(list(pixels)))
        tokens = clip.tokenize(TITLES, truncate=True)
        text_features = ic.encode_texts(model, torch.float32, tokens)
    return folder, image_features, text_features


def load_224(file):
    return ic.load_image(file, 224)


def assert_equal(vit, image_features, text_features):
    for ours, theirs in zip(vit[1:], (image_features, text_features), strict=True):
        theirs = F.normalize(theirs.float(), dim=-1)
        assert (theirs - ours).norm(dim=-1).max() < 1e-4
        assert (ours[0] - ours[1]).norm() > 0.01  # the features tell the inputs apart


def pictures(preprocess):
    return torch.stack([preprocess(Image.open(file).convert("RGB")) for file in FILES])


@torch.no_grad()
def test_clip(vit, monkeypatch):
    monkeypatch.chdir(vit[0])
    model, preprocess = clip.load("outputs/best.pt", device="cpu")
    [undo] = re.findall(r"`(model\.float\(\)\.load_state_dict\(.*?\))`", README)
    exec(undo)
    tokens = clip.tokenize(TITLES, truncate=True)
    assert_equal(vit, model.encode_image(pictures(preprocess)), model.encode_text(tokens))


@torch.no_grad()
def test_open_clip(vit, monkeypatch):
    lines, _ = run_block(vit[0], monkeypatch, "import open_clip")
    import open_clip

    tokens = open_clip.get_tokenizer("ViT-B-32-quickgelu")(TITLES)
    again = open_clip.create_model("ViT-B-32-quickgelu", pretrained="open_clip.pt")
    for model in (lines["model"].eval(), again.eval()):
        images = model.encode_image(pictures(lines["preprocess"]))
        assert_equal(vit, images, model.encode_text(tokens))


@torch.no_grad()
def test_transformers(vit, monkeypatch):
    run_block(vit[0], monkeypatch, "save_pretrained")
    from transformers import CLIPModel

    model = CLIPModel.from_pretrained("clip-transformers").eval()
    tokens = clip.tokenize(TITLES, truncate=True)
    images = pictures(clip.clip._transform(224))
    output = model(input_ids=tokens, pixel_values=images)
    assert_equal(vit, output.image_embeds, output.text_embeds)


def test_mixing_is_the_mean_of_start_and_best(vit, monkeypatch):
    start = clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    monkeypatch.setattr(clip, "load", lambda name, device: (start, None))
    run_block(vit[0], monkeypatch, "torch.lerp")
    best, mixed = (
        torch.load(vit[0] / name, weights_only=True) for name in ("outputs/best.pt", "mixed.pt")
    )
    for name, weight in start.state_dict().items():
        assert torch.allclose(mixed[name], (weight + best[name]) / 2, atol=1e-6)
    ic.load_clip(str(vit[0] / "mixed.pt"))


# ---- Starting it ----
def test_the_row_and_the_paths_of_ones_own_pictures(tmp_path, monkeypatch):
    row = json.loads(block("product_title"))
    data = tmp_path / "my_shop"
    (data / "images").mkdir(parents=True)
    shutil.copy(FILES[0], data / row["image_path"])
    rows = [row | {"product_title": f"{row['product_title']} {i}"} for i in range(3)]
    (data / "train_data.json").write_text("\n".join(map(json.dumps, rows)))
    paths = {}
    exec(block("my_shop"), paths)
    del paths["__builtins__"]
    run_script(tmp_path, MODEL="tiny", NUM_EPOCHS=1, **paths)


def run_sed(lines, folder):
    """A copy of the script as those lines of sed leave it."""
    script = edited_script(folder)
    for line in lines:
        subprocess.run(line, shell=True, check=True, cwd=folder)
    return script.read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform != "linux", reason="sed -i is another command elsewhere")
def test_the_notebooks_cell(tmp_path):
    cell = [line.lstrip("!") for line in block("kaggle/input").splitlines()]
    source = run_sed([line for line in cell if line.startswith("sed")], tmp_path)
    folder = "/kaggle/input/indo-fashion-dataset"
    for line in (f'IMAGE_PATH = "{folder}"', 'CACHE_PATH = "/tmp/cache"'):
        assert f"\n{line}\n" in source
    code = compile(source, "script", "exec")
    variables = {"__name__": "script"}
    exec(code, variables)
    with pytest.raises(SystemExit, match=f"IMAGE_PATH: there is no folder {folder}"):
        variables["check_constants"]()
    [sed] = re.findall(r"`(sed -i .*)`", README)
    assert "\nLR = 2e-5\n" in run_sed([sed], tmp_path)
    assert torchrun_script(cell[-1]) == "indofashion_clip.py"


def torchrun_script(line):
    from torch.distributed.run import get_args_parser

    words = line.split("torchrun ")[1].split()
    return get_args_parser().parse_args(words).training_script


def test_the_slurm_script(tmp_path):
    script = block("#SBATCH")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    line = script.splitlines()[-1]
    assert torchrun_script(line.replace("$(scontrol show hostnames | head -1)", "host"))


def test_ci_runs_the_readmes_test_command():
    command = block("pytest tests").strip()
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()


def test_the_table_of_constants_gives_their_values():
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", README, flags=re.M)
    assert len(rows) >= 8
    for name, value in rows:
        assert str(getattr(ic, name)) == str(eval(value) if value[0].isdigit() else value), name


# ---- The files ----
def test_the_files_are_formatted_and_the_linter_finds_nothing():
    config = ["--config", str(ROOT / "tests/ruff.toml"), "--no-cache", str(ROOT)]
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *config]
        done = subprocess.run(ruff, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_can_be_read_in_one_sitting():
    source = (ROOT / "indofashion_clip.py").read_text(encoding="utf-8")
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in functions}
    assert max(lengths.values()) <= 40, max(lengths, key=lengths.get)
    assert len(README.splitlines()) <= 200


def test_nothing_else_at_the_top():
    git = ["git", "-C", str(ROOT), "ls-files"]
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    files = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    folders = {"tests", "data", ".ci"}
    names = {"indofashion_clip.py", "requirements.txt", "README.md", ".gitignore"}
    assert {file.split("/")[0] for file in files} == folders | names

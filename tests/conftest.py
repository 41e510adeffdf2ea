"""What the tests share: small datasets, a run's state, and the script run as a user runs it."""

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import clip
import pytest
import torch
import torch.nn.functional as F

# No test, and no process that one starts, reaches the internet, only servers of the tests' own.
os.environ |= {"HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1,localhost"}
os.environ |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import indofashion_clip as ic  # noqa: E402

torch.set_num_threads(1)  # beside the other worker's
CPU = torch.device("cpu")


# ---- Datasets ----
def read_lines(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_dataset(folder, train=24, val=10, test=10):
    """A dataset of a few images of the sample's first classes, in turns; 0 rows: no file."""
    for split, count in {"train": train, "val": val, "test": test}.items():
        by_class = {}
        for row in read_lines(ROOT / f"data/sample/{split}_data.json"):
            by_class.setdefault(row["class_label"], []).append(row)
        turns = zip(*list(by_class.values())[:5], strict=True)
        rows = [row for turn in turns for row in turn][:count]
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for row in rows:
            shutil.copy(ROOT / "data/sample" / row["image_path"], folder / row["image_path"])
        if rows:
            write_lines(folder / f"{split}_data.json", rows)
    return folder


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data")


# ---- A run's parts, without a run ----
def tiny_model():
    return ic.load_clip("tiny")


def grown(model):
    """The same model, moved from its initial values, whose biases and norms would hide mistakes."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        model.logit_scale.fill_(2.5)
    return model.eval()


def make_state(model=None, chunk=99, **changes):
    """A State in float32, at a learning rate of 1e-3."""
    model, scaler = model or tiny_model(), torch.amp.GradScaler("cpu", enabled=False)
    state = ic.State(model, ic.make_optimizer(model), scaler, torch.float32, 8, 3, chunk, {})
    for group in state.optimizer.param_groups:
        group["lr"] = 1e-3
    vars(state).update(changes)
    return state


def make_batch(count, seed=0):
    """`count` random images of three classes: a third of the captions are said twice, every fifth
    image has no caption and every fourth no class."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    which, order = torch.arange(count) % max(1, count * 2 // 3), torch.arange(count)
    titles = [f"saree number {i}" + " long" * (i % 5) for i in range(int(which.max()) + 1)]
    labelled = order[order % 4 < 3]
    targets = ic.Targets(order[order % 5 < 4], labelled, labelled % 3)
    prompts = clip.tokenize([f"a photo of a {name}" for name in ("saree", "gown", "pair of shoes")])
    return ic.Batch(pixels, clip.tokenize(titles)[which], prompts, 3, targets)


def toy_dataset(labels, captions, pixels=None, class_names=None):
    """An image for each label, "" for none, with its caption, or several in a tuple."""
    captions = [(text,) if isinstance(text, str) else tuple(text) for text in captions]
    examples = [
        ic.Example("train", str(i), "", texts, (label,) if label else (), row=i)
        for i, (texts, label) in enumerate(zip(captions, labels, strict=True))
    ]
    pixels = torch.zeros(len(examples), 3, 64, 64, dtype=torch.uint8) if pixels is None else pixels
    return ic.FashionDataset(examples, pixels, class_names or sorted(set(labels) - {""}))


def mixed_dataset(count=36):
    """Random images of five classes: two thirds lack a title, and a sixth a class."""
    captions = [() if i % 3 else f"title {i % 7}" for i in range(count)]
    labels = ["vwxyz"[i % 5] if i % 6 else "" for i in range(count)]
    return toy_dataset(labels, captions, make_batch(count).pixels)


def frozen(model, tower):
    """The same model, which does not train its tower of "images" or that of "texts"."""
    for name, parameter in model.named_parameters():
        of_images = name.startswith("visual.")
        parameter.requires_grad_(name == "logit_scale" or of_images == (tower == "texts"))
    return model


def relative(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def textbook_losses(model, batch):
    """Both losses by CLIP's own towers, all 77 tokens, one graph, pair by pair: the plain form."""
    device = model.mean.device
    pixels = batch.pixels.to(device).float().div(255)
    image_features = F.normalize(model.encode_image((pixels - model.mean) / model.std), dim=-1)
    tokens = batch.tokens.to(device)
    text_features = F.normalize(model.encode_text(tokens), dim=-1)
    prompt_features = F.normalize(model.encode_text(batch.prompts.to(device)), dim=-1)
    scale, titled = model.logit_scale.exp(), batch.targets.titled.tolist()
    similarity = scale * image_features[titled] @ text_features[titled].T
    log_likelihood = similarity.log_softmax(1).diagonal() + similarity.log_softmax(0).diagonal()
    caption_loss = -log_likelihood.mean() / 2
    labelled = zip(batch.targets.labelled, batch.targets.classes, strict=True)
    class_losses = [
        -(scale * image_features[i] @ prompt_features[: batch.num_classes].T).log_softmax(0)[label]
        for i, label in labelled
    ]
    return caption_loss, torch.stack(class_losses).mean()


def textbook_step(model, batch):
    """The textbook's losses and one backward() of their sum: ([2] losses, the gradients)."""
    losses = textbook_losses(model, batch)
    (losses[0] + ic.CLASS_WEIGHT * losses[1]).backward()
    return torch.stack(losses).detach(), gradients(model)


# ---- The script ----
def quick(data, **constants):
    """Constants for a run of seconds on a dataset made by make_dataset."""
    paths = {"IMAGE_PATH": str(data), "JSON_PATH": str(data / "{split}_data.json")}
    return paths | {"MODEL": "tiny", "BATCH_SIZE": 8, "NUM_EPOCHS": 2, "LR": 1e-3} | constants


def edited_script(folder, **constants):
    """A copy of the script in `folder` with those constants set, each on its line, as by a user."""
    folder.mkdir(exist_ok=True, parents=True)
    source = (ROOT / "indofashion_clip.py").read_text(encoding="utf-8")
    for name, value in constants.items():
        line = f"{name} = {value!r}"
        source, count = re.subn(rf"^{name} = .*$", lambda _, line=line: line, source, flags=re.M)
        assert count == 1, f"{name} is not one line of the script"
    (script := folder / "indofashion_clip.py").write_text(source, encoding="utf-8")
    return script


def launch(script, *arguments, processes=1, code=0, torchrun=(), **variables):
    """The output of a script run in a process of its own, or by torchrun in several."""
    command = [sys.executable]
    if processes > 1 or torchrun:
        nodes = torchrun or ("--standalone",)
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *nodes]
    command += [str(script), *map(str, arguments)]
    ours = {"PYTHONPATH": str(script.parent), "PYTHONUNBUFFERED": ""}
    variables = {"OMP_NUM_THREADS": "1"} | os.environ | ours | variables
    how = {"cwd": script.parent, "env": variables, "encoding": "utf-8", "errors": "replace"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, timeout=300, **how, **pipes)
    assert code in (None, done.returncode), f"exit {done.returncode}\n{done.stdout}"
    return done.stdout


def run_driver(folder, lines, constants, **how):
    """The output of lines of Python that meet the edited script as the module ic."""
    edited_script(folder, **constants)
    lines = "import indofashion_clip as ic\n" + textwrap.dedent(lines)
    (driver := folder / "driver.py").write_text(lines, encoding="utf-8")
    return launch(driver, **how)


def run_script(folder, *, code=0, **constants):
    """The output of the edited script run in `folder`, inside this process."""
    script = edited_script(folder, **constants)
    output, exit_code, before = io.StringIO(), 0, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(folder)
        with redirect_stdout(output), redirect_stderr(output), warnings.catch_warnings():
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:  # as the interpreter does: a message is printed, and the code is 1
        exit_code = stop.code if isinstance(stop.code, int) else 1
        output.write(f"{stop.code}\n")
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert exit_code == code, f"exit {exit_code}\n{output.getvalue()}"
    return output.getvalue()


def read_metrics(folder, times=True):
    lines = read_lines(folder / "outputs/metrics.jsonl")
    changing = () if times else ("seconds", "pairs_per_second", "train_pairs_per_second")
    return [{k: v for k, v in line.items() if k not in changing} for line in lines]


def weights(path):
    return torch.load(path, weights_only=True)


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

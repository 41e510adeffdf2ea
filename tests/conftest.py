"""What the tests share: small datasets in IndoFashion's layout, and the script run as a user would."""

import contextlib
import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import indofashion_clip as ic  # noqa: E402

torch.set_num_threads(2)


@pytest.fixture
def settings():
    """The constants as they stand in the file."""
    return SimpleNamespace(**{n: v for n, v in vars(ic).items() if n.isupper() and n != "F"})


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return ic.load_clip("tiny", torch.device("cpu"))


def make_dataset(folder, train=24, val=10, test=10):
    """The first classes' pictures of the sample, taken in turns: a dataset of a few rows."""
    for split, count in {"train": train, "val": val, "test": test}.items():
        rows = [
            json.loads(line) for line in open(ROOT / "data/sample" / f"{split}_data.json", encoding="utf-8")
        ]
        by_class = {}
        for row in rows:
            by_class.setdefault(row["class_label"], []).append(row)
        turns = [row for turn in zip(*list(by_class.values())[:5]) for row in turn][:count]
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        for row in turns:
            shutil.copy(ROOT / "data/sample" / row["image_path"], folder / row["image_path"])
        write_rows(folder / f"{split}_data.json", turns)
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "data").mkdir()
    return make_dataset(tmp_path / "data")


def edited_script(folder, **constants):
    """A copy of the script in `folder` with those constants set, one line each, as a user edits them."""
    source = (ROOT / "indofashion_clip.py").read_text(encoding="utf-8")
    for name, value in constants.items():
        source, count = re.subn(rf"^{name} = .*$", lambda _: f"{name} = {value!r}", source, flags=re.M)
        assert count == 1, f"{name} is not one line of the script"
    path = folder / "indofashion_clip.py"
    path.write_text(source, encoding="utf-8")
    return path


def quick(data, **constants):
    """Constants for a run of seconds on a dataset made by make_dataset."""
    return {
        "IMAGE_PATH": str(data),
        "JSON_PATH": str(data / "{split}_data.json"),
        "MODEL": "tiny",
        "BATCH_SIZE": 8,
        "NUM_EPOCHS": 2,
        "LR": 1e-3,
    } | constants


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def run_script(folder, *, processes=None, code=0, inside=True, **constants):
    """Run the edited script in `folder` → its output. `inside` this process, which saves importing
    torch again, or in its own; by torchrun where `processes` are given."""
    folder.mkdir(exist_ok=True)
    script = edited_script(folder, **constants)
    if inside and not processes:
        output, exit_code = run_inside(script)
    else:
        torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        done = subprocess.run(
            [sys.executable, *(torchrun if processes else ()), str(script)],
            cwd=folder,
            capture_output=True,
            text=True,
            env=environment(),
            timeout=300,
        )
        output, exit_code = done.stdout + done.stderr, done.returncode
    assert exit_code == code, f"exit {exit_code}\n{output}"
    return output


def run_inside(script):
    output, exit_code, before = io.StringIO(), 0, os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        os.chdir(script.parent)
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:  # as the interpreter does: a message is printed, and the code is 1
        exit_code = stop.code if isinstance(stop.code, int) else 1
        output.write(f"{stop.code}\n")
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return output.getvalue(), exit_code


def read_metrics(folder, times=True):
    lines = [json.loads(line) for line in open(folder / "outputs/metrics.jsonl", encoding="utf-8")]
    if not times:
        lines = [
            {k: v for k, v in line.items() if k not in ("seconds", "pairs_per_second")} for line in lines
        ]
    return lines


def read_skipped(folder):
    return [json.loads(line) for line in open(folder / "outputs/skipped.jsonl", encoding="utf-8")]


def weights(path):
    return torch.load(path, weights_only=True)


def same_weights(one, other):
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

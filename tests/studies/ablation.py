"""What each choice is worth: the script with one thing changed, three seeds each. Prints a table.

    .venv/bin/python tests/ablation.py            # on the bundled sample, about 15 minutes on two cores
    .venv/bin/python tests/ablation.py FOLDER     # on a dataset in the same layout

Every run is the script itself with edited constants, or with a few lines put before its end, from a random
start (MODEL = "tiny") but for the last tables. There the start has been trained on half of the classes, or
of the rows, and is fine-tuned on the rest: is it better for being mixed with its start, and what is kept?
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT, edited_script, environment, read_metrics, write_rows

import indofashion_clip as ic

SEEDS = (0, 1, 2)
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "data/sample").resolve()
BASE = ic.SAMPLE_RUN | {
    "IMAGE_PATH": str(FOLDER),
    "JSON_PATH": str(FOLDER / "{split}_data.json"),
    "OUTPUT_PATH": "outputs",
}
ADAM = """
def make_optimizer(model, weight_decay):
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
def learning_rate(step, total_steps, warmup_steps, peak):
    return peak
"""
ONE_POSITIVE = """
loss_of_equal_captions = clip_loss
def clip_loss(image_features, text_features, logit_scale, caption_ids):
    ids = torch.arange(len(caption_ids), device=caption_ids.device)
    return loss_of_equal_captions(image_features, text_features, logit_scale, ids)
"""
NO_FLIP = """
random_view = augment
def augment(images, draws, min_crop):
    return random_view(images, torch.cat([draws[:, :3], torch.zeros_like(draws[:, 3:])], 1), min_crop)
"""
NO_MIXING = """
def mix_with_start(run, val):
    run.best_share = 1.0
    run.model.load_state_dict(torch.load(run.best, map_location="cpu", weights_only=True))
"""
VARIANTS = {  # name: (constants, lines before the script's end)
    "as it is": ({}, ""),
    "class prompts for no title": ({"CLASS_PROMPT_SHARE": 0.0}, ""),
    "class prompts for a quarter": ({"CLASS_PROMPT_SHARE": 0.25}, ""),
    "class prompts for all": ({"CLASS_PROMPT_SHARE": 1.0}, ""),
    "equal captions are negatives": ({}, ONE_POSITIVE),
    "no flip": ({}, NO_FLIP),
    "no crop": ({"MIN_CROP": 1.0}, ""),
    "neither": ({"MIN_CROP": 1.0}, NO_FLIP),
    "Adam, L2 decay 0.2, 5e-5 throughout": ({"LR": 5e-5, "MAX_GRAD_NORM": 1e9}, ADAM),
    "the same at this script's peak": ({"MAX_GRAD_NORM": 1e9}, ADAM),
}


def run(folder, constants, lines=""):
    """Run the script with those constants → its last line on test."""
    folder.mkdir(parents=True)
    script = edited_script(folder, **constants)
    source = script.read_text(encoding="utf-8")
    script.write_text(source.replace("\nif __name__", f"{lines}\nif __name__"), encoding="utf-8")
    command = [sys.executable, script]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_metrics(folder)[-1]


def halves(folder, by):
    """JSON_PATHs of the dataset's even and of its odd classes, or train rows, with val and test whole."""
    paths = []
    for half in (0, 1):
        (folder / by / str(half)).mkdir(parents=True)
        paths.append(str(folder / by / str(half) / "{split}_data.json"))
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in open(FOLDER / f"{split}_data.json", encoding="utf-8")]
        labels = sorted({row["class_label"] for row in rows})
        for half, path in enumerate(paths):
            if by == "classes":
                chosen = [row for row in rows if labels.index(row["class_label"]) % 2 == half]
            else:
                chosen = rows[half::2] if split == "train" else rows
            write_rows(Path(path.replace("{split}", split)), chosen)
    return paths


def keep(folder, paths, seed):
    """{"before": (score on the first half's test, on the second's), "fine-tuned": …, "… and mixed": …}."""
    old, new = ({"JSON_PATH": path, "SEED": seed} for path in paths)
    run(folder / "start", BASE | old)
    start = {"MODEL": str(folder / "start/outputs/best.pt")}
    tuning = BASE | new | start | {"NUM_EPOCHS": BASE["NUM_EPOCHS"] // 2, "LR": BASE["LR"] / 2}
    run(folder / "tuned", tuning, NO_MIXING)
    run(folder / "mixed", tuning)
    scores = {}
    for name, where in {"before": "start", "fine-tuned": "tuned", "fine-tuned and mixed": "mixed"}.items():
        weights = {"MODEL": str(folder / where / "outputs/best.pt"), "NUM_EPOCHS": 0}
        scores[name] = tuple(
            ic.score(run(folder / f"{where} on {half}", BASE | constants | weights))
            for half, constants in (("old", old), ("new", new))
        )
    return scores


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main():
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(folder)
        results = {
            name: [pool.submit(run, folder / name / str(s), BASE | constants | {"SEED": s}, lines) for s in SEEDS]
            for name, (constants, lines) in VARIANTS.items()
        }
        kept = {}
        for by in ("classes", "rows"):
            paths = halves(folder, by)
            kept[by] = [pool.submit(keep, folder / by / f"seed {s}", paths, s) for s in SEEDS]
        head = f"{len(SEEDS)} seeds, mean ± deviation, test"
        print(f"| {head} | accuracy | text → image R@5 | score |\n| --- | --- | --- | --- |")
        for name, runs in results.items():
            lines = [one.result() for one in runs]
            columns = ([line[key] for line in lines] for key in ("accuracy", "text_to_image_r5"))
            columns = (*columns, list(map(ic.score, lines)))
            print(f"| {name} | " + " | ".join(map(spread, columns)) + " |", flush=True)
        for by, runs in kept.items():
            print(f"\n| trained on half of the {by}, then on the rest | score on the first | on the rest |")
            print("| --- | --- | --- |")
            runs = [one.result() for one in runs]
            for name in runs[0]:
                columns = zip(*(one[name] for one in runs))
                print(f"| {name} | " + " | ".join(map(spread, columns)) + " |", flush=True)


if __name__ == "__main__":
    main()

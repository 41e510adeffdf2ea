"""What each choice is worth: the script with one thing changed, three seeds each. Prints a table.

    .venv/bin/python tests/ablation.py            # on the bundled sample, about 10 minutes on two cores
    .venv/bin/python tests/ablation.py FOLDER     # on a dataset in the same layout

Every run is the script itself with edited constants, or with a few lines put before its end, from a random
start (MODEL = "tiny") but for the last rows. There the start has been trained on every other class, and is
fine-tuned on the rest: what it did well before is measured on the classes that it was trained on.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conftest import ROOT, edited_script, environment

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
    script = edited_script(folder, **{name: value for name, value in constants.items()})
    source = script.read_text(encoding="utf-8")
    script.write_text(source.replace("\nif __name__", f"{lines}\nif __name__"), encoding="utf-8")
    done = subprocess.run([sys.executable, script], cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "outputs/metrics.jsonl").read_text().splitlines()[-1])


def halves(folder):
    """JSON_PATHs of the dataset's even and of its odd classes."""
    paths = []
    for half in (0, 1):
        (folder / str(half)).mkdir()
        paths.append(str(folder / str(half) / "{split}_data.json"))
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in open(FOLDER / f"{split}_data.json", encoding="utf-8")]
        labels = sorted({row["class_label"] for row in rows})
        for half, path in enumerate(paths):
            with open(path.replace("{split}", split), "w", encoding="utf-8") as file:
                file.writelines(json.dumps(r) + "\n" for r in rows if labels.index(r["class_label"]) % 2 == half)
    return paths


def keep(folder, paths, seed):
    """{"before", "fine-tuned", "… and mixed": ([the old classes' line on test], [the new ones'])}."""
    old, new = ({"JSON_PATH": path, "SEED": seed} for path in paths)
    run(folder / "start", BASE | old)
    start = {"MODEL": str(folder / "start/outputs/best.pt")}
    tuning = BASE | new | start | {"NUM_EPOCHS": BASE["NUM_EPOCHS"] // 2, "LR": BASE["LR"] / 3}
    run(folder / "tuned", tuning, NO_MIXING)
    run(folder / "mixed", tuning)
    results = {}
    for name, where in {"before": "start", "fine-tuned": "tuned", "fine-tuned and mixed": "mixed"}.items():
        weights = {"MODEL": str(folder / where / "outputs/best.pt"), "NUM_EPOCHS": 0}
        results[name] = tuple(
            run(folder / f"{where} on {half}", BASE | constants | weights)
            for half, constants in (("old", old), ("new", new))
        )
    return results


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main():
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(folder)
        paths = halves(folder)
        results = {
            name: [pool.submit(run, folder / name / str(s), BASE | constants | {"SEED": s}, lines) for s in SEEDS]
            for name, (constants, lines) in VARIANTS.items()
        }
        kept = [pool.submit(keep, folder / f"keep {seed}", paths, seed) for seed in SEEDS]
        print(f"| {len(SEEDS)} seeds, mean ± deviation, on test | accuracy | text → image R@5 | score |\n| --- | --- | --- | --- |")
        for name, runs in results.items():
            lines = [one.result() for one in runs]
            columns = ([line["accuracy"] for line in lines], [line["text_to_image_r5"] for line in lines], list(map(ic.score, lines)))
            print(f"| {name} | " + " | ".join(map(spread, columns)) + " |", flush=True)
        print("\n| fine-tuned on the other classes | score on the classes it knew | on the new ones |\n| --- | --- | --- |")
        kept = [one.result() for one in kept]
        for name in kept[0]:
            columns = zip(*([ic.score(line) for line in one[name]] for one in kept))
            print(f"| {name} | " + " | ".join(map(spread, columns)) + " |")


if __name__ == "__main__":
    main()

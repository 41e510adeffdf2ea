"""What each choice is worth when fine-tuning: a tiny CLIP that knows one dataset learns another.

    python tests/studies/transfer.py PRETRAIN_FOLDER FINETUNE_FOLDER

Both are in IndoFashion's layout. What is learned from the first, once, and kept in the system's
temporary folder, plays OpenAI's weights. Every run is the script itself, fine-tuning them on the
second with edited constants, or with lines put before its end. Of the second's train pictures a
tenth is the test, which chooses nothing. One run a core; the two folders' part of transfer.json is
replaced, and transfer.png. STUDY_QUICK=1 tries it in two minutes: short runs, a third of them.
"""

import hashlib
import itertools
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

from common import QUICK, STUDIES, changed_script, conftest, keep
from matplotlib.figure import Figure

SEEDS = range(2 if QUICK else 5)
PRETRAIN = {"MODEL": "tiny", "BATCH_SIZE": 256, "NUM_EPOCHS": 1 if QUICK else 12, "LR": 1e-3}
FINETUNE = {"BATCH_SIZE": 64, "NUM_EPOCHS": 1 if QUICK else 10, "LR": 3e-4}
KEYS = ("accuracy", "image_to_text_r5", "text_to_image_r5")  # their mean is the score
COLUMNS = ("accuracy", "image → text R@5", "text → image R@5", "score", "in deviations")
MIX = (0, 0.25, 0.5, 0.75, 1)  # shares of the tuned weights, the others being the start's
MEASURE = """
fine_tune = main
save_run = draw_curves = draw_confusion = draw_retrieval = lambda *_: None  # only time
def main():
    fine_tune()
    start, tuned = (load_clip(name).state_dict() for name in (MODEL, f"{OUTPUT_PATH}/best.pt"))
    for share in SHARES:
        torch.save({name: start[name].lerp(tuned[name], share) for name in tuned}, "mixed.pt")
        for name, paths in DATASETS.items():  # a training of no epochs evaluates
            how = {"MODEL": "mixed.pt", "OUTPUT_PATH": f"{share}/{name}", "NUM_EPOCHS": 0}
            globals().update(paths | how)
            fine_tune()
"""
BOTH_WAYS = """
plain_losses = batch_losses
def batch_losses(image_features, text_features, prompt_features, targets, logit_scale):
    losses = plain_losses(image_features, text_features, prompt_features, targets, logit_scale)
    labelled = targets.classes >= 0
    if not labelled.any():
        return losses
    per_class = (logit_scale.exp() * prompt_features @ image_features[labelled].T).log_softmax(1)
    right = F.one_hot(targets.classes[labelled], len(prompt_features)).T.float()
    images_found = -(per_class * right).sum(1) / right.sum(1)
    return torch.stack([losses[0], (losses[1] + images_found.mean()) / 2])
"""
BY_COUNT = """
plain_losses = batch_losses
def batch_losses(image_features, text_features, prompt_features, targets, logit_scale):
    losses = plain_losses(image_features, text_features, prompt_features, targets, logit_scale)
    shares = [count / len(image_features) for count in targets.counts]
    return torch.stack([loss * share for loss, share in zip(losses, shares)])
"""
FEW = """
plain_examples = read_examples
def read_examples(path):
    examples, *rest = plain_examples(path)
    if "train" in str(path):
        kept = [hashlib.sha256(e.image_path.encode()).digest()[0] < 26 for e in examples]
        examples = [e if full else e._replace(LESS) for e, full in zip(examples, kept)]
    return examples, *rest
"""
FEW_LABELS = FEW.replace("LESS", "class_name=''")
FEW_TITLES = FEW.replace("LESS", "captions=()")
VARIANTS = {  # name: (constants, lines before the script's end)
    "as it is": ({}, ""),
    "from a random start": ({"MODEL": "tiny", "LR": 1e-3}, ""),
    **{f"class weight {weight}": ({"CLASS_WEIGHT": weight}, "") for weight in (0.0, 0.5, 2.0)},
    "class loss both ways": ({}, BOTH_WAYS),
    "a tenth of the labels": ({}, FEW_LABELS),
    "a tenth of the labels, losses by count": ({}, FEW_LABELS + BY_COUNT),
    "a tenth of the titles": ({}, FEW_TITLES),
    "a tenth of the titles, losses by count": ({}, FEW_TITLES + BY_COUNT),
    "20 epochs": ({"NUM_EPOCHS": 20}, ""),
    **{f"LR {rate:g}": ({"LR": rate}, "") for rate in (1e-4, 1e-3)},
}
if QUICK:
    VARIANTS = {name: VARIANTS[name] for name in list(VARIANTS)[::3]}


def write_dataset(folder, images, **splits):
    """The rows of each split → the constants that name this dataset."""
    folder.mkdir()
    for split, rows in splits.items():
        conftest.write_lines(folder / f"{split}_data.json", rows[: 300 if QUICK else None])
    json_path = f"{folder}/{{split}}_data.json"
    return {"IMAGE_PATH": f"{images}", "JSON_PATH": json_path}


def pretrained(first, kept, folder):
    """The file of what PRETRAIN makes of the first dataset, made where it is not there."""
    name = f"{first.name}-{PRETRAIN['NUM_EPOCHS']}-epochs.pt"
    if not (path := Path(tempfile.gettempdir(), name)).exists():
        rows = {"train": conftest.read_lines(first / "train_data.json"), "val": kept}
        script = changed_script(folder, PRETRAIN | write_dataset(folder, first, **rows))
        subprocess.run([sys.executable, script], cwd=folder, check=True)
        shutil.move(folder / "outputs/best.pt", path)
    return f"{path}"


def run(folder, constants, lines, shares, datasets):
    """The script so changed → {share of the tuned weights: {split: the first four COLUMNS}}."""
    lines += f"\nSHARES, DATASETS = {shares}, {datasets}\n{MEASURE}"
    conftest.launch(changed_script(folder, constants, lines))
    results = {share: {} for share in shares}
    for share, name in itertools.product(shares, datasets):
        for line in conftest.read_lines(folder / f"{share}/{name}/metrics.jsonl"):
            right = [line[key] for key in KEYS]
            results[share][name if name == "first" else line["split"]] = [*right, mean(right)]
    shutil.rmtree(folder)
    return results


def as_row(seeds, split, base):
    """A table's row, and how far its score is from the base's, in pooled deviations."""
    columns = list(zip(*(seed[split] for seed in seeds), strict=True))
    ours, theirs = columns[-1], [seed[split][-1] for seed in base]
    pooled = max(math.hypot(stdev(ours), stdev(theirs)) / math.sqrt(2), 1e-3)
    cells = [f"{mean(column):.3f} ± {stdev(column):.3f}" for column in columns]
    cells.append(f"{(mean(ours) - mean(theirs)) / pooled:+.1f}")
    return dict(zip(COLUMNS, cells, strict=True))


def draw(path, curves):
    """A line for each curve: the score on the first dataset, and on the second."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    panel = figure.subplots()
    for label, points in curves.items():
        x, y = ([mean(s[on][-1] for s in p) for p in points.values()] for on in ("first", "val"))
        panel.plot(x, y, marker="o", label=label)
        for place in zip(points, zip(x, y, strict=True), strict=True):
            panel.annotate(*place, (5, 5), textcoords="offset points", fontsize=8)
    panel.set(xlabel="score on the first dataset's val", ylabel="score on the second's val")
    panel.legend()
    figure.savefig(path, dpi=100)


def main():
    first, second = (Path(folder).resolve() for folder in sys.argv[1:])
    kept = random.Random(0).sample(conftest.read_lines(first / "val_data.json"), 1000)
    parts = {"train": [], "test": [], "val": conftest.read_lines(second / "val_data.json")}
    for row in conftest.read_lines(second / "train_data.json"):
        digest = hashlib.sha256((second / row["image_path"]).read_bytes()).digest()
        parts["test" if digest[0] < 26 else "train"].append(row)  # of 256 values, evenly drawn
    with tempfile.TemporaryDirectory() as name:
        start = pretrained(first, kept, (folder := Path(name)) / "start")
        datasets = {"first": write_dataset(folder / "first", first, train=kept, val=kept)}
        datasets["second"] = write_dataset(folder / "second", second, **parts)
        base = FINETUNE | datasets["second"] | {"MODEL": start}
        asked = {name: [] for name in VARIANTS}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for seed, (name, (constants, lines)) in itertools.product(SEEDS, VARIANTS.items()):
                how = base | {"SEED": seed} | constants, lines, MIX if name == "as it is" else (1,)
                asked[name].append(pool.submit(run, folder / f"{seed} {name}", *how, datasets))
        done = {name: [one.result() for one in seeds] for name, seeds in asked.items()}
    table = {name: [seed[1] for seed in seeds] for name, seeds in done.items()}
    curves = {"mix": {f"{s:.0%} tuned": [seed[s] for seed in done["as it is"]] for s in MIX}}
    curves |= {
        kind: {n: table[n] for n in table if n.startswith(kind)} for kind in ("LR", "class weight")
    }
    table |= curves["mix"]
    tables = {}
    for split in ("val", "test", "first"):
        rows = {name: as_row(seeds, split, table["as it is"]) for name, seeds in table.items()}
        tables[f"{split}, {len(SEEDS)} seeds"] = rows
    keep("transfer.json", f"{first.name} → {second.name}", tables)
    draw((Path(tempfile.gettempdir()) if QUICK else STUDIES) / "transfer.png", curves)


if __name__ == "__main__":
    main()

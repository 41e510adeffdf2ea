"""What each choice is worth when fine-tuning: a tiny CLIP that knows one dataset learns another.

    python tests/studies/transfer.py PRETRAIN_FOLDER FINETUNE_FOLDER

Both are in IndoFashion's layout. What is learned from the first, once, plays OpenAI's weights; each
run is the script itself, fine-tuning them on the second with edited constants, or with lines put
before its end, one run a core. Of the second's train pictures a tenth is the test, which chooses
nothing. The two folders' part of transfer.json is replaced.
"""

import hashlib
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from common import changed_script, compare, conftest, keep, run_all, write_dataset

SEEDS = range(5)
PRETRAIN = {"MODEL": "tiny", "BATCH_SIZE": 256, "NUM_EPOCHS": 12, "LR": 1e-3}
FINETUNE = {"BATCH_SIZE": 64, "NUM_EPOCHS": 10, "LR": 3e-4}
MIX = (0, 0.25, 0.5, 0.75, 1)  # shares of the tuned weights, the others being the start's
MEASURE = """
SHARES = (1,)
fine_tune = main
save_run = draw_curves = draw_confusion = draw_retrieval = lambda *_: None  # only time
def main():
    fine_tune()
    start, tuned = (load_clip(name).state_dict() for name in (MODEL, f"{OUTPUT_PATH}/best.pt"))
    for share in SHARES:
        torch.save({name: start[name].lerp(tuned[name], share) for name in tuned}, "mixed.pt")
        for name, paths in DATASETS.items():  # a training of no epochs evaluates
            globals().update(paths, MODEL="mixed.pt", OUTPUT_PATH=f"{share} {name}", NUM_EPOCHS=0)
            fine_tune()
"""
LOSSES = """
plain_losses = batch_losses
def batch_losses(image_features, text_features, prompt_features, targets, logit_scale):
    losses = plain_losses(image_features, text_features, prompt_features, targets, logit_scale)
"""
BOTH_WAYS = f"""{LOSSES}
    right = F.one_hot(targets.classes, len(prompt_features)).T.float()
    logits = logit_scale.exp() * prompt_features @ image_features[targets.labelled].T
    images_found = F.cross_entropy(logits, right / right.sum(1, keepdim=True))
    return torch.stack([losses[0], (losses[1] + images_found) / 2])
"""
BY_COUNT = f"""{LOSSES}
    counts = [len(targets.titled), len(targets.labelled)]
    return losses * torch.tensor(counts) / len(image_features)
"""
FEW = """
plain_examples = read_examples
def read_examples(split, table):
    examples = plain_examples(split, table)
    for e in examples:
        name = os.path.basename(e.path)
        if split == "train" and hashlib.sha256(name.encode()).digest()[0] >= 26:
            e.LESS = ()
    return examples
"""
FEW_LABELS = FEW.replace("LESS", "classes")
FEW_TITLES = FEW.replace("LESS", "captions")
VARIANTS = {  # name: (constants, lines before the script's end)
    "as it is": ({}, f"SHARES = {MIX}"),
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


if __name__ == "__main__":
    first, second = (Path(folder).resolve() for folder in sys.argv[1:])
    kept = random.Random(0).sample(conftest.read_lines(first / "val_data.json"), 1000)
    parts = {"train": [], "test": [], "val": conftest.read_lines(second / "val_data.json")}
    for row in conftest.read_lines(second / "train_data.json"):
        digest = hashlib.sha256((second / row["image_path"]).read_bytes()).digest()
        parts["test" if digest[0] < 26 else "train"].append(row)  # of 256 values, evenly drawn
    with tempfile.TemporaryDirectory() as name:
        folder, learned = Path(name), conftest.read_lines(first / "train_data.json")
        start = PRETRAIN | write_dataset(folder / "start", first, train=learned, val=kept)
        script = changed_script(folder / "start", start)
        subprocess.run([sys.executable, script], cwd=folder / "start", check=True)
        datasets = {"first": write_dataset(folder / "first", first, train=kept, val=kept)}
        datasets["second"] = write_dataset(folder / "second", second, **parts)
        base = FINETUNE | datasets["second"] | {"MODEL": f"{folder}/start/outputs/best.pt"}
        lines = f"DATASETS = {datasets}\n{MEASURE}"
        done = run_all(VARIANTS, SEEDS, base, lines)
    tables = {}
    for title, split in {"val": "second val", "test": "second test", "first": "first val"}.items():
        rows = {name: [run[f"1 {split}"] for run in runs] for name, runs in done.items()}
        for share in MIX:
            rows[f"{share:.0%} tuned"] = [run[f"{share} {split}"] for run in done["as it is"]]
        tables[f"{title}, {len(SEEDS)} seeds"] = compare(rows, "in deviations")
    keep("transfer.json", f"{first.name} → {second.name}", tables)

"""What each choice is worth when a tiny CLIP learns the bundled sample from scratch.

    python tests/studies/ablation.py

Every run is the script itself with edited constants, or with lines put before its end, three seeds
each, one run a core. Prints a table and writes ablation.json. STUDY_QUICK=1 tries it in minutes, an
epoch each. What fine-tuning does on photographs is in transfer.py.
"""

import math
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import QUICK, ROOT, changed_script, conftest, ic, keep

SEEDS = (0, 1) if QUICK else (0, 1, 2)
COLUMNS = ("accuracy", "text → image R@5", "score", "from the first, in deviations")
FLIP = """
plain_encode = encode_images
def encode_images(model, precision, pixels):
    if torch.is_grad_enabled():
        flipped = (torch.rand(len(pixels)) < 0.5).view(-1, 1, 1, 1)
        pixels = torch.where(flipped, pixels.flip(-1), pixels)
    return plain_encode(model, precision, pixels)
"""
DECAY = """
def make_optimizer(model):
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{{"params": matrices, "weight_decay": {}}}, {{"params": others}}]
    return torch.optim.AdamW(groups, 0.0, (0.9, 0.98), eps=1e-6, weight_decay=0.0, fused=True)
"""
ADAM = """
def make_optimizer(model):
    return torch.optim.Adam(model.parameters(), 0.0, (0.9, 0.98), eps=1e-6, weight_decay=0.2)
def learning_rate(step, total_steps):
    return LR
"""
VARIANTS = {  # name: (constants, lines before the script's end)
    "as it is": ({}, ""),
    **{f"class weight {weight}": ({"CLASS_WEIGHT": weight}, "") for weight in (0.0, 0.5, 2.0)},
    "a flip too": ({}, FLIP),
    **{f"weight decay {decay}": ({}, DECAY.format(decay)) for decay in (0.1, 0.2)},
    **{f"warm-up {share}": ({"WARMUP": share}, "") for share in (0.0, 0.1)},
    "Adam, L2 decay 0.2, 5e-5 throughout": ({"LR": 5e-5, "MAX_GRAD_NORM": 1e12}, ADAM),
    "the same at this script's peak": ({"MAX_GRAD_NORM": 1e12}, ADAM),
}


def run(folder, constants, lines):
    """The script with those constants and lines → (accuracy, text → image R@5, score) on test."""
    conftest.launch(changed_script(folder, constants, lines))
    line = conftest.read_metrics(folder)[-1]
    shutil.rmtree(folder)
    assert line["split"] == "test"
    right = [line[key] for key in ("accuracy", "image_to_text_r5", "text_to_image_r5")]
    return right[0], right[2], statistics.mean(right)


def study(data, base):
    """{name: {column: mean ± deviation}}, and how far the score is from that of the first."""
    same = {name: getattr(ic, name) for name in ("WARMUP", "CLASS_WEIGHT")}
    base = same | base | {"IMAGE_PATH": f"{data}", "JSON_PATH": f"{data}/{{split}}_data.json"}
    base |= {"NUM_EPOCHS": 1} if QUICK else {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        base |= {"OUTPUT_PATH": "outputs", "CACHE_PATH": f"{folder}/cache"}
        runs = {}

        def ask(seed, constants, lines):
            what = base | {"SEED": seed} | constants
            if (key := f"{what}{lines}") not in runs:  # some variants are the base
                runs[key] = pool.submit(run, Path(folder, f"{len(runs)}"), what, lines)
            return runs[key]

        asked = {name: [ask(seed, *how) for seed in SEEDS] for name, how in VARIANTS.items()}
        done = {name: [one.result() for one in seeds] for name, seeds in asked.items()}
    lines, first = {}, None
    for name, results in done.items():
        cells = [
            (statistics.mean(column), statistics.stdev(column))
            for column in zip(*results, strict=True)
        ]
        mean, deviation = cells[-1]
        first = first or cells[-1]
        pooled = max(math.hypot(first[1], deviation) / math.sqrt(2), 1e-9)
        cells = [*(f"{m:.3f} ± {d:.3f}" for m, d in cells), f"{(mean - first[0]) / pooled:+.1f}"]
        lines[name] = dict(zip(COLUMNS, cells, strict=True))
    return lines


def main():
    title = "the bundled sample"
    rows = study(ROOT / "data/sample", ic.SAMPLE_RUN)
    keep("ablation.json", title, {f"{title}, {len(SEEDS)} seeds": rows})


if __name__ == "__main__":
    main()

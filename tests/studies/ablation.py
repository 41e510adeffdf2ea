"""What each choice is worth when a tiny CLIP learns the bundled sample from scratch.

    python tests/studies/ablation.py

Every run is the script itself with edited constants, or with lines put before its end, three seeds
each, one run a core. What fine-tuning does on photographs is in transfer.py.
"""

from common import ROOT, compare, conftest, ic, keep, run_all

SEEDS = range(3)
FLIP = """
plain_encode = encode_images
def encode_images(model, precision, pixels):
    if torch.is_grad_enabled():
        pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels)
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


if __name__ == "__main__":
    constants = {name: ic.SAMPLE_RUN[name] for name in ("BATCH_SIZE", "NUM_EPOCHS", "LR")}
    base = conftest.quick(ROOT / "data/sample", **constants)
    done = run_all(VARIANTS, SEEDS, base)
    on_test = {name: [run["outputs test"] for run in runs] for name, runs in done.items()}
    table = compare(on_test, "from the first, in deviations")
    for row in table.values():
        del row["image → text R@5"]
    keep("ablation.json", "the bundled sample", {f"the bundled sample, {len(SEEDS)} seeds": table})

"""How exact a step is, and what steps, an epoch and the input cost, here and elsewhere: tables.

    python tests/studies/benchmark.py FOLDER [--only exactness steps memory epoch input million]

FOLDER holds photographs as IndoFashion does: train_data.json and the pictures that it names.
ViT-B/32 has random weights; what is compared takes turns, each in a process of its own. A part
replaces itself in benchmark.json. All take 24 GB of memory, 17 GB for temporary files (TMPDIR) and,
on two cores, an hour and a half.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import clip
import torch
from common import ROOT, STUDIES, changed_script, conftest, ic, keep, write_dataset
from torch.utils.flop_counter import FlopCounterMode

SAMPLE, DEVICE = ROOT / "data/sample", torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE, ON_GPU = str(ic.choose_precision(DEVICE))[6:], DEVICE.type == "cuda"
BATCH, ROUNDS, STEP = 64, 3, 3  # of a process the third step: malloc still grows in the others
EPOCH_ROWS, ROWS, MILLION = 1_280, 91_166, 1_000_000  # ROWS: IndoFashion's train split
# Lengths in tokens of IndoFashion's titles, both ends included, each as often as there
LENGTHS = 20 * [6, 7, 8, 9, 9, 10, 10, 11, 12, 13, 14, 15, 16, 18, 19, 21, 23, 26] + 10 * [3, 30]
LENGTHS += 2 * [31, 32, 33, 34, 35, 36, 38, 40, 44] + [30, 74]
WORDS = "blue green black pink gold white silk cotton printed woven striped floral with and for"
STEPS = {  # row: what makes its step
    "usual_recipe": "usual_recipe()",
    "transformers": "transformers()",
    "open_clip": "open_clip()",
    "open_clip_keeping_memory": "ic.keep_freed_memory() or open_clip()",
    "sentence_transformers": "sentence_transformers()",
    "this_script_of_77_tokens": "this_script(of_77_tokens=True)",
    "this_script": "this_script()",
    "this_script_without_classes": "this_script(class_weight=0)",
}


# ---- Rows, and processes that meet them ----
def write_rows(folder, source, count):
    """The script and its rows: the source's images again and again, titles like IndoFashion's."""
    images = [row["image_path"] for row in conftest.read_lines(source / "train_data.json")]
    rng, rows = random.Random(20), []  # of the first batch of 64 the longest has 40 tokens
    titles = [rng.choices(WORDS.split(), k=rng.choice(LENGTHS) - 2) for _ in range(count)]
    for i, title in enumerate(titles):
        title = " ".join(title if rng.random() < 0.78 else rng.choice(titles))
        path = f"{i // len(images)}/{images[i % len(images)]}"
        rows.append({"image_path": path, "product_title": title, "class_label": f"class {i % 15}"})
    (folder / "images").mkdir(parents=True)
    for turn in range(-(-count // len(images))):  # the same images under other paths
        (folder / f"images/{turn}").symlink_to(source.resolve())
    constants = write_dataset(folder, folder / "images", train=rows, val=rows[:1])
    changed_script(folder, constants | {"MODEL": f"{folder.parent}/clip.pt", "BATCH_SIZE": BATCH})
    return folder


def pictures(source):
    """What they are; each is read once, so that nothing compared later waits for a disk."""
    rows = conftest.read_lines(source / "train_data.json")
    size = mean(len((source / row["image_path"]).read_bytes()) for row in rows)
    return f"{len(rows):,} photographs of {size / 1000:.0f} KB"


def once(folder, work):
    """The value of `work` in a process that meets the folder's script as indofashion_clip."""
    lines = ("import indofashion_clip", "from benchmark import *", "ic.check_constants()")
    code = "\n".join((*lines, f"print(json.dumps({work}))"))
    environment = os.environ | {"PYTHONPATH": f"{STUDIES}"}
    output = subprocess.check_output([sys.executable, "-c", code], cwd=folder, env=environment)
    return json.loads(output.splitlines()[-1])


def timed(work, times=1):
    """How long the last time takes; the peak of the GPU, or else of the process; its open files."""
    for _ in range(times):
        begin = time.perf_counter()
        _kept = work()  # with the files that it has opened
        if ON_GPU:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's
    peak = torch.cuda.max_memory_allocated() or 1024 * int(status.split("VmHWM:")[1].split()[0])
    files = os.listdir("/proc/self/fd")
    return {"seconds": seconds, "peak GB": peak / 1e9, "open files": len(files)}


def speed(times, count):
    return {"seconds": median(times), "pairs/s": count / median(times)}


# ---- Contenders: each makes a step ----
def first_batch(count, resolution=224):
    """An epoch's first batch, and where the others come from."""
    batches = ic.epoch_batches(ic.load_splits(resolution)["train"], 1, count)
    return next(batches), batches


def new_state(chunk, dtype=DTYPE):
    model = ic.load_clip(ic.MODEL).to(ic.prepare_machine())
    ic.keep_freed_memory()
    return conftest.make_state(model, chunk, precision=getattr(torch, dtype))


def this_script(count=BATCH, chunk=None, of_77_tokens=False, class_weight=1):
    ic.CLASS_WEIGHT = class_weight
    state, (batch, _) = new_state(chunk or count), first_batch(count)
    if of_77_tokens:  # as if the padding were words
        batch.tokens.clamp_(1, 49406)[:, 76] = 49407
    return partial(ic.train_step, state, batch)


def peer(model, optimizer, loss, max_norm=None, dtype=DTYPE):
    """A step as the others write it; loss: (tokens, pictures, 1 where there are any) → a scalar."""
    batch, _ = first_batch(BATCH)
    tokens, precision = batch.tokens.long(), getattr(torch, dtype)
    parts = [part.to(DEVICE) for part in (tokens, batch.pixels / 255, tokens.sign())]

    def step():
        with torch.autocast(DEVICE.type, precision, enabled=dtype != "float32"):
            value = loss(*parts)
        value.backward()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def usual_recipe():
    """The loop of openai/CLIP#83: float32, 77 tokens, Adam with weight decay."""
    model, places = ic.load_clip(ic.MODEL).to(DEVICE), torch.arange(BATCH, device=DEVICE)
    adam = torch.optim.Adam(model.parameters(), 5e-5, (0.9, 0.98), 1e-6, weight_decay=0.2)

    def loss(tokens, images, _):
        cross_entropy = torch.nn.functional.cross_entropy
        return sum(cross_entropy(logits, places) for logits in model(images, tokens)) / 2

    return peer(model, adam, loss, dtype="float32")


def transformers():
    """As its Trainer does it, and its example of contrastive training."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig()).to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0.0, fused=True)
    return peer(model, adam, lambda *batch: model(*batch, return_loss=True).loss, max_norm=1.0)


def open_clip():
    """As its main.py does it, with --precision amp_bf16 or amp."""
    import open_clip

    torch.backends.cuda.matmul.allow_tf32 = True
    model, loss = open_clip.create_model("ViT-B-32-quickgelu"), open_clip.ClipLoss()
    model.to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), 5e-4, (0.9, 0.98), 1e-6, weight_decay=0.2)
    return peer(model, adam, lambda tokens, images, _: loss(*model(images, tokens)))


def sentence_model():
    """Its CLIP, from random weights and clip's own vocabulary; nothing is downloaded."""
    import transformers as t
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    words = clip.simple_tokenizer.SimpleTokenizer()
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    tokenizer = t.CLIPTokenizer(words.encoder, merges, model_max_length=77)
    t.CLIPProcessor(t.CLIPImageProcessor(), tokenizer).save_pretrained("st_model")
    t.CLIPModel(t.CLIPConfig()).save_pretrained("st_model")
    model = SentenceTransformer("st_model", device=DEVICE.type).train()
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return model, MultipleNegativesRankingLoss(model, **symmetric)


def sentence_transformers():
    """As its trainer does it: the symmetric loss, titles padded to the longest of the batch."""
    model, symmetric_loss = sentence_model()
    adam = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0.0, fused=True)

    def loss(tokens, images, mask):
        longest = mask.sum(1).max()
        texts = {"input_ids": tokens[:, :longest], "attention_mask": mask[:, :longest]}
        images = {"pixel_values": images, "modality": "image"}
        return symmetric_loss([texts | {"modality": "text"}, images], None)

    return peer(model, adam, loss, max_norm=1.0)


def products(dtype):
    """60 products as large as those of an image tower's MLP, written to one place."""
    shapes = ((50 * BATCH, 768), (768, 3072), (50 * BATCH, 3072))
    one, other, out = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes)
    return lambda: [torch.mm(one, other, out=out) for _ in range(60)]


def gflop(step):
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / 1e9


def differences(count, chunk):
    """Of the loss and the gradients of a step from those of the textbook's step, in float32."""
    batch, _ = first_batch(count)
    targets = batch.targets._replace(labelled=count - 1 - batch.targets.labelled)
    turned = {"pixels": batch.pixels.flip(0), "tokens": batch.tokens.flip(0), "targets": targets}

    def textbook(batch):
        return conftest.textbook_step(ic.load_clip(ic.MODEL).to(DEVICE), batch)

    def here(*how):
        state = new_state(*how)
        return ic.forward_backward(state, batch), conftest.gradients(state.model)

    steps = {"the textbook's step, its pairs turned round": textbook(batch._replace(**turned))}
    steps["this script"] = here(count, "float32")
    steps[f"this script, in chunks of {chunk}"] = here(chunk, "float32")
    steps[f"this script in {DTYPE}"] = here(count)
    table, whole, (exact_losses, exact) = {}, torch.nn.utils.parameters_to_vector, textbook(batch)
    for row, (losses, gradients) in steps.items():
        worst = max(conftest.relative(gradients[name], exact[name]) for name in exact)
        gradient = conftest.relative(whole(gradients.values()), whole(exact.values()))
        loss = conftest.relative(losses.sum(), exact_losses.sum())
        table[row] = {"loss": loss, "gradient": gradient, "worst parameter's gradient": worst}
    return table


# ---- Parts: → {title: {row: {column: value}}} ----
def exactness(where, _):
    table = once(where, "differences(32, 8)")
    return {"step of 32, relative differences from the textbook's": table}


def steps(where, _):
    works = STEPS | {f"{name} products": f"products(torch.{name})" for name in (DTYPE, "float32")}
    times, peaks, table = {name: [] for name in works}, {}, {}
    for _ in range(ROUNDS):
        for name, work in works.items():
            line = once(where, f"timed({work}, {STEP})")
            times[name].append(line["seconds"])
            peaks[name] = line["peak GB"]
    useful = once(where, f"gflop({works['this_script_without_classes']})")
    whole = once(where, f"gflop({works['float32 products']})")
    rates = {name: whole / median(times[name]) for name in works if name not in STEPS}
    for name in STEPS:
        spread = {"best": BATCH / min(times[name]), "worst": BATCH / max(times[name])}
        table[name] = speed(times[name], BATCH) | spread | {"peak GB": peaks[name]}
        ratio = min(times[name]) / min(times["this_script"])  # of the bests: noise only adds
        rate = useful / median(times[name])
        table[name] |= {"this script is faster by": ratio, "useful GFLOP/s": rate}
        table[name]["of the products'"] = rate / rates[f"{DTYPE} products"]
    rates = {name: {"useful GFLOP/s": rate} for name, rate in rates.items()}
    return {f"step of {BATCH}, {DTYPE}": table | rates}


def memory(where, _):
    table = {}
    for batch, chunk in ((256, 256), (256, 32), (64, 64), (64, 32), (32, 32)):
        line = once(where, f"timed(this_script({batch}, {chunk}), {STEP})")
        name = f"batch {batch}" + f" in chunks of {chunk}" * (chunk < batch)
        table[name] = speed([line["seconds"]], batch) | {"peak GB": line["peak GB"]}
    return {f"this script, {DTYPE}": table}


def epoch_here(model):
    splits = ic.load_splits(224)
    state = ic.new_state(model, splits)
    state.epoch = 1
    ic.train_epoch(state, splits["train"], ic.tqdm(disable=True))


def epoch_elsewhere(model, loss):
    """By sentence-transformers' own trainer."""
    import datasets
    from sentence_transformers import SentenceTransformerTrainer as Trainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    rows = conftest.read_lines(ic.JSON_PATH.replace("{split}", "train"))
    paths = [f"{ic.IMAGE_PATH}/{row['image_path']}" for row in rows]
    rows = {"text": [row["product_title"] for row in rows], "image": paths}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    how = {"num_train_epochs": 1, "per_device_train_batch_size": BATCH, "save_strategy": "no"}
    how |= {"bf16": DTYPE == "bfloat16", "fp16": DTYPE == "float16", "use_cpu": not ON_GPU}
    Trainer(model, Arguments("st_outputs", **how), rows, loss=loss).train()


def epoch(where, source):
    title = f"epoch of {EPOCH_ROWS:,} rows in batches of {BATCH}, {pictures(source)}"
    works, table = {"sentence_transformers": "partial(epoch_elsewhere, *sentence_model())"}, {}
    for how in ("decoding", "cached"):
        works[f"this_script, {how}"] = "partial(epoch_here, new_state(1).model)"
    for name, work in works.items():
        table[name] = speed([once(where, f"timed({work})")["seconds"]], EPOCH_ROWS)
    return {title: table}


def reading():
    """How long training waits for a batch, the cache in memory or not."""
    [cache_file] = Path(ic.CACHE_PATH).glob("224-*.u8")
    with open(cache_file, "rb") as cache:
        os.posix_fadvise(cache.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # none of it is in memory
    data, table = ic.load_splits(224)["train"], {}
    for where, count in (("the disk", 256), ("memory", 256), ("memory", 1024)):
        batches = ic.epoch_batches(data, 1, count)  # of one order: none is read twice
        waits = [timed(partial(next, batches))["seconds"] for _ in range(ROWS // 4 // count)]
        table[f"ms that training waits for {count} from {where}"] = {"": 1000 * median(waits[1:])}
    return table


def starts(where, source, rows, resolution):
    where = write_rows(where.with_name(f"{rows}-{resolution}"), source, rows)
    names = (f"{rows:,} rows at {resolution} pixels, {how}" for how in ("decoding", "cached"))
    return {name: once(where, f"timed(partial(first_batch, 256, {resolution}))") for name in names}


def input_of_training(where, source):
    what, photographs = pictures(source), starts(where, source, ROWS, 224)
    first, later = (line["seconds"] for line in photographs.values())
    table = {"pictures/s into the cache": {"": ROWS / (first - later)}}
    table |= once(where.with_name(f"{ROWS}-224"), "reading()")
    # Of few pixels, as the cache's pages are not the process's own
    drawings = starts(where, SAMPLE, ROWS // 2, 8) | starts(where, SAMPLE, ROWS, 8)
    _, less, _, more = (line["peak GB"] for line in drawings.values())
    table["bytes of memory a row"] = {"": 1e9 * (more - less) / (ROWS - ROWS // 2)}
    tables = {f"first batch of 256, {what}": photographs}
    return tables | {"first batch of 256, 240 drawings of 6 KB": drawings, f"input, {what}": table}


def million(where, _):
    return {"first batch of 256, a million rows": starts(where, SAMPLE, MILLION, 8)}


if __name__ == "__main__":
    parts = {"exactness": exactness, "steps": steps, "memory": memory, "epoch": epoch}
    parts |= {"input": input_of_training, "million": million}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, model = Path(name), clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
        torch.save(model.state_dict(), folder / "clip.pt")
        for part in arguments.only:
            where = write_rows(folder / part, arguments.folder, EPOCH_ROWS)
            keep("benchmark.json", part, parts[part](where, arguments.folder))

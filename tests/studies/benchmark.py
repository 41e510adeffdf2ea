"""How exact a step is, and what steps, an epoch and the input cost, here and elsewhere: tables.

    python tests/studies/benchmark.py [FOLDER] [--only exactness steps memory epoch input million]

FOLDER holds photographs as IndoFashion does: train_data.json and the pictures that it names; else
the bundled sample's drawings stand in. ViT-B/32 with random weights, on the GPU if there is one;
what is compared takes turns, each in a process of its own, and the median of the rounds counts. A
part replaces itself in benchmark.json. They need Linux, 24 GB of memory, 17 GB in the folder for
temporary files (TMPDIR) and, on two cores, an hour and a half; STUDY_QUICK=1 tries them in minutes.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import QUICK, ROOT, STUDIES, changed_script, conftest, ic, keep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLE, ON_GPU = ROOT / "data/sample", DEVICE.type == "cuda"
DTYPE = str(ic.choose_precision(DEVICE))[6:]
ROUNDS = 1 if QUICK else 5  # of steps; an epoch and a memory are measured once
BATCHES = (4,) if QUICK else (256, 1024) if ON_GPU else (64,)  # of the steps
SHRINK = 16 if QUICK else 1  # the memory part's batches
EPOCH_ROWS, EPOCH_BATCH = (24, 8) if QUICK else (1_280, 64)
ROWS, MILLION = (9_000, 5_000) if QUICK else (91_166, 1_000_000)  # IndoFashion's train split; more
QUARTER = ROWS // 4  # of the cache, 3.4 GB, is read to see how long that takes
# Lengths in tokens of IndoFashion's titles, both ends included: val's quantiles, each 5 % up to 95,
# then from 95 each 0.5 %
LENGTHS = [3, 6, 7, 8, 9, 9, 10, 10, 11, 12, 13, 14, 15, 16, 18, 19, 21, 23, 26, 30]
LENGTHS_95 = [30, 31, 32, 33, 34, 35, 36, 38, 40, 44, 74]
WORDS = "blue green black pink gold white silk cotton printed woven striped floral with and for"


# ---- Processes, in turns ----
def start(folder, work):
    """A process that meets the folder's script as indofashion_clip and serves that work."""
    code = f"import indofashion_clip; from benchmark import *; serve({work})"
    quiet = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    how = {"cwd": folder, "env": os.environ | quiet | {"PYTHONPATH": str(STUDIES)}, "text": True}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code], **how, **pipes)


def serve(work):
    """In a process started by start(): work(), for each line that comes."""
    for _ in sys.stdin:
        print("\nresult", json.dumps(work()), flush=True)


def ask(process):
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("result "):
            return json.loads(line.removeprefix("result "))
    sys.exit(f"failed: {process.args[-1]}")


def once(folder, work):
    with start(folder, work) as process:
        return ask(process)


def in_turns(folder, works, rounds=ROUNDS):
    """{name: speed and memory} of {name: (function of a contender, pairs a step, …)}."""
    times, peaks, alive = {name: [] for name in works}, {}, {}
    for _ in range(rounds):
        for name, (function, *how) in works.items():
            process = alive.get(name) or start(folder, f"timed({function}{tuple(how)})")
            seconds, peaks[name] = ask(process)
            times[name].append(seconds)
            if ON_GPU:
                alive[name] = process
            else:  # all of them at once would take 25 GB
                process.communicate()
    for process in alive.values():
        process.communicate()
    return {name: speed(times[name], works[name][1]) | {"peak GB": peaks[name]} for name in works}


def speed(times, count):
    middle, most, least = (count / of(times) for of in (statistics.median, min, max))
    spread = {"best": most, "worst": least} if len(times) > 1 else {}
    return {"seconds": count / middle, "pairs/s": middle} | spread


def seconds_of(work):
    """How long it takes, the GPU's part with it."""
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize() if ON_GPU else None
    return time.perf_counter() - begin


def timed(step):
    """A work that does the step twice → seconds of the second, peak GB."""

    def work():
        result = [seconds_of(step), seconds_of(step)][1], peak_gb()
        torch.cuda.empty_cache()  # leaves a GPU's memory to the next in turn
        return result

    return work


def peak_gb(of_gpu=ON_GPU):
    """The GPU's peak, or this process's; not ru_maxrss, which a process takes from its parent."""
    if of_gpu:
        return torch.cuda.max_memory_allocated() / 1e9
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9


# ---- Contenders: each makes a step of `count` pairs ----
def title_length(rng):
    """As long as one of IndoFashion's, in tokens."""
    place = 20 * rng.random()
    if place < 19:
        return LENGTHS[round(place)]
    return LENGTHS_95[round(10 * (place - 19))]


def random_tokens(count, length=title_length):
    """As long as real titles, the longest as in most batches; one in 64 says what another says."""
    rng, tokens = random.Random(10), torch.zeros(count, 77, dtype=torch.int32)
    for row in tokens:
        words = [rng.randrange(1000, 40000) for _ in range(length(rng) - 2)]
        row[: len(words) + 2] = torch.tensor([49406, *words, 49407])
    tokens[::64] = tokens[-1]
    return tokens


def new_state(count, dtype, chunk=None):
    model, precision = ic.load_clip(ic.MODEL).to(ic.prepare_machine()), getattr(torch, dtype)
    ic.keep_freed_memory()
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == "float16")
    return conftest.make_state(model, chunk or count, scaler=scaler, precision=precision)


def random_batch(count, length=title_length, classes=True):
    """Images that are all titled and, unless told otherwise, all of IndoFashion's 15 classes."""
    pixels = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
    pixels = pixels.pin_memory() if ON_GPU else pixels
    captions, which = random_tokens(count, length).unique(dim=0, return_inverse=True)
    names = [*ic.CLASS_NAMES.values(), "saree", "blouse", "lehenga"] if classes else []
    prompts = torch.zeros(0, 77, dtype=torch.int32)
    if names:
        prompts = ic.clip.tokenize([ic.PROMPTS[0].replace("{}", name) for name in names])
    labels = torch.arange(count) % len(names) if names else torch.full((count,), -100)
    targets = ic.Targets(torch.arange(count), labels, (count, count if names else 0))
    return ic.Batch(pixels, captions, which, prompts, len(names), targets)


def this_script(count, dtype, chunk=None, length=title_length, classes=True):
    state, batch = new_state(count, dtype, chunk), random_batch(count, length, classes)
    return lambda: ic.train_step(state, batch)


def this_script_without_classes(count, dtype):
    """The caption loss alone."""
    return this_script(count, dtype, classes=False)


def this_script_of_77_tokens(count, dtype):
    """As if the padding were words."""
    return this_script(count, dtype, length=lambda rng: 77)


def peer(count, dtype, model, optimizer, loss, max_norm=None, longest=77):
    """A step as the others write it, of pictures that are float32 and normalised already.

    loss: (pictures, tokens, 1 where there are tokens) → a scalar
    """
    images, tokens = torch.randn(count, 3, 224, 224), random_tokens(count)[:, :longest].long()
    mask = (torch.arange(tokens.shape[1]) <= tokens.argmax(1)[:, None]).long()
    batch = [part.pin_memory() if ON_GPU else part for part in (images, tokens, mask)]
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == "float16")

    def step():
        with torch.autocast(DEVICE.type, getattr(torch, dtype), enabled=dtype != "float32"):
            value = loss(*(part.to(DEVICE, non_blocking=True) for part in batch))
        scaler.scale(value).backward()
        if max_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


def usual_recipe(count, _):
    """The loop of openai/CLIP#83: float32, 77 tokens, Adam with weight decay."""
    model, places = ic.load_clip(ic.MODEL).to(DEVICE), torch.arange(count, device=DEVICE)
    adam = torch.optim.Adam(model.parameters(), 5e-5, (0.9, 0.98), 1e-6, weight_decay=0.2)

    def loss(images, tokens, _):
        cross_entropy = torch.nn.functional.cross_entropy
        return sum(cross_entropy(logits, places) for logits in model(images, tokens)) / 2

    return peer(count, "float32", model, adam, loss)


def transformers(count, dtype):
    """As its Trainer does it, and its example of contrastive training."""
    from transformers import CLIPConfig, CLIPModel

    model = CLIPModel(CLIPConfig()).to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0.0, fused=True)

    def loss(images, tokens, mask):
        return model(tokens, images, attention_mask=mask, return_loss=True).loss

    return peer(count, dtype, model, adam, loss, max_norm=1.0)


def open_clip(count, dtype):
    """As its main.py does it, with --precision amp_bf16 or amp."""
    import open_clip

    torch.backends.cuda.matmul.allow_tf32 = True
    model, loss = open_clip.create_model("ViT-B-32-quickgelu"), open_clip.ClipLoss()
    model.to(DEVICE).train()
    adam = torch.optim.AdamW(model.parameters(), 5e-4, (0.9, 0.98), 1e-6, weight_decay=0.2)
    return peer(count, dtype, model, adam, lambda images, texts, _: loss(*model(images, texts)))


def open_clip_keeping_memory(count, dtype):
    """With this script's setting of malloc: freed memory is not given back to the system."""
    ic.keep_freed_memory()
    return open_clip(count, dtype)


def sentence_model():
    """Its CLIP, from random weights and clip's own vocabulary; nothing is downloaded."""
    import transformers as t
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    words = ic.clip.simple_tokenizer.SimpleTokenizer()
    merges = sorted(words.bpe_ranks, key=words.bpe_ranks.get)
    tokenizer = t.CLIPTokenizer(words.encoder, merges, model_max_length=77)
    t.CLIPProcessor(t.CLIPImageProcessor(), tokenizer).save_pretrained("st_model")
    t.CLIPModel(t.CLIPConfig()).save_pretrained("st_model")
    model = SentenceTransformer("st_model", device=DEVICE.type).train()
    symmetric = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
    return model, MultipleNegativesRankingLoss(model, **symmetric)


def sentence_transformers(count, dtype):
    """As its trainer does it: the symmetric loss, titles padded to the longest of the batch."""
    model, symmetric_loss = sentence_model()
    adam = torch.optim.AdamW(model.parameters(), 5e-5, weight_decay=0.0, fused=True)
    longest = int(random_tokens(count).argmax(1).max()) + 1

    def loss(images, tokens, mask):
        texts = {"input_ids": tokens, "attention_mask": mask, "modality": "text"}
        return symmetric_loss([texts, {"pixel_values": images, "modality": "image"}], None)

    return peer(count, dtype, model, adam, loss, max_norm=1.0, longest=longest)


def products(count, dtype):
    """60 products as large as those of an image tower's MLP, written to one place."""
    shapes = ((50 * count, 768), (768, 3072), (50 * count, 3072))
    a, b, c = (torch.randn(*shape, device=DEVICE).to(getattr(torch, dtype)) for shape in shapes)
    return lambda: [torch.mm(a, b, out=c) for _ in range(60)]


def useful_gflop(tokens):
    """Of a step that computes only what is read: no padding, each caption once."""

    def tower(width, lengths, pairs):  # 12 blocks; the last does all but keys and values for a row
        count, rows = int(lengths.sum()), len(lengths)
        blocks = 11 * (12 * width**2 * count + 2 * width * pairs)
        return blocks + 2 * width**2 * count + 10 * width**2 * rows + 2 * width * count

    lengths, images = tokens.unique(dim=0).argmax(1) + 1, torch.full((len(tokens),), 50)
    vision = tower(768, images, 50**2 * len(tokens))
    text = tower(512, lengths, int((lengths * (lengths + 1) // 2).sum()))  # causal
    patches = 3 * 32**2 * 768 * 49 * len(tokens)  # which need no gradients of what goes in
    return (6 * (vision + text) + 4 * patches) / 1e9


def differences(count, chunk):
    """Of the loss and the gradients of a step from those of the textbook's step, in float32."""
    batch = random_batch(count)

    def textbook(batch):
        return conftest.textbook_step(ic.load_clip(ic.MODEL).to(DEVICE), batch)

    def here(dtype, chunk=None):
        state = new_state(count, dtype, chunk)
        state.scaler = torch.amp.GradScaler(DEVICE.type, enabled=False)
        return ic.forward_backward(state, batch), conftest.gradients(state.model)

    exact_losses, exact = textbook(batch)
    mirrored = {name: getattr(batch, name).flip(0) for name in ("pixels", "inverse")}
    mirrored["targets"] = batch.targets._replace(classes=batch.targets.classes.flip(0))
    found = {"the textbook's step, its pairs turned round": textbook(batch._replace(**mirrored))}
    found |= {"this script": here("float32")}
    found |= {f"this script, in chunks of {chunk}": here("float32", chunk)}
    if DTYPE != "float32":
        found |= {f"this script in {DTYPE}": here(DTYPE)}
    lines = {}
    for name, (losses, gradients) in found.items():
        apart = {n: conftest.relative(gradients[n], exact[n]) for n in exact}
        whole = [torch.cat([g.flatten() for g in each.values()]) for each in (gradients, exact)]
        loss = conftest.relative(losses.sum(), exact_losses.sum())
        lines[name] = {"loss": loss, "gradient": conftest.relative(*whole)}
        lines[name]["worst parameter's gradient"] = max(apart.values())
    return lines


# ---- Parts: → {title: {row: {column: value}}} ----
def exactness(folder, _):
    count, chunk = (4, 2) if QUICK else (32, 8)
    title = f"step of {count}, relative differences from the textbook's"
    return {title: once(folder, f"lambda: differences({count}, {chunk})")}


def steps(folder, _):
    tables = {}
    names = ("usual_recipe", "transformers", "open_clip", "open_clip_keeping_memory")
    names += ("sentence_transformers", "this_script_of_77_tokens", "this_script")
    names += ("this_script_without_classes",)
    dtypes = ("bfloat16", "float16") if ON_GPU else (DTYPE,)
    for count, dtype in ((count, dtype) for count in BATCHES for dtype in dtypes):
        works = {name: (name, count, dtype) for name in names}
        rates = {f"{one} products": ("products", count, one) for one in (dtype, "float32")}
        lines, useful = in_turns(folder, works | rates), useful_gflop(random_tokens(count))
        whole = 60 * 2 * 50 * count * 768 * 3072 / 1e9
        rates = {name: {"useful GFLOP/s": whole / lines.pop(name)["seconds"]} for name in rates}
        rate = rates[f"{dtype} products"]["useful GFLOP/s"]
        for line in lines.values():
            best, ours = (
                each.get("best", each["pairs/s"]) for each in (line, lines["this_script"])
            )
            line["this script is faster by"] = ours / best  # of the bests: noise only adds
            line["useful GFLOP/s"] = useful / line["seconds"]
            line["of the products'"] = line["useful GFLOP/s"] / rate
        tables[f"step of {count}, {dtype}"] = lines | rates
    return tables


def memory(folder, _):
    works = {}
    for sizes in ((256, 256), (256, 32), (64, 64), (64, 32), (32, 32)):
        batch, chunk = (size // SHRINK for size in sizes)
        name = f"batch {batch}" + f" in chunks of {chunk}" * (chunk < batch)
        works[name] = ("this_script", batch, DTYPE, chunk)
    return {f"this script, {DTYPE}": in_turns(folder, works, rounds=1)}


def write_rows(folder, source, count):
    """A script for rows that repeat the source's images, with titles like IndoFashion's."""
    rows, rng, titles = conftest.read_lines(source / "train_data.json"), random.Random(0), []
    paths = {"IMAGE_PATH": f"{folder}/images", "JSON_PATH": f"{folder}/{{split}}_data.json"}
    changed_script(folder, paths | {"MODEL": f"{folder.parent}/clip.pt", "BATCH_SIZE": EPOCH_BATCH})
    with open(folder / "train_data.json", "w", encoding="utf-8") as file:
        for i in range(count):
            words = " ".join(rng.choices(WORDS.split(), k=title_length(rng) - 2))
            titles.append(words if i == 0 or rng.random() < 0.78 else rng.choice(titles))
            turn, row = i // len(rows), rows[i % len(rows)]
            if i % len(rows) == 0:  # the same images under other paths
                (folder / "images").mkdir(exist_ok=True)
                (folder / f"images/{turn}").symlink_to(source)
            row = row | {"image_path": f"{turn}/{row['image_path']}", "product_title": titles[-1]}
            file.write(json.dumps(row) + "\n")
    conftest.write_lines(folder / "val_data.json", [row])
    return folder


def pictures(source):
    """What they are; each is read once, so that nothing compared later waits for a disk."""
    rows = conftest.read_lines(source / "train_data.json")
    size = statistics.mean(len((source / row["image_path"]).read_bytes()) for row in rows)
    kind = "drawings" if source == SAMPLE else "photographs"
    return f"{len(rows):,} {kind} of {size / 1000:.0f} KB"


def epoch_here():
    device = ic.prepare_machine()
    ic.check_constants()
    model, begin = ic.load_clip(ic.MODEL).to(device), time.perf_counter()
    splits = ic.load_splits(224)
    state = ic.new_state(model, splits)
    state.epoch = 1
    ic.train_epoch(state, splits["train"], ic.tqdm(disable=True))
    return time.perf_counter() - begin


def epoch_elsewhere():
    """By sentence-transformers' own trainer; workers load for a GPU, a CPU has no core to spare."""
    import datasets
    from sentence_transformers import SentenceTransformerTrainer as Trainer
    from sentence_transformers import SentenceTransformerTrainingArguments as Arguments

    (model, loss), begin = sentence_model(), time.perf_counter()
    rows = conftest.read_lines(ic.JSON_PATH.replace("{split}", "train"))
    paths = [f"{ic.IMAGE_PATH}/{row['image_path']}" for row in rows]
    rows = {"text": [row["product_title"] for row in rows], "image": paths}
    rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    how = {"num_train_epochs": 1, "per_device_train_batch_size": ic.BATCH_SIZE}
    how |= {"bf16": DTYPE == "bfloat16", "fp16": DTYPE == "float16", "save_strategy": "no"}
    how |= {"dataloader_num_workers": os.cpu_count() if ON_GPU else 0, "use_cpu": not ON_GPU}
    how |= {"report_to": "none", "disable_tqdm": True}
    Trainer(model, Arguments("st_outputs", **how), rows, loss=loss).train()
    return time.perf_counter() - begin


def epoch(folder, source):
    title = f"epoch of {EPOCH_ROWS:,} rows in batches of {EPOCH_BATCH}, {pictures(source)}"
    works = {"sentence_transformers": "epoch_elsewhere", "this_script, decoding": "epoch_here"}
    works["this_script, cached"] = "epoch_here"
    where = write_rows(folder / "epoch", source, EPOCH_ROWS)
    times = {name: once(where, work) for name, work in works.items()}
    return {title: {n: {"seconds": t, "pairs/s": EPOCH_ROWS / t} for n, t in times.items()}}


def first_batch(resolution):
    """Seconds from nothing to the first batch, and what the process is like then."""
    ic.prepare_machine()
    ic.check_constants()
    begin = time.perf_counter()
    splits = ic.load_splits(resolution)
    files = len(os.listdir("/proc/self/fd"))
    next(ic.epoch_batches(splits["train"], 1, 256))
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak GB": peak_gb(of_gpu=False), "open files": files}


def reading():
    """How long training waits for a batch, the cache in memory or not."""
    ic.prepare_machine()
    [cache_file] = Path(ic.CACHE_PATH).glob("train-224-*.u8")
    with open(cache_file, "rb") as cache:
        os.posix_fadvise(cache.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # none of it is in memory
    data, state = ic.load_splits(224)["train"], new_state(1024, DTYPE) if ON_GPU else None
    lines = {}
    for where, count in (("the disk", 256), ("memory", 256), ("memory", 1024)):
        waits, begin = [], time.perf_counter()
        batches = ic.epoch_batches(data, 1, count)  # of the same order: none is read twice
        for batch, _ in zip(batches, range(QUARTER // count), strict=False):
            waits.append(time.perf_counter() - begin)
            if state:  # a thread loads the next meanwhile
                ic.train_step(state, batch).item()
            begin = time.perf_counter()
        wait = statistics.median(waits[1:])
        lines[f"ms that training waits for {count} from {where}"] = 1000 * wait
    return lines


def starts(folder, source, rows, resolution):
    where = write_rows(folder / f"{rows}-{resolution}", source, rows)
    names = (f"{rows:,} rows at {resolution} pixels, {how}" for how in ("decoding", "cached"))
    return {name: once(where, f"lambda: first_batch({resolution})") for name in names}


def input_of_training(folder, source):
    what, lines, half = pictures(source), starts(folder, source, ROWS, 224), ROWS // 2
    first, later = (line["seconds"] for line in lines.values())
    speeds = {"pictures/s into the cache": ROWS / (first - later)}
    speeds |= once(folder / f"{ROWS}-224", "reading")
    small = {}  # of few pixels, as the cache's pages are not the process's own
    for rows in (half, ROWS):
        small |= starts(folder, SAMPLE, rows, 8)
    peaks = [small[f"{rows:,} rows at 8 pixels, cached"]["peak GB"] for rows in (half, ROWS)]
    speeds["bytes of memory a row"] = 1e9 * (peaks[1] - peaks[0]) / (ROWS - half)
    speeds = {name: {"": speed} for name, speed in speeds.items()}
    starts_of_small = {f"first batch of 256, {pictures(SAMPLE)}": small}
    return {f"first batch of 256, {what}": lines, **starts_of_small, f"input, {what}": speeds}


def million(folder, _):
    return {"first batch of 256, a million rows": starts(folder, SAMPLE, MILLION, 8)}


def main():
    parts = {"exactness": exactness, "steps": steps, "memory": memory, "epoch": epoch}
    parts |= {"input": input_of_training, "million": million}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", default=SAMPLE, type=Path)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        model = ic.clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
        torch.save(model.state_dict(), folder / "clip.pt")
        changed_script(folder, {"MODEL": f"{folder}/clip.pt"})
        for part in arguments.only:
            keep("benchmark.json", part, parts[part](folder, arguments.folder.resolve()))


if __name__ == "__main__":
    main()

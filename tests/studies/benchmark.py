"""What the script gains, and what the same training costs elsewhere. Prints a table, writes benchmark.json.

    .venv/bin/python tests/benchmark.py

ViT-B/32 with random weights, on the GPU if there is one. Everything that is compared takes turns, each in a
process of its own, and the median of the rounds counts: other things slow a machine down now and then.
"""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import clip  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import indofashion_clip as ic  # noqa: E402

ROUNDS, WARMUP = 5, 1
ROWS = 91_166  # IndoFashion's train split
# Lengths in tokens of IndoFashion's titles, start and end included: the 0, 5, … 100 % quantiles of val
LENGTHS = [3, 6, 7, 8, 9, 9, 10, 10, 11, 12, 13, 14, 15, 16, 18, 19, 21, 23, 26, 30, 74]
DEVICE = ic.join_processes()
BATCHES = (256, 1024) if DEVICE.type == "cuda" else (64,)


def random_clip(name="ViT-B/32"):
    torch.manual_seed(0)
    model = clip.model.CLIP(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)
    return ic.add_normalisation(model).to(DEVICE).eval()


def random_batch(count):
    """Pixels, and tokens as long as the real titles; one in 64 says what another says."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    tokens = torch.zeros(count, 77, dtype=torch.int32)
    for row in tokens:
        place = rng.random() * 20
        low, high = LENGTHS[int(place)], LENGTHS[int(place) + 1]
        length = round(low + (high - low) * (place % 1) ** (4 if high == 74 else 1))
        row[:length] = torch.tensor([49406, *(rng.randrange(1000, 40000) for _ in range(length - 2)), 49407])
    tokens[::64] = tokens[-1]
    return torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8, generator=generator), tokens


def contrastive(images, texts, logit_scale):
    images, texts = F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)
    logits, targets = logit_scale.exp() * images @ texts.T, torch.arange(len(images), device=DEVICE)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def ours(pixels, tokens):
    if DEVICE.type == "cpu":
        ic.keep_memory()
    model = random_clip()
    precision = ic.choose_precision(DEVICE)
    settings = SimpleNamespace(SEED=0, MIN_CROP=0.9, MAX_GRAD_NORM=1.0)
    run = SimpleNamespace(
        model=model,
        settings=settings,
        precision=precision,
        chunk=len(pixels),
        optimizer=ic.make_optimizer(model, 0.1),
        scaler=torch.amp.GradScaler(DEVICE.type, enabled=precision == torch.float16),
    )
    return lambda: ic.train_step(run, pixels, tokens, len(pixels), 0)


def peer(model, images_and_texts, optimizer, autocast=True):
    """A step as these trainers write it: forward under autocast, one backward, one optimizer step."""

    def step():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            images, texts, logit_scale = images_and_texts(model)
        contrastive(images, texts, logit_scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def normalised(model, pixels):
    return (pixels.to(DEVICE).float().div(255) - model.mean) / model.std


def usual_recipe(pixels, tokens):
    """The loop of openai/CLIP#83: float32, 77 tokens, Adam with weight decay."""
    model = random_clip()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    tokens = tokens.to(DEVICE).long()
    return peer(
        model,
        lambda m: (m.encode_image(normalised(m, pixels)), m.encode_text(tokens), m.logit_scale),
        optimizer,
        autocast=False,
    )


def transformers_trainer(pixels, tokens):
    """CLIPModel in train mode, bf16 autocast and fused AdamW, as its Trainer sets them."""
    from transformers import CLIPConfig, CLIPModel

    model, norm = (
        CLIPModel(CLIPConfig()).to(DEVICE).train(),
        ic.add_normalisation(torch.nn.Module()).to(DEVICE),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = tokens.to(DEVICE).long()

    def forward(m):
        output = m(input_ids=tokens, pixel_values=normalised(norm, pixels))
        return output.image_embeds, output.text_embeds, m.logit_scale

    return peer(model, forward, optimizer)


def open_clip_trainer(pixels, tokens):
    """Its ViT-B-32-quickgelu in train mode, amp_bf16 and AdamW, as its main.py sets them."""
    import open_clip

    model = open_clip.create_model("ViT-B-32-quickgelu").to(DEVICE).train()
    norm = ic.add_normalisation(torch.nn.Module()).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6)
    tokens = tokens.to(DEVICE).long()

    def forward(m):
        images, texts, scale = m(normalised(norm, pixels), tokens)
        return images, texts, scale.log()

    return peer(model, forward, optimizer)


def synchronised(work):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


CONTENDER = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import benchmark as b
step = b.{maker}(*b.random_batch({batch}))
for _ in sys.stdin: b.synchronised(step); print("done", flush=True)
"""


@contextmanager
def contender(maker, batch):
    """A function that does a step, in a process of its own: its memory is as its trainer leaves it."""
    script = CONTENDER.format(tests=str(ROOT / "tests"), root=str(ROOT), maker=maker.__name__, batch=batch)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def step():
        process.stdin.write("step\n")
        for line in process.stdout:
            if line == "done\n":
                return
        raise RuntimeError(f"{maker.__name__} failed")

    try:
        yield step
    finally:
        process.stdin.close()
        process.wait()


def medians(works, rounds=ROUNDS, warmup=WARMUP):
    """{name: median seconds}, the works taking turns."""
    times = {name: [] for name in works}
    for turn in range(warmup + rounds):
        for name, work in works.items():
            seconds = synchronised(work)
            if turn >= warmup:
                times[name].append(seconds)
        print(f"  round {turn + 1} of {warmup + rounds}", end="\r", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_product(dtype):
    """(60 products of the size of an MLP's, written to one place, their operations)."""
    a, b, c = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((3200, 768), (768, 3072), (3200, 3072)))
    return lambda: [torch.mm(a, b, out=c) for _ in range(60)], 60 * 2 * 3200 * 768 * 3072


def useful_flops(tokens):
    """Of a step that skips all padding: 6 per weight and token, and attention's two products."""
    lengths = tokens.unique(dim=0).argmax(1) + 1
    images = len(tokens)
    vision = 12 * 12 * 768**2 * 50 * images + 3 * 32 * 32 * 768 * 49 * images + 12 * 2 * 50**2 * 768 * images
    text = 12 * 12 * 512**2 * int(lengths.sum()) + 12 * 512 * int((lengths**2).sum())
    return 6 * (vision + text)


def steps_table():
    lines = {}
    for batch in BATCHES:
        _, tokens = random_batch(batch)
        makers = {
            "usual recipe": usual_recipe,
            "transformers": transformers_trainer,
            "open_clip": open_clip_trainer,
            "this script": ours,
        }
        bf16, flops = matrix_product(torch.bfloat16)
        fp32, _ = matrix_product(torch.float32)
        with ExitStack() as stack:
            works = {name: stack.enter_context(contender(make, batch)) for name, make in makers.items()}
            seconds = medians(works | {"bf16": bf16, "fp32": fp32})
        rates = {name: batch / seconds[name] for name in works}
        mine = rates["this script"]
        lines[f"batch {batch}"] = {
            "pairs_per_second": rates,
            "this_script_is_faster_by": {name: mine / rate for name, rate in rates.items()},
            "bf16_gflops": flops / seconds["bf16"] / 1e9,
            "fp32_gflops": flops / seconds["fp32"] / 1e9,
            "useful_gflops": useful_flops(tokens) / seconds["this script"] / 1e9,
            "of_the_bf16_rate": useful_flops(tokens) / seconds["this script"] / (flops / seconds["bf16"]),
        }
    return lines


PEAK = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import benchmark as b
if not {kept}: b.ic.keep_memory = lambda: None
pixels, tokens = b.random_batch({batch})
step = {maker}(pixels, tokens)
if {chunk}: step.__closure__[[i for i, n in enumerate(step.__code__.co_freevars) if n == "run"][0]].cell_contents.chunk = {chunk}
step(); times = [b.synchronised(step) for _ in range({rounds})]
print(b.peak_bytes(), b.statistics.median(times))
"""


def peak_bytes():
    """The GPU's peak, or this process's; not ru_maxrss, which a process takes over from its parent."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def peak(maker, batch, chunk=0, rounds=2, kept=True):
    """(peak memory in GB, seconds a step) in a process of its own: on a CPU, of the whole process."""
    script = PEAK.format(
        tests=str(ROOT / "tests"),
        root=str(ROOT),
        batch=batch,
        chunk=chunk,
        maker=f"b.{maker}",
        rounds=rounds,
        kept=kept,
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    memory, seconds = output.split()[-2:]
    return float(memory) / 1e9, float(seconds)


def memory_table():
    lines = {
        "peak_gb": {
            maker: peak(maker, BATCHES[0], rounds=1)[0]
            for maker in ("usual_recipe", "transformers_trainer", "open_clip_trainer", "ours")
        }
    }
    (small, _), (chunked, slow), (whole, fast), (_, returned) = (
        peak("ours", 32),
        peak("ours", 256, chunk=32),
        peak("ours", 256),
        peak("ours", 256, kept=False),
    )
    lines["batch 256 in chunks of 32"] = {
        "peak_gb": chunked,
        "peak_gb_of_batch_32": small,
        "peak_gb_of_batch_256_whole": whole,
        "of_the_peak_of_batch_32": chunked / small,
        "of_the_time_of_batch_256_whole": slow / fast,
        "batch 256 whole, freed memory returned to the kernel, of the time": returned / fast,
    }
    return lines


def write_dataset(folder, rows):
    """Rows like IndoFashion's, over the sample's pictures: as many distinct titles a split as there."""
    shutil.copytree(ROOT / "data/sample/images", folder / "images", dirs_exist_ok=True)
    sample = [json.loads(line) for line in open(ROOT / "data/sample/train_data.json", encoding="utf-8")]
    rng = random.Random(0)
    with open(folder / "train_data.json", "w", encoding="utf-8") as file:
        for number in range(rows):
            row = dict(sample[number % len(sample)])
            if rng.random() < 0.78:  # the others repeat a title
                row["product_title"] += f" {rng.choice(['Ethnic', 'Festive', 'Party'])} Wear {number}"
            file.write(json.dumps(row) + "\n")


START = """
import sys; sys.path[:0] = [{tests!r}, {root!r}]
import os, time, torch, benchmark as b, indofashion_clip as ic
start = time.perf_counter()
settings = ic.read_settings()
vars(settings).update(IMAGE_PATH={data!r}, JSON_PATH={data!r} + "/{{split}}_data.json", OUTPUT_PATH={data!r}, CACHE_PATH={data!r} + "/cache")
from types import SimpleNamespace
splits = ic.load_splits(settings, {resolution}, os.cpu_count())
data, batches = ic.epoch_batches(splits["train"], settings, 1)
run = SimpleNamespace(num_workers=0, model=SimpleNamespace(mean=torch.zeros(1)))
next(iter(ic.load_batches(run, data, batches)))
seconds = time.perf_counter() - start
print(seconds, b.peak_bytes())
"""


def start(folder, resolution):
    script = START.format(tests=str(ROOT / "tests"), root=str(ROOT), data=str(folder), resolution=resolution)
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    return tuple(map(float, output.split()[-2:]))


def start_table(folder):
    """Seconds to the first batch of 91,166 rows at 224 pixels, and bytes a row that the process grows by."""
    data = folder / "whole"
    data.mkdir()
    write_dataset(data, ROWS)
    cold, _ = start(data, 224)
    warm, large = start(data, 224)
    half = folder / "half"
    half.mkdir()
    write_dataset(half, ROWS // 2)
    start(half, 8)
    start(data, 8)
    small, large = (
        start(where, 8)[1] for where in (half, data)
    )  # few pixels: the cache's pages are not the process's
    return {"cold_seconds": cold, "cached_seconds": warm, "bytes_a_row": (large - small) / (ROWS - ROWS // 2)}


def input_table(folder):
    """Pictures a second with every core, decoded by worker processes or read from the cache."""
    folder.mkdir(exist_ok=True)
    write_dataset(folder, 1920)
    settings = ic.read_settings()
    rates = {}
    runs = {}
    for name, cache in (("decoded every epoch", ""), ("from the cache", str(folder / "cache"))):
        vars(settings).update(
            IMAGE_PATH=str(folder),
            JSON_PATH=str(folder / "{split}_data.json"),
            OUTPUT_PATH=str(folder),
            CACHE_PATH=cache,
        )
        data = ic.load_splits(settings, 224, os.cpu_count())["train"]
        run = SimpleNamespace(num_workers=os.cpu_count(), model=SimpleNamespace(mean=torch.zeros(1)))
        batches = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).split(64)
        runs[name] = lambda run=run, data=data, batches=batches: [
            pixels.sum() for pixels, _, _ in ic.load_batches(run, data, batches) if 0 * len(pixels)
        ]
    for name, seconds in medians(runs).items():
        rates[name] = 1920 / seconds
    return rates | {"ratio": rates["from the cache"] / rates["decoded every epoch"]}


def disk_bytes():
    """What this process has had read from a disk; what the system remembers is not counted."""
    [line] = [line for line in open("/proc/self/io") if line.startswith("read_bytes")]
    return int(line.split()[1])


def epoch_table(folder, rows=(6_000, 12_000)):
    """Seconds of a second epoch from the cache, tiny CLIP, and the bytes that it has read from a disk."""
    seconds, from_disk = [], []
    for count in rows:
        data = folder / str(count)
        data.mkdir()
        write_dataset(data, count)
        settings = ic.read_settings()
        vars(settings).update(
            IMAGE_PATH=str(data),
            JSON_PATH=str(data / "{split}_data.json"),
            OUTPUT_PATH=str(data),
            CACHE_PATH=str(data / "cache"),
            MODEL="tiny",
            BATCH_SIZE=256,
            NUM_EPOCHS=2,
        )
        run, splits = ic.prepare(settings, DEVICE, SimpleNamespace(check=lambda: None))
        bar = SimpleNamespace(update=lambda: None, set_postfix_str=lambda text: None)
        for run.epoch in (1, 2):
            run.step, run.losses, before = 0, [], disk_bytes()
            last = synchronised(lambda: ic.train_epoch(run, splits["train"], bar))
        seconds.append(last)
        from_disk.append(disk_bytes() - before)
    return {
        "rows": {str(count): one for count, one in zip(rows, seconds)},
        "of_twice_the_rows_against_once": seconds[1] / seconds[0],
        "bytes_from_disk_in_the_second_epoch": float(max(from_disk)),
    }


def flat(tree, path=()):
    for name, value in tree.items():
        yield from (
            flat(value, (*path, name)) if isinstance(value, dict) else [(" · ".join((*path, name)), value)]
        )


def processor():
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    names = (
        [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
        if os.path.exists("/proc/cpuinfo")
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main():
    result = {"machine": f"{processor()}; torch {torch.__version__}, Python {platform.python_version()}"}
    result["steps"] = steps_table()
    result["memory"] = memory_table()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        result["pictures_per_second"] = input_table(Path(folder) / "input")
        result["epoch_seconds"] = epoch_table(Path(folder))
        result["start"] = start_table(Path(folder))
    for name, value in flat(result):
        print(
            f"{name:75} {value if isinstance(value, str) else f'{value:10.3g}' if value < 1000 else f'{value:10,.0f}'}"
        )
    with open("benchmark.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()

"""Fine-tune OpenAI's CLIP on your own pictures and captions: one file, made for IndoFashion.

    python indofashion_clip.py

Edit the constants below first, or edit nothing: without IndoFashion in data/indo-fashion it trains
a tiny CLIP on the bundled sample, in about a minute on two CPU cores. In: a folder of pictures and
a JSON-lines file of titles and classes a split. Out: outputs/best.pt, which clip.load reads.
"""

import copy
import hashlib
import html
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize
from tqdm import tqdm

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "pkg_resources is deprecated")
    import clip

# ---- Constants: what a user edits --------------------------------------------------------------
# Paths
IMAGE_PATH = "data/indo-fashion"  # the folder that image_path in a row is relative to
JSON_PATH = "data/indo-fashion/{split}_data.json"  # {split} stands for train, val and test
OUTPUT_PATH = "outputs"  # the weights, the metrics, the rows left out
CACHE_PATH = "data/cache"  # decoded pictures, 150 KB each at 224 px; "" decodes every epoch anew

# Model
MODEL = "ViT-B/32"  # a name from clip.available_models(), a .pt file, or "tiny"

# Training
BATCH_SIZE = 256  # pairs a step; each is a negative of the others, so larger learns more
NUM_EPOCHS = 6  # people stop at 3 to 10: CLIP starts close and overfits soon
LR = 1e-5  # the peak; people end up at 5e-6 to 3e-5, and 5e-5 forgets what CLIP knew
WEIGHT_DECAY = 0.1  # of matrices only, never of norms, biases and logit_scale
WARMUP = 0.1  # share of the steps in which the learning rate rises to LR
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to it: one odd batch does no harm
CLASS_PROMPT_SHARE = 0.25  # of the titles, replaced by a class prompt in each epoch: what is tested
MIN_CROP = 0.9  # the least side of the random crop, as a share; 1 does not crop
SEED = 0  # the same seed gives the same order, augmentation and, on CPU, weights

# Evaluation
PROMPTS = ("a photo of a {}", "a product photo of a {}", "a {} for sale")  # averaged
CLASS_NAMES = {  # better words than the label's own, with _ read as a space
    "dhoti_pants": "pair of dhoti pants",
    "dupattas": "dupatta",
    "gowns": "gown",
    "kurta_men": "men's kurta",
    "leggings_and_salwars": "pair of leggings or salwars",
    "mojaris_men": "pair of men's mojaris",
    "mojaris_women": "pair of women's mojaris",
    "nehru_jackets": "Nehru jacket",
    "palazzos": "pair of palazzo pants",
    "petticoats": "petticoat",
    "sherwanis": "sherwani",
    "women_kurta": "women's kurta",
}

# Machine
CHUNK_SIZE = None  # pairs encoded at a time; None: as many as the device has memory for
MAX_WORKERS = 8  # processes that decode pictures; fewer where there are fewer cores

# The run without a dataset: what differs from the constants above
SAMPLE_RUN = {
    "IMAGE_PATH": "data/sample",
    "JSON_PATH": "data/sample/{split}_data.json",
    "OUTPUT_PATH": "outputs/sample",
    "MODEL": "tiny",
    "BATCH_SIZE": 32,
    "NUM_EPOCHS": 60,
    "LR": 1e-3,
    "CLASS_PROMPT_SHARE": 0.5,
}


class Stop(SystemExit):
    """The run cannot go on: one line saying what, where and what to do. Exits with 1."""


def read_settings():
    """The constants by name, with SAMPLE_RUN's in place where the default dataset is missing."""
    settings = {name: value for name, value in globals().items() if name.isupper() and name != "F"}
    if settings["IMAGE_PATH"] == "data/indo-fashion" and not os.path.isdir("data/indo-fashion"):
        print("IndoFashion is not in data/indo-fashion (www.kaggle.com/datasets/validmodel/"
              "indo-fashion-dataset):\nrunning the bundled sample instead, by SAMPLE_RUN.")
        settings |= SAMPLE_RUN
    return SimpleNamespace(**settings)


# ---- Processes: one, or as many as torchrun started ---------------------------------------------
def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """The number of this process on its machine, as torchrun tells it."""
    return int(os.environ.get("LOCAL_RANK", 0))


def say(*lines):
    """Print from the first process only, above the progress bar."""
    if rank() == 0:
        tqdm.write("\n".join(lines))


def everyone(value):
    """[the value of each process], which all of them wait for."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows, count):
    """The `count` rows [count, D] that the processes hold in turns (r, r + world size, …), in order.

    rows: this process's, [its share, D]. Gradients reach these only: the others' are constants.
    """
    if world_size() == 1:
        return rows
    share = -(-count // world_size())
    padded = F.pad(rows, (0, 0, 0, share - len(rows)))
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded.detach())
    parts[rank()] = padded
    return torch.stack(parts, 1).flatten(0, 1)[:count]


def join_processes():
    """Join torchrun's other processes, if any → this process's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return torch.device("cuda", local_rank())


def halving(work, chunk):
    """work(chunk), and again with half the chunk each time the device has too little memory for it.

    Returns (the result, the chunk that fitted). The result does not depend on the chunk.
    """
    while True:
        try:
            return work(chunk), chunk
        except torch.OutOfMemoryError:
            if chunk == 1:
                raise Stop("out of memory even one pair at a time: a smaller MODEL or BATCH_SIZE, or "
                           "a device that nothing else uses, is needed") from None
        torch.cuda.empty_cache()  # outside except, where the error holds the tensors no longer
        chunk = -(-chunk // 2)
        tqdm.write(f"out of memory: the same again, {chunk} pairs at a time")


# ---- Data: rows → captions and pictures --------------------------------------------------------
class Record(NamedTuple):
    line: int  # in the JSON file, from 1
    image_path: str  # relative to IMAGE_PATH
    caption: str
    class_label: str
    titled: bool  # else the caption is a class prompt


def class_name(class_label, class_names):
    """women_kurta → "women's kurta" where class_names knows better, else "women kurta"."""
    return class_names.get(class_label, " ".join(class_label.split("_")))


def clean(text):
    """Plain words: entities resolved, white space collapsed, nothing that UTF-8 cannot hold."""
    text = html.unescape(text).encode("utf-8", "ignore").decode("utf-8")
    return " ".join(text.split())


def parse_row(row, line, prompt, class_names):
    """One row's object → Record. Raises ValueError with the reason where it cannot be used."""
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    path, label, title = (row.get(key) for key in ("image_path", "class_label", "product_title"))
    if not isinstance(path, str) or not path.strip():
        raise ValueError("no image_path")
    if not isinstance(label, str) or not clean(label):
        raise ValueError("no class_label")
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == "..":
        raise ValueError(f"image_path leads outside IMAGE_PATH: {path!r}")
    caption, label = clean(title) if isinstance(title, str) else "", sys.intern(clean(label))
    if titled := caption.upper() not in ("", "N/A", "NA"):
        return Record(line, path, caption, label, titled)
    return Record(line, path, prompt.format(class_name(label, class_names)), label, titled)


def read_rows(json_path):
    """Yields (line, object or None): JSON lines, or the items of one array, numbered from 1."""
    with open(json_path, encoding="utf-8-sig", errors="replace") as file:
        if file.read(64).lstrip().startswith("["):
            file.seek(0)
            with suppress(ValueError, RecursionError):
                yield from enumerate(json.load(file), 1)
                return
        file.seek(0)
        for line, text in enumerate(file, 1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except (ValueError, RecursionError):
                    yield line, None


def read_records(json_path, prompt, class_names):
    """The usable rows of a JSON-lines file (or of one JSON array), and the others.

    Returns (list of Record, list of (line, reason)). A title that is missing or N/A becomes the
    class prompt. Raises OSError where the file cannot be read.
    """
    records, skipped = [], []
    for line, row in read_rows(json_path):
        try:
            records.append(parse_row(row, line, prompt, class_names))
        except ValueError as reason:
            skipped.append((line, str(reason)))
    return records, skipped


def tokenize(captions):
    """Captions → (tokens int32 [N, 77], how many captions were longer and had to be truncated)."""
    tokens = clip.tokenize(captions, context_length=78, truncate=True).int()
    too_long = tokens[:, 77] != 0
    tokens[too_long, 76] = tokens[too_long, 77]  # the end token, where encode_text reads
    return tokens[:, :77], int(too_long.sum())


def load_image(path, resolution):
    """A picture as a viewer shows it, resized and cropped as CLIP does: uint8 [3, R, R].

    Raises whatever Pillow raises for a file that is not one whole picture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = Image.open(path, formats=("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"))
    if max(image.size) > 50 * min(image.size):  # would be resized to gigabytes
        raise ValueError(f"a strip of {image.width} × {image.height} pixels")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = resize(image.convert("RGB"), resolution, InterpolationMode.BICUBIC)
    return pil_to_tensor(center_crop(image, resolution))


@contextmanager
def replacing(path):
    """A temporary path to write; on success it is flushed to disk and takes the name at once."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def write_lines(path, rows):
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def map_pixels(path, num_images, resolution):
    """The cache file as a uint8 tensor [N, 3, R, R]; the system reads what is touched."""
    size = num_images * 3 * resolution**2
    pixels = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    return pixels.view(num_images, 3, resolution, resolution)


class PicturePass(Dataset):
    """Row → the reason why its picture cannot be used, or "". Stores the pixels of the others."""

    def __init__(self, paths, resolution, pixel_path):
        self.paths, self.resolution, self.pixel_path = paths, resolution, pixel_path

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        path = self.paths[row]
        try:
            if os.path.getsize(path) == 0:
                return f"the image is empty: {path}"
            pixels = load_image(path, self.resolution)
        except FileNotFoundError:
            return f"no image: {path}"
        except Exception as error:  # damaged files make Pillow raise nearly anything
            return f"the image cannot be read ({error}): {path}"
        if self.pixel_path:
            map_pixels(self.pixel_path, len(self), self.resolution)[row] = pixels
        return ""


def decode_pictures(paths, resolution, pixel_path, num_workers, title):
    """Decode each picture once, into pixel_path where it is given. Returns {row: reason}."""
    mine = range(local_rank(), len(paths), int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    pool = DataLoader(PicturePass(paths, resolution, pixel_path), 32, sampler=mine,
                      num_workers=num_workers, collate_fn=list, worker_init_fn=leave_signals)
    bar = tqdm(pool, f"{title}: decoding", unit_scale=32, unit=" pictures", leave=False,
               disable=None if rank() == 0 else True)
    reasons = [reason for batch in bar for reason in batch]
    bad = [{row: reason for row, reason in zip(mine, reasons) if reason}]
    return {row: reason for part in everyone(bad[0]) for row, reason in part.items()}


def signature(path):
    """What changes with the file: its size and time of change, in ns."""
    try:
        return path, (status := os.stat(path)).st_size, status.st_mtime_ns
    except (OSError, ValueError):
        return path, None


def cache_pictures(paths, resolution, cache_path, num_workers, title):
    """The pictures' pixels in one memory-mapped file, decoded anew when rows or files changed.

    Returns (uint8 [N, 3, R, R], or None where cache_path is empty; {row: reason} of bad pictures).
    """
    if not cache_path:
        return None, decode_pictures(paths, resolution, "", num_workers, title)
    pixel_path = os.path.join(cache_path, f"{title}-{resolution}.u8")
    size = len(paths) * 3 * resolution**2  # bytes of pixels; then what they were made from, as JSON
    files = "\n".join(map(str, map(signature, paths)))
    key = hashlib.sha256(f"{resolution} {files}".encode("utf-8", "replace")).hexdigest()
    bad = read_bad_pictures(pixel_path, size, key)
    if None in everyone(bad):
        first = local_rank() == 0
        temporary_name = replacing(pixel_path) if first else nullcontext(f"{pixel_path}.tmp")
        os.makedirs(cache_path, exist_ok=True)
        with temporary_name as temporary:
            if first:
                reserve(temporary, size)
            everyone("the file is there")
            bad = decode_pictures(paths, resolution, temporary, num_workers, title)
            if first:
                with open(temporary, "ab") as file:
                    file.write(json.dumps({"key": key, "bad": bad}).encode())
        everyone("the file is whole")
    return map_pixels(pixel_path, len(paths), resolution), bad


def read_bad_pictures(pixel_path, size, key):
    """{row: reason} from the end of a cache file, or None where it was made from something else."""
    with suppress(OSError, ValueError), open(pixel_path, "rb") as file:
        file.seek(size)
        made_from = json.load(file)
        if made_from["key"] == key:
            return {int(row): reason for row, reason in made_from["bad"].items()}


def reserve(path, size):
    """Make a file of that many bytes, on disk space of its own where the system can do that."""
    folder = os.path.dirname(path)
    if size > (free := shutil.disk_usage(folder).free):
        raise Stop(f"CACHE_PATH: {folder} needs {size / 1e9:.1f} GB for decoded pictures and has "
                   f"{free / 1e9:.1f}. Free some, choose another folder, or \"\" for no cache")
    with open(path, "wb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):  # else a disk that fills would end in a crash
            os.posix_fallocate(file.fileno(), 0, size)


class FashionDataset(Dataset):
    """Row → (pixels uint8 [3, R, R], tokens int32 [77], the row).

    tokens: int32 [captions and class prompts, 77], each text once; caption_ids: int64 [N], the row's
    place in it; prompt_ids: int64 [N, P], those of its class's prompts; pixels: the cache, of which
    the picture of row i is cache_rows[i], or None: then a picture is decoded when asked for.
    """

    def __init__(self, split, records, settings, resolution, pixels, cache_rows, num_workers):
        self.split, self.records, self.resolution = split, records, resolution
        self.pixels, self.cache_rows = pixels, cache_rows
        self.image_folder, self.skipped_path = settings.IMAGE_PATH, skipped_path(settings)
        prompts = {label: [prompt.format(class_name(label, settings.CLASS_NAMES))
                           for prompt in settings.PROMPTS] for label in {r.class_label for r in records}}
        ids = {caption: i for i, caption in enumerate(dict.fromkeys(r.caption for r in records))}
        self.captions = list(ids)
        for prompt in sum(prompts.values(), []):
            ids.setdefault(prompt, len(ids))
        self.caption_ids = torch.tensor([ids[r.caption] for r in records])
        self.prompt_ids = torch.tensor([[ids[p] for p in prompts[r.class_label]] for r in records])
        self.titled = torch.tensor([r.titled for r in records])
        pool = DataLoader(list(ids), 1024, collate_fn=tokenize, num_workers=num_workers,
                          worker_init_fn=leave_signals)
        tokens, truncated = zip(*pool)
        self.tokens, self.truncated = torch.cat(tokens), sum(truncated)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        if self.pixels is not None:
            pixels = self.pixels[self.cache_rows[row]]
        else:
            row, pixels = self.decode(row)
        return pixels, self.tokens[self.caption_ids[row]], row

    def collate(self, items):
        """As torch collates, and also for a process that has no row of a last, small batch."""
        if items:
            return default_collate(items)
        pixels = torch.empty(0, 3, self.resolution, self.resolution, dtype=torch.uint8)
        return pixels, self.tokens[:0], torch.empty(0, dtype=torch.int64)

    def decode(self, row):
        """→ (row, its pixels); where the picture has vanished since, those of the next row."""
        for row in range(row, row + len(self)):
            record = self.records[row % len(self)]
            try:
                path = os.path.join(self.image_folder, record.image_path)
                return row % len(self), load_image(path, self.resolution)
            except Exception as error:  # as in PicturePass
                skip = {"split": self.split, "line": record.line, "reason": f"vanished: {error}"}
                with open(self.skipped_path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(skip) + "\n")
        raise OSError(f"no picture in {self.image_folder} can be read any more")

    def with_prompts(self, share, generator):
        """This dataset with a random class prompt for that share of the titles, and for no title."""
        epoch = copy.copy(self)
        prompted = (torch.rand(len(self), generator=generator) < share) | ~self.titled
        which = torch.randint(self.prompt_ids.shape[1], (len(self), 1), generator=generator)
        prompts = self.prompt_ids.gather(1, which).squeeze(1)
        epoch.caption_ids = torch.where(prompted, prompts, self.caption_ids)
        return epoch


def skipped_path(settings):
    return os.path.join(settings.OUTPUT_PATH, "skipped.jsonl")


def leave_signals(_worker):
    """Ctrl-C reaches worker processes too, but it is the main process that ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load_split(split, json_path, settings, resolution, num_workers):
    """→ (FashionDataset, [{split, line, reason}] of the rows left out). Stops where most are."""
    records, skipped = read_records(json_path, settings.PROMPTS[0], settings.CLASS_NAMES)
    paths = [os.path.join(settings.IMAGE_PATH, record.image_path) for record in records]
    pixels, bad = cache_pictures(paths, resolution, settings.CACHE_PATH, num_workers, split)
    skipped = sorted(skipped + [(records[row].line, reason) for row, reason in bad.items()])
    rows = [row for row in range(len(records)) if row not in bad]
    if len(skipped) > len(rows) or not rows:
        line, reason = skipped[0] if skipped else (1, "the file is empty")
        raise Stop(f"{json_path}: {len(skipped)} of {len(records) + len(skipped) - len(bad)} rows cannot be used. "
                   f"Line {line}: {reason}. Check IMAGE_PATH and JSON_PATH")
    dataset = FashionDataset(split, [records[row] for row in rows], settings, resolution, pixels,
                             rows, num_workers)
    say(f"{split:5} {len(rows):7,} rows used, {len(skipped):,} left out; {len(dataset.captions):,} "
        f"captions, {int((~dataset.titled).sum()):,} class prompts for missing titles, "
        f"{dataset.truncated:,} cut to 77 tokens")
    return dataset, [{"split": split, "line": line, "reason": why} for line, why in skipped]


def load_splits(settings, resolution, num_workers):
    """{split: FashionDataset} of the splits there are; lists the rows left out in skipped.jsonl."""
    if not os.path.isdir(settings.IMAGE_PATH):
        raise Stop(f"IMAGE_PATH: there is no folder {settings.IMAGE_PATH!r}")
    splits, skipped = {}, []
    for split in ("train", "val", "test"):
        json_path = settings.JSON_PATH.replace("{split}", split)
        if os.path.isfile(json_path) and (split == "train" or json_path != settings.JSON_PATH):
            splits[split], left_out = load_split(split, json_path, settings, resolution, num_workers)
            skipped += left_out
        elif split == "train":
            raise Stop(f"JSON_PATH: there is no file {json_path!r}")
        else:
            say(f"{split:5} no {json_path}: nothing is evaluated on it")
    if rank() == 0:
        write_lines(skipped_path(settings), skipped)
    return splits


# ---- Model -------------------------------------------------------------------------------------
def read_weights(path):
    """The state_dict in a TorchScript archive, as OpenAI's are, or in a file of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return torch.jit.load(path, map_location="cpu").state_dict()
        except RuntimeError:
            return torch.load(path, map_location="cpu", weights_only=True)


def load_clip(name, device):
    """CLIP in float32, in eval mode: no dropout, and the RN models' batch norm stays frozen.

    name: one of clip.available_models(), a path to a .pt, or "tiny" for a small random one.
    """
    try:
        if name == "tiny":
            model = clip.model.CLIP(64, 64, 2, 128, 16, 77, 49408, 128, 2, 2)
        elif name in clip.available_models():
            model, _ = clip.load(name, device="cpu")
        elif os.path.isfile(name):
            weights = read_weights(name)
            model = clip.model.build_model(weights).float()
            model.load_state_dict(weights)  # build_model has rounded them to half precision
        else:
            raise ValueError(f"no such file, and no name among {', '.join(clip.available_models())}")
    except Exception as error:  # a damaged file raises nearly anything
        advice = ": is the internet there?" if name in clip.available_models() else ""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise Stop(f"MODEL: cannot load {name!r}{advice} ({reason})") from None
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    model.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
    return model.float().to(device).eval()


def choose_precision(device):
    """The dtype to compute the encoders in; the weights stay float32."""
    if device.type == "cuda":  # a T4 claims bfloat16, which it only emulates
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def run_blocks(transformer, tokens, attend, read):
    """CLIP's residual attention blocks on packed tokens [T, width] → rows `read` of the result.

    attend: queries, keys and values [T, 3 · width] → [T, width]. The last block computes no row
    that is not read. QuickGELU, h · sigmoid(1.702 h), is written as silu(1.702 h) / 1.702.
    """
    for block in transformer.resblocks:
        normed = layer_norm(tokens, block.ln_1)
        mixed = attend(F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias))
        if block is transformer.resblocks[-1]:
            tokens, mixed = tokens[read], mixed[read]
        tokens = tokens + block.attn.out_proj(mixed)
        hidden = block.mlp.c_fc(layer_norm(tokens, block.ln_2))
        tokens = tokens + block.mlp.c_proj(F.silu(hidden * 1.702) / 1.702)
    return tokens


def layer_norm(tokens, norm):
    return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attention(queries_keys_values, num_sequences, heads, causal):
    """Heads of 64 over sequences of one length, [N · L, 3 · width] → [N · L, width]."""
    heads_first = queries_keys_values.view(num_sequences, -1, 3, heads, 64).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*heads_first, is_causal=causal)
    return mixed.transpose(1, 2).reshape(len(queries_keys_values), -1)


def encode_vit(visual, images):
    """As visual(images): float32 [B, 3, R, R] → [B, D], the patches embedded by one product."""
    batch, grid = len(images), images.shape[-1] // (patch := visual.conv1.kernel_size[0])
    patches = images.view(batch, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    tokens = F.linear(patches.reshape(batch, grid**2, -1), visual.conv1.weight.flatten(1))
    start = visual.class_embedding.expand(batch, 1, -1)
    tokens = layer_norm(torch.cat([start, tokens], 1) + visual.positional_embedding, visual.ln_pre)
    heads, length = visual.class_embedding.numel() // 64, tokens.shape[1]
    first = torch.arange(0, batch * length, length, device=images.device)
    def attend(queries_keys_values):
        return attention(queries_keys_values, batch, heads, causal=False)
    tokens = run_blocks(visual.transformer, tokens.flatten(0, 1), attend, first)
    return layer_norm(tokens, visual.ln_post) @ visual.proj


def encode_text(model, tokens):
    """As model.encode_text(tokens): int32 [C, 77] on the CPU → [C, D], without the padding.

    Each linear layer sees only the captions' own tokens; attention, which is causal, pads them to
    the longest caption.
    """
    lengths = tokens.argmax(1) + 1  # the end token has the highest number
    longest, device = int(lengths.max()), model.mean.device
    inside = torch.arange(longest) < lengths[:, None]  # [C, longest]
    slots = inside.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
    words = tokens[:, :longest][inside].to(device, non_blocking=True)
    end = (lengths.cumsum(0) - 1).to(device, non_blocking=True)
    def attend(packed):
        padded = packed.new_zeros(inside.numel(), packed.shape[1]).index_copy(0, slots, packed)
        return attention(padded, len(tokens), model.transformer.width // 64, causal=True)[slots]
    embedded = model.token_embedding(words) + model.positional_embedding[slots % longest]
    return layer_norm(run_blocks(model.transformer, embedded, attend, end), model.ln_final) @ model.text_projection


def encode_images(model, images, precision):
    """Images float32 [B, 3, R, R] in 0..1 → image_features float32 [B, D] of length 1."""
    images = (images - model.mean) / model.std
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        vit = isinstance(model.visual, clip.model.VisionTransformer)
        image_features = encode_vit(model.visual, images) if vit else model.visual(images)
    return F.normalize(image_features.float(), dim=-1)


def encode_captions(model, tokens, precision):
    """Tokens int32 [C, 77] on the CPU → text_features float32 [C, D] of length 1."""
    with torch.autocast(model.mean.device.type, precision, enabled=precision != torch.float32):
        text_features = encode_text(model, tokens)
    return F.normalize(text_features.float(), dim=-1)


# ---- Loss --------------------------------------------------------------------------------------
def clip_loss(image_features, text_features, logit_scale, caption_ids):
    """Symmetric contrastive loss of B pairs, a scalar (the CLIP paper, arXiv 2103.00020, figure 3).

    image_features, text_features: float32 [B, D] of length 1; logit_scale: the log of the inverse
    temperature; caption_ids: [B]. Pairs of one caption are positives of each other, in equal shares.
    """
    logits_per_image = logit_scale.exp() * image_features @ text_features.T
    same_caption = (caption_ids[:, None] == caption_ids).float()
    targets = same_caption / same_caption.sum(1, keepdim=True)
    loss_per_image = F.cross_entropy(logits_per_image, targets)
    return (loss_per_image + F.cross_entropy(logits_per_image.T, targets)) / 2


# ---- Step --------------------------------------------------------------------------------------
def make_optimizer(model, weight_decay):
    """AdamW as CLIP was trained with, decaying matrices but no norm, bias or logit_scale."""
    parameters = list(model.parameters())
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


def learning_rate(step, total_steps, warmup_steps, peak):
    """The rate of a step from 0: a linear warm-up to the peak, then a cosine, 0 at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def augment(images, draws, min_crop):
    """A random crop of at least min_crop of each side, and a flip of every other picture.

    images: float32 [B, 3, R, R]; draws: [B, 4] uniform in 0..1.
    """
    side = 1 - (1 - min_crop) * draws[:, 0]
    view = torch.zeros(len(images), 2, 3, device=images.device)
    view[:, 0, 0] = torch.where(draws[:, 3] < 0.5, side, -side)
    view[:, 1, 1] = side
    view[:, :, 2] = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(view, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def chunks(count, size):
    return [slice(start, start + size) for start in range(0, count, size)]


def encode_in_chunks(model, towers, chunk):
    """[features [count, D] of each (count, tower)]; only one chunk of all keeps its graph.

    tower: a slice of the rows → their features.
    """
    keep_graph = torch.is_grad_enabled() and all(count <= chunk for count, _ in towers)
    none = model.text_projection.new_zeros(0, model.text_projection.shape[1])
    with torch.set_grad_enabled(keep_graph):
        return [torch.cat([none, *map(tower, chunks(count, chunk))]) for count, tower in towers]


def to_device(tensor, device):
    return tensor.to(device, non_blocking=True)


def train_step(run, pixels, tokens, batch_size, total_step):
    """One optimizer step: the same for any batch, chunk, and number of processes. Returns the loss.

    The contrastive loss couples all pairs of the global batch, as in the CLIP paper. It is computed
    on features cut off from the encoders; its gradients are then pushed back chunk by chunk, each
    encoded again (GradCache, Gao et al. 2021, arXiv 2101.06983). One chunk keeps its graph instead.

    pixels: uint8 [b, 3, R, R], tokens: int32 [b, 77]: this process's share of batch_size pairs.
    The loss stays on the device: to read it would wait for the device.
    """
    model, settings, device = run.model, run.settings, run.model.mean.device
    mine = slice(rank(), None, world_size())
    generator = torch.Generator().manual_seed(settings.SEED * 1_000_003 + total_step)
    draws = to_device(torch.rand(batch_size, 4, generator=generator)[mine], device)
    same_tokens = gather_rows(tokens, batch_size).unique(dim=0, return_inverse=True)[1]
    captions, which = tokens.unique(dim=0, return_inverse=True)  # each distinct caption once
    caption_ids, which = to_device(same_tokens, device), to_device(which, device)

    def encode_pictures(rows):
        images = to_device(pixels[rows], device).float().div(255)
        images = augment(images, draws[rows], settings.MIN_CROP)
        return encode_images(model, images, run.precision)

    towers = ((len(pixels), encode_pictures),
              (len(captions), lambda rows: encode_captions(model, captions[rows], run.precision)))
    features, run.chunk = halving(lambda chunk: encode_in_chunks(model, towers, chunk), run.chunk)
    gathered = [gather_rows(features[0].detach(), batch_size),
                gather_rows(features[1].detach()[which], batch_size)]

    def backward(chunk):
        leaves = [feature.detach().requires_grad_() for feature in features]
        image_features, text_features = (everyones.clone() for everyones in gathered)
        image_features[mine], text_features[mine] = leaves[0], leaves[1][which]
        loss = clip_loss(image_features, text_features, model.logit_scale, caption_ids)
        *gradients, model_gradient = torch.autograd.grad(
            run.scaler.scale(loss), [*leaves, model.logit_scale])
        if any(chunk < count for count, _ in towers):
            features[:] = leaves  # forget the graph, if there is one
        run.optimizer.zero_grad()
        model.logit_scale.grad = model_gradient
        for (count, tower), feature, gradient in zip(towers, features, gradients):
            for rows in chunks(count, chunk):
                part = tower(rows) if feature.is_leaf else feature
                part.backward(gradient[rows])
        return loss.detach()

    loss, run.chunk = halving(backward, run.chunk)
    sum_gradients(model)
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))  # as the CLIP paper does, for stability
    return loss


def sum_gradients(model):
    """Add up every parameter's gradients over the processes; logit_scale's is whole on each."""
    if world_size() > 1:
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                if parameter.grad is None:  # this process had no row
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)


# ---- Evaluation --------------------------------------------------------------------------------
RANKS = (1, 5, 10)


def class_metrics(confusion):
    """Counts [true class, predicted class] → (accuracy, precision, recall, F1 of each class).

    A class that is never predicted has precision 0; one without rows has recall 0.
    """
    confusion = confusion.double()
    right, predicted, rows = confusion.diag(), confusion.sum(0), confusion.sum(1)
    precision, recall = right / predicted.clamp(min=1), right / rows.clamp(min=1)
    return right.sum() / rows.sum(), precision, recall, 2 * right / (predicted + rows).clamp(min=1)


def retrieval_recall(image_features, text_features, caption_ids, ranks):
    """Shares of queries with a right answer among the first k: ([image → text], [text → image]).

    image_features [N, D]; text_features [C, D] of the distinct captions; caption_ids [N]. Every
    picture of a caption is a right answer to it.
    """
    own, every = caption_ids[:, None], torch.arange(len(text_features), device=caption_ids.device)
    right_texts = [part @ text_features.T for part in image_features.split(1024)]
    right_images = [part @ image_features.T for part in text_features.split(1024)]
    def best(parts, count):
        return torch.cat([part.topk(min(max(ranks), count), 1).indices for part in parts])
    right_texts = best(right_texts, len(text_features)) == own
    right_images = caption_ids[best(right_images, len(image_features))] == every[:, None]
    return [[right[:, :k].any(1).double().mean().item() for k in ranks]
            for right in (right_texts, right_images)]


@torch.no_grad()
def encode_split(run, dataset, prompts):
    """→ image_features [N, D], text_features [C, D] of the distinct captions, those of the prompts,
    and the rows [N] whose pictures were read. The processes share the work."""
    model, device, mine = run.model, run.model.mean.device, slice(rank(), None, world_size())
    def encode(count, tower):
        (features,), run.chunk = halving(
            lambda chunk: encode_in_chunks(model, [(count, tower)], chunk), run.chunk)
        return features
    def encode_texts(tokens):
        own = tokens[mine]
        features = encode(len(own), lambda part: encode_captions(model, own[part], run.precision))
        return gather_rows(features, len(tokens))
    parts = [(rows, encode(len(rows), lambda part: encode_images(
                 model, to_device(pixels[part], device).float().div(255), run.precision)))
             for pixels, _, rows in load_batches(run, dataset, torch.arange(len(dataset))[mine].split(256))]
    rows, image_features = map(torch.cat, zip(*parts))
    return (gather_rows(image_features, len(dataset)), encode_texts(dataset.tokens[:len(dataset.captions)]),
            encode_texts(prompts), gather_rows(rows[:, None], len(dataset))[:, 0])


def evaluate(run, dataset):
    """Zero-shot classification and retrieval on a split → (metrics, confusion [K, K])."""
    start, settings, device = time.perf_counter(), run.settings, run.model.mean.device
    names = [class_name(label, settings.CLASS_NAMES) for label in run.class_labels]
    prompts, _ = tokenize([prompt.format(name) for name in names for prompt in settings.PROMPTS])
    image_features, text_features, prompt_features, rows = encode_split(run, dataset, prompts)
    class_features = prompt_features.view(len(names), len(settings.PROMPTS), -1).mean(1)
    predicted = (image_features @ F.normalize(class_features, dim=-1).T).argmax(1).cpu()
    labels = torch.tensor([run.class_labels.index(record.class_label) for record in dataset.records])
    confusion = torch.bincount(labels[rows] * len(names) + predicted, minlength=len(names) ** 2)
    confusion = confusion.view(len(names), len(names))
    caption_ids = dataset.caption_ids[rows].to(device)
    batches = epoch_batches(dataset, settings, epoch=0)[1]
    losses = [clip_loss(image_features[batch], text_features[caption_ids[batch]],
                        run.model.logit_scale, caption_ids[batch]).item() for batch in batches]
    accuracy, _, _, f1 = class_metrics(confusion)
    recalls = retrieval_recall(image_features, text_features, caption_ids, RANKS)
    metrics = {"loss": sum(loss * len(batch) for loss, batch in zip(losses, batches)) / len(rows),
               "accuracy": accuracy.item(), "macro_f1": f1[confusion.sum(1) > 0].mean().item()}
    for direction, recall in zip(("image_to_text", "text_to_image"), recalls):
        metrics |= {f"{direction}_r{k}": value for k, value in zip(RANKS, recall)}
    seconds = time.perf_counter() - start
    return metrics | {"seconds": seconds, "pairs_per_second": len(rows) / seconds}, confusion


def score(metrics):
    """What best.pt is the best in: the mean of what users do, classify and search both ways."""
    return (metrics["accuracy"] + metrics["image_to_text_r5"] + metrics["text_to_image_r5"]) / 3


# ---- Checkpoints -------------------------------------------------------------------------------
@dataclass
class Run:
    """A training run: what it needs, and (from `epoch` on) what last.pt keeps to go on exactly."""

    settings: SimpleNamespace
    model: torch.nn.Module
    precision: torch.dtype
    num_workers: int
    chunk: int  # pairs encoded at a time
    class_labels: list
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # 0 is the evaluation before training
    step: int = 0  # steps done in the epoch
    losses: list = field(default_factory=list)  # of those steps, left on the device
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    best_epoch: int = -1
    best_score: float = -1.0
    confusions: dict = field(default_factory=dict)  # on val, "before" training and of the "best"
    finished: bool = False

    def path(self, name):
        return os.path.join(self.settings.OUTPUT_PATH, name)


PROGRESS = ("epoch", "step", "losses", "history", "best_epoch", "best_score", "confusions",
            "finished")
MODULES = ("model", "optimizer", "scaler")
FREE_TO_CHANGE = ("IMAGE_PATH", "JSON_PATH", "OUTPUT_PATH", "CACHE_PATH", "CHUNK_SIZE",
                  "MAX_WORKERS", "SAMPLE_RUN")


def save_weights(path, model):
    """The state_dict as plain float32 tensors, which clip.load reads."""
    with replacing(path) as temporary:
        torch.save({name: weight.cpu() for name, weight in model.state_dict().items()}, temporary)


def save_run(run):
    """Write last.pt. The random states need no keeping: each follows from SEED, epoch and step."""
    require_finite(run)
    if rank() == 0:
        state = {name: getattr(run, name) for name in PROGRESS}
        state |= {name: getattr(run, name).state_dict() for name in MODULES}
        with replacing(run.path("last.pt")) as temporary:
            torch.save(state | {"settings": fixed_settings(run.settings)}, temporary)


def require_finite(run):
    """Stops where one of the last losses is not finite; waits for the device."""
    first = max(0, len(run.losses) - 20)
    for step, loss in enumerate(map(float, run.losses[first:]), first):
        if not math.isfinite(loss):
            raise Stop(f"the loss is {loss} in step {step + 1} of epoch {run.epoch}: try a lower LR. "
                       f"{run.settings.OUTPUT_PATH} holds the last good weights")


def fixed_settings(settings):
    """The constants that make the training what it is."""
    return {name: value for name, value in vars(settings).items() if name not in FREE_TO_CHANGE}


def resume_run(run):
    """Go on from last.pt, if there is one."""
    path = run.path("last.pt")
    if not os.path.exists(path):
        return
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old, new = state["settings"], fixed_settings(run.settings)
        changed = [name for name in new | old if old.get(name) != new.get(name)]
        if not changed:
            for name in PROGRESS:
                setattr(run, name, state[name])
            for name in MODULES:
                getattr(run, name).load_state_dict(state[name])
    except Exception as error:
        raise Stop(f"{path} is not a checkpoint that this run can go on from ({error}). Move it away "
                   "to start anew, or set another OUTPUT_PATH") from None
    if changed:
        changes = "; ".join(f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)
        raise Stop(f"{path} is from a run with other constants: {changes}. Set them back to go on "
                   "with it, or set another OUTPUT_PATH to start anew")
    say(f"Going on from {path}: epoch {run.epoch}, of which {run.step} steps are done")


class Interrupted(Exception):
    """The run was told to end. args: the signal's number."""


class Interrupts:
    """Ctrl-C and SIGTERM are noted until it is safe to end; a second Ctrl-C stops at once."""

    def __init__(self):
        self.number, self.safe = None, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        if self.safe:
            raise Interrupted(number)
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    def told(self):
        """The signal that one of the processes was sent, in each of them, or None."""
        return next(filter(None, everyone(self.number)), None)

    @contextmanager
    def at_once(self):
        """In this block nothing changes that would have to be finished first."""
        self.safe = True
        try:
            if told := self.told():
                raise Interrupted(told)
            yield
        finally:
            self.safe = False


# ---- Training ----------------------------------------------------------------------------------
def epoch_batches(dataset, settings, epoch):
    """→ (the dataset with this epoch's captions, its batches of rows), both by seed and epoch."""
    generator = torch.Generator().manual_seed(settings.SEED * 1_000_003 + epoch)
    batches = torch.randperm(len(dataset), generator=generator).split(settings.BATCH_SIZE)
    return dataset.with_prompts(settings.CLASS_PROMPT_SHARE, generator), batches


def load_batches(run, dataset, batches):
    """A DataLoader of the given rows; from the cache it needs no worker processes."""
    return DataLoader(dataset, batch_sampler=batches, collate_fn=dataset.collate,
                      num_workers=run.num_workers if dataset.pixels is None else 0,
                      pin_memory=run.model.mean.is_cuda, worker_init_fn=leave_signals)


def train_epoch(run, dataset, bar, interrupts):
    """Train from step run.step to the epoch's end, saving every 10 minutes."""
    settings, saved = run.settings, time.monotonic()
    dataset, batches = epoch_batches(dataset, settings, run.epoch)
    total_steps = settings.NUM_EPOCHS * len(batches)
    warmup_steps = max(1, round(settings.WARMUP * total_steps))
    shares = [rows[rank() :: world_size()] for rows in batches[run.step :]]
    for rows, (pixels, tokens, _) in zip(batches[run.step :], load_batches(run, dataset, shares)):
        total_step = (run.epoch - 1) * len(batches) + run.step
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(total_step, total_steps, warmup_steps, settings.LR)
        run.losses.append(train_step(run, pixels, tokens, len(rows), total_step))
        run.step += 1
        bar.update()
        if told := interrupts.told():
            raise Interrupted(told)
        if run.step % 20 == 0:
            require_finite(run)
            bar.set_postfix(loss=f"{run.losses[-1]:.3f}")
        if time.monotonic() > saved + 600:
            save_run(run)
            saved = time.monotonic()
    require_finite(run)


def train(run, splits, bar, interrupts):
    """Evaluate, then train and evaluate epoch by epoch, keeping the best weights and the last."""
    while run.epoch <= run.settings.NUM_EPOCHS:
        start, steps_before = time.perf_counter(), run.step
        if run.epoch > 0:
            train_epoch(run, splits["train"], bar, interrupts)
        trained = time.perf_counter() - start
        if "val" in splits:
            with interrupts.at_once():
                metrics, confusion = evaluate(run, splits["val"])
            if run.epoch > 0:
                pairs = (run.step - steps_before) * run.settings.BATCH_SIZE
                metrics |= {"seconds": time.perf_counter() - start, "pairs_per_second": pairs / trained,
                            "train_loss": torch.stack(run.losses).mean().item()}
            log(run, "val", run.epoch, metrics)
            run.confusions.setdefault("before", confusion)
        if "val" not in splits or score(metrics) > run.best_score:
            run.best_epoch = run.epoch
            if "val" in splits:
                run.best_score, run.confusions["best"] = score(metrics), confusion
            if rank() == 0:
                save_weights(run.path("best.pt"), run.model)
        run.epoch, run.step, run.losses = run.epoch + 1, 0, []
        save_run(run)


def log(run, split, epoch, metrics):
    """Add a line to metrics.jsonl and to the console."""
    run.history.append({"epoch": epoch, "split": split} | metrics)
    if rank() == 0:
        write_lines(run.path("metrics.jsonl"), run.history)
    if len(run.history) == 1:
        say("epoch  split     loss  accuracy  macro-F1  image→text R@1    R@5   R@10"
            "  text→image R@1    R@5   R@10  pairs/s")
    ways = [f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in RANKS]
    recalls = "{:16.3f} {:6.3f} {:6.3f} {:15.3f} {:6.3f} {:6.3f}".format(*map(metrics.get, ways))
    say(f"{epoch:5}  {split:5} {metrics['loss']:8.3f} {metrics['accuracy']:9.3f} "
        f"{metrics['macro_f1']:9.3f}{recalls} {metrics['pairs_per_second']:8.1f}")


def class_table(run):
    """Precision, recall and F1 of each class on val, before training → with the best weights."""
    before, best = (class_metrics(run.confusions[when])[1:] for when in ("before", "best"))
    width = max(map(len, run.class_labels))
    lines = [f"{'':{width}}     precision         recall             F1    (val, before → best)"]
    for row, label in enumerate(run.class_labels):
        cells = (f"{old[row]:5.2f} → {new[row]:5.2f}" for old, new in zip(before, best))
        lines.append(f"{label:{width}}  " + "  ".join(cells))
    return lines


def finish(run, splits, interrupts):
    """Evaluate the best weights on test; say how each class fares, and how to use the weights."""
    best = run.path("best.pt")
    if "test" in splits:
        run.model.load_state_dict(torch.load(best, map_location="cpu", weights_only=True))
        with interrupts.at_once():
            metrics, _ = evaluate(run, splits["test"])
        log(run, "test", run.best_epoch, metrics)
    if "val" in splits:
        say("", *class_table(run))
    run.finished = True
    save_run(run)
    say("", f"The best weights, of epoch {run.best_epoch}, are in {best}. To use them anywhere:",
        f'    model, preprocess = clip.load("{best}")')


@contextmanager
def only_run_in(folder):
    """Refuse a second run that would write to the same folder."""
    os.makedirs(folder, exist_ok=True)
    lock = FileLock(os.path.join(folder, ".lock"))
    try:
        if rank() == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise Stop(f"OUTPUT_PATH: another run is writing to {folder}. Wait for it, or set another")
    yield
    lock.release()


def prepare(settings, device):
    """Read the data, load the model → (Run as it starts or goes on, {split: FashionDataset})."""
    torch.manual_seed(settings.SEED)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    num_workers = min(-(-os.cpu_count() // processes), settings.MAX_WORKERS)
    for turn in (True, False):  # one process a machine downloads the weights
        if turn == (local_rank() == 0):
            model = load_clip(settings.MODEL, device)
        everyone("done")
    splits = load_splits(settings, model.visual.input_resolution, num_workers)
    class_labels = sorted({r.class_label for data in splits.values() for r in data.records})
    precision = choose_precision(device)
    say(f"{settings.MODEL} on {device} in {str(precision).removeprefix('torch.')}, {world_size()} "
        f"processes; {len(class_labels)} classes; output in {settings.OUTPUT_PATH}")
    run = Run(settings, model, precision, num_workers, settings.CHUNK_SIZE or settings.BATCH_SIZE,
              class_labels, make_optimizer(model, settings.WEIGHT_DECAY),
              torch.amp.GradScaler(device.type, enabled=precision == torch.float16))
    resume_run(run)
    return run, splits


def main():
    settings, device, interrupts = read_settings(), join_processes(), Interrupts()
    with only_run_in(settings.OUTPUT_PATH):
        try:
            with interrupts.at_once():
                run, splits = prepare(settings, device)
        except Interrupted as interrupted:
            sys.exit(128 + interrupted.args[0])
        if run.finished:
            say(f"This run is finished: {run.path('best.pt')} has its weights. For another one, set "
                "another OUTPUT_PATH")
            return
        steps = -(-len(splits["train"]) // settings.BATCH_SIZE)
        done = max(0, run.epoch - 1) * steps + run.step
        try:
            with tqdm(total=steps * settings.NUM_EPOCHS, initial=done, desc="training", unit=" steps",
                      disable=None if rank() == 0 else True, leave=False) as bar:
                train(run, splits, bar, interrupts)
            finish(run, splits, interrupts)
        except Interrupted as interrupted:
            save_run(run)
            say(f"Interrupted and saved in {run.path('last.pt')}: the same command goes on from there")
            sys.exit(128 + interrupted.args[0])
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            save_run(run)
            raise Stop(f"a process that decodes pictures died ({error}). What is done is saved in "
                       f"{run.path('last.pt')}: the same command goes on from there") from None


if __name__ == "__main__":
    main()

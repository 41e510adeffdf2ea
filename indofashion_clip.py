"""Fine-tune OpenAI's CLIP on your own pictures and captions: one file, made for IndoFashion.

    python indofashion_clip.py
    torchrun --nproc_per_node=4 indofashion_clip.py  # on four GPUs

Edit the constants below first, or edit nothing: without IndoFashion in data/indo-fashion it trains
a tiny CLIP from scratch on the bundled sample, drawings of the 15 classes: half a minute on two CPU
cores, after which it names the class of 9 in 10 (1 in 15 before). In: a folder of pictures and a
JSON-lines file of titles and classes a split. Out: outputs/best.pt, which clip.load reads.
"""

import copy
import ctypes
import functools
import hashlib
import html
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from itertools import zip_longest
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
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
    "MIN_CROP": 0.95,
}

class Stop(SystemExit):
    """The run cannot go on: one line saying what, where and what to do. Exits with 1."""

def one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__

# ---- Processes: one, or those that torchrun started --------------------------------------------
def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1

def local_rank():
    return int(os.environ.get("LOCAL_RANK", 0))

def local_world_size():
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

def my_share():
    """The slice of any rows that is this process's: rank, rank + world size, …"""
    return slice(rank(), None, world_size())

def join_processes():
    """Meet the other processes, where there are any → this one's device."""
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if not cuda:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    return torch.device("cuda", local_rank())

def keep_memory():
    """Have glibc keep what is freed: getting it anew was a third of a step of 256 pairs."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block

def say(*lines):
    """Print above the progress bar, from the first process only."""
    if rank() == 0:
        tqdm.write("\n".join(lines))

def progress_bar(**how):
    """A bar on the first process's terminal; none in a log file."""
    return tqdm(**how, leave=False, disable=None if rank() == 0 else True)

def everyone(value):
    """[value of each process]. All of them have to ask, and wait for each other."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values

def gather_rows(rows, count):
    """The shares of all processes, [share, D] each → the `count` rows [count, D] in order."""
    if world_size() == 1:
        return rows
    longest = -(-count // world_size())
    padded = F.pad(rows, (0, 0, 0, longest - len(rows)))
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.stack(parts, 1).flatten(0, 1)[:count]

def read_settings():
    """The constants, with SAMPLE_RUN's in place of some where the default dataset is missing."""
    settings = {name: value for name, value in globals().items() if name.isupper() and name != "F"}
    if settings["IMAGE_PATH"] == "data/indo-fashion" and not os.path.isdir("data/indo-fashion"):
        say("IndoFashion is not in data/indo-fashion. To get it, see data/README.md or",
            "www.kaggle.com/datasets/validmodel/indo-fashion-dataset. Running the bundled sample.")
        settings |= SAMPLE_RUN
    return SimpleNamespace(**settings)

# ---- Data: rows → captions and pictures --------------------------------------------------------
class Record(NamedTuple):
    line: int  # in the JSON file, from 1
    image_path: str  # relative to IMAGE_PATH
    caption: str
    class_label: str
    titled: bool  # else the caption is a class prompt

def class_prompts(class_label, settings):
    """saree → ["a photo of a saree", …], one for each of PROMPTS."""
    name = settings.CLASS_NAMES.get(class_label, " ".join(class_label.split("_")))
    return [prompt.format(name) for prompt in settings.PROMPTS]

def clean(text):
    """Plain words: entities resolved, white space collapsed, nothing that UTF-8 cannot hold."""
    text = html.unescape(text) if isinstance(text, str) else ""
    return " ".join(text.encode("utf-8", "ignore").decode("utf-8").split())

def read_rows(json_path):
    """Yields (line, object): JSON lines, or the items of one array, from 1; None if not JSON."""
    with open(json_path, encoding="utf-8-sig", errors="replace") as file:
        with suppress(ValueError, RecursionError):
            if file.read(64).lstrip().startswith("["):
                file.seek(0)
                yield from enumerate(json.load(file), 1)
                return
        file.seek(0)
        for line, text in enumerate(file, 1):
            row = None
            with suppress(ValueError, RecursionError):
                row = json.loads(text)
            if text.strip():
                yield line, row

def why_unusable(row):
    """What keeps a row from use, or "": all that can be told without its picture."""
    if not isinstance(row, dict):
        return "not a JSON object"
    path = row.get("image_path")
    if not isinstance(path, str) or not path.strip():
        return "no image_path"
    if os.path.isabs(path) or os.path.normpath(path).split(os.sep)[0] == "..":
        return f"image_path leads outside IMAGE_PATH: {path}"
    return "" if clean(row.get("class_label")) else "no class_label"

def read_records(json_path, settings):
    """The usable rows of a JSON-lines file (or of one JSON array), and the others.

    Returns ([Record], [(line, reason)]). A title that is missing or N/A becomes a class prompt.
    Raises OSError where the file cannot be read.
    """
    records, skipped = [], []
    for line, row in read_rows(json_path):
        if reason := why_unusable(row):
            skipped.append((line, reason))
            continue
        label, title = sys.intern(clean(row["class_label"])), clean(row.get("product_title"))
        titled = title.upper() not in ("", "N/A", "NA")
        caption = title if titled else class_prompts(label, settings)[0]
        records.append(Record(line, row["image_path"], caption, label, titled))
    return records, skipped

def tokenize(captions):
    """Captions → (tokens int32 [N, 77], how many captions were longer and were truncated)."""
    tokens = clip.tokenize(captions, context_length=78, truncate=True).int()
    too_long = tokens[:, 77] != 0
    tokens[too_long, 76] = tokens[too_long, 77]  # the end token, at which the text is read
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

def read_image(path, resolution):
    """As load_image, but where the picture cannot be used, the reason, a string."""
    try:
        if os.path.getsize(path) == 0:
            return f"the image is empty: {path}"
        return load_image(path, resolution)
    except FileNotFoundError:
        return f"no image: {path}"
    except Exception as error:  # damaged files make Pillow raise nearly anything
        return f"the image cannot be read ({error}): {path}"

@contextmanager
def replacing(path):
    """A temporary path to write; on success it is flushed to disk and takes the name at once."""
    temporary = f"{path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        failure = error if isinstance(error, OSError) else error.__context__  # torch.save hides it
        if not isinstance(failure, OSError):
            raise
        raise Stop(f"cannot write {path}: {failure.strerror}; what it held is untouched") from None
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)

def save(path, state):
    with replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)

def write_lines(path, rows):
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)

def map_pixels(path, shape):
    """The cache file's pixels, uint8 [N, 3, R, R]; the system reads and keeps what is touched."""
    return torch.from_file(path, shared=True, size=math.prod(shape), dtype=torch.uint8).view(shape)

def decode_batch(rows_and_paths, pixel_path, shape):
    """Decode pictures into the cache file, if there is one → {row: why it cannot be used}."""
    bad = {}
    for row, path in rows_and_paths:
        pixels = read_image(path, shape[-1])
        if isinstance(pixels, str):
            bad[row] = pixels
        elif pixel_path:
            map_pixels(pixel_path, shape)[row] = pixels
    return bad

def decode_pictures(paths, pixel_path, shape, num_workers):
    """Decode all pictures, shared out over a machine's processes → {row: reason} of the bad."""
    mine = list(enumerate(paths))[local_rank() :: local_world_size()]
    decode = functools.partial(decode_batch, pixel_path=pixel_path, shape=shape)
    pool = DataLoader(mine, 32, num_workers=num_workers, collate_fn=decode,
                      worker_init_fn=leave_signals)
    with progress_bar(desc="decoding", unit=" pictures", total=len(mine)) as bar:
        bad = {}
        for part in pool:
            bad |= part
            bar.update(pool.batch_size)
    return {row: reason for part in everyone(bad) for row, reason in part.items()}

def cache_pictures(paths, resolution, pixel_path, num_workers):
    """All pixels in one memory-mapped file, made again when the rows, files or resolution change.

    Returns (uint8 [N, 3, R, R], or None without pixel_path; {row: why its picture is unusable}).
    After the pixels the file holds, as JSON, what they were made from and the bad pictures.
    """
    shape = (len(paths), 3, resolution, resolution)
    if not pixel_path:
        return None, decode_pictures(paths, "", shape, num_workers)
    made_from, bad = hashlib.sha256(str(shape).encode()), None
    for path in paths:
        made_from.update(repr(path).encode("utf-8", "replace"))
        with suppress(OSError, ValueError):
            status = os.stat(path)
            made_from.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    os.makedirs(os.path.dirname(pixel_path), exist_ok=True)
    first = local_rank() == 0
    with FileLock(f"{pixel_path}.lock") if first else nullcontext():  # another run may be making it
        everyone("the file is ours")
        with suppress(OSError, ValueError), open(pixel_path, "rb") as file:
            file.seek(math.prod(shape))
            key, reasons = json.load(file)
            bad = dict(reasons) if key == made_from.hexdigest() else None
        if None in everyone(bad):
            with replacing(pixel_path) if first else nullcontext(f"{pixel_path}.tmp") as temporary:
                if first:
                    reserve(temporary, math.prod(shape))
                everyone("the file is there")
                bad = decode_pictures(paths, temporary, shape, num_workers)
                if first:
                    with open(temporary, "ab") as file:
                        file.write(json.dumps([made_from.hexdigest(), list(bad.items())]).encode())
            everyone("the file is whole")
    return map_pixels(pixel_path, shape), bad

def reserve(path, size):
    """Make a file of that many bytes, on disk space of its own where the system can do that."""
    folder = os.path.dirname(path)
    if size > (free := shutil.disk_usage(folder).free):
        raise Stop(f"CACHE_PATH: {folder} needs {size / 1e9:.1f} GB for decoded pictures and has "
                   f"{free / 1e9:.1f}. Free some, choose another folder, or \"\" for no cache")
    with open(path, "wb") as file:
        file.truncate(size)
        if size and hasattr(os, "posix_fallocate"):  # a disk that fills up later would be a crash
            os.posix_fallocate(file.fileno(), 0, size)

class FashionDataset(Dataset):
    """Row → (pixels uint8 [3, R, R], tokens int32 [77], the row).

    tokens: int32 [captions, then class prompts, 77], each text once; caption_ids: int64 [N], the
    row's place in it; prompt_ids: int64 [N, P], those of its class's prompts. pixels: the cache, in
    which row i is cache_rows[i], or None: then a picture is decoded when it is asked for.
    """

    def __init__(self, split, records, settings, resolution, pixels, cache_rows, num_workers):
        self.split, self.records, self.settings = split, records, settings
        self.resolution, self.pixels, self.cache_rows = resolution, pixels, cache_rows
        self.captions = list(dict.fromkeys(record.caption for record in records))
        prompts = {r.class_label: class_prompts(r.class_label, settings) for r in records}
        texts = list(dict.fromkeys(self.captions + sum(prompts.values(), [])))
        ids = {text: i for i, text in enumerate(texts)}
        self.caption_ids = torch.tensor([ids[record.caption] for record in records])
        self.prompt_ids = torch.tensor([[ids[p] for p in prompts[r.class_label]] for r in records])
        self.titled = torch.tensor([record.titled for record in records])
        workers = num_workers if len(texts) > 10_000 else 0  # fewer are done before a worker starts
        tokens, truncated = zip(*DataLoader(texts, 1024, collate_fn=tokenize, num_workers=workers))
        self.tokens, self.truncated = torch.cat(tokens), sum(truncated)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, row):
        if self.pixels is not None:
            pixels = self.pixels[self.cache_rows[row]]
        else:
            path = os.path.join(self.settings.IMAGE_PATH, self.records[row].image_path)
            pixels = read_image(path, self.resolution)
        if isinstance(pixels, str):  # it has vanished since the start: the next row stands for it
            skip = {"split": self.split, "line": self.records[row].line, "reason": pixels}
            with open(os.path.join(self.settings.OUTPUT_PATH, "skipped.jsonl"), "a") as file:
                file.write(json.dumps(skip) + "\n")
            return self[(row + 1) % len(self)]
        return pixels, self.tokens[self.caption_ids[row]], row

    def with_prompts(self, share, generator):
        """This dataset with class prompts for that share of the titles, and where there is none."""
        epoch = copy.copy(self)
        prompted = (torch.rand(len(self), generator=generator) < share) | ~self.titled
        which = torch.randint(self.prompt_ids.shape[1], (len(self), 1), generator=generator)
        prompts = self.prompt_ids.gather(1, which).squeeze(1)
        epoch.caption_ids = torch.where(prompted, prompts, self.caption_ids)
        return epoch

def load_split(split, json_path, settings, resolution, num_workers):
    """→ (FashionDataset, [{split, line, reason}] of the rows left out). Stops where most are."""
    records, skipped = read_records(json_path, settings)
    paths = [os.path.join(settings.IMAGE_PATH, record.image_path) for record in records]
    file = settings.CACHE_PATH and os.path.join(settings.CACHE_PATH, f"{split}-{resolution}.u8")
    pixels, bad = cache_pictures(paths, resolution, file, num_workers) if paths else (None, {})
    skipped = sorted(skipped + [(records[row].line, reason) for row, reason in bad.items()])
    rows = [row for row in range(len(records)) if row not in bad]
    if len(skipped) > len(rows) or not rows:
        line, reason = skipped[0] if skipped else (1, "the file is empty")
        raise Stop(f"{json_path}: {len(skipped)} of {len(rows) + len(skipped)} rows are unusable. "
                   f"Line {line}: {reason}. Check IMAGE_PATH and JSON_PATH")
    records = [records[row] for row in rows]
    dataset = FashionDataset(split, records, settings, resolution, pixels, rows, num_workers)
    why = " (skipped.jsonl says why)" if skipped else ""
    say(f"{split:5} {len(rows):7,} rows used, {len(skipped):,} left out{why}; "
        f"{len(dataset.captions):,} captions, {int((~dataset.titled).sum()):,} class prompts for "
        f"missing titles, {dataset.truncated:,} cut to 77 tokens")
    return dataset, [{"split": split, "line": line, "reason": reason} for line, reason in skipped]

def load_splits(settings, resolution, num_workers):
    """{split: FashionDataset} of the splits there are; lists the rows left out in skipped.jsonl."""
    splits, skipped = {}, []
    for split in ("train", "val", "test"):
        json_path = settings.JSON_PATH.replace("{split}", split)
        if os.path.isfile(json_path) and (split == "train" or json_path != settings.JSON_PATH):
            splits[split], bad = load_split(split, json_path, settings, resolution, num_workers)
            skipped += bad
        else:
            say(f"{split:5} no file {json_path}: nothing is evaluated on it")
    if rank() == 0:
        write_lines(os.path.join(settings.OUTPUT_PATH, "skipped.jsonl"), skipped)
    return splits

# ---- Model -------------------------------------------------------------------------------------
def read_weights(path):
    """The state_dict in a TorchScript archive, as OpenAI's are, or in a file of one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.load is deprecated, yet OpenAI's files need it
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
            raise ValueError(f"no such file, and not among {', '.join(clip.available_models())}")
    except Exception as error:  # a damaged file raises nearly anything
        advice = ": is the internet there?" if name in clip.available_models() else ""
        raise Stop(f"MODEL: cannot load {name!r}{advice} ({one_line(error)})") from None
    return add_normalisation(model.float()).to(device).eval()

def add_normalisation(model):
    """The mean and deviation of CLIP's pixels, on the model's device but not in its state_dict."""
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    model.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
    model.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
    return model

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
    that is not read. QuickGELU, h · sigmoid(1.702 h), is silu(1.702 h) / 1.702, and the factors are
    put into the weights, which are smaller than what they are multiplied with.
    """
    for block in transformer.resblocks:
        normed = layer_norm(tokens, block.ln_1)
        mixed = attend(F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias))
        if block is transformer.resblocks[-1]:
            tokens, mixed = tokens[read], mixed[read]
        tokens = tokens + block.attn.out_proj(mixed)
        widen, narrow = block.mlp.c_fc, block.mlp.c_proj
        normed = layer_norm(tokens, block.ln_2)
        hidden = F.silu(F.linear(normed, widen.weight * 1.702, widen.bias * 1.702))
        tokens = tokens + F.linear(hidden, narrow.weight / 1.702, narrow.bias)
    return tokens

def layer_norm(tokens, norm):
    return F.layer_norm(tokens, norm.normalized_shape, norm.weight, norm.bias, norm.eps)

def attention(queries_keys_values, num_sequences, heads, causal):
    """Heads of 64 over sequences of one length, [N · L, 3 · width] → [N · L, width]."""
    split = queries_keys_values.view(num_sequences, -1, 3, heads, 64).permute(2, 0, 3, 1, 4)
    if split.is_cuda:
        mixed = F.scaled_dot_product_attention(*split, is_causal=causal)
    else:  # plain products: a sixth off the whole step in bfloat16, where the fused ones are slow
        queries, keys, values = split.flatten(1, 2).contiguous()  # [N · heads, L, 64] each
        scores = (queries / 8) @ keys.transpose(1, 2)
        if causal:
            scores = scores + torch.full_like(scores[0], -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ values).view(num_sequences, heads, -1, 64)
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
    places = F.embedding(slots % longest, model.positional_embedding)  # indexing adds up gradients
    embedded = model.token_embedding(words) + places  # in any order, which is not reproducible
    read = run_blocks(model.transformer, embedded, attend, end)
    return layer_norm(read, model.ln_final) @ model.text_projection

def to_images(pixels, device):
    """uint8 → float32 in 0..1, on the device."""
    return pixels.to(device, non_blocking=True).float().div(255)

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
    temperature; caption_ids: [B]. Pairs of one caption are positives of each other, equally.
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

    images: float32 [B, 3, R, R]; draws: [B, 4], uniform in 0..1.
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

def halving(work, run):
    """work(run.chunk), and again with half the chunk while the device has too little memory."""
    while True:
        try:
            return work(run.chunk)
        except torch.OutOfMemoryError:
            if run.chunk == 1:
                raise Stop("out of memory even one pair at a time: this MODEL or BATCH_SIZE is too "
                           "large for the device") from None
        torch.cuda.empty_cache()  # not inside except, where the error still holds the tensors
        run.chunk = -(-run.chunk // 2)
        tqdm.write(f"Out of memory: the same again, {run.chunk} pairs at a time.")

def encode_in_chunks(run, towers):
    """[features [count, D] of each (count, tower)], with a graph only where one chunk is enough.

    tower: a slice of the count rows → their features. The features do not depend on the chunk.
    """
    none = run.model.text_projection.new_zeros(0, run.model.text_projection.shape[1])
    def encode(chunk):
        keep_graph = torch.is_grad_enabled() and all(count <= chunk for count, _ in towers)
        with torch.set_grad_enabled(keep_graph):
            return [torch.cat([none, *map(tower, chunks(count, chunk))]) for count, tower in towers]
    return halving(encode, run)

def train_step(run, pixels, tokens, batch_size, total_step):
    """One optimizer step: the same for any batch, chunk, and number of processes. Returns the loss.

    The loss couples all pairs of the global batch, as in the CLIP paper. It is computed on features
    cut off from the encoders; their gradients are then pushed back through the chunks, each encoded
    again (GradCache, Gao et al. 2021, arXiv 2101.06983). A single chunk has kept its graph instead.

    pixels: uint8 [b, 3, R, R], tokens: int32 [b, 77]: this process's share of batch_size pairs. The
    loss is a tensor: to read it is to wait for the device.
    """
    model, device, mine = run.model, run.model.mean.device, my_share()
    generator = torch.Generator().manual_seed(run.settings.SEED * 1_000_003 + total_step)
    draws = torch.rand(batch_size, 4, generator=generator)[mine].to(device, non_blocking=True)
    _, caption_ids = gather_rows(tokens, batch_size).unique(dim=0, return_inverse=True)
    captions, which = tokens.unique(dim=0, return_inverse=True)  # each distinct caption once
    caption_ids, which = (ids.to(device, non_blocking=True) for ids in (caption_ids, which))
    def encode_pictures(rows):
        images = augment(to_images(pixels[rows], device), draws[rows], run.settings.MIN_CROP)
        return encode_images(model, images, run.precision)
    towers = [(len(pixels), encode_pictures),
              (len(captions), lambda rows: encode_captions(model, captions[rows], run.precision))]
    features = encode_in_chunks(run, towers)
    images, texts = (gather_rows(f.detach(), batch_size) for f in (features[0], features[1][which]))
    def backward(chunk):
        graphs, features[:] = list(features), [f.detach() for f in features]  # a retry has none
        leaves = [f.clone().requires_grad_() for f in features]
        image_features, text_features = images.clone(), texts.clone()  # the others' are constants
        image_features[mine], text_features[mine] = leaves[0], F.embedding(which, leaves[1])
        loss = clip_loss(image_features, text_features, model.logit_scale, caption_ids)
        gradients = torch.autograd.grad(run.scaler.scale(loss), [*leaves, model.logit_scale])
        run.optimizer.zero_grad()
        model.logit_scale.grad = gradients[2]
        for (count, tower), graph, gradient in zip(towers, graphs, gradients):
            for rows in chunks(count, chunk):
                (graph if graph.grad_fn else tower(rows)).backward(gradient[rows])
        return loss.detach()
    loss = halving(backward, run)
    update_weights(run)
    return loss

def update_weights(run):
    """Sum the gradients over the processes (logit_scale's is whole on each), clip, and step."""
    for name, parameter in run.model.named_parameters() if world_size() > 1 else ():
        if name != "logit_scale":
            if parameter.grad is None:  # this process had no row
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.settings.MAX_GRAD_NORM)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    with torch.no_grad():
        run.model.logit_scale.clamp_(max=math.log(100))  # as the CLIP paper does, for stability

# ---- Evaluation --------------------------------------------------------------------------------
def class_metrics(confusion):
    """Counts [true class, predicted class] → (accuracy, precision, recall, F1 of each class).

    A class that is never predicted has precision 0; one without rows has recall 0.
    """
    confusion = confusion.double()
    right, predicted, rows = confusion.diag(), confusion.sum(0), confusion.sum(1)
    precision, recall = right / predicted.clamp(min=1), right / rows.clamp(min=1)
    return right.sum() / rows.sum(), precision, recall, 2 * right / (predicted + rows).clamp(min=1)

def retrieval_recall(image_features, text_features, caption_ids, ranks=(1, 5, 10)):
    """{"image_to_text_r1": the share of pictures whose caption is the first found, …}.

    image_features [N, D]; text_features [C, D] of the distinct captions; caption_ids [N]. Every
    picture of a caption is a right answer to it.
    """
    def nearest(queries, answers):
        count = min(max(ranks), len(answers))
        return torch.cat([(part @ answers.T).topk(count).indices for part in queries.split(1024)])
    texts, images = nearest(image_features, text_features), nearest(text_features, image_features)
    captions = torch.arange(len(text_features), device=caption_ids.device)
    hits = {"image_to_text": texts == caption_ids[:, None],
            "text_to_image": caption_ids[images] == captions[:, None]}
    return {f"{way}_r{k}": right[:, :k].any(1).double().mean().item()
            for way, right in hits.items() for k in ranks}

@torch.no_grad()
def encode_split(run, dataset, texts):
    """→ (image_features [N, D], text_features [T, D], the rows [N] whose pictures were read).

    texts: tokens [T, 77]. The processes share the work.
    """
    model, device, own = run.model, run.model.mean.device, texts[my_share()]
    every_row, features, rows_read = torch.arange(len(dataset)), [], []
    share = every_row[my_share()]
    loader = load_batches(run, dataset, (share if len(share) else every_row[:1]).split(256))
    for pixels, _, rows in loader:
        def encode_pictures(part):
            return encode_images(model, to_images(pixels[part], device), run.precision)
        features += encode_in_chunks(run, [(len(rows), encode_pictures)])
        rows_read.append(rows)
    image_features, rows = (torch.cat(parts)[: len(share)] for parts in (features, rows_read))
    text_features, = encode_in_chunks(
        run, [(len(own), lambda part: encode_captions(model, own[part], run.precision))])
    return (gather_rows(image_features, len(dataset)), gather_rows(text_features, len(texts)),
            gather_rows(rows[:, None], len(dataset))[:, 0])

def rows_to_search(dataset, seed, count=8):
    """Rows of different captions, of all classes in turns, those that have a title first."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    by_class, distinct = {}, {}
    for row in sorted(order, key=lambda row: not dataset.records[row].titled):
        by_class.setdefault(dataset.records[row].class_label, []).append(row)
    for turn in zip_longest(*by_class.values()):
        for row in turn:
            if row is not None:
                distinct.setdefault(dataset.records[row].caption, row)
    return list(distinct.values())[:count]

def evaluate(run, dataset):
    """Zero-shot classification and retrieval on a split → (metrics, view), the latter for pictures:

    "confusion" [K, K]: rows by true and predicted class; "searched" [S]: rows whose captions were
    searched for, and "found" [S, 5]: the rows of the nearest pictures.
    """
    start, settings, labels = time.perf_counter(), run.settings, run.class_labels
    prompts, _ = tokenize([prompt for label in labels for prompt in class_prompts(label, settings)])
    captions = dataset.tokens[: len(dataset.captions)]
    run.interrupts.at_once = world_size() == 1  # nothing changes here; several would wait for one
    image_features, texts, rows = encode_split(run, dataset, torch.cat([captions, prompts]))
    run.interrupts.at_once = False
    text_features, class_features = texts.split([len(captions), len(prompts)])
    class_features = class_features.view(len(labels), len(settings.PROMPTS), -1).mean(1)
    predicted = (image_features @ F.normalize(class_features, dim=-1).T).argmax(1).cpu()
    truth = torch.tensor([labels.index(record.class_label) for record in dataset.records])[rows]
    confusion = torch.bincount(truth * len(labels) + predicted, minlength=len(labels) ** 2)
    confusion = confusion.view(len(labels), len(labels))
    caption_ids, loss = dataset.caption_ids[rows].to(image_features.device), 0.0
    for batch in epoch_batches(dataset, settings, epoch=0)[1]:  # shuffled, unlike the file
        ids, scale = caption_ids[batch], run.model.logit_scale
        batch_loss = clip_loss(image_features[batch], text_features[ids], scale, ids).item()
        loss += batch_loss * len(batch) / len(rows)
    accuracy, _, _, f1 = class_metrics(confusion)
    macro_f1 = f1[confusion.sum(1) > 0].mean()
    metrics = {"loss": loss, "accuracy": accuracy.item(), "macro_f1": macro_f1.item()}
    metrics |= retrieval_recall(image_features, text_features, caption_ids)
    seconds = time.perf_counter() - start
    searched = torch.tensor(rows_to_search(dataset, settings.SEED))
    queries = text_features[dataset.caption_ids[searched]]
    found = rows[(queries @ image_features.T).topk(min(5, len(rows))).indices.cpu()]
    return (metrics | {"seconds": seconds, "pairs_per_second": len(rows) / seconds},
            {"confusion": confusion, "searched": searched, "found": found})

def score(metrics):
    """What best.pt is best in: the mean of what people do, classify and search both ways."""
    return (metrics["accuracy"] + metrics["image_to_text_r5"] + metrics["text_to_image_r5"]) / 3

# ---- Pictures ----------------------------------------------------------------------------------
def drawable(text, width, otherwise):
    """The text with … for what the font lacks, in two lines at most; the other if it lacks all."""
    font = get_font(findfont("DejaVu Sans"))
    known = "".join(c if font.get_char_index(ord(c)) else "…" for c in text)
    text = re.sub(r"…[…\s]*", "… ", known) if any(map(str.isalnum, known)) else otherwise
    return "\n".join(textwrap.wrap(text, width, max_lines=2, placeholder=" …"))

def save_figure(run, name, figure):
    with replacing(os.path.join(run.settings.OUTPUT_PATH, name)) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight", pad_inches=0.15)

def draw_curves(run):
    """curves.png: the epochs' lines of metrics.jsonl, and the learning rate."""
    epochs = [line for line in run.history if line["split"] != "test" and "share" not in line]
    panels = {"loss": {"train": "train_loss", "val": "loss"},
              "classes, val": {"accuracy": "accuracy", "macro-F1": "macro_f1"},
              "retrieval, val": {f"{way.replace('_to_', ' → ')} R@{k}": f"{way}_r{k}"
                                 for way in ("text_to_image", "image_to_text") for k in (1, 5)}}
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, rate, *shares = figure.subplots(2, 2).flat
    for panel, (title, lines) in zip([loss, *shares], panels.items()):
        for name, key in lines.items():
            points = [(line["epoch"], line[key]) for line in epochs if key in line]
            if points:
                panel.plot(*zip(*points), marker=".", label=name)
        panel.set_visible(bool(panel.lines))  # without val only the first
        panel.axvline(run.best_epoch, color="grey", linestyle=":", label="best epoch")
        panel.set_title(title)
        panel.legend()
    for panel in shares:
        panel.set_ylim(-0.03, 1.03)
    steps = range(run.schedule[0])
    rate.plot([step / run.steps for step in steps],
              [learning_rate(step, *run.schedule) for step in steps])
    rate.set_title("learning rate")
    for panel in figure.axes:
        panel.grid(alpha=0.3)
        panel.locator_params("x", integer=True)
    figure.supxlabel("epoch (0 is before training)", fontsize=10)
    save_figure(run, "curves.png", figure)

def draw_confusion(run):
    """confusion.png: of each class, the percentages taken for each class, before and after."""
    names = [drawable(name, 30, f"class {i}") for i, name in enumerate(run.class_labels, 1)]
    side = max(2.5, 0.32 * len(names))  # inches
    margin = 0.8 + 0.08 * max(len(line) for name in names for line in name.split("\n"))
    figure = Figure(figsize=(2 * side + margin, side + margin + 0.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, when, title in zip(panels, ("before", "best"), ("before training", "after")):
        confusion = run.views[when]["confusion"]
        shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
        panel.imshow(shares.numpy(), cmap="Greens", vmin=0, vmax=1)
        for true, predicted in shares.ge(0.005).nonzero().tolist():
            share = shares[true, predicted].item()
            panel.text(predicted, true, f"{100 * share:.0f}", ha="center", va="center", fontsize=8,
                       color="white" if share > 0.5 else "black")
        panel.set_title(f"{title}: {class_metrics(confusion)[0]:.0%} right")
        panel.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), names, parse_math=False)
        panel.set_xlabel("predicted")
    panels[0].set_ylabel("class, and the % of its pictures")
    save_figure(run, "confusion.png", figure)

def picture_strip(dataset, rows, query):
    """The rows' pictures side by side, uint8 [H, W, 3], framed where they answer the record."""
    strip, edge = [], max(2, dataset.resolution // 16)
    for row in rows:
        record, pixels = dataset.records[row], dataset[row][0]
        color = ((20, 130, 50) if record.caption == query.caption else  # the very one
                 (165, 220, 170) if record.class_label == query.class_label else (255, 255, 255))
        frame = torch.tensor(color, dtype=torch.uint8).view(3, 1, 1)
        frame = frame.repeat(1, *(side + 2 * edge for side in pixels.shape[1:]))
        frame[:, edge:-edge, edge:-edge] = pixels
        strip.append(F.pad(frame, (0, edge), value=255))
    return torch.cat(strip, 2).permute(1, 2, 0).numpy()

def draw_retrieval(run, val):
    """retrieval.png: the pictures found for a few captions, before training and after."""
    searched = run.views["best"]["searched"].tolist()
    columns = min(2, len(searched))
    rows = -(-len(searched) // columns)
    figure = Figure(figsize=(6.6 * columns, 2.8 * rows + 0.4), layout="constrained")
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.set_frame_on(False)
        panel.set(xticks=[], yticks=[])
    for i, query in enumerate(val.records[row] for row in searched):
        pair = axes[2 * (i // columns) :, i % columns]
        for panel, when, label in zip(pair, ("before", "best"), ("before", "after")):
            panel.imshow(picture_strip(val, run.views[when]["found"][i].tolist(), query))
            panel.set_ylabel(label)
        class_prompt = drawable(class_prompts(query.class_label, run.settings)[0], 70, "a title")
        title = drawable(query.caption, 70, otherwise=class_prompt)
        pair[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    figure.supxlabel("dark frame: the caption's own picture; light: another of its class",
                     fontsize=10)
    save_figure(run, "retrieval.png", figure)

# ---- Checkpoints -------------------------------------------------------------------------------
def new_progress():
    """What a run keeps in last.pt beside its weights. The random draws follow from the numbers."""
    return {"epoch": 0,  # 0 is the evaluation before training
            "step": 0,  # steps done in the epoch
            "losses": [],  # of those steps; the last are tensors, still on the device
            "history": [],  # the lines of metrics.jsonl
            "best_epoch": None, "best_score": -1.0,
            "views": {},  # of val, "before" training and with the "best" weights
            "best_share": None,  # of best.pt that is not the start's weights, once that is decided
            "finished": False}

def shaping(run):
    """What makes the training what it is: the rows, and all constants but the machine's."""
    free = ("IMAGE_PATH", "JSON_PATH", "OUTPUT_PATH", "CACHE_PATH", "CHUNK_SIZE", "MAX_WORKERS",
            "SAMPLE_RUN")
    settings = {name: value for name, value in vars(run.settings).items() if name not in free}
    return settings | {"the train rows": run.train_rows}

def save_run(run):
    """Write last.pt, from which the run goes on exactly. Not where the loss was not finite."""
    require_finite(run)
    if rank() == 0:
        state = {name: getattr(run, name) for name in new_progress()}
        for name in ("model", "optimizer", "scaler"):
            state[name] = getattr(run, name).state_dict()
        save(run.last, state | {"settings": shaping(run)})

def save_best(run):
    """Write best.pt: plain float32 tensors, which clip.load and other tools read."""
    if rank() == 0:
        save(run.best, {name: tensor.cpu() for name, tensor in run.model.state_dict().items()})

def resume_run(run):
    """Go on from last.pt, if there is one of the same training."""
    if not os.path.exists(run.last):
        return
    try:
        state = torch.load(run.last, map_location="cpu", weights_only=True)
        old, new = state.pop("settings"), shaping(run)
        changed = [name for name in new | old if old.get(name) != new.get(name)]
        for name in () if changed else state:
            if name in new_progress():
                setattr(run, name, state[name])
            else:
                getattr(run, name).load_state_dict(state[name])
    except Exception as error:
        raise Stop(f"{run.last} is no checkpoint of this script ({one_line(error)}). Move it away "
                   "to start anew, or set another OUTPUT_PATH") from None
    if changed:
        changes = (f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in changed)
        raise Stop(f"{run.last} is from a run with other constants: {'; '.join(changes)}. Set them "
                   "back to go on with it, or set another OUTPUT_PATH to start anew")
    say(f"Going on from {run.last}: epoch {run.epoch}, of which {run.step} steps are done.")

def require_finite(run):
    """Read the last losses, which waits for the device, and stop where one is not finite."""
    first = max(0, len(run.losses) - 20)
    run.losses[first:] = map(float, run.losses[first:])
    for step, loss in enumerate(run.losses[first:], first + 1):
        if not math.isfinite(loss):
            raise Stop(f"the loss is {loss} in step {step} of epoch {run.epoch}: try a lower LR. "
                       f"{run.settings.OUTPUT_PATH} holds the last good weights")

class Interrupted(Exception):
    """The run has been told to end. Its argument is the signal's number."""

class Interrupts:
    """Ctrl-C and SIGTERM: at once where nothing is half done, else noted for check()."""

    def __init__(self):
        self.number, self.at_once = None, True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, number, _frame):
        if self.at_once:
            raise Interrupted(number)
        if number == self.number == signal.SIGINT:  # a second Ctrl-C does not wait
            os._exit(128 + number)
        self.number = self.number or number

    def check(self):
        """Raises Interrupted in every process once one of them has been told."""
        for number in filter(None, everyone(self.number)):
            raise Interrupted(number)

def leave_signals(_worker):
    """Ctrl-C reaches worker processes too, but it is for the main process to end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

# ---- Training ----------------------------------------------------------------------------------
def epoch_batches(dataset, settings, epoch):
    """→ (the dataset with this epoch's captions, its batches of rows), both by seed and epoch."""
    generator = torch.Generator().manual_seed(settings.SEED * 1_000_003 + epoch)
    batches = torch.randperm(len(dataset), generator=generator).split(settings.BATCH_SIZE)
    return dataset.with_prompts(settings.CLASS_PROMPT_SHARE, generator), batches

def load_batches(run, dataset, batches):
    """A DataLoader of these batches of rows; from the cache it needs no worker processes."""
    return DataLoader(dataset, batch_sampler=batches, pin_memory=run.model.mean.is_cuda,
                      num_workers=run.num_workers if dataset.pixels is None else 0,
                      worker_init_fn=leave_signals)

def train_epoch(run, dataset, bar):
    """Train from step run.step to the epoch's end, saving every 10 minutes → metrics of it."""
    settings, first, pairs, saved = run.settings, run.step, 0, time.monotonic()
    start = after_first = time.perf_counter()
    dataset, batches = epoch_batches(dataset, settings, run.epoch)
    batches = batches[first:]
    shares = [rows[my_share()] if len(rows) > rank() else rows[:1] for rows in batches]
    for rows, (pixels, tokens, _) in zip(batches, load_batches(run, dataset, shares)):
        total_step = (run.epoch - 1) * run.steps + run.step
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(total_step, *run.schedule)
        own = len(rows[my_share()])  # 0 where a last batch has fewer rows than there are processes
        run.losses.append(train_step(run, pixels[:own], tokens[:own], len(rows), total_step))
        run.step, pairs = run.step + 1, pairs + len(rows)
        bar.update()
        run.interrupts.check()
        if run.step == first + 1:  # which takes longer than the others
            after_first = time.perf_counter()
        if (run.step - first) % 20 == 5:
            require_finite(run)
            show_pace(run, bar, (time.perf_counter() - after_first) / (run.step - first - 1))
        if time.monotonic() > saved + 600:
            save_run(run)
            saved = time.monotonic()
    require_finite(run)
    return {"train_loss": sum(run.losses) / len(run.losses),
            "pairs_per_second": pairs / (time.perf_counter() - start)}

def show_pace(run, bar, seconds_per_step):
    """Loss, pairs/s and the time left for the whole run, in the bar, and once as a line."""
    epochs_left = run.settings.NUM_EPOCHS - run.epoch + 1
    steps_left = epochs_left * run.steps - run.step
    left = seconds_per_step * steps_left + run.evaluation_seconds * epochs_left
    pace = f"{run.settings.BATCH_SIZE / seconds_per_step:.1f} pairs/s, {tqdm.format_interval(left)}"
    bar.set_postfix_str(f"loss {run.losses[-1]:.3f}, {pace} left")
    if not run.pace_said:
        say(f"       {pace} to go")
    run.pace_said = True

def train(run, splits, bar):
    """Evaluate, then train and evaluate epoch by epoch, keeping the best weights and the last."""
    say("", "epoch  split     loss  accuracy  macro-F1   image→text R@1, 5, 10   "
        "text→image R@1, 5, 10   pairs/s")
    while run.epoch <= run.settings.NUM_EPOCHS:
        start, trained, metrics, view = time.perf_counter(), {}, {}, None
        if run.epoch > 0:
            trained = train_epoch(run, splits["train"], bar)
        if "val" in splits:
            metrics, view = evaluate(run, splits["val"])
            run.evaluation_seconds = metrics["seconds"]
            run.views.setdefault("before", view)
        if trained:
            metrics |= trained | {"seconds": time.perf_counter() - start}
        if metrics:
            log(run, "val" if view else "train", run.epoch, metrics)
        if not view or score(metrics) > run.best_score:
            run.best_epoch, run.best_score = run.epoch, score(metrics) if view else -1.0
            run.views["best"] = view
            save_best(run)
        run.epoch, run.step, run.losses = run.epoch + 1, 0, []
        save_run(run)

def log(run, split, epoch, metrics):
    """Add a line to metrics.jsonl and to the console."""
    run.history.append({"epoch": epoch, "split": split} | metrics)
    if rank() == 0:
        write_lines(os.path.join(run.settings.OUTPUT_PATH, "metrics.jsonl"), run.history)
    if split == "train":
        say(f"{epoch:5}  train {metrics['train_loss']:8.3f} {metrics['pairs_per_second']:77.1f}")
        return
    say(f"{epoch:5}  {split:5} {metrics['loss']:8.3f} {metrics['accuracy']:9.3f} "
        f"{metrics['macro_f1']:9.3f}   " + "  ".join(
            " ".join(f"{metrics[f'{way}_r{k}']:.3f}" for k in (1, 5, 10)).rjust(22)
            for way in ("image_to_text", "text_to_image")) + f" {metrics['pairs_per_second']:9.1f}")

def mix_with_start(run, val):
    """Leave the best mixture of the start's weights and best.pt's in the model, by score on val.

    Fine-tuning forgets; a weighted mean of both forgets less and is often better at the new task
    too (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903).
    """
    best = torch.load(run.best, map_location="cpu", weights_only=True)
    worth_it = val and run.best_epoch > 0 and run.settings.MODEL != "tiny"  # which starts at random
    start = load_clip(run.settings.MODEL, "cpu").state_dict() if worth_it else best
    def mix(share):
        run.model.load_state_dict({n: (1 - share) * start[n] + share * best[n] for n in best})
    trials = []
    for share in (0.25, 0.5, 0.75) if worth_it else ():
        mix(share)
        trials.append((share, *evaluate(run, val)))
    run.best_share = 1.0  # only now: an interrupted mixing is done again
    if trials:
        say(f"The start's weights with 0.25, 0.5 and 0.75 of epoch {run.best_epoch}'s:")
    for share, metrics, view in trials:
        log(run, "val", run.best_epoch, metrics | {"share": share})
        if score(metrics) > run.best_score:
            run.best_score, run.best_share, run.views["best"] = score(metrics), share, view
    mix(run.best_share)

def class_table(run):
    """Precision, recall and F1 of each class on val, before training → with the best weights."""
    before, best = (class_metrics(run.views[when]["confusion"])[1:] for when in ("before", "best"))
    width = max(map(len, run.class_labels))
    lines = [f"{'':{width}}     precision         recall             F1    (val, before → best)"]
    for row, label in enumerate(run.class_labels):
        cells = (f"{old[row]:5.2f} → {new[row]:5.2f}" for old, new in zip(before, best))
        lines.append(f"{label:{width}}  " + "  ".join(cells))
    return lines

def finish(run, splits):
    """Mix, evaluate the best weights on test, draw, and say how to use the weights."""
    everyone("best.pt is written")
    if run.best_share is None:
        mix_with_start(run, splits.get("val"))
        save_run(run)
    save_best(run)
    if "test" in splits:
        metrics, _ = evaluate(run, splits["test"])
        log(run, "test", run.best_epoch, metrics)
    if rank() == 0:
        draw_curves(run)
    if "val" in splits:
        if rank() == 0:
            draw_confusion(run)
            draw_retrieval(run, splits["val"])
        say("", *class_table(run))
    run.finished = True
    save_run(run)
    share = "" if run.best_share == 1 else f", {run.best_share} of them with the start's"
    say("", f"The best weights, of epoch {run.best_epoch}{share}, are in {run.best}. To use them:",
        f'    model, preprocess = clip.load("{run.best}")')

# ---- The whole run -----------------------------------------------------------------------------
def prepare(settings, device, interrupts):
    """Load model and data → (the run as it starts or goes on, {split: FashionDataset})."""
    train_path = settings.JSON_PATH.replace("{split}", "train")
    if not os.path.isdir(settings.IMAGE_PATH):
        raise Stop(f"IMAGE_PATH: there is no folder {settings.IMAGE_PATH}; set it to yours")
    if not os.path.isfile(train_path):
        raise Stop(f"JSON_PATH: there is no file {train_path}; set it to where yours are")
    torch.manual_seed(settings.SEED)
    for turn in (0, 1):  # one process of a machine downloads the weights, the others find them
        if turn == min(local_rank(), 1):
            model = load_clip(settings.MODEL, device)
        everyone("loaded")
    cores = os.cpu_count() // local_world_size()
    num_workers, precision = min(cores, settings.MAX_WORKERS), choose_precision(device)
    splits = load_splits(settings, model.visual.input_resolution, num_workers)
    steps = -(-len(splits["train"]) // settings.BATCH_SIZE)  # of an epoch
    total_steps = settings.NUM_EPOCHS * steps
    run = SimpleNamespace(
        settings=settings, interrupts=interrupts, model=model, precision=precision,
        num_workers=num_workers,
        class_labels=sorted({r.class_label for data in splits.values() for r in data.records}),
        chunk=settings.CHUNK_SIZE or settings.BATCH_SIZE,  # pairs encoded at a time
        optimizer=make_optimizer(model, settings.WEIGHT_DECAY),
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        train_rows=hashlib.sha256(repr(splits["train"].records).encode()).hexdigest()[:12],
        best=os.path.join(settings.OUTPUT_PATH, "best.pt"),
        last=os.path.join(settings.OUTPUT_PATH, "last.pt"),
        steps=steps,
        schedule=(total_steps, max(1, round(settings.WARMUP * total_steps)), settings.LR),
        evaluation_seconds=0.0, pace_said=False, **new_progress())
    say(f"{settings.MODEL} in {str(precision)[6:]} on {world_size()} × {device.type}; "
        f"{len(run.class_labels)} classes; {settings.NUM_EPOCHS} epochs of {run.steps} steps of "
        f"{settings.BATCH_SIZE} pairs, encoded {run.chunk} at a time; output in "
        f"{settings.OUTPUT_PATH}")
    resume_run(run)
    return run, splits

def main():
    device, settings, interrupts = join_processes(), read_settings(), Interrupts()
    if device.type == "cpu":
        keep_memory()
    os.makedirs(settings.OUTPUT_PATH, exist_ok=True)
    lock = FileLock(os.path.join(settings.OUTPUT_PATH, ".lock"))
    try:
        if rank() == 0:
            lock.acquire(timeout=0)
    except Timeout:
        raise Stop(f"OUTPUT_PATH: another run writes to {settings.OUTPUT_PATH}; set another"
                   ) from None
    run, splits = prepare(settings, device, interrupts)
    if run.finished:
        say(f"This run is finished: {run.best} has its weights. For another, set OUTPUT_PATH.")
        return
    done = max(0, run.epoch - 1) * run.steps + run.step
    bar_format = "{desc} {percentage:3.0f} % |{bar}| {n} of {total} steps, {elapsed}{postfix}"
    interrupts.at_once = False
    try:
        with progress_bar(desc="training", total=run.schedule[0], initial=done,
                          bar_format=bar_format) as bar:
            train(run, splits, bar)
        finish(run, splits)
    except (Interrupted, RuntimeError) as error:
        interrupts.at_once = False
        if isinstance(error, Interrupted) or "DataLoader worker" in str(error):
            save_run(run)
            say(f"Stopped and saved in {run.last}: the same command goes on from there.")
        raise

if __name__ == "__main__":
    try:
        main()
    except Interrupted as interrupted:
        sys.exit(128 + interrupted.args[0])
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sys.exit(f"a process that decodes pictures was killed ({error}). If memory was short, "
                 "lower MAX_WORKERS; then start again")

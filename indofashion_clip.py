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
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
MAX_WORKERS = 8  # processes that decode pictures; fewer where there are fewer cores

# The run without a dataset: what differs from the constants above
SAMPLE_RUN = {
    "IMAGE_PATH": "data/sample",
    "JSON_PATH": "data/sample/{split}_data.json",
    "OUTPUT_PATH": "outputs/sample",
    "MODEL": "tiny",
    "BATCH_SIZE": 32,
    "NUM_EPOCHS": 40,
    "LR": 1e-3,
}


class Stop(SystemExit):
    """The run cannot go on: one line saying what, where and what to do. Exits with 1."""


def read_settings():
    """The constants by name, with SAMPLE_RUN's in place where the default dataset is missing."""
    settings = {name: value for name, value in globals().items() if name.isupper()}
    if settings["IMAGE_PATH"] == "data/indo-fashion" and not os.path.isdir("data/indo-fashion"):
        print("IndoFashion is not in data/indo-fashion (www.kaggle.com/datasets/validmodel/"
              "indo-fashion-dataset):\nrunning the bundled sample instead, by SAMPLE_RUN.")
        settings |= SAMPLE_RUN
    return SimpleNamespace(**settings)


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


def tokenize_all(captions, num_workers):
    """As tokenize, by several processes; a split has tens of thousands of captions."""
    pool = DataLoader(captions, batch_size=1024, collate_fn=tokenize, num_workers=num_workers)
    tokens, too_long = zip(*pool)
    return torch.cat(tokens), sum(too_long)


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
    picture_pass = PicturePass(paths, resolution, pixel_path)
    pool = DataLoader(picture_pass, 32, num_workers=num_workers, collate_fn=list)
    with tqdm(total=len(paths), desc=f"{title}: decoding", unit=" pictures", leave=False) as bar:
        reasons = []
        for batch in pool:
            reasons += batch
            bar.update(len(batch))
    return {row: reason for row, reason in enumerate(reasons) if reason}


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
    with suppress(OSError, ValueError), open(pixel_path, "rb") as file:
        file.seek(size)
        made_from = json.load(file)
        if made_from["key"] == key:
            bad = {int(row): reason for row, reason in made_from["bad"].items()}
            return map_pixels(pixel_path, len(paths), resolution), bad
    os.makedirs(cache_path, exist_ok=True)
    if size > (free := shutil.disk_usage(cache_path).free):
        raise Stop(f"CACHE_PATH: {cache_path} needs {size / 1e9:.1f} GB for the {title} pictures and "
                   f"has {free / 1e9:.1f}: free some, set another folder, or \"\" for no cache")
    with replacing(pixel_path) as temporary:
        with open(temporary, "wb") as file:
            file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):  # a disk that fills says so now
                os.posix_fallocate(file.fileno(), 0, size)
        bad = decode_pictures(paths, resolution, temporary, num_workers, title)
        with open(temporary, "ab") as file:
            file.write(json.dumps({"key": key, "bad": bad}).encode())
    return map_pixels(pixel_path, len(paths), resolution), bad


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class FashionDataset(Dataset):
    """Row → (pixels uint8 [3, R, R], tokens int32 [77], caption id).

    The pixels are row `rows[i]` of the cache, or decoded on the fly where there is none. tokens:
    int32 [distinct captions + class prompts, 77]; caption_ids: int64 [N]; prompt_ids: int64 [N, P].
    """

    def __init__(self, records, paths, resolution, pixels, rows, prompts, class_names, num_workers):
        self.records, self.paths, self.resolution = records, paths, resolution
        self.pixels, self.rows = pixels, rows
        names = {r.class_label: class_name(r.class_label, class_names) for r in records}
        by_class = {label: [p.format(name) for p in prompts] for label, name in names.items()}
        ids = {}
        def number(caption):
            return ids.setdefault(caption, len(ids))
        self.caption_ids = torch.tensor([number(record.caption) for record in records])
        self.num_captions = len(ids)
        self.prompt_ids = torch.tensor([[number(p) for p in by_class[r.class_label]] for r in records])
        self.titled = torch.tensor([record.titled for record in records])
        self.tokens, self.truncated = tokenize_all(list(ids), num_workers)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        if self.pixels is None:
            pixels = load_image(self.paths[index], self.resolution)
        else:
            pixels = self.pixels[self.rows[index]]
        caption_id = self.caption_ids[index]
        return pixels, self.tokens[caption_id], caption_id

    def with_prompts(self, share, generator):
        """This dataset with a random class prompt for that share of the titles, and for no title."""
        epoch = copy.copy(self)
        prompted = (torch.rand(len(self), generator=generator) < share) | ~self.titled
        which = torch.randint(self.prompt_ids.shape[1], (len(self), 1), generator=generator)
        prompts = self.prompt_ids.gather(1, which).squeeze(1)
        epoch.caption_ids = torch.where(prompted, prompts, self.caption_ids)
        return epoch


def load_split(split, json_path, settings, resolution, num_workers):
    """→ (FashionDataset, [{split, line, reason}] of the rows left out). Stops where most are."""
    records, skipped = read_records(json_path, settings.PROMPTS[0], settings.CLASS_NAMES)
    paths = [os.path.join(settings.IMAGE_PATH, record.image_path) for record in records]
    cache_path, total = settings.CACHE_PATH, len(records) + len(skipped)
    pixels, bad = cache_pictures(paths, resolution, cache_path, num_workers, split)
    skipped = sorted(skipped + [(records[row].line, reason) for row, reason in bad.items()])
    rows = [row for row in range(len(records)) if row not in bad]
    if len(rows) <= len(skipped):
        line, reason = skipped[0] if skipped else (1, "the file is empty")
        raise Stop(f"{json_path}: {len(skipped)} of {total} rows cannot be used. Line {line}: {reason}."
                   " Check IMAGE_PATH and JSON_PATH")
    dataset = FashionDataset([records[row] for row in rows], [paths[row] for row in rows],
                             resolution, pixels, rows, settings.PROMPTS, settings.CLASS_NAMES, num_workers)
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
            data = splits[split]
            untitled = sum(not record.titled for record in data.records)
            print(f"{split:5} {len(data):6,} rows, {data.num_captions:6,} captions; {untitled:,} titles "
                  f"missing, {data.truncated:,} truncated to 77 tokens, {len(left_out):,} rows left out")
        elif split == "train":
            raise Stop(f"JSON_PATH: there is no file {json_path!r}")
        else:
            print(f"{split:5} no file {json_path}: nothing is evaluated on it")
    with replacing(os.path.join(settings.OUTPUT_PATH, "skipped.jsonl")) as temporary:
        write_lines(temporary, skipped)
    if skipped:
        print(f"{len(skipped):,} rows left out: {settings.OUTPUT_PATH}/skipped.jsonl says why")
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
            model = clip.model.CLIP(64, 64, 4, 128, 8, 77, 49408, 128, 2, 2)
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
    """Linear warm-up to the peak, then a cosine to 0 (which only the step after the last has)."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def augment(images, min_crop, generator):
    """A random crop of at least min_crop of each side, and a flip of every other picture.

    images: float32 [B, 3, R, R], on any device; generator: on the CPU, so that all devices agree.
    """
    draws = torch.rand(len(images), 4, generator=generator).to(images.device, non_blocking=True)
    side = 1 - (1 - min_crop) * draws[:, 0]
    shift = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]
    turn = torch.zeros(len(images), 2, 3, device=images.device)
    turn[:, 0, 0] = torch.where(draws[:, 3] < 0.5, side, -side)
    turn[:, 1, 1] = side
    turn[:, :, 2] = shift
    grid = F.affine_grid(turn, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_step(model, optimizer, scaler, batch, settings, precision, step):
    """One optimizer step. batch: pixels uint8 [B, 3, R, R], tokens [B, 77], caption ids [B].

    Returns the loss, left on the device: to read it would wait for the device.
    """
    pixels, tokens, caption_ids = batch
    generator = torch.Generator().manual_seed(settings.SEED * 1_000_003 + step)
    images = pixels.to(model.mean.device, non_blocking=True).float().div(255)
    image_features = encode_images(model, augment(images, settings.MIN_CROP, generator), precision)
    text_features = encode_captions(model, tokens, precision)
    caption_ids = caption_ids.to(images.device, non_blocking=True)
    loss = clip_loss(image_features, text_features, model.logit_scale, caption_ids)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))  # as the CLIP paper does, for stability
    return loss.detach()


# ---- Training ----------------------------------------------------------------------------------
def epoch_batches(dataset, settings, epoch):
    """The epoch's captions and its batches of rows, both by seed and epoch."""
    generator = torch.Generator().manual_seed(settings.SEED * 1_000_003 + epoch)
    batches = torch.randperm(len(dataset), generator=generator).split(settings.BATCH_SIZE)
    return dataset.with_prompts(settings.CLASS_PROMPT_SHARE, generator), batches


def load_batches(dataset, batches, num_workers, device):
    """A DataLoader of the given batches; cached pictures need no workers to decode them."""
    workers = num_workers if dataset.pixels is None else 0
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      pin_memory=device.type == "cuda")


def train_epoch(model, optimizer, scaler, batches, steps, total_steps, settings, precision):
    """Train for the given steps (a range). Returns the mean loss; stops where it is not finite."""
    losses, warmup_steps = [], max(1, round(settings.WARMUP * total_steps))
    with tqdm(steps, desc="training", unit=" steps", leave=False) as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, warmup_steps, settings.LR)
            losses.append(train_step(model, optimizer, scaler, next(batches), settings, precision, step))
            if len(losses) % 20 == 0 or step == steps[-1]:  # waits for the device: not every step
                values = torch.stack(losses).tolist()
                bad = [at for at, value in enumerate(values) if not math.isfinite(value)]
                if bad:
                    raise Stop(f"the loss is {values[bad[0]]} at step {steps[bad[0]]}: try a lower LR. "
                               f"The weights in {settings.OUTPUT_PATH} are those before this epoch")
                bar.set_postfix(loss=f"{sum(values[-20:]) / len(values[-20:]):.3f}")
    return sum(values) / len(values)


# ---- Evaluation --------------------------------------------------------------------------------
def class_metrics(confusion):
    """Counts [true class, predicted class] → (accuracy, precision, recall, F1 of each class).

    A class that is never predicted has precision 0; one without rows has recall 0.
    """
    confusion = confusion.double()
    right, predicted, rows = confusion.diag(), confusion.sum(0), confusion.sum(1)
    precision, recall = right / predicted.clamp(min=1), right / rows.clamp(min=1)
    f1 = 2 * right / (predicted + rows).clamp(min=1)
    return right.sum() / rows.sum(), precision, recall, f1


def retrieval_recall(image_features, text_features, caption_ids, ranks=(1, 5, 10)):
    """Shares of queries with a right answer among the first k: (image → text, text → image).

    image_features [N, D]; text_features [C, D] of the distinct captions; caption_ids [N]. Every
    picture of a caption is a right answer to it.
    """
    logits, top = image_features @ text_features.T, max(ranks)
    texts = logits.topk(min(top, logits.shape[1]), dim=1).indices  # [N, k]
    images = logits.T.topk(min(top, logits.shape[0]), dim=1).indices  # [C, k]
    right_texts = texts == caption_ids[:, None]
    right_images = caption_ids[images] == torch.arange(len(text_features), device=images.device)[:, None]
    return [[right[:, :k].any(1).double().mean().item() for k in ranks]
            for right in (right_texts, right_images)]


@torch.no_grad()
def evaluate(model, dataset, class_labels, settings, precision, num_workers):
    """Zero-shot classification and retrieval on a split → (metrics, confusion [K, K])."""
    device, start = model.mean.device, time.perf_counter()
    def encode_all(tokens):
        return torch.cat([encode_captions(model, part, precision) for part in tokens.split(256)])
    image_features = torch.cat([
        encode_images(model, pixels.to(device, non_blocking=True).float().div(255), precision)
        for pixels, _, _ in load_batches(dataset, torch.arange(len(dataset)).split(256), num_workers, device)])
    text_features = encode_all(dataset.tokens[:dataset.num_captions])
    names = [class_name(label, settings.CLASS_NAMES) for label in class_labels]
    prompts, _ = tokenize([prompt.format(name) for name in names for prompt in settings.PROMPTS])
    class_features = encode_all(prompts).view(len(names), len(settings.PROMPTS), -1).mean(1)
    predicted = (image_features @ F.normalize(class_features, dim=-1).T).argmax(1)
    labels = torch.tensor([class_labels.index(record.class_label) for record in dataset.records])
    confusion = torch.zeros(len(names), len(names), dtype=torch.int64)
    confusion.index_put_((labels, predicted.cpu()), torch.tensor(1), accumulate=True)
    caption_ids = dataset.caption_ids.to(device)
    losses = [clip_loss(image_features[rows], text_features[caption_ids[rows]], model.logit_scale, caption_ids[rows]) * len(rows)
              for rows in epoch_batches(dataset, settings, 0)[1]]
    accuracy, _, _, f1 = class_metrics(confusion)
    image_to_text, text_to_image = retrieval_recall(image_features, text_features, caption_ids)
    seconds = time.perf_counter() - start
    metrics = {"loss": sum(losses).item() / len(dataset), "accuracy": accuracy.item(), "macro_f1": f1[confusion.sum(1) > 0].mean().item()}
    metrics |= {f"image_to_text_r{k}": value for k, value in zip((1, 5, 10), image_to_text)}
    metrics |= {f"text_to_image_r{k}": value for k, value in zip((1, 5, 10), text_to_image)}
    return metrics | {"seconds": seconds, "pairs_per_second": len(dataset) / seconds}, confusion


def main():
    settings = read_settings()
    torch.manual_seed(settings.SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device)
    num_workers = min(os.cpu_count() or 1, settings.MAX_WORKERS)
    os.makedirs(settings.OUTPUT_PATH, exist_ok=True)
    model = load_clip(settings.MODEL, device)
    splits = load_splits(settings, model.visual.input_resolution, num_workers)
    class_labels = sorted({r.class_label for d in splits.values() for r in d.records})
    optimizer = make_optimizer(model, settings.WEIGHT_DECAY)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    n = len(splits["train"])
    spe = -(-n // settings.BATCH_SIZE)
    total = spe * settings.NUM_EPOCHS
    for epoch in range(0, settings.NUM_EPOCHS + 1):
        t = time.time()
        batches = iter(load_batches(*epoch_batches(splits["train"], settings, epoch), num_workers, device))
        loss = train_epoch(model, optimizer, scaler, batches, range((epoch - 1) * spe, epoch * spe), total, settings, precision) if epoch else 0
        t = time.time() - t
        m, _ = evaluate(model, splits["val"], class_labels, settings, precision, num_workers)
        print(epoch, f"{loss:.3f} {t:.1f}s", " ".join(f"{k}={v:.3f}" for k, v in m.items()))
    m, _ = evaluate(model, splits["test"], class_labels, settings, precision, num_workers)
    print("test", " ".join(f"{k}={v:.3f}" for k, v in m.items()))


if __name__ == "__main__":
    main()

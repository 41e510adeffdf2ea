"""Fine-tune OpenAI's CLIP on your own pictures and captions: one file, made for IndoFashion.

    python indofashion_clip.py
    torchrun --nproc_per_node=4 indofashion_clip.py  # on four GPUs

Edit the constants first, or nothing: without IndoFashion in data/indo-fashion a tiny CLIP learns
the bundled sample, drawings of the 15 classes, from scratch: a minute on two CPU cores, after
which it names the class of 9 in 10 (1 in 15 before).

In: a folder of pictures and a file of rows, a JSON object a line, for train and, if you have them,
val and test: {"image_path": "a/1.jpg", "product_title": "Red silk saree", "class_label": "saree"}.
Out: outputs/best.pt, which clip.load reads.

Shapes: B pairs in a batch, b of them this process's, N usable rows in a split, C distinct captions,
K classes, D the width of an embedding, R the side of a picture in pixels; in the encoders B
pictures or C texts at a time.
"""

import ctypes
import functools
import hashlib
import html
import importlib.util
import json
import math
import mmap
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize, to_pil_image
from tqdm import tqdm

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        import clip
    _ = clip.tokenize, clip.model.CLIP
except Exception as error:  # another package of that name may raise anything
    found = getattr(importlib.util.find_spec("clip"), "origin", "nowhere")
    advice = "rename that file or uninstall that package, then: pip install -r requirements.txt"
    sys.exit(f"'import clip' finds {found}, not OpenAI's CLIP ({error!r:.200}): {advice}")

# ---- Constants: what a user edits ----------------------------------------------------------------
IMAGE_PATH = "data/indo-fashion"  # the folder that image_path in a row is relative to
JSON_PATH = "data/indo-fashion/{split}_data.json"  # {split} stands for train, val and test
OUTPUT_PATH = "outputs"  # weights, metrics, pictures; one for each training
CACHE_PATH = "data/cache"  # decoded pictures, 150 KB each at 224 pixels; on a fast disk

MODEL = "ViT-B/32"  # or another name of HUB_NAMES, a file, a repository of the Hugging Face hub
BATCH_SIZE = 256  # pairs a step; each is a negative of the others, so larger learns more
NUM_EPOCHS = 6  # people stop at 3 to 10: CLIP starts close and overfits soon
LR = 1e-5  # the peak; people end up at 5e-6 to 3e-5, and 5e-5 forgets what CLIP knew
WARMUP = 0.1  # share of the steps in which the learning rate rises to LR
MAX_GRAD_NORM = 1.0  # longer gradients are scaled down to it: one odd batch does no harm
CLASS_PROMPT_SHARE = 0.25  # of the titles, replaced by a class prompt: accuracy is tested with it
MIN_CROP = 0.9  # the least side of the random crop, as a share; 1 does not crop
SEED = 0  # the same seed gives the same order, augmentation and, on CPU, weights

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
CHUNK_SIZE = None  # pairs encoded at a time; None: all. A GPU halves it until they fit

SAMPLE_RUN = {  # the run without a dataset: these replace those above
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

# ---- Set by torchrun -----------------------------------------------------------------------------
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on its machine
BAR = {"leave": False, "disable": True if RANK > 0 else None}  # None: no bar in a log file


# ---- Data: rows → captions and pictures → batches ------------------------------------------------
class Record(NamedTuple):
    line: int  # in the JSON file, from 1
    cache_row: int  # its picture's place in the split's cache
    image_path: str
    caption: str
    class_label: str
    titled: bool  # else the caption is a class prompt


def class_prompts(class_label):
    """saree → ["a photo of a saree", …], one for each of PROMPTS."""
    name = CLASS_NAMES.get(class_label, class_label.replace("_", " "))
    return [prompt.replace("{}", name) for prompt in PROMPTS]


def clean(text):
    """Plain words: entities resolved, white space collapsed, nothing that UTF-8 cannot hold."""
    text = html.unescape(text) if isinstance(text, str) else ""
    return " ".join(text.encode("utf-8", "ignore").decode("utf-8").split())


def read_records(json_path):
    """→ ([Record] of the rows of a JSON-lines file, [(line, why it is left out)])."""
    records, skipped = [], []
    with open(json_path, encoding="utf-8-sig", errors="replace") as file:
        for line, text in enumerate(file, 1):
            row = {}
            with suppress(ValueError, TypeError, RecursionError):
                row = dict(json.loads(text))
            path, label = row.get("image_path"), sys.intern(clean(row.get("class_label")))
            title = clean(row.get("product_title"))
            if isinstance(path, str) and label:
                titled = title.upper() not in ("", "N/A", "NA")
                caption = title if titled else class_prompts(label)[0]
                records.append(Record(line, len(records), path, caption, label, titled))
            elif text.strip():
                skipped.append((line, "no JSON object with the texts image_path and class_label"))
    return records, skipped


def load_image(path, resolution):
    """A picture as a viewer shows it, resized and cropped as CLIP does: uint8 [3, R, R]."""
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
    return pil_to_tensor(center_crop(image, resolution)).contiguous()


def decode(path, resolution):
    """→ (the picture's pixels, None), or (black ones, why it cannot be used)."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("there is no such file")
        return load_image(path, resolution), None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        black = torch.zeros(3, resolution, resolution, dtype=torch.uint8)
        return black, f"no image in {path}: {error!r:.300}"


def make_cache(cache_file, paths, resolution):
    """Decode all pictures into a file, unless it is there, made from the same.

    It holds uint8 [N, 3, R, R], then 64 bytes that tell what it was made from, then, as JSON,
    [[row, why unusable], …]. Several processes at once waste work and spoil nothing.
    """
    digest = hashlib.sha256(b"%d" % resolution)
    for path in paths:
        digest.update(repr(path).encode("utf-8", "replace"))
        with suppress(OSError, ValueError):
            status = os.stat(path)
            digest.update(b"%d %d" % (status.st_size, status.st_mtime_ns))
    size = len(paths) * 3 * resolution**2

    def is_there():
        with suppress(OSError, ValueError), open(cache_file, "rb") as file:
            file.seek(size)
            same = file.read(64) == digest.hexdigest().encode()
            return same and json.load(file) is not None  # a cut one raises

    if is_there():
        return
    for leftover in Path(CACHE_PATH).glob("*.u8.*.tmp"):
        with suppress(OSError):
            if leftover.stat().st_mtime < time.time() - 3600:  # its run was killed
                leftover.unlink()
    if size > (free := shutil.disk_usage(CACHE_PATH).free):
        sys.exit(f"CACHE_PATH: {CACHE_PATH} needs {size / 1e9:.1f} GB, has {free / 1e9:.1f} free")
    own_name = f"{cache_file}.{time.time_ns()}.tmp"
    bad = []
    with atomic_write(cache_file, own_name, is_there) as file, ThreadPoolExecutor() as threads:
        parts = (paths[start : start + 256] for start in range(0, len(paths), 256))
        work = functools.partial(decode, resolution=resolution)
        pictures = (picture for part in parts for picture in threads.map(work, part))
        for row, (pixels, why) in enumerate(tqdm(pictures, "decoding", len(paths), **BAR)):
            file.write(pixels.numpy())
            if why:
                bad.append((row, why))
        file.write(digest.hexdigest().encode() + json.dumps(bad).encode())


def open_cache(cache_file, shape):
    """→ (pixels uint8 `shape`, memory-mapped: the system keeps what it can; {row: why bad})."""
    with open(cache_file, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        mapped = mmap.mmap(file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
        file.seek(len(mapped) + 64)
        return torch.frombuffer(mapped, dtype=torch.uint8).view(shape), dict(json.load(file))


class FashionDataset(Dataset):
    """Rows int64 [n] → (pixels uint8 [n, 3, R, R], the tokens int32 [n, 77] of their captions).

    tokens: int32 [texts, 77], of the C distinct captions, then of class prompts; caption_ids: int64
    [N] and prompt_ids: int64 [K, P], their places there; labels: int64 [N], in class_labels.
    """

    def __init__(self, records, pixels, class_labels):
        self.records, self.pixels, self.class_labels = records, pixels, class_labels
        _, cache_rows, _, captions, labels, titled = zip(*records, strict=True)
        self.cache_rows, self.titled = torch.tensor(cache_rows), torch.tensor(titled)
        places = {label: i for i, label in enumerate(class_labels)}
        self.labels = torch.tensor([places[label] for label in labels])
        prompts = [prompt for label in class_labels for prompt in class_prompts(label)]
        # CLIP reads no capitals, but resolves entities first, where they matter: &Dagger; &dagger;
        texts = {text.lower(): text for text in (*captions, *prompts)}
        self.tokens = clip.tokenize(list(texts.values()), truncate=True).int()
        ids = {text: i for i, text in enumerate(texts)}
        self.caption_ids = torch.tensor([ids[caption.lower()] for caption in captions])
        self.num_captions = int(self.caption_ids.max()) + 1
        prompt_ids = [ids[prompt.lower()] for prompt in prompts]
        self.prompt_ids = torch.tensor(prompt_ids).view(len(class_labels), -1)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, rows):
        shape = (len(rows), *self.pixels.shape[1:])
        pixels = torch.empty(shape, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        torch.index_select(self.pixels, 0, self.cache_rows[rows], out=pixels)
        return pixels, self.tokens[self.caption_ids[rows]]


def read_split(split, json_path, resolution):
    """→ (the usable [Record], all pixels, lines of skipped.jsonl). Stops where most are bad."""
    records, skipped = read_records(json_path)
    if not records:
        sys.exit(f"{json_path}: no line is a JSON object with the texts image_path and class_label")
    cache_file = f"{CACHE_PATH}/{split}-{resolution}.u8"
    if LOCAL_RANK == 0:  # main() lets the first process of each machine go first
        paths = [os.path.join(IMAGE_PATH, record.image_path) for record in records]
        make_cache(cache_file, paths, resolution)
    pixels, bad = open_cache(cache_file, (len(records), 3, resolution, resolution))
    skipped = sorted(skipped + [(records[row].line, why) for row, why in bad.items()])
    usable = [record for record in records if record.cache_row not in bad]
    if len(skipped) > len(usable):
        with suppress(OSError):  # what is mended, a right to read, may leave the files' times alone
            os.remove(cache_file)
        first = "line {}: {}".format(*skipped[0])
        sys.exit(f"{json_path}: most rows are bad; {first}. Check IMAGE_PATH and this file")
    return usable, pixels, [{"split": split, "line": line, "reason": why} for line, why in skipped]


def shuffled(count):
    """The numbers below count, int64 [count], in an order that follows from SEED."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


def load_splits(resolution):
    """{"train", "val" and, where there is a file, "test": FashionDataset}; writes skipped.jsonl."""
    records, pixels, skipped = {}, {}, []
    for split in ("train", "val", "test"):
        json_path = JSON_PATH.replace("{split}", split)  # without {split} there is only train
        if split == "train" or (json_path != JSON_PATH and os.path.isfile(json_path)):
            records[split], pixels[split], left_out = read_split(split, json_path, resolution)
            skipped += left_out
            untitled = sum(not record.titled for record in records[split])
            used = f"{len(records[split]):7,} rows used, {untitled:,} of them without a title"
            say(f"{split:5} {used}; {len(left_out):,} left out")
    write_lines("skipped.jsonl", skipped)
    if "val" not in records:
        rows, pixels["val"] = records["train"], pixels["train"]
        held_out = set(shuffled(len(rows))[: max(1, len(rows) // 20)].tolist())
        records["val"] = [row for i, row in enumerate(rows) if i in held_out]
        records["train"] = [row for i, row in enumerate(rows) if i not in held_out]
        say(f"val   {len(held_out):7,} rows of train are held out for it: there is no such file")
        if not records["train"]:
            sys.exit(f"{JSON_PATH}: one usable row; two are needed, one to learn and one for val")
    labels = sorted({record.class_label for rows in records.values() for record in rows})
    return {split: FashionDataset(records[split], pixels[split], labels) for split in records}


class Batch(NamedTuple):
    pixels: torch.Tensor  # uint8 [b, 3, R, R], this process's share of the B pairs
    draws: torch.Tensor  # float32 [b, 3], uniform in 0..1: of each crop's side, x and y
    tokens: torch.Tensor  # int32 [captions, 77], the share's distinct ones
    inverse: torch.Tensor  # int64 [b], each picture's row of tokens


def epoch_batches(dataset, epoch, batch_size, first_step=0):
    """Yield an epoch's Batches from a step on. All that is random follows from SEED and epoch."""
    size = len(dataset)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
    order = torch.randperm(size, generator=generator)
    draws = torch.rand(size, 4, generator=generator)  # the last one is for the class prompts
    prompt = torch.randint(dataset.prompt_ids.shape[1], (size,), generator=generator)
    prompted = (draws[:, 3] < CLASS_PROMPT_SHARE) | ~dataset.titled
    prompts = dataset.prompt_ids[dataset.labels, prompt]
    caption_ids = torch.where(prompted, prompts, dataset.caption_ids)

    def load(rows):
        own = rows.chunk(WORLD_SIZE)[RANK]
        ids, inverse = caption_ids[own].unique(return_inverse=True)
        return Batch(dataset[own][0], draws[own, :3], dataset.tokens[ids], inverse)

    full = order.split(batch_size)[: size // batch_size]  # the other rows wait for the next shuffle
    return load_ahead(load, full[first_step:])


def load_ahead(load, batches):
    """Yield load(rows) of each batch of rows; for a GPU a thread loads the next meanwhile."""
    if not torch.cuda.is_available():  # beside a CPU that computes it was 1.6 times as slow
        yield from map(load, batches)
        return
    with ThreadPoolExecutor(1) as thread:
        loading = (thread.submit(load, rows) for rows in batches)
        for loaded, _ in pairwise(chain(loading, [None])):  # the next is submitted by now
            yield loaded.result()


# ---- Model ---------------------------------------------------------------------------------------
HUB_NAMES = {  # OpenAI's models as plain tensors: timm/….openai
    "RN50": "resnet50_clip",
    "RN101": "resnet101_clip",
    "RN50x4": "resnet50x4_clip",
    "RN50x16": "resnet50x16_clip",
    "RN50x64": "resnet50x64_clip",
    "ViT-B/32": "vit_base_patch32_clip_224",
    "ViT-B/16": "vit_base_patch16_clip_224",
    "ViT-L/14": "vit_large_patch14_clip_224",
    "ViT-L/14@336px": "vit_large_patch14_clip_336",
}
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]


def check_config(config):
    """Raise ValueError where an open_clip_config.json describes another form than OpenAI's CLIP."""
    model, preprocessing = config["model_cfg"], config.get("preprocess_cfg", {})
    sizes = {"embed_dim", "vision_cfg", "text_cfg", "image_size", "layers", "width", "patch_size"}
    form = {"context_length": 77, "vocab_size": 49408, "heads": model["text_cfg"]["width"] // 64}
    form |= {"quick_gelu": True, "head_width": 64, "mlp_ratio": 4, "mode": "RGB"}
    form |= {"mean": PIXEL_MEAN, "std": PIXEL_STD}
    form |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    found = {"quick_gelu": False} | model | model["vision_cfg"] | model["text_cfg"] | preprocessing
    different = [
        f"{name} is {value}, not {form[name]}" if name in form else f"{name} is {value}"
        for name, value in found.items()
        if name not in sizes | {"size"} and value != form.get(name) and (value or name in form)
    ]
    if different:
        raise ValueError(f"it differs from OpenAI's CLIP: {'; '.join(different)}")


def hub_file(repository, name):
    """The path of a repository's file, from the hub's cache or downloaded; None if it has none."""
    with suppress(LocalEntryNotFoundError):
        return hf_hub_download(repository, name, local_files_only=True)
    try:
        return hf_hub_download(repository, name)
    except LocalEntryNotFoundError:  # the hub cannot be reached
        raise
    except EntryNotFoundError:
        return None


def hub_weights(repository):
    """The path of a hub repository's weights. Its form is checked before they are downloaded."""
    config = hub_file(repository, "open_clip_config.json")
    if config is None:
        hint = 'OpenAI\'s own models are MODEL = "ViT-B/32" and the like'
        raise ValueError(f"that repository has no open_clip_config.json; {hint}")
    check_config(json.loads(Path(config).read_text(encoding="utf-8")))
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return next(filter(None, (hub_file(repository, name) for name in names)))


def find_weights(name):
    """The path of MODEL's weights: a file as it is, clip's earlier download, else the hub's."""
    if name not in HUB_NAMES:
        suffix = Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors")
        is_path = os.path.exists(name) or suffix or name.count("/") != 1
        return name if is_path else hub_weights(name)
    url, repository = clip.clip._MODELS[name], f"timm/{HUB_NAMES[name]}.openai"
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(url)
    if cached.is_file() and hashlib.sha256(cached.read_bytes()).hexdigest() == url.split("/")[-2]:
        return str(cached)
    sources = {"the hub": lambda: hub_weights(repository)}
    sources["OpenAI's link"] = lambda: clip.clip._download(url, str(cached.parent))
    reasons = []
    for source, download in sources.items():
        try:
            return download()
        except Exception as error:
            reasons.append(f"{source} says {brief(error)}")
    link = f"https://huggingface.co/{repository}/resolve/main/open_clip_model.safetensors"
    advice = f'Download {link} yourself and set MODEL = "path/to/open_clip_model.safetensors"'
    raise OSError(f"{'; '.join(reasons)}. {advice}")


def read_weights(path):
    """The tensors of a CLIP in a file, under OpenAI's names.

    The file: safetensors, a TorchScript archive as OpenAI's are, or a dictionary of tensors, which
    may lie in a checkpoint's "state_dict", "model_state_dict" or "model".
    """
    if str(path).endswith(".safetensors"):
        weights = load_file(path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit.load is deprecated; OpenAI's files need it
            try:
                weights = torch.jit.load(path, map_location="cpu").state_dict()
            except RuntimeError:
                weights = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        weights = weights.get(wrapper, weights)
    if any(name.startswith("vision_model.") for name in weights):
        raise ValueError("its tensors have transformers' names; take that model from the hub")
    words = "token_embedding.weight"  # what others put before all names stands before this one
    prefix = next((name.removesuffix(words) for name in weights if name.endswith(words)), "")
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not {words, "positional_embedding", "visual.conv1.weight"} <= weights.keys():
        raise ValueError(f"it holds {len(weights)} entries ({', '.join(weights):.100}), not a CLIP")
    sizes = len(weights["positional_embedding"]), len(weights[words])
    if sizes != (77, 49408):
        raise ValueError(f"its text length and vocabulary are {sizes}, not (77, 49408)")
    return weights


def load_clip(name):
    """CLIP in float32 and, for the RN models' batch norm, in eval mode; name: as MODEL above."""
    try:
        if name == "tiny":
            torch.manual_seed(SEED)
            image, text = (64, 2, 128, 16), (77, 49408, 128, 2, 2)  # pixels, layers, width, patch
            model = clip.model.CLIP(64, *image, *text)  # tokens, words, width, heads, layers
        else:
            weights = read_weights(find_weights(name))
            model = clip.model.build_model(weights).float()
            model.load_state_dict(weights)  # build_model has rounded them to half precision
    except Exception as error:  # a damaged file raises nearly anything
        kinds = f"a file, a repository of the hub, or one of {', '.join(['tiny', *HUB_NAMES])}"
        sys.exit(f"MODEL: cannot load {name!r}: {brief(error, 1200)}. MODEL may be {kinds}")
    for buffer, values in {"mean": PIXEL_MEAN, "std": PIXEL_STD}.items():
        model.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)
    return model.float().eval()


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
    that is not read. QuickGELU, h · sigmoid(1.702 h), is silu(1.702 h) / 1.702: both factors scale
    the weights, which have fewer elements than the activations.
    """
    for block in transformer.resblocks:
        projection, mlp = block.attn.in_proj_weight, block.mlp
        mixed = attend(F.linear(block.ln_1(tokens), projection, block.attn.in_proj_bias))
        if block is transformer.resblocks[-1]:
            tokens, mixed = tokens[read], mixed[read]
        tokens = tokens + block.attn.out_proj(mixed)
        hidden = F.linear(block.ln_2(tokens), mlp.c_fc.weight * 1.702, mlp.c_fc.bias * 1.702)
        tokens = tokens + F.linear(F.silu(hidden), mlp.c_proj.weight / 1.702, mlp.c_proj.bias)
    return tokens


def attention(queries_keys_values, num_sequences, causal):
    """Heads of 64 over sequences of one length, [S · L, 3 · width] → [S · L, width]."""
    heads = queries_keys_values.shape[1] // (3 * 64)
    split = queries_keys_values.view(num_sequences, -1, 3, heads, 64).permute(2, 0, 3, 1, 4)
    if split.is_cuda:
        mixed = F.scaled_dot_product_attention(*split, is_causal=causal)
    else:  # plain products: a sixth off the whole step in bfloat16, where the fused ones are slow
        queries, keys, values = split.flatten(1, 2).contiguous()  # [S · heads, L, 64] each
        scores = (queries / 64**0.5) @ keys.transpose(1, 2)
        if causal:
            scores = scores + torch.full_like(scores[0], -math.inf).triu(1)
        mixed = (scores.softmax(-1) @ values).view(split.shape[1:])
    return mixed.transpose(1, 2).reshape(len(queries_keys_values), -1)


def image_tower(visual, images):
    """As visual(images): float32 [B, 3, R, R] → [B, D], the patches embedded by one product."""
    batch, side = len(images), visual.conv1.kernel_size[0]  # of a patch
    grid = images.shape[-1] // side
    patches = images.view(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    tokens = F.linear(patches.reshape(batch, grid**2, -1), visual.conv1.weight.flatten(1))
    start = visual.class_embedding.expand(batch, 1, -1)
    tokens = visual.ln_pre(torch.cat([start, tokens], 1) + visual.positional_embedding)
    first = torch.arange(0, batch * tokens.shape[1], tokens.shape[1], device=images.device)
    attend = functools.partial(attention, num_sequences=batch, causal=False)
    read = run_blocks(visual.transformer, tokens.flatten(0, 1), attend, first)
    return visual.ln_post(read) @ visual.proj


def text_tower(model, tokens):
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
        return attention(padded, len(tokens), causal=True)[slots]

    # F.embedding, not indexing: positions repeat, and indexing sums gradients in any order.
    positions = F.embedding(slots % longest, model.positional_embedding)
    embedded = model.token_embedding(words) + positions
    read = run_blocks(model.transformer, embedded, attend, end)
    return model.ln_final(read) @ model.text_projection


def random_crop(images, draws):
    """Images [B, 3, R, R], each cropped by its draws [B, 3], from 0 to 1, and resized to R."""
    side = 1 - (1 - MIN_CROP) * draws[:, 0]
    view = torch.zeros(len(images), 2, 3, device=images.device)
    view[:, 0, 0] = view[:, 1, 1] = side
    view[:, :, 2] = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]
    grid = F.affine_grid(view, images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def encode_images(model, precision, pixels, draws=None):
    """Pixels uint8 [B, 3, R, R] → image_features float32 [B, D] of length 1; cropped by draws."""
    images = pixels.to(model.mean.device, non_blocking=True).float().div(255)
    if draws is not None:
        images = random_crop(images, draws.to(images.device, non_blocking=True))
    images = (images - model.mean) / model.std
    is_vit = hasattr(model.visual, "transformer")
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        image_features = image_tower(model.visual, images) if is_vit else model.visual(images)
    return F.normalize(image_features.float(), dim=-1)


def encode_texts(model, precision, tokens):
    """Tokens int32 [C, 77] on the CPU → text_features float32 [C, D] of length 1."""
    with torch.autocast(model.mean.device.type, precision, enabled=precision != torch.float32):
        text_features = text_tower(model, tokens)
    return F.normalize(text_features.float(), dim=-1)


# ---- Loss and step -------------------------------------------------------------------------------
def clip_loss(image_features, text_features, logit_scale):
    """Symmetric contrastive loss of B pairs, a scalar (the CLIP paper, arXiv 2103.00020, figure 3).

    image_features, text_features: float32 [B, D] of length 1; logit_scale: the log of the inverse
    temperature. Pairs of one caption need no soft target: as their text features are equal, loss
    and gradients are those of a target shared among them equally.
    """
    logits_per_image = logit_scale.exp() * image_features @ text_features.T  # [B, B]
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_per_image = F.cross_entropy(logits_per_image, targets)
    return (loss_per_image + F.cross_entropy(logits_per_image.T, targets)) / 2


def in_chunks(state, encode, *inputs):
    """encode(model, precision, *inputs) → features [B, D], state.chunk rows at a time.

    One chunk is a plain call. Of several only the features are kept, and backward() encodes chunk
    by chunk again: GradCache (Gao et al. 2021, arXiv 2101.06983), so that a batch of any size fits.
    """

    def work(_, *rows):
        return encode(state.model, state.precision, *rows)

    if len(inputs[0]) <= state.chunk:
        return work(None, *inputs)
    # Reentrant builds no graph before backward(): the other kind's made a CPU's memory peak an
    # eighth higher. It needs an input that has a gradient: logit_scale.
    again = functools.partial(checkpoint, work, state.model.logit_scale)
    chunks = zip(*(rows.split(state.chunk) for rows in inputs), strict=True)
    features = [again(*rows, use_reentrant=True, preserve_rng_state=False) for rows in chunks]
    return torch.cat(features)


def retry_on_oom(work, state, *arguments):
    """work(state, …), again with half the chunk each time that the device runs out of memory."""
    while True:
        try:
            return work(state, *arguments)
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()  # not inside except, where the error still holds the tensors
        if state.chunk == 1:
            sys.exit("out of memory even at one pair: set a smaller MODEL and another OUTPUT_PATH")
        state.chunk = -(-state.chunk // 2)
        tqdm.write(f"Out of memory: the same again, {state.chunk} pairs at a time.")


def forward_backward(state, batch, exchanged):
    """The loss of all B pairs; gradients by this process's b, to be summed over the processes.

    exchanged: an empty list that takes all processes' features. After running out of memory they
    are used again: the other processes do not repeat the exchange.
    """
    state.optimizer.zero_grad()  # of an attempt that ran out of memory
    device = state.model.mean.device
    image_features = in_chunks(state, encode_images, batch.pixels, batch.draws)
    captions = in_chunks(state, encode_texts, batch.tokens)
    text_features = F.embedding(batch.inverse.to(device, non_blocking=True), captions)
    own = torch.stack([image_features, text_features], 1)  # [b, 2, D]
    if not exchanged:
        exchanged.append(all_gather(own.detach()))  # [B, 2, D], the other processes' as constants
    start = RANK * len(own)
    features = exchanged[0].slice_scatter(own, 0, start, start + len(own))
    loss = clip_loss(*features.unbind(1), state.model.logit_scale)
    state.scaler.scale(loss).backward()
    return loss.detach()


def train_step(state, batch):
    """One optimizer step → the loss of the whole batch, a tensor: to read it is to wait for it."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    loss = retry_on_oom(forward_backward, state, batch, [])
    model.logit_scale.grad /= WORLD_SIZE  # a parameter of the loss: each process has the whole
    if WORLD_SIZE > 1:  # in one exchange; the activations, which took more memory, are gone
        gradients = [parameter.grad for parameter in model.parameters()]
        total = all_reduce(torch.nn.utils.parameters_to_vector(gradients))
        torch.nn.utils.vector_to_parameters(total, gradients)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))  # as the CLIP paper does, for stability
    return loss


def make_optimizer(model):
    """Adam as CLIP's ViT were trained, but for weight decay, which changed nothing measurable."""
    how = {"betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
    return torch.optim.Adam(model.parameters(), lr=0.0, **how)  # train_epoch sets each step's rate


def learning_rate(step, total_steps):
    """The rate of a step from 0: a linear warm-up to LR, then a cosine, 0 at total_steps."""
    warmup_steps = max(1, round(WARMUP * total_steps))
    if step < warmup_steps:
        return LR * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return LR * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Evaluation ----------------------------------------------------------------------------------
def top_k(queries, answers, count):
    """int64 [Q, count], the places of the nearest answers [A, D] to each query [Q, D]."""
    count = min(count, len(answers))
    return torch.cat([(part @ answers.T).topk(count).indices for part in queries.split(1024)])


DIRECTIONS = ("image_to_text", "text_to_image")


def retrieval_recall(image_features, text_features, caption_ids):
    """{"image_to_text_r1": the share of pictures whose caption is the first found, …}."""
    captions = torch.arange(len(text_features), device=caption_ids.device)
    texts_found = top_k(image_features, text_features, 10)  # [N, 10]
    images_found = top_k(text_features, image_features, 10)  # [C, 10]
    right = (texts_found == caption_ids[:, None], caption_ids[images_found] == captions[:, None])
    recall = {}
    for way, hits in zip(DIRECTIONS, right, strict=True):
        for k in (1, 5, 10):
            recall[f"{way}_r{k}"] = hits[:, :k].any(1).double().mean().item()
    return recall


def encode_all(state, encode, batches):
    """The features float32 [N, D] of all batches; between two of them a signal can end the run."""
    features = []
    for batch in batches:
        features.append(retry_on_oom(in_chunks, state, encode, batch))
        stop_if_signalled(state)
    return torch.cat(features)


@torch.no_grad()
def evaluate(state, dataset):
    """Zero-shot classification and retrieval on a split; every process does all of it.

    Returns (metrics, confusion int64 [K, K] by true and predicted class, image_features [N, D],
    text_features [C, D]).
    """
    start = time.perf_counter()
    pictures = load_ahead(lambda rows: dataset[rows][0], torch.arange(len(dataset)).split(256))
    image_features = encode_all(state, encode_images, pictures)
    text_features = encode_all(state, encode_texts, dataset.tokens.split(256))
    class_features = F.normalize(text_features[dataset.prompt_ids].mean(1), dim=-1)  # [K, D]
    text_features = text_features[: dataset.num_captions]
    predicted = top_k(image_features, class_features, 1).squeeze(1).cpu()
    classes = len(dataset.class_labels)
    confusion = torch.bincount(dataset.labels * classes + predicted, minlength=classes**2)
    confusion = confusion.view(classes, classes)
    caption_ids = dataset.caption_ids.to(image_features.device)
    loss = 0.0
    order = shuffled(len(dataset)).to(caption_ids.device)  # the file may be sorted by class
    for rows in order.split(state.batch_size):
        pairs = image_features[rows], text_features[caption_ids[rows]]
        loss += clip_loss(*pairs, state.model.logit_scale).item() * len(rows) / len(dataset)
    right, counts = confusion.diag(), confusion.sum(0) + confusion.sum(1)
    f1 = (2 * right / counts)[confusion.sum(1) > 0]  # of the classes that are there
    accuracy = right.sum().item() / len(dataset)
    metrics = {"loss": loss, "accuracy": accuracy, "macro_f1": f1.mean().item()}
    metrics |= retrieval_recall(image_features, text_features, caption_ids)
    seconds = time.perf_counter() - start
    metrics |= {"seconds": seconds, "pairs_per_second": len(dataset) / seconds}
    return metrics, confusion, image_features, text_features


def best_line(history):
    """Of val's lines of metrics.jsonl the best one, by what people do: classify and search."""
    keys = ("accuracy", "image_to_text_r5", "text_to_image_r5")
    return max(history, key=lambda line: sum(line[key] for key in keys))


# ---- Training ------------------------------------------------------------------------------------
@dataclass
class State:
    """A run: what training changes and last.pt keeps, and what it needs besides."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales in float16 only
    precision: torch.dtype
    batch_size: int  # pairs a step, of all processes
    steps: int  # an epoch
    chunk: int  # pairs that this process encodes at a time
    made_from: dict  # what has to be the same to go on: constants and rows
    signals: list = field(default_factory=list)  # received since training began
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    epoch: int = 0  # 0: the evaluation before training; NUM_EPOCHS + 1: all are done
    step: int = 0  # of the epoch, done
    loss_sum: float | torch.Tensor = 0.0  # of these; a tensor until it is waited for
    finished: bool = False


HYPERPARAMETERS = """MODEL NUM_EPOCHS LR WARMUP MAX_GRAD_NORM MIN_CROP SEED
    CLASS_PROMPT_SHARE PROMPTS CLASS_NAMES"""  # what makes a training what it is
PROGRESS = ("history", "epoch", "step", "loss_sum", "finished")


def new_state(model, splits):
    """The run as it starts, on the model's device."""
    pairs = min(BATCH_SIZE, len(splits["train"]))
    share = pairs // WORLD_SIZE
    if share == 0:
        sys.exit(f"{WORLD_SIZE} processes cannot share a batch of {pairs}: start fewer")
    batch_size = share * WORLD_SIZE
    made_from = {name: globals()[name] for name in HYPERPARAMETERS.split()}
    made_from["BATCH_SIZE in equal shares"] = batch_size
    for split, dataset in splits.items():
        rows = repr(dataset.records).encode("utf-8", "replace")
        made_from[f"the rows of {split}"] = hashlib.sha256(rows).hexdigest()[:12]
    precision = choose_precision(model.mean.device)
    scaler = torch.amp.GradScaler(model.mean.device.type, enabled=precision == torch.float16)
    steps, chunk = len(splits["train"]) // batch_size, min(CHUNK_SIZE or share, share)
    optimizer = make_optimizer(model)
    return State(model, optimizer, scaler, precision, batch_size, steps, chunk, made_from)


def check_finite(state):
    """The epoch's mean loss so far. Waits for the device; stops at a broken loss or weight."""
    weights = torch.nn.utils.get_total_norm(state.model.parameters())
    if not math.isfinite(state.loss_sum + weights):
        where = f"by step {state.step} of epoch {state.epoch}"
        advice = f"lower LR and set another OUTPUT_PATH; {OUTPUT_PATH} holds the last good weights"
        sys.exit(f"the loss or a weight is not finite {where}: {advice}")
    state.loss_sum = float(state.loss_sum)
    return state.loss_sum / max(1, state.step)


def save_run(state):
    """Write last.pt, from which the run goes on exactly."""
    check_finite(state)
    if RANK == 0:
        saved = {name: getattr(state, name) for name in ("made_from", *PROGRESS)}
        for name in ("model", "optimizer", "scaler"):
            saved[name] = getattr(state, name).state_dict()
        with atomic_write(f"{OUTPUT_PATH}/last.pt") as file:
            torch.save(saved, file)


def resume(state):
    """Go on from last.pt, where there is one. Stops where it is of another training."""
    path = f"{OUTPUT_PATH}/last.pt"
    if not os.path.exists(path):
        return
    instead = "or set another OUTPUT_PATH to start anew"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        old, new = saved["made_from"], state.made_from
        changed = [name for name in new | old if old.get(name) != new.get(name)]
        changes = "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in changed)
        if changes:
            sys.exit(f"{path} is of another training: {changes}. Set it back to go on, {instead}")
        for name in PROGRESS:
            setattr(state, name, saved[name])
        for name in ("model", "optimizer", "scaler"):
            if saved[name]:  # a scaler that scales nothing has saved nothing
                getattr(state, name).load_state_dict(saved[name])
    except Exception as error:
        sys.exit(f"{path} is no checkpoint of this script ({error!r:.300}). Move it, {instead}")
    if not state.finished:
        say(f"Going on from {path}: epoch {state.epoch}, of which {state.step} steps are done.")


def train_epoch(state, dataset, bar):
    """Train from step state.step to the epoch's end, saving every 10 minutes → metrics of it."""
    first, start = state.step, time.perf_counter()
    saved = start
    for batch in epoch_batches(dataset, state.epoch, state.batch_size, first):
        step = (state.epoch - 1) * state.steps + state.step
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, NUM_EPOCHS * state.steps)
        state.loss_sum = state.loss_sum + train_step(state, batch)
        state.step += 1
        bar.update()
        if state.step % 20 == 0:
            bar.set_postfix(loss=f"{check_finite(state):.3f}")
        if time.perf_counter() > saved + 600:
            save_run(state)
            saved = time.perf_counter()
        stop_if_signalled(state)
    metrics = {"train_loss": check_finite(state)}
    if state.step > first:  # else it was interrupted after the last step
        metrics["seconds"] = time.perf_counter() - start
        metrics["pairs_per_second"] = (state.step - first) * state.batch_size / metrics["seconds"]
    return metrics


def log(state, split, epoch, metrics):
    """Add a line to metrics.jsonl and to what is printed."""
    state.history.append({"epoch": epoch, "split": split} | metrics)
    write_lines("metrics.jsonl", state.history)
    scores = f"{metrics['loss']:7.3f} {metrics['accuracy']:8.3f} {metrics['macro_f1']:8.3f}"
    for way in DIRECTIONS:
        scores += "     " + " ".join(f"{metrics[f'{way}_r{k}']:.3f}" for k in (1, 5, 10))
    say(f"{epoch:5} {split:5} {scores} {metrics['pairs_per_second']:9.1f}")


def train(state, splits):
    """Evaluate, then train and evaluate epoch by epoch, keeping the best weights and the last."""
    head = "epoch split    loss accuracy macro-F1"
    say(f"\n{head} image→text R@1, 5, 10 text→image R@1, 5, 10   pairs/s")
    done = max(0, state.epoch - 1) * state.steps + state.step
    with tqdm(desc="training", total=NUM_EPOCHS * state.steps, initial=done, **BAR) as bar:
        while state.epoch <= NUM_EPOCHS:
            trained = train_epoch(state, splits["train"], bar) if state.epoch > 0 else {}
            metrics, *_ = evaluate(state, splits["val"])
            log(state, "val", state.epoch, metrics | trained)  # with training's time
            if best_line(state.history) is state.history[-1] and RANK == 0:
                weights = {name: w.cpu() for name, w in state.model.state_dict().items()}
                with atomic_write(f"{OUTPUT_PATH}/best.pt") as file:
                    torch.save(weights, file)
            state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
            save_run(state)


def finish(state, splits):
    """Evaluate the start and best.pt, and draw them; where it is interrupted, all of it again."""
    barrier()  # best.pt is written
    val, best_file, views = splits["val"], f"{OUTPUT_PATH}/best.pt", []
    for weights in (MODEL, best_file):
        state.model.load_state_dict(load_clip(weights).state_dict())
        views.append(evaluate(state, val)[1:])
    best_epoch = best_line(state.history)["epoch"]
    if RANK == 0:
        draw_curves(state.history, best_epoch)
        draw_confusion(val.class_labels, [confusion for confusion, *_ in views])
        draw_retrieval(val, [features for _, *features in views])
    if "test" in splits:
        log(state, "test", best_epoch, evaluate(state, splits["test"])[0])
    stop_if_signalled(state)
    state.finished = True  # which is all that last.pt is for now: it gets best.pt's weights
    save_run(state)
    say(f"\nThe best weights, of epoch {best_epoch}, are in {best_file}. To use them:")
    say(f'    model, preprocess = clip.load("{best_file}")')


# ---- Processes and signals -----------------------------------------------------------------------
def prepare_machine():
    """Set up memory and output, meet the other processes, if any → this one's device."""
    # Never return freed memory to the system: to get it anew was a third of a step of 256 pairs.
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink
        mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large block
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's own
            # Windows' code pages lack most letters; a pipe, or a log, is to be read as it grows.
            stream.reconfigure(errors="replace", line_buffering=True)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # leaves that picture out
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each length of captions
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))  # decoding may take hours
        all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory now, not at the peak
    if cuda:  # half a GB for what takes memory beside torch; else Windows' driver spills into RAM
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(max(0.0, (free - 2**29) / total))
    return device


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """The sum, or another operation, of all processes' tensors, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def all_gather(share):
    """[b, …] of each process → [B, …] of all, by rank. Sums with zeros are exact."""
    shares = share.new_zeros(WORLD_SIZE, *share.shape)
    shares[RANK] = share
    return all_reduce(shares).flatten(0, 1)


def barrier():
    """Return when all processes are here; a signal is heard meanwhile."""
    if WORLD_SIZE > 1:
        meeting = dist.all_reduce(torch.zeros(1), async_op=True)
        while not meeting.is_completed():
            time.sleep(0.02)
        try:
            meeting.wait()
        except RuntimeError:
            sys.exit("another process has ended; its message says why")


def in_turns(work, turn, turns):
    """work() in every process: first in those whose turn is 0, then 1, and so on."""
    for now in range(turns):
        if now == turn:
            result = work()
        barrier()
    return result


def leave(number, _frame):
    """End a run in which nothing is half done. SystemExit is no Exception: nothing swallows it."""
    os.write(2, b"Stopped before training: there was nothing to save.\n")
    sys.exit(128 + number)


def stop_if_signalled(state):
    """End the run, saved, where one of its processes was told to by Ctrl-C or SIGTERM."""
    told = int(all_reduce(torch.tensor(max(state.signals, default=0)), dist.ReduceOp.MAX))
    if told:
        if state.epoch <= NUM_EPOCHS:  # later all is saved, and the model has other weights
            save_run(state)
        say(f"Stopped and saved in {OUTPUT_PATH}/last.pt: the same command goes on from there.")
        barrier()
        sys.exit(128 + told)


def say(line):
    """Print above the progress bar, from the first process only."""
    if RANK == 0:
        tqdm.write(line)


def brief(error, limit=300):
    """An error, or what caused it, in one line."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit].rstrip(".")


# ---- Files and constants -------------------------------------------------------------------------
@contextmanager
def atomic_write(path, temporary=None, unless=lambda: False):
    """A file to write, which on success replaces path at once; it is dropped where unless()."""
    temporary = temporary or f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not unless():
            os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save hides the one behind the other
        sys.exit(f"cannot write {path}: {error.__context__ or error}; what it held is untouched")
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def write_lines(name, rows):
    """A JSON object a line, into that file of OUTPUT_PATH, by the first process."""
    if RANK == 0:
        with atomic_write(f"{OUTPUT_PATH}/{name}") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


RULES = {  # constants: (what each must be, whether it is); the last makes its folders
    "IMAGE_PATH": ("a folder that is there", os.path.isdir),
    "JSON_PATH": ("a file's path", lambda v: os.path.isfile(v.replace("{split}", "train"))),
    "MODEL": ("text in quotes", lambda v: isinstance(v, str)),
    "BATCH_SIZE": ("a whole number from 2 on", lambda v: type(v) is int and v >= 2),
    "NUM_EPOCHS": ("a whole number from 0 on", lambda v: type(v) is int and v >= 0),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "WARMUP CLASS_PROMPT_SHARE": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "MAX_GRAD_NORM": ("a number above 0", lambda v: v > 0),
    "MIN_CROP": ("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "SEED": ("a whole number from 0 to 2**31", lambda v: type(v) is int and 0 <= v <= 2**31),
    "PROMPTS": ("texts with {} in each", lambda v: v and all(text.count("{}") for text in v)),
    "CLASS_NAMES": ("a dictionary of texts", lambda v: all(text.strip() for text in v.values())),
    "CHUNK_SIZE": ("None or a whole number", lambda v: v is None or type(v) is int and v >= 1),
    "SAMPLE_RUN": ("a dictionary", lambda v: isinstance(v, dict)),
    "OUTPUT_PATH CACHE_PATH": ("a folder", lambda v: os.makedirs(v, exist_ok=True) is None),
}


def check_constants():
    """Take the sample's where there is no dataset. Stop at a constant that cannot work."""
    constants = globals()
    if IMAGE_PATH == "data/indo-fashion" and not os.path.isdir(IMAGE_PATH):
        say("IndoFashion is not in data/indo-fashion. To get it, see data/README.md or")
        say("www.kaggle.com/datasets/validmodel/indo-fashion-dataset. Running the bundled sample,")
        say("whose constants are those in SAMPLE_RUN.")
        constants.update(SAMPLE_RUN if isinstance(SAMPLE_RUN, dict) else {})
    if isinstance(PROMPTS, str):  # a forgotten comma
        constants["PROMPTS"] = (PROMPTS,)
    for names, (wanted, is_right) in RULES.items():
        for name in names.split():
            with suppress(Exception):  # of another type
                if is_right(constants[name]):
                    continue
            sys.exit(f"{name} is {constants[name]!r}; it must be {wanted}")


# ---- Pictures ------------------------------------------------------------------------------------
def save_figure(name, figure):
    with atomic_write(f"{OUTPUT_PATH}/{name}") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently")  # lacks some letters
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight", pad_inches=0.15)


def draw_curves(history, best_epoch):
    """curves.png: the epochs' lines of metrics.jsonl."""
    shares = [f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5)]
    panels = {"loss": ["train_loss", "loss"], "classes": ["accuracy", "macro_f1"], "search": shares}
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for panel, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            lines = [line for line in history if key in line]
            epochs, values = [line["epoch"] for line in lines], [line[key] for line in lines]
            panel.plot(epochs, values, marker=".", label=key)
        panel.axvline(best_epoch, color="grey", linestyle=":", label="best epoch")
        panel.set(title=title, xlabel="epoch (0 is before training)")
        panel.set_ylim((None, None) if title == "loss" else (-0.03, 1.03))
        panel.legend()
        panel.grid(alpha=0.3)
        panel.locator_params("x", integer=True)
    save_figure("curves.png", figure)


def draw_confusion(class_labels, confusions):
    """confusion.png: of each class, the percentages taken for each class, before and after.

    Of more than 60 classes, those with the most pictures.
    """
    shown = confusions[0].sum(1).topk(min(60, len(class_labels))).indices.sort().values
    labels = [class_labels[i].replace("_", " ") for i in shown]
    names = [textwrap.fill(label, 30, max_lines=2) for label in labels]
    side = max(2.5, 0.32 * len(names))  # inches
    margin = 0.8 + 0.08 * max(len(line) for name in names for line in name.split("\n"))
    figure = Figure(figsize=(2 * side + margin, side + margin + 0.3), layout="constrained")
    panels, whens = figure.subplots(1, 2, sharey=True), ("before training", "after")
    for panel, confusion, when in zip(panels, confusions, whens, strict=True):
        shares = (confusion / confusion.sum(1, keepdim=True).clamp(min=1))[shown][:, shown]
        panel.imshow(shares.numpy(), cmap="Greens", vmin=0, vmax=1)
        for true, predicted in shares.ge(0.005).nonzero().tolist():
            share = float(shares[true, predicted])
            style = {"color": "white" if share > 0.5 else "black", "fontsize": 8}
            panel.text(predicted, true, f"{100 * share:.0f}", ha="center", va="center", **style)
        accuracy = confusion.diag().sum() / confusion.sum()
        panel.set(title=f"{when}: {accuracy:.0%} right", xlabel="predicted")
        panel.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), names, parse_math=False)
    panels[0].set_ylabel("class, and the % of its pictures")
    save_figure("confusion.png", figure)


def picture_strip(dataset, rows, query):
    """The rows' pictures side by side, uint8 [H, W, 3]: dark frame: same caption; light: class."""
    edge = max(2, dataset.pixels.shape[-1] // 16)
    strip = []
    for row in rows:
        color = (165, 220, 170) if dataset.labels[row] == dataset.labels[query] else "white"
        if dataset.caption_ids[row] == dataset.caption_ids[query]:
            color = (20, 130, 50)
        picture = to_pil_image(dataset.pixels[dataset.cache_rows[row]])
        picture = pil_to_tensor(ImageOps.expand(picture, edge, color))
        strip.append(F.pad(picture, (0, edge), value=255))
    return torch.cat(strip, 2).permute(1, 2, 0).numpy()


def draw_retrieval(dataset, features):
    """retrieval.png: the pictures found for eight captions at most, before training and after."""
    order = shuffled(len(dataset)).tolist()
    titled_last = sorted(order, key=lambda row: dataset.records[row].titled)
    queries = list({int(dataset.caption_ids[row]): row for row in titled_last}.values())[-8:]
    figure = Figure(figsize=(13.2, 1.45 * len(queries) + 0.5), layout="constrained")
    axes = figure.subplots(len(queries), 2, squeeze=False)
    for query, pair in zip(queries, axes, strict=True):
        for panel, when, (images, texts) in zip(pair, ("before", "after"), features, strict=True):
            found = top_k(texts[dataset.caption_ids[query]][None], images, 5)[0].tolist()
            panel.imshow(picture_strip(dataset, found, query))
            panel.set_frame_on(False)
            panel.set(xticks=[], yticks=[], ylabel=when)
        title = textwrap.fill(dataset.records[query].caption, 70, max_lines=2)
        pair[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    figure.supxlabel("dark frame: the caption's own picture; light: its class", fontsize=10)
    save_figure("retrieval.png", figure)


# ---- The whole run -------------------------------------------------------------------------------
def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    device = prepare_machine()
    check_constants()
    turn = (RANK > 0) + (LOCAL_RANK > 0)  # the first downloads, then each machine's first
    model = in_turns(lambda: load_clip(MODEL), turn, 3).to(device)
    resolution = model.visual.input_resolution
    splits = in_turns(lambda: load_splits(resolution), int(LOCAL_RANK > 0), 2)
    state = new_state(model, splits)
    resume(state)
    if state.finished:
        say(f"This run is finished: {OUTPUT_PATH} has its weights. For another, set OUTPUT_PATH.")
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: state.signals.append(number))
    where = f"{str(state.precision)[6:]} on {WORLD_SIZE} × {device.type}"
    say(f"{MODEL} in {where}, {state.chunk} pairs at a time; output in {OUTPUT_PATH}")
    say(f"{NUM_EPOCHS} epochs of {state.steps} steps of {state.batch_size} pairs")
    train(state, splits)
    finish(state, splits)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

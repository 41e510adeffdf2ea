"""Fine-tune OpenAI's CLIP on your own images and captions: one file, made for IndoFashion.

    python indofashion_clip.py
    torchrun --nproc_per_node=4 indofashion_clip.py  # on four GPUs

Edit the constants first, or run it unchanged: without IndoFashion in data/indo-fashion, a tiny CLIP
learns the bundled sample from scratch, drawings of 15 kinds of clothes. That takes a minute on two
CPU cores, and then it classifies 9 of 10 correctly (chance: 1 in 15).

Input: a folder of images and a file of rows, as JSON Lines, a JSON array or CSV, for train and, if
you have them, val and test: {"image_path": "a/1.jpg", "product_title": "Red saree", "class_label":
"saree"}. Title and class are optional, and an image may have several titles, in rows or a list.
Output: outputs/best.pt, which clip.load can read.

Shapes: B pairs of an image and a text in a batch, b of them on this process; N images, C distinct
captions and K classes in a split; D the width of an embedding; R the side of an image in pixels.
"""

import csv
import ctypes
import functools
import hashlib
import html
import importlib.util
import io
import json
import math
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, pairwise, product
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset
from torchvision.transforms.functional import center_crop, pil_to_tensor, to_pil_image
from tqdm import tqdm

try:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pkg_resources is deprecated")
        import clip
    _ = clip.tokenize, clip.model.CLIP
except Exception as error:  # another package of that name may raise anything
    found = getattr(importlib.util.find_spec("clip"), "origin", "nothing")
    advice = "rename that file or uninstall that package, then: pip install -r requirements.txt"
    sys.exit(f"'import clip' finds {found}, not OpenAI's CLIP ({error!r:.200}): {advice}")

# ---- Constants: what a user edits ----------------------------------------------------------------
IMAGE_PATH = "data/indo-fashion"  # the folder that image_path in a row is relative to
JSON_PATH = "data/indo-fashion/{split}_data.json"  # {split} stands for train, val and test
OUTPUT_PATH = "outputs"  # weights, metrics and figures; one per run
CACHE_PATH = "data/cache"  # decoded images, 150 KB each at 224 pixels; on a fast disk

MODEL = "ViT-B/32"  # or another of OpenAI's names, a file, or a repository of the Hugging Face hub
BATCH_SIZE = 256  # pairs per step: the more, the more negatives for each pair
NUM_EPOCHS = 6  # people stop at 3 to 10: CLIP starts close and overfits soon
LR = 1e-5  # the peak; 5e-6 to 3e-5 are usual, and 5e-5 is reported to forget
WARMUP = 0.1  # the fraction of the steps in which the learning rate rises to LR
MAX_GRAD_NORM = 1.0  # the gradient's norm is clipped to it: one odd batch does no harm
CLASS_WEIGHT = 1.0  # of the class loss beside the caption loss; 0 learns captions only
MIN_CROP = 1.0  # the smallest random crop, as a fraction of the side; 1 does not crop
SEED = 0  # the same seed gives the same order, augmentation and, on a CPU, weights

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
CHUNK_SIZE = None  # pairs encoded at a time; None: as many as fit the free memory

SAMPLE_RUN = {  # the run without a dataset: these replace the constants above
    "IMAGE_PATH": "data/sample",
    "JSON_PATH": "data/sample/{split}_data.json",
    "OUTPUT_PATH": "outputs/sample",
    "MODEL": "tiny",
    "BATCH_SIZE": 32,
    "NUM_EPOCHS": 60,
    "LR": 1e-3,
    "MIN_CROP": 0.95,
}

# ---- Set by torchrun -----------------------------------------------------------------------------
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on its machine
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
BAR = {"leave": False, "disable": True if RANK > 0 else None}  # None: no bar in a log file


# ---- Model ---------------------------------------------------------------------------------------
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]


def load_clip(name):
    """CLIP in float32 and, for the RN models' batch norm, in eval mode; name: as MODEL above."""
    try:
        if name == "tiny":
            torch.manual_seed(SEED)
            image = 64, 2, 128, 16  # pixels, layers, width, patch
            text = 77, 49408, 128, 2, 2  # tokens, vocabulary, width, heads, layers
            model = clip.model.CLIP(64, *image, *text)  # 64: the width of the embeddings
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


def pin(tensor):
    """The tensor in pinned memory, from which a GPU copies while the host goes on."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def to_device(tensor, device):
    return pin(tensor).to(device, non_blocking=True)


def attention(queries_keys_values, num_sequences, causal):
    """Heads of 64 over sequences of one length, [S · L, 3 · width] → [S · L, width]."""
    heads = queries_keys_values.shape[1] // (3 * 64)
    parts = queries_keys_values.view(num_sequences, -1, 3, heads, 64).unbind(2)
    queries, keys, values = (part.transpose(1, 2) for part in parts)  # [S, heads, L, 64] each
    if queries.is_cuda:
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)
    else:  # plain products: a step in bfloat16 takes a sixth less time than with the fused ones
        scores = (queries / 64**0.5) @ keys.transpose(2, 3)
        if causal:
            scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
        mixed = scores.softmax(-1) @ values
    return mixed.transpose(1, 2).reshape(len(queries_keys_values), -1)


def run_blocks(transformer, tokens, attend, kept):
    """CLIP's residual attention blocks on packed tokens [T, width] → the rows `kept` of the result.

    attend: queries, keys and values [T, 3 · width] → [T, width]. The last block computes only the
    kept rows. QuickGELU, h · sigmoid(1.702 h), is silu(1.702 h) / 1.702; both factors go into
    weights, which have fewer elements than the activations.
    """
    for block in transformer.resblocks:
        attn, ln_2, mlp = block.attn, block.ln_2, block.mlp
        mixed = attend(F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias))
        if block is transformer.resblocks[-1]:
            tokens, mixed = tokens.index_select(0, kept), mixed.index_select(0, kept)
        tokens = tokens + attn.out_proj(mixed)
        scaled = F.layer_norm(tokens, tokens.shape[1:], ln_2.weight * 1.702, ln_2.bias * 1.702)
        hidden = F.silu(F.linear(scaled, mlp.c_fc.weight, mlp.c_fc.bias * 1.702))
        tokens = tokens + F.linear(hidden, mlp.c_proj.weight / 1.702, mlp.c_proj.bias)
    return tokens


def image_tower(visual, images):
    """The same as visual(images): [B, 3, R, R] → [B, D]; one product embeds all patches."""
    batch, side = len(images), visual.conv1.kernel_size[0]  # of a patch
    grid = images.shape[-1] // side
    patches = images.view(batch, 3, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    tokens = F.linear(patches.reshape(batch, grid**2, -1), visual.conv1.weight.flatten(1))
    class_token = visual.class_embedding.expand(batch, 1, -1)
    tokens = visual.ln_pre(torch.cat([class_token, tokens], 1) + visual.positional_embedding)
    class_tokens = torch.arange(0, batch * tokens.shape[1], tokens.shape[1], device=images.device)
    attend = functools.partial(attention, num_sequences=batch, causal=False)
    tokens = run_blocks(visual.transformer, tokens.flatten(0, 1), attend, class_tokens)
    return visual.ln_post(tokens) @ visual.proj


def text_tower(model, tokens):
    """The same as model.encode_text(tokens): int32 [C, 77] on the CPU → [C, D], without padding.

    The linear layers see only the captions' own tokens; attention, which is causal, pads them to
    the longest caption.
    """
    lengths = tokens.argmax(1) + 1  # the end token has the highest number
    longest, device = int(lengths.max()), model.mean.device
    inside = torch.arange(longest) < lengths[:, None]  # [C, longest]
    slots = to_device(inside.flatten().nonzero().squeeze(1), device)
    words = to_device(tokens[:, :longest][inside], device)
    end_tokens = to_device(lengths.cumsum(0) - 1, device)

    def attend(packed):
        padded = packed.new_zeros(inside.numel(), packed.shape[1]).index_copy_(0, slots, packed)
        return attention(padded, len(tokens), causal=True).index_select(0, slots)

    # F.embedding: positions repeat, and indexing accumulates their gradients in no fixed order.
    positions = F.embedding(slots % longest, model.positional_embedding)
    embedded = model.token_embedding(words) + positions
    tokens = run_blocks(model.transformer, embedded, attend, end_tokens)
    return model.ln_final(tokens) @ model.text_projection


def random_crop(images, draws):
    """Images [B, 3, R, R], each cropped by its draws [B, 3], from 0 to 1, and resized to R."""
    side, resolution = 1 - (1 - MIN_CROP) * draws[:, 0], images.shape[-1]
    center = (draws[:, 1:3] * 2 - 1) * (1 - side)[:, None]  # [B, 2], x and y, from -1 to 1
    pixel = torch.arange(resolution, device=images.device)
    steps = (2 * pixel + 1) / resolution - 1  # the pixels' centers, from -1 to 1
    x, y = (center[:, :, None] + side[:, None, None] * steps).unbind(1)  # [B, R] each
    shape = len(images), resolution, resolution
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], -1)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def encode_images(model, precision, pixels, draws=None):
    """Pixels uint8 [B, 3, R, R] → image_features float32 [B, D] of length 1; cropped by draws."""
    device = model.mean.device
    images = to_device(pixels, device).float()
    if draws is not None and MIN_CROP < 1:
        images = random_crop(images, to_device(draws, device))
    images = torch.addcmul(-model.mean / model.std, images, 1 / (255 * model.std)).to(precision)
    is_vit = hasattr(model.visual, "transformer")
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
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
    temperature. Pairs of one caption need no soft targets: as their text features are equal, loss
    and gradients are those of targets shared equally among them.
    """
    logits_per_image = logit_scale.exp() * image_features @ text_features.T  # [B, B]
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_per_image = F.cross_entropy(logits_per_image, targets)
    return (loss_per_image + F.cross_entropy(logits_per_image.T, targets)) / 2


class Parts(NamedTuple):
    """Which images of a whole batch take part in which loss, on the model's device."""

    titled: torch.Tensor  # int64, the indices of the images with a caption
    labelled: torch.Tensor  # int64, the indices of those with a class
    classes: torch.Tensor  # int64, the labelled ones' classes, as rows of the batch's prompts


def batch_losses(image_features, text_features, prompt_features, parts, logit_scale):
    """The caption loss of the titled images and the class loss of the labelled ones: float32 [2].

    The features of a batch's B images, B texts and K classes are [B, D], [B, D] and [K, D]. Each
    loss is a mean over its images, or 0 where the batch has none. The class loss is a loss of its
    own: prompts among the captions would be wrong answers for the titled images of their class.
    """
    caption_loss = class_loss = 0 * logit_scale
    if len(parts.titled):
        titled = (
            features.index_select(0, parts.titled) for features in (image_features, text_features)
        )
        caption_loss = clip_loss(*titled, logit_scale)
    if len(parts.labelled):
        labelled = image_features.index_select(0, parts.labelled)
        class_loss = F.cross_entropy(
            logit_scale.exp() * labelled @ prompt_features.T, parts.classes
        )
    return torch.stack([caption_loss, class_loss])


def total_losses(losses, parts):
    """Float32 [2, 2] to add up over batches: each loss times its images, and these images."""
    images = torch.stack([losses.new_full((), len(indices)) for indices in parts[:2]])
    return torch.stack([losses * images, images])


def mean_losses(totals):
    """{"loss": …} of added totals, and both parts of it where there are both."""
    totals, images = totals.tolist()
    caption_loss, class_loss = (a / max(1, b) for a, b in zip(totals, images, strict=True))
    parts = {"caption_loss": caption_loss, "class_loss": class_loss} if all(images) else {}
    return {"loss": caption_loss + CLASS_WEIGHT * class_loss} | parts


def in_chunks(state, encode, *inputs):
    """encode(model, precision, *inputs) → features [B, D], state.chunk rows at a time.

    If all rows fit one chunk, this is a plain call. Else only the features are kept, and backward()
    encodes each chunk again: GradCache (Gao et al. 2021, arXiv 2101.06983).
    """

    def encode_chunk(_, *rows):
        return encode(state.model, state.precision, *rows)

    if len(inputs[0]) <= state.chunk:
        return encode_chunk(None, *inputs)
    # The reentrant kind builds no graph before backward(): the peak of memory on a CPU was an
    # eighth lower. It needs an input with a gradient: logit_scale is passed only for that.
    how = {"use_reentrant": True, "preserve_rng_state": False}
    recompute = functools.partial(checkpoint, encode_chunk, state.model.logit_scale, **how)
    return torch.cat(list(map(recompute, *(rows.split(state.chunk) for rows in inputs))))


def gather(own):
    """[b, D] of this process → [B, D] of all, where the others' features are constants."""
    if WORLD_SIZE == 1:
        return own
    return all_gather(own.detach()).slice_scatter(own, 0, RANK * len(own), (RANK + 1) * len(own))


def forward_backward(state, batch):
    """Both losses of all B images, [2]; gradients of this process's share, to be summed."""
    model, prompt_features = state.model, None
    image_features = gather(in_chunks(state, encode_images, batch.pixels, batch.draws))
    captions = in_chunks(state, encode_texts, batch.tokens)
    text_features = gather(F.embedding(to_device(batch.inverse, captions.device), captions))
    if len(batch.prompts):
        prompt_features = gather(in_chunks(state, encode_texts, batch.prompts))[: batch.num_classes]
    parts = Parts(*(to_device(part, captions.device) for part in batch.parts))
    losses = batch_losses(image_features, text_features, prompt_features, parts, model.logit_scale)
    caption_loss, class_loss = losses.unbind()
    state.scaler.scale(caption_loss + CLASS_WEIGHT * class_loss).backward()
    return losses.detach()


def train_step(state, batch):
    """One optimizer step → both losses [2] of the batch: reading them waits for the device."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    losses = forward_backward(state, batch)
    if WORLD_SIZE > 1:  # in one exchange; the activations, which took more memory, are gone
        model.logit_scale.grad /= WORLD_SIZE  # the loss's own: each process has all of it already
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        total = all_reduce(torch.nn.utils.parameters_to_vector(gradients))
        torch.nn.utils.vector_to_parameters(total, gradients)
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(max=math.log(100))  # as the CLIP paper does, for stability
    return losses


def make_optimizer(model):
    """Adam with the betas and eps of CLIP's ViTs. Weight decay changed nothing measurable."""
    settings = {"betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
    return torch.optim.Adam(model.parameters(), lr=0.0, **settings)  # train_epoch sets the rate


def learning_rate(step, total_steps):
    """The rate of a step from 0: a linear warm-up to LR, then a cosine, 0 at total_steps."""
    warmup_steps = max(1, round(WARMUP * total_steps))
    if step < warmup_steps:
        return LR * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return LR * 0.5 * (1 + math.cos(math.pi * progress))


# ---- Training loop -------------------------------------------------------------------------------
@dataclass
class State:
    """A run: what training changes and last.pt keeps, and what it needs besides."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales in float16 only
    precision: torch.dtype
    batch_size: int  # pairs per step, of all processes
    steps_per_epoch: int
    chunk: int  # pairs that this process encodes at a time
    fingerprint: dict  # the constants and rows that have to stay the same to go on
    signals: list = field(default_factory=list)  # received since training began
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    epoch: int = 0  # 0: the evaluation before training; NUM_EPOCHS + 1: all are done
    step: int = 0  # steps of this epoch that are done
    totals: torch.Tensor = torch.zeros(2, 2)  # of these steps' losses; to read it waits
    finished: bool = False


def train_epoch(state, dataset, bar):
    """Train from step state.step to the epoch's end, saving every 10 minutes → its metrics."""
    first, begin = state.step, time.perf_counter()
    last_save, device = begin, state.model.mean.device
    for batch in epoch_batches(dataset, state.epoch, state.batch_size, first):
        step = (state.epoch - 1) * state.steps_per_epoch + state.step
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, NUM_EPOCHS * state.steps_per_epoch)
        state.totals = state.totals.to(device) + total_losses(train_step(state, batch), batch.parts)
        state.step += 1
        bar.update()
        if state.step % 20 == 0:
            bar.set_postfix(loss=f"{check_finite(state)['loss']:.3f}")
        if time.perf_counter() > last_save + 600:
            save_run(state)
            last_save = time.perf_counter()
        stop_if_signalled(state)
    metrics = {f"train_{name}": loss for name, loss in check_finite(state).items()}
    if state.step > first:  # else the run was interrupted after the epoch's last step
        pairs = (state.step - first) * state.batch_size
        metrics["train_pairs_per_second"] = pairs / (time.perf_counter() - begin)
    return metrics


def check_finite(state):
    """The epoch's mean_losses so far. Waits for the device; stops where a weight is not finite."""
    losses = mean_losses(state.totals)
    weights = torch.nn.utils.get_total_norm(state.model.parameters())
    if not math.isfinite(losses["loss"] + weights):
        place = f"by step {state.step} of epoch {state.epoch}"
        advice = f"lower LR and set another OUTPUT_PATH; {OUTPUT_PATH} holds the last good weights"
        sys.exit(f"the loss or a weight is not finite {place}: {advice}")
    return losses


def train(state, splits):
    """Evaluate, then train and evaluate epoch by epoch, keeping the best weights and the last."""
    columns = "epoch split    loss accuracy macro-F1 image→text R@1, 5, 10 text→image R@1, 5, 10"
    say(f"\n{columns}   pairs/s")
    done = max(0, state.epoch - 1) * state.steps_per_epoch + state.step
    save_best(state)  # the run may have been killed between last.pt and best.pt
    total = NUM_EPOCHS * state.steps_per_epoch
    with tqdm(desc="training", total=total, initial=done, **BAR) as bar:
        while state.epoch <= NUM_EPOCHS:
            trained = train_epoch(state, splits["train"], bar) if state.epoch > 0 else {}
            log(state, "val", state.epoch, evaluate(state, splits["val"]).metrics | trained)
            state.epoch, state.step, state.totals = state.epoch + 1, 0, torch.zeros(2, 2)
            save_run(state)
            save_best(state)


def save_best(state):
    """Write best.pt if the last epoch is the best; clip's names only, as clip.load is strict."""
    ended = state.step == 0 and state.history
    if ended and best_line(state.history) is state.history[-1] and RANK == 0:
        weights = {name: weight.cpu() for name, weight in state.model.state_dict().items()}
        with atomic_write(f"{OUTPUT_PATH}/best.pt") as file:
            torch.save(weights, file)


def best_line(history):
    """The best val line of metrics.jsonl, by the mean of accuracy and both recalls at 5."""
    keys = ("accuracy", "image_to_text_r5", "text_to_image_r5")  # those that the split has
    return max(history, key=lambda line: sum(line.get(key, 0.0) for key in keys))


def log(state, split, epoch, metrics):
    """Add a line to metrics.jsonl and to what is printed."""
    state.history.append({"epoch": epoch, "split": split} | metrics)
    write_lines("metrics.jsonl", state.history)

    def column(key, form):
        return format(metrics[key], form) if key in metrics else "-".rjust(int(form.split(".")[0]))

    text = column("loss", "7.3f") + column("accuracy", "9.3f") + column("macro_f1", "9.3f")
    for way in DIRECTIONS:
        text += "    " + "".join(column(f"{way}_r{k}", "6.3f") for k in (1, 5, 10))
    say(f"{epoch:5} {split:5} {text} {column('train_pairs_per_second', '9.1f')}")


def finish(state, splits):
    """Evaluate the start and best.pt, and draw them. If interrupted, all of it is repeated."""
    all_reduce(torch.zeros(1))  # best.pt is written
    state.optimizer = make_optimizer(state.model)  # drops the moments: nothing is trained any more
    best_file, best_epoch, results = f"{OUTPUT_PATH}/best.pt", best_line(state.history)["epoch"], []
    for weights in (MODEL, best_file):
        state.model.load_state_dict(load_clip(weights).state_dict())
        results.append(evaluate(state, splits["val"]))
    if RANK == 0:
        draw_curves(state.history, best_epoch)
        draw_confusion(splits["val"], results)
        draw_retrieval(splits["val"], results)
    if "test" in splits:
        log(state, "test", best_epoch, evaluate(state, splits["test"]).metrics)
    stop_if_signalled(state)
    state.finished = True  # last.pt says so, and holds best.pt's weights
    save_run(state)
    say(f"\nBest weights (epoch {best_epoch}): {best_file}. To use them:")
    say(f'    model, preprocess = clip.load("{best_file}")')


# ---- Evaluation ----------------------------------------------------------------------------------
DIRECTIONS = ("image_to_text", "text_to_image")


class Evaluation(NamedTuple):
    metrics: dict  # a line of metrics.jsonl
    predicted: torch.Tensor  # int64 [N], each image's class; empty where there are no classes
    image_features: torch.Tensor  # float32 [N, D]
    text_features: torch.Tensor  # float32 [C, D], of the captions


def top_k(queries, answers, count):
    """int64 [Q, count], the indices of the nearest answers [A, D] to each query [Q, D]."""
    count = min(count, len(answers))
    return torch.cat([(part @ answers.T).topk(count).indices for part in queries.split(1024)])


def retrieval_recall(image_features, text_features, pairs):
    """{"image_to_text_r1": the fraction of images whose nearest text is right, …}.

    pairs: int64 [P, 2], (image, caption), all that belong together: any of an image's captions is
    right for it, and any image of a caption. An image without a caption can be found by mistake.
    """
    images, captions = pairs.unbind(1)
    keys, count = captions * len(image_features) + images, len(image_features)
    queries = images.unique()
    texts_found = top_k(image_features[queries], text_features, 10)  # [titled images, 10]
    images_found = top_k(text_features, image_features, 10)  # [C, 10]
    caption = torch.arange(len(text_features), device=pairs.device)
    found = (texts_found * count + queries[:, None], caption[:, None] * count + images_found)
    recall = {}
    for way, found_keys in zip(DIRECTIONS, found, strict=True):
        hits = torch.isin(found_keys, keys)
        for k in (1, 5, 10):
            recall[f"{way}_r{k}"] = hits[:, :k].any(1).double().mean().item()
    return recall


def classification_scores(labels, predicted, num_classes):
    """{"accuracy", "macro_f1"} of int64 [n] each; the F1 is averaged over classes with images."""
    predicted, labels = predicted[labels >= 0], labels[labels >= 0]
    right = labels[predicted == labels].bincount(minlength=num_classes)
    truly = labels.bincount(minlength=num_classes)
    f1 = (2 * right / (truly + predicted.bincount(minlength=num_classes)))[truly > 0]
    return {"accuracy": right.sum().item() / len(labels), "macro_f1": f1.mean().item()}


def encode_all(state, encode, batches):
    """The features float32 [N, D] of all batches. Checks for a signal after each batch."""
    features = []
    for batch in batches:
        features.append(in_chunks(state, encode, batch))
        stop_if_signalled(state)
    return torch.cat(features)


@torch.no_grad()
def evaluate(state, dataset):
    """Zero-shot classification and retrieval on a split → Evaluation; every process does it all."""
    begin = time.perf_counter()
    images = load_ahead(lambda rows: pin(dataset[rows][0]), torch.arange(len(dataset)).split(256))
    image_features = encode_all(state, encode_images, images)
    text_features = encode_all(state, encode_texts, dataset.tokens.split(256))
    totals = torch.zeros(2, 2, device=image_features.device)
    for rows in shuffled(len(dataset)).split(state.batch_size):  # the file may be sorted by class
        parts, classes = dataset.parts(rows)
        texts = text_features[dataset.first_texts[rows]], text_features[dataset.prompts[classes, 0]]
        losses = batch_losses(image_features[rows], *texts, parts, state.model.logit_scale)
        totals += total_losses(losses, parts)
    metrics, predicted = mean_losses(totals), torch.empty(0, dtype=torch.int64)
    if (dataset.labels >= 0).any():
        class_features = F.normalize(text_features[dataset.prompts].mean(1), dim=-1)  # [K, D]
        predicted = top_k(image_features, class_features, 1).squeeze(1).cpu()
        metrics |= classification_scores(dataset.labels, predicted, len(class_features))
    text_features = text_features[: dataset.num_captions]
    if len(dataset.pairs):
        metrics |= retrieval_recall(image_features, text_features, dataset.pairs.to(totals.device))
    seconds = time.perf_counter() - begin
    metrics |= {"seconds": seconds, "pairs_per_second": len(dataset) / seconds}
    return Evaluation(metrics, predicted, image_features, text_features)


# ---- From here on: what prepares and keeps a run. A reader of CLIP's training can stop here ------
# ---- Data: rows → images and captions → batches --------------------------------------------------
class Example(NamedTuple):
    lines: tuple  # of its rows, from 1
    image_path: str
    captions: tuple  # distinct texts, maybe none
    class_name: str  # "" where there is none
    products: tuple  # all images of a product go to the same side of train and val


def clean(value):
    """Plain words, "" where there are none: entities resolved, white space collapsed."""
    text = html.unescape(str(value)) if isinstance(value, (str, int, float)) else ""
    text = " ".join(text.encode("utf-8", "ignore").decode("utf-8").split())
    nothing = ("n/a", "na", "nan", "none", "null", "#n/a", "-")
    return "" if text.lower() in nothing else text


def read_name(label):
    """A label as CLIP reads it, so that labels that read alike are one class."""
    return sys.intern(clean(label).replace("_", " ").lower().strip())


def class_prompts(class_name):
    """saree → ["a photo of a saree", …], one for each of PROMPTS."""
    names = {read_name(label): name for label, name in CLASS_NAMES.items()}
    return [prompt.replace("{}", names.get(class_name, class_name)) for prompt in PROMPTS]


def read_rows(path):
    """Yield (line, row) of JSON Lines, a JSON array or a CSV; row: a dict, or why it is none."""
    data = Path(path).read_bytes()
    utf_16 = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        sys.exit(f"{path}, line {line}: not UTF-8. Save the file as UTF-8 (Excel: CSV UTF-8)")
    return (read_json if re.match(r"\s*[\[{]", text) else read_csv)(text)


def read_json(text):
    """Yield the (line, row) of JSON text: an object per line, or an array in any layout."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,\[\]]*")
    broken = re.compile(r".[^\n{]*")  # ends where the next row may begin
    line, end = 1, 0
    while (start := between.match(text, end).end()) < len(text):
        line += text.count("\n", end, start)
        try:
            row, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            row, end = None, broken.match(text, start).end()
        yield line, row if isinstance(row, dict) else "not a JSON object"
        line += text.count("\n", start, end)


def read_csv(text):
    """Yield the (line, row) of CSV text; a first line sep=; is Excel's, and names the separator."""
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(text, newline=None)  # \r, which csv refuses, becomes \n
    header = next(lines, "")
    delimiter, sep = max(",;\t", key=header.count), re.match("sep=(.)", header, re.I)
    if sep:
        delimiter, header = sep[1], next(lines, "")
    reader = csv.reader(chain([header], lines), delimiter=delimiter)
    names = ["_".join(name.lower().split()) for name in next(reader, [])]
    for cells in reader:
        surplus = any(cells[len(names) :])  # such as a title with a comma and without quotes
        row = f"{len(cells)} cells for {len(names)} columns" if surplus else None
        if any(cells):
            yield reader.line_num + bool(sep), row or dict(zip(names, cells, strict=False))


def read_examples(path):
    """→ ([Example], one per image; [(line, why it is left out)]; the columns that there are)."""
    rows_of, skipped, columns = {}, [], {}
    for line, row in read_rows(path):
        reason, row = ("no image_path", row) if isinstance(row, dict) else (row, {})
        columns |= dict.fromkeys(row)
        image = row.get("image_path")
        if not isinstance(image, str) or not image.strip():
            skipped.append((line, reason))
            continue
        titles, label = row.get("product_title"), read_name(row.get("class_label"))
        captions = map(clean, titles if isinstance(titles, list) else [titles])
        about = line, tuple(filter(None, captions)), label, clean(row.get("product"))
        rows_of.setdefault(image.strip().replace("\\", "/"), []).append(about)
    examples = []
    for image, rows in rows_of.items():
        lines, *texts = zip(*rows, strict=True)
        captions, labels, products = (tuple(dict.fromkeys(filter(None, part))) for part in texts)
        if len(labels) > 1:
            reason = f"{image} has several classes: {', '.join(labels)}"
            skipped += [(line, reason) for line in lines]
        else:
            captions = tuple(dict.fromkeys(chain(*captions)))
            examples.append(Example(lines, image, captions, "".join(labels), products))
    if not examples:
        first = "line {}: {}".format(*min(skipped, default=(1, "it is empty")))
        names = f". Its columns are {', '.join(columns)}" if columns else ""
        sys.exit(f"{path}: no row has an image_path that can be used; {first}{names}")
    return examples, skipped, columns


def find_classes(examples):
    """The sorted names of the classes; [] if there is only one, with nothing to tell apart."""
    names = sorted({example.class_name for example in examples} - {""})
    same = {}
    for name in names:
        other = same.setdefault(class_prompts(name)[0].lower(), name)
        if other != name:
            sys.exit(f"CLASS_NAMES: the classes {other!r} and {name!r} get the same name")
    return names if len(names) > 1 else []


def hold_out(examples):
    """The indices of the examples held out for val: whole products, drawn by SEED.

    A twentieth of the images; of fewer than 2,000 a hundred, but at most a fifth.
    """
    count = max(1, len(examples) // 20, min(len(examples) // 5, 100))
    images_of, held_out = {}, set()
    for i, example in enumerate(examples):
        for name in example.products:
            images_of.setdefault(name, []).append(i)
    for first in shuffled(len(examples)).tolist():
        waiting = [first] if len(held_out) < count else []
        while waiting:  # an image brings its products, and they bring their images
            held_out.add(i := waiting.pop())
            waiting += chain(*(images_of.pop(name, ()) for name in examples[i].products))
    return held_out


def shuffled(count):
    """A permutation of range(count), int64 [count], that follows from SEED."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


def load_image(path, resolution):
    """An image as a viewer shows it, resized and cropped as CLIP does: uint8 [3, R, R]."""
    Image.init()
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # none that starts a program
    image = Image.open(path, formats=[kind for kind in kinds if kind in Image.OPEN])
    width, height = image.size
    if max(width, height) > 50 * min(width, height):  # would be resized to gigabytes
        raise ValueError(f"a strip of {width} × {height} pixels")
    image.draft(None, (2 * resolution, 2 * resolution))  # decodes a large JPEG at 1/2, 1/4 or 1/8
    image.load()  # raises where the file is damaged, which a second load() no longer does
    with suppress(Exception):  # a broken EXIF block
        image = ImageOps.exif_transpose(image)
    if (image.width > image.height) != (width > height):
        width, height = height, width
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    size = [resolution * side // min(width, height) for side in (width, height)]
    image = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return pil_to_tensor(center_crop(image, resolution)).contiguous()


def decode(path, resolution):
    """→ (the image's pixels, None), or (black ones, why it cannot be used)."""
    try:
        if not os.path.isfile(path):
            raise FileNotFoundError("there is no such file")
        return load_image(path, resolution), None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        black = torch.zeros(3, resolution, resolution, dtype=torch.uint8)
        return black, f"no image in {path}: {brief(error)}"


def write_cache(cache_file, paths, resolution):
    """Decode all images into a file: uint8 [N, 3, R, R], then [[row, why unusable], …] as JSON."""
    size, free = len(paths) * 3 * resolution**2, shutil.disk_usage(CACHE_PATH).free
    if size > free:
        needed = f"{CACHE_PATH} needs {size / 1e9:.1f} GB, has {free / 1e9:.1f} free"
        sys.exit(f"CACHE_PATH: {needed}. Old .u8 files there may be deleted")
    unusable = []
    with atomic_write(cache_file) as file, ThreadPoolExecutor() as threads:
        parts = (paths[start : start + 256] for start in range(0, len(paths), 256))
        work = functools.partial(decode, resolution=resolution)
        decoded = (result for part in parts for result in threads.map(work, part))
        for row, (pixels, reason) in enumerate(tqdm(decoded, "decoding", len(paths), **BAR)):
            file.write(pixels.numpy())
            if reason:
                unusable.append((row, reason))
        file.write(json.dumps(unusable).encode())


def open_cache(split, paths, resolution):
    """→ (pixels uint8 [N, 3, R, R], {row: why it is unusable}); decodes if need be.

    The file's name is a digest of what it was made from: a file that exists is valid, and two
    datasets never share one. It is memory-mapped: the system keeps in memory what it can.
    """
    digest = hashlib.sha256(Image.__version__.encode())
    for path in paths:
        digest.update(repr(path).encode("utf-8", "replace"))
        with suppress(OSError, ValueError):
            status = os.stat(path)
            facts = status.st_size, status.st_mtime_ns, os.access(path, os.R_OK)
            digest.update(b"%d %d %d" % facts)
    cache_file = f"{CACHE_PATH}/{split}-{resolution}-{digest.hexdigest()[:16]}.u8"
    if not os.path.exists(cache_file):
        with FileLock(f"{cache_file}.lock"):  # the other processes of this machine wait here
            if not os.path.exists(cache_file):
                write_cache(cache_file, paths, resolution)
    shape = len(paths), 3, resolution, resolution
    with open(cache_file, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        mapped = mmap.mmap(file.fileno(), math.prod(shape), access=mmap.ACCESS_READ)
        file.seek(len(mapped))
        pixels = torch.frombuffer(mapped, dtype=torch.uint8).view(shape)
        return pixels, dict(json.load(file))


def tokenize(texts):
    """→ (tokens int32 [T, 77] of the distinct texts, int64 [len(texts)], each text's row there).

    Texts are the same if CLIP reads the same tokens, whatever their capitals or what it cuts off.
    """
    # CLIP lower-cases after it resolves HTML entities, whose names are case-sensitive.
    spellings = list({text.lower(): text for text in texts}.values())
    row_of_tokens, row_of_text = {}, {}
    for start in range(0, len(spellings), 10_000):
        part = spellings[start : start + 10_000]
        for text, tokens in zip(part, clip.tokenize(part, truncate=True).int(), strict=True):
            key = tokens.numpy().tobytes().rstrip(b"\0")
            row_of_text[text.lower()] = row_of_tokens.setdefault(key, len(row_of_tokens))
    distinct = bytearray()
    for key in row_of_tokens:  # join() would hold all of them twice
        distinct += key.ljust(4 * 77, b"\0")
    tokens = torch.frombuffer(distinct, dtype=torch.int32).view(-1, 77)
    return tokens, torch.tensor([row_of_text[text.lower()] for text in texts])


class FashionDataset(Dataset):
    """Images and their texts: dataset[i] → (pixels uint8 [3, R, R], tokens int32 [77]).

    i may also be a list, a slice or a tensor of n indices: → ([n, 3, R, R], [n, 77]). The text is
    the image's first caption, or a class prompt where it has none; epoch_batches draws others.

    tokens: int32 [T, 77], of the C captions, then of class prompts. texts[i]: the rows of tokens of
    image i's captions or, where it is not titled, of its class's first prompt. prompts: int64
    [K, len(PROMPTS)], each class's. pairs: int64 [P, 2], (image, caption). labels: int64 [N], in
    class_names; -1 for none.
    """

    def __init__(self, usable, pixels, class_names):
        cache_rows, self.examples = zip(*usable, strict=True)
        self.cache_rows = torch.tensor(cache_rows)
        self.pixels, self.class_names = pixels, class_names
        number = {name: i for i, name in enumerate(class_names)}
        self.labels = torch.tensor([number.get(e.class_name, -1) for e in self.examples])
        captions = list(dict.fromkeys(chain(*(e.captions for e in self.examples))))
        prompts = [prompt for name in class_names for prompt in class_prompts(name)]
        self.tokens, rows = tokenize(captions + prompts)
        row_of = dict(zip(captions, rows.tolist(), strict=False))
        self.prompts = rows[len(captions) :].view(len(class_names), len(PROMPTS))
        self.num_captions = max(row_of.values(), default=-1) + 1
        self.titled = torch.tensor([bool(e.captions) for e in self.examples])
        first_prompts = self.prompts[self.labels, 0].tolist() if class_names else []
        self.texts = [
            list(dict.fromkeys(row_of[caption] for caption in e.captions)) or [first_prompts[i]]
            for i, e in enumerate(self.examples)
        ]
        self.first_texts = torch.tensor([texts[0] for texts in self.texts])
        pairs = [(i, t) for i, e in enumerate(self.examples) if e.captions for t in self.texts[i]]
        self.pairs = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)

    def parts(self, rows):
        """→ (the Parts of a batch of these images, the K classes that it has, int64 [K])."""
        titled = self.titled[rows].nonzero().squeeze(1)
        labels = self.labels[rows] if CLASS_WEIGHT else torch.full_like(rows, -1)
        labelled = (labels >= 0).nonzero().squeeze(1)
        classes, class_of = labels[labelled].unique(return_inverse=True)
        return Parts(titled, labelled, class_of), classes

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        rows = self.cache_rows[index]
        pixels = self.pixels.index_select(0, rows.flatten())
        return pixels.view(rows.shape + pixels.shape[1:]), self.tokens[self.first_texts[index]]


def say_what_is_missing(path, columns, examples, class_names):
    """Report a column that no row has, so that a misnamed one does not go unnoticed."""
    columns = f"{path} has the columns {', '.join(columns)}"
    titled = any(example.captions for example in examples)
    if not titled and not class_names:
        sys.exit(f"nothing to learn: no product_title and fewer than two classes; {columns}")
    if not titled:
        say(f"NO TITLES: no row has a product_title, so only class prompts are learned; {columns}")
    if not class_names:
        say(f"No classes: fewer than two in class_label, so only search is measured; {columns}")


def load_split(split, path, examples, skipped, resolution):
    """→ ([(cache row, Example)] of what is usable, all pixels, lines of skipped.jsonl)."""
    paths = [os.path.join(IMAGE_PATH, example.image_path) for example in examples]
    pixels, unusable = open_cache(split, paths, resolution) if paths else (None, {})
    usable = [(row, example) for row, example in enumerate(examples) if row not in unusable]
    skipped += [(line, why) for row, why in unusable.items() for line in examples[row].lines]
    skipped.sort()
    if len(skipped) > sum(len(example.lines) for _, example in usable):
        first = "line {}: {}".format(*skipped[0])
        sys.exit(f"{path}: most rows cannot be used; {first}. Check IMAGE_PATH and this file")
    captions = sum(len(example.captions) for _, example in usable)
    untitled = sum(not example.captions for _, example in usable)
    counts = f"{len(usable):7,} images, {untitled:,} of them without a title; {captions:,} captions"
    say(f"{split:5} {counts}; {len(skipped):,} rows skipped")
    return usable, pixels, [{"split": split, "line": i, "reason": why} for i, why in skipped]


def load_splits(resolution):
    """{"train", "val" and, where there is a file, "test": FashionDataset}; writes skipped.jsonl."""
    files = {split: JSON_PATH.replace("{split}", split) for split in ("train", "val", "test")}
    files = {split: file for split, file in files.items() if os.path.isfile(file)}
    if files["train"] == JSON_PATH:  # without {split} there is only train
        files = {"train": JSON_PATH}
    found = {split: read_examples(file) for split, file in files.items()}
    class_names = find_classes([example for examples, *_ in found.values() for example in examples])
    train, _, columns = found["train"]
    say_what_is_missing(files["train"], columns, train, class_names)
    usable, pixels, lines = {}, {}, []

    def has_text(example):
        return example.captions or (class_names and example.class_name)

    for split, (examples, skipped, _) in found.items():
        reason = "no title, and no class to tell from others"
        skipped += [(line, reason) for e in examples if not has_text(e) for line in e.lines]
        examples = list(filter(has_text, examples))
        loaded = load_split(split, files[split], examples, skipped, resolution)
        usable[split], pixels[split], lines = *loaded[:2], lines + loaded[2]
    write_lines("skipped.jsonl", lines)
    if "val" not in usable:
        entries, pixels["val"] = usable["train"], pixels["train"]
        held_out = hold_out([example for _, example in entries])
        usable["val"] = [entry for i, entry in enumerate(entries) if i in held_out]
        usable["train"] = [entry for i, entry in enumerate(entries) if i not in held_out]
        say(f"val   {len(held_out):7,} images of train are held out: there is no val file")
        if not usable["train"]:
            sys.exit(f"{JSON_PATH}: train and val need an image each, of different products")
    return {split: FashionDataset(usable[split], pixels[split], class_names) for split in usable}


class Batch(NamedTuple):
    pixels: torch.Tensor  # uint8 [b, 3, R, R], this process's share of the B images
    draws: torch.Tensor  # float32 [b, 3], uniform in 0..1: of each crop's side, x and y
    tokens: torch.Tensor  # int32 [texts, 77], the share's distinct texts
    inverse: torch.Tensor  # int64 [b], each image's row of tokens
    prompts: torch.Tensor  # int32 [ceil(K / processes), 77], the share of the K classes' prompts
    num_classes: int  # K, those of the B images
    parts: Parts


def epoch_batches(dataset, epoch, batch_size, first_step=0):
    """Yield an epoch's Batches from a step on. All that is random follows from SEED and epoch."""
    size = len(dataset)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
    order = torch.randperm(size, generator=generator)
    crops = torch.rand(size, 3, generator=generator)
    draws = torch.rand(size, generator=generator).tolist()
    drawn = [
        texts[int(draw * len(texts))] for draw, texts in zip(draws, dataset.texts, strict=True)
    ]
    drawn = torch.tensor(drawn)
    full = order.split(batch_size)[: size // batch_size]  # the rest waits for the next shuffle
    templates = torch.randint(len(PROMPTS), (len(full),), generator=generator)

    def load(step):
        own = full[step].chunk(WORLD_SIZE)[RANK]
        tokens, inverse = dataset.tokens[drawn[own]].unique(dim=0, return_inverse=True)
        parts, classes = dataset.parts(full[step])
        repeated = torch.arange(-(-len(classes) // WORLD_SIZE) * WORLD_SIZE) % max(1, len(classes))
        shared = classes[repeated].chunk(WORLD_SIZE)[RANK]
        prompts = dataset.tokens[dataset.prompts[shared, templates[step]]]
        return Batch(
            pin(dataset[own][0]), crops[own], tokens, inverse, prompts, len(classes), parts
        )

    return load_ahead(load, range(first_step, len(full)))


def load_ahead(load, batches):
    """Yield load(rows) of each batch of rows; for a GPU a thread loads the next meanwhile."""
    if not torch.cuda.is_available():  # on a CPU, a thread made training take 1.6 times as long
        yield from map(load, batches)
        return
    with ThreadPoolExecutor(1) as thread:
        loading = (thread.submit(load, rows) for rows in batches)
        for loaded, _ in pairwise(chain(loading, [None])):  # the next one is submitted by now
            yield loaded.result()


# ---- The run: fingerprint, memory, saving and going on -------------------------------------------
# All that change the weights; resuming refuses a change. BATCH_SIZE has its own entry.
HYPERPARAMETERS = ("MODEL", "NUM_EPOCHS", "LR", "WARMUP", "MAX_GRAD_NORM", "MIN_CROP", "SEED")
HYPERPARAMETERS += ("CLASS_WEIGHT", "PROMPTS", "CLASS_NAMES")
PROGRESS = ("history", "epoch", "step", "totals", "finished")


def new_state(model, splits):
    """The run as it starts, on the model's device."""
    train = splits["train"]
    pairs = min(BATCH_SIZE, len(train))
    share = pairs // WORLD_SIZE
    if share == 0:
        sys.exit(f"{WORLD_SIZE} processes cannot share a batch of {pairs}: start fewer")
    batch_size = share * WORLD_SIZE
    fingerprint = {name: globals()[name] for name in HYPERPARAMETERS}
    fingerprint["BATCH_SIZE in equal shares"] = batch_size
    for split, dataset in splits.items():
        rows = repr(dataset.examples).encode("utf-8", "replace")
        fingerprint[f"the rows of {split}"] = hashlib.sha256(rows).hexdigest()[:12]
    precision = choose_precision(model.mean.device)
    scaler = torch.amp.GradScaler(model.mean.device.type, enabled=precision == torch.float16)
    chunk = min(CHUNK_SIZE, share) if CHUNK_SIZE else fit_chunk(model, precision, train, share)
    steps, optimizer = len(train) // batch_size, make_optimizer(model)
    return State(model, optimizer, scaler, precision, batch_size, steps, chunk, fingerprint)


def bytes_kept(model, precision, dataset, count):
    """The bytes that the forward pass of `count` pairs keeps for backward()."""
    sizes, rows = {}, shuffled(len(dataset))[:count]

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    pixels, tokens = dataset[rows]
    with saved_tensors_hooks(note, lambda tensor: tensor):
        alive = [encode_images(model, precision, pixels, torch.zeros(len(rows), 3))]
        alive.append(encode_texts(model, precision, tokens))  # so that no address is used twice
    return sum(sizes.values())


def fit_chunk(model, precision, dataset, share):
    """How many of a process's pairs to encode at a time, so that training fits the free memory.

    A CPU has no error to catch when memory runs out: the system kills the process. So the size of
    a pair is measured, and what training takes besides is known: gradients, Adam's two moments.
    """
    free = free_memory(model.mean.device)  # before measuring: torch reuses that memory
    few, more = min(4, len(dataset)), min(12, len(dataset))
    kept = [bytes_kept(model, precision, dataset, count) for count in (few, more)]
    pair = 1.5 * (kept[1] - kept[0]) / max(1, more - few)  # half as much again comes and goes
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    besides = 3 + 0.5 * (precision != torch.float32) + (WORLD_SIZE > 1)  # + copies, + all_reduce
    logits = 20 * (WORLD_SIZE * share) ** 2  # of the loss: 16 bytes a logit were measured
    free -= besides * weights + logits + 2**29
    fitting = int(free / max(1.0, pair))
    if fitting < 1:
        say(f"MEMORY: {(pair - free) / 1e9:.1f} GB more should be free, or the run may be killed")
    chunks = -(-share // max(1, fitting))
    return -(-share // chunks)


CGROUP_FILES = (  # of versions 2 and 1: the limit, the use, and what of that is cache
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat", "total_inactive_file"),
)


def free_memory(device, root="/"):
    """The bytes that this process may still take, within the limits of its container (cgroup)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - 2**29
    free, groups = psutil.virtual_memory().available, Path(root, "proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kind, path = line.split(":", 2)
        inner = Path(root, "sys/fs/cgroup", kind, path.strip("/"))
        for folder, names in product((inner, *inner.parents), CGROUP_FILES):
            with suppress(OSError, ValueError):  # no such file; "max" is no number
                limit, used, stat = ((folder / name).read_text() for name in names[:3])
                cache = int(re.search(rf"^{names[3]} (\d+)", stat, re.M)[1])
                free = min(free, int(limit) - int(used) + cache)
    return free / LOCAL_WORLD_SIZE


def save_run(state):
    """Write last.pt, from which the run goes on exactly."""
    check_finite(state)
    if RANK == 0:
        saved = {name: getattr(state, name) for name in ("fingerprint", "chunk", *PROGRESS)}
        for name in ("model", "optimizer", "scaler"):
            saved[name] = getattr(state, name).state_dict()
        with atomic_write(f"{OUTPUT_PATH}/last.pt") as file:
            torch.save(saved, file)


def resume(state):
    """Go on from last.pt, where there is one. Stops where it is of another training."""
    path = f"{OUTPUT_PATH}/last.pt"
    if os.path.exists(path):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            old, new = saved["fingerprint"], state.fingerprint
            changed = [name for name in new | old if old.get(name) != new.get(name)]
        except Exception as error:
            advice = "Move it, or set another OUTPUT_PATH to start anew"
            sys.exit(f"{path} is no checkpoint of this script ({brief(error)}). {advice}")
        if changed:
            changes = "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
            further = f'To train further from its result, set MODEL = "{OUTPUT_PATH}/best.pt" and '
            advice = further if saved["finished"] else "Set it back to go on, or to start anew set "
            sys.exit(f"{path} is of another training: {changes}. {advice}another OUTPUT_PATH")
        for name in PROGRESS:
            setattr(state, name, saved[name])
        for name in ("model", "optimizer", "scaler"):
            if saved[name]:  # a scaler that scales nothing has saved nothing
                getattr(state, name).load_state_dict(saved[name])
        if not CHUNK_SIZE:  # other chunks add up in another order
            state.chunk = min(state.chunk, saved["chunk"])
        if not state.finished:
            say(f"Going on from {path}: epoch {state.epoch}, of which {state.step} steps are done.")
    digest = hashlib.sha256(repr(state.fingerprint).encode("utf-8", "replace")).hexdigest()
    place = torch.tensor([state.epoch, state.step, int(digest[:15], 16)])
    highest, minus_lowest = all_reduce(torch.stack([place, -place]), dist.ReduceOp.MAX)
    if not torch.equal(highest, -minus_lowest):  # so that all of them stop
        sys.exit(f"{path} or the rows differ between processes: all have to see the same files")


# ---- Weights: from the hub, OpenAI and files -----------------------------------------------------
HUB_NAMES = {f"RN{n}": f"resnet{n}_clip" for n in ("50", "101", "50x4", "50x16", "50x64")}
HUB_NAMES |= {  # OpenAI's models on the hub, as plain tensors: timm/….openai
    "ViT-B/32": "vit_base_patch32_clip_224",
    "ViT-B/16": "vit_base_patch16_clip_224",
    "ViT-L/14": "vit_large_patch14_clip_224",
    "ViT-L/14@336px": "vit_large_patch14_clip_336",
}


def check_config(config):
    """Raise ValueError where an open_clip_config.json describes another form than OpenAI's CLIP."""
    model, preprocessing = config["model_cfg"], config.get("preprocess_cfg", {})
    sizes = ("embed_dim", "vision_cfg", "text_cfg", "image_size", "size")
    sizes += ("layers", "width", "patch_size")  # read from the tensors
    form = {"context_length": 77, "vocab_size": 49408, "heads": model["text_cfg"]["width"] // 64}
    form |= {"quick_gelu": True, "head_width": 64, "mlp_ratio": 4, "mode": "RGB"}
    form |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    form |= {"mean": PIXEL_MEAN, "std": PIXEL_STD}
    found = model | model["vision_cfg"] | model["text_cfg"] | preprocessing
    found["quick_gelu"] = bool(model.get("quick_gelu"))
    allowed = {name: [None, False, "", form.get(name)] for name in found} | {"quick_gelu": [True]}
    other = [f"{k} is {v}" for k, v in found.items() if k not in sizes and v not in allowed[k]]
    if other:
        raise ValueError(f"it differs from OpenAI's CLIP: {', '.join(other)}")


def hub_file(repository, *names):
    """The path of the first of these files that a repository has, or None; cached or downloaded."""
    for cached, name in product((True, False), names):
        try:
            return hf_hub_download(repository, name, local_files_only=cached)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not cached:
                raise  # the hub cannot be reached
    return None


def hub_weights(repository):
    """The path of a hub repository's weights. Its form is checked before they are downloaded."""
    config = hub_file(repository, "open_clip_config.json")
    if config is None:
        hint = 'OpenAI\'s own models are MODEL = "ViT-B/32" and the like'
        raise ValueError(f"that repository has no open_clip_config.json; {hint}")
    check_config(json.loads(Path(config).read_text(encoding="utf-8")))
    names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    weights = hub_file(repository, *names)
    if weights is None:
        raise ValueError(f"that repository has no {' or '.join(names)}")
    return weights


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

    def download_from_openai():
        cached.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{cached}.lock"):  # one process at a time; the next one finds the file
            return clip.clip._download(url, str(cached.parent))

    sources = {"the hub": lambda: hub_weights(repository), "OpenAI's link": download_from_openai}
    reasons = []
    for source, download in sources.items():
        try:
            return download()
        except Exception as error:
            reasons.append(f"{source} says {brief(error)}")
    link = f"https://huggingface.co/{repository}/resolve/main/open_clip_model.safetensors"
    advice = f'Download {link} yourself and set MODEL = "path/to/open_clip_model.safetensors"'
    raise OSError(f"{'; '.join(reasons)}. {advice}")


def load_dictionary(path):
    """The dictionary that torch.save wrote to a file, if it is of tensors and plain values."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, UnpicklingError) as error:  # torch advises to run the code in the file
        found = str(error).partition("GLOBAL ")[2].split()[:1]
        what = f"also {found[0]}; save model.state_dict() alone" if found else "no tensors"
        raise ValueError(f"it holds {what}") from None
    return held if isinstance(held, dict) else {type(held).__name__: held}


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
                weights = load_dictionary(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        inner = weights.get(wrapper)
        weights = inner if isinstance(inner, dict) else weights
    weights = {str(name): tensor for name, tensor in weights.items()}
    if any(name.startswith("vision_model.") for name in weights):
        raise ValueError("its tensors have transformers' names; take that model from the hub")
    words = "token_embedding.weight"  # a prefix of all names stands before this one
    prefix = next((name.removesuffix(words) for name in weights if name.endswith(words)), "")
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not {words, "positional_embedding", "visual.conv1.weight"} <= weights.keys():
        raise ValueError(f"it holds {len(weights)} entries ({', '.join(weights):.100}), not a CLIP")
    sizes = len(weights["positional_embedding"]), len(weights[words])
    if sizes != (77, 49408):
        raise ValueError(f"its text length and vocabulary are {sizes}, not (77, 49408)")
    return weights


# ---- Machine, processes and signals --------------------------------------------------------------
def prepare_machine():
    """Set up the output, the memory and the other processes → this process's device."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's own
            # Windows' code pages lack most letters; a pipe, or a log, should show lines at once.
            stream.reconfigure(errors="replace", line_buffering=True)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # leaves that image out
    check_machine()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", LOCAL_RANK) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # re-plans for every length of captions
    if WORLD_SIZE > 1:
        backend = "cpu:gloo,cuda:nccl" if cuda and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
        all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory now, not at the peak
    if cuda:  # half a GB for what takes memory beside torch; else Windows' driver spills into RAM
        free, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(max(0.0, (free - 2**29) / total))
    return device


def check_machine():
    """Stop if copies would train alone or the GPU is too old; report one that is not used."""
    copies = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if copies > 1 and "RANK" not in os.environ:
        sys.exit(f"srun has started {copies} copies that know nothing of each other: srun torchrun")
    wheels = "pip install --force-reinstall torch torchvision --index-url "
    wheels += "https://download.pytorch.org/whl/cu126"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        known = [int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list()]
        if known and 10 * major + minor < min(known):
            name = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
            advice = f"Take another GPU (Kaggle: T4), or {wheels}"
            sys.exit(f"this torch no longer knows the {name}. {advice}")
    elif shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        with suppress(OSError, subprocess.SubprocessError):
            gpu = subprocess.check_output(query, text=True, timeout=20, stderr=subprocess.DEVNULL)
            cuda = f"is for CUDA {torch.version.cuda}" if torch.version.cuda else "has no CUDA"
            advice = f"Update its driver (580 or newer for CUDA 13), or {wheels}"
            say(f"THE GPU IS NOT USED: {gpu.strip()}; torch {torch.__version__} {cuda}. {advice}")


def keep_freed_memory():
    """Have malloc keep freed memory: getting it anew took a third of a step of 256 pairs."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.malloc_trim(0)  # what loading has left goes back first
        libc.mallopt(trim_threshold, -1)  # never give any back
        libc.mallopt(mmap_max, 0)  # no mapping of its own for a large block


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """The sum, or another operation, of all processes' tensors, in place."""
    try:
        if WORLD_SIZE > 1:
            dist.all_reduce(tensor, operation)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        sys.exit(f"cannot reach the other processes; if one ended, it says why ({brief(error)})")
    return tensor


def all_gather(share):
    """[b, …] of each process → [B, …] of all, by rank: a sum with zeros works on any backend."""
    shares = share.new_zeros(WORLD_SIZE, *share.shape)
    shares[RANK] = share
    return all_reduce(shares).flatten(0, 1)


def leave(number, _frame):
    """End a run before training. SystemExit is no Exception: no `except Exception` stops it."""
    os.write(2, b"Stopped before training: there is nothing new to save.\n")
    sys.exit(128 + number)


def stop_if_signalled(state):
    """End the run, saved, if Ctrl-C or SIGTERM has told one of its processes to."""
    number = int(all_reduce(torch.tensor(max(state.signals, default=0)), dist.ReduceOp.MAX))
    if number:
        if state.epoch <= NUM_EPOCHS:  # later last.pt is complete, and finish() loads other weights
            save_run(state)
        say(f"Stopped and saved in {OUTPUT_PATH}/last.pt: the same command goes on from there.")
        all_reduce(torch.zeros(1))  # it is saved before torchrun hears of any exit
        sys.exit(128 + number)


def stop_out_of_memory(state):
    """End the run, saved: with a smaller chunk it goes on as the same training."""
    for moments in state.optimizer.state.values():
        if len(moments) < 3:  # it ran out as Adam made them
            moments.clear()
    if state.epoch <= NUM_EPOCHS:
        save_run(state)
    advice = f"set CHUNK_SIZE = {state.chunk // 2}" if state.chunk > 1 else "set a smaller MODEL"
    sys.exit(f"out of memory at {state.chunk} pairs at a time: {advice} and run it again")


def say(line):
    """Print above the progress bar, from the first process only."""
    if RANK == 0:
        tqdm.write(line)


# ---- Files and constants -------------------------------------------------------------------------
@contextmanager
def atomic_write(path):
    """A file to write, which on success replaces path at once."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for seconds in (0.1, 0.5, 1, 2, 4):  # Windows' scanners hold a new file for a moment
            with suppress(PermissionError):
                os.replace(temporary, path)
                return
            time.sleep(seconds)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError from it
        sys.exit(f"cannot write {path}: {error.__context__ or error}; what it held is untouched")
    finally:
        with suppress(OSError):
            os.remove(temporary)


def write_lines(name, rows):
    """One JSON object per line, into that file of OUTPUT_PATH, by the first process."""
    if RANK == 0:
        with atomic_write(f"{OUTPUT_PATH}/{name}") as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def brief(error, limit=300):
    """An error, or what caused it, in one line."""
    error = error.__cause__ or error
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit].rstrip(".")


RULES = {  # constants: (what each must be, whether it is)
    "IMAGE_PATH": ("a folder that exists", os.path.isdir),
    "JSON_PATH": ("a file that exists", lambda v: os.path.isfile(v.replace("{split}", "train"))),
    "OUTPUT_PATH CACHE_PATH": ("a folder's path", lambda v: v and "\0" not in v),
    "MODEL": ("text in quotes", lambda v: isinstance(v, str)),
    "BATCH_SIZE": ("a whole number from 2 on", lambda v: type(v) is int and v >= 2),
    "NUM_EPOCHS": ("a whole number from 0 on", lambda v: type(v) is int and v >= 0),
    "LR": ("a number above 0", lambda v: 0 < v < math.inf),
    "WARMUP": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "CLASS_WEIGHT": ("a number from 0 on", lambda v: 0 <= v < math.inf),
    "MAX_GRAD_NORM": ("a number above 0", lambda v: v > 0),
    "MIN_CROP": ("a number above 0, at most 1", lambda v: 0 < v <= 1),
    "SEED": ("a whole number from 0 to 2**31", lambda v: type(v) is int and 0 <= v <= 2**31),
    "PROMPTS": ("texts with {} in each", lambda v: v and all(text.count("{}") for text in v)),
    "CLASS_NAMES": ("a dictionary of texts", lambda v: all(text.strip() for text in v.values())),
    "CHUNK_SIZE": ("None or a whole number", lambda v: v is None or type(v) is int and v >= 1),
    "SAMPLE_RUN": ("a dictionary", lambda v: isinstance(v, dict)),
}


def check_constants():
    """Take the sample's where there is no dataset. Stop at a constant that cannot work."""
    constants = globals()
    if IMAGE_PATH == "data/indo-fashion" and not os.path.isdir(IMAGE_PATH):
        if JSON_PATH == "data/indo-fashion/{split}_data.json":
            say("IndoFashion is not in data/indo-fashion. To get it, see data/README.md or")
            say("www.kaggle.com/datasets/validmodel/indo-fashion-dataset. Running the bundled")
            say("sample, whose constants are those in SAMPLE_RUN.")
            constants.update(SAMPLE_RUN if isinstance(SAMPLE_RUN, dict) else {})
        elif isinstance(JSON_PATH, str):  # image_path may be absolute
            folders = (os.path.dirname(JSON_PATH), ".")  # a wrong JSON_PATH is named below
            constants["IMAGE_PATH"] = next(filter(os.path.isdir, folders))
            say(f"IMAGE_PATH is not set: image_path is taken as relative to {IMAGE_PATH}")
    if isinstance(PROMPTS, str):  # a forgotten comma
        constants["PROMPTS"] = (PROMPTS,)
    for names, (wanted, is_right) in RULES.items():
        for name in names.split():
            with suppress(Exception):  # of another type
                if is_right(constants[name]):
                    continue
            sys.exit(f"{name} is {constants[name]!r}; it must be {wanted}")
    written = [os.path.realpath(f"{OUTPUT_PATH}/{name}.pt") for name in ("best", "last")]
    if os.path.realpath(MODEL) in written:
        sys.exit(f"MODEL is {MODEL}, which this run would overwrite: set another OUTPUT_PATH")
    for name in ("OUTPUT_PATH", "CACHE_PATH"):
        try:
            os.makedirs(constants[name], exist_ok=True)
        except OSError as error:
            sys.exit(f"{name} is {constants[name]!r}; it must be a folder ({brief(error)})")


def lock_output():
    """Refuse a second run in OUTPUT_PATH. The system frees the lock when the process ends."""
    lock = FileLock(f"{OUTPUT_PATH}/.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        sys.exit(f"another run writes into {OUTPUT_PATH}: wait for it, or set another OUTPUT_PATH")
    except OSError as error:
        sys.exit(f"cannot write into OUTPUT_PATH {OUTPUT_PATH} ({brief(error)})")
    return lock


# ---- Figures -------------------------------------------------------------------------------------
def save_figure(name, figure):
    with atomic_write(f"{OUTPUT_PATH}/{name}") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|Matplotlib currently")  # lacks some letters
        figure.savefig(file, format="png", dpi=100, bbox_inches="tight", pad_inches=0.15)


def draw_curves(history, best_epoch):
    """curves.png: the epochs' lines of metrics.jsonl; a panel for what the split has."""
    search = [f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5)]
    panels = {"loss": ["train_loss", "loss"], "classes": ["accuracy", "macro_f1"], "search": search}
    panels = {title: keys for title, keys in panels.items() if keys[-1] in history[0]}
    figure = Figure(figsize=(5 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, keys) in zip(axes, panels.items(), strict=True):
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


def draw_confusion(dataset, results):
    """confusion.png: the percentages of each class taken for each class, before and after.

    Of more than 60 classes, those with the most images; nothing where there are no classes.
    """
    known = dataset.labels >= 0
    if not known.any():
        return
    counts = dataset.labels[known].bincount(minlength=len(dataset.class_names))
    shown = counts.topk(min(60, len(counts))).indices.sort().values
    place = torch.full_like(counts, len(shown)).index_copy(0, shown, torch.arange(len(shown)))
    names = [textwrap.fill(dataset.class_names[i], 30, max_lines=2) for i in shown]
    side = max(2.5, 0.32 * len(names))  # inches
    margin = 0.8 + 0.08 * max(len(line) for name in names for line in name.split("\n"))
    figure = Figure(figsize=(2 * side + margin, side + margin + 0.3), layout="constrained")
    panels, titles = figure.subplots(1, 2, sharey=True), ("before training", "after")
    for panel, result, title in zip(panels, results, titles, strict=True):
        cells = place[dataset.labels[known]] * (len(shown) + 1) + place[result.predicted[known]]
        table = cells.bincount(minlength=(len(shown) + 1) ** 2).view(len(shown) + 1, -1)[:-1, :-1]
        fractions = table / counts[shown, None].clamp(min=1)
        panel.imshow(fractions.numpy(), cmap="Greens", vmin=0, vmax=1)
        for true, predicted in fractions.ge(0.005).nonzero().tolist():
            value = float(fractions[true, predicted])
            style = {"color": "white" if value > 0.5 else "black", "fontsize": 8}
            panel.text(predicted, true, f"{100 * value:.0f}", ha="center", va="center", **style)
        panel.set(title=f"{title}: {result.metrics['accuracy']:.0%} right", xlabel="predicted")
        panel.set_xticks(range(len(names)), names, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), names, parse_math=False)
    panels[0].set_ylabel("class, and the % of its images")
    save_figure("confusion.png", figure)


def image_strip(dataset, found, query, caption):
    """The images found, side by side, uint8 [H, W, 3]; dark frame: the caption's; light: its class.

    query: an image that has the caption, a row of dataset.tokens.
    """
    edge = max(2, dataset.pixels.shape[-1] // 16)
    strip = []
    for image in found:
        same_class = dataset.labels[image] == dataset.labels[query] >= 0
        color = (165, 220, 170) if same_class else "white"
        if (dataset.pairs == torch.tensor([image, caption])).all(1).any():
            color = (20, 130, 50)
        framed = ImageOps.expand(to_pil_image(dataset[image][0]), edge, color)
        strip.append(F.pad(pil_to_tensor(framed), (0, edge), value=255))
    return torch.cat(strip, 2).permute(1, 2, 0).numpy()


def draw_retrieval(dataset, results):
    """retrieval.png: the images found for at most eight captions, before training and after."""
    queries = {}  # {caption: (an image that has it, its text)}
    for pair in shuffled(len(dataset.pairs)).tolist():
        image, caption = dataset.pairs[pair].tolist()
        if len(queries) < 8:
            queries.setdefault(caption, (image, dataset.examples[image].captions[dataset.texts[image].index(caption)]))
    if not queries:
        return
    figure = Figure(figsize=(13.2, 1.45 * len(queries) + 0.5), layout="constrained")
    axes = figure.subplots(len(queries), 2, squeeze=False)
    for (caption, (query, text)), panels in zip(queries.items(), axes, strict=True):
        for panel, title, result in zip(panels, ("before", "after"), results, strict=True):
            found = top_k(result.text_features[caption][None], result.image_features, 5)[0].tolist()
            panel.imshow(image_strip(dataset, found, query, caption))
            panel.set_frame_on(False)
            panel.set(xticks=[], yticks=[], ylabel=title)
        title = textwrap.fill(text, 70, max_lines=2)
        panels[0].set_title(title, loc="left", fontsize=11, parse_math=False)
    figure.supxlabel("dark frame: the caption's own image; light: its class", fontsize=10)
    save_figure("retrieval.png", figure)


# ---- The whole run -------------------------------------------------------------------------------
def main():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    device = prepare_machine()
    check_constants()
    lock = lock_output() if RANK == 0 else None  # noqa: F841 (held until the run ends)
    model = load_clip(MODEL).to(device)
    splits = load_splits(model.visual.input_resolution)
    keep_freed_memory()
    state = new_state(model, splits)
    resume(state)
    if state.finished:
        say(f"This run is finished: {OUTPUT_PATH} has its weights. To train further from them, set")
        say(f'MODEL = "{OUTPUT_PATH}/best.pt" and another OUTPUT_PATH.')
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: state.signals.append(number))
    where = f"{str(state.precision)[6:]} on {WORLD_SIZE} × {device.type}"
    say(f"{MODEL} in {where}, {state.chunk} pairs at a time; output in {OUTPUT_PATH}")
    say(f"{NUM_EPOCHS} epochs of {state.steps_per_epoch} steps of {state.batch_size} pairs")
    try:
        train(state, splits)
        finish(state, splits)
    except torch.OutOfMemoryError:
        stop_out_of_memory(state)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

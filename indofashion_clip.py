"""Fine-tune OpenAI's CLIP on your own images and captions: one file, made for IndoFashion.

    python indofashion_clip.py
    torchrun --nproc_per_node=4 indofashion_clip.py  # on four GPUs

Edit the constants first, or run it unchanged: without IndoFashion in data/indo-fashion, a tiny CLIP
learns the bundled sample from scratch, drawings of 15 kinds of clothes. That takes a minute on two
CPU cores, and then it classifies 9 of 10 correctly (chance: 1 in 15).

Input: images, and rows like {"image_path": "a/1.jpg", "product_title": "Red saree", "class_label":
"saree"} as JSON Lines, a JSON array or CSV; or a folder of class folders. Title and class are
optional, and an image may have several titles. Output: outputs/best.pt, which clip.load can read.

Shapes: B images in a batch, b of them on this process; N images, C distinct captions and K classes
in a split or a batch; D the width of an embedding; R the side of an image in pixels.
"""

import csv
import ctypes
import functools
import glob
import hashlib
import html
import io
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import sys
import textwrap
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import psutil
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, get_worker_info
from torchvision.transforms.functional import InterpolationMode, center_crop, pil_to_tensor, resize
from tqdm import tqdm

# The figures' font lacks some letters; and others warn of what is deprecated.
warnings.filterwarnings("ignore", "Glyph|Matplotlib currently|pkg_resources|`torch.jit.load`")
try:
    from clip import model as clip_model
    from clip import tokenize as clip_tokenize
except Exception as error:  # another package of that name may raise anything
    advice = "rename that file or uninstall that package, then: pip install -r requirements.txt"
    sys.exit(f"'import clip' does not find OpenAI's CLIP ({error!r:.300}): {advice}")

# ---- Constants: what a user edits ----------------------------------------------------------------
IMAGE_PATH = "data/indo-fashion"  # the folder that image_path in a row is relative to
JSON_PATH = "data/indo-fashion/{split}_data.json"  # {split} stands for train, val and test
OUTPUT_PATH = "outputs"  # weights, metrics and figures; one per run
CACHE_PATH = "data/cache"  # decoded images, 150 KB each at 224 pixels; on a fast disk

MODEL = "ViT-B/32"  # or another of OpenAI's names, a file, or a repository of the Hugging Face hub
BATCH_SIZE = 256  # images per step: the more, the more negatives for each pair
NUM_EPOCHS = 6  # people stop at 3 to 10: CLIP starts close and overfits soon
LR = 1e-5  # the peak; 5e-6 to 3e-5 are usual, and 5e-5 is reported to forget
WARMUP = 0.1  # the fraction of the steps in which the learning rate rises to LR
MAX_GRAD_NORM = 1.0  # the gradient's norm is clipped to it: one odd batch does no harm
CLASS_WEIGHT = 1.0  # of the class loss beside the caption loss; 0 learns captions only
SEED = 0  # the same seed gives the same order, captions and, on a CPU, weights

PROMPTS = ("a photo of a {}", "a product photo of a {}", "a {} for sale")  # a step takes one
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
CHUNK_SIZE = None  # images encoded at a time; None: as many as fit the free memory

SAMPLE_RUN = {  # the run without a dataset: these replace the constants above
    "IMAGE_PATH": "data/sample",
    "JSON_PATH": "data/sample/{split}_data.json",
    "OUTPUT_PATH": "outputs/sample",
    "MODEL": "tiny",
    "BATCH_SIZE": 32,
    "NUM_EPOCHS": 45,
    "LR": 1e-3,
}

# ---- Set by torchrun -----------------------------------------------------------------------------
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on its machine
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---- Model ---------------------------------------------------------------------------------------
PIXEL_MEAN = [0.48145466, 0.4578275, 0.40821073]
PIXEL_STD = [0.26862954, 0.26130258, 0.27577711]
PRECISIONS = torch.float32, torch.float16, torch.bfloat16  # processes agree on the first of theirs


def load_clip(name):
    """CLIP in float32 and, for the RN models' batch norm, in eval mode; name: as MODEL above."""
    try:
        if name == "tiny":
            torch.manual_seed(SEED)
            # D; pixels, layers, width, patch; tokens, vocabulary, width, heads, layers
            model = clip_model.CLIP(64, 64, 2, 128, 16, 77, 49408, 128, 2, 2)
        else:
            weights = read_weights(find_weights(name))
            model = clip_model.build_model(weights).float()
            model.load_state_dict(weights)  # build_model has rounded them to half precision
    except Exception as error:  # a damaged file raises nearly anything
        kinds = f"a file, a repository of the hub, or one of {', '.join(['tiny', *HUB_NAMES])}"
        sys.exit(f"MODEL: cannot load {name!r}: {brief(error, 1200)}. MODEL may be {kinds}")
    for buffer, values in {"mean": PIXEL_MEAN, "std": PIXEL_STD}.items():
        model.register_buffer(buffer, torch.tensor(values).view(3, 1, 1), persistent=False)
    return model.eval()


def choose_precision(device):
    """The dtype in which all processes compute the encoders; the weights stay float32."""
    if device.type == "cuda":  # a T4 claims bfloat16, which it only emulates
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    other = torch.float16 if device.type == "cuda" else torch.float32
    own = torch.tensor(PRECISIONS.index(torch.bfloat16 if native else other))
    # All take the least: float16's gradients are scaled and would drown others in a sum.
    return PRECISIONS[int(all_reduce(own, dist.ReduceOp.MIN))]


def to_device(tensor, device):
    """A copy on the device, from pinned memory where that is a GPU: the host goes on meanwhile."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


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
    kept rows. QuickGELU, h · sigmoid(1.702 h), is silu(1.702 h) / 1.702: ln_2 and the first bias
    take the first factor, the last weight the other; they have fewer elements than the activations.
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


def encode_texts(model, precision, tokens):
    """Tokens int32 [C, 77] on the CPU → text_features float32 [C, D] of length 1.

    Computes what model.encode_text does, without padding: the linear layers see only the captions'
    own tokens; attention, which is causal, pads them to the longest caption.
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
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        embedded = model.token_embedding(words) + positions
        texts = run_blocks(model.transformer, embedded, attend, end_tokens)
        text_features = model.ln_final(texts) @ model.text_projection
    return F.normalize(text_features.float(), dim=-1)


def encode_images(model, precision, pixels):
    """Pixels uint8 [B, 3, R, R] → image_features float32 [B, D] of length 1."""
    device = model.mean.device
    images = to_device(pixels, device).float()
    images = torch.addcmul(-model.mean / model.std, images, 1 / (255 * model.std)).to(precision)
    is_vit = hasattr(model.visual, "transformer")
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        image_features = image_tower(model.visual, images) if is_vit else model.visual(images)
    return F.normalize(image_features.float(), dim=-1)


# ---- Loss and step -------------------------------------------------------------------------------
def clip_loss(image_features, text_features, logit_scale):
    """Symmetric contrastive loss of B pairs, a scalar (the CLIP paper, arXiv 2103.00020, figure 3).

    image_features, text_features: float32 [B, D] of length 1; logit_scale: the log of the inverse
    temperature. Pairs of one caption need no soft targets: as their text features are equal, the
    softmax's loss and gradients are those of targets shared equally among them.
    """
    logits_per_image = logit_scale.exp() * image_features @ text_features.T  # [B, B]
    targets = torch.arange(len(logits_per_image), device=logits_per_image.device)
    loss_per_image = F.cross_entropy(logits_per_image, targets)
    return (loss_per_image + F.cross_entropy(logits_per_image.T, targets)) / 2


class Targets(NamedTuple):
    titled: torch.Tensor  # int64, the indices of a whole batch's images that have a caption
    labelled: torch.Tensor  # int64, those of its images that have a class
    classes: torch.Tensor  # int64, their classes among the batch's K


def batch_losses(image_features, text_features, prompt_features, targets, logit_scale):
    """The caption loss of the titled images and the class loss of the labelled ones, float32 [2].

    Features: float32 of B images [B, D], their texts [B, D] and the batch's classes [K, D], all of
    length 1. Each loss is a mean over its images, 0 where there are none. Prompts are not added to
    the captions, where they would be negatives of the titled images of their own class.
    """
    titled, labelled, classes = (to_device(part, logit_scale.device) for part in targets)
    caption_loss = class_loss = 0 * logit_scale
    if len(titled):
        pairs = image_features.index_select(0, titled), text_features.index_select(0, titled)
        caption_loss = clip_loss(*pairs, logit_scale)
    if len(labelled):
        images = image_features.index_select(0, labelled)
        logits = logit_scale.exp() * images @ prompt_features.T  # [labelled images, K]
        class_loss = F.cross_entropy(logits, classes)
    return torch.stack([caption_loss, class_loss])


def in_chunks(state, encode, rows):
    """encode(model, precision, rows) → features [B, D], state.chunk images or twice as many texts.

    If all rows fit one chunk, this is a plain call. Else only the features are kept, and backward()
    encodes each chunk again: GradCache (Gao et al. 2021, arXiv 2101.06983).
    """
    encode_rows = functools.partial(encode, state.model, state.precision)
    chunks = rows.split(state.chunk if encode is encode_images else 2 * state.chunk)
    if len(chunks) == 1:
        return encode_rows(rows)
    how = {"use_reentrant": False, "preserve_rng_state": False}
    return torch.cat([checkpoint(encode_rows, chunk, **how) for chunk in chunks])


def gather(own):
    """[b, D] of this process → [B, D] of all, by rank, where the others' features are constants."""
    shares = own.new_zeros(WORLD_SIZE, *own.shape)
    shares[RANK] = own.detach()
    shares = list(all_reduce(shares))  # a sum with zeros, which any backend knows
    shares[RANK] = own
    return torch.cat(shares)


def forward_backward(state, batch):
    """Both losses of all B images, [2]; gradients of this process's share, to be summed."""
    scale = state.model.logit_scale
    image_features = gather(in_chunks(state, encode_images, batch.pixels))
    # One call for all texts: a second one would go through all weights and their gradients again.
    texts = in_chunks(state, encode_texts, torch.cat([batch.tokens, batch.prompts]))
    captions, prompts = texts.split([len(batch.tokens), len(batch.prompts)])
    text_features = gather(captions)
    prompt_features = gather(prompts)[: batch.num_classes] if len(prompts) else prompts
    losses = batch_losses(image_features, text_features, prompt_features, batch.targets, scale)
    state.scaler.scale(losses[0] + CLASS_WEIGHT * losses[1]).backward()
    return losses.detach()


def train_step(state, batch):
    """One optimizer step → both losses of the batch, [2]: reading them waits for the device."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    losses = forward_backward(state, batch)
    if WORLD_SIZE > 1:  # in one exchange; the activations, which took more memory, are gone
        if model.logit_scale.grad is not None:
            # A parameter of the loss itself has its whole gradient on each process already.
            model.logit_scale.grad /= WORLD_SIZE
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
    """Adam with CLIP's betas and eps for ViTs; train_epoch sets the rate. Decay changed nothing."""
    return torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True)


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
    batch_size: int  # images per step, of all processes
    steps_per_epoch: int
    chunk: int  # images that this process encodes at a time
    fingerprint: dict  # the constants and rows that have to stay the same to go on
    history: list = field(default_factory=list)  # the lines of metrics.jsonl
    views: dict = field(default_factory=dict)  # what the figures show, "before" and "after"
    epoch: int = 0  # 0: the evaluation before training; NUM_EPOCHS + 1: all are done
    step: int = 0  # steps of this epoch that are done
    totals: torch.Tensor = field(default_factory=lambda: torch.zeros(3))  # of their losses
    signals: list = field(default_factory=list)  # Ctrl-C or SIGTERM: the run ends after its step


def read_losses(state, totals):
    """{"loss" and its two parts}: the means of totals float32 [3], both losses' sums, their count.

    Waits for the device. Stops where the loss or a weight is not finite.
    """
    caption_loss, class_loss = (totals[:2] / totals[2].clamp(min=1)).tolist()
    loss = caption_loss + CLASS_WEIGHT * class_loss
    if not math.isfinite(loss + torch.nn.utils.get_total_norm(state.model.parameters())):
        place = f"at step {state.step} of epoch {state.epoch}, in {str(state.precision)[6:]}"
        advice = "lower LR, or leave float16 by a GPU with bfloat16 or by CUDA_VISIBLE_DEVICES=-1"
        kept = f"Set another OUTPUT_PATH: {OUTPUT_PATH} holds the last good weights"
        sys.exit(f"the loss or a weight is not finite {place}: {advice}. {kept}")
    return {"loss": loss, "caption_loss": caption_loss, "class_loss": class_loss}


def train_epoch(state, dataset, bar):
    """Train to the epoch's end, saving every 10 minutes → the epoch's metrics."""
    first, begin = state.step, time.perf_counter()
    last_save, state.totals = begin, state.totals.to(state.model.mean.device)
    for batch in epoch_batches(dataset, state.epoch, state.batch_size, first):
        step_of_run = (state.epoch - 1) * state.steps_per_epoch + state.step
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step_of_run, NUM_EPOCHS * state.steps_per_epoch)
        losses = train_step(state, batch)
        # A step whose loss is not finite is one that the scaler skips.
        state.totals += torch.where(losses.isfinite().all(), F.pad(losses, (0, 1), value=1.0), 0.0)
        state.step += 1
        if step_of_run % 20 == 0:
            loss = read_losses(state, state.totals)["loss"]
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        bar.update(state.batch_size)
        if time.perf_counter() > last_save + 600:
            save_run(state)
            last_save = time.perf_counter()
        stop_if_signalled(state)
    metrics = {f"train_{name}": loss for name, loss in read_losses(state, state.totals).items()}
    images, seconds = (state.step - first) * state.batch_size, time.perf_counter() - begin
    return metrics | ({"train_pairs_per_second": images / seconds} if images else {})


def train(state, splits):
    """Evaluate, then train and evaluate epoch by epoch, keeping the best weights and the last."""
    recalls = "".join(f"{way + ' R@1':>18}{5:9}{10:9}" for way in ("image→text", "text→image"))
    say(f"\nepoch split     loss accuracy macro-F1{recalls}  pairs/s")
    images = state.steps_per_epoch * state.batch_size
    done = max(0, state.epoch - 1) * images + state.step * state.batch_size
    with progress("training", NUM_EPOCHS * images, done) as bar:
        while state.epoch <= NUM_EPOCHS:
            trained = train_epoch(state, splits["train"], bar) if state.epoch > 0 else {}
            if trained:
                save_run(state)
            metrics, view = evaluate(state, splits["val"])
            log(state, "val", state.epoch, metrics | trained)
            state.views.setdefault("before", view)
            if best_line(state.history) is state.history[-1]:
                state.views["after"] = view
                if RANK == 0:  # before last.pt: a run killed between them evaluates once more
                    save("best.pt", {k: v.cpu() for k, v in state.model.state_dict().items()})
            state.epoch, state.step, state.totals = state.epoch + 1, 0, torch.zeros(3)
            save_run(state)
            stop_if_signalled(state)


def best_line(history):
    """The best val line of metrics.jsonl, by the mean of accuracy and both recalls at 5."""
    keys = ("accuracy", "image_to_text_r5", "text_to_image_r5")  # those that the split has
    lines = [line for line in history if line["split"] == "val"]
    return max(lines, key=lambda line: sum(line.get(key, 0.0) for key in keys))


def log(state, split, epoch, metrics):
    """Add a line to metrics.jsonl and to what is printed."""
    state.history.append({"epoch": epoch, "split": split} | metrics)
    save("metrics.jsonl", state.history)
    names = ["loss", "accuracy", "macro_f1"]
    names += [f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5, 10)]
    cells = "".join(f"{metrics.get(name, math.nan):9.3f}" for name in names)
    speed = metrics.get("train_pairs_per_second", math.nan)
    say(f"{epoch:5} {split:5}{cells}{speed:9.1f}".replace("nan", "  -"))


def finish(state, splits):
    """Draw val before and after training, and evaluate best.pt on test."""
    best_file, best_epoch = f"{OUTPUT_PATH}/best.pt", best_line(state.history)["epoch"]
    if RANK == 0:
        draw_curves(state.history, best_epoch)
        draw_confusion(splits["val"], state.views)
        draw_retrieval(splits["val"], state.views)
    state.optimizer = make_optimizer(state.model)  # drops the moments: nothing is trained any more
    if "test" in splits and state.history[-1]["split"] == "val":
        all_reduce(torch.zeros(1))  # best.pt is written
        state.model.load_state_dict(torch.load(best_file, map_location="cpu", weights_only=True))
        log(state, "test", best_epoch, evaluate(state, splits["test"])[0])
        save_run(state)
    say(f"\nBest weights (epoch {best_epoch}): {best_file}. To use them:")
    say(f'    model, preprocess = clip.load("{best_file}")')


# ---- Evaluation ----------------------------------------------------------------------------------
DIRECTIONS = ("image_to_text", "text_to_image")


def top_k(queries, answers, count):
    """int64 [Q, count], the indices of the nearest answers [A, D] to each query [Q, D]."""
    count = min(count, len(answers))
    return torch.cat([(part @ answers.T).topk(count).indices for part in queries.split(1024)])


def retrieval_recall(image_features, text_features, pairs):
    """{"image_to_text_r1": the fraction of images whose nearest text is right, …}.

    pairs: int64 [P, 2], (image, caption), all that belong together: any of an image's captions is
    right for it, and any image of a caption. An image without a caption can be found by mistake.
    """
    recall, pairs = {}, to_device(pairs, image_features.device)
    queries, answers = image_features, text_features
    for way in DIRECTIONS:
        asked = pairs[:, 0].unique()
        found = asked[:, None] * len(answers) + top_k(queries[asked], answers, 10)  # [asked, 10]
        hits = torch.isin(found, pairs[:, 0] * len(answers) + pairs[:, 1])
        recall |= {f"{way}_r{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}
        queries, answers, pairs = answers, queries, pairs.flip(1)
    return recall


def classification_scores(labels, predicted, num_classes):
    """{"accuracy", "macro_f1"} of int64 [n] each; the F1 is averaged over classes with images."""
    predicted, labels = predicted[labels >= 0], labels[labels >= 0]
    right = labels[predicted == labels].bincount(minlength=num_classes)
    truly = labels.bincount(minlength=num_classes)
    f1 = (2 * right / (truly + predicted.bincount(minlength=num_classes)))[truly > 0]
    return {"accuracy": right.sum().item() / len(labels), "macro_f1": f1.mean().item()}


@torch.no_grad()
def evaluate(state, dataset):
    """Zero-shot classification and retrieval on a split; every process does it all.

    The losses are by the first texts, in batches as large as training's.
    → (a line of metrics.jsonl; what the figures show: {"predicted": int64 [N], each image's class,
    "found": int64 [queries, 5], the images nearest to each of dataset.queries}).
    """
    begin, count = time.perf_counter(), len(dataset)
    batches = load_ahead(lambda rows: dataset[rows][0], torch.arange(count).split(256))
    texts = torch.cat([dataset.tokens, dataset.prompts.flatten(0, 1)])
    features, places = [], [count, count + len(dataset.tokens)]
    with progress("evaluating", count + len(texts)) as bar:
        for encode, parts in ((encode_images, batches), (encode_texts, texts.split(256))):
            for part in parts:
                features.append(in_chunks(state, encode, part))
                bar.update(len(part))
    image_features, text_features, prompt_features = torch.cat(features).tensor_split(places)
    prompt_features = prompt_features.unflatten(0, dataset.prompts.shape[:2])  # [K, PROMPTS, D]
    losses, scale = [], state.model.logit_scale
    for rows in shuffled(count).split(state.batch_size):  # the file may be sorted by class
        targets, classes = dataset.targets(rows)
        first_texts, prompts = text_features[dataset.first_texts[rows]], prompt_features[classes, 0]
        losses.append(batch_losses(image_features[rows], first_texts, prompts, targets, scale))
    metrics, view = read_losses(state, F.pad(torch.stack(losses).mean(0), (0, 1), value=1.0)), {}
    if (dataset.labels >= 0).any():
        class_features = F.normalize(prompt_features.mean(1), dim=-1)  # [K, D]
        view["predicted"] = top_k(image_features, class_features, 1).squeeze(1).cpu()
        metrics |= classification_scores(dataset.labels, view["predicted"], len(class_features))
    if len(dataset.pairs):
        text_features = text_features[:-1]  # without the empty text
        metrics |= retrieval_recall(image_features, text_features, dataset.pairs)
        view["found"] = top_k(text_features[list(dataset.queries)], image_features, 5).cpu()
    seconds = time.perf_counter() - begin
    return metrics | {"seconds": seconds, "pairs_per_second": count / seconds}, view


# ---- From here on: what prepares and keeps a run. A reader of CLIP's training can stop here ------
# ---- Data: tables or folders → images with captions and classes ----------------------------------
FORMATS = "JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA"
ENDINGS = tuple(e for e, kind in Image.registered_extensions().items() if kind in FORMATS)
MISSING = "n/a", "na", "nan", "none", "null", "#n/a", "-"  # titles that are none


@dataclass(slots=True)
class Example:
    """An image, with what all of its rows say."""

    split: str
    path: str
    reason: str = ""  # why it is left out
    captions: tuple = ()  # distinct texts
    classes: tuple = ()  # distinct names
    product: str = ""  # its product_id: the images of a product go to one side of train and val
    lines: tuple = ()  # of its rows, from 1
    row: int = 0  # of the cache
    digest: int = 0  # of its pixels


def read_texts(value):
    """The distinct texts of a cell or a list: entities resolved, spaces collapsed, none empty."""
    texts = {}
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, (str, int, float)) and part == part:  # NaN is not itself
            text = html.unescape(str(part)).encode("utf-8", "ignore").decode("utf-8")
            texts[" ".join(text.split())] = None
    return tuple(filter(None, texts))


def class_name(label):
    """A label as CLIP reads it: a__B and "a b" are one."""
    return sys.intern(" ".join(label.replace("_", " ").lower().split()))


def read_rows(path):
    """Yield (line, row) of JSON Lines, of a JSON array (its places) or of a CSV.

    What is broken ends the run, with its line: nobody wants a model of half their rows.
    """
    line = 1
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            yield from enumerate(json.loads(text), 1)
        elif text.lstrip().startswith("{"):
            for line, part in enumerate(text.split("\n"), 1):
                if part.strip():
                    yield line, json.loads(part)
        else:
            delimiter = max(",;\t|", key=text.lstrip().partition("\n")[0].count)
            reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
            names = []
            for cells in reader:
                if names and any(cells):
                    yield line, table_row(names, cells)
                names = names or ["_".join(name.lower().split()) for name in cells]
                line = reader.line_num + 1
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        line += getattr(error, "lineno", 1) - 1  # of a JSON array
        if isinstance(error, UnicodeDecodeError):
            line += error.object.count(b"\n", 0, error.start)
        advice = "Mend that line (a quote too many?), or save the table as CSV UTF-8"
        sys.exit(f"{path}, line {line}: {brief(error)}. {advice}")


def table_row(names, cells):
    """The row of a CSV as a dictionary. Raises ValueError where its cells are not its columns'."""
    if any(cells[len(names) :]):  # such as a title with a comma and without quotes
        raise ValueError(f"{len(cells)} cells for {len(names)} columns")
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]} in the first line")
    if any(re.search(r"\n.*\S\.(jpe?g|png|webp)\b", cell, re.IGNORECASE) for cell in cells):
        raise ValueError("a quote that is opened here takes in the rows below")
    return dict(zip(names, cells, strict=False))


def read_folder(folder):
    """Yield (number, row) of the images below a folder, each one's own folder being its class."""
    names = sorted(glob.glob("**", root_dir=folder, recursive=True))  # but for hidden ones
    images = [name for name in names if name.lower().endswith(ENDINGS)]
    for number, name in enumerate(images, 1):
        texts, label = Path(folder, name).with_suffix(".txt"), Path(name).parent.name
        titles = texts.read_text("utf-8-sig", "replace").splitlines() if texts.exists() else []
        yield number, {"image_path": name, "product_title": titles, "class_label": label}


def read_examples(split, table):
    """[Example], one for each image of a table or a folder, and one for each row of no use."""
    examples, columns, is_folder = {}, {}, os.path.isdir(table)
    for line, row in read_folder(table) if is_folder else read_rows(table):
        if not isinstance(row, dict):
            sys.exit(f"{table}, line {line}: no JSON object. A row is an object with an image_path")
        columns |= dict.fromkeys(row)
        image, reason = row.get("image_path"), ""
        path = os.path.normpath(str(image).strip().replace("\\", "/"))
        path = os.path.join(table if is_folder else IMAGE_PATH, path)
        if not isinstance(image, str) or not image.strip():
            reason = f"no path in image_path: {image!r:.80}"
        elif "://" in image:
            reason = f"an address, download the image first: {image}"
        elif not os.path.isfile(path):
            reason = f"there is no such file: {path}"
        example = examples.setdefault(line if reason else path, Example(split, path, reason))
        titles, names = (read_texts(row.get(key)) for key in ("product_title", "class_label"))
        titles = (text for text in titles if text.lower() not in MISSING)
        example.captions = tuple(dict.fromkeys([*example.captions, *titles]))
        names = filter(None, map(class_name, names))
        example.classes = tuple(dict.fromkeys([*example.classes, *names]))
        example.product = max(example.product, *read_texts(row.get("product_id")), "")
        example.lines += (line,)
        if len(example.classes) > 1:
            example.reason = f"several classes: {path} is {', '.join(example.classes)}"
    say(f"{table} has the columns {', '.join(map(str, columns)):.300}")
    return [*examples.values()]


def class_prompts(name):
    """saree → ["a photo of a saree", …], one for each of PROMPTS."""
    names = {class_name(label): words for label, words in CLASS_NAMES.items()}
    return [prompt.replace("{}", names.get(name, name)) for prompt in PROMPTS]


# ---- Splits --------------------------------------------------------------------------------------
def shuffled(count):
    """A permutation of range(count), int64 [count], that follows from SEED."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(SEED))


def load_splits(resolution):
    """{"train", "val" and, where there is a file, "test": FashionDataset}; writes skipped.jsonl."""
    splits = ("train", "val", "test") if "{split}" in JSON_PATH else ("train",)
    tables = {split: JSON_PATH.replace("{split}", split) for split in splits}
    tables = {split: table for split, table in tables.items() if os.path.exists(table)}
    examples = [e for split, table in tables.items() for e in read_examples(split, table)]
    usable = [example for example in examples if not example.reason]
    names = sorted({name for example in usable for name in example.classes})
    names = names if len(names) > 1 else []  # one has nothing to be told from
    say(f"{len(names):,} classes: {', '.join(names):.200}")
    pixels, digests, reasons = open_cache([example.path for example in usable], resolution)
    for row, (example, digest) in enumerate(zip(usable, digests, strict=True)):
        example.row, example.digest, example.reason = row, digest, reasons.get(example.path, "")
        if not example.captions and not (names and example.classes):
            example.reason = "no title, and no class to tell from others"
    parts = find_usable(tables, examples)
    if "val" not in parts:
        parts["train"], parts["val"] = hold_out(parts["train"])
    for split in [*parts][1:]:
        say_what_is_odd(split, parts[split], parts["train"])
    return {split: FashionDataset(part, pixels, names) for split, part in parts.items()}


def find_usable(tables, examples):
    """→ {split: its usable examples}. Says what is left out, and stops where that is most."""
    lines = [(example, line) for example in examples if example.reason for line in example.lines]
    skipped = [{"split": e.split, "line": line, "reason": e.reason} for e, line in lines]
    save("skipped.jsonl", skipped)
    parts = {}
    for split, table in tables.items():
        parts[split] = usable = [e for e in examples if e.split == split and not e.reason]
        left_out = [row for row in skipped if row["split"] == split]
        if not usable or sum(len(example.lines) for example in usable) < len(left_out):
            first = "line {line}: {reason}".format(**left_out[0]) if left_out else "it is empty"
            form = "Rows are JSON objects, or a CSV's, whose image_path is relative to IMAGE_PATH"
            sys.exit(f"{table}: most rows cannot be used; {first:.300}. {form}")
        images = f"{len(usable):7,} images, {sum(not e.captions for e in usable):,} of them without"
        captions = f"{sum(len(e.captions) for e in usable):,} captions"
        say(f"{split:5} {images} a title; {captions}; {len(left_out):,} rows skipped")
    kinds = Counter(row["reason"].partition(":")[0] for row in skipped)
    for kind, count in kinds.most_common():
        first = next(row for row in skipped if row["reason"].startswith(kind))
        place = "{split}, line {line}: {reason:.200}".format(**first)
        say(f"{count:13,} rows skipped, such as {place}. All: {OUTPUT_PATH}/skipped.jsonl")
    return parts


def hold_out(examples):
    """→ (the examples of train, those held out for val: of the groups whose hash with SEED is low).

    A group is the images of a product_id or, without one, of equal pixels. The threshold only falls
    as images are added to more than a few: none that was trained on enters val later.
    """
    groups = [example.product or example.digest for example in examples]
    hashes = {g: int(hashlib.sha256(f"{SEED} {g}".encode()).hexdigest()[:15], 16) for g in groups}
    share = max(0.05, min(0.2, 100 / len(groups)))
    limit = min(max(share * 16**15, min(hashes.values())), max(hashes.values()) - 1)  # 2 sides
    sides = [], []
    for example, group in zip(examples, groups, strict=True):
        sides[hashes[group] <= limit].append(example)
    held_out = f"{len(sides[1])} of {len(groups)} images of train are held out for val"
    [(group, largest)], asked = Counter(groups).most_common(1), max(1, share * len(groups))
    if not sides[1] or (len(sides[1]) > 2 * asked and largest > asked):
        shared = f"the product_id {group!r}" if isinstance(group, str) else "equal pixels"
        held_out = f"train and val need images each: {held_out}, as {largest} share {shared}"
        sys.exit(f"{JSON_PATH}: {held_out}. Mend that, or give val a file of its own")
    say(f"{held_out}: there is no val file")
    return sides


def say_what_is_odd(split, examples, train):
    """Report what makes a split measure something else than unseen images of trained classes."""
    names = {*chain(*(e.classes for e in examples))} - {*chain(*(e.classes for e in train))}
    if names:
        say(f"{split}: {len(names)} classes that train lacks: {', '.join(sorted(names)):.200}")
    digests = {example.digest for example in train}
    seen = [example.path for example in examples if example.digest in digests]
    if seen:
        say(f"{split}: {len(seen)} images that train has too, such as {', '.join(seen[:3]):.200}")


# ---- Images: decoded once into a file ------------------------------------------------------------
def load_image(path, resolution):
    """An image as a viewer shows it, resized and cropped as CLIP does: uint8 [3, R, R]."""
    Image.MAX_IMAGE_PIXELS = None  # the limit is the one below
    image = Image.open(path, formats=[kind for kind in FORMATS if kind in Image.OPEN])
    width, height = image.size
    if width * height > (2e8 if image.format in ("JPEG", "MPO") else 89_478_485):  # Pillow's own
        raise ValueError("too many pixels, make the image smaller")
    if max(width, height) > 50 * min(width, height):  # would be resized to gigabytes
        raise ValueError("a strip more than 50 times as long as wide")
    deep = image.mode.startswith("I") or ";16" in str(image.tile)  # 16 bits a channel
    image.draft(None, (2 * resolution, 2 * resolution))  # decodes a large JPEG at 1/2, 1/4 or 1/8
    image.load()  # raises where the file is damaged, which a second load() no longer does
    with suppress(Exception):  # a broken EXIF block
        image = ImageOps.exif_transpose(image)
    image = image.convert("I") if image.mode.startswith("I") else image
    if image.mode == "F" or (image.mode == "I" and image.getextrema()[1] >= 2**16):
        raise ValueError("floating point or 32 bits a channel, save the image with 8")
    if image.mode == "I":  # convert() alone would clip
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    if deep and max(high for _, high in image.convert("RGB").getextrema()) < 16:
        raise ValueError("less than a sixteenth of 16 bits is used, save the image with 8")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = resize(image.convert("RGB"), resolution, InterpolationMode.BICUBIC)
    return pil_to_tensor(center_crop(image, resolution)).contiguous()


def decode(path, resolution):
    """→ (pixels, a digest of 64 bits, ""), or (black pixels, one, why it cannot be used)."""
    reason, pixels = "", torch.zeros(3, resolution, resolution, dtype=torch.uint8)
    try:
        pixels = load_image(path, resolution)
    except Exception as error:  # damaged files make Pillow raise nearly anything
        known = type(error) is ValueError
        reason = f"{error}: {path}" if known else f"it cannot be decoded: {path} ({brief(error)})"
    some = pixels[:, ::8].contiguous()  # an eighth of an image's rows tells it from others
    return pixels, int(hashlib.blake2b(some.numpy(), digest_size=8).hexdigest(), 16), reason


def write_cache(cache_file, paths, resolution):
    """Decode N images into a file: pixels uint8 [N, 3, R, R], then the rest of decode as JSON."""
    digests, reasons, work = [], {}, functools.partial(decode, resolution=resolution)
    with atomic_write(cache_file) as file, ThreadPoolExecutor() as threads:
        with progress("decoding", len(paths)) as bar:
            for start in range(0, len(paths), 256):
                part = paths[start : start + 256]
                for path, (pixels, digest, why) in zip(part, threads.map(work, part), strict=True):
                    file.write(pixels.numpy())
                    digests.append(digest)
                    reasons |= {path: why} if why else {}
                    bar.update()
        file.write(json.dumps((digests, reasons)).encode())


def open_cache(paths, resolution):
    """→ (pixels uint8 [N, 3, R, R], digests [N] of the pixels, {path: why it cannot be used}).

    Decodes if need be. The file's name is a digest of what it was made from: a file that exists is
    valid, and two datasets never share one. It is memory-mapped: the system keeps what it can.
    """
    digest = hashlib.sha256(Image.__version__.encode())
    for path in paths:
        status = os.stat(path)
        facts = path, status.st_size, status.st_mtime_ns, os.access(path, os.R_OK)
        digest.update(repr(facts).encode("utf-8", "replace"))
    cache_file = f"{CACHE_PATH}/{resolution}-{digest.hexdigest()[:12]}.u8"
    if LOCAL_RANK == 0 and not os.path.exists(cache_file):
        write_cache(cache_file, paths, resolution)
    if WORLD_SIZE > 1:  # all wait for the slowest machine, longer than another exchange may take
        dist.barrier(dist.new_group(timeout=timedelta(days=7), backend="gloo"))
    shape = len(paths), 3, resolution, resolution
    content = torch.from_file(cache_file, size=os.path.getsize(cache_file), dtype=torch.uint8)
    pixels, facts = content.tensor_split([math.prod(shape)])
    return pixels.view(shape), *json.loads(facts.numpy().tobytes())


# ---- Dataset and batches -------------------------------------------------------------------------
class FashionDataset(Dataset):
    """Images and their texts: dataset[i] → (pixels uint8 [3, R, R], tokens int32 [77]).

    i may also be a list, a slice or a tensor of n indices: → ([n, 3, R, R], [n, 77]). The text is
    the image's first caption, or the empty text where it has none.

    tokens: int32 [C + 1, 77], the distinct captions, then the empty text. captions[i]: the rows of
    tokens of image i's captions, or [-1]. first_texts: int64 [N], the first of these.
    prompts: int32 [K, len(PROMPTS), 77]. pairs: int64 [P, 2], (image, caption). labels: int64 [N],
    in class_names; -1 for none. queries: {caption: its text}, at most eight, for the figures.
    """

    def __init__(self, examples, pixels, class_names):
        self.examples, self.pixels, self.class_names = examples, pixels, class_names
        self.rows = torch.tensor([e.row for e in examples])
        number = {(name,): i for i, name in enumerate(class_names)}
        self.labels = torch.tensor([number.get(e.classes, -1) for e in examples])
        texts = {text.lower(): text for e in examples for text in e.captions}  # alike to CLIP
        prompts = [prompt for name in class_names for prompt in class_prompts(name)]
        every = [*texts.values(), ""]
        parts = (every[start : start + 10_000] for start in range(0, len(every), 10_000))
        self.tokens = torch.cat([clip_tokenize(part, truncate=True).int() for part in parts])
        self.prompts = clip_tokenize(prompts, truncate=True).int().view(-1, len(PROMPTS), 77)
        row_of = {text: row for row, text in enumerate(texts)}
        captions = (dict.fromkeys(row_of[text.lower()] for text in e.captions) for e in examples)
        self.captions = [[*rows] or [-1] for rows in captions]
        pairs = [(i, caption) for i, captions in enumerate(self.captions) for caption in captions]
        self.pairs = torch.tensor([pair for pair in pairs if pair[1] >= 0]).view(-1, 2)
        self.first_texts = torch.tensor([captions[0] for captions in self.captions])
        self.queries = {i: every[i] for i in shuffled(len(texts))[:8].tolist()}

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        rows, shape = self.rows[index], self.pixels.shape[1:]
        pinned = torch.cuda.is_available() and get_worker_info() is None  # for a GPU's own copy
        pixels = torch.empty(rows.shape + shape, dtype=torch.uint8, pin_memory=pinned)
        torch.index_select(self.pixels, 0, rows.flatten(), out=pixels.view(-1, *shape))
        return pixels, self.tokens[self.first_texts[index]]

    def targets(self, index):
        """→ (the Targets of a batch of these images, the K classes that it has, int64 [K])."""
        titled = (self.first_texts[index] >= 0).nonzero().squeeze(1)
        labelled = ((self.labels[index] >= 0) & (CLASS_WEIGHT > 0)).nonzero().squeeze(1)
        classes, places = self.labels[index][labelled].unique(return_inverse=True)
        return Targets(titled, labelled, places), classes


class Batch(NamedTuple):
    pixels: torch.Tensor  # uint8 [b, 3, R, R], this process's share of the B images
    tokens: torch.Tensor  # int32 [b, 77], their texts
    prompts: torch.Tensor  # int32 [ceil(K / processes), 77], the share of the K classes' prompts
    num_classes: int  # K
    targets: Targets  # of the B images


def epoch_batches(dataset, epoch, batch_size, first_step=0):
    """Yield an epoch's Batches from a step on. All that is random follows from SEED and epoch."""
    rng = random.Random(f"{SEED} {epoch}")
    order = torch.tensor(rng.sample(range(len(dataset)), len(dataset)))
    drawn = torch.tensor([rng.choice(captions) for captions in dataset.captions])
    steps = len(dataset) // batch_size  # the rest waits for another epoch's shuffle
    templates = [rng.randrange(len(PROMPTS)) for _ in range(steps)]

    def load(step):
        whole = order[step * batch_size : (step + 1) * batch_size]
        own = whole.chunk(WORLD_SIZE)[RANK]
        targets, classes = dataset.targets(whole)
        count = -(-len(classes) // WORLD_SIZE)  # in equal shares: some prompts are encoded twice
        share = torch.arange(RANK * count, (RANK + 1) * count) % max(1, len(classes))
        prompts = dataset.prompts[classes[share], templates[step]]
        return Batch(dataset[own][0], dataset.tokens[drawn[own]], prompts, len(classes), targets)

    return load_ahead(load, range(first_step, steps))


def load_ahead(load, parts):
    """Yield load(part) of each part; for a GPU a thread loads the next meanwhile."""
    if not torch.cuda.is_available():  # on a CPU, a thread made training take 1.6 times as long
        yield from map(load, parts)
        return
    with ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(LOCAL_RANK,)) as thread:
        loading = (thread.submit(load, part) for part in parts)
        for loaded, _ in pairwise(chain(loading, [None])):  # the next one is submitted by now
            yield loaded.result()


# ---- The run: fingerprint, memory, saving and going on -------------------------------------------
# The constants that change the weights: going on refuses other values. BATCH_SIZE is apart.
HYPERPARAMETERS = ("MODEL", "NUM_EPOCHS", "LR", "WARMUP", "MAX_GRAD_NORM", "CLASS_WEIGHT", "SEED")
HYPERPARAMETERS += ("PROMPTS", "CLASS_NAMES")
SAVED = ("fingerprint", "chunk", "history", "views", "epoch", "step", "totals")
STATEFUL = ("model", "optimizer", "scaler")  # saved as state_dicts


def new_state(model, splits):
    """The run as it starts, on the model's device."""
    train = splits["train"]
    images = min(BATCH_SIZE, len(train))
    if not (share := images // WORLD_SIZE):
        sys.exit(f"{WORLD_SIZE} processes cannot share a batch of {images} images: start fewer")
    fingerprint = {name: globals()[name] for name in HYPERPARAMETERS}
    fingerprint["BATCH_SIZE in equal shares"] = batch_size = share * WORLD_SIZE
    for split, dataset in splits.items():
        rows = [(Path(e.path).name, e.captions, e.classes, e.product) for e in dataset.examples]
        rows = repr(rows).encode("utf-8", "replace")
        fingerprint[f"the rows of {split}"] = hashlib.sha256(rows).hexdigest()[:12]
    precision = choose_precision(model.mean.device)
    scaler = torch.amp.GradScaler(model.mean.device.type, enabled=precision == torch.float16)
    chunk = min(CHUNK_SIZE, share) if CHUNK_SIZE else fit_chunk(model, precision, train, share)
    steps, optimizer = len(train) // batch_size, make_optimizer(model)
    return State(model, optimizer, scaler, precision, batch_size, steps, chunk, fingerprint)


def bytes_kept(model, precision, dataset, count):
    """The bytes that the forward pass of `count` images, texts and prompts keeps for backward()."""
    sizes = {}

    def note(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    pixels, tokens = dataset[shuffled(len(dataset))[:count]]
    tokens = torch.cat([tokens, dataset.prompts[:count, 0]])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Both are alive at once, so that no address is used twice.
        _ = encode_images(model, precision, pixels), encode_texts(model, precision, tokens)
    return sum(sizes.values())


def fit_chunk(model, precision, dataset, share):
    """How many of a process's images to encode at a time, so that training fits the free memory.

    A CPU has no error to catch when memory runs out: the system kills the process. So the size of
    an image with its texts is measured, and what training takes besides is known.
    """
    free = free_memory(model.mean.device)  # before measuring: torch reuses that memory
    few, more = min(4, len(dataset)), min(12, len(dataset))
    kept = [bytes_kept(model, precision, dataset, count) for count in (few, more)]
    image = 1.5 * (kept[1] - kept[0]) / max(1, more - few)  # half as much again comes and goes
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    # gradients, two moments, a chunk's own gradients; half-precision copies; what is exchanged
    besides = 4 + 0.5 * (precision != torch.float32) + (WORLD_SIZE > 1)
    batch = WORLD_SIZE * share
    logits = 20 * batch * (batch + min(batch, len(dataset.prompts)))  # 16 bytes were measured
    free -= besides * weights + logits + 2**29
    graph = 15_000 * len(list(model.parameters()))  # a checkpoint's, until backward() comes to it
    even = {-(-share // count) for count in range(1, share + 1)}
    needed = {chunk: image * chunk + graph * share / chunk for chunk in even}
    return max((c for c in even if needed[c] <= free), default=min(even, key=needed.get))


def free_memory(device, root="/sys/fs/cgroup"):
    """The bytes that this process may still take, within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] - 2**29
    free = psutil.virtual_memory().available
    names = ("max", "current", "stat"), ("limit_in_bytes", "usage_in_bytes", "stat")
    for prefix, files in zip(("memory", "memory/memory"), names, strict=True):  # versions 2 and 1
        with suppress(OSError, ValueError, IndexError):  # no such file; "max" is no number
            limit, used, stat = (Path(root, f"{prefix}.{name}").read_text() for name in files)
            cache = re.findall(r"inactive_file (\d+)", stat)[-1]  # given up when memory is short
            free = min(free, int(limit) - int(used) + int(cache))
    return free / LOCAL_WORLD_SIZE


def save_run(state):
    """Write last.pt, from which the run goes on exactly."""
    read_losses(state, state.totals)  # stops where they are not finite
    saved = {name: getattr(state, name) for name in SAVED}
    save("last.pt", saved | {name: getattr(state, name).state_dict() for name in STATEFUL})


def resume(state):
    """Go on from last.pt, where there is one. Stops where it is of another training."""
    path, chunk = f"{OUTPUT_PATH}/last.pt", state.chunk
    if os.path.exists(path):
        saved = {}
        with suppress(Exception):  # a damaged file raises nearly anything
            held = torch.load(path, map_location="cpu", weights_only=True)
            saved = held if held.keys() == {*SAVED, *STATEFUL} else {}
        refuse_changes(path, saved.get("fingerprint", {}), state.fingerprint)
        for name in SAVED:
            setattr(state, name, saved[name])
        for name in STATEFUL:
            if saved[name]:  # a scaler that scales nothing has saved nothing
                getattr(state, name).load_state_dict(saved[name])
        # Larger chunks would add up in another order.
        state.chunk = chunk if CHUNK_SIZE else min(chunk, state.chunk)
        say(f"Going on from {path}: epoch {state.epoch}, of which {state.step} steps are done.")
    place = repr((state.epoch, state.step, state.fingerprint)).encode("utf-8", "replace")
    place = int(hashlib.sha256(place).hexdigest()[:15], 16)
    if int(all_reduce(torch.tensor(place), dist.ReduceOp.MAX)) != place:
        sys.exit(f"{path} or the rows differ between processes: all have to see the same files")


def refuse_changes(path, old, new):
    """Stop, naming the constants and rows that are not those of the saved run."""
    batch = "BATCH_SIZE in equal shares"
    changes = [f"{k} was {old.get(k)}, is {v}" for k, v in new.items() if old.get(k) != v]
    changes += [f"there were {name}" for name in old.keys() - new.keys()]
    if batch in old and old[batch] != new[batch]:
        counts = [str(count) for count in range(1, old[batch] + 1) if old[batch] % count == 0]
        changes.append(f"{', '.join(counts)} processes can share a batch of {old[batch]}")
    if changes:
        what = "; ".join(changes) if old else "it cannot be read"
        further = f'to train further from its result also MODEL = "{OUTPUT_PATH}/best.pt"'
        advice = f"Set that back to go on, or set another OUTPUT_PATH; {further}"
        sys.exit(f"{path} is of another training: {what}. {advice}")


# ---- Weights: files and the hub ------------------------------------------------------------------
HUB_NAMES = {  # OpenAI's models on the hub, as plain tensors
    **{f"RN{n}": f"timm/resnet{n}_clip.openai" for n in ("50", "101", "50x4", "50x16", "50x64")},
    "ViT-B/32": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B/16": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L/14": "timm/vit_large_patch14_clip_224.openai",
    "ViT-L/14@336px": "timm/vit_large_patch14_clip_336.openai",
}


def check_config(config):
    """Raise ValueError where an open_clip_config.json describes another form than OpenAI's CLIP."""
    model = config["model_cfg"]
    found = model | model["vision_cfg"] | model["text_cfg"] | config.get("preprocess_cfg", {})
    read_from_tensors = "embed_dim vision_cfg text_cfg image_size size layers width patch_size"
    form = {"context_length": 77, "vocab_size": 49408, "heads": model["text_cfg"]["width"] // 64}
    form |= {"quick_gelu": True, "head_width": 64, "mlp_ratio": 4, "mode": "RGB"}
    form |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    form |= {"mean": PIXEL_MEAN, "std": PIXEL_STD} | dict.fromkeys(read_from_tensors.split())
    other = [f"{k} is {v}" for k, v in found.items() if v and form.get(k, "") not in (v, None)]
    if other or not model.get("quick_gelu"):
        raise ValueError(f"it differs from OpenAI's CLIP: {', '.join(other) or 'no quick_gelu'}")


def find_weights(name):
    """The path of MODEL's weights: a file as it is, or the hub's, whose form is checked first."""
    repository = HUB_NAMES.get(name, name)
    is_file = Path(name).suffix in (".pt", ".pth", ".bin", ".safetensors") or os.path.exists(name)
    if is_file or repository.count("/") != 1:
        return name
    config = hub_file(repository, "open_clip_config.json")
    check_config(json.loads(Path(config).read_text(encoding="utf-8")))
    return hub_file(repository, "open_clip_model.safetensors")


def hub_file(repository, name):
    """The path of a file of the hub: in the cache, without a request, or else fetched."""
    cached = try_to_load_from_cache(repository, name)
    try:
        return cached if isinstance(cached, str) else hf_hub_download(repository, name)
    except Exception as error:  # no such repository or file, or no way to the hub
        link = f"https://huggingface.co/{repository}/resolve/main/open_clip_model.safetensors"
        raise OSError(f"{brief(error)}. Download {link}, and set MODEL to its path") from None


def load_pickle(path):
    """What torch.save or torch.jit.save has written."""
    with suppress(RuntimeError):  # no archive
        return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, UnpicklingError):  # torch advises to run the code in the file
        raise ValueError("it holds more than tensors, or none: save model.state_dict()") from None


def read_weights(path):
    """The tensors of a CLIP in a file, under OpenAI's names.

    The file: safetensors, a TorchScript archive as OpenAI's are, or a dictionary of tensors, which
    may lie in a checkpoint's "state_dict", "model_state_dict" or "model".
    """
    weights = (load_file if str(path).endswith(".safetensors") else load_pickle)(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        inner = weights.get(wrapper)
        weights = inner if isinstance(inner, dict) else weights
    words = "token_embedding.weight"  # a prefix of all names stands before this one
    prefix = next((name.removesuffix(words) for name in weights if name.endswith(words)), "")
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    if not {words, "positional_embedding", "visual.conv1.weight"} <= weights.keys():
        names = f"{len(weights)} tensors, {', '.join(weights):.100}"
        raise ValueError(f"it holds {names}. For transformers' names see Recipes in data/README.md")
    return weights


# ---- Machine, processes and signals --------------------------------------------------------------
def prepare_machine():
    """Set up the output, the memory and the other processes → this process's device."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's own
            # Windows' code pages lack most letters; a pipe, or a log, should show lines at once.
            stream.reconfigure(errors="replace", line_buffering=True)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", LOCAL_RANK)
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # re-plans for every length of captions
    elif shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        say("THE GPU IS NOT USED: this torch finds none. See Troubleshooting in the README")
    if WORLD_SIZE > 1:
        is_nccl = device.type == "cuda" and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_nccl else "gloo")
        all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory now, not at the peak
    return device


def keep_freed_memory():
    """Have malloc keep freed memory: getting it anew took a third of a step of 256 pairs."""
    with suppress(AttributeError, OSError, TypeError):  # no glibc
        libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4
        libc.malloc_trim(0)  # what loading has left goes back first
        libc.mallopt(trim_threshold, -1)  # never give any back
        libc.mallopt(mmap_max, 0)  # no mapping of its own for a large block


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """The sum, or another operation, of all processes' tensors, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def note_signal(state, number, _frame):
    """Have the run end after its step; a second Ctrl-C or SIGTERM ends it at once."""
    state.signals.append(number)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)  # no Python handler can interrupt an exchange


def stop_if_signalled(state):
    """End the run, saved, if one of its processes was told to."""
    number = int(all_reduce(torch.tensor(max(state.signals, default=0)), dist.ReduceOp.MAX))
    if number:
        save_run(state)
        say(f"Stopped and saved in {OUTPUT_PATH}/last.pt: the same command goes on from there.")
        all_reduce(torch.zeros(1))  # it is saved before torchrun hears of any exit
        sys.exit(128 + number)


def progress(task, total, done=0):
    """A bar at a terminal; elsewhere, as in a notebook's cell or a log, a line every minute."""
    how = {"desc": task, "total": total, "initial": done, "unit": " images", "disable": RANK > 0}
    if sys.stderr.isatty():
        return tqdm(leave=False, **how)
    form = "{desc}: {n_fmt} of {total_fmt}{postfix}, {rate_fmt}, {remaining} left\n"
    return tqdm(delay=60, mininterval=60, miniters=1, bar_format=form, **how)


def say(line):
    """Print from the first process only; at a terminal, above the progress bar."""
    if RANK == 0:
        (tqdm.write if sys.stderr.isatty() else print)(line)


# ---- Files and constants -------------------------------------------------------------------------
@contextmanager
def atomic_write(path):
    """A file to write, which on success replaces path at once."""
    of_host = f"{path}.{socket.gethostname()}"
    temporary = f"{of_host}.{os.getpid()}.tmp"
    try:
        for stale in glob.glob(f"{glob.escape(of_host)}.*.tmp"):
            if not psutil.pid_exists(int(stale.split(".")[-2])):  # that run was killed
                os.remove(stale)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        for seconds in (0.1, 0.5, 1, 2, 4, 0):  # Windows' scanners hold a new file for a moment
            with suppress(PermissionError if seconds else ()):
                return os.replace(temporary, path)
            time.sleep(seconds)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError from it
        with suppress(OSError):
            os.remove(temporary)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        sys.exit(f"cannot write {path}: {cause}; what it held is untouched")


def save(name, content):
    """Write that file of OUTPUT_PATH, from the first process: a figure, lines of JSON, tensors."""
    if RANK > 0:
        return
    with atomic_write(f"{OUTPUT_PATH}/{name}") as file:
        if name.endswith(".png"):
            content.savefig(file, format="png", dpi=100, bbox_inches="tight", pad_inches=0.15)
        elif name.endswith(".jsonl"):
            file.writelines(json.dumps(row).encode() + b"\n" for row in content)
        else:
            torch.save(content, file)


def brief(error, limit=300):
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit].rstrip(".")


RULES = {  # constants: (what each must be, whether it is); the last two make folders
    "JSON_PATH": ("something that exists", lambda v: os.path.exists(v.replace("{split}", "train"))),
    "IMAGE_PATH": (
        "a folder that exists",
        lambda v: os.path.isdir(v) or os.path.isdir(JSON_PATH.replace("{split}", "train")),
    ),
    "MODEL": ("text in quotes", lambda v: isinstance(v, str)),
    "BATCH_SIZE": ("a whole number from 2 on", lambda v: type(v) is int and v >= 2),
    "NUM_EPOCHS SEED": ("a whole number from 0 on", lambda v: type(v) is int and v >= 0),
    "LR MAX_GRAD_NORM": ("a number above 0", lambda v: v > 0),
    "WARMUP": ("a number from 0 to 1", lambda v: 0 <= v <= 1),
    "CLASS_WEIGHT": ("a number from 0 on", lambda v: 0 <= v < math.inf),
    "PROMPTS": ("texts with {} in each", lambda v: v and all(text.count("{}") for text in v)),
    "CLASS_NAMES": ("a dictionary of texts", lambda v: all(text.strip() for text in v.values())),
    "CHUNK_SIZE": ("None or a whole number", lambda v: v is None or type(v) is int and v >= 1),
    "OUTPUT_PATH CACHE_PATH": ("a folder", lambda v: v and not os.makedirs(v, exist_ok=True)),
}


def check_constants():
    """Take the sample's where there is no dataset. Stop at a constant that cannot work."""
    constants = globals()
    for name in ("IMAGE_PATH", "JSON_PATH", "OUTPUT_PATH", "CACHE_PATH", "MODEL"):
        if re.search(r"[\0-\x1f]", str(constants[name])):  # "my_shop\rows.csv" holds a return
            sys.exit(f"{name} is {constants[name]!r}: write / between folders, not \\")
        if isinstance(constants[name], str):
            constants[name] = os.path.expanduser(constants[name])
    defaults = "data/indo-fashion", "data/indo-fashion/{split}_data.json"
    if defaults == (IMAGE_PATH, JSON_PATH) and not os.path.isdir(IMAGE_PATH):
        say("IndoFashion is not in data/indo-fashion; data/README.md tells how to get it from")
        say("kaggle.com. Running the bundled sample, whose constants are those in SAMPLE_RUN.")
        constants.update(SAMPLE_RUN)
    for names, (wanted, is_right) in RULES.items():
        for name in names.split():
            with suppress(Exception):  # of another type
                if is_right(constants[name]):
                    continue
            where = f" ({os.path.abspath(str(constants[name]))})" if name.endswith("PATH") else ""
            sys.exit(f"{name} is {constants[name]!r}{where}; it must be {wanted}")


# ---- Figures -------------------------------------------------------------------------------------
def draw_curves(history, best_epoch):
    """curves.png: the epochs' lines of metrics.jsonl."""
    search = [f"{way}_r{k}" for way in DIRECTIONS for k in (1, 5)]
    panels = {"loss": ["train_loss", "loss"], "classes": ["accuracy", "macro_f1"], "search": search}
    lines = [line for line in history if line["split"] == "val"]
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        for key in keys:
            values = [line.get(key, math.nan) for line in lines]
            axes.plot([line["epoch"] for line in lines], values, marker=".", label=key)
        axes.axvline(best_epoch, color="grey", linestyle=":", label="best epoch")
        axes.set(title=title, xlabel="epoch (0 is before training)")
        axes.set_ylim((None, None) if title == "loss" else (-0.03, 1.03))
        axes.legend()
        axes.grid(alpha=0.3)
        axes.locator_params("x", integer=True)
    save("curves.png", figure)


def draw_confusion(dataset, views):
    """confusion.png: the percentages of each class taken for each class; up to 60 classes."""
    names, known = dataset.class_names, dataset.labels >= 0
    if not known.any() or len(names) > 60:
        return
    labels = dataset.labels[known]
    side = max(2.5, 0.32 * len(names))  # inches
    ticks = [textwrap.fill(name, 30, max_lines=2) for name in names]
    figure = Figure(figsize=(2 * side + 4, side + 3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for panel, (when, view) in zip(panels, views.items(), strict=True):
        cells = labels * len(names) + view["predicted"][known]
        table = cells.bincount(minlength=len(names) ** 2).view(len(names), -1)
        fractions = table / table.sum(1, keepdim=True).clamp(min=1)
        panel.imshow(fractions.numpy(), cmap="Greens", vmin=0, vmax=1)
        for true, predicted in fractions.ge(0.005).nonzero().tolist():
            value = float(fractions[true, predicted])
            style = {"color": "white" if value > 0.5 else "black", "fontsize": 8}
            panel.text(predicted, true, f"{100 * value:.0f}", ha="center", va="center", **style)
        right = float(table.diagonal().sum() / len(labels))
        panel.set(title=f"{when} training: {right:.0%} right", xlabel="predicted")
        panel.set_xticks(range(len(names)), ticks, rotation=90, parse_math=False)
        panel.set_yticks(range(len(names)), ticks, parse_math=False)
    panels[0].set_ylabel("class, and the % of its images")
    save("confusion.png", figure)


def draw_retrieval(dataset, views):
    """retrieval.png: the images found for at most eight captions, before and after training."""
    if not dataset.queries:
        return
    width, count = views["before"]["found"].shape[1], len(dataset.queries)
    figure = Figure(figsize=(2.6 * width, 1.5 * count + 0.3))
    gaps = {"hspace": 0.35, "wspace": 0.05}
    grid = figure.subplots(count, 2 * width + 1, squeeze=False, gridspec_kw=gaps)
    for number, (caption, text) in enumerate(dataset.queries.items()):
        own = dataset.pairs[dataset.pairs[:, 1] == caption, 0]  # the images of the caption
        label, row = dataset.labels[own[0]], grid[number]
        row[0].set_title(textwrap.fill(text, 70, max_lines=1), loc="left", parse_math=False)
        row[width].set_visible(False)  # parts before from after
        for (when, view), panels in zip(views.items(), (row, row[width + 1 :]), strict=True):
            panels[0].set_ylabel(when)
            for image, panel in zip(view["found"][number].tolist(), panels, strict=False):
                color = "#a5dcaa" if dataset.labels[image] == label >= 0 else "white"
                panel.imshow(dataset[image][0].permute(1, 2, 0).numpy())
                panel.set(xticks=[], yticks=[])
                panel.spines[:].set(color="#148232" if image in own else color, linewidth=4)
    figure.text(0.5, 0.08, "dark frame: the caption's own image; light: its class", ha="center")
    save("retrieval.png", figure)


# ---- The whole run -------------------------------------------------------------------------------
def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends loading at once
    device = prepare_machine()
    check_constants()
    model = load_clip(MODEL).to(device)
    splits = load_splits(model.visual.input_resolution)
    keep_freed_memory()
    state = new_state(model, splits)
    resume(state)
    where = f"{str(state.precision)[6:]} on {WORLD_SIZE} × {device.type}"
    steps = f"{state.steps_per_epoch} steps of {state.batch_size} images, {state.chunk} at a time"
    say(f"{MODEL} in {where}: {NUM_EPOCHS} epochs of {steps}; output in {OUTPUT_PATH}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, functools.partial(note_signal, state))
    try:
        train(state, splits)
        finish(state, splits)
    except torch.OutOfMemoryError:
        advice = f"set CHUNK_SIZE = {max(1, state.chunk // 2)} or another MODEL, and run it again"
        sys.exit(f"out of memory at {state.chunk} images at a time: {advice}")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

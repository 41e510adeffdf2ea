"""Search your photos with CLIP, by words or by a photo, and sort them into classes.

python data/search.py                      # asks for queries; an empty line ends
python data/search.py "red saree" 1.jpg    # answers these
"""

import csv
import glob
import hashlib
import html
import io
import os
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import indofashion_clip as ic

MODEL = "outputs/sample/best.pt"  # or "ViT-B/32", OpenAI's, to try before you train
FOLDER = "data/sample/images/test"  # of photos, also in folders inside it
CLASSES = ["saree", "men's kurta", "pair of palazzo pants"]  # for classes.csv; [] writes none
RESULTS = 20  # photos in an answer
MODEL, FOLDER = map(os.path.expanduser, (MODEL, FOLDER))

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{0}</title>
<meta name="viewport" content="width=device-width"><style>:root {{ color-scheme: light dark }}
body {{ margin: 1.5rem; font: 1rem/1.4 system-ui, sans-serif; overflow-wrap: anywhere }}
main {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)) }}
img {{ width: 100%; aspect-ratio: 3/4; object-fit: contain }} a {{ color: inherit }}
</style><h1>{0}</h1><p>{1}</p><main>{2}</main>"""
PHOTO = '<a href="{0}"><img src="{0}" alt="" loading="lazy"><br><b>{1:.3f}</b> {2}</a>\n'


def find_images(folder):
    """→ ([(path, size, time)] of images, [why a file is left out]), with what links lead to."""
    images, reasons = [], []
    paths = glob.glob(os.path.join(glob.escape(folder), "**"), recursive=True)  # not hidden ones
    for path in sorted(filter(os.path.isfile, paths)):
        if path.lower().endswith(ic.ENDINGS):
            images.append((path, os.stat(path).st_size, os.stat(path).st_mtime_ns))
        else:
            ending = os.path.splitext(path)[1].lower() or "none"
            reasons.append(f"no image by its ending, {ending}: {path}")
    return images, reasons


def encode_new(model, precision, images, reasons):
    """→ {image: its features, float16 [D]}: kept by an earlier run, or encoded and kept now."""
    facts, held = [FOLDER, os.path.abspath(FOLDER), MODEL], {}
    if os.path.isfile(MODEL):
        facts += [os.path.abspath(MODEL), os.stat(MODEL).st_size, os.stat(MODEL).st_mtime_ns]
    os.makedirs(cache := os.path.expanduser(ic.CACHE_PATH), exist_ok=True)
    digest = hashlib.sha256(repr(facts).encode("utf-8", "replace")).hexdigest()[:16]
    file, side = f"{cache}/search-{digest}.pt", [model.visual.input_resolution] * 32
    with suppress(Exception):  # there is no such file, or it is damaged
        held = dict(zip(*torch.load(file, weights_only=True), strict=True))
    new = [image for image in images if image not in held]
    kept = {image: held[image] for image in images if image in held}
    if images:
        ic.say(f"{len(images):,} images, {len(new):,} to encode; {len(held) - len(kept):,} gone")
    with ThreadPoolExecutor() as threads, ic.progress("encoding", len(new)) as bar:
        while new or held:
            begin, held = time.monotonic(), {}
            try:
                while new and time.monotonic() < begin + 180:
                    part, new = new[:32], new[32:]
                    decoded = threads.map(ic.decode, [path for path, *_ in part], side)
                    pixels, _, why = zip(*decoded, strict=True)
                    features = ic.encode_images(model, precision, torch.stack(pixels)).half().cpu()
                    found = zip(part, features, why, strict=True)
                    kept |= {image: row for image, row, reason in found if not reason}
                    reasons += filter(None, why)
                    bar.update(len(part))
            finally:  # every three minutes, at the end and after Ctrl-C
                with ic.atomic_write(file) as output:
                    torch.save((list(kept), torch.stack([*kept.values()]) if kept else ()), output)
    return {image: kept[image] for image in images if image in kept}


def classify(model, precision, paths, features):
    """classes.csv: each path, its likeliest class by the mean of PROMPTS, the probability."""
    texts = [ic.class_prompts(ic.class_name(name)) for name in CLASSES]
    prompts = [ic.clip_tokenize(each, truncate=True) for each in texts]
    means = [ic.encode_texts(model, precision, tokens).mean(0) for tokens in prompts]
    means = torch.nn.functional.normalize(torch.stack(means).cpu(), dim=-1)  # [K, D]
    logits = model.logit_scale.exp().cpu() * features @ means.T
    rows = zip(paths, *(part.tolist() for part in logits.softmax(1).max(1)), strict=True)
    csv.writer(table := io.StringIO()).writerows((p, CLASSES[i], f"{v:.3f}") for p, v, i in rows)
    with ic.atomic_write("classes.csv") as file:
        file.write(table.getvalue().encode("utf-8-sig", "replace"))
    ic.say(f"each one's likeliest class: {os.path.abspath('classes.csv')}")


def answer(query, model, precision, paths, features):
    """Print the images nearest to words, or to an image, and write search.html → its address."""
    if query.lower().endswith(ic.ENDINGS) or os.path.exists(os.path.expanduser(query)):
        pixels, _, why = ic.decode(os.path.expanduser(query), model.visual.input_resolution)
        if why:
            return ic.say(why)
        asked = ic.encode_images(model, precision, pixels[None])
    else:
        words = query.encode("utf-8", "ignore").decode("utf-8")  # a terminal's odd bytes
        asked = ic.encode_texts(model, precision, ic.clip_tokenize(words, truncate=True))
    best, photos = (features @ asked[0].cpu()).topk(min(RESULTS, len(paths))), ""
    ic.say(f"{query}:")
    for similarity, i in zip(*(part.tolist() for part in best), strict=True):
        ic.say(f"  {similarity:.3f}  {paths[i]}")
        link = html.escape(Path(paths[i]).resolve().as_uri())
        photos += PHOTO.format(link, similarity, html.escape(os.path.relpath(paths[i], FOLDER)))
    about = html.escape(f"the nearest of {len(paths):,} images in {FOLDER}, by {MODEL}")
    with ic.atomic_write("search.html") as file:
        file.write(PAGE.format(html.escape(query), about, photos).encode("utf-8", "replace"))
    ic.say(f"as a page: {os.path.abspath('search.html')}")
    return Path("search.html").resolve().as_uri()


def main():
    device, (images, reasons) = ic.prepare_machine(), find_images(FOLDER)
    model = ic.load_clip(MODEL).to(device)
    how = model, ic.choose_precision(device)
    kept = encode_new(*how, images, reasons)
    for kind in sorted({reason.partition(":")[0] for reason in reasons}):
        those = [reason for reason in reasons if reason.startswith(f"{kind}:")]
        ic.say(f"{len(those):,} left out, such as {those[0]:.300}")
    if not kept:
        sys.exit(f"no images in {FOLDER} ({os.path.abspath(FOLDER)})")
    paths, features = [path for path, *_ in kept], torch.stack([*kept.values()]).float()
    if CLASSES:
        classify(*how, paths, features)
    screen = sys.platform in ("win32", "darwin") or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}
    shown = not screen or not sys.stdin.isatty()
    ask = "words, or the path of a photo (an empty line ends): "
    for query in sys.argv[1:] or iter(lambda: input(ask).strip(" \"'"), ""):
        address = answer(query, *how, paths, features)
        shown = shown or bool(address and webbrowser.open(address))


if __name__ == "__main__":
    with suppress(EOFError, KeyboardInterrupt), torch.no_grad():  # the end of queries; Ctrl-C
        main()

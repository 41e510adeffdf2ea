"""MODEL's weights: each kind of file, the Hugging Face hub, OpenAI's link, clip's own downloads."""

import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import clip
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    edited_script,
    grown,
    launch,
    make_batch,
    make_dataset,
    make_state,
    quick,
    read_metrics,
    relative,
    run_driver,
    run_script,
    tiny_model,
)
from safetensors.torch import save, save_file

import indofashion_clip as ic

PIXELS = make_batch(6).pixels


def tiny_resnet():
    torch.manual_seed(0)
    return clip.model.CLIP(64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1)


def small_vit():
    torch.manual_seed(0)
    return clip.model.CLIP(64, 64, 1, 64, 16, 77, 49408, 64, 1, 1)


def assert_same(weights, others):
    """Bit for bit."""
    assert isinstance(weights, dict), weights
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name


# ---- Files ----
ADAM = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
DICTIONARIES = {  # as people save them
    "plain": lambda weights: weights,
    "open_clip's": lambda weights: {
        "epoch": 3,
        "name": "ViT-B-32",
        "state_dict": {f"module.{name}": weight for name, weight in weights.items()},
        "optimizer": ADAM,
    },
    "a loop's": lambda weights: {
        "epoch": 3,
        "model": "ViT-B/32",
        "model_state_dict": weights,
        "optimizer_state_dict": ADAM,
        "loss": 0.5,
    },
    "model": lambda weights: {"model": weights, "args": {"lr": 1e-5}},
    "module": lambda weights: {f"module.{name}": weight for name, weight in weights.items()},
}


def save_archive(model, path):
    """A traced CLIP saved as a TorchScript archive, with the three numbers that OpenAI's have."""
    sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    for name in (*sizes, "mean", "std"):
        vars(model).pop(name, None)
        model._buffers.pop(name, None)
    for name, value in sizes.items():
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.rand(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.trace(model, inputs, check_trace=False).save(path)


def save_as(kind, model, path, monkeypatch):
    if kind == "safetensors":
        save_file(model.state_dict(), path)
    elif kind == "archive":
        save_archive(model, path)
    elif kind == "last.pt":
        monkeypatch.setattr(ic, "OUTPUT_PATH", str(path.parent))
        ic.save_run(make_state(model))
        (path.parent / "last.pt").rename(path)
    else:
        torch.save(DICTIONARIES[kind](model.state_dict()), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["safetensors", "archive", "last.pt", *DICTIONARIES])
@pytest.mark.parametrize("new", [tiny_model, tiny_resnet])
def test_a_file_of_each_kind_is_loaded_not_rounded(tmp_path, monkeypatch, new, kind):
    """Whatever it is called. clip reads the files that it can read to the same features."""
    path = tmp_path / ("clip.safetensors" if kind == "safetensors" else "my clip.v2")
    model = grown(new())
    save_as(kind, grown(new()), path, monkeypatch)
    loaded = ic.load_clip(str(path))
    assert not loaded.training and loaded.visual.input_resolution == 64
    assert_same(loaded.state_dict(), model.state_dict())
    tokens = clip.tokenize(["a saree", "men's kurta"])
    features = model.encode_image((PIXELS / 255 - loaded.mean) / loaded.std)
    features = F.normalize(features, dim=-1), F.normalize(model.encode_text(tokens), dim=-1)
    assert relative(ic.encode_images(loaded, torch.float32, PIXELS), features[0]) < 1e-5
    assert relative(ic.encode_texts(loaded, torch.float32, tokens), features[1]) < 1e-5
    if kind in ("archive", "plain"):
        by_clip, preprocess = clip.load(str(path), device="cpu")
        assert preprocess.transforms[0].size == 64
        assert relative(by_clip.encode_text(tokens), model.encode_text(tokens)) < 5e-3
        assert relative(by_clip.encode_image(PIXELS / 255), model.encode_image(PIXELS / 255)) < 5e-3


def changed(**changes):
    """A CLIP's tensors but for these; None: there is no such tensor."""
    weights = tiny_model().state_dict() | changes
    return {name: weight for name, weight in weights.items() if weight is not None}


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 605143316\n"
OTHERS = {  # file: (what is in it: text, or what torch.save gets; what the line says)
    "empty.pt": ("", "it holds no tensors"),
    "empty.safetensors": ("", "header too small"),
    "pointer.pt": (POINTER, "it holds no tensors"),
    "pointer.safetensors": (POINTER, "header"),
    "whole.pt": (
        torch.nn.Linear(1, 1),
        "also torch.nn.*Linear; save model.state_dict.. alone",
    ),
    "average.pt": ({"model_state_dict": {}, "loss": np.mean([0.5])}, "also numpy.*scalar; save"),
    "foreign.pt": ({"layer.weight": torch.ones(3)}, "1 entries .layer.weight., not a CLIP"),
    "nothing.pt": ({}, "0 entries"),
    "list.pt": ([torch.ones(3)], "1 entries .list., not a CLIP"),
    "tensor.pt": (torch.ones(3), "1 entries .Tensor., not a CLIP"),
    "numbered.pt": ({0: torch.ones(3)}, "1 entries .0., not a CLIP"),
    "named.pt": ({"model": "ViT-B/32", "best": {}}, "2 entries .model, best., not a CLIP"),
    "transformers.pt": ({"vision_model.a": torch.ones(3)}, "transformers' names"),
    "long.pt": (changed(positional_embedding=torch.ones(248, 128)), "text length.*248.*not .77"),
    "part.pt": (changed(**{"ln_final.weight": None}), "ln_final.weight"),
    "more.pt": (changed(**{"head.weight": torch.ones(3)}), "head.weight"),
    "cut.pt": (changed(), "(corrupted|central directory)"),
    "cut.safetensors": (changed(), "not fully covered"),
    "missing.pt": (None, "does not exist"),
    "missing.safetensors": (None, "No such file"),
    "nowhere/clip/weights": (None, "does not exist"),
    ".": (None, "is a directory"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_file_is_one_line_that_says_what_it_is(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    held, said = OTHERS[name]
    if isinstance(held, str):
        Path(name).write_text(held)
    elif held is not None:
        save_file(held, name) if name.endswith(".safetensors") else torch.save(held, name)
    if name.startswith("cut"):
        os.truncate(name, 100_000)
    line = f"MODEL: cannot load '{re.escape(name)}': .*{said}.*a repository of the hub.*ViT-B/32"
    with pytest.raises(SystemExit, match=line) as stop:
        ic.load_clip(name)
    message = str(stop.value)
    assert "\n" not in message and "\x1b" not in message and "weights_only" not in message
    assert len(message) < 600


# ---- Servers ----
class Answer(BaseHTTPRequestHandler):
    """What the hub answers to HEAD and GET of /OWNER/NAME/resolve/main/FILE."""

    def do_GET(self):
        hub, path, whole = self.server, self.path, True
        hub.requests.append(f"{self.command} {path}")
        if path == "/close":
            hub.close()
        content, code = b"" if path == "/close" else hub.files.get(path), 200
        if self.command == "GET" and path in hub.breaks_off:
            code, whole = hub.breaks_off[path], False
            hub.breaks_off[path] = 500
            if code == 500:
                del hub.breaks_off[path]
                content = b""
        if content is None:
            content, code, repository = b"", 404, path.split("resolve")[0]
            known = any(other.startswith(repository) for other in hub.files)
        self.send_response(code)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content if whole else content[: len(content) // 2])

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    """On a port of this machine; it notes what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.requests = {}, []
        self.breaks_off = {}  # path: 200; its next GET ends half-way, the one after it says 500
        self.url = f"http://127.0.0.1:{self.server_port}"
        Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def add(self, repository, **files):
        for name, content in files.items():
            path = f"/{repository}/resolve/main/{FILES[name]}"
            self.files[path] = json.dumps(content).encode() if name == "config" else content

    def add_link(self, content):
        """A link of OpenAI's form: the last folder is the file's checksum."""
        path = f"/clip/models/{hashlib.sha256(content).hexdigest()}/ViT-B-32.pt"
        self.files[path] = content
        return self.url + path

    def asked(self, repository):
        """The requests for a repository's files: ["HEAD config", …]."""
        names = {f"/{repository}/resolve/main/{file}": name for name, file in FILES.items()}
        requests = [request.split() for request in self.requests]
        return [f"{method} {names[path]}" for method, path in requests if path in names]


FILES = {
    "config": "open_clip_config.json",
    "safetensors": "open_clip_model.safetensors",
    "bin": "open_clip_pytorch_model.bin",
    "transformers": "model.safetensors",
}
FETCHED = ["HEAD config", "GET config", "HEAD safetensors", "GET safetensors"]
OPENAIS = "timm/vit_base_patch32_clip_224.openai"


def make_config(part="model", **changes):
    """A tiny CLIP's open_clip_config.json but for changes of a part; None: left out."""
    vision = {"image_size": 64, "layers": 1, "width": 64, "patch_size": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    model = {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    preprocess = {"mean": ic.PIXEL_MEAN, "std": ic.PIXEL_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    for name, value in changes.items():
        place = {"model": model, "vision": vision, "text": text, "preprocess": preprocess}[part]
        place[name] = value
        if value is None:
            del place[name]
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def load_each(folder, hub, steps):
    """What load_clip makes of each (MODEL, HOME, OpenAI's link), in a process of its own: weights,
    or the line that it ends with. "close" closes the hub. Waits between attempts are left out."""
    lines = f"""
        import os, time, torch, urllib.request
        time.sleep = lambda seconds: None
        outcomes = []
        for name, home, link in {steps!r}:
            os.environ["HOME"] = home
            ic.clip.clip._MODELS = dict.fromkeys(ic.clip.clip._MODELS, link)
            try:
                if name == "close":
                    outcomes.append(urllib.request.urlopen("{hub.url}/close").status)
                else:
                    outcomes.append(ic.load_clip(name).state_dict())
            except SystemExit as stop:
                outcomes.append(str(stop))
        torch.save(outcomes, "outcomes.pt")
    """
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "0"}
    assert "Traceback" not in run_driver(folder, lines, {}, **variables)
    outcomes = torch.load(folder / "outcomes.pt", weights_only=True)
    assert not any("\n" in outcome for outcome in outcomes if isinstance(outcome, str))
    return outcomes


def earlier_download(home, content):
    """A HOME in which clip has downloaded ViT-B-32.pt, with that content."""
    (home / ".cache/clip").mkdir(parents=True)
    (home / ".cache/clip/ViT-B-32.pt").write_bytes(content)
    return str(home)


# ---- The hub ----
@pytest.fixture(scope="module")
def weights():
    return grown(small_vit()).state_dict()


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """OpenAI's server has other weights than the hub, to tell them apart."""
    save_archive(small_vit(), path := tmp_path_factory.mktemp("archive") / "clip.pt")
    return path.read_bytes()


def test_two_processes_fetch_a_name_once_and_train_as_with_a_file_of_the_same(tmp_path, weights):
    (file := tmp_path / "clip.safetensors").write_bytes(save(weights))
    data = make_dataset(tmp_path / "data", train=8, val=5, test=0)
    constants = quick(data, NUM_EPOCHS=1, CHUNK_SIZE=4)
    run_script(tmp_path, **constants | {"MODEL": str(file)})
    by_file = read_metrics(tmp_path, times=False)
    shutil.rmtree(tmp_path / "outputs")
    hub, script = Server(), edited_script(tmp_path, **constants | {"MODEL": "ViT-B/32"})
    hub.add(OPENAIS, config=make_config(), safetensors=file.read_bytes())
    variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
    output = launch(script, processes=2, HOME=str(tmp_path), **variables)
    hub.close()
    got = [[line for line in lines if "GET" in line] for lines in (hub.asked(OPENAIS), FETCHED)]
    assert sorted(got[0]) == sorted(got[1]) and "Traceback" not in output
    start, trained = read_metrics(tmp_path, times=False)
    assert start == by_file[0] and trained["train_loss"] > 0


DIFFERENT = [
    ("model", "quick_gelu", False),
    ("model", "quick_gelu", None),
    ("model", "multimodal_cfg", {"width": 512}),
    ("text", "heads", 4),
    ("text", "context_length", 64),
    ("text", "vocab_size", 32000),
    ("text", "hf_model_name", "roberta-base"),
    ("vision", "head_width", 32),
    ("vision", "timm_model_name", "convnext_base"),
    ("vision", "mlp_ratio", 4.5),
    ("preprocess", "mean", [0.5, 0.5, 0.5]),
    ("preprocess", "interpolation", "bilinear"),
    ("preprocess", "resize_mode", "squash"),
]


@pytest.fixture(scope="module")
def started(tmp_path_factory, weights, archive):
    """(a hub, OpenAI's server, {start: what load_clip made of it}). A start: MODEL and what for."""
    folder, hub, openai = tmp_path_factory.mktemp("starts"), Server(), Server()
    whole = {"config": make_config(), "safetensors": save(weights)}
    torch.save(weights, dictionary := folder / "clip.bin")
    for i, (part, name, value) in enumerate(DIFFERENT):
        hub.add(f"different/{i}", **whole | {"config": make_config(part, **{name: value})})
    hub.add("spelled/out", **whole | {"config": make_config("text", hf_model_name="")})
    hub.add("only/bin", config=make_config(), bin=dictionary.read_bytes())
    hub.add("openai/clip-vit-base-patch32", transformers=whole["safetensors"])
    hub.add("no/weights", config=make_config(), transformers=whole["safetensors"])
    hub.add("no/clip", **whole | {"config": {"model_cfg": {}}})
    hub.add(OPENAIS, **whole)
    for repository in ("breaks/off", "timm/vit_base_patch16_clip_224.openai"):
        hub.add(repository, **whole)
        hub.breaks_off[f"/{repository}/resolve/main/{FILES['safetensors']}"] = 200
    homes = {"new": str(folder / "new"), "none": str(folder / "none")}
    homes["whole"] = earlier_download(folder / "whole", archive)
    homes["cut"] = earlier_download(folder / "cut", archive[:1000])
    starts = [f"different/{i}" for i in range(len(DIFFERENT))]
    starts += ["spelled/out", "only/bin", "openai/clip-vit-base-patch32", "no/weights", "no/clip"]
    starts += ["no/repository", "breaks/off", "breaks/off again", "ViT-B/32 whole", "ViT-B/32 cut"]
    starts += ["ViT-B/16 new", "close", "only/bin closed", "ViT-B/32 none", "ViT-L/14 cut"]
    starts += ["ViT-L/14 none"]
    link, steps = openai.add_link(archive), []
    for start in starts:
        name, _, why = start.partition(" ")
        here = openai.url + "/sum/gone.pt" if why == "none" else link
        steps.append((name, homes.get(why, homes["new"]), here))
    yield hub, openai, dict(zip(starts, load_each(folder, hub, steps), strict=True))
    hub.close()
    openai.close()


@pytest.mark.parametrize("i", range(len(DIFFERENT)))
def test_a_repository_of_another_form_is_refused_before_its_weights_are_fetched(started, i):
    hub, _, outcomes = started
    _, name, value = DIFFERENT[i]
    value = value or False  # quick_gelu's default
    assert f"it differs from OpenAI's CLIP: {name} is {value}" in outcomes[f"different/{i}"]
    assert hub.asked(f"different/{i}") == ["HEAD config", "GET config"]


REFUSED = {
    "openai/clip-vit-base-patch32": 'no open_clip_config.json; .* MODEL = "ViT-B/32"',
    "no/weights": "no open_clip_model.safetensors or open_clip_pytorch_model.bin",
    "no/clip": "text_cfg",
    "no/repository": "404",
    "breaks/off": "500",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(started, name):
    line = f"MODEL: cannot load '{name}': .*{REFUSED[name]}.* MODEL may be a file, a repository"
    assert re.match(line, started[2][name])


TAKEN = ["spelled/out", "only/bin", "breaks/off again", "ViT-B/32 cut"]
TAKEN += ["only/bin closed", "ViT-B/32 none"]  # after the hub was closed


@pytest.mark.parametrize("start", TAKEN)
def test_the_hubs_weights_are_taken(started, weights, start):
    assert_same(started[2][start], weights)


def test_the_hub_is_asked_once_for_each_file(started):
    asked = ["HEAD config", "GET config", "HEAD safetensors", "HEAD bin", "GET bin"]
    assert started[0].asked("only/bin") == asked and started[0].asked(OPENAIS) == FETCHED


# ---- clip's earlier download and OpenAI's link ----
OPENAI = {
    "ViT-B/32 whole": "clip's earlier download, first",
    "ViT-B/16 new": "the link, as the hub's download breaks off",
    "ViT-L/14 cut": "the link, as the hub cannot be reached and the earlier download is cut",
}


@pytest.mark.parametrize("start", OPENAI)
def test_openais_file_is_taken(started, start):
    assert_same(started[2][start], small_vit().state_dict())


def test_the_link_is_asked_only_after_the_hub(started):
    path, *others = started[1].files
    assert not others and started[1].requests == [f"GET {path}", f"GET {path}", "GET /sum/gone.pt"]


def test_without_both_a_line_says_why_and_what_to_do(started):
    line = started[2]["ViT-L/14 none"]
    repository = "https://huggingface.co/timm/vit_large_patch14_clip_224.openai"
    file = f"{repository}/resolve/main/open_clip_model.safetensors"
    assert re.search("the hub says .*refused.*; OpenAI's link says .*404", line)
    assert f'Download {file} yourself and set MODEL = "path/to/open_clip_model.safetensors"' in line


# ---- The package clip ----
CLIPS = ["def tokenize(text): ...", "def broken(:", "raise OSError('a\\nb')", "import nothing.such"]


@pytest.mark.parametrize("code", CLIPS)
def test_another_clip_is_one_line(tmp_path, monkeypatch, code):
    """A clip.py beside the script, with errors in it or without."""
    (tmp_path / "clip.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "clip")
    [line] = run_script(tmp_path, code=1).splitlines()
    assert line.startswith(f"'import clip' finds {tmp_path / 'clip.py'}, not OpenAI's CLIP (")
    assert line.endswith("uninstall that package, then: pip install -r requirements.txt")

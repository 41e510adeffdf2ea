"""MODEL's weights: each kind of file, and the Hugging Face hub, whose place a server here takes."""

import hashlib
import json
import os
import re
import sys
import warnings
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import clip
import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import grown, read_metrics, relative, tiny_model
from safetensors.torch import save, save_file

import indofashion_clip as ic


def assert_same(weights, others):
    """Bit for bit."""
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert weight.dtype == others[name].dtype and torch.equal(weight, others[name]), name


# ---- Files ----
VIT = 64, 64, 2, 128, 16, 77, 49408, 128, 2, 2  # the sizes of tiny models
RESNET = 64, 64, (1, 1, 1, 1), 16, None, 77, 49408, 64, 1, 1
ADAM = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
DICTIONARIES = {  # as people save them
    "plain": lambda weights: weights,
    "last.pt": lambda weights: {"fingerprint": {}, "epoch": 3, "model": weights, "optimizer": ADAM},
    "a loop's": lambda weights: {"model": "ViT-B/32", "model_state_dict": weights, "adam": ADAM},
    "open_clip's": lambda weights: {
        "epoch": 3,
        "state_dict": {f"module.{name}": weight for name, weight in weights.items()},
        "optimizer": ADAM,
    },
}


def save_archive(model, path):
    """A traced CLIP saved as a TorchScript archive, with the three numbers that OpenAI's have."""
    sizes = {"input_resolution": 64, "context_length": 77, "vocab_size": 49408}
    for name, value in sizes.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(value))
    inputs = (torch.rand(1, 3, 64, 64), torch.ones(1, 77, dtype=torch.int32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated
        torch.jit.trace(model, inputs, check_trace=False).save(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("kind", ["safetensors", "archive", *DICTIONARIES])
@pytest.mark.parametrize("sizes", [VIT, RESNET], ids=["ViT", "ResNet"])
def test_a_file_of_each_kind_is_loaded_not_rounded(tmp_path, sizes, kind):
    """Whatever it is called."""
    path = tmp_path / ("clip.safetensors" if kind == "safetensors" else "my clip.v2")
    model, pixels = grown(clip.model.CLIP(*sizes)), conftest.make_batch(6).pixels
    weights = model.state_dict()
    if kind == "safetensors":
        save_file(weights, path)
    elif kind == "archive":
        save_archive(model, path)
    else:
        torch.save(DICTIONARIES[kind](weights), path)
    loaded = ic.load_clip(str(path))
    assert not loaded.training and loaded.visual.input_resolution == 64
    assert_same(loaded.state_dict(), weights)
    features = model.encode_image((pixels / 255 - loaded.mean) / loaded.std)
    found = ic.encode_images(loaded, torch.float32, pixels)
    assert relative(found, F.normalize(features, dim=-1)) < 1e-5


WEIGHTS = grown(tiny_model()).state_dict()
SAVED = save(WEIGHTS)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 605143316\n"
OTHERS = {  # file: (what is in it: text, or what torch.save gets; what the line says)
    "empty.pt": ("", "more than tensors, or none"),
    "pointer.pt": (POINTER, "more than tensors, or none"),
    "pointer.safetensors": (POINTER, "header"),
    "whole.pt": (torch.nn.Linear(1, 1), "more than tensors.*save model.state_dict"),
    "foreign.pt": ({"layer": torch.ones(3)}, "it holds 1 tensors, layer.* transformers' names"),
    "more.pt": (WEIGHTS | {"head.weight": torch.ones(3)}, "head.weight"),
    "cut.pt": (WEIGHTS, "(corrupted|central directory)"),
    "missing.pt": (None, "does not exist"),
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
        torch.save(held, name)
    if name == "cut.pt":
        os.truncate(name, 100_000)
    line = f"MODEL: cannot load '{re.escape(name)}': .*{said}.*a repository of the hub.*ViT-B/32"
    with pytest.raises(SystemExit, match=line) as stop:
        ic.load_clip(name)
    message = str(stop.value)
    assert "\n" not in message and "\x1b" not in message and "weights_only" not in message
    assert len(message) < 600


# ---- The hub ----
FETCHED = [f"{how} open_clip_config.json" for how in ("HEAD", "GET")]
FETCHED += [f"{how} open_clip_model.safetensors" for how in ("HEAD", "GET")]
OPENAIS = "timm/vit_base_patch32_clip_224.openai"


class Answer(BaseHTTPRequestHandler):
    """What the hub answers to HEAD and GET of /OWNER/NAME/resolve/main/FILE."""

    def do_GET(self):
        repository, _, file = self.path[1:].partition("/resolve/main/")
        self.server.asked[repository].append(f"{self.command} {file}")
        content = self.server.files.get(self.path, b"")
        self.send_response(200 if content else 404)
        if not content:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789" * 4)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


class Hub(ThreadingHTTPServer):
    """On a port of this machine; it notes for each repository what it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.asked = {}, defaultdict(list)
        Thread(target=self.serve_forever, daemon=True).start()

    def add(self, repository, config):
        folder = f"/{repository}/resolve/main"
        self.files[f"{folder}/open_clip_config.json"] = json.dumps(config).encode()
        self.files[f"{folder}/open_clip_model.safetensors"] = SAVED

    def variables(self, folder):
        """The environment of a script that takes this for the hub, with its cache in `folder`."""
        cache = {"HOME": str(folder), "HF_HOME": str(folder / "hub")}
        return cache | {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}",
            "HF_HUB_OFFLINE": "0",
        }


def make_config(part="model", **changes):
    """A tiny CLIP's open_clip_config.json but for changes of a part."""
    preprocess = {"mean": ic.PIXEL_MEAN, "std": ic.PIXEL_STD}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    parts = {
        "model": {"embed_dim": 64, "quick_gelu": True},
        "vision": {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16},
        "text": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2},
        "preprocess": preprocess,
    }
    parts[part] |= changes
    model = parts["model"] | {"vision_cfg": parts["vision"], "text_cfg": parts["text"]}
    return {"model_cfg": model, "preprocess_cfg": preprocess}


def test_two_processes_fetch_a_name_once_and_train(tmp_path):
    data = conftest.make_dataset(tmp_path / "data", train=8, val=5, test=0)
    constants = conftest.quick(data, MODEL="ViT-B/32", NUM_EPOCHS=1, CHUNK_SIZE=4)
    hub, script = Hub(), conftest.edited_script(tmp_path, **constants)
    hub.add(OPENAIS, make_config())
    output = conftest.launch(script, processes=2, **hub.variables(tmp_path))
    assert [line for line in hub.asked[OPENAIS] if "GET" in line] == FETCHED[1::2]
    assert "Traceback" not in output and read_metrics(tmp_path)[1]["train_loss"] > 0


DIFFERENT = {  # part: what is not as in OpenAI's
    "model": {"quick_gelu": None, "multimodal_cfg": {"width": 512}},
    "text": {"heads": 4, "context_length": 64, "vocab_size": 32000, "hf_model_name": "bert"},
    "vision": {"head_width": 32, "timm_model_name": "convnext_base", "mlp_ratio": 4.5},
    "preprocess": {"mean": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
}
DIFFERENT = [(part, *change) for part, changes in DIFFERENT.items() for change in changes.items()]
TAKEN = ["spelled/out", "ViT-B/32", "ViT-B/32 again"]
STARTS = [f"different/{name}" for _, name, _ in DIFFERENT]
STARTS += ["no/config", "no/clip", *TAKEN, "ViT-L/14"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """(a hub, {start: the weights, or the line, that each of STARTS gave in one process})."""
    folder, hub = tmp_path_factory.mktemp("starts"), Hub()
    for part, name, value in DIFFERENT:
        hub.add(f"different/{name}", make_config(part, **{name: value}))
    hub.add("spelled/out", make_config("text", hf_model_name=""))
    hub.add("no/clip", {"model_cfg": {}})
    hub.add(OPENAIS, make_config())
    lines = f"""
        import huggingface_hub, torch
        outcomes = []
        for start in {STARTS!r}:
            huggingface_hub.constants.HF_HUB_OFFLINE = start == "ViT-L/14"
            try:
                outcomes.append(ic.load_clip(start.split()[0]).state_dict())
            except SystemExit as stop:
                outcomes.append(str(stop))
        torch.save(outcomes, "outcomes.pt")
    """
    assert "Traceback" not in conftest.run_driver(folder, lines, {}, **hub.variables(folder))
    outcomes = torch.load(folder / "outcomes.pt", weights_only=True)
    assert not any("\n" in outcome for outcome in outcomes if isinstance(outcome, str))
    return hub, dict(zip(STARTS, outcomes, strict=True))


@pytest.mark.parametrize("_, name, value", DIFFERENT)
def test_another_form_is_refused_before_its_weights_are_fetched(started, _, name, value):
    hub, outcomes = started
    said = f"{name} is {value}." if value else f"no {name}."
    assert f"it differs from OpenAI's CLIP: {said}" in outcomes[f"different/{name}"]
    assert hub.asked[f"different/{name}"] == FETCHED[:2]


REFUSED = {  # a start: what its line says
    "no/config": "404.* Download https://huggingface.co/no/config/resolve/main/open_clip_model.s",
    "no/clip": "vision_cfg",
    "ViT-L/14": "locate the file on the Hub.*/vit_large_patch14_clip_224.openai/.* MODEL to its",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_one_line(started, name):
    line = f"MODEL: cannot load '{name}': .*{REFUSED[name]}.* MODEL may be a file, a repository"
    assert re.match(line, started[1][name])


@pytest.mark.parametrize("start", TAKEN)
def test_the_hubs_weights_are_taken_and_once_cached_without_a_request(started, start):
    hub, outcomes = started
    assert_same(outcomes[start], WEIGHTS)
    assert hub.asked[OPENAIS] == FETCHED  # by the first of two starts


# ---- The package clip ----
CLIPS = ["def tokenize(text): ...", "def broken(:", "raise OSError('a\\nb')", "import nothing.such"]


@pytest.mark.parametrize("code", CLIPS)
def test_another_clip_is_one_line(tmp_path, monkeypatch, code):
    """A clip.py beside the script, with errors in it or without."""
    (tmp_path / "clip.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("clip", "clip.model"):
        monkeypatch.delitem(sys.modules, name)
    [line] = conftest.run_script(tmp_path, code=1).splitlines()
    assert line.startswith("'import clip' does not find OpenAI's CLIP (")
    assert "import name" not in line or str(tmp_path / "clip.py") in line
    assert line.endswith("uninstall that package, then: pip install -r requirements.txt")

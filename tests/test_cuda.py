"""The CUDA path without a GPU: the script itself, while its tensors on the card are fakes.

A fake has a shape, a dtype and a device but no values: what mixes devices fails as on a card, and
what reads a value, for which the host would wait for the card, is noticed.
"""

import queue
import threading
import weakref
from collections import defaultdict
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from conftest import CPU, make_batch, tiny_model, toy_dataset
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import indofashion_clip as ic

TRANSFERS = 7  # of a step, to the card: pixels, three Targets, three for the texts
CHUNKED = 2 * 3 + 2 * 2 * 3 + 3  # three chunks of images and two of texts, each taken twice


class Wait(Exception):
    """Here the host would wait until the card has computed all that it was given."""


class Card(FakeTensorMode):
    """Inside it, "cuda" is a device of fake tensors; other tensors are computed as usual."""

    avoid_device_init = True  # whatever torch.cuda.is_available() says

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.transfers = []  # of each from the host to the card: does the host go on meanwhile?
        self.dtypes = defaultdict(set)  # {operation: {the dtypes of what it got at a time}}
        self.pinned = weakref.WeakSet()  # storages of the host
        self.native = True  # or it emulates bfloat16, and has no flash attention, as a T4
        self.held, self.peak = weakref.WeakSet(), 0  # storages, and the most bytes of all

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        target = getattr(kwargs.get("device"), "type", None)
        if not fakes and target != "cuda":
            return func(*args, **kwargs)
        to_host = target == "cpu" and any(fake.is_cuda for fake in fakes)
        if to_host or torch.Tag.data_dependent_output in func.tags:
            raise Wait(f"for {func}")
        if any(tensor.ndim or target for tensor in host):  # a lone number goes along with the call
            pinned = all(tensor.untyped_storage() in self.pinned for tensor in host)
            self.transfers.append(pinned and kwargs.get("non_blocking", False))
        self.dtypes[str(func)].add(frozenset(tensor.dtype for tensor in tensors))
        try:
            results = super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException as error:  # nonzero, unique, a mask as an index
            raise Wait(f"for {func}") from error
        for result in tree_leaves(results):
            if isinstance(result, FakeTensor) and result.is_cuda:
                self.held.add(result.untyped_storage())
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.held))
        return results

    def attention(self, queries, keys, values, mask=None, dropout_p=0.0, is_causal=False):
        """By the kernels that such a card has, which take what is of half precision."""
        given, aten = (queries, keys, values), torch.ops.aten
        assert {part.dtype for part in given} == {torch.bfloat16 if self.native else torch.float16}
        assert all(part.is_cuda and part.stride(-1) == 1 and part.shape[-1] == 64 for part in given)
        assert mask is None and dropout_p == 0
        if self.native:
            return aten._scaled_dot_product_flash_attention(*given, 0.0, is_causal)[0]
        return aten._scaled_dot_product_efficient_attention(*given, None, True, 0.0, is_causal)[0]

    def pin(self, tensor):  # without a driver nothing can be pinned
        self.pinned.add(tensor.untyped_storage())
        return tensor


def backward(loss):
    """torch.autograd.backward, node by node: torch's own asks the driver even about fakes."""
    waiting = {loss.grad_fn: {0: torch.ones_like(loss)}}  # {node: {place: its gradient}}
    with torch.no_grad():
        while waiting:
            node = max(waiting, key=lambda node: node._sequence_nr())  # what was computed last
            given = waiting.pop(node)
            results = node(*map(given.get, range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (earlier, place), grad in zip(node.next_functions, results, strict=True):
                if earlier is not None and grad is not None:
                    like, sums = earlier._input_metadata[place], waiting.setdefault(earlier, {})
                    sums[place] = grad.sum_to_size(like.shape).to(like.dtype) + sums.get(place, 0)


@pytest.fixture
def card(monkeypatch):
    """A Card, which torch.cuda reports as present."""
    if not torch.backends.cuda.is_built():  # Python's indexing asks even for a fake's device
        pytest.skip("this torch was built without CUDA")
    card, patch, empty = Card(), monkeypatch.setattr, torch.empty

    def new(*shape, pin_memory=False, **how):
        return card.pin(empty(*shape, **how)) if pin_memory else empty(*shape, **how)

    patch(torch, "empty", new)
    patch(torch.Tensor, "pin_memory", lambda tensor: card.pin(tensor.clone()))
    patch(torch.Tensor, "backward", backward)
    patch(torch._C, "_current_graph_task_id", lambda: 1)  # checkpoint asks; its graphs are new
    patch(F, "scaled_dot_product_attention", card.attention)
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "is_bf16_supported", lambda **how: card.native or not how)
    patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch(torch.cuda, "set_device", lambda device: None)
    patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    patch(ic, "CHUNK_SIZE", 8)
    patch(ic, "BATCH_SIZE", 8)
    return card


def make_rows(count=20, side=64):
    pixels = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    captions = [f"saree {i // 2}" + " long" * 50 for i in range(count)]
    return toy_dataset(["saree", "gown"] * (count // 2), captions, pixels)


def start(card, model, chunk=8):
    """A run's State on the card."""
    with card:
        state = ic.new_state(model.to("cuda:0"), {"train": make_rows()})
    state.chunk = chunk
    card.transfers.clear()
    return state


def make_clip(*sizes):
    """A CLIP of other sizes than the tiny one, as load_clip gives it."""
    model = ic.clip_model.CLIP(*sizes, 77, 49408, 128, 2, 2).eval()
    for name in ("mean", "std"):
        model.register_buffer(name, torch.ones(3, 1, 1), persistent=False)
    return model


@pytest.mark.parametrize(
    "kind, native, chunk, transfers",
    [("ViT", True, 8, TRANSFERS), ("ViT", False, 3, CHUNKED), ("RN", False, 8, TRANSFERS)],
)
def test_a_step_never_waits_and_an_evaluation_at_its_end(card, kind, native, chunk, transfers):
    """In bfloat16, or in scaled float16, in chunks or not, by the card's own attention."""
    card.native, dtype = native, torch.bfloat16 if native else torch.float16
    model = tiny_model() if kind == "ViT" else make_clip(64, 64, (1, 1, 1, 1), 8, None)
    state = start(card, model, chunk)
    assert state.precision == dtype and state.scaler.is_enabled() == (not native)
    with card:
        losses = ic.train_step(state, make_batch(8))
    assert (losses.device.type, losses.dtype, losses.shape) == ("cuda", torch.float32, (2,))
    assert card.transfers == [True] * transfers
    assert "aten.index_copy.default" not in card.dtypes  # a copy; index_copy_ fills the new zeros
    low, full = frozenset([dtype]), frozenset([torch.float32])
    assert card.dtypes["aten.addmm.default"] == {low}  # each layer with a bias
    assert card.dtypes["aten.mm.default"] == {low, full}  # full: the losses
    assert card.dtypes["aten.convolution.default"] == ({low} if kind == "RN" else set())
    kernel = "flash" if native else "efficient"
    assert card.dtypes[f"aten._scaled_dot_product_{kernel}_attention_backward.default"]
    assert "aten._fused_adam_.default" in card.dtypes
    assert set(state.optimizer.state) == set(model.parameters())  # each had a gradient
    with card, pytest.raises(Wait) as waited:
        ic.evaluate(state, make_rows())
    assert "read_losses" in [line.name for line in waited.traceback]


def test_two_processes_go_on_and_wait_only_for_their_mean_loss(card, monkeypatch, tmp_path):
    """From a last.pt that holds the moments of Adam and the scale of float16."""
    card.native, reduced = False, []
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))
    saved = ic.new_state(tiny_model(), {"train": make_rows()})
    saved.scaler = torch.amp.GradScaler("cpu", 2.0**10)
    with monkeypatch.context() as host:
        host.setattr(torch.cuda, "is_available", lambda: False)
        ic.train_step(saved, make_batch(8))
    saved.epoch = 2  # in the first, the loss is shown after a step
    ic.save_run(saved)
    loaded = torch.load(tmp_path / "last.pt", weights_only=True)
    monkeypatch.setattr(torch, "load", lambda path, **how: loaded)  # its own would make fakes
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    monkeypatch.setattr(ic, "RANK", 1)
    monkeypatch.setattr(ic.dist, "all_reduce", lambda t, _: reduced.append((t.device.type, t.ndim)))
    state = start(card, tiny_model(), chunk=4)
    with card:
        ic.resume(state)
        assert state.scaler.get_scale() == 2**10
    kept = [tensor for held in state.optimizer.state.values() for tensor in held.values()]
    on_card = [tensor.is_cuda and tensor.dtype == torch.float32 for tensor in kept]
    assert on_card == [True] * 3 * len(list(state.model.parameters()))  # moments, and the steps
    card.transfers.clear()
    with card, pytest.raises(Wait) as waited:
        ic.train_epoch(state, make_rows(), Mock())
    assert "read_losses" in [line.name for line in waited.traceback]
    assert state.step == 2 and state.totals.is_cuda
    assert card.transfers == [False] + [True] * TRANSFERS * 2  # first, once: the totals
    assert make_rows()[:8][0].untyped_storage() in card.pinned  # a batch is gathered there
    step = [("cuda", 3)] * 3 + [("cuda", 1), ("cpu", 0)]  # features, all gradients, signals
    assert reduced == [("cpu", 0)] * 2 + step * 2  # first the precision, and the place in the run


def test_the_chunk_found_keeps_a_step_within_the_free_memory(card, monkeypatch):
    """By the bytes of all fakes on a card that has 350 MB besides the 1 GB left to others."""
    card.native, spare = False, 350 * 2**20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (spare + 2**30, 2**40))
    monkeypatch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)
    monkeypatch.setattr(ic.dist, "all_reduce", lambda tensor, _: tensor)
    for name, value in {"WORLD_SIZE": 2, "CHUNK_SIZE": None, "BATCH_SIZE": 48}.items():
        monkeypatch.setattr(ic, name, value)
    rows = make_rows(48, 224)
    with card:
        model = make_clip(64, 224, 2, 512, 16).to("cuda:0")
        before = card.peak
        state = ic.new_state(model, {"train": rows})
        card.peak = 0
        for _ in range(2):  # with Adam's moments
            ic.train_step(state, next(ic.epoch_batches(rows, 1, 48)))
    assert 1 < state.chunk < 24 and 0.5 * spare < card.peak - before < spare


def test_batches_are_loaded_ahead_by_a_thread_of_the_same_card(monkeypatch):
    started, cards, own = queue.Queue(), {}, threading.get_ident

    def load(part):
        started.put(part)
        return part, own()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda card: cards.update({own(): card}))
    monkeypatch.setattr(ic, "LOCAL_RANK", 3)
    batches = ic.load_ahead(load, range(3))
    first = next(batches)
    assert [started.get(timeout=10) for _ in range(2)] == [0, 1] and started.empty()
    order, threads = zip(first, *batches, strict=True)
    assert order == (0, 1, 2) and own() not in threads and cards == dict.fromkeys(threads, 3)


# ---- The machine ----
@pytest.mark.parametrize(
    "no_glibc, nccl, backend",
    [(TypeError, False, "gloo"), (AttributeError, True, "cpu:gloo,cuda:nccl")],  # Windows first
)
def test_the_machine_is_prepared(monkeypatch, no_glibc, nccl, backend):
    card = Mock()
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", card.cudnn_sdp)
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(torch, "zeros", card.zeros)
    monkeypatch.setattr(ic, "dist", card.dist)
    monkeypatch.setattr(ic, "LOCAL_RANK", 1)
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    monkeypatch.setattr(ic.ctypes, "CDLL", Mock(side_effect=no_glibc))  # malloc stays as it is
    card.dist.is_nccl_available.return_value = nccl
    assert ic.prepare_machine() == (device := torch.device("cuda:1"))
    ic.keep_freed_memory()
    calls = [call.set_device(device), call.cudnn_sdp(False)]
    calls += [call.dist.init_process_group(backend)]
    calls += [call.zeros(1, device=device)]  # NCCL takes its memory for an exchange on the card
    calls += [call.dist.all_reduce(card.zeros.return_value, ic.all_reduce.__defaults__[0])]
    assert [each for each in card.mock_calls if "available" not in each[0]] == calls


@pytest.mark.parametrize("visible, told", [(None, True), ("", False), ("-1", False), ("0", True)])
def test_a_card_that_torch_cannot_use_is_told(monkeypatch, capsys, visible, told):
    monkeypatch.setattr(ic.shutil, "which", {"nvidia-smi": "/usr/bin/nvidia-smi"}.get)
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    monkeypatch.setattr(ic.os, "environ", variables)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ic.prepare_machine() == CPU
    [line] = capsys.readouterr().out.splitlines() or [""]
    assert line.startswith("THE GPU IS NOT USED: this torch finds none") == told

"""The CUDA path without a GPU: the script itself, while its tensors on the card are fakes.

A fake has a shape, a dtype and a device but no values: what mixes devices fails as on a card, and
what reads a value, for which the host would wait for the card, is noticed.
"""

import threading
from collections import defaultdict
from unittest.mock import Mock, call

import pytest
import torch
import torch.nn.functional as F
from conftest import make_batch, tiny_model, toy_dataset
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

import indofashion_clip as ic

# Of a step, to the card: pixels, draws, three for the tokens, inverse
TRANSFERS = [True] * 6  # in each the host goes on meanwhile


class Wait(Exception):
    """Here the host would wait until the card has computed all that it was given."""


class Card(FakeTensorMode):
    """Inside it, "cuda" is a device of fake tensors; other tensors are computed as usual."""

    avoid_device_init = True  # whatever torch.cuda.is_available() says

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.transfers = []  # of each from the host to the card: does the host go on meanwhile?
        self.dtypes = defaultdict(set)  # {operation: {the dtypes of what it got at a time}}
        self.attended, self.pinned = set(), []  # {(device, dtype)}, [shape]
        self.native = True  # or it emulates bfloat16, as a T4 does

    def __enter__(self):
        if not torch.backends.cuda.is_built():  # Python's indexing asks even for a fake's device
            pytest.skip("this torch was built without CUDA")
        return super().__enter__()

    def dispatch(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        host = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        target = getattr(kwargs.get("device"), "type", None)
        if not fakes and target != "cuda":
            return func(*args, **kwargs)
        on_card = any(fake.is_cuda for fake in fakes)
        if torch.Tag.data_dependent_output in func.tags or (on_card and target == "cpu"):
            raise Wait(f"for {func}")
        if any(tensor.ndim or target for tensor in host):  # a lone number goes along with the call
            self.transfers.append(kwargs.get("non_blocking", False))
        self.dtypes[str(func)].add(frozenset(tensor.dtype for tensor in tensors))
        try:
            return super().dispatch(func, types, args, kwargs)
        except DynamicOutputShapeException as error:  # nonzero, unique, a mask as an index
            raise Wait(f"for {func}") from error


def backward(outputs, grads=None):
    """torch.autograd.backward, node by node: torch's own asks the driver even about fakes."""
    given = zip(outputs, grads, strict=True) if grads else [(outputs, torch.ones_like(outputs))]
    waiting = {output.grad_fn: {0: grad} for output, grad in given}  # {node: {place: its gradient}}
    with torch.no_grad():
        while waiting:
            node = max(waiting, key=lambda node: node._sequence_nr())  # what was computed last
            given = waiting.pop(node)
            if hasattr(node, "apply"):  # a checkpoint, which passes nothing on
                node.apply(given[0])
                continue
            results = node(*map(given.get, range(len(node._input_metadata))))
            results = results if isinstance(results, tuple) else (results,)
            for (earlier, place), grad in zip(node.next_functions, results, strict=True):
                if earlier is not None and grad is not None:
                    like, sums = earlier._input_metadata[place], waiting.setdefault(earlier, {})
                    sums[place] = grad.sum_to_size(like.shape).to(like.dtype) + sums.get(place, 0)


@pytest.fixture
def card(monkeypatch):
    """A Card, which torch.cuda reports as present."""
    card, attend = Card(), F.scaled_dot_product_attention

    def attention(queries, *rest, **how):
        card.attended.add((queries.device.type, queries.dtype))
        return attend(queries, *rest, **how)

    def pin_memory(tensor):  # without a driver nothing can be pinned
        card.pinned.append(tuple(tensor.shape))
        return tensor

    def is_bf16_supported(including_emulation=True):
        return card.native or including_emulation

    patch = monkeypatch.setattr
    patch(F, "scaled_dot_product_attention", attention)
    patch(torch.Tensor, "pin_memory", pin_memory)
    patch(ic, "MIN_CROP", 0.9)
    patch(ic, "CHUNK_SIZE", 8)
    patch(torch.Tensor, "backward", backward)
    patch(torch.autograd, "backward", backward)  # checkpoint calls it
    patch(torch.cuda, "is_available", lambda: True)
    patch(torch.cuda, "is_bf16_supported", is_bf16_supported)
    patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
    patch(ic, "BATCH_SIZE", 8)
    return card


def make_rows():
    pixels = (torch.arange(20 * 3 * 64 * 64) % 251).byte().view(20, 3, 64, 64)
    captions = [f"saree {i // 2}" for i in range(20)]
    return toy_dataset(["saree"] * 20, captions, pixels, ["gowns", "saree"])


def start(card, model, chunk=8):
    """A run's State on the card."""
    with card:
        state = ic.new_state(model.to("cuda:0"), {"train": make_rows()})
    state.chunk = chunk
    card.transfers.clear()
    return state


def tiny_resnet(path):
    model = ic.clip.model.CLIP(64, 64, (1, 1, 1, 1), 8, None, 77, 49408, 128, 2, 2)
    torch.save(model.state_dict(), path)
    return ic.load_clip(str(path))


def last_line(waited):
    return [line for line in waited.traceback if line.path.name == "indofashion_clip.py"][-1]


@pytest.mark.parametrize("kind, native, chunk", [("ViT", True, 8), ("ViT", False, 3), ("RN", 0, 8)])
def test_a_step_waits_for_nothing(card, tmp_path, kind, native, chunk):
    card.native, dtype = native, torch.bfloat16 if native else torch.float16
    model = tiny_model() if kind == "ViT" else tiny_resnet(tmp_path / "rn.pt")
    state = start(card, model, chunk)
    assert state.precision == dtype and state.scaler.is_enabled() == (not native)
    with card:
        loss = ic.train_step(state, make_batch(8))
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert all(card.transfers) and (chunk < 8 or card.transfers == TRANSFERS)
    assert len(card.pinned) == len(card.transfers)
    assert "aten.index_copy.default" not in card.dtypes  # a copy; index_copy_ fills the new zeros
    low, full = frozenset([dtype]), frozenset([torch.float32])
    assert card.dtypes["aten.addmm.default"] == {low}  # each layer with a bias
    assert card.dtypes["aten.mm.default"] == {low, full}  # full: the loss
    assert card.dtypes["aten.convolution.default"] == ({low} if kind == "RN" else set())
    assert card.attended == {("cuda", dtype)}
    assert "aten._fused_adam_.default" in card.dtypes
    assert set(state.optimizer.state) == set(model.parameters())  # each had a gradient
    assert all(p.is_cuda and p.dtype == torch.float32 for p in model.parameters())


def test_an_epoch_of_two_processes_waits_only_for_its_mean_loss(card, monkeypatch):
    reduced = []
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    monkeypatch.setattr(ic, "RANK", 1)
    monkeypatch.setattr(ic.dist, "all_reduce", lambda t, _: reduced.append((t.device.type, t.ndim)))
    state = start(card, tiny_model(), chunk=4)
    state.epoch = 1
    with card, pytest.raises(Wait) as waited, ic.tqdm(disable=True) as bar:
        ic.train_epoch(state, make_rows(), bar)
    assert last_line(waited).name == "mean_loss"
    assert state.step == 2 and state.loss_sum.is_cuda
    assert card.transfers == TRANSFERS * 2 and (4, 3, 64, 64) in card.pinned
    assert set(reduced) == {("cuda", 4), ("cuda", 1), ("cpu", 0)}  # features, gradients, signals
    assert len(reduced) == 2 * 3  # not one for each gradient


def test_the_evaluation_waits_only_when_all_is_encoded(card):
    state = start(card, tiny_model(), chunk=3)
    with card, pytest.raises(Wait) as waited:
        ic.evaluate(state, make_rows())
    last = last_line(waited)
    assert last.name == "evaluate" and "clip_loss" in str(last.statement)
    assert all(card.transfers[:-2])  # the last two, text_ids and the order, come after
    assert (20, 3, 64, 64) in card.pinned


def test_batches_are_loaded_ahead_by_a_thread(card):
    started = [threading.Event() for _ in range(3)]

    def load(i):
        started[i].set()
        return i, threading.get_ident()

    batches = ic.load_ahead(load, range(3))
    first = next(batches)
    assert started[1].wait(10) and not started[2].is_set()
    order, threads = zip(first, *batches, strict=True)
    assert order == (0, 1, 2) and threading.get_ident() not in threads


@pytest.mark.parametrize(
    "no_glibc, nccl, backend",
    [(TypeError, False, "gloo"), (AttributeError, True, "cpu:gloo,cuda:nccl")],  # Windows first
)
def test_the_machine_is_prepared(monkeypatch, no_glibc, nccl, backend):
    card, half = Mock(), 2**29
    card.mem_get_info.return_value = 6 * half, 8 * half
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", card.cudnn_sdp)
    monkeypatch.setattr(torch, "cuda", card)
    monkeypatch.setattr(ic, "LOCAL_RANK", 1)
    monkeypatch.setattr(ic.ctypes, "CDLL", Mock(side_effect=no_glibc))  # malloc stays as it is
    card.get_device_capability.return_value, card.get_arch_list.return_value = (8, 0), ["sm_75"]
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    monkeypatch.setattr(torch, "zeros", Mock(return_value="a number"))
    monkeypatch.setattr(ic, "dist", card.dist)
    card.dist.is_nccl_available.return_value = nccl
    device = ic.prepare_machine()
    ic.keep_freed_memory()
    assert device == torch.device("cuda:1")
    assert card.mock_calls == [
        call.is_available(),
        call.get_device_capability(),
        call.get_arch_list(),
        call.is_available(),
        call.set_device(device),
        call.cudnn_sdp(False),
        call.dist.is_nccl_available(),
        call.dist.init_process_group(backend, timeout=ic.timedelta(minutes=30)),
        call.dist.all_reduce("a number", ic.all_reduce.__defaults__[0]),  # takes NCCL's memory
        call.mem_get_info(),  # what is left then, of the device that was set
        call.set_per_process_memory_fraction(5 / 8),
    ]


# ---- Machines on which a run would go wrong without a word ----
def test_a_card_that_torch_no_longer_knows_ends_with_a_line(monkeypatch):
    """Kaggle's P100."""
    card = Mock(get_device_capability=lambda: (6, 0), get_device_name=lambda: "Tesla P100")
    card.get_arch_list.return_value = ["sm_75", "sm_80", "sm_90a", "compute_120"]
    monkeypatch.setattr(torch, "cuda", card)
    with pytest.raises(SystemExit, match=r"Tesla P100 \(sm_60\).*T4.*pip install") as stop:
        ic.check_machine()
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("visible, told", [(None, True), ("", False), ("-1", False), ("0", True)])
def test_a_card_that_torch_cannot_use_is_told(monkeypatch, capsys, tmp_path, visible, told):
    (smi := tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'Tesla T4, 550.54'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ic.check_machine()
    output = capsys.readouterr().out
    assert ("THE GPU IS NOT USED: Tesla T4, 550.54; torch" in output) == told
    assert ("pip install --force-reinstall torch" in output) == told


@pytest.mark.parametrize(
    "names, refused",
    [
        (("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS"), True),  # srun python
        (("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "RANK"), False),  # srun torchrun
        (("SLURM_NTASKS",), False),  # python once, in a batch script that asks for several tasks
    ],
)
def test_copies_that_know_nothing_of_each_other_are_refused(monkeypatch, names, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("SLURM_PROCID", *names):
        monkeypatch.setenv(name, "4")
    if refused:
        with pytest.raises(SystemExit, match="srun has started 4 copies.*torchrun"):
            ic.check_machine()
    else:
        ic.check_machine()

"""The loss by hand, the schedule, the step in chunks, and running out of memory."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    gradients,
    make_batch,
    make_dataset,
    make_state,
    quick,
    read_metrics,
    relative,
    run_driver,
    textbook_step,
    tiny_model,
)

import indofashion_clip as ic


# ---- Loss ----
def test_the_loss_is_as_computed_by_hand():
    """Of two pairs, a cross-entropy is log(1 + e ** (wrong logit - right logit))."""
    image_features, text_features = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    scale = torch.tensor(2.0).log()
    loss = ic.clip_loss(image_features, text_features, scale)
    rows_then_columns = (0.0 - 1.2, 1.6 - 2.0, 1.6 - 1.2, 0.0 - 2.0)
    expected = sum(math.log(1 + math.exp(gap)) for gap in rows_then_columns) / 4
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_pairs_of_one_caption_are_positives_of_each_other():
    """Plain cross-entropy gives the loss and every gradient of shared targets."""
    torch.manual_seed(0)
    images, captions = torch.randn(9, 16).double(), torch.randn(4, 16).double()
    leaves = [images, captions, torch.tensor(3.0).double().log()]
    caption_ids = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 0])
    shared = (caption_ids[:, None] == caption_ids).double()
    shared /= shared.sum(1, keepdim=True)
    for leaf in leaves:
        leaf.requires_grad_()
    pairs = F.normalize(images, dim=-1), F.normalize(captions, dim=-1)[caption_ids]
    logits = leaves[2].exp() * pairs[0] @ pairs[1].T
    expected = (F.cross_entropy(logits, shared) + F.cross_entropy(logits.T, shared)) / 2
    loss = ic.clip_loss(*pairs, leaves[2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    for found, by_shared in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(found, by_shared, atol=1e-12)


# ---- Schedule and crop ----
def test_the_rate_rises_to_lr_then_falls_to_0(monkeypatch):
    monkeypatch.setattr(ic, "LR", 2.0)
    rates = [ic.learning_rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_picture_is_cropped_by_its_draws(monkeypatch):
    images, middle = torch.rand(3, 3, 16, 16), torch.full((3, 3), 0.5)
    monkeypatch.setattr(ic, "MIN_CROP", 1)
    assert torch.allclose(ic.random_crop(images, middle), images, atol=1e-5)
    pixels, draws = make_batch(3).pixels, torch.rand(3, 3)
    plain = ic.encode_images(tiny_model(), torch.float32, pixels)
    assert torch.equal(ic.encode_images(tiny_model(), torch.float32, pixels, draws), plain)
    monkeypatch.setattr(ic, "MIN_CROP", 0.5)
    corner = torch.tensor([[1.0, 0.0, 0.0]]).expand(3, 3)  # the smallest, at the top left
    expected = F.interpolate(images[:, :, :8, :8], size=16, mode="bilinear")[:, :, 1:-1, 1:-1]
    found = ic.random_crop(images, corner)[:, :, 1:-1, 1:-1]
    assert torch.allclose(found, expected, atol=1e-5)


# ---- The step against the textbook's ----
def assert_textbooks(state, loss, batch):
    expected_loss, expected = textbook_step(tiny_model(), batch)
    found, scale = gradients(state.model), state.scaler.get_scale()
    assert loss.item() == pytest.approx(expected_loss, rel=1e-5) and found.keys() == expected.keys()
    assert max(relative(found[n] / scale, expected[n]) for n in expected) <= 1e-5


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("chunk", [1, 3, 7, 11])
def test_a_step_in_chunks_scaled_or_not_is_the_textbooks_step(monkeypatch, chunk, scale):
    monkeypatch.setattr(ic, "MIN_CROP", 0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    state, batch = make_state(chunk=chunk, scaler=scaler), make_batch(11)
    assert_textbooks(state, ic.forward_backward(state, batch), batch)
    assert scaler.get_scale() == scale


def test_chunks_keep_less_for_the_backward_pass():
    def kept(chunk):
        sizes = []
        note = torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        )
        with note:
            ic.in_chunks(make_state(chunk=chunk), ic.encode_images, make_batch(64).pixels)
        return sum(sizes)

    assert kept(8) < kept(64) / 4


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_unscaled_then_clipped_and_dropped_after_the_step(monkeypatch, scale):
    monkeypatch.setattr(ic, "MAX_GRAD_NORM", 0.1)
    state = make_state(scaler=torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1))
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)  # moves by the gradients
    before = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach()
    ic.train_step(state, make_batch(4))
    after = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert gradients(state.model) == {}


def test_logit_scale_is_clamped():
    state = make_state()
    state.model.logit_scale.data.fill_(9.0)
    ic.train_step(state, make_batch(4))
    assert state.model.logit_scale.item() == pytest.approx(math.log(100))


def test_an_overflow_under_the_scaler_skips_the_step():
    scaler = torch.amp.GradScaler("cpu", init_scale=3e38)
    state = make_state(scaler=scaler)
    before = state.model.token_embedding.weight.detach().clone()
    ic.train_step(state, make_batch(4))
    assert torch.equal(state.model.token_embedding.weight, before) and scaler.get_scale() < 3e38


# ---- Memory ----
def test_running_out_of_memory_ends_the_run_saved_and_it_goes_on_in_smaller_chunks(tmp_path):
    """In the backward() of a chunk, after which torch can crash when the interpreter ends."""
    lines = """
        import torch
        real, calls = ic.encode_images, []
        def encode(*arguments):
            calls.append(torch._C._current_graph_task_id() != -1)  # in backward()
            if sum(calls) == 5:
                raise torch.OutOfMemoryError("simulated")
            return real(*arguments)
        ic.choose_precision = lambda device: torch.float32
        ic.encode_images = encode
        ic.main()
    """
    constants = quick(make_dataset(tmp_path / "data", train=25, val=7))
    output = run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 4}, code=1)
    assert "Traceback" not in output and output.count("CHUNK_SIZE = 2") == 1
    assert output.splitlines()[-1].startswith(
        "out of memory at 4 pairs at a time: set CHUNK_SIZE = 2 and run"
    )
    lines = lines.replace("== 5", "== -1")
    assert "Going on" in run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 2})
    broken = read_metrics(tmp_path, times=False)
    shutil.rmtree(tmp_path / "outputs")
    run_driver(tmp_path, lines, constants)
    for one, other in zip(broken, read_metrics(tmp_path, times=False), strict=True):
        assert one == {
            k: pytest.approx(v, rel=1e-3) if "loss" in k else v for k, v in other.items()
        }

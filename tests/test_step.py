"""Both losses by hand, the step against the textbook's, an epoch, and running out of memory."""

import math
import shutil
from unittest.mock import Mock

import conftest
import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, make_batch, make_state, relative, run_driver, tiny_model

import indofashion_clip as ic


# ---- Losses ----
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
    found = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, by_shared in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        assert torch.allclose(one, by_shared, atol=1e-12)


def test_a_titled_image_is_not_pushed_from_the_prompt_of_its_own_class():
    """A prompt is no answer among captions, nor is the text of an image without a title."""
    features = [F.normalize(torch.randn(n, 16), dim=-1).requires_grad_() for n in (6, 6, 3)]
    titled, labelled = torch.tensor([0, 1, 3, 5]), torch.tensor([0, 2, 3, 4, 5])
    targets = ic.Targets(titled, labelled, torch.tensor([1, 0, 1, 2, 1]))
    losses = ic.batch_losses(*features, targets, torch.tensor(1.6))
    reached = [torch.autograd.grad(loss, features, retain_graph=True) for loss in losses]
    reached = [[gradient.any(1).tolist() for gradient in by_kind] for by_kind in reached]
    titled, known = ([row in part for row in range(6)] for part in (titled, labelled))
    assert reached == [[titled, titled, [False] * 3], [known, [False] * 6, [True] * 3]]


# ---- Schedule ----
def test_the_rate_rises_to_lr_then_falls_to_0(monkeypatch):
    monkeypatch.setattr(ic, "LR", 2.0)
    rates = [ic.learning_rate(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0, abs=1e-12)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


# ---- The step against the textbook's ----
@pytest.mark.parametrize("tower", ["neither", "images", "texts"])
@pytest.mark.parametrize("chunk, scale", [(1, 1.0), (3, 1024.0), (7, 1.0), (11, 1024.0)])
def test_a_step_in_chunks_scaled_or_not_is_the_textbooks_step(monkeypatch, chunk, scale, tower):
    """A tower may be frozen: it has no gradient, and the other the textbook's."""
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.7)
    model, plain = tiny_model(), tiny_model()
    if tower != "neither":
        model, plain = conftest.frozen(model, tower), conftest.frozen(plain, tower)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
    state, batch = make_state(model, chunk, scaler=scaler), make_batch(11)
    losses = ic.forward_backward(state, batch)
    expected_losses, expected = conftest.textbook_step(plain, batch)
    found = gradients(model)
    assert losses.tolist() == pytest.approx(expected_losses.tolist(), rel=1e-5)
    assert found.keys() == expected.keys()
    assert max(relative(found[n] / scale, expected[n]) for n in expected) <= 1e-5


@pytest.mark.parametrize("titles, classes", [(0, 3), (1, 0), (1, 1), (0, 1), (0, 0)])
def test_a_loss_that_has_nothing_to_tell_is_0_and_the_other_is_the_textbooks(titles, classes):
    """No titles; no classes; one class, which every image is of."""
    batch = make_batch(11)
    titled, labelled, labels = batch.targets
    labels = labels if classes == 3 else 0 * labels
    targets = ic.Targets(titled[: 11 * titles], labelled[: 11 * classes], labels[: 11 * classes])
    part = batch._replace(prompts=batch.prompts[:classes], num_classes=classes, targets=targets)
    state, model = make_state(chunk=3), tiny_model()
    losses = ic.forward_backward(state, part)
    expected = torch.stack(conftest.textbook_losses(model, batch)) * torch.tensor(
        [titles, classes // 3]
    )
    (expected[0] + ic.CLASS_WEIGHT * expected[1]).backward()
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    found = gradients(state.model)
    for name, gradient in gradients(model).items():
        assert relative(found.get(name, torch.zeros(())), gradient) <= 1e-5
    ic.train_step(state, part)
    assert all(value.isfinite().all() for value in state.model.parameters())


@pytest.mark.parametrize("weight, prompts", [(1.0, 6), (0.0, 0)])
def test_of_twenty_thousand_classes_a_step_encodes_the_batchs(monkeypatch, weight, prompts):
    """With a CLASS_WEIGHT of 0, none."""
    monkeypatch.setattr(ic, "CLASS_WEIGHT", weight)
    monkeypatch.setattr(ic, "PROMPTS", ("a {}",))
    monkeypatch.setattr(ic, "encode_texts", spy := Mock(wraps=ic.encode_texts))
    names = [f"class {number}" for number in range(20_000)]
    labels, titles = names[::3000] + names[:1], [f"title {i}" for i in range(8)]
    labels[3] = ""
    data = conftest.toy_dataset(labels, titles, make_batch(8).pixels, names)
    losses = ic.train_step(make_state(), next(ic.epoch_batches(data, 1, 8)))
    assert sum(len(call.args[2]) for call in spy.call_args_list) == 8 + prompts
    assert losses.isfinite().all() and (losses[1] > 0) == (weight > 0)


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


# ---- An epoch ----
def means(losses):
    """{"train_loss", …}: both losses' means over steps, and their weighted sum."""
    caption_loss, class_loss = losses.mean(0).tolist()
    parts = {"train_caption_loss": caption_loss, "train_class_loss": class_loss}
    return parts | {"train_loss": caption_loss + ic.CLASS_WEIGHT * class_loss}


@torch.no_grad()
def test_the_losses_of_an_epoch_are_the_means_over_its_steps(monkeypatch):
    monkeypatch.setattr(ic, "LR", 0.0)
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.7)
    data, model = conftest.mixed_dataset(), tiny_model()
    with torch.enable_grad():
        metrics = ic.train_epoch(make_state(epoch=1), data, Mock())
    batches = list(ic.epoch_batches(data, 1, 8))
    losses = torch.tensor([conftest.textbook_losses(model, batch) for batch in batches])
    del metrics["train_pairs_per_second"]
    assert metrics == pytest.approx(means(losses), rel=1e-5)


def test_a_step_that_overflows_is_skipped_and_left_out_of_the_mean_loss(monkeypatch):
    state, encode, train_step, steps = make_state(epoch=1), ic.encode_images, ic.train_step, []
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def overflow(*inputs):
        return encode(*inputs) * (math.inf if len(steps) == 1 else 1)

    def note(state, batch):
        losses, weight = train_step(state, batch), state.model.token_embedding.weight
        steps.append((losses, weight.detach().clone()))
        return losses

    monkeypatch.setattr(ic, "encode_images", overflow)
    monkeypatch.setattr(ic, "train_step", note)
    metrics = ic.train_epoch(state, conftest.mixed_dataset(), Mock())
    losses, weights = zip(*steps, strict=True)
    finite = [i for i, loss in enumerate(losses) if loss.isfinite().all()]
    assert finite == [0, 2, 3] and state.scaler.get_scale() == 512
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    expected = means(torch.stack(losses)[finite])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5)


# ---- Memory ----
def test_running_out_of_memory_ends_in_a_line_and_the_run_goes_on_in_smaller_chunks(tmp_path):
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
    constants = conftest.quick(conftest.make_dataset(tmp_path / "data", train=25, val=7))
    output = run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 4}, code=1)
    advice = (
        "out of memory at 4 images at a time: set CHUNK_SIZE = 2 or another MODEL, and run it again"
    )
    assert "Traceback" not in output and output.splitlines()[-1] == advice
    lines = lines.replace("== 5", "== -1")
    assert "Going on" in run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 2})
    broken = conftest.read_metrics(tmp_path, times=False)
    shutil.rmtree(tmp_path / "outputs")
    run_driver(tmp_path, lines, constants)
    for one, other in zip(broken, conftest.read_metrics(tmp_path, times=False), strict=True):
        near = {k: pytest.approx(v, rel=1e-3) for k, v in other.items() if "loss" in k}
        assert one == other | near

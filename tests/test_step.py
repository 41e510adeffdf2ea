"""The learning rate, the step against the textbook's, an epoch, and running out of memory."""

import math
from unittest.mock import Mock

import conftest
import pytest
import torch
from conftest import gradients, make_batch, make_state, mixed_dataset, relative, tiny_model

import indofashion_clip as ic


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
    models = tiny_model(), tiny_model()
    model, plain = (
        models if tower == "neither" else [conftest.frozen(each, tower) for each in models]
    )
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


def test_a_class_weight_of_0_leaves_the_prompts_out(monkeypatch):
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.0)
    batch = next(ic.epoch_batches(mixed_dataset(), 1, 8))
    losses = ic.train_step(make_state(), batch)
    assert len(batch.prompts) == 0 and losses[0] > 0 and losses[1] == 0


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_unscaled_clipped_and_dropped_and_the_scale_is_clamped(monkeypatch, scale):
    monkeypatch.setattr(ic, "MAX_GRAD_NORM", 0.1)
    state = make_state(scaler=torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1))
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0)  # moves by the gradients
    before = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach()
    ic.train_step(state, make_batch(4))
    after = torch.nn.utils.parameters_to_vector(state.model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.1, rel=1e-3)
    assert gradients(state.model) == {}
    state.model.logit_scale.data.fill_(9.0)
    ic.train_step(state, make_batch(4))
    assert state.model.logit_scale.item() == pytest.approx(math.log(100))


# ---- An epoch ----
def test_a_step_that_overflows_is_skipped_and_left_out_of_the_mean_loss(monkeypatch):
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.7)
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
    metrics = ic.train_epoch(state, mixed_dataset(), Mock())
    losses, weights = zip(*steps, strict=True)
    finite = [i for i, loss in enumerate(losses) if loss.isfinite().all()]
    assert finite == [0, 2, 3] and state.scaler.get_scale() == 512
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    caption_loss, class_loss = torch.stack(losses)[finite].mean(0).tolist()
    expected = {"train_caption_loss": caption_loss, "train_class_loss": class_loss}
    expected |= {"train_loss": caption_loss + 0.7 * class_loss}
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
    output = conftest.run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 4}, code=1)
    advice = "set CHUNK_SIZE = 2 or another MODEL, and run it again"
    assert output.splitlines()[-1] == f"out of memory at 4 images at a time: {advice}"
    assert "Traceback" not in output
    lines = lines.replace("== 5", "== -1")
    output = conftest.run_driver(tmp_path, lines, constants | {"CHUNK_SIZE": 2})
    assert "Going on" in output and "Best weights" in output

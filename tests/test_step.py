"""The loss by hand, the schedule, the step in chunks and after running out of memory."""

import math
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, tiny_model
from test_model import relative

import indofashion_clip as ic


def test_loss_by_hand():
    image_features, text_features = torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    logits = [[0.6 * 2, 0.0 * 2], [0.8 * 2, 1.0 * 2]]

    def cross_entropy(row, target):
        return math.log(sum(map(math.exp, row))) - row[target]

    by_image = (cross_entropy(logits[0], 0) + cross_entropy(logits[1], 1)) / 2
    by_text = (
        cross_entropy([logits[0][0], logits[1][0]], 0) + cross_entropy([logits[0][1], logits[1][1]], 1)
    ) / 2
    loss = ic.clip_loss(image_features, text_features, torch.tensor(2.0).log(), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((by_image + by_text) / 2, rel=1e-6)


def random_features(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(count, 16, generator=generator), dim=-1) for _ in range(2)]


def test_loss_of_distinct_captions_is_plain_cross_entropy():
    images, texts = random_features(9)
    logits, targets = 5 * images @ texts.T, torch.arange(9)
    expected = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    assert ic.clip_loss(images, texts, torch.tensor(5.0).log(), targets + 40).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


def test_pairs_of_one_caption_are_positives_of_each_other():
    images, texts = random_features(3)
    texts[1] = texts[0]
    logits = 3 * images @ texts.T
    by_image, by_text = logits.log_softmax(1), logits.T.log_softmax(1)
    expected = 0
    for log_probabilities in (by_image, by_text):
        shared = -(log_probabilities[:2, :2].mean(1)).sum()  # half the target on each of the two
        expected += (shared - log_probabilities[2, 2]) / 3 / 2
    loss = ic.clip_loss(images, texts, torch.tensor(3.0).log(), torch.tensor([7, 7, 1]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_schedule():
    rates = [ic.learning_rate(step, 100, 10, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0) and rates[99] > 0 and rates[100] == pytest.approx(0, abs=1e-12)
    assert all(a < b for a, b in zip(rates[:9], rates[1:])) and all(
        a > b for a, b in zip(rates[10:], rates[11:])
    )


def test_no_decay_on_norms_biases_and_logit_scale():
    model = tiny_model()
    decayed, plain = ic.make_optimizer(model, 0.1).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    free = {names[id(p)] for p in plain["params"]}
    assert {"logit_scale", "ln_final.weight", "visual.class_embedding", "visual.ln_post.bias"} <= free
    assert all(
        "ln_" in name or name.endswith("bias") or name in ("logit_scale", "visual.class_embedding")
        for name in free
    )
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_augment():
    images = torch.rand(3, 3, 16, 16)
    still = torch.full((3, 4), 0.0)
    assert torch.allclose(ic.augment(images, still, 1.0), images, atol=1e-5)
    still[:, 3] = 0.9
    assert torch.allclose(ic.augment(images, still, 1.0), images.flip(-1), atol=1e-5)
    corner = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(3, 4)  # the smallest crop, at the top left
    expected = F.interpolate(images[:, :, :8, :8], size=16, mode="bilinear")
    assert torch.allclose(
        ic.augment(images, corner, 0.5)[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-5
    )


def make_run(model, chunk, precision=torch.float32, scaler=None, **changes):
    settings = SimpleNamespace(SEED=0, MIN_CROP=0.9, MAX_GRAD_NORM=1.0, **changes)
    return SimpleNamespace(
        model=model,
        settings=settings,
        precision=precision,
        chunk=chunk,
        optimizer=ic.make_optimizer(model, 0.1),
        scaler=scaler or torch.amp.GradScaler("cpu", enabled=False),
    )


def batch_of(count, seed=0):
    """Pixels and tokens of `count` pairs, a third of the captions said twice."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)
    tokens, _ = ic.tokenize(
        [f"saree number {i % max(1, count * 2 // 3)}" + " long" * (i % 5) for i in range(count)]
    )
    return pixels, tokens


def steps(chunk, count=11, num_steps=1, **how):
    """Losses, the last step's gradients and the weights after some steps."""
    run = make_run(tiny_model(), chunk, **how)
    losses = []
    for step in range(num_steps):
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        losses.append(ic.train_step(run, *batch_of(count, step), count, step).item())
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters()}
    return losses, gradients, {name: p.detach() for name, p in run.model.named_parameters()}, run


def plain_step(count=11):
    """The step as a textbook has it: one graph, one backward."""
    model, (pixels, tokens) = tiny_model(), batch_of(count)
    draws = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    images = ic.augment(pixels.float().div(255), draws, 0.9)
    image_features = F.normalize(model.encode_image((images - model.mean) / model.std), dim=-1)
    text_features = F.normalize(model.encode_text(tokens), dim=-1)
    same = (tokens[:, None] == tokens[None]).all(-1).float()
    logits = model.logit_scale.exp() * image_features @ text_features.T
    targets = same / same.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("chunk", [1, 3, 7, 11, 99])
def test_a_step_in_chunks_is_the_textbooks_step(chunk):
    losses, found, _, _ = steps(chunk)
    loss, expected = plain_step()
    assert losses[0] == pytest.approx(loss, rel=1e-5)
    assert max(relative(found[name], expected[name]) for name in expected) <= 1e-5


def test_twenty_steps_in_chunks_give_the_same_weights():
    _, _, whole, _ = steps(11, num_steps=20)
    _, _, chunked, _ = steps(3, num_steps=20)
    assert all(torch.allclose(chunked[name], whole[name], rtol=1e-4, atol=1e-4) for name in whole)
    everything = [torch.cat([w.flatten() for w in weights.values()]) for weights in (chunked, whole)]
    assert relative(*everything) <= 1e-4


def test_logit_scale_is_clamped():
    run = make_run(tiny_model(), 99)
    with torch.no_grad():
        run.model.logit_scale.fill_(9.0)
    ic.train_step(run, *batch_of(4), 4, 0)
    assert run.model.logit_scale.item() == pytest.approx(math.log(100))


def test_gradients_are_clipped(monkeypatch):
    run = make_run(tiny_model(), 99)
    run.settings.MAX_GRAD_NORM = 1e-3
    ic.train_step(run, *batch_of(4), 4, 0)
    assert torch.stack([p.grad.norm() for p in run.model.parameters()]).norm().item() == pytest.approx(
        1e-3, rel=1e-3
    )


def test_fp16_with_a_grad_scaler_gives_the_same_step():
    """The scaler multiplies the loss; the step has to come out as if it had not."""
    torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
    for chunk in (3, 11):
        losses, found, _, _ = steps(
            chunk, scaler=torch.amp.GradScaler("cpu", enabled=True, init_scale=1024.0)
        )
        loss, expected = plain_step()
        assert losses[0] == pytest.approx(loss, rel=1e-5)
        assert max(relative(found[name], expected[name]) for name in expected) <= 1e-4


def test_an_overflow_under_the_grad_scaler_skips_the_step():
    model = tiny_model()
    before = model.token_embedding.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=3e38)
    run = make_run(model, 99, scaler=scaler)
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    ic.train_step(run, *batch_of(4), 4, 0)
    assert torch.equal(model.token_embedding.weight, before) and scaler.get_scale() < 3e38


def failing(function, calls):
    """The function, out of memory at those of its calls."""
    count = iter(range(10**9))

    def call(*arguments):
        if next(count) in calls:
            raise torch.OutOfMemoryError("simulated")
        return function(*arguments)

    return call


@pytest.mark.parametrize(
    "chunk, where, calls",
    [
        (11, "encode_images", {0}),
        (11, "encode_captions", {0}),
        (11, "clip_loss", {0}),
        (11, "clip_loss", {0, 1}),
        (11, "augment", {0, 1}),
        (11, "backward", {0}),
        (11, "backward", {1}),
        (11, "backward", {1, 3}),
        (4, "encode_images", {1}),
        (4, "encode_images", {4}),
        (4, "encode_captions", {1}),
        (4, "encode_captions", {3}),
        (4, "clip_loss", {0}),
        (4, "backward", {0}),
        (4, "backward", {2, 3}),
    ],
)
def test_out_of_memory_anywhere_leaves_the_step_as_it_is(monkeypatch, capsys, chunk, where, calls):
    _, expected, _, _ = steps(chunk)
    if where == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", failing(torch.Tensor.backward, calls))
    else:
        monkeypatch.setattr(ic, where, failing(getattr(ic, where), calls))
    _, found, _, run = steps(chunk)
    monkeypatch.undo()
    assert run.chunk < chunk and "Out of memory" in capsys.readouterr().out
    assert max(relative(found[name], expected[name]) for name in expected) <= 1e-5


def test_a_small_batch_after_a_large_chunk_survives_too(monkeypatch):
    _, expected, _, _ = steps(99, count=5)
    monkeypatch.setattr(torch.Tensor, "backward", failing(torch.Tensor.backward, {1}))
    _, found, _, _ = steps(99, count=5)
    assert max(relative(found[name], expected[name]) for name in expected) <= 1e-5


def test_no_memory_for_one_pair_is_a_clear_error(monkeypatch):
    monkeypatch.setattr(ic, "encode_images", failing(ic.encode_images, set(range(99))))
    with pytest.raises(ic.Stop, match="out of memory"):
        steps(4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is set")
def test_freed_memory_is_kept():
    """Once kept, the tensors of a step come from memory that the process has, whose pages do not fault."""
    script = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import resource, torch, indofashion_clip as ic\n"
        "def faults(steps):\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(steps):\n"
        "        tensors = [torch.ones(n, 2**20, dtype=torch.uint8) for n in (64, 40, 96, 50, 80)]\n"
        "        del tensors\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "returned = faults(10)\n"
        "ic.keep_memory()\n"
        "faults(3)\n"
        "print(returned, faults(10))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    returned, kept = map(int, done.stdout.split()[-2:])
    assert kept < returned / 4


def test_where_there_is_no_glibc_memory_is_left_alone(monkeypatch):
    def no_mallopt(_):
        raise TypeError

    monkeypatch.setattr(ic.ctypes, "CDLL", no_mallopt)
    ic.keep_memory()

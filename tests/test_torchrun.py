"""Several processes, on one machine or two, train what one process trains."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import conftest
import pytest
import torch
from conftest import CPU, ROOT, gradients, mixed_dataset, read_metrics, run_driver, tiny_model

import indofashion_clip as ic

TOWERS = "neither", "images", "texts"  # one of them may be frozen
DRIVER = f"""
    import sys, torch
    sys.path.insert(0, {str(ROOT / "tests")!r})
    import test_torchrun
    ic.prepare_machine()
    torch.cpu._is_amx_tile_supported = lambda: ic.RANK > 0  # the first lacks bfloat16
    torch.cpu._is_avx512_bf16_supported = lambda: False
    torch.cuda.is_bf16_supported = lambda including_emulation: ic.RANK > 0
    kinds = "cpu", "cuda", "cuda" if ic.RANK else "cpu", "cpu" if ic.RANK else "cuda"
    precisions = [str(ic.choose_precision(torch.device(kind))) for kind in kinds]
    steps = [test_torchrun.shared_steps(tower) for tower in test_torchrun.TOWERS]
    if ic.RANK == 0:
        torch.save((precisions, steps), "found.pt")
    ic.all_reduce(torch.zeros(1))
    ic.dist.destroy_process_group()  # else a thread of it may abort the interpreter's end
    """


# ---- Steps ----
def model_without(tower):
    return tiny_model() if tower == "neither" else conftest.frozen(tiny_model(), tower)


def shared_steps(tower):
    """The losses and gradients of an epoch's steps, of which this process takes its share."""
    scaler, found = torch.amp.GradScaler("cpu", init_scale=1024.0), []
    how = {"chunk": 3, "scaler": scaler, "precision": ic.choose_precision(CPU)}
    state = conftest.make_state(model_without(tower), **how)
    state.optimizer.step = lambda: found.append(gradients(state.model))  # the weights stay
    for batch in ic.epoch_batches(mixed_dataset(), 1, 12):
        losses = ic.train_step(state, batch)
        found[-1]["losses"] = losses
    return found


def test_steps_of_processes_of_different_precision_are_the_textbooks(tmp_path, monkeypatch):
    """Shares of a batch differ: one has no title, and the classes are not a multiple of them."""
    monkeypatch.setattr(ic, "CLASS_WEIGHT", 0.7)
    constants = {"CLASS_WEIGHT": 0.7, "MAX_GRAD_NORM": 1e9}
    run_driver(tmp_path, DRIVER, constants, processes=3)
    precisions, steps = torch.load(tmp_path / "found.pt", weights_only=True)
    least = ("float32", "float16", "float32", "float16")  # a new CPU, or GPU, has bfloat16
    assert precisions == [f"torch.{name}" for name in least]
    batches = list(ic.epoch_batches(mixed_dataset(), 1, 12))
    assert min(len((batch.targets.titled // 4).unique()) for batch in batches) < 3
    assert any(batch.num_classes % 3 for batch in batches)
    for tower, shared in zip(TOWERS, steps, strict=True):
        for batch, found in zip(batches, shared, strict=True):
            losses, expected = conftest.textbook_step(model_without(tower), batch)
            expected |= {"losses": losses}
            assert found.keys() == expected.keys()
            differences = [conftest.relative(found[name], expected[name]) for name in expected]
            assert max(differences) <= 1e-5


# ---- Runs ----
def test_two_machines_of_two_processes_are_as_one_process(tmp_path):
    """They share a folder: only the first of a machine decodes, while the others wait."""
    data = conftest.make_dataset(tmp_path / "data", train=25, val=7)
    lines = """
        import os, time, torch
        ic.choose_precision = lambda device: torch.float32
        real = ic.write_cache
        def write_cache(*arguments):
            os.write(1, b"\\nDECODED\\n")
            time.sleep(0.5)
            real(*arguments)
        ic.write_cache = write_cache
        ic.main()
    """
    run_driver(tmp_path, lines, conftest.quick(data, CHUNK_SIZE=3))
    by_one = read_metrics(tmp_path, times=False)
    for made in ("outputs", "data/cache"):
        shutil.rmtree(tmp_path / made)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        endpoint = f"--rdzv_endpoint=localhost:{listener.getsockname()[1]}"
    how = {"processes": 2, "torchrun": ("--nnodes=2", "--rdzv_backend=c10d", endpoint)}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(conftest.launch, tmp_path / "driver.py", **how) for _ in range(2)]
    output = "".join(run.result() for run in runs)
    assert output.count("epoch split") == 1
    by_four = read_metrics(tmp_path, times=False)
    assert len(by_one) == len(by_four) == 4
    for one, four in zip(by_one, by_four, strict=True):
        assert four == one | {k: pytest.approx(v, rel=1e-3) for k, v in one.items() if "loss" in k}
    assert not list(tmp_path.rglob("*.tmp"))
    assert 1 <= output.count("DECODED") <= 2


def test_what_keeps_processes_from_sharing_a_run_is_one_line(monkeypatch):
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    line = "2 processes cannot share a batch of 1 images: start fewer"
    with pytest.raises(SystemExit, match=line):
        ic.new_state(tiny_model(), {"train": ["an image"]})
    monkeypatch.setattr(ic, "all_reduce", lambda place, _: place + 1)  # another process's
    line = "last.pt or the rows differ between processes: all have to see the same files"
    with pytest.raises(SystemExit, match=line):
        ic.resume(conftest.make_state())

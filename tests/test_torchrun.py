"""Several processes, on one machine or two, train what one process trains."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    ROOT,
    gradients,
    launch,
    make_batch,
    make_dataset,
    make_state,
    quick,
    read_metrics,
    relative,
    run_driver,
    tiny_model,
)

import indofashion_clip as ic


# ---- Steps ----
def three_steps():
    """The loss and the gradients of this process's share of three batches, at the first weights."""
    state, found = make_state(chunk=3), []
    state.optimizer.step = lambda: found.append(gradients(state.model))
    for number in range(3):
        whole = make_batch(12, number)
        rows = torch.arange(12).chunk(ic.WORLD_SIZE)[ic.RANK]
        ids, inverse = whole.inverse[rows].unique(return_inverse=True)
        pictures = {"pixels": whole.pixels[rows], "draws": whole.draws[rows]}
        share = whole._replace(tokens=whole.tokens[ids], inverse=inverse, **pictures)
        loss = ic.train_step(state, share)
        found[-1]["loss"] = loss
    return found


def test_steps_of_three_processes_are_those_of_one(tmp_path):
    lines = f"""
        import sys, torch
        sys.path.insert(0, {str(ROOT / "tests")!r})
        from test_torchrun import three_steps
        ic.prepare_machine()
        steps = three_steps()
        if ic.RANK == 0:
            torch.save(steps, "steps.pt")
    """
    run_driver(tmp_path, lines, {}, processes=3)
    steps = torch.load(tmp_path / "steps.pt", weights_only=True)
    for one, several in zip(three_steps(), steps, strict=True):
        assert one.keys() == several.keys()
        assert max(relative(several[name], one[name]) for name in one) <= 1e-5


# ---- Runs ----
def test_two_machines_of_two_processes_are_as_one_process(tmp_path):
    """They share a folder: one of the four decodes each split while the others wait."""
    constants = quick(make_dataset(tmp_path / "data", train=25, val=7), CHUNK_SIZE=3)
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
    run_driver(tmp_path, lines, constants)
    by_one = read_metrics(tmp_path, times=False)
    for made in ("outputs", "data/cache"):
        shutil.rmtree(tmp_path / made)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        endpoint = f"--rdzv_endpoint=localhost:{listener.getsockname()[1]}"
    how = {"processes": 2, "torchrun": ("--nnodes=2", "--rdzv_backend=c10d", endpoint)}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(launch, tmp_path / "driver.py", **how) for _ in range(2)]
    output = "".join(run.result() for run in runs)
    assert output.count("epoch split") == 1
    by_four = read_metrics(tmp_path, times=False)
    assert len(by_one) == len(by_four) == 4
    for one, four in zip(by_one, by_four, strict=True):
        assert four == one | {k: pytest.approx(v, rel=1e-3) for k, v in one.items() if "loss" in k}
    assert not list(tmp_path.rglob("*.tmp"))
    assert output.count("DECODED") == 3


def test_more_processes_than_pairs_end_with_a_line(monkeypatch):
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    with pytest.raises(SystemExit, match="2 processes cannot share a batch of 1: start fewer"):
        ic.new_state(tiny_model(), {"train": ["a pair"]})


@pytest.mark.parametrize(
    "error, expected, words",
    [
        (RuntimeError("closed by peer"), SystemExit, "cannot reach the other processes.*by peer"),
        (torch.OutOfMemoryError("simulated"), torch.OutOfMemoryError, "simulated"),
    ],
)
def test_a_process_whose_fellow_has_ended_says_so_in_a_line(monkeypatch, error, expected, words):
    """Running out of memory, which is a RuntimeError too, is not mistaken for it."""
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    monkeypatch.setattr(ic.dist, "all_reduce", Mock(side_effect=error))
    with pytest.raises(expected, match=words) as stop:
        ic.all_reduce(torch.zeros(1))
    assert "\n" not in str(stop.value)

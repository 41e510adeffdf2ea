"""Several processes, of one machine or two, are the same training as one."""

import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

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
def test_two_machines_with_one_folder_are_as_one_process(tmp_path):
    constants = quick(make_dataset(tmp_path / "data", train=25, val=7), CHUNK_SIZE=3)
    lines = "import torch\nic.choose_precision = lambda device: torch.float32\nic.main()"
    run_driver(tmp_path, lines, constants)
    by_one = read_metrics(tmp_path, times=False)
    for made in ("outputs", "data/cache"):
        shutil.rmtree(tmp_path / made)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        endpoint = f"--rdzv_endpoint=localhost:{listener.getsockname()[1]}"
    nodes = ("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=1", endpoint)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(launch, tmp_path / "driver.py", torchrun=nodes) for _ in range(2)]
    assert sum("epoch split" in run.result() for run in runs) == 1
    by_two = read_metrics(tmp_path, times=False)
    assert len(by_one) == len(by_two) == 4
    for one, two in zip(by_one, by_two, strict=True):
        assert two == one | {k: pytest.approx(v, rel=1e-3) for k, v in one.items() if "loss" in k}
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_process_that_fails_ends_all_with_its_error(tmp_path, dataset):
    lines = """
        real, calls = ic.train_step, []
        def broken(*arguments):
            calls.append(1)
            assert ic.RANK != 1 or len(calls) < 3, "broken on purpose"
            return real(*arguments)
        ic.train_step = broken
        ic.main()
    """
    output = run_driver(tmp_path, lines, quick(dataset), processes=2, code=1)
    assert "broken on purpose" in output


def test_one_process_loads_the_weights_first_then_one_of_each_machine(tmp_path, dataset):
    """Nobody begins before the turn before has ended. And a batch of 8 is 6 for three."""
    lines = """
        import os, time
        ic.LOCAL_RANK = ic.RANK % 2  # as if they were two machines
        real = ic.load_clip
        def load(name):
            begin = time.time()
            time.sleep(0.2)
            os.write(1, f"\\nLOADED {begin} {time.time()} {ic.RANK}\\n".encode())
            return real(name)
        ic.load_clip = load
        ic.main()
    """
    output = run_driver(tmp_path, lines, quick(dataset, NUM_EPOCHS=0), processes=3)
    assert "steps of 6 pairs" in output
    loads = sorted(re.findall(r"LOADED (\S+) (\S+) (\d)", output))[:3]  # later: to evaluate
    assert [rank for *_, rank in loads] == ["0", "2", "1"]
    assert all(float(end) <= float(begin) for (_, end, _), (begin, *_) in pairwise(loads))


def test_more_processes_than_pairs_end_with_a_line(tmp_path):
    data = make_dataset(tmp_path / "data", train=1)
    output = run_driver(tmp_path, "ic.main()", quick(data), processes=2, code=1)
    assert "2 processes cannot share a batch of 1" in output

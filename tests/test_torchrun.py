"""Several processes, of one machine or two, are the same training as one."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, edited_script, make_dataset, quick, read_metrics, relative, run_driver

STEPS = """
    import sys, torch
    sys.path.insert(0, {tests!r})
    from conftest import gradients, make_batch, make_state
    ic.prepare_machine()
    torch.set_num_threads(1)
    state, found = make_state(chunk=3), {{"losses": [], "gradients": []}}
    step = state.optimizer.step
    def record():
        found["gradients"].append(gradients(state.model))
        return step()
    state.optimizer.step = record
    for number in range(6):
        whole = make_batch(12, number)
        own = slice(12 // ic.WORLD_SIZE * ic.RANK, 12 // ic.WORLD_SIZE * (ic.RANK + 1))
        captions, which = whole.inverse[own].unique(return_inverse=True)
        share = ic.Batch(whole.pixels[own], whole.draws[own], whole.tokens[captions], which,
                         whole.caption_ids)
        found["losses"].append(ic.train_step(state, share).item())
    found["weights"] = state.model.state_dict()
    if ic.RANK == 0:
        torch.save(found, "steps.pt")
"""


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path_factory.mktemp("steps")
        lines = STEPS.format(tests=str(ROOT / "tests"))
        run_driver(folder, lines, {}, processes=count)
        found[count] = torch.load(folder / "steps.pt", weights_only=True)
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_several_processes_are_those_of_one(by_processes, count):
    one, several = by_processes[1], by_processes[count]
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, expected in one["gradients"][0].items():  # later the weights have drifted by rounding
        assert relative(several["gradients"][0][name], expected) <= 1e-5, name
    for name, expected in one["weights"].items():
        assert torch.allclose(several["weights"][name], expected, rtol=1e-4, atol=1e-4), name


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One whole run by one process, by two, and by two machines of one each in one folder."""
    folder = tmp_path_factory.mktemp("runs")
    constants = quick(make_dataset(folder / "data", train=25, val=7), CHUNK_SIZE=3)
    lines = "import torch\nic.choose_precision = lambda device: torch.float32\nic.main()"
    run_driver(folder / "one", lines, constants)
    run_driver(folder / "two", lines, constants, processes=2)
    endpoint = f"--rdzv_endpoint=localhost:{free_port()}"
    nodes = ("--nnodes=2", "--rdzv_backend=c10d", "--rdzv_id=1", endpoint)
    edited_script(folder / "nodes", **constants)
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(run_driver, folder / "nodes", lines, constants, torchrun=nodes)
            for _ in range(2)
        ]
        outputs = [run.result() for run in both]
    assert sum("epoch split" in output for output in outputs) == 1
    return folder


@pytest.mark.parametrize("name", ["two", "nodes"])
def test_a_run_of_several_processes_is_that_of_one(runs, name):
    one, several = (read_metrics(runs / folder, times=False) for folder in ("one", name))
    assert len(one) == len(several) == 4
    for expected, found in zip(one, several, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-3) if "loss" in key else value), key
    assert not list((runs / name).rglob("*.tmp"))


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


def test_one_process_loads_the_weights_first_then_one_of_each_machine(tmp_path):
    """Each says when it begins and ends: nobody begins before the turn before has ended."""
    lines = """
        import os, time
        ic.LOCAL_RANK = ic.RANK % 2  # as if two machines had two processes each
        ic.prepare_machine()
        def work():
            begin = time.time(); time.sleep(0.2)
            return begin, time.time()
        span = ic.in_turns(work, (ic.RANK > 0) + (ic.LOCAL_RANK > 0), 3)
        os.write(1, f"SPAN {ic.RANK} {span[0]} {span[1]}\\n".encode())
    """
    output = run_driver(tmp_path, lines, {}, processes=4)
    lines = [line.split() for line in output.splitlines() if "SPAN" in line]
    spans = {int(rank): (float(begin), float(end)) for _, rank, begin, end in lines}
    assert spans[2][0] >= spans[0][1]
    assert min(spans[1][0], spans[3][0]) >= spans[2][1]


def test_more_processes_than_pairs_end_with_a_line(tmp_path):
    data = make_dataset(tmp_path / "data", train=1)
    output = run_driver(tmp_path, "ic.main()", quick(data), processes=2, code=1)
    assert "2 processes cannot share a batch of 1" in output


def test_a_batch_that_does_not_divide_is_rounded_down(tmp_path):
    data = make_dataset(tmp_path / "data")
    output = run_driver(tmp_path, "ic.main()", quick(data, BATCH_SIZE=9), processes=2)
    assert "3 steps of 8 pairs" in output

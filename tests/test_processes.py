"""Several processes are the same training as one: loss, gradients, weights and metrics."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import environment, make_dataset, quick, read_metrics, run_script, weights
from test_model import relative
from test_training import batch_of, make_run, tiny_model

import indofashion_clip as ic

STEPS, BATCHES = 20, [11, 4, 1]  # 11 divides by neither 2 nor 3; 1 leaves processes without a row


def train_steps(path):
    """Run in every process (this file as a script): the steps on its shares; the first one saves."""
    ic.join_processes()
    torch.set_num_threads(1)
    run = make_run(tiny_model(), chunk=3)
    losses, gradients = [], []
    for step in range(STEPS):
        for group in run.optimizer.param_groups:
            group["lr"] = 1e-3
        count = BATCHES[step % len(BATCHES)]
        pixels, tokens = batch_of(count, seed=step)
        losses.append(ic.train_step(run, pixels[ic.my_share()], tokens[ic.my_share()], count, step).item())
        if step < len(BATCHES):
            gradients.append({name: p.grad.clone() for name, p in run.model.named_parameters()})
    if ic.rank() == 0:
        torch.save({"losses": losses, "gradients": gradients, "weights": run.model.state_dict()}, path)


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    results = {}
    for count in (1, 2, 3):
        path = tmp_path_factory.mktemp("steps") / "steps.pt"
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={count}", "--master_port=0"]
        done = subprocess.run([sys.executable, *(launch if count > 1 else []), __file__, str(path)],
                              env=environment(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results[count] = torch.load(path, weights_only=True)
    return results


@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_several_processes_are_those_of_one(by_processes, count):
    one, several = by_processes[1], by_processes[count]
    for step, (expected, found) in enumerate(zip(one["gradients"], several["gradients"])):
        assert several["losses"][step] == pytest.approx(one["losses"][step], rel=1e-5, abs=1e-7)
        for name in expected if step == 0 else ():  # before the weights have drifted by rounding
            assert relative(found[name], expected[name]) <= 1e-5, (step, name)
    assert all(torch.allclose(several["weights"][n], one["weights"][n], rtol=1e-4, atol=1e-4) for n in one["weights"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same whole run, on 25 rows of batches of 8 and evaluation splits of 7 and 10, by 1, 2, 3 processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "data", train=25, val=7, test=10)
    for count in (1, 2, 3):
        output = run_script(folder / str(count), processes=count, **quick(folder / "data", CHUNK_SIZE=3))
        assert output.count("epoch  split") == 1
    return folder


@pytest.mark.parametrize("count", [2, 3])
def test_a_run_of_several_processes_is_that_of_one(runs, count):
    one, several = (read_metrics(runs / str(n), times=False) for n in (1, count))
    assert len(one) == len(several) == 4
    for expected, found in zip(one, several):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == (pytest.approx(value, rel=2e-2) if "loss" in name else value) or "_r" in name, name


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [7, 10, 2])
def test_metrics_of_several_processes_equal_those_of_one(tmp_path, count, rows):
    """In float32, on the same weights, with a split that neither divides."""
    make_dataset(tmp_path / "data", train=5, val=rows, test=5)
    script = tmp_path / "metrics.py"
    script.write_text(METRICS.format(data=str(tmp_path / "data")))
    results = []
    for processes in (1, count):
        launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
        done = subprocess.run([sys.executable, *launch, str(script)], env=environment(PYTHONPATH=os.pathsep.join(sys.path)),
                              cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        results.append(eval(done.stdout.strip().splitlines()[-1]))
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert results[1][name] == (pytest.approx(value, rel=1e-5) if name == "loss" else value), name


METRICS = """
import os
import torch, indofashion_clip as ic
from conftest import quick
from pathlib import Path
device = ic.join_processes()
settings = ic.read_settings()
vars(settings).update(quick(Path({data!r}), OUTPUT_PATH="outputs"))
os.makedirs("outputs", exist_ok=True)
run, splits = ic.prepare(settings, device, None)
run.precision = torch.float32
metrics, _ = ic.evaluate(run, splits["val"])
metrics.pop("seconds"), metrics.pop("pairs_per_second")
ic.say(repr(metrics))
"""


def test_a_process_that_fails_ends_all_with_its_error(tmp_path, dataset):
    """The second process meets a broken step; neither hangs."""
    (tmp_path / "sitecustomize.py").write_text("")
    script = tmp_path / "fails.py"
    from conftest import edited_script
    edited_script(tmp_path, **quick(dataset))
    script.write_text("import indofashion_clip as ic\nreal = ic.train_step\ncalls = []\n"
                      "def broken(*a):\n    calls.append(1)\n    assert ic.rank() != 1 or len(calls) < 3, 'broken on purpose'\n"
                      "    return real(*a)\nic.train_step = broken\nic.main()\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", str(script)],
                          cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "broken on purpose" in done.stderr


if __name__ == "__main__":
    train_steps(sys.argv[1])

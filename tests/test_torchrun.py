"""Several processes are the same training as one: loss, gradients, weights and metrics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import edited_script, environment, make_dataset, quick, read_metrics, run_script
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


def torchrun(script, processes, *arguments, **variables):
    """The script's output, run by so many processes; one runs it plainly."""
    launch = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), str(script), *map(str, arguments)],
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=200,
        env=environment(PYTHONPATH=os.pathsep.join(sys.path)) | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory):
    results = {}
    for count in (1, 2, 3):
        path = tmp_path_factory.mktemp("steps") / "steps.pt"
        torchrun(Path(__file__), count, path)
        results[count] = torch.load(path, weights_only=True)
    return results


@pytest.mark.parametrize("count", [2, 3])
def test_steps_of_several_processes_are_those_of_one(by_processes, count):
    one, several = by_processes[1], by_processes[count]
    for step, (expected, found) in enumerate(zip(one["gradients"], several["gradients"])):
        assert several["losses"][step] == pytest.approx(one["losses"][step], rel=1e-5, abs=1e-7)
        for name in expected if step == 0 else ():  # before the weights have drifted by rounding
            assert relative(found[name], expected[name]) <= 1e-5, (step, name)
    assert all(
        torch.allclose(several["weights"][n], one["weights"][n], rtol=1e-4, atol=1e-4) for n in one["weights"]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same whole run, on 25 rows of batches of 8 and evaluation splits of 7 and 10, by 1 and by 2 processes."""
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "data", train=25, val=7, test=10)
    for count in (1, 2):
        output = run_script(
            folder / str(count), processes=count - 1 and count, **quick(folder / "data", CHUNK_SIZE=3)
        )
        assert output.count("epoch  split") == 1
    return folder


def test_a_run_of_several_processes_is_that_of_one(runs):
    one, several = (read_metrics(runs / str(count), times=False) for count in (1, 2))
    assert len(one) == len(several) == 4
    for expected, found in zip(one, several):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (
                found[name] == (pytest.approx(value, rel=2e-2) if "loss" in name else value) or "_r" in name
            ), name


METRICS = """
import os
import torch, indofashion_clip as ic
from conftest import quick
from pathlib import Path
device = ic.join_processes()
settings = ic.read_settings()
vars(settings).update(quick(Path({data!r}), OUTPUT_PATH="outputs"))
os.makedirs("outputs", exist_ok=True)
run, splits = ic.prepare(settings, device, ic.Interrupts())
run.precision = torch.float32
ic.say(repr([ic.evaluate(run, splits[split])[0] for split in splits]))
"""


@pytest.fixture(scope="module")
def metrics(tmp_path_factory):
    """By number of processes: the metrics in float32 on the same weights, of 7, 10 and 2 rows."""
    folder, found = tmp_path_factory.mktemp("metrics"), {}
    make_dataset(folder / "data", train=7, val=10, test=2)
    (folder / "metrics.py").write_text(METRICS.format(data=str(folder / "data")))
    for processes in (1, 2, 3):
        found[processes] = eval(torchrun(folder / "metrics.py", processes).strip().splitlines()[-1])
    return found


@pytest.mark.parametrize("count", [2, 3])
def test_metrics_of_several_processes_equal_those_of_one(metrics, count):
    for one, several in zip(metrics[1], metrics[count]):
        for name in one.keys() - {"seconds", "pairs_per_second"}:
            assert several[name] == (pytest.approx(one[name], rel=1e-5) if name == "loss" else one[name]), (
                name
            )


def test_a_process_that_fails_ends_all_with_its_error(tmp_path, dataset):
    """The second process meets a broken step; neither hangs."""
    edited_script(tmp_path, **quick(dataset))
    (tmp_path / "fails.py").write_text(
        "import indofashion_clip as ic\nreal, calls = ic.train_step, []\n"
        "def broken(*arguments):\n"
        "    calls.append(1)\n"
        "    assert ic.rank() != 1 or len(calls) < 3, 'broken on purpose'\n"
        "    return real(*arguments)\n"
        "ic.train_step = broken\nic.main()\n"
    )
    with pytest.raises(AssertionError, match="broken on purpose"):
        torchrun(tmp_path / "fails.py", 2, PYTHONPATH=str(tmp_path))


if __name__ == "__main__":
    train_steps(sys.argv[1])

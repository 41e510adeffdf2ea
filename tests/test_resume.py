"""Runs that are killed, told to stop, or meet a full disk: started again, they end as if nothing
had been."""

import random
import signal
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    edited_script,
    launch,
    make_dataset,
    quick,
    read_lines,
    read_metrics,
    run_driver,
    run_script,
    same_weights,
    write_lines,
)

import indofashion_clip as ic

STRUCK = """
    import os, signal, sys, torch
    torch.set_num_threads(1)
    # each (where, at which call, by which signal) in a process of its own, on from the last
    for where, call, number in {moments}:
        child = os.fork()
        if child == 0:
            module, name = ic, where
            for part in where.split(".")[:-1]:
                module, name = {{"os": os, "torch": torch}}[part], where.split(".")[-1]
            real, calls = getattr(module, name), []
            def struck(*arguments, **keywords):
                calls.append(1)
                if len(calls) == call:
                    if where == "torch.save":  # half of the file is written
                        real(*arguments)
                        arguments[1].truncate(arguments[1].tell() // 2)
                    os.kill(os.getpid(), number)
                return real(*arguments, **keywords)
            setattr(module, name, struck)
            code = 0
            try:
                ic.main()
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()
            os._exit(code)
        print("ENDED", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    ic.main()
"""


def run_struck(folder, moments, constants):
    """(the output, the exit codes of the runs that were struck); the last run goes to the end."""
    output = run_driver(folder, textwrap.dedent(STRUCK).format(moments=moments), constants)
    assert "Traceback" not in output
    return output, [int(s.split()[1]) for s in output.splitlines() if s.startswith("ENDED")]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run never struck, beside its dataset, and its constants."""
    folder = tmp_path_factory.mktemp("untouched")
    constants = quick(make_dataset(folder / "data", train=44), NUM_EPOCHS=4)
    run_struck(folder, [], constants)
    return folder, constants


def assert_as_untouched(folder, untouched):
    assert read_metrics(folder, times=False) == read_metrics(untouched[0], times=False)
    for name in ("best.pt", "last.pt"):
        one, other = (
            torch.load(f / "outputs" / name, weights_only=True) for f in (folder, untouched[0])
        )
        one, other = one.get("model", one), other.get("model", other)
        assert all(torch.equal(one[name], other[name]) for name in other)
    names = [sorted(p.name for p in (f / "outputs").iterdir()) for f in (folder, untouched[0])]
    assert names[0] == names[1]


@pytest.mark.parametrize("seed", [0, 1])
def test_kill_9_at_random_moments(tmp_path, untouched, seed):
    rng = random.Random(seed)
    places = [("decode", 40), ("train_step", 5), ("torch.save", 2), ("os.replace", 3)]
    places += [("train_step", 8), ("evaluate", 1), ("log", 1), ("draw_confusion", 1)]
    moments = [(where, rng.randint(1, most), signal.SIGKILL.value) for where, most in places]
    _, codes = run_struck(tmp_path, moments, untouched[1])
    assert codes == [-9] * len(places)
    assert_as_untouched(tmp_path, untouched)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_saved_within_a_step(tmp_path, untouched, number):
    """Before the first step, in a step, in an evaluation, while saving, while drawing."""
    places = [("evaluate", 1), ("train_step", 1), ("train_step", 7), ("encode_texts", 1)]
    places += [("torch.save", 1), ("log", 1), ("draw_confusion", 1)]
    moments = [(where, call, number.value) for where, call in places]
    output, codes = run_struck(tmp_path, moments, untouched[1])
    assert codes == [128 + number] * len(places)
    assert output.count("the same command goes on from there") == len(places)
    assert "epoch 1, of which 1 steps are done" in output
    assert_as_untouched(tmp_path, untouched)


@pytest.mark.parametrize("where", ["load_clip", "read_weights", "decode", "resume", "torch.load"])
def test_a_signal_before_training_ends_the_run_at_once(tmp_path, untouched, where):
    """Nothing that catches errors swallows it: no weights are blamed, no picture, no last.pt."""
    constants = untouched[1]
    if where in ("read_weights", "torch.load"):
        constants = constants | {"MODEL": str(untouched[0] / "outputs/best.pt")}
    call = 3 if where == "decode" else 1
    output, codes = run_struck(tmp_path, [(where, call, signal.SIGTERM.value)], constants)
    assert codes == [143] and "Stopped before training" in output
    assert (tmp_path / "outputs/skipped.jsonl").read_text() == ""


@pytest.mark.parametrize("moment", ["train_step", "encode_texts", "barrier"])
def test_a_signal_to_one_of_two_processes_ends_both(tmp_path, untouched, moment):
    lines = f"""
        import os, signal
        real, calls = ic.{moment}, []
        def struck(*arguments):
            calls.append(1)
            if ic.RANK == 1 and len(calls) == 3 and not os.path.exists("struck"):
                open("struck", "w").close()
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)
        ic.{moment} = struck
        try:
            ic.main()
        except SystemExit as stop:
            os.write(1, f"CODE {{stop.code}}\\n".encode())
            raise
    """
    output = run_driver(tmp_path, lines, untouched[1], processes=2, code=1)
    assert output.count("CODE 143") == (1 if moment == "barrier" else 2)
    assert "[rank" not in output  # which torch puts before a traceback
    assert ("goes on from there" in output) == (moment != "barrier")
    again = run_driver(tmp_path, lines, untouched[1], processes=2)
    assert "The best weights" in again and ("Going on" in again) == (moment != "barrier")


def stopped_run(folder, constants, **changes):
    """A run with a last.pt in the middle of its second epoch."""
    moments = [("train_step", 8, signal.SIGTERM.value)]
    lines = textwrap.dedent(STRUCK).format(moments=moments).replace("\nic.main()\n", "\n")
    return run_driver(folder, lines, constants | changes)


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, untouched):
    run_struck(tmp_path, [], untouched[1])
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "outputs").glob("*t")}
    again = run_script(tmp_path, **untouched[1])
    assert "finished" in again and "OUTPUT_PATH" in again
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before}


def test_going_on_may_use_other_chunks_and_processes(tmp_path, untouched):
    stopped_run(tmp_path, untouched[1])
    changed = untouched[1] | {"CHUNK_SIZE": 3, "CACHE_PATH": "elsewhere"}
    output = run_driver(tmp_path, "ic.main()", changed, processes=2)
    assert "Going on from outputs/last.pt: epoch 2, of which 3 steps" in output
    expected, found = (read_metrics(f, times=False) for f in (untouched[0], tmp_path))
    assert [line["epoch"] for line in found[:-1]] == [line["epoch"] for line in expected[:-1]]
    assert found[4]["loss"] == pytest.approx(expected[4]["loss"], rel=0.1)


def test_another_training_is_refused_by_name(tmp_path, untouched):
    stopped_run(tmp_path, untouched[1])
    before = (tmp_path / "outputs/last.pt").read_bytes()
    output = run_script(tmp_path, code=1, **untouched[1] | {"LR": 2e-3, "SEED": 4})
    assert "LR was 0.001, is 0.002" in output and "SEED was 0, is 4" in output
    for split, first in {"train": 1, "val": 0, "test": 0}.items():
        rows = read_lines(untouched[0] / f"data/{split}_data.json")
        write_lines(tmp_path / f"{split}.json", rows[first:])
    paths = {"JSON_PATH": str(tmp_path / "{split}.json")}
    output = run_script(tmp_path, code=1, **untouched[1] | paths)
    assert "the rows of train was" in output and "rows of val" not in output
    output = run_driver(tmp_path, "ic.main()", untouched[1], processes=3, code=1)
    assert "BATCH_SIZE was 8, is 6" in output and "OUTPUT_PATH" in output
    assert (tmp_path / "outputs/last.pt").read_bytes() == before


@pytest.mark.parametrize("first, then", [(False, True), (True, False), (True, True)])
def test_a_run_goes_on_in_another_precision(tmp_path, monkeypatch, first, then):
    """float16 has a GradScaler, whose state bfloat16 and float32 neither write nor read."""
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))

    def state(enabled, **how):
        scaler = torch.amp.GradScaler("cpu", enabled=enabled, **how)
        return ic.State(model, ic.make_optimizer(model), scaler, torch.float16, 8, 8, {"LR": 1})

    model = ic.load_clip("tiny")
    ic.save_run(state(first, init_scale=32.0))
    goes_on = state(then)
    ic.resume(goes_on)
    assert goes_on.scaler.get_scale() == (32.0 if first and then else 65536.0 if then else 1.0)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_foreign_last_pt_is_refused_and_left_alone(tmp_path, untouched, content):
    (tmp_path / "outputs").mkdir()
    if content is None:
        torch.save({"layer": torch.ones(3)}, tmp_path / "outputs/last.pt")
    else:
        (tmp_path / "outputs/last.pt").write_bytes(content)
    before = (tmp_path / "outputs/last.pt").read_bytes()
    output = run_script(tmp_path, code=1, **untouched[1])
    assert "last.pt is no checkpoint" in output and "Traceback" not in output
    assert (tmp_path / "outputs/last.pt").read_bytes() == before


FULL = """
    import errno, os
    synced, real = [], os.fsync
    def full(descriptor):
        path = os.readlink(f"/proc/self/fd/{{descriptor}}")
        synced.extend([path] if "/{file}" in path else [])
        if len(synced) == {save} and "/{file}" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return real(descriptor)
    os.fsync = full
    ic.main()
"""


@pytest.mark.parametrize(
    "file, save",
    [("best.pt", 1), ("last.pt", 3), ("metrics.jsonl", 2), ("skipped.jsonl", 1), ("train-64", 1)],
)
def test_a_full_disk_leaves_the_old_file_a_message_and_no_debris(tmp_path, untouched, file, save):
    output = run_driver(tmp_path, FULL.format(file=file, save=save), untouched[1], code=1)
    assert f"{file}" in output and "No space left on device; what it held is untouched" in output
    assert "Traceback" not in output and not list(tmp_path.rglob("*.tmp"))
    for path in (tmp_path / "outputs").glob("*.pt"):
        torch.load(path, weights_only=True)
    if file in ("last.pt", "train-64"):
        run_struck(tmp_path, [], untouched[1])
        assert_as_untouched(tmp_path, untouched)


def test_a_write_that_fails_inside_torch_save(tmp_path):
    """A file-size limit stands in for a small disk: torch's own writer meets the error."""
    lines = """
        import resource, signal, torch
        torch.save(torch.ones(10), "last.pt")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with ic.atomic_write("last.pt") as file:
            torch.save(torch.ones(1_000_000), file)
    """
    output = run_driver(tmp_path, lines, {}, code=1)
    assert "cannot write last.pt" in output and "Traceback" not in output
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True), torch.ones(10))
    assert not list(tmp_path.glob("*.tmp"))


def test_broken_weights_are_not_saved(tmp_path, untouched):
    """A weight that breaks after the last loss was read leaves the files as they were."""
    lines = """
        real, calls = ic.train_step, []
        def train_step(state, batch):
            loss = real(state, batch)
            calls.append(1)
            if len(calls) == 10:  # the last step of the second epoch
                state.model.visual.proj.data[0, 0] = float("inf")
            return loss
        ic.train_step = train_step
        ic.main()
    """
    output = run_driver(tmp_path, lines, untouched[1], code=1)
    assert "not finite by step 5 of epoch 2" in output and "Traceback" not in output
    for name in ("best.pt", "last.pt"):
        state = torch.load(tmp_path / "outputs" / name, weights_only=True)
        assert all(w.isfinite().all() for w in state.get("model", state).values())


def test_two_runs_at_once_may_share_a_cache(tmp_path, untouched):
    scripts = [
        edited_script(tmp_path / n, **untouched[1] | {"CACHE_PATH": str(tmp_path / "cache")})
        for n in ("one", "two")
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(launch, scripts))
    best = [script.parent / "outputs/best.pt" for script in scripts]
    assert same_weights(*best) and not list(tmp_path.rglob("*.tmp"))

"""Runs that are killed, told to stop, or meet a full disk: started again, they end as if nothing
had been."""

import errno
import os
import resource
import shutil
import signal
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch
from conftest import (
    make_dataset,
    make_state,
    quick,
    read_lines,
    read_metrics,
    run_driver,
    run_script,
    same_weights,
    tiny_model,
    toy_dataset,
    weights,
    write_lines,
)

import indofashion_clip as ic


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run that nothing happened to, and its constants."""
    folder = tmp_path_factory.mktemp("untouched")
    torch.save(tiny_model().state_dict(), folder / "start.pt")
    data, start = make_dataset(folder / "data", train=44), str(folder / "start.pt")
    constants = quick(data, MODEL=start, NUM_EPOCHS=5)
    run_script(folder, **constants)
    return folder, constants


def assert_as_untouched(folder, untouched):
    assert read_metrics(folder, times=False) == read_metrics(untouched[0], times=False)
    outputs, others = folder / "outputs", untouched[0] / "outputs"
    assert same_weights(outputs / "best.pt", others / "best.pt")
    assert sorted(os.listdir(outputs)) == sorted(os.listdir(others))
    assert read_lines(outputs / "skipped.jsonl") == []


# ---- Struck by a signal ----
STRUCK = """
    import os, signal, torch
    torch.set_num_threads(1)
    for where, call, number in {moments}:  # each in a process of its own, on from the last
        if os.fork() > 0:
            print("ENDED", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
            continue
        owner, name = where.split(".")
        real, calls = getattr(globals()[owner], name), []
        def struck(*arguments, **keywords):
            calls.append(1)
            if len(calls) == call:
                if where == "torch.save" and number == signal.SIGKILL:  # half of it is written
                    real(*arguments)
                    arguments[1].truncate(arguments[1].tell() // 2)
                os.kill(os.getpid(), number)
            return real(*arguments, **keywords)
        setattr(globals()[owner], name, struck)
        try:
            ic.main()
        except SystemExit as stop:
            os._exit(stop.code)
        os._exit(1)  # it was not struck
    ic.main()
"""
BEFORE = [("ic.load_clip", 1), ("ic.read_weights", 1), ("torch.load", 1), ("ic.decode", 3)]
BEFORE += [("ic.resume", 1)]
DURING = [
    ("ic.evaluate", 1),
    ("ic.save_best", 2),
    ("torch.save", 1),
    ("torch.save", 2),
    ("ic.train_step", 1),
]
DURING += [("ic.train_step", 3), ("ic.encode_texts", 3), ("os.replace", 3), ("ic.log", 1)]
DURING += [("ic.draw_confusion", 1)]


@pytest.mark.parametrize("numbers", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGINT]])
def test_a_run_struck_again_and_again_ends_as_if_nothing_had_been(tmp_path, untouched, numbers):
    """A signal that can be caught ends it at once, or saved within a step. No handler of errors
    takes it for one: neither the weights, an image nor last.pt is blamed."""
    places, heard = BEFORE + DURING, signal.SIGTERM in numbers
    moments = [(*place, int(numbers[i % len(numbers)])) for i, place in enumerate(places)]
    output = run_driver(tmp_path, STRUCK.format(moments=moments), untouched[1])
    codes = [int(line.split()[1]) for line in output.splitlines() if line.startswith("ENDED")]
    assert codes == [128 + number if heard else -number for _, _, number in moments]
    assert output.count("Stopped before training") == heard * len(BEFORE)
    assert output.count("the same command goes on from there") == heard * len(DURING)
    assert ("epoch 1, of which 1 steps are done" in output) == heard
    assert "Traceback" not in output
    assert_as_untouched(tmp_path, untouched)


def test_a_signal_to_one_of_two_processes_ends_both_and_one_goes_on_alone(tmp_path, untouched):
    """In a step, and going on with other chunks and cache."""
    lines = """
        import os, signal
        real, calls = ic.{moment}, []
        def struck(*arguments):
            calls.append(1)
            if ic.RANK == 1 and len(calls) == {call}:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)
        ic.{moment} = struck
        try:
            ic.main()
        except SystemExit as stop:
            os.write(1, f"CODE {{stop.code}}\\n".encode())
            raise
    """
    changed = untouched[1] | {"CHUNK_SIZE": 3, "CACHE_PATH": "elsewhere"}
    moments = [("train_step", 8, untouched[1]), ("train_step", 1, changed)]
    in_a_step, going_on = (
        run_driver(tmp_path, lines.format(moment=moment, call=call), how, processes=2, code=1)
        for moment, call, how in moments
    )
    for output in (in_a_step, going_on):
        assert output.count("CODE 143") == 2 and "goes on from there" in output
    assert "[rank" not in in_a_step + going_on  # torch puts it before a traceback
    assert "Going on from outputs/last.pt: epoch 2, of which 3 steps are done" in going_on
    assert "epoch 2, of which 4 steps" in run_script(tmp_path, **untouched[1])
    expected, found = (read_metrics(f, times=False) for f in (untouched[0], tmp_path))
    assert [line["epoch"] for line in found[:-1]] == [line["epoch"] for line in expected[:-1]]
    assert found[4]["loss"] == pytest.approx(expected[4]["loss"], rel=0.1)


# ---- What last.pt is of ----
def test_a_finished_run_is_left_alone_and_another_refused_by_name(tmp_path, untouched):
    outputs, constants = tmp_path / "outputs", untouched[1]
    shutil.copytree(untouched[0] / "outputs", outputs)
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]
    again = run_script(tmp_path, **constants)
    assert "finished" in again and "OUTPUT_PATH" in again
    for split, first in {"train": 1, "val": 0, "test": 0}.items():
        rows = read_lines(untouched[0] / f"data/{split}_data.json")
        write_lines(tmp_path / f"{split}.json", rows[first:])
    paths = {"JSON_PATH": str(tmp_path / "{split}.json")}
    changes = paths | {"LR": 2e-3, "SEED": 4, "BATCH_SIZE": 1000}
    output = run_script(tmp_path, code=1, **constants | changes)
    for words in ("LR was 0.001, is 0.002", "SEED was 0, is 4", "equal shares was 8, is 43"):
        assert words in output  # 43: the rows that there are
    assert "the rows of train was" in output and "rows of val" not in output
    assert "OUTPUT_PATH" in output
    output = run_script(tmp_path, code=1, **constants | {"NUM_EPOCHS": 10})
    assert "NUM_EPOCHS was 5, is 10" in output and 'MODEL = "outputs/best.pt"' in output
    output = run_script(tmp_path, code=1, **constants | {"MODEL": "outputs/best.pt"})
    assert "MODEL is outputs/best.pt, which this run would overwrite" in output
    assert before == [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]


def test_an_epoch_resumed_after_its_last_step_has_no_speed():
    """Interrupted during its evaluation: no step is left, so there is no speed to log."""
    state = make_state(epoch=1, step=3, loss_sum=6.0)
    assert ic.train_epoch(state, toy_dataset("xxxx", "abcd"), bar=None) == {"train_loss": 2.0}


def test_a_foreign_last_pt_is_refused_and_left_alone(tmp_path, untouched):
    last = tmp_path / "outputs/last.pt"
    last.parent.mkdir()
    for content in (b"", b"not a checkpoint", (untouched[0] / "start.pt").read_bytes()):
        last.write_bytes(content)
        assert "last.pt is no checkpoint" in run_script(tmp_path, code=1, **untouched[1])
        assert last.read_bytes() == content


@pytest.mark.parametrize("first, then, scale", [(0, 1, 64.0), (1, 0, 1.0), (1, 1, 32.0)])
def test_a_run_goes_on_in_another_precision(tmp_path, monkeypatch, first, then, scale):
    """float16 has a GradScaler, whose state bfloat16 and float32 neither write nor read."""
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))
    ic.save_run(make_state(scaler=torch.amp.GradScaler("cpu", 32.0, enabled=first)))
    goes_on = make_state(scaler=torch.amp.GradScaler("cpu", 64.0, enabled=then))
    ic.resume(goes_on)
    assert goes_on.scaler.get_scale() == scale


@pytest.mark.parametrize("chosen, chunk", [(None, 4), (8, 8)])
def test_a_run_goes_on_in_the_same_chunks_unless_told(tmp_path, monkeypatch, chosen, chunk):
    """More memory may be free by then, but other chunks would change the last bits."""
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))
    monkeypatch.setattr(ic, "CHUNK_SIZE", chosen)
    ic.save_run(make_state(chunk=4))
    ic.resume(goes_on := make_state(chunk=8))
    assert goes_on.chunk == chunk


# ---- What cannot be written ----
def test_a_full_disk_leaves_the_old_file_a_message_and_no_debris(tmp_path, untouched, monkeypatch):
    writes = Counter({"train-64": 1, "skipped": 1, "best": 1, "metrics": 2, "last": 3})
    real = os.fsync

    def fsync(descriptor):
        """The disk is full at that write of the file."""
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.split(".")[0]
        file = "train-64" if file.startswith("train-64") else file
        writes[file] -= 1
        if writes[file] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    for file in list(writes):
        output = run_script(tmp_path, code=1, **untouched[1])
        assert f"/{file}" in output[output.index("cannot write ") :]
        assert "No space left on device" in output and "what it held is untouched" in output
        assert not list(tmp_path.rglob("*.tmp")), file
        assert all(weights(path) for path in (tmp_path / "outputs").glob("*.pt")), file
    run_script(tmp_path, **untouched[1])
    assert_as_untouched(tmp_path, untouched)


def test_a_file_that_is_held_for_a_moment_is_replaced_at_last(tmp_path, monkeypatch):
    """As Windows' scanners hold a new file."""
    denials, replace = [PermissionError(13, "Access is denied")] * 3, os.replace
    monkeypatch.setattr(ic.time, "sleep", lambda seconds: None)

    def denied(*paths):
        if denials:
            raise denials.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", denied)
    with ic.atomic_write(tmp_path / "a.txt") as file:
        file.write(b"new")
    assert (tmp_path / "a.txt").read_bytes() == b"new" and os.listdir(tmp_path) == ["a.txt"]
    denials = [PermissionError(13, "Access is denied")] * 99
    refused = pytest.raises(SystemExit, match="cannot write .*a.txt")
    with refused, ic.atomic_write(tmp_path / "a.txt") as file:
        file.write(b"newer")
    assert (tmp_path / "a.txt").read_bytes() == b"new"


def test_processes_go_on_from_one_place_or_not_at_all(tmp_path, untouched):
    """One of two does not see last.pt."""
    lines = """
        import os
        real = ic.resume
        def resume(state):
            if ic.RANK == 1:
                ic.OUTPUT_PATH = "elsewhere"
            real(state)
        def train_step(*_):
            os._exit(9)
        ic.resume, ic.train_step = resume, train_step
        ic.main()
    """
    begun, goes_on = (run_driver(tmp_path, lines, untouched[1], processes=2, code=1) for _ in "12")
    assert "    0 val " in begun and "all have to see the same files" not in begun
    assert "elsewhere/last.pt or the rows differ" in goes_on and "    1 val " not in goes_on


def test_a_write_that_fails_inside_torch_save_leaves_the_old_file(tmp_path):
    """A file-size limit stands in for a small disk: torch's own writer meets the error."""
    torch.save(torch.ones(10), path := tmp_path / "last.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="cannot write"), ic.atomic_write(path) as file:
            torch.save(torch.ones(1_000_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(weights(path), torch.ones(10)) and os.listdir(tmp_path) == ["last.pt"]


def test_broken_weights_are_not_saved(tmp_path, untouched, monkeypatch):
    """A weight that breaks after the last loss was read leaves the files as they were."""
    real, steps = torch.optim.Adam.step, count(1)

    def step(optimizer):
        real(optimizer)
        if next(steps) == 10:  # the last step of the second epoch
            optimizer.param_groups[0]["params"][0].data[0, 0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    output = run_script(tmp_path, code=1, **untouched[1])
    assert "not finite by step 5 of epoch 2" in output and "lower LR" in output
    for name in ("best.pt", "last.pt"):
        state = weights(tmp_path / "outputs" / name)
        assert all(w.isfinite().all() for w in state.get("model", state).values())

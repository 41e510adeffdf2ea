"""Runs that are killed, told to stop or meet a full disk end, at last, as if nothing had been."""

import os
import shutil
import signal
import socket
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import conftest
import pytest
import torch
from conftest import make_state, read_metrics, run_driver, run_script, same_weights, tiny_model
from torch.optim.optimizer import register_optimizer_step_post_hook

import indofashion_clip as ic


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run that only lost MODEL's file, after a step, and its constants."""
    folder = tmp_path_factory.mktemp("untouched")
    data, start = conftest.make_dataset(folder / "data", train=44), folder / "start.pt"
    constants = conftest.quick(data, MODEL=str(start), NUM_EPOCHS=5)
    torch.save(tiny_model().state_dict(), start)
    hook = register_optimizer_step_post_hook(lambda *_: start.unlink(missing_ok=True))
    run_script(folder, **constants)
    hook.remove()
    torch.save(tiny_model().state_dict(), start)  # for the runs that are compared with this one
    return folder, constants


@pytest.fixture
def output_path(tmp_path, monkeypatch):
    monkeypatch.setattr(ic, "OUTPUT_PATH", str(tmp_path))
    return tmp_path


def assert_as_untouched(folder, untouched):
    """To the bit, the figures too: last.pt keeps what they show."""
    assert read_metrics(folder, times=False) == read_metrics(untouched[0], times=False)
    outputs, others = folder / "outputs", untouched[0] / "outputs"
    assert same_weights(outputs / "best.pt", others / "best.pt")
    assert sorted(os.listdir(outputs)) == sorted(os.listdir(others))
    assert not list((folder / "data/cache").glob("*.tmp"))
    for name in ("skipped.jsonl", "curves.png", "confusion.png", "retrieval.png"):
        assert (outputs / name).read_bytes() == (others / name).read_bytes(), name


# ---- Struck by a signal ----
STRUCK = """
    import itertools, os, signal, types, torch
    torch.set_num_threads(1)
    clock = itertools.count(0, 250).__next__  # ten minutes are three steps
    ic.time = types.SimpleNamespace(perf_counter=clock, sleep=ic.time.sleep)
    for where, call, *numbers in {moments}:  # each in a process of its own, on from the last
        if os.fork() > 0:
            print("ENDED", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
            continue
        owner, name = where.split(".")
        real, calls = getattr(globals()[owner], name), []
        def struck(*arguments, **keywords):
            calls.append(1)
            for number in numbers if len(calls) == call else ():
                if where == "torch.save" and number == signal.SIGKILL:  # half of it is written
                    real(*arguments)
                    arguments[1].truncate(arguments[1].tell() // 2)
                os.kill(os.getpid(), number)
            return real(*arguments, **keywords)
        setattr(globals()[owner], name, struck)
        try:
            ic.main()
        except SystemExit as stop:
            os._exit(stop.code if type(stop.code) is int else print(stop.code) or 99)
        os._exit(0 if len(calls) >= call else 98)
    ic.main()
"""
KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
LOADING = [("ic.load_clip", 1), ("ic.decode", 3), ("ic.resume", 1)]
KILLED = [*LOADING, ("ic.evaluate", 1), ("torch.save", 1), ("ic.save", 2), ("torch.save", 2)]
KILLED += [("ic.train_step", 5), ("ic.evaluate", 1), ("ic.save", 2), ("os.replace", 3)]
KILLED += [("torch.save", 2)] * 5  # whichever epoch is the best
KILLED += [("ic.draw_curves", 1), ("os.replace", 4), ("ic.evaluate", 1), ("ic.save_run", 1)]
STOPPED = [("ic.evaluate", 1, TERM), ("ic.train_step", 1, INT), ("torch.save", 1, TERM)]
STOPPED += [("ic.encode_texts", 3, INT), ("os.replace", 3, TERM), ("ic.save", 2, INT)]
ENDS = [("ic.train_step", 2, TERM, TERM), ("ic.draw_confusion", 1, INT)]  # no step comes after it
RUNS = {  # their moments, what ends each process, and the steps that are saved, as epoch and step
    "killed": ([(*place, KILL) for place in KILLED], [-KILL] * len(KILLED), ["13", "15"]),
    "told to stop": (
        [(*place, INT) for place in LOADING] + STOPPED + ENDS,
        [-INT] * len(LOADING) + [128 + stop[2] for stop in STOPPED] + [-TERM, 0],
        ["10", "11", "14", "15", "20", "23"],
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_run_struck_again_and_again_ends_as_if_nothing_had_been(tmp_path, untouched, run):
    """Told to stop: saved, after the step or evaluation; while loading, or told twice, at once."""
    moments, codes, steps = RUNS[run]
    output = run_driver(tmp_path, STRUCK.format(moments=moments), untouched[1])
    assert [int(line.split()[1]) for line in output.splitlines() if "ENDED" in line] == codes
    saved = "Stopped and saved in outputs/last.pt: the same command goes on from there."
    assert output.count(saved) == sum(code > 128 for code in codes) and "Traceback" not in output
    for epoch, step in steps:
        assert f"epoch {epoch}, of which {step} steps are done" in output
    assert_as_untouched(tmp_path, untouched)


def test_two_processes_end_together_and_one_goes_on_alone(tmp_path, untouched):
    """Saved in a step after a signal to one; alone it has other chunks and another cache."""
    lines = """
        import os, signal
        step, calls = ic.train_step, []
        def struck(*arguments):
            calls.append(1)
            if ic.RANK == 1 and len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)
        ic.train_step = struck
        try:
            ic.main()
        except SystemExit as stop:
            os.write(1, f"CODE {stop.code}\\n".encode())
            raise
    """
    output = run_driver(tmp_path, lines, untouched[1], processes=2, code=1)
    assert output.count("CODE 143") == 2 and output.count("Stopped and saved") == 1
    assert "[rank" not in output  # torch puts it before a traceback
    going_on = run_script(tmp_path, **untouched[1] | {"CHUNK_SIZE": 3, "CACHE_PATH": "elsewhere"})
    assert "Going on from outputs/last.pt: epoch 2, of which 3 steps are done" in going_on
    expected, found = (read_metrics(f, times=False) for f in (untouched[0], tmp_path))
    assert [line["epoch"] for line in found[:-1]] == [line["epoch"] for line in expected[:-1]]
    assert found[4]["loss"] == pytest.approx(expected[4]["loss"], rel=0.1)


# ---- What last.pt is of ----
def test_a_finished_run_is_left_alone_and_another_refused_by_name(tmp_path, untouched):
    outputs, constants = tmp_path / "outputs", untouched[1]
    shutil.copytree(untouched[0], tmp_path, dirs_exist_ok=True)
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]
    again = run_script(tmp_path, **constants)
    assert "Going on" in again and "Best weights" in again and " test " not in again
    train = tmp_path / "data/train_data.json"
    train.write_text(train.read_text().partition("\n")[2])  # one row less
    changes = {"JSON_PATH": f"{tmp_path}/data/{{split}}_data.json", "LR": 2e-3, "BATCH_SIZE": 1000}
    output = run_script(tmp_path, code=1, **constants | changes | {"NUM_EPOCHS": 10})
    for words in ("LR was 0.001, is 0.002", "NUM_EPOCHS was 5, is 10", "the rows of train was"):
        assert words in output
    assert "BATCH_SIZE in equal shares was 8, is 43" in output  # the rows that there are
    assert "1, 2, 4, 8 processes can share a batch of 8" in output
    assert "rows of val" not in output and 'also MODEL = "outputs/best.pt"' in output
    assert before == [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]


def test_a_foreign_or_older_last_pt_is_refused_in_one_line_and_left_alone(output_path):
    ic.save_run(make_state())
    older = conftest.weights(last := output_path / "last.pt")
    del older["views"]
    contents = [b"", b"not a checkpoint", last.read_bytes()[:-100]]
    for number, held in enumerate((tiny_model().state_dict(), older, [1, 2], older | {"lock": 1})):
        torch.save(held, path := output_path / f"{number}.pt")
        contents.append(path.read_bytes())
    for content in contents:
        last.write_bytes(content)
        with pytest.raises(SystemExit, match="of another training: it cannot be read") as stop:
            ic.resume(make_state(fingerprint={"LR": 1e-3}))
        assert "\n" not in stop.value.code and last.read_bytes() == content


@pytest.mark.parametrize(
    "first, then, scale, chosen, free, chunk",
    [(0, 1, 64.0, None, 8, 4), (1, 0, 1.0, None, 2, 2), (1, 1, 32.0, 8, 8, 8)],
)
def test_a_run_goes_on_in_another_precision_and_in_the_same_chunks_unless_told(
    output_path, monkeypatch, first, then, scale, chosen, free, chunk
):
    """Only float16 has a GradScaler that saves a state; other chunks change the last bits."""
    ic.save_run(make_state(chunk=4, scaler=torch.amp.GradScaler("cpu", 32.0, enabled=first)))
    goes_on = make_state(chunk=free, scaler=torch.amp.GradScaler("cpu", 64.0, enabled=then))
    monkeypatch.setattr(ic, "CHUNK_SIZE", chosen)
    ic.resume(goes_on)
    assert (goes_on.scaler.get_scale(), goes_on.chunk) == (scale, chunk)


def test_broken_weights_are_not_saved(output_path):
    """A weight that breaks just before the run is told to stop leaves the file as it was."""
    ic.save_run(state := make_state(signals=[TERM], epoch=2, step=3))
    before = (output_path / "last.pt").read_bytes()
    state.model.visual.proj.data[0, 0] = float("inf")
    with pytest.raises(SystemExit, match="not finite at step 3 of epoch 2, in float32: lower LR"):
        ic.stop_if_signalled(state)
    assert (output_path / "last.pt").read_bytes() == before


# ---- What cannot be written ----
def test_a_full_disk_leaves_the_old_file_a_message_and_no_debris(tmp_path, untouched, monkeypatch):
    real, full = open, ""

    def opened(path, *how, **more):
        if not fnmatch(str(path), f"*/{full}.*.tmp"):
            return real(path, *how, **more)
        Path(path).touch()
        return real("/dev/full", "wb", buffering=0)  # refuses each write

    monkeypatch.setattr("builtins.open", opened)
    for full in ("64-*.u8", "metrics.jsonl", "best.pt", "last.pt", "curves.png"):
        *_, line = run_script(tmp_path, code=1, **untouched[1]).splitlines()
        assert fnmatch(line, f"cannot write */{full}: *; what it held is untouched"), line
        assert "No space left on device" in line and not list(tmp_path.rglob("*.tmp"))
        assert all(conftest.weights(path) for path in (tmp_path / "outputs").glob("*.pt")), full
    full = ""
    run_script(tmp_path, **untouched[1])
    assert_as_untouched(tmp_path, untouched)


def test_a_held_file_is_replaced_and_what_killed_runs_left_is_removed(tmp_path, monkeypatch):
    """Windows' scanners hold a new file. What runs that go on or other machines write stays."""
    answers = [PermissionError(13, "Access is denied")] * 3 + [DEFAULT]
    monkeypatch.setattr(os, "replace", Mock(wraps=os.replace, side_effect=answers))
    monkeypatch.setattr(os, "fsync", on_disk := Mock())
    monkeypatch.setattr(ic.time, "sleep", lambda seconds: None)
    host, dead, alive = socket.gethostname(), 2**22 + 1, os.getppid()
    kept = [f"[a].pt.{host}.{alive}.tmp", f"[a].pt.x{host}.{dead}.tmp", f"a.pt.{host}.{dead}.tmp"]
    for name in (*kept, f"[a].pt.{host}.{dead}.tmp", f"[a].pt.{host}.{dead + 1}.tmp"):
        (tmp_path / name).touch()
    with ic.atomic_write(tmp_path / "[a].pt") as file:
        assert file.name == f"{tmp_path}/[a].pt.{host}.{os.getpid()}.tmp"
        file.write(b"new")
    assert on_disk.called and (tmp_path / "[a].pt").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "[a].pt"])

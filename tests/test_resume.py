"""Runs that are killed, told to stop, or meet a full disk: started again, they end as if nothing
had been."""

import errno
import os
import resource
import shutil
import signal
import socket
from fnmatch import fnmatch
from itertools import count

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
LOADING = [("ic.load_clip", 1), ("ic.read_weights", 1), ("torch.load", 1), ("ic.decode", 3)]
LOADING += [("torch.save", 2), ("ic.resume", 1)]


def strike(folder, moments, constants):
    """→ (the exit codes of the processes that were struck at these moments, all output)."""
    output = run_driver(folder, STRUCK.format(moments=moments), constants)
    assert "Traceback" not in output
    return [int(line.split()[1]) for line in output.splitlines() if "ENDED" in line], output


def test_a_run_killed_again_and_again_ends_as_if_nothing_had_been(tmp_path, untouched):
    places = [*LOADING, ("ic.evaluate", 1), ("torch.save", 1), ("ic.save_best", 2)]
    places += [("torch.save", 2), ("ic.train_step", 5), ("ic.evaluate", 1), ("ic.log", 1)]
    places += [("ic.write_lines", 2), ("os.replace", 3), ("ic.encode_texts", 1)]
    places += [("ic.save_best", 2)] * 5  # whichever epoch is the best
    places += [("ic.draw_curves", 1), ("os.replace", 4), ("ic.evaluate", 1), ("ic.save_run", 1)]
    codes, output = strike(tmp_path, [(*place, KILL) for place in places], untouched[1])
    assert codes == [-KILL] * len(places)
    assert "epoch 1, of which 3 steps are done" in output  # saved after ten minutes
    assert "epoch 1, of which 5 steps are done" in output  # and before the evaluation
    assert_as_untouched(tmp_path, untouched)


def test_a_run_told_to_stop_again_and_again_ends_as_if_nothing_had_been(tmp_path, untouched):
    """While loading at once; then saved, after the next step; at a second signal at once again."""
    loading = [(*place, (TERM, INT)[i % 2]) for i, place in enumerate(LOADING)]
    places = [("ic.evaluate", 1, TERM), ("ic.train_step", 1, INT), ("torch.save", 1, TERM)]
    places += [("ic.encode_texts", 3, INT), ("os.replace", 3, TERM), ("ic.log", 1, INT)]
    places += [("ic.save_best", 2, TERM)]
    twice = [("ic.train_step", 2, INT, INT), ("ic.train_step", 2, TERM, TERM)]
    last = [("ic.draw_confusion", 1, INT)]  # no step comes after it
    stops = places[:1] + twice + places[1:]
    codes, output = strike(tmp_path, loading + stops + last, untouched[1])
    expected = [-number for *_, number in loading]
    expected += [128 + stop[2] if len(stop) == 3 else -stop[2] for stop in stops]
    assert codes == expected + [0]
    saved = "Stopped and saved in outputs/last.pt: the same command goes on from there."
    assert output.count(saved) == len(places)
    for epoch, step in ((1, 1), (1, 2), (1, 5), (2, 1), (3, 1), (4, 1), (5, 1)):
        assert f"epoch {epoch}, of which {step} steps are done" in output
    assert_as_untouched(tmp_path, untouched)


def test_a_signal_to_one_of_two_processes_ends_both_and_one_goes_on_alone(tmp_path, untouched):
    """Saved in a step; it goes on with other chunks and another cache."""
    lines = """
        import os, signal
        real, calls = ic.train_step, []
        def struck(*arguments):
            calls.append(1)
            if ic.RANK == 1 and len(calls) == 8:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*arguments)
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
    changed = untouched[1] | {"CHUNK_SIZE": 3, "CACHE_PATH": "elsewhere"}
    going_on = run_script(tmp_path, **changed)
    assert "Going on from outputs/last.pt: epoch 2, of which 3 steps are done" in going_on
    expected, found = (read_metrics(f, times=False) for f in (untouched[0], tmp_path))
    assert [line["epoch"] for line in found[:-1]] == [line["epoch"] for line in expected[:-1]]
    assert found[4]["loss"] == pytest.approx(expected[4]["loss"], rel=0.1)


# ---- What last.pt is of ----
def test_a_finished_run_is_left_alone_and_another_refused_by_name(tmp_path, untouched):
    outputs, constants = tmp_path / "outputs", untouched[1]
    shutil.copytree(untouched[0] / "outputs", outputs)
    before = [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]
    again = run_script(tmp_path, **constants)
    assert "This run is finished" in again and 'MODEL = "outputs/best.pt" and another' in again
    for split, first in {"train": 1, "val": 0, "test": 0}.items():
        rows = read_lines(untouched[0] / f"data/{split}_data.json")
        write_lines(tmp_path / f"{split}.json", rows[first:])
    paths = {"JSON_PATH": str(tmp_path / "{split}.json")}
    changes = paths | {"LR": 2e-3, "SEED": 4, "CLASS_WEIGHT": 0.5, "BATCH_SIZE": 1000}
    output = run_script(tmp_path, code=1, **constants | changes).splitlines()[-1]
    for words in ("LR was 0.001, is 0.002", "SEED was 0, is 4", "CLASS_WEIGHT was 1.0, is 0.5"):
        assert words in output
    assert "BATCH_SIZE in equal shares was 8, is 43" in output  # the rows that there are
    assert "the rows of train was" in output and "rows of val" not in output
    output = run_script(tmp_path, code=1, **constants | {"NUM_EPOCHS": 10})
    assert "NUM_EPOCHS was 5, is 10" in output and 'MODEL = "outputs/best.pt"' in output
    assert before == [(p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(outputs.glob("*.pt"))]


def test_the_numbers_of_processes_that_can_share_the_batch_are_said(output_path, monkeypatch):
    splits = {"train": toy_dataset("ab" * 10, ["red saree"] * 20)}
    monkeypatch.setattr(ic, "all_reduce", lambda tensor, *_: tensor)
    monkeypatch.setattr(ic, "BATCH_SIZE", 8)
    ic.save_run(ic.new_state(tiny_model(), splits))
    for processes in (1, 2, 8):
        monkeypatch.setattr(ic, "WORLD_SIZE", processes)
        ic.resume(ic.new_state(tiny_model(), splits))
    monkeypatch.setattr(ic, "WORLD_SIZE", 3)
    with pytest.raises(SystemExit, match="was 8, is 6; 1, 2, 4, 8 processes can share a batch"):
        ic.resume(ic.new_state(tiny_model(), splits))
    monkeypatch.setattr(ic, "WORLD_SIZE", 9)
    with pytest.raises(SystemExit, match="9 processes cannot share a batch of 8"):
        ic.new_state(tiny_model(), splits)


def test_a_foreign_or_older_last_pt_is_refused_in_one_line_and_left_alone(output_path):
    ic.save_run(make_state())
    last = output_path / "last.pt"
    older, unversioned = weights(last), "damaged, or not of this version of the script"
    del older["views"]
    contents = [b"", b"not a checkpoint", last.read_bytes()[:-100]]
    for number, held in enumerate((tiny_model().state_dict(), older, [1, 2], older | {"lock": 1})):
        torch.save(held, path := output_path / f"{number}.pt")
        contents.append(path.read_bytes())
    for content in contents:
        last.write_bytes(content)
        with pytest.raises(SystemExit, match=unversioned) as stop:
            ic.resume(make_state())
        assert "\n" not in stop.value.code and last.read_bytes() == content


@pytest.mark.parametrize("first, then, scale", [(0, 1, 64.0), (1, 0, 1.0), (1, 1, 32.0)])
def test_a_run_goes_on_in_another_precision(output_path, first, then, scale):
    """float16 has a GradScaler, whose state bfloat16 and float32 neither write nor read."""
    ic.save_run(make_state(scaler=torch.amp.GradScaler("cpu", 32.0, enabled=first)))
    goes_on = make_state(scaler=torch.amp.GradScaler("cpu", 64.0, enabled=then))
    ic.resume(goes_on)
    assert goes_on.scaler.get_scale() == scale


@pytest.mark.parametrize("chosen, free, chunk", [(None, 8, 4), (None, 2, 2), (8, 8, 8)])
def test_a_run_goes_on_in_the_same_chunks_unless_told(
    output_path, monkeypatch, chosen, free, chunk
):
    """More memory may be free by then, but other chunks would change the last bits."""
    monkeypatch.setattr(ic, "CHUNK_SIZE", chosen)
    ic.save_run(make_state(chunk=4))
    ic.resume(goes_on := make_state(chunk=free))
    assert goes_on.chunk == chunk


def test_the_file_of_the_first_weights_may_be_gone_by_the_end(tmp_path, dataset, monkeypatch):
    torch.save(tiny_model().state_dict(), start := tmp_path / "start.pt")
    patch_step(monkeypatch, 1, lambda optimizer: start.unlink())
    run_script(tmp_path, **quick(dataset, MODEL=str(start)))
    assert read_metrics(tmp_path)[-1]["split"] == "test" and not start.exists()


# ---- What goes wrong in a step ----
def patch_step(monkeypatch, number, act):
    """Have act(optimizer) happen after that step."""
    real, steps = torch.optim.Adam.step, count(1)

    def step(optimizer):
        real(optimizer)
        if next(steps) == number:
            act(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", step)


def out_of_memory(_optimizer):
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_processes_go_on_from_one_place_or_not_at_all(tmp_path, untouched, monkeypatch):
    """One of two does not see the last.pt of a run that ran out of memory."""
    for chunk, advice in {8: "set CHUNK_SIZE = 4", 1: "take another MODEL"}.items():
        patch_step(monkeypatch, 1, out_of_memory)
        output = run_script(tmp_path, code=1, **untouched[1] | {"CHUNK_SIZE": chunk})
        line = f"out of memory at {chunk} images at a time: {advice} and run it again"
        assert output.splitlines()[-1] == line
    lines = """
        real = ic.resume
        def resume(state):
            if ic.RANK == 1:
                ic.OUTPUT_PATH = "elsewhere"
            real(state)
        ic.resume = resume
        ic.main()
    """
    output = run_driver(tmp_path, lines, untouched[1], processes=2, code=1)
    assert "last.pt or the rows differ between processes: all have to see the same files" in output
    assert "    1 val " not in output


def test_broken_weights_are_not_saved(tmp_path, untouched, monkeypatch):
    """A weight that breaks just before the run is told to stop leaves the files as they were."""

    def break_weight(optimizer):
        optimizer.param_groups[0]["params"][0].data[0, 0] = float("inf")
        os.kill(os.getpid(), signal.SIGTERM)

    patch_step(monkeypatch, 8, break_weight)
    output = run_script(tmp_path, code=1, **untouched[1])
    assert "not finite by step 3 of epoch 2: lower LR" in output and "Stopped" not in output
    for name in ("best.pt", "last.pt"):
        state = weights(tmp_path / "outputs" / name)
        assert all(w.isfinite().all() for w in state.get("model", state).values())


# ---- What cannot be written ----
def test_a_full_disk_leaves_the_old_file_a_message_and_no_debris(tmp_path, untouched, monkeypatch):
    real, full = os.fsync, []

    def fsync(descriptor):
        """The disk is full at the n-th write of such a file."""
        name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        if full and fnmatch(name, f"{full[0]}.*.tmp"):
            full[1] -= 1
            if full[1] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    places = {"train-*.u8": 1, "train-*.u8.pt": 1, "skipped.jsonl": 1, "metrics.jsonl": 2}
    *_, line = run_script(tmp_path, code=1, **untouched[1] | {"CACHE_PATH": "/proc"}).splitlines()
    assert line.startswith("cannot write /proc/train-64-")  # nobody can
    places |= {"best.pt": 1, "last.pt": 3, "curves.png": 1, "retrieval.png": 1}
    for pattern, nth in places.items():
        full[:] = pattern, nth
        *_, line = run_script(tmp_path, code=1, **untouched[1]).splitlines()
        assert fnmatch(line, f"cannot write */{pattern}: *; what it held is untouched"), line
        assert "No space left on device" in line and not list(tmp_path.rglob("*.tmp"))
        assert all(weights(path) for path in (tmp_path / "outputs").glob("*.pt")), pattern
    full.clear()
    run_script(tmp_path, **untouched[1])
    assert_as_untouched(tmp_path, untouched)


def test_a_write_that_fails_inside_torch_save_leaves_the_old_file(tmp_path):
    """A file-size limit stands in for a small disk: torch's own writer meets the error."""
    torch.save(torch.ones(10), path := tmp_path / "last.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with (
            pytest.raises(SystemExit, match="cannot write.*File too"),
            ic.atomic_write(path) as file,
        ):
            torch.save(torch.ones(1_000_000), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(weights(path), torch.ones(10)) and os.listdir(tmp_path) == ["last.pt"]


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
    assert (tmp_path / "a.txt").read_bytes() == b"new" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_run_left_of_a_file_is_removed(tmp_path):
    """Not what runs that go on write, or those of another machine."""
    host, dead, alive = socket.gethostname(), 2**22 + 1, os.getppid()
    kept = [f"[a].pt.{host}.{alive}.tmp", f"[a].pt.x{host}.{dead}.tmp", f"a.pt.{host}.{dead}.tmp"]
    kept += [f"[a].pt.pt.{host}.{dead}.tmp", "[a].tmp"]
    for name in (*kept, f"[a].pt.{host}.{dead}.tmp", f"[a].pt.{host}.{dead + 1}.tmp"):
        (tmp_path / name).touch()
    with ic.atomic_write(tmp_path / "[a].pt") as file:
        file.write(b"whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "[a].pt"])


def test_two_processes_that_write_one_file_at_once_do_not_mix_their_bytes(tmp_path, monkeypatch):
    """Neither removes the other's temporary file: the last to end has written it."""
    monkeypatch.setattr(os, "getpid", iter([os.getpid(), os.getppid()]).__next__)
    with ic.atomic_write(path := tmp_path / "a.pt") as one:
        one.write(b"1" * 9)
        one.flush()
        with ic.atomic_write(path) as other:
            other.write(b"2" * 5)
        assert path.read_bytes() == b"2" * 5
        one.write(b"1" * 9)
    assert path.read_bytes() == b"1" * 18 and os.listdir(tmp_path) == ["a.pt"]

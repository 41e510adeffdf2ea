"""Runs that are killed, interrupted, or meet a full disk: started again, they end as if nothing had been."""

import random
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import edited_script, environment, make_dataset, quick, read_metrics, run_script, same_weights

RUNNER = """
    import os, random, signal, sys, torch
    torch.set_num_threads(1)
    import indofashion_clip as ic

    # (where, at which call, with which signal): each in a process of its own, which goes on from the last
    for where, call, number in {moments}:
        child = os.fork()
        if child == 0:
            module, name = (torch, "save") if where == "torch.save" else (os, where[3:]) if where[:3] == "os." else (ic, where)
            real, calls = getattr(module, name), []
            def struck(*arguments):
                calls.append(1)
                if len(calls) != call:
                    return real(*arguments)
                if where == "torch.save":  # half of the file is written
                    real(*arguments)
                    arguments[1].truncate(arguments[1].tell() // 2)
                    if number == signal.SIGTERM:
                        os.kill(os.getpid(), number)
                        return real(*arguments)
                os.kill(os.getpid(), number)
                return real(*arguments)
            setattr(module, name, struck)
            try:
                ic.main()
                code = 0
            except ic.Interrupted as interrupted:
                code = 128 + interrupted.args[0]
            sys.stdout.flush()
            os._exit(code)
        print(where, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    ic.main()
"""


def run_struck(folder, moments, **constants):
    edited_script(folder, **constants)
    (folder / "runner.py").write_text(textwrap.dedent(RUNNER).format(moments=moments))
    done = subprocess.run(
        [sys.executable, "runner.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [
        int(line.split()[1])
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in {where for where, _, _ in moments} and len(line.split()) == 2
    ]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """(folder of a run never killed, its dataset)."""
    folder = tmp_path_factory.mktemp("untouched")
    make_dataset(folder / "data", train=44, val=10, test=10)
    run_struck(folder, [], **constants(folder))
    return folder


def constants(folder):
    return quick(folder / "data", NUM_EPOCHS=4)


def assert_as_untouched(folder, untouched):
    assert read_metrics(folder, times=False) == read_metrics(untouched, times=False)
    assert same_weights(folder / "outputs/best.pt", untouched / "outputs/best.pt")
    assert sorted(p.name for p in (folder / "outputs").iterdir()) == sorted(
        p.name for p in (untouched / "outputs").iterdir()
    )


def test_kill_9_at_ten_random_moments(tmp_path, untouched):
    rng = random.Random(0)
    places = [
        "os.posix_fallocate",
        "train_step",
        "evaluate",
        "torch.save",
        "os.replace",
        "train_step",
        "write_lines",
        "evaluate",
        "torch.save",
        "train_step",
    ]
    moments = [
        (where, rng.randint(1, 4) if where == "train_step" else rng.randint(1, 2), signal.SIGKILL.value)
        for where in places
    ]
    _, codes = run_struck(tmp_path, moments, **constants(untouched))
    assert codes == [-9] * 10
    assert_as_untouched(tmp_path, untouched)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_at_once_or_after_the_step(tmp_path, untouched, number, code):
    moments = [
        ("train_step", 2, number.value),
        ("train_step", 3, number.value),
        ("evaluate", 1, number.value),
        ("log", 1, number.value),
        ("train_step", 1, number.value),
    ]
    output, codes = run_struck(tmp_path, moments, **constants(untouched))
    assert codes == [code] * 5
    assert output.count("the same command goes on from there") == 5
    assert_as_untouched(tmp_path, untouched)
    again = run_script(tmp_path, **constants(untouched))
    assert "finished" in again and "OUTPUT_PATH" in again


def interrupted_run(folder, untouched, **changes):
    """A run with a last.pt in the middle of its second epoch."""
    edited_script(folder, **constants(untouched) | changes)
    (folder / "stop.py").write_text(
        "import os, signal, indofashion_clip as ic\nreal, calls = ic.train_step, []\n"
        "def step(*a):\n    calls.append(1)\n    len(calls) == 8 and os.kill(os.getpid(), signal.SIGTERM)\n    return real(*a)\n"
        "ic.train_step = step\ntry:\n    ic.main()\nexcept ic.Interrupted:\n    pass\n"
    )
    subprocess.run(
        [sys.executable, "stop.py"], cwd=folder, check=True, env=environment(), capture_output=True
    )


def test_going_on_says_so_and_may_use_other_chunks_and_processes(tmp_path, untouched):
    interrupted_run(tmp_path, untouched)
    output = run_script(tmp_path, processes=2, **constants(untouched) | {"CHUNK_SIZE": 3})
    assert "Going on from outputs/last.pt: epoch 2, of which 2 steps" in output
    expected, found = read_metrics(untouched, times=False), read_metrics(tmp_path, times=False)
    assert [(line["epoch"], line["split"]) for line in found[:-1]] == [
        (line["epoch"], line["split"]) for line in expected[:-1]
    ]
    assert found[-2]["loss"] == pytest.approx(expected[-2]["loss"], rel=0.1)


def test_other_constants_are_refused_by_name(tmp_path, untouched):
    interrupted_run(tmp_path, untouched)
    before = (tmp_path / "outputs/last.pt").read_bytes()
    output = run_script(tmp_path, code=1, **constants(untouched) | {"LR": 2e-3, "BATCH_SIZE": 4})
    assert (
        "LR was 0.001, is 0.002" in output and "BATCH_SIZE was 8, is 4" in output and "OUTPUT_PATH" in output
    )
    assert (tmp_path / "outputs/last.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_foreign_last_pt_is_refused_and_left_alone(tmp_path, untouched, content):
    (tmp_path / "outputs").mkdir()
    if content is None:
        torch.save({"layer": torch.ones(3)}, tmp_path / "outputs/last.pt")
    else:
        (tmp_path / "outputs/last.pt").write_bytes(content)
    before = (tmp_path / "outputs/last.pt").read_bytes()
    output = run_script(tmp_path, code=1, **constants(untouched))
    assert "last.pt is no checkpoint" in output and "Traceback" not in output
    assert (tmp_path / "outputs/last.pt").read_bytes() == before


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, untouched):
    from filelock import FileLock

    (tmp_path / "outputs").mkdir()
    with FileLock(tmp_path / "outputs/.lock"):
        output = run_script(tmp_path, code=1, inside=False, **constants(untouched))
    assert "another run writes to outputs" in output and "Traceback" not in output


@pytest.mark.parametrize(
    "file, save",
    [
        ("best.pt", 1),
        ("last.pt", 1),
        ("last.pt", 3),
        ("metrics.jsonl", 2),
        ("skipped.jsonl", 1),
        ("train-64.u8", 1),
    ],
)
def test_a_full_disk_leaves_the_old_file_a_message_and_no_debris(tmp_path, untouched, file, save):
    """The n-th write of that file fails half way, as a full disk fails."""
    edited_script(tmp_path, **constants(untouched))
    (tmp_path / "full.py").write_text(
        textwrap.dedent(f"""
        import builtins, errno, io, os, indofashion_clip as ic
        opened = []
        real_sync = os.fsync
        def full(descriptor):
            path = os.readlink(f"/proc/self/fd/{{descriptor}}")
            if path.endswith("{file}.tmp"):
                opened.append(path)
                if len(opened) == {save}:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            return real_sync(descriptor)
        os.fsync = full
        ic.main()
    """)
    )
    done = subprocess.run(
        [sys.executable, "full.py"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{file}: No space left on device" in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    for path in (tmp_path / "outputs").glob("*.pt"):
        torch.load(path, weights_only=True)
    if (file, save) in (("last.pt", 3), ("train-64.u8", 1)):
        run_struck(tmp_path, [], **constants(untouched))
        assert_as_untouched(tmp_path, untouched)


def test_a_write_that_fails_inside_torch_save(tmp_path):
    """A file-size limit stands in for a small disk: torch's own writer meets the error."""
    script = textwrap.dedent("""
        import os, resource, signal, sys, torch, indofashion_clip as ic
        torch.save(torch.ones(10), "last.pt")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with ic.replacing("last.pt") as temporary:
            with open(temporary, "wb") as file:
                torch.save(torch.ones(1_000_000), file)
    """)
    edited_script(tmp_path)
    (tmp_path / "limit.py").write_text(script)
    done = subprocess.run(
        [sys.executable, "limit.py"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 1 and "cannot write last.pt" in done.stderr and "Traceback" not in done.stderr
    assert torch.equal(torch.load(tmp_path / "last.pt", weights_only=True), torch.ones(10))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".py" and p.is_file()) == ["last.pt"]


def test_a_worker_killed_while_the_cache_is_built_is_a_clear_error(tmp_path, untouched):
    edited_script(tmp_path, **constants(untouched))
    script = tmp_path / "indofashion_clip.py"
    source = script.read_text(encoding="utf-8")
    script.write_text(
        source.replace(
            "        if os.path.getsize(path) == 0:",
            "        os.kill(os.getpid(), 9)\n        if os.path.getsize(path) == 0:",
        ),
        encoding="utf-8",
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert (
        done.returncode == 1
        and "was killed" in done.stderr
        and "Traceback" not in done.stderr.split("Exception ignored")[0]
    )
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_killed_decoding_worker_is_a_clear_error_after_saving(tmp_path, untouched):
    edited_script(tmp_path, **constants(untouched) | {"CACHE_PATH": ""})
    (tmp_path / "kill.py").write_text(
        textwrap.dedent("""
        import os, signal, indofashion_clip as ic
        real = ic.FashionDataset.__getitem__
        def die(self, row):
            if self.split == "train" and row == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, row)
        ic.FashionDataset.__getitem__ = die
        try:
            ic.main()
        except RuntimeError as error:
            assert "DataLoader worker" in str(error)
            print("as expected")
    """)
    )
    done = subprocess.run(
        [sys.executable, "kill.py"], cwd=tmp_path, capture_output=True, text=True, env=environment()
    )
    assert "Stopped and saved" in done.stdout and "as expected" in done.stdout
    assert "Going on" in run_script(tmp_path, **constants(untouched) | {"CACHE_PATH": ""})

"""How many pairs are encoded at a time: as many as fit the memory that is free."""

import gc
import platform
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, run_driver, tiny_model, toy_dataset

import indofashion_clip as ic

GB = 10**9
UNLIMITED = {1: 2**63 - 4096, 2: "max"}  # as the kernel writes it
ROWS = toy_dataset("ab" * 20, ["red saree"] * 40)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def weights(model):
    """The bytes of its weights."""
    return sum(4 * parameter.numel() for parameter in model.parameters())


# ---- What is free ----
def write_groups(root, version, own, groups):
    """A container's files, as it sees them: `groups` are {folder: (limit, use, cache of it)}."""
    names = {1: ("limit_in_bytes", "usage_in_bytes"), 2: ("max", "current")}[version]
    mount = root / ("sys/fs/cgroup/memory" if version == 1 else "sys/fs/cgroup")
    (root / "proc/self").mkdir(parents=True)
    line = f"4:memory:/{own}\n1:cpu,cpuacct:/{own}\n0::/\n" if version == 1 else f"0::/{own}\n"
    (root / "proc/self/cgroup").write_text(line)
    for folder, (limit, used, cache) in groups.items():
        (mount / folder).mkdir(parents=True, exist_ok=True)
        for name, number in zip(names, (limit or UNLIMITED[version], used), strict=True):
            (mount / folder / f"memory.{name}").write_text(f"{number}\n")
        lines = f"anon {used}\ninactive_file {cache}\nactive_file 7\n"
        lines += f"total_inactive_file {cache}\ntotal_active_file 7\n" * (version == 1)
        (mount / folder / "memory.stat").write_text(lines)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "groups, expected",
    [
        ({}, 20),
        ({"job/task": (8, 3, 1)}, 6),  # cache is given up when memory is short
        ({"job/task": (8, 3, 0), "job": (5, 4, 1), "": (9, 4, 1)}, 2),  # the tightest of them
        ({"job/task": (None, 3, 0), "job": (5, 4, 0)}, 1),
        ({"job/task": (None, 3, 0)}, 20),
        ({"job/task": (100, 3, 0)}, 20),  # no more than the machine has
        ({"": (7, 2, 0)}, 5),  # a container, whose own folder is the mount's
    ],
)
def test_free_memory_is_within_the_limits_of_all_groups(
    tmp_path, monkeypatch, version, groups, expected
):
    groups = {k: [n and n * GB for n in numbers] for k, numbers in groups.items()}
    write_groups(tmp_path, version, "job/task", groups)
    memory = SimpleNamespace(available=20 * GB)
    monkeypatch.setattr(ic.psutil, "virtual_memory", lambda: memory)
    assert ic.free_memory(CPU, root=tmp_path) == expected * GB
    monkeypatch.setattr(ic, "LOCAL_WORLD_SIZE", 4)  # they share it
    assert ic.free_memory(CPU, root=tmp_path) == expected * GB / 4


def test_free_memory_where_there_are_no_groups(tmp_path, monkeypatch):
    memory = SimpleNamespace(available=20 * GB)
    monkeypatch.setattr(ic.psutil, "virtual_memory", lambda: memory)
    assert ic.free_memory(CPU, root=tmp_path) == 20 * GB
    assert 0 < ic.free_memory(CPU) <= 20 * GB  # of this machine


def test_free_memory_of_a_gpu_leaves_some_to_what_works_beside_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GB, 8 * GB))
    monkeypatch.setattr(ic, "LOCAL_WORLD_SIZE", 4)  # each has its own
    assert 5 * GB < ic.free_memory(torch.device("cuda")) < 6 * GB


# ---- What fits ----
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_pass_keeps_grows_evenly_with_its_pairs(model, precision):
    kept = {count: ic.bytes_kept(model, precision, ROWS, count) for count in (4, 8, 16, 32)}
    pair = (kept[8] - kept[4]) / 4
    assert pair > 0
    assert kept[16] - kept[8] == pytest.approx(8 * pair, rel=0.01)
    assert kept[32] - kept[16] == pytest.approx(16 * pair, rel=0.01)


def test_what_a_trial_pass_kept_is_let_go(model):
    """A graph that saved its own tensors would keep itself alive, unseen by gc."""

    def elements():
        return sum(
            item.numel() for item in gc.get_objects() if issubclass(type(item), torch.Tensor)
        )

    before = elements()
    ic.bytes_kept(model, torch.float32, ROWS, 8)
    assert elements() == before


def fit(monkeypatch, model, free, share, rows=ROWS):
    monkeypatch.setattr(ic, "free_memory", lambda device: free)
    return ic.fit_chunk(model, torch.float32, rows, share)


def test_the_chunk_fits_the_free_memory_and_is_even(monkeypatch, capsys, model, weights):
    kept = {count: ic.bytes_kept(model, torch.float32, ROWS, count) for count in (8, 16)}
    pair, share, sizes = (kept[16] - kept[8]) / 8, 4_000, (1.1, 1.3, 2, 3, 9999)
    chunks = [fit(monkeypatch, model, gigabytes * GB, share) for gigabytes in sizes]
    assert chunks == sorted(chunks) and chunks[-1] == share and 1 < chunks[0] < chunks[1] < share
    for chunk, gigabytes in zip(chunks, sizes, strict=True):
        free = gigabytes * GB - 3 * weights  # beside gradients and Adam's two moments
        free -= 20 * share**2  # and the loss's logits
        assert chunk * pair < free and (chunk == share or chunk * pair > (free - GB) / 3)
        assert chunk == -(-share // -(-share // chunk))  # no short chunk at the end
    assert capsys.readouterr().out == ""


def test_where_nothing_fits_it_is_one_pair_and_a_line(monkeypatch, capsys, model, weights):
    assert fit(monkeypatch, model, 0.2 * GB, share=8) == 1
    assert capsys.readouterr().out.startswith("MEMORY: 0.")
    assert fit(monkeypatch, model, 3 * weights + 2**29 + 2e4, share=8) == 1  # not even one fits
    assert capsys.readouterr().out.startswith("MEMORY: 0.0 GB more")
    assert fit(monkeypatch, model, 99 * GB, 1, toy_dataset("a", ["one pair"])) == 1
    assert capsys.readouterr().out == ""


def test_processes_that_exchange_gradients_get_a_smaller_chunk(monkeypatch, model):
    alone = fit(monkeypatch, model, 0.7 * GB, share=1_000)
    monkeypatch.setattr(ic, "WORLD_SIZE", 2)
    assert fit(monkeypatch, model, 0.7 * GB, share=500) < 0.9 * alone


def test_memory_is_read_before_the_trial_passes_which_keep_theirs(monkeypatch, model):
    order, real = [], ic.bytes_kept
    monkeypatch.setattr(ic, "free_memory", lambda device: order.append("free") or 99 * GB)
    monkeypatch.setattr(ic, "bytes_kept", lambda *how: order.append("kept") or real(*how))
    ic.fit_chunk(model, torch.float32, ROWS, 8)
    assert order == ["free", "kept", "kept"]


# ---- What was freed ----
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is what is set")
def test_freed_memory_is_kept(tmp_path):
    """Afterwards, tensors reuse memory that the process has: its pages do not fault."""
    lines = """
        import resource, torch
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for megabytes in (64, 40, 50) * 3:
                torch.ones(megabytes, 2**20, dtype=torch.uint8)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        returned = faults()
        ic.keep_freed_memory()
        faults()
        print(returned, faults())
    """
    returned, kept = map(int, run_driver(tmp_path, lines, {}).split()[-2:])
    assert kept < returned / 4

"""How many images are encoded at a time: as many as fit the memory that is free."""

import gc
import platform
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import CPU, run_driver, tiny_model, toy_dataset

import indofashion_clip as ic

GB = 10**9
ROWS = toy_dataset("ab" * 20, ["red saree"] * 40)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# ---- What is free ----
FILES = {  # as a container sees its own
    1: ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    2: ("memory.max", "memory.current", "memory.stat"),
}
UNLIMITED = {1: 2**63 - 4096, 2: "max"}  # as the kernel writes it


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "limit, used, cache, expected",
    [
        (8, 3, 0, 5),
        (8, 3, 1, 6),  # cache is given up when memory is short
        (100, 3, 0, 20),  # no more than the machine has
        (None, 3, 0, 20),
    ],
)
def test_free_memory_is_within_the_containers_limit(
    tmp_path, monkeypatch, version, limit, used, cache, expected
):
    memory = SimpleNamespace(available=20 * GB)
    monkeypatch.setattr(ic.psutil, "virtual_memory", lambda: memory)
    assert ic.free_memory(CPU, root=tmp_path) == 20 * GB  # no container
    stat = f"active_file 7\ninactive_file {cache * GB}\nanon 8\n"
    if version == 1:  # a group's own, then its subgroups' too
        stat = f"inactive_file 5\ntotal_active_file 7\ntotal_inactive_file {cache * GB}\n"
    limit = limit * GB if limit else UNLIMITED[version]
    for name, text in zip(FILES[version], (f"{limit}\n", f"{used * GB}\n", stat), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert ic.free_memory(CPU, root=tmp_path) == expected * GB
    monkeypatch.setattr(ic, "LOCAL_WORLD_SIZE", 4)  # they share it
    assert ic.free_memory(CPU, root=tmp_path) == expected * GB / 4


def test_free_memory_of_this_machine():
    assert 0 < ic.free_memory(CPU) <= ic.psutil.virtual_memory().total


def test_free_memory_of_a_gpu_leaves_some_to_what_works_beside_torch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 * GB, 8 * GB))
    monkeypatch.setattr(ic, "LOCAL_WORLD_SIZE", 4)  # each has its own
    assert 5 * GB < ic.free_memory(torch.device("cuda")) < 6 * GB


# ---- What fits ----
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_pass_keeps_grows_evenly_with_its_images(model, precision):
    kept = {count: ic.bytes_kept(model, precision, ROWS, count) for count in (4, 8, 16, 32)}
    image = (kept[8] - kept[4]) / 4
    assert image > 0
    assert kept[16] - kept[8] == pytest.approx(8 * image, rel=0.01)
    assert kept[32] - kept[16] == pytest.approx(16 * image, rel=0.01)


def test_what_a_pass_keeps_has_a_prompt_for_each_class(monkeypatch, model):
    monkeypatch.setattr(ic, "encode_images", lambda *how: None)
    many = toy_dataset([f"kind {i}" for i in range(40)], ["one two three four"] * 40)
    few = toy_dataset("ab" * 20, ["one two three four"] * 40)
    counts = (few, 8), (few, 16), (few, 32), (many, 32)  # the last has 30 prompts more
    kept = [ic.bytes_kept(model, torch.float32, *how) for how in counts]
    assert kept[3] - kept[2] == pytest.approx(30 / 8 * (kept[1] - kept[0]), rel=0.5)


def test_what_a_trial_pass_kept_is_let_go(model):
    """A graph that saved its own tensors would keep itself alive, unseen by gc."""

    def elements():
        return sum(
            item.numel() for item in gc.get_objects() if issubclass(type(item), torch.Tensor)
        )

    before = elements()
    ic.bytes_kept(model, torch.float32, ROWS, 8)
    assert elements() == before


@pytest.mark.parametrize("classes", [0, 1_000, 50_000])
@pytest.mark.parametrize("precision, processes", [("float32", 1), ("float32", 2), ("bfloat16", 1)])
def test_the_chunk_is_the_largest_even_one_that_fits(
    monkeypatch, model, precision, processes, classes
):
    """Beside the weights' gradients, moments and copies, and the logits of pairs and classes."""
    image, share, reserve = 10**6, 4_000, 2**29
    rows = MagicMock(prompts=torch.zeros(classes, 3), **{"__len__.return_value": 9_999})
    monkeypatch.setattr(ic, "WORLD_SIZE", processes)
    monkeypatch.setattr(ic, "bytes_kept", lambda *how: 7 * GB + how[-1] * image)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    batch = share * processes
    rest = (3 + 0.5 * (precision == "bfloat16") + (processes > 1)) * weights + reserve
    rest += 20 * batch * (batch + min(batch, classes))
    for free in (2.5 * rest, 3 * rest, rest + 0.01 * GB, rest + 9 * GB):
        monkeypatch.setattr(ic, "free_memory", lambda device, free=free: free)
        chunk = ic.fit_chunk(model, getattr(torch, precision), rows, share)
        chunks = -(-share // chunk)
        assert chunk == -(-share // chunks)  # no short chunk at the end
        assert rest + 1.5 * chunk * image <= free
        larger = -(-share // max(1, chunks - 1))
        assert chunk == share or rest + 1.5 * larger * image > free
    monkeypatch.setattr(ic, "free_memory", lambda device: rest - GB)
    assert ic.fit_chunk(model, getattr(torch, precision), rows, share) == 1  # at the least


def test_memory_is_read_before_the_trial_passes_which_keep_theirs(monkeypatch, model):
    order, real = [], ic.bytes_kept
    monkeypatch.setattr(ic, "free_memory", lambda device: order.append("free") or 99 * GB)
    monkeypatch.setattr(ic, "bytes_kept", lambda *how: order.append("kept") or real(*how))
    assert ic.fit_chunk(model, torch.float32, ROWS, 8) == 8
    assert ic.fit_chunk(model, torch.float32, toy_dataset("a", ["one pair"]), 1) == 1
    assert order == ["free", "kept", "kept"] * 2


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

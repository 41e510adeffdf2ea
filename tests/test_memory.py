"""How many images are encoded at a time: as many as fit the memory that is free."""

import math
from unittest.mock import MagicMock, Mock

import pytest
import torch
from conftest import CPU, tiny_model, toy_dataset

import indofashion_clip as ic

GB = 10**9


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# ---- What is free ----
FILES = {1: "memory/memory.limit_in_bytes memory/memory.usage_in_bytes memory/memory.stat"}
FILES[2] = "memory.max memory.current memory.stat"  # as a container sees its own
UNLIMITED = {1: 2**63 - 4096, 2: "max"}  # as the kernel writes it


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limit, cache, expected", [(8, 0, 5), (8, 1, 6), (100, 0, 20), (0, 0, 20)])
def test_free_memory_is_a_containers(tmp_path, monkeypatch, version, limit, cache, expected):
    """Without what a cache holds; a limit above the machine's, or none, changes nothing."""
    monkeypatch.setattr(ic.psutil, "virtual_memory", lambda: Mock(available=20 * GB))
    assert ic.free_memory(CPU, root=tmp_path) == 20 * GB  # no container
    stat = f"active_file 7\ninactive_file {cache * GB}\nanon 8\n"
    if version == 1:  # a group's own, then its subgroups' too
        stat = f"inactive_file 5\ntotal_active_file 7\ntotal_inactive_file {cache * GB}\n"
    limit = limit * GB if limit else UNLIMITED[version]
    texts = f"{limit}\n", f"{3 * GB}\n", stat
    for name, text in zip(FILES[version].split(), texts, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(ic, "LOCAL_WORLD_SIZE", 4)  # they share it
    assert ic.free_memory(CPU, root=tmp_path) == expected * GB / 4


# ---- What fits ----
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_a_pass_keeps_grows_evenly_with_its_images_and_prompts(monkeypatch, model, precision):
    titles = ["a photo of a red cotton saree"] * 40
    few, many = toy_dataset("ab" * 20, titles), toy_dataset([*map(str, range(40))], titles)
    kept = [ic.bytes_kept(model, precision, few, count) for count in (4, 8, 16)]
    assert 0 < kept[2] - kept[1] == pytest.approx(2 * (kept[1] - kept[0]), rel=0.01)
    monkeypatch.setattr(ic, "encode_images", lambda *how: None)
    kept = [ic.bytes_kept(model, precision, *how) for how in ((few, 16), (few, 32), (many, 32))]
    assert kept[2] - kept[1] == pytest.approx(30 / 16 * (kept[1] - kept[0]), rel=0.2)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("processes, classes", [(1, 0), (2, 1_000), (1, 50_000)])
def test_the_chunk_is_the_largest_that_fits(monkeypatch, model, precision, processes, classes):
    """Beside the weights' gradients, moments and copies, and the logits of pairs and classes."""
    image, share, reserve, memory = 10**6, 4_000, 2**29, Mock()
    rows = MagicMock(prompts=torch.zeros(classes, 3), **{"__len__.return_value": 9_999})
    memory.kept.side_effect = lambda *how: 7 * GB + how[-1] * image
    monkeypatch.setattr(ic, "WORLD_SIZE", processes)
    monkeypatch.setattr(ic, "free_memory", memory.free)
    monkeypatch.setattr(ic, "bytes_kept", memory.kept)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    batch = share * processes
    rest = (4 + 0.5 * (precision == "bfloat16") + (processes > 1)) * weights + reserve
    rest += 20 * batch * (batch + min(batch, classes))
    graph = 15_000 * len(list(model.parameters())) * share  # of one image at a time
    for free in (2.5 * rest, 3 * rest, rest + 0.2 * GB, rest + 9 * GB):
        memory.free.return_value = free
        chunk = ic.fit_chunk(model, getattr(torch, precision), rows, share)
        chunks = -(-share // chunk)
        assert chunk == -(-share // chunks)  # no short chunk at the end
        assert rest + 1.5 * chunk * image + graph / chunk <= free
        larger = -(-share // max(1, chunks - 1))
        assert chunk == share or rest + 1.5 * larger * image + graph / larger > free
    memory.free.return_value = rest - GB  # nothing fits: the chunk that needs the least
    least = ic.fit_chunk(model, getattr(torch, precision), rows, share)
    assert least == pytest.approx(math.sqrt(graph / (1.5 * image)), abs=1)
    order = [name for name, *_ in memory.mock_calls]  # torch reuses the memory of trial passes
    assert order == ["free", "kept", "kept"] * 5

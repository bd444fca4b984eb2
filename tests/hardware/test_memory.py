"""Free memory as the kernel, a container's limit or a GPU's allocator tell it."""

import pytest
import torch

from slicegpt.hardware import memory
from slicegpt.hardware.memory import free_memory, memory_limits

CPU = torch.device("cpu")


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Stand-ins for /proc/meminfo and the container's files: 8 GiB available, no limit."""
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text(
        f"MemTotal: {16 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {8 << 20} kB\n"
    )
    return tmp_path


def limit(folder, most: str, used: int, reclaimable: int) -> None:
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {reclaimable}\n")


def test_what_the_kernel_calls_available(files):
    assert free_memory(CPU) == 8 << 30
    limit(files, "max", 1 << 30, 0)
    assert free_memory(CPU) == 8 << 30


def test_a_containers_limit_counts_without_its_page_cache(files):
    limit(files, str(4 << 30), 3 << 30, 1 << 30)
    assert free_memory(CPU) == 2 << 30
    limit(files, str(64 << 30), 3 << 30, 0)
    assert free_memory(CPU) == 8 << 30


def test_a_kernel_that_does_not_say_what_is_available(files):
    (files / "meminfo").unlink()
    assert 0 < free_memory(CPU) < 1 << 50  # free pages of this machine


def test_memory_that_the_allocator_keeps_unused_is_free(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(gpu) == 1300


def test_a_limit_counts_what_the_process_has(files, monkeypatch):
    """Of 6 GiB it has taken two; within an inner limit, one of 1 GiB, it has taken too much already."""
    monkeypatch.setattr(memory, "_STATUS", files / "status")
    (files / "status").write_text(f"Name:\tpython 3\nVmPeak:\t{9 << 20} kB\nVmRSS:\t{2 << 20} kB\n")
    with memory_limits(host=6 << 30):
        assert free_memory(CPU) == 4 << 30
        with memory_limits(host=1 << 30):
            assert free_memory(CPU) == 0
        assert free_memory(CPU) == 4 << 30
    with memory_limits(device=1, host=1 << 50):
        assert free_memory(CPU) == 8 << 30  # no more than there is
    assert free_memory(CPU) == 8 << 30


def test_a_limit_of_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    with memory_limits(device=3000, host=1):
        assert free_memory(gpu) == 2800

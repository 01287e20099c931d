"""Threads read the files of many checkpoints at once, also where only few files may be open."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversion.io.open_files import KEPT_OPEN
from conversion.io.row_reader import CheckpointReader
from conversion.io.weight_files import read_header

THREADS = 8


@pytest.fixture
def make_shards(tmp_path):
    """Factory: `make_shards(number) -> {tensor name: tensor}, {tensor name: its place}`, one of 40 rows a shard."""

    def make(number):
        generator = torch.Generator().manual_seed(0)
        tensors = {f"{shard}.weight": torch.randn(40, 6, generator=generator) for shard in range(number)}
        stored = {}
        for name, tensor in tensors.items():
            file = tmp_path / f"{name}.safetensors"
            save_file({name: tensor}, file)
            stored |= read_header(file)
        return tensors, stored

    return make


@pytest.fixture
def num_open(tmp_path):
    """`num_open()`: how many descriptors of shards the process has."""

    def count():
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        # The folder's own descriptor was closed since.
        return sum(os.path.lexists(link) and link.readlink().is_relative_to(tmp_path) for link in links)

    return count


@pytest.fixture(params=["at a place", "from a position"])
def way(request, monkeypatch):
    """As the platform reads, and as one reads that cannot read at a place."""
    if request.param == "from a position":
        monkeypatch.delattr(os, "preadv", raising=False)


def test_threads_read_what_one_reads(make_shards, way):
    """Every thread reads all shards row by row, in an order of its own."""
    tensors, stored = make_shards(3)
    reader = CheckpointReader("e", stored)
    together = threading.Barrier(THREADS)

    def read(thread):
        order = torch.randperm(3 * 40, generator=torch.Generator().manual_seed(thread)).tolist()
        together.wait()
        rows = {place: reader.read_rows(f"{place // 40}.weight", place % 40, place % 40 + 1) for place in order}
        return torch.cat([rows[place] for place in sorted(rows)])

    with ThreadPoolExecutor(THREADS) as pool:
        for rows in pool.map(read, range(THREADS)):
            assert torch.equal(rows, torch.cat([*tensors.values()]))
    reader.close()


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="files have one position here")
def test_threads_read_one_file_at_once(make_shards, monkeypatch):
    """None waits for another: each is reading while all others are."""
    tensors, stored = make_shards(1)
    reader, preadv, together = CheckpointReader("e", stored), os.preadv, threading.Barrier(THREADS)

    def read_at(*args):
        together.wait(timeout=60)
        return preadv(*args)

    monkeypatch.setattr(os, "preadv", read_at)
    with ThreadPoolExecutor(THREADS) as pool:
        for rows in pool.map(reader.read, ["0.weight"] * THREADS):
            assert torch.equal(rows, tensors["0.weight"])
    reader.close()


def test_a_read_that_gives_less_than_asked_goes_on(make_shards, monkeypatch):
    tensors, stored = make_shards(1)
    reader = CheckpointReader("e", stored)
    if hasattr(os, "preadv"):
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, views, offset: preadv(file, [views[0][:7]], offset))
    assert torch.equal(reader.read("0.weight"), tensors["0.weight"])
    reader.close()


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_few_files_stay_open(make_shards, num_open, way):
    """Of 100 checkpoints that are read in turns; after `close` none, and a closed reader reads on."""
    tensors, stored = make_shards(100)
    readers = {name: CheckpointReader("e", {name: stored[name]}) for name in tensors}
    for start in (0, 20):
        for name, reader in readers.items():
            assert torch.equal(reader.read_rows(name, start, start + 20), tensors[name][start : start + 20])
            assert 0 < num_open() <= KEPT_OPEN
    for reader in readers.values():
        reader.close()
    assert num_open() == 0
    assert torch.equal(readers["0.weight"].read("0.weight"), tensors["0.weight"])
    readers["0.weight"].close()
    assert num_open() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts /proc/self/fd")
def test_what_is_being_read_is_not_closed(make_shards, num_open, monkeypatch):
    """Neither by `close` nor for other files that are opened meanwhile."""
    tensors, stored = make_shards(KEPT_OPEN + 2)
    reader, others = CheckpointReader("e", stored), CheckpointReader("other", stored)
    preadv = os.preadv

    def read_late(file, views, offset):
        monkeypatch.setattr(os, "preadv", preadv)
        for name in tensors:
            others.read(name)
        reader.close()
        return preadv(file, views, offset)

    monkeypatch.setattr(os, "preadv", read_late)
    assert torch.equal(reader.read("0.weight"), tensors["0.weight"])
    others.close()
    assert num_open() == 0

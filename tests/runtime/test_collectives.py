"""Agreements between ranks, and the groups that they make."""

import os
import socket

import pytest
import torch
import torch.distributed as dist

from cmtmae_scale.errors import RendezvousError
from cmtmae_scale.runtime import collectives
from cmtmae_scale.runtime.collectives import process_group
from cmtmae_scale.runtime.groups import make_grid
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark.collectives import fake_group
from tests.processes import run_ranks
from tests.runtime.collectives_case import exchange_texts, meet_on_machines, work_for_long


@pytest.mark.gloo
def test_no_collective_waits_for_a_rank_that_works_for_long() -> None:
    for fails in (False, True):
        (first, meetings), (second, others) = run_ranks(2, work_for_long, fails)
        assert meetings == others >= 5
        if fails:
            assert (first, second) == ("rank 1: no images", "no images")
        else:
            assert (first, second) == ("done on 0", "done on 1")


@pytest.mark.gloo
def test_ranks_exchange_names_that_are_no_utf8() -> None:
    name = os.fsdecode(b"caf\xe9/\xc3\xa9.jpg")
    assert run_ranks(2, exchange_texts, name) == [(name, [f"{name}0", f"{name}1"])] * 2


@pytest.mark.gloo
def test_a_machine_that_others_cannot_reach_is_named_on_every_rank() -> None:
    assert run_ranks(2, meet_on_machines, "10.0.0.2") == ["", ""]
    first, second = run_ranks(2, meet_on_machines, "127.0.1.1")
    assert first == second
    assert "no other machine reaches it: node1 (127.0.1.1); export GLOO_SOCKET_IFNAME" in first


@pytest.mark.parametrize(("rows", "columns"), [(2048, 1), (256, 8)])
def test_a_rank_makes_its_own_groups_only(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[int]] = []
    new_group = dist.new_group

    def count(ranks: list[int], use_local_synchronization: bool) -> object:
        assert use_local_synchronization  # no barrier of all ranks
        made.append(ranks)
        return new_group(ranks, use_local_synchronization=True)

    monkeypatch.setattr(dist, "new_group", count)
    with fake_group(rows * columns):
        mesh = make_grid("cpu", rows, columns)
        assert (mesh["replicate"].size(), mesh["shard"].size()) == (rows, columns)
        assert (mesh.get_local_rank("replicate"), mesh.get_local_rank("shard")) == (0, 0)
    own = [list(range(0, rows * columns, columns)), list(range(columns))]
    assert made == [ranks for ranks in own if len(ranks) < rows * columns]


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("rank", "port_is_used", "text"),
    [
        (0, True, "rank 0 cannot listen at localhost:{}: the port is in use on this machine"),
        (
            0,
            False,
            "rank 0 of 2 could not join the other ranks at localhost:{}: .* 1/2 clients joined; "
            "check that",
        ),
        (
            1,
            False,
            "rank 1 of 2 could not join the other ranks at localhost:{}: .*; check that rank 0 ",
        ),
    ],
)
def test_ranks_that_do_not_meet_say_why(rank: int, port_is_used: bool, text: str) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        if port_is_used:
            taken.listen()
        else:
            taken.close()
        world = World(rank, 2, rank, 2, "srun", f"tcp://localhost:{port}")
        with (
            pytest.raises(RendezvousError, match=text.format(port)),
            process_group(world, torch.device("cpu"), timeout_s=1),
        ):
            pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("kind", "world_size", "is_closed"), [("cuda", 2, False), ("cuda", 1, True), ("cpu", 2, True)]
)
def test_a_rank_that_fails_does_not_wait_for_the_kernels_of_others(
    kind: str, world_size: int, is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: closed.append(True))
    monkeypatch.setattr(collectives, "require_reachable", lambda: None)
    world = World(0, world_size, 0, world_size, "srun", "tcp://localhost:29500")
    with pytest.raises(MemoryError), process_group(world, torch.device(kind)):
        raise MemoryError
    assert closed == [True] * is_closed
    with process_group(world, torch.device(kind)):
        closed.clear()
    assert closed == [True]

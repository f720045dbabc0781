import socket
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime import launch
from cmtmae_scale.runtime.launch import (
    Host,
    describe_host,
    find_address,
    find_unreachable,
    find_world,
    first_host,
    launch_remedy,
    require_interfaces,
    require_rendezvous,
    tasks_per_node,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
}
# As srun sets them for the last of five tasks on three nodes.
SRUN = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}
POD = {"JOB_COMPLETION_INDEX": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "train-0.train"}


def test_the_remedy_names_the_option_of_the_launcher() -> None:
    deepspeed = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    unknown = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for environment, remedy in (
        (TORCHRUN, "use --nproc-per-node=1"),
        (SRUN, "use --ntasks-per-node=1"),
        (deepspeed, "use --num_gpus=1"),
        (unknown, "launch 1 per node"),
    ):
        assert launch_remedy(find_world(environment).launcher, 1) == remedy


def test_nothing_set_is_one_process() -> None:
    assert find_world({})[:5] == (0, 1, 0, 1, "none")


def test_torchrun() -> None:
    assert find_world(TORCHRUN) == (3, 4, 1, 2, "torchrun", "env://")


def test_deepspeed_names_the_local_size_differently() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}
    assert find_world(given) == (0, 2, 0, 2, "deepspeed", "env://")


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
def test_an_incomplete_environment_is_named(absent: str) -> None:
    given = {key: value for key, value in TORCHRUN.items() if key != absent}
    with pytest.raises(ConfigError, match="launch with torchrun or unset RANK"):
        find_world(given)


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        find_world(TORCHRUN | {"LOCAL_RANK": "2"})


def test_srun() -> None:
    assert find_world(SRUN) == (4, 5, 0, 1, "srun", "tcp://gpu07:21236")


def test_a_given_rendezvous_is_used() -> None:
    given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert find_world(given).init_method == "tcp://10.0.0.1:29500"


def test_a_launcher_within_srun_comes_first() -> None:
    assert find_world(SRUN | TORCHRUN).launcher == "torchrun"


def test_a_batch_script_and_a_single_task_are_one_process() -> None:
    batch = {key: value for key, value in SRUN.items() if "STEP" not in key}
    assert find_world(batch).launcher == "none"
    assert find_world(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}).launcher == "none"


def test_an_incomplete_step_is_named() -> None:
    given = {key: value for key, value in SRUN.items() if key != "SLURM_STEP_NODELIST"}
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST"):
        find_world(given)


def test_short_forms_of_slurm() -> None:
    assert tasks_per_node("8(x3),1") == [8, 8, 8, 1]
    assert [first_host(text) for text in ("a1", "a1,b2", "gpu[007-012,020],big1", "n[1,3]")] == [
        "a1",
        "a1",
        "gpu007",
        "n1",
    ]


def test_names_of_nodes_with_several_ranges() -> None:
    assert [first_host(text) for text in ("r[1-2]n[03-04],b2", "gpu[7,9]-ib[0-1].x", "a-[2]")] == [
        "r1n03",
        "gpu7-ib0.x",
        "a-2",
    ]
    with pytest.raises(ConfigError, match="SLURM_STEP_NODELIST=''"):
        find_world(SRUN | {"SLURM_STEP_NODELIST": ""})


@pytest.mark.parametrize("count", ["", "nan", "0x2"])
def test_a_number_of_tasks_that_is_none_is_refused(count: str) -> None:
    with pytest.raises(ConfigError, match="SLURM's variables of this step are incomplete"):
        find_world(SRUN | {"SLURM_STEP_NUM_TASKS": count})


def test_an_address_at_which_ranks_cannot_meet_is_named() -> None:
    given = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    for environment in (TORCHRUN, SRUN, POD):
        require_rendezvous(find_world(environment | given), environment | given)
    refused = {
        "MASTER_ADDR is not set": (TORCHRUN, TORCHRUN | given | {"MASTER_ADDR": ""}),
        "MASTER_ADDR is not": (POD | {"MASTER_ADDR": ""},),
        "MASTER_PORT= is not a port": (TORCHRUN | {"MASTER_ADDR": "node1"},),
        "MASTER_PORT=nan is not a port": (TORCHRUN | given | {"MASTER_PORT": "nan"},),
        "MASTER_PORT=99999 is not a port": (SRUN | {"MASTER_PORT": "99999"},),
        "MASTER_PORT=0 is not a port": (POD | {"MASTER_PORT": "0"},),
    }
    for text, environments in refused.items():
        for environment in environments:
            with pytest.raises(ConfigError, match=text):
                require_rendezvous(find_world(environment), environment)


def test_an_interface_that_the_machine_lacks_is_named() -> None:
    here = [name for _, name in socket.if_nameindex()]
    require_interfaces({})
    for given in (",".join(here), f"{here[0]}:1"):
        require_interfaces({"GLOO_SOCKET_IFNAME": given})
    for given in ("eth99", f"{here[0]},eth99", f"{here[0]},"):
        with pytest.raises(ConfigError, match=f"GLOO_SOCKET_IFNAME={given}: this machine"):
            require_interfaces({"GLOO_SOCKET_IFNAME": given})


def test_a_pod_of_an_indexed_job() -> None:
    assert find_world(POD) == (2, 4, 0, 1, "kubernetes", "tcp://train-0.train:29500")
    assert find_world(POD | {"MASTER_PORT": "4000"}).init_method == "tcp://train-0.train:4000"


def test_torchrun_in_a_pod_comes_first() -> None:
    assert find_world(POD | TORCHRUN).launcher == "torchrun"


@pytest.mark.parametrize("absent", ["WORLD_SIZE", "MASTER_ADDR"])
def test_an_incomplete_pod_is_named(absent: str) -> None:
    given = {key: value for key, value in POD.items() if key != absent}
    with pytest.raises(ConfigError, match=f"JOB_COMPLETION_INDEX=2 is set, but '{absent}'"):
        find_world(given)


def test_pods_that_share_no_run_are_on_their_own() -> None:
    assert find_world({"JOB_COMPLETION_INDEX": "2"}).launcher == "none"


def test_a_pod_outside_its_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="contradict"):
        find_world(POD | {"WORLD_SIZE": "2"})


def test_machines_whose_name_is_a_loopback_address_are_named() -> None:
    a, b = Host("a", "kernel 1", "10.0.0.1"), Host("b", "kernel 2", "fe80::1%eth0")
    assert find_unreachable([a, a, b]) == ""
    alone = Host("c", "kernel 3", "127.0.1.1")
    assert find_unreachable([alone, alone._replace(name="d")]) == ""  # one machine of two names
    assert find_unreachable([a, alone._replace(address="")]) == ""  # an interface was named
    text = find_unreachable([a, alone, alone, b, Host("e", "kernel 4", "::1")])
    assert "no other machine reaches it: c (127.0.1.1), e (::1); export GLOO_SOCKET_IFNAME" in text
    many = [Host(f"n{i}", str(i), "127.0.1.1") for i in range(10)]
    assert "n7 (127.0.1.1) and 2 more; export" in find_unreachable(many)


def test_the_address_of_this_machine_is_that_which_gloo_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_address("localhost") in ("127.0.0.1", "::1")
    assert find_address("no-such-name.invalid") == "127.0.0.1"
    host = describe_host({})
    assert (host.name, host.address) == (socket.gethostname(), find_address(socket.gethostname()))
    assert describe_host({"GLOO_SOCKET_IFNAME": "lo"}) == host._replace(address="")
    monkeypatch.setattr(launch, "NETWORK_NAMESPACE", Path("/proc/self/ns/absent"))
    assert describe_host({}) == host._replace(network="")  # then machines cannot be distinguished


@pytest.mark.parametrize("address", ["fd09::1", "[fd09::1]"])
@pytest.mark.parametrize("environment", [SRUN, POD])
def test_an_address_of_ipv6_is_a_rendezvous(environment: dict[str, str], address: str) -> None:
    given = environment | {"MASTER_ADDR": address, "MASTER_PORT": "29511"}
    world = find_world(given)
    assert require_rendezvous(world, given) == "[fd09::1]:29511"
    parsed = urlsplit(world.init_method)
    assert (parsed.hostname, parsed.port) == ("fd09::1", 29511)

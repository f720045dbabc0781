"""Planted mistakes in manifests, Dockerfile and scripts are found by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("kubernetes_validate", reason="run by make lint-manifests")
pytest.importorskip("kubeflow_trainer_api", reason="run by make lint-manifests")

from tests.manifests.check import (
    ROOT,
    find_dockerfile_problems,
    find_manifest_problems,
    find_script_problems,
)

KUBERNETES = ROOT / "launchers/kubernetes"
NAMES = ["train_job", "train_trainjob", "train_follow_job", "cache_job"]
PLANTED = {
    "a misspelt field": ("backoffLimit:", "backofLimit:", "'backofLimit' was unexpected"),
    "a wrong type": (
        "terminationGracePeriodSeconds: ",
        "terminationGracePeriodSeconds: x",
        "terminationGracePeriodSeconds",
    ),
    "a privileged container": ("allowPrivilegeEscalation: false", "privileged: true", "privileged"),
    "root": ("runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
    "a root that can be written": (
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "readOnlyRootFilesystem",
    ),
    "an image without a tag": (":0.2.0", "", "neither tag nor digest"),
    "an exit code unknown": ("values: [75]", "values: [76]", "exit code 75 must be Ignore"),
    "a drained pod counted": ("type: DisruptionTarget", "type: PodReady", "DisruptionTarget"),
    "no end": ("activeDeadlineSeconds: 2592000", "", "no activeDeadlineSeconds"),
    "little shared memory": ("medium: Memory, ", "", "/dev/shm"),
    "a policy for others": (
        "policyTypes: [Ingress, Egress]",
        "policyTypes: [Ingress]",
        "NetworkPolicy",
    ),
}


def text_of(name: str) -> str:
    return (KUBERNETES / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_shipped_is_clean(name: str) -> None:
    assert list(find_manifest_problems(text_of(name))) == []


def test_every_manifest_is_known_here() -> None:
    assert {path.stem for path in KUBERNETES.iterdir()} == set(NAMES)


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(mistake: str) -> None:
    right, wrong, expected = PLANTED[mistake]
    for name in ("train_job", "train_trainjob"):  # a plain Job, and a Job within Kubeflow's kinds
        text = text_of(name)
        assert right in text
        found = list(find_manifest_problems(text.replace(right, wrong)))
        assert any(expected in problem for problem in found), found


def test_less_time_than_the_supervisor_takes_is_found() -> None:
    text = text_of("train_job").replace("GracePeriodSeconds: 300", "GracePeriodSeconds: 240")
    assert any("240 is not above the 240 s" in one for one in find_manifest_problems(text))


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        ("numNodes: 2", "numNodess: 2", "spec.trainer.numNodess: unknown"),
        ("numNodes: 2", "numNodes: two", "numNodes"),
        ("maxRestarts: 100", "maxRestart: 100", "maxRestart: unknown"),
    ],
)
def test_a_mistake_in_kubeflows_own_fields_is_found(right: str, wrong: str, expected: str) -> None:
    found = list(find_manifest_problems(text_of("train_trainjob").replace(right, wrong)))
    assert any(expected in one for one in found), found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text.replace("USER 10001:10001", "USER root"), "USER root"),
        (lambda text: text.replace("USER 10001:10001\n", ""), "USER root"),
        (lambda text: text.replace('ENTRYPOINT ["python", ', "ENTRYPOINT python "), "exec form"),
        (
            lambda text: text.replace(":2.13.0-cuda13.0-cudnn9-runtime", ""),
            "neither tag nor digest",
        ),
        (
            lambda text: text.replace("--requirement launchers/docker/requirements.txt", "timm"),
            "DL3013",
        ),
        (lambda text: text.replace("launchers/supervise.py", "launchers/pretrain.py"), "supervise"),
    ],
)
def test_a_mistake_in_the_dockerfile_is_found(change: Callable[[str], str], expected: str) -> None:
    text = (ROOT / "launchers/docker/Dockerfile").read_text()
    assert list(find_dockerfile_problems(text)) == []
    found = list(find_dockerfile_problems(change(text)))
    assert any(expected in one for one in found), found


def test_a_variable_without_quotes_is_found(tmp_path: Path) -> None:
    path = tmp_path / "train.sbatch"
    path.write_text(
        (ROOT / "launchers/slurm/cache.sbatch").read_text().replace('"$python"', "$python")
    )
    assert any("SC2086" in one for one in find_script_problems(path))

"""Planted mistakes in manifests, Dockerfile and scripts are found by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("kubernetes_validate", reason="run by make lint-manifests")
pytest.importorskip("kubeflow_trainer_api", reason="run by make lint-manifests")

from tests.manifests.check import ROOT, of_dockerfile, of_manifest, of_script

KUBERNETES = ROOT / "launchers/kubernetes"
NAMES = ["train_job", "train_trainjob", "train_follow_job", "cache_job"]
PLANTED = {
    "a misspelt field": ("backoffLimit:", "backofLimit:", "'backofLimit' was unexpected"),
    "a misspelt field of a pod": (
        "enableServiceLinks:",
        "enableServiceLink:",
        "'enableServiceLink'",
    ),
    "a wrong type": (
        "terminationGracePeriodSeconds: ",
        "terminationGracePeriodSeconds: x",
        "terminationGracePeriodSeconds",
    ),
    "a privileged container": ("allowPrivilegeEscalation: false", "privileged: true", "privileged"),
    "root": ("runAsNonRoot: true", "runAsNonRoot: false", "runAsNonRoot"),
    "no seccomp profile": ("type: RuntimeDefault", "type: Unconfined", "seccompProfile"),
    "a root that can be written": (
        "readOnlyRootFilesystem: true",
        "readOnlyRootFilesystem: false",
        "readOnlyRootFilesystem",
    ),
    "capabilities": ("drop: [ALL]", "drop: [CHOWN]", "capabilities"),
    "a token": (
        "automountServiceAccountToken: false",
        "automountServiceAccountToken: true",
        "Token",
    ),
    "an image without a tag": (":0.1.0", "", "neither tag nor digest"),
    "the newest image": (":0.1.0", ":latest", "neither tag nor digest"),
    "an exit code unknown": ("values: [75]", "values: [76]", "exit code 75 must be Ignore"),
    "a hopeless run tried again": ("[70, 78]", "[78]", "exit code 70 must be FailJob"),
    "a drained pod counted": ("type: DisruptionTarget", "type: PodReady", "DisruptionTarget"),
    "little shared memory": ("medium: Memory, ", "", "/dev/shm"),
    "nowhere to write": ("mountPath: /tmp", "mountPath: /var", "/tmp is no emptyDir"),
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
    assert list(of_manifest(text_of(name))) == []


def test_every_manifest_is_known_here() -> None:
    assert {path.stem for path in KUBERNETES.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_found(name: str, mistake: str) -> None:
    right, wrong, told = PLANTED[mistake]
    text = text_of(name)
    assert right in text
    found = list(of_manifest(text.replace(right, wrong)))
    assert any(told in one for one in found), found


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cache_job"])
def test_less_time_than_the_supervisor_takes_is_found(name: str) -> None:
    text = text_of(name).replace("GracePeriodSeconds: 300", "GracePeriodSeconds: 240")
    assert any("240 is not above the 240 s" in one for one in of_manifest(text))


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("numNodes: 2", "numNodess: 2", "spec.trainer.numNodess: unknown"),
        ("numNodes: 2", "numNodes: two", "numNodes"),
        ("maxRestarts: 100", "maxRestart: 100", "maxRestart: unknown"),
    ],
)
def test_a_mistake_in_kubeflows_own_fields_is_found(right: str, wrong: str, told: str) -> None:
    found = list(of_manifest(text_of("train_trainjob").replace(right, wrong)))
    assert any(told in one for one in found), found


@pytest.mark.parametrize(
    ("change", "told"),
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
def test_a_mistake_in_the_dockerfile_is_found(change: Callable[[str], str], told: str) -> None:
    text = (ROOT / "launchers/docker/Dockerfile").read_text()
    assert list(of_dockerfile(text)) == []
    found = list(of_dockerfile(change(text)))
    assert any(told in one for one in found), found


def test_a_variable_without_quotes_is_found(tmp_path: Path) -> None:
    path = tmp_path / "train.sbatch"
    path.write_text(
        (ROOT / "launchers/slurm/cache.sbatch").read_text().replace('"$python"', "$python")
    )
    assert any("SC2086" in one for one in of_script(path))

"""Check manifests, Dockerfile and scripts without a cluster; run by ``make lint-manifests``.

Kubernetes' kinds are validated strictly against the published schemas of the oldest and the newest
supported version, Kubeflow's kinds against its models, then both against the project's own rules.
hadolint checks the Dockerfile, shellcheck the scripts.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from kubeflow_trainer_api import models

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.29", "1.37")
"""Oldest and newest supported version of Kubernetes."""
KUBEFLOW = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
EXIT_CODES = {70: "FailJob", 75: "Ignore", 78: "FailJob"}

Node = dict[str, Any]


def main() -> int:
    """Print every problem; returns 1 if there are any."""
    manifests = sorted((ROOT / "launchers/kubernetes").glob("*.yaml"))
    scripts = [*sorted((ROOT / "launchers/slurm").glob("*.s*")), ROOT / ".ci/run"]
    dockerfile = ROOT / "launchers/docker/Dockerfile"
    found = [
        *(
            f"{path.name}: {one}"
            for path in manifests
            for one in find_manifest_problems(path.read_text())
        ),
        *(f"{dockerfile.name}: {one}" for one in find_dockerfile_problems(dockerfile.read_text())),
        *(one for path in scripts for one in find_script_problems(path)),
    ]
    checked = f"{len(manifests)} manifests, a Dockerfile and {len(scripts)} scripts"
    print("\n".join([*found, f"{checked}: {len(found)} problems"]))
    return int(bool(found))


def find_manifest_problems(text: str) -> Iterator[str]:
    """Yield the problems of a file's documents."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        where = f"{document['kind']} {document['metadata']['name']}"
        unfit = list(validate_schemas(document))
        yield from (f"{where}: {one}" for one in unfit)
        for job in () if unfit else jobs_of(document):  # the rules rely on the schemas
            pod = job["template"]["spec"]
            yield from (
                f"{where}: {one}" for one in (*find_job_problems(job), *find_pod_problems(pod))
            )
            labels = job["template"]["metadata"]["labels"]
            if not any(guards(policy, labels) for policy in documents):
                yield f"{where}: no NetworkPolicy of this file is for its pods"


def validate_schemas(document: Node) -> Iterator[str]:
    """Yield what violates the published schemas."""
    model = KUBEFLOW.get(document["kind"])
    if model is not None:
        try:
            back = model.from_dict(document).to_dict()
        except ValueError as error:
            yield str(error)
            return
        yield from (f"{key}: unknown" for key in list_unknown_keys(document, back))
        # Kubeflow's models of pods drop unknown keys silently.
        for job in jobs_of(document):
            whole = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "x"},
                "spec": job,
            }
            yield from validate_schemas(whole)
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            path = ".".join(map(str, error.path))
            yield f"Kubernetes {version}: {path}: {error.message.splitlines()[0][:300]}"


def list_unknown_keys(given: Any, back: Any, path: str = "") -> Iterator[str]:
    """Yield keys that a model dropped."""
    if isinstance(given, dict) and isinstance(back, dict):
        for key, value in given.items():
            if key in back:
                yield from list_unknown_keys(value, back[key], f"{path}.{key}".lstrip("."))
            else:
                yield f"{path}.{key}".lstrip(".")
    elif isinstance(given, list) and isinstance(back, list):
        for number, (one, other) in enumerate(zip(given, back, strict=True)):
            yield from list_unknown_keys(one, other, f"{path}[{number}]")


def jobs_of(document: Node) -> Iterator[Node]:
    """Yield the specs of the jobs that a document creates."""
    if document["kind"] == "Job":
        yield document["spec"]
    elif document["kind"] == "TrainingRuntime":
        for one in document["spec"]["template"]["spec"]["replicatedJobs"]:
            yield one["template"]["spec"]


def guards(policy: Node, labels: Node) -> bool:
    """Return whether a document is a network policy for pods with such labels, both ways."""
    if policy["kind"] != "NetworkPolicy":
        return False
    chosen = policy["spec"]["podSelector"].get("matchLabels", {})
    both = set(policy["spec"].get("policyTypes", ())) == {"Ingress", "Egress"}
    return both and chosen.items() <= labels.items()


def find_job_problems(job: Node) -> Iterator[str]:
    """Yield violations of the rules for ended pods."""
    pod = job["template"]["spec"]
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy is not Never, which podFailurePolicy needs"
    rules = job.get("podFailurePolicy", {}).get("rules", [])
    names = {one["name"] for one in pod["containers"]}
    for code, action in EXIT_CODES.items():
        actions = {
            rule["action"]
            for rule in rules
            if code in rule.get("onExitCodes", {}).get("values", ())
            and rule["onExitCodes"].get("containerName") in names
        }
        if actions != {action}:
            yield f"podFailurePolicy: exit code {code} must be {action}"
    drained = [
        rule["action"]
        for rule in rules
        if any(one.get("type") == "DisruptionTarget" for one in rule.get("onPodConditions", ()))
    ]
    if drained != ["Ignore"]:
        yield "podFailurePolicy: DisruptionTarget must be Ignore"
    if "activeDeadlineSeconds" not in job:
        yield "no activeDeadlineSeconds: exit codes that are ignored would be tried again for ever"


def find_pod_problems(pod: Node) -> Iterator[str]:
    """Yield violations of the rules for a pod: rights, grace period, volumes."""
    security = pod.get("securityContext", {})
    if not security.get("runAsNonRoot") or security.get("runAsUser", 0) < 10000:
        yield "securityContext: runAsNonRoot with a runAsUser of 10000 or more is missing"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "securityContext: seccompProfile RuntimeDefault is missing"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false"
    yield from (f"{key} is set" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.get(key))
    volumes = {one["name"]: one for one in pod.get("volumes", ())}
    yield from (f"volume {name}: hostPath" for name, one in volumes.items() if "hostPath" in one)
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        for problem in (
            *find_container_problems(container),
            *find_mount_problems(container, volumes),
        ):
            yield f"container {container['name']}: {problem}"
        grace_s = grace_seconds(container.get("command", ()))
        allowed_s = pod.get("terminationGracePeriodSeconds", 30)
        if allowed_s <= grace_s:
            yield (
                f"terminationGracePeriodSeconds {allowed_s} is not above the {grace_s:g} s that "
                f"container {container['name']} needs"
            )


def grace_seconds(command: list[str]) -> float:
    """Return the seconds that a command needs to stop; 30 without the supervisor."""
    if "launchers/supervise.py" not in command:
        return 30.0
    given = [part.partition("=")[2] for part in command if part.startswith("--grace=")]
    return float(given[0]) if given else 120.0


def find_container_problems(container: Node) -> Iterator[str]:
    """Yield violations of the rules for rights, image and command."""
    security = container.get("securityContext", {})
    if security.get("privileged"):
        yield "privileged"
    if security.get("allowPrivilegeEscalation") is not False:
        yield "securityContext: allowPrivilegeEscalation is not false"
    if not security.get("readOnlyRootFilesystem"):
        yield "securityContext: readOnlyRootFilesystem is missing"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "securityContext: capabilities are not all dropped"
    if not pinned(container["image"]):
        yield f"image {container['image']} has neither tag nor digest"
    command = container.get("command", [])
    if not command or Path(command[0]).name in {"sh", "bash"}:
        yield "command: a shell or nothing is process 1, and signals are lost"


def find_mount_problems(container: Node, volumes: dict[str, Node]) -> Iterator[str]:
    """Yield missing volumes: a read-only root needs /tmp, and /dev/shm defaults to 64 MB."""
    mounted = {one["mountPath"]: volumes.get(one["name"]) for one in container["volumeMounts"]}
    yield from (f"{path}: no such volume" for path, volume in mounted.items() if volume is None)
    shared = (mounted.get("/dev/shm") or {}).get("emptyDir", {})
    if shared.get("medium") != "Memory" or "sizeLimit" not in shared:
        yield "/dev/shm is no emptyDir in memory with a sizeLimit"
    if "emptyDir" not in (mounted.get("/tmp") or {}):
        yield "/tmp is no emptyDir"


def pinned(image: str) -> bool:
    """Return whether an image has a digest, or a tag that is not ``latest``."""
    name, _, tag = image.rpartition(":")
    return "@sha256:" in image or (bool(name) and "/" not in tag and tag != "latest")


def find_dockerfile_problems(text: str) -> Iterator[str]:
    """Yield hadolint's findings, then violations of the project's own rules."""
    answer = run_tool("hadolint", "--format=json", "-", text=text)
    for one in json.loads(answer or "[]"):
        yield f"line {one['line']}: {one['code']} {one['message']}"
    lines = re.sub(r"\\\n", " ", text).splitlines()
    last = {line.split()[0]: line for line in lines if line[:1].isupper()}
    if not pinned(last["FROM"].split()[1]):
        yield f"{last['FROM']}: neither tag nor digest"
    user = last.get("USER", "USER root").split()[1].partition(":")[0]
    if not user.isdigit() or int(user) < 10000:
        yield f"USER {user}: must be a number of 10000 or more, or runAsNonRoot cannot be checked"
    entry = last.get("ENTRYPOINT", "")
    if not entry.removeprefix("ENTRYPOINT").strip().startswith("["):
        yield "ENTRYPOINT is not in its exec form: a shell would be process 1"
    if "launchers/supervise.py" not in entry:
        yield "ENTRYPOINT is not launchers/supervise.py"


def find_script_problems(path: Path) -> Iterator[str]:
    """Yield shellcheck's findings."""
    yield from run_tool("shellcheck", "--external-sources", "--format=gcc", str(path)).splitlines()


def run_tool(name: str, *arguments: str, text: str = "") -> str:
    """Return the output of a program beside this Python."""
    program = Path(sys.executable).parent / name
    result = subprocess.run(
        [str(program), *arguments], input=text, capture_output=True, text=True, cwd=ROOT
    )
    if result.returncode > 1 or result.stderr:
        raise RuntimeError(f"{name}: {result.stderr or result.returncode}")
    return result.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

"""A trace of some steps, with the stages of the step in it."""

import gzip
import json
from pathlib import Path

import torch

from cmtmae_scale.engine.profile import StepProfile, span

CPU = torch.device("cpu")


def take(profile: StepProfile, *steps: int) -> None:
    for step in steps:
        profile.begin(step)
        with span(f"step {step}"), span("micro"):
            torch.ones(4, 4) @ torch.ones(4, 4)
        if profile.is_tracing:
            profile.end(step)


def spans(file: Path) -> set[str]:
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {event["name"] for event in events if event.get("cat") == "user_annotation"}


def test_the_named_steps_are_traced_once(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, [2, 3], CPU)
    take(profile, 1)
    assert not (tmp_path / "profile").exists()
    take(profile, 2, 3, 4, 2)  # after a roll-back a step comes again
    profile.close()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-00000002-00000003.json.gz"
    assert {"step 2", "step 3", "micro"} <= spans(file)
    assert not {"step 1", "step 4"} & spans(file)


def test_a_launch_that_ends_within_the_range_writes_what_it_traced(tmp_path: Path) -> None:
    profile = StepProfile(tmp_path, [2, 9], CPU)
    take(profile, 4, 5)
    profile.begin(6)
    profile.close()
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-00000004-00000005.json.gz"


def test_a_store_that_refuses_the_trace_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("no folder")
    profile = StepProfile(tmp_path, [1, 1], CPU)
    take(profile, 1)
    profile.close()
    assert (tmp_path / "profile").read_text() == "no folder"

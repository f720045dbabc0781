"""Help, version, errors of a config and ``import cmtmae_scale`` load no heavy package."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cmtmae_scale.commands.main import COMMANDS, run_command
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE
from tests.tools.report.report_case import write_figure, write_run, write_tuning

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    *("torch", "torchvision", "timm", "numpy", "PIL", "nvidia", "deepspeed", "open_clip"),
    *("transformers", "matplotlib", "sklearn", "scipy", "tensorboard"),
)
RUN = "from cmtmae_scale.commands.main import run_command; code = run_command(arguments)"
MODULE = (
    "import runpy; sys.argv[1:] = arguments; "
    "runpy.run_module('cmtmae_scale', run_name='__main__', alter_sys=True)"
)
WRONG = "mask.rato=0.5"
# Commands that read a recipe, with the rest of a line that has a wrong key.
RECIPES = {
    "pretrain": ["--config", "configs/demo.yaml", WRONG],
    "precompute": ["--config", "demo", WRONG],
    "finetune": ["--config", "configs/finetune_base.yaml", "--checkpoint", "runs/x", WRONG],
    "plan": ["--config", "demo", "--gpus", "8", WRONG],
    "study": ["STUDY"],
    "benchmark": ["train", "--config", "configs/demo.yaml", WRONG],
    "demo": [WRONG],
}


def outcome(code: str, *arguments: str) -> tuple[int, list[str], str]:
    """Exit code of a fresh process, the heavy packages that it loaded, and its output."""
    text = f"""
import json, sys
arguments, code = sys.argv[1:], 0
sys.argv[1:] = []
try:
    {code}
except SystemExit as left:
    code = left.code
loaded = [name for name in {HEAVY} if name in sys.modules]
print(json.dumps([code, loaded]), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", text, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *said, last = done.stderr.splitlines()
    exit_code, loaded = json.loads(last)
    return exit_code, loaded, done.stdout + "\n".join(said)


def test_the_package_is_light_and_has_a_python_interface() -> None:
    assert outcome("import cmtmae_scale; dir(cmtmae_scale); cmtmae_scale.load_config") == (
        0,
        [],
        "",
    )
    code, loaded, _ = outcome("import cmtmae_scale; cmtmae_scale.select_patches")
    assert code == 0 and "torch" in loaded


def test_every_name_of_the_python_interface_exists() -> None:
    import cmtmae_scale

    assert all(callable(getattr(cmtmae_scale, name)) for name in cmtmae_scale.API)
    with pytest.raises(AttributeError, match="has no attribute 'absent'"):
        _ = cmtmae_scale.absent


@pytest.mark.parametrize("arguments", [["--help"], [], ["--version"]], ids=str)
def test_the_overview_is_light(arguments: list[str]) -> None:
    code, loaded, text = outcome(RUN, *arguments)
    assert (code, loaded) == (EXIT_DONE, [])
    expected = (
        ["cmtmae 0."] if arguments == ["--version"] else [f"\n  {name} " for name in COMMANDS]
    )
    assert all(one in text for one in expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_is_light(name: str) -> None:
    code, loaded, text = outcome(RUN, name, "--help")
    assert (code, loaded) == (EXIT_DONE, [])
    assert "usage:" in text


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_key_is_answered_before_anything_heavy_is_loaded(name: str, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text("mask.rato: 0.5\n")
    line = [str(study) if word == "STUDY" else word for word in RECIPES[name]]
    code, loaded, text = outcome(RUN, name, *line)
    assert (code, loaded) == (EXIT_CONFIG, []), text
    assert "rato is not a key of" in text or "mask is not a key of" in text, text


def test_a_report_is_made_without_heavy_packages(tmp_path: Path) -> None:
    for name in ("run", "sibling"):
        write_run(tmp_path / name)
        write_figure(tmp_path / name, 20)
    code, loaded, text = outcome(RUN, "report", str(tmp_path / "run"))
    assert (code, loaded) == (EXIT_DONE, []), text
    assert (tmp_path / "run" / "report.html").exists()
    for name in ("tuned", "tuned-sibling"):
        write_tuning(tmp_path / name)
    code, loaded, text = outcome(RUN, "report", str(tmp_path / "tuned"), str(tmp_path / "run"))
    assert (code, loaded) == (EXIT_DONE, []), text


def test_an_unknown_command_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["pretain"]) == EXIT_CONFIG
    expected = "cmtmae: pretain is not a command; did you mean pretrain?\n"
    assert capsys.readouterr().err == expected
    assert run_command(["xyzzy"]) == EXIT_CONFIG
    assert "the commands are pretrain, precompute" in capsys.readouterr().err


def test_a_command_may_be_written_with_an_underscore() -> None:
    with pytest.raises(SystemExit) as left:
        run_command(["check_data", "--help"])
    assert left.value.code == EXIT_DONE


def test_launchers_may_run_the_module() -> None:
    """As ``torchrun -m``, and as ``deepspeed --module``, which adds a first argument."""
    code, loaded, text = outcome(MODULE, "--local_rank=3", "pretrain", "--help")
    assert (code, loaded) == (EXIT_DONE, []) and text.startswith("usage: cmtmae pretrain ")


def test_every_launcher_calls_the_command_of_its_name() -> None:
    launchers = {path.stem: path.read_text() for path in (ROOT / "launchers").glob("*.py")}
    names = {"precompute_teacher": "precompute", "check_data": "check-data"}
    assert {"pretrain", "precompute_teacher", "finetune", "evaluate", "supervise"} <= set(launchers)
    for stem, text in launchers.items():
        command = COMMANDS[names.get(stem, stem)]
        line = f"from cmtmae_scale.commands.{command.module} import {command.function}\n"
        assert line in text and f"SystemExit({command.function}())" in text, stem


@pytest.mark.slow
def test_the_measurement_runs() -> None:
    code, loaded, text = outcome(RUN, "benchmark", "startup", "--rounds", "1")
    assert (code, loaded) == (EXIT_DONE, [])
    *light, heavy = (float(line.split()[-1]) for line in text.splitlines()[1:])
    assert len(light) == 4 and max(light) < 95 < heavy  # MiB

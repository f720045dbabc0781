"""A recipe of ``cmtmae init`` loads and would start, whatever the folder; no file is replaced."""

import errno
import os
import shlex
from pathlib import Path

import pytest
import timm
from PIL import Image

from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.commands import dry_run, init
from cmtmae_scale.commands.init import init_recipe
from cmtmae_scale.commands.pretrain import launch_pretraining, parse_options
from cmtmae_scale.config.batch import find_length_problem, total_steps
from cmtmae_scale.config.load import config_from_dict, load_config
from cmtmae_scale.config.needs import needs
from cmtmae_scale.config.schema import Config
from cmtmae_scale.config.yaml_text import parse_yaml
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_DONE
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.teachers.open_clip import find_cached_tag
from cmtmae_scale.teachers.weights import read_weights
from cmtmae_scale.tools.init import recipe
from cmtmae_scale.tools.init.recipe import DEMO_TEACHER, Machine, choose_batch, choose_epochs
from cmtmae_scale.tools.init.survey import Survey
from tests.dataloading.tar_case import write_tar


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and hub cache; FLOPs are not counted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dry_run, "count_networks", lambda *_: [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def draw(folder: str, count: int, size: tuple[int, int], labels: int = 0, ending: str = "jpg"):
    for number in range(count):
        place = Path(folder, f"class{number % labels}" if labels else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (number, 99, 7)).save(place / f"{number:03d}.{ending}")


def dry(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Exit code of the recipe's dry run, and what it warns of."""
    code = launch_pretraining(parse_options(["--config", name, "--dry-run"]))
    return code, [line for line in capsys.readouterr().out.splitlines() if "warning" in line]


def test_the_rules_give_the_sizes_of_shipped_recipes() -> None:
    for name, side in (("vit_base", 400), ("tiny_imagenet", 64)):
        shipped = load_config(name)
        images = shipped.data.expected_images
        assert images is not None
        survey = Survey("photos", None, images, side, 1.3, 0, ())
        text = recipe.write_text(survey, Machine(8, True, "openai"), name, Path("own.yaml"))
        made = config_from_dict(parse_yaml(text), "own.yaml")
        assert (made.student.arch, made.decoder) == (shipped.student.arch, shipped.decoder)
        assert made.optimizer.base_lr == shipped.optimizer.base_lr
        assert made.train.global_batch_size == shipped.train.global_batch_size
        assert (made.train.epochs == shipped.train.epochs) == (name == "vit_base")


def test_the_steps_beside_the_epochs_are_those_of_the_run() -> None:
    for images in (3, 4097, 2_000_001, 9_999_999):
        survey = Survey("photos", None, images, 400, 1.3, 0, ())
        text = recipe.write_text(survey, Machine(8, True, None), "own", Path("own.yaml"))
        made = config_from_dict(parse_yaml(text), "own.yaml")
        assert f"  epochs: {made.train.epochs:.0f}  # {total_steps(made, images)} steps\n" in text


def test_class_folders(capsys: pytest.CaptureFixture[str]) -> None:
    draw("photos", 60, (300, 240), labels=3)
    assert init_recipe(["photos/"]) == EXIT_DONE
    assert capsys.readouterr().out.startswith("photos.yaml: a recipe for 60 images; next:\n")
    config = load_config("photos.yaml")
    assert (config.data.path, config.run.output_dir) == ("photos/", "runs/photos")
    assert (config.student.arch, config.views.image_size) == ("vit_small_patch16_224", 224)
    assert (config.train.global_batch_size, config.train.epochs) == (8, 800)
    assert config.teacher.mode == "none" and not needs(config).teacher
    text = Path("photos.yaml").read_text()
    assert "(3 labels)" in text and "--train photos/ --split 0.8" in text
    assert "60 images are few: start from public weights" in text
    assert dry("photos.yaml", capsys) == (EXIT_DONE, [])


def test_the_next_command_can_be_typed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    draw("photos", 3, (64, 64))
    assert init_recipe(["photos", "-o", "my recipe.yaml"]) == EXIT_DONE
    command = shlex.split(capsys.readouterr().out.splitlines()[1])
    assert command == ["cmtmae", "pretrain", "--config", "my recipe.yaml", "--dry-run"]


def test_a_recipe_is_never_replaced(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw("photos", 1, (64, 64))
    Path("photos.yaml").symlink_to("absent")
    assert init_recipe(["photos"]) == EXIT_CONFIG
    assert "photos.yaml exists; delete it or give -o OTHER.yaml" in capsys.readouterr().err
    assert init_recipe(["photos", "-o", "absent/own.yaml"]) == EXIT_CONFIG
    assert "absent/own.yaml cannot be written" in capsys.readouterr().err
    assert init_recipe(["photos", "-o", "own.yaml"]) == EXIT_DONE
    assert sorted(path.name for path in here.iterdir()) == ["own.yaml", "photos", "photos.yaml"]


def test_three_images_are_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    draw("photos", 3, (300, 240))
    assert init_recipe(["photos"]) == EXIT_DONE
    capsys.readouterr()
    code, (warning,) = dry("photos.yaml", capsys)
    assert code == EXIT_DONE and "an epoch of 3 images has 3 batches" in warning
    assert "3 images are too few" in Path("photos.yaml").read_text()


def test_small_images_and_panoramas(capsys: pytest.CaptureFixture[str]) -> None:
    draw("tiny", 40, (32, 32), labels=4, ending="png")
    draw("panoramas", 16, (1500, 200))
    for name, image_size, patch in (("tiny", 64, 8), ("panoramas", 224, 16)):
        assert init_recipe([name]) == EXIT_DONE
        config = load_config(f"{name}.yaml")
        assert (config.views.image_size, config.student.patch_size) == (image_size, patch)
        capsys.readouterr()
        assert dry(f"{name}.yaml", capsys) == (EXIT_DONE, [])
    assert "cut them into pieces" in Path("panoramas.yaml").read_text()
    assert "cut them into pieces" not in Path("tiny.yaml").read_text()


def test_tars_and_their_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    draw("loose", 20, (40, 30))
    Path("shards").mkdir()
    images = sorted(Path("loose").iterdir())
    for number in range(2):
        write_tar(
            Path(f"shards/train-{number}.tar"),
            [(path.name, path.read_bytes()) for path in images[number::2]],
        )
    assert init_recipe(["shards/train-*.tar"]) == EXIT_DONE
    assert load_config("shards.yaml").data.path == "shards/train-*.tar"
    capsys.readouterr()
    assert dry("shards.yaml", capsys) == (EXIT_DONE, [])


def test_a_test_set_beside_the_training_set_is_evaluated(capsys) -> None:
    draw("set/train", 30, (300, 240), labels=2)
    draw("set/val", 10, (300, 240), labels=2)
    assert init_recipe(["set"]) == EXIT_DONE
    config = load_config("set.yaml")
    assert config.data.path == config.eval.train_path == "set/train"
    assert config.eval.test_path == "set/val" and config.eval.every == 600
    capsys.readouterr()
    assert dry("set.yaml", capsys) == (EXIT_DONE, [])
    draw("set/val", 3, (300, 240), labels=3)
    assert init_recipe(["set", "-o", "other.yaml"]) == EXIT_DONE
    assert load_config("other.yaml").eval.test_path is None
    told = capsys.readouterr().err
    assert "set/val is not evaluated: the label class2 is not among the 2 of set/train" in told
    for file in Path("set/val").rglob("*.jpg"):
        file.write_bytes(b"no image")
    assert init_recipe(["set", "-o", "third.yaml"]) == EXIT_DONE
    assert "set/val is not evaluated: " in capsys.readouterr().err


def test_what_cannot_be_used_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    draw("photos", 5, (80, 60))
    Path("photos/empty.jpg").write_bytes(b"")
    cut = Path("photos/000.jpg")
    cut.write_bytes(cut.read_bytes()[:-100])
    assert init_recipe(["photos"]) == EXIT_DONE
    assert "2 images are excluded (first: empty.jpg, empty file)" in Path("photos.yaml").read_text()
    Path("none").mkdir()
    Path("none/a.heic").write_bytes(b"x")
    capsys.readouterr()
    assert init_recipe(["none"]) == EXIT_CONFIG
    assert "1 file passed over: 1 .heic" in capsys.readouterr().err
    Path("none/b.jpg").write_bytes(cut.read_bytes())
    assert init_recipe(["none"]) == EXIT_CONFIG
    assert "none of 1 images can be decoded (b.jpg:" in capsys.readouterr().err
    assert not Path("none.yaml").exists()


def test_a_folder_that_may_not_be_listed_is_refused_by_name(monkeypatch, capsys) -> None:
    Path("locked").mkdir()

    def scan(path: Path | str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(os, "listdir", scan)
    assert init_recipe(["locked"]) == EXIT_CONFIG
    assert "locked: cannot be listed (Permission denied)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("my photos: #1 \"a\" 'b'", EXIT_DONE),
        ("f\u00e4cher \U0001f600", EXIT_DONE),
        ("2024", EXIT_DONE),
        ("two\nlines", EXIT_DONE),
        ("${HOME}", EXIT_CONFIG),
        ("\udcff", EXIT_CONFIG),
    ],
)
def test_odd_names_of_folders(name: str, code: int) -> None:
    draw(name, 2, (40, 30))
    assert init_recipe([name, "-o", "recipe.yaml"]) == code
    if code == EXIT_DONE:
        assert load_config("recipe.yaml").data.path == name
    assert Path("recipe.yaml").exists() == (code == EXIT_DONE)


@pytest.mark.parametrize("name", ["\udcff.jpg", "a\u2028b: c.jpg", "a\x85b: c.jpg", "a\nb: c.jpg"])
def test_odd_names_of_images_that_cannot_be_used(name: str) -> None:
    draw("photos", 2, (40, 30))
    Path("photos", name).write_bytes(b"")
    assert init_recipe(["photos"]) == EXIT_DONE
    assert load_config("photos.yaml").data.path == "photos"
    assert "1 images are excluded (first: " in Path("photos.yaml").read_text()


def write(images: int, machine: Machine, **other: object) -> tuple[str, Config]:
    survey = Survey("photos", None, images, 300, 1.3, 0, ())._replace(**other)
    text = recipe.write_text(survey, machine, "photos", Path("photos.yaml"))
    return text, config_from_dict(parse_yaml(text), "photos.yaml")


def test_a_teacher_that_is_here_is_used(here: Path) -> None:
    assert init.find_machine().teacher is None
    Path(DEMO_TEACHER).parent.mkdir(parents=True)
    Path(DEMO_TEACHER).touch()
    assert init.find_machine().teacher == DEMO_TEACHER
    repository = here / "hub" / "models--timm--vit_base_patch16_clip_224.openai"
    file = repository / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert find_cached_tag("ViT-B-16-quickgelu", "openai") == str(file)
    machine = init.find_machine()
    assert machine.teacher == "openai"
    for one in (machine, machine._replace(teacher=DEMO_TEACHER, has_gpu=True)):
        _, config = write(3000, one)
        assert needs(config).teacher and needs(config).momentum and not needs(config).pixels
        assert config.backend.precision == ("bf16" if one.has_gpu else "fp32")


def test_two_lines_add_a_teacher() -> None:
    text, _ = write(3000, Machine(2, False, None))
    lines = text.splitlines()
    first = lines.index("teacher: {mode: none}")
    two = [
        line.removeprefix("# ") for line in lines if line.startswith(("# teacher:", "# decoder:"))
    ]
    assert len(two) == 2
    changed = "\n".join([*lines[:first], *two, *lines[first + 4 :]])
    config = config_from_dict(parse_yaml(changed), "photos.yaml")
    assert needs(config).teacher and needs(config).momentum and not needs(config).pixels
    assert config.teacher.model == "ViT-B-16-quickgelu" and config.decoder.type == "prompt"


def test_three_lines_take_the_decoder_and_the_feedback_away() -> None:
    text, config = write(3000, Machine(2, False, DEMO_TEACHER))
    keys = ("# decoder:", "# loss:", "# collaboration:")
    lines = [line for line in text.splitlines() if not line.startswith("decoder:")]
    changed = [line.removeprefix("# ") if line.startswith(keys) else line for line in lines]
    best = config_from_dict(parse_yaml("\n".join(changed)), "photos.yaml")
    shipped = load_config("vit_base_no_decoder")
    assert (best.decoder.type, best.loss) == (shipped.decoder.type, shipped.loss)
    assert best.collaboration == shipped.collaboration != config.collaboration
    assert needs(best).teacher and not needs(best).momentum and best.teacher == config.teacher


def test_the_line_that_fetches_public_weights_is_python() -> None:
    text, config = write(3000, Machine(2, True, None))
    (line,) = [line for line in text.splitlines() if "python -c" in line]
    code = shlex.split(line.partition("internet: ")[2])[2]
    assert timm.is_model_pretrained(code.split("'")[1])
    exec(code.replace("pretrained=True", "pretrained=False"), {})
    model = CollaborativeMAE(config)
    load_init_weights(model, read_weights("start.safetensors"), "start.safetensors")


def test_the_rules_are_those_of_the_shipped_recipes() -> None:
    assert [choose_batch(n) for n in (300, 30_000, 1_281_167)] == [16, 256, 4096]
    assert [choose_epochs(n) for n in (300, 1_281_167, 5_000_000)] == [800, 400, 102]
    _, base = write(1_281_167, Machine(8, True, "openai"))
    shipped = load_config("vit_base")
    for group in ("optimizer", "decoder", "mask", "teacher"):
        assert getattr(base, group) == getattr(shipped, group), group
    assert base.train.global_batch_size == shipped.train.global_batch_size
    assert base.train.epochs == shipped.train.epochs


def test_a_recipe_of_four_images_or_more_is_not_warned_about() -> None:
    for images in (4, 5, 8, 20, 63, 64, 100, 500, 1023, 1024, 50_000, 10**6, 10**8, 10**10):
        text, config = write(images, Machine(2, True, None))
        assert find_length_problem(config, images) is None, images
        assert ("init_weights: start" in text) == (images < 200_000)

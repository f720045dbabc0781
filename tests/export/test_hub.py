"""Uploads go to a loopback server that simulates the hub."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants, file_download, utils

from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.errors import ConfigError, UploadError
from cmtmae_scale.export import timm_folder
from cmtmae_scale.export.hub import Target, require_hub, upload, upload_command
from cmtmae_scale.export.origin import open_origin
from tests.engine.run_case import STEPS
from tests.export.hub_server import TOKEN, Hub, open_hub

pytestmark = [
    pytest.mark.gloo,
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub
]
REPO = "someone/photos"


# huggingface_hub 1.0 and before it; a session remembers that the hub is off-line
CLOSE_SESSIONS = getattr(utils, "close_session", None) or utils.reset_sessions


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with open_hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)  # what HF_ENDPOINT sets
        template = f"{server.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):  # a copy in huggingface_hub before 1.0
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        CLOSE_SESSIONS()
        yield server
        CLOSE_SESSIONS()


def test_a_verified_export_is_uploaded_and_loads_from_the_hub(
    run_dir: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["timm", "--checkpoint", str(run_dir), "--push-to-hub", REPO, "--private"]
    folder = run_dir / "export" / f"cmtmae-student-step-{STEPS:08d}-timm"

    with monkeypatch.context() as patch:  # not verified: nothing is sent
        write = timm_folder.write_encoder
        patch.setattr(timm_folder, "write_encoder", lambda a, b, _: write(a, b, "momentum"))
        assert export_weights(options) == 78
    assert not folder.parent.exists() and not hub.sent
    assert "computes something else from the exported weights" in capsys.readouterr().err

    # a failing upload keeps the folder and names how to continue: with the same command
    hub.faults["/commit/"] = 500
    assert export_weights(options) == 75
    lines = capsys.readouterr().err.splitlines()
    assert sum("ERROR" in line for line in lines) == 1
    assert "the hub failed (500: fault 500 of the test); try the same command again" in lines[-1]
    assert lines[-1].endswith(
        f"stays in {folder}; its upload alone: hf upload {REPO} {folder} . --private"
    )
    card = folder / "README.md"
    assert f'timm.create_model("hf-hub:{REPO}", pretrained=True)' in card.read_text()
    card.write_text(card.read_text() + "An edited card.\n")
    hub.faults.clear()
    assert export_weights(options) == 0
    out = capsys.readouterr()
    assert f"uploaded to {hub.endpoint}/{REPO} (private), commit cccccccccccc" in out.out
    assert hub.private == {REPO: True}
    assert hub.files[REPO] == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert b"An edited card." in hub.files[REPO]["README.md"]
    assert TOKEN not in out.out + out.err + card.read_text()
    puts = [line for line in hub.sent if line.startswith("PUT")]
    assert len(puts) == 1  # the weights were uploaded when the commit failed

    model: Any = timm.create_model(f"hf-hub:{REPO}", pretrained=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = open_origin(run_dir, "student").encoder()(images)
        found = model.eval().forward_features(images)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    # an output that is another export is neither replaced nor uploaded
    sent = len(hub.sent)
    assert export_weights([*options, "--weights", "momentum", "--output", str(folder)]) == 78
    assert "exists and is another export: model.safetensors is absent" in capsys.readouterr().err
    assert export_weights(options[:3]) == 78
    assert f"{folder} exists; delete it, or name another place" in capsys.readouterr().err
    assert len(hub.sent) == sent
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize(
    ("path", "status", "kind", "text"),
    [
        ("/api/repos/create", 403, ConfigError, f"the token may not write to {REPO} (403: fault"),
        ("/api/repos/create", 503, UploadError, "the hub failed (503: fault 503 of the test)"),
        ("/preupload/", 404, ConfigError, f"the hub does not know {REPO} (404: "),
        ("/commit/", 400, ConfigError, f"the hub refuses the upload to {REPO} (400: fault"),
        ("/commit/", 409, UploadError, "the hub failed (409: "),
        ("/lfs/", 403, ConfigError, f"the token may not write to {REPO} (403: "),
    ],
)
def test_every_refusal_is_one_line_with_a_remedy(
    path: str, status: int, kind: type[Exception], text: str, hub: Hub, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    hub.faults[path] = status
    with pytest.raises(kind) as error:
        upload(folder, Target(REPO, False))
    assert type(error.value) is kind and text in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(upload_command(folder, Target(REPO, False)))
    assert not hub.files.get(REPO)


def test_tokens_networks_and_visibility(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")
    target = Target(REPO, False)
    assert "(public), commit" in upload(tmp_path, target)
    with pytest.raises(ConfigError, match="exists and is public; make it private"):
        upload(tmp_path, Target(REPO, True))
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(ConfigError, match=r"does not accept the token \(401.*hf auth login"):
            upload(tmp_path, target)
        patch.delenv("HF_TOKEN")
        patch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "absent"))
        with pytest.raises(ConfigError, match="no token of the hub; log in with `hf auth login`"):
            require_hub(target)
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match="HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids it"):
            require_hub(target)
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        with pytest.raises(UploadError, match=r"cannot be reached .*; check the network and try"):
            upload(tmp_path, target)
    for repo in ("photos", "a/b/c", "someone/with space", "someone/..", ""):
        with pytest.raises(ConfigError, match=r"--push-to-hub=.* is not OWNER/NAME of the hub: "):
            require_hub(Target(repo, False))


def test_private_needs_a_repository(run_dir: Path) -> None:
    with pytest.raises(SystemExit) as error:
        export_weights(["timm", "--checkpoint", str(run_dir), "--private"])
    assert error.value.code == 78

"""`luthier export --push-to-hub`: a model that passed is uploaded, private, without reports that name folders of this
machine; one that failed never is, and never takes the place of another."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import luthier
from luthier import publish
from luthier.cli import app
from luthier.exporting import merge
from luthier.publish import PublishError
from luthier.recipe.load import load_recipe
from luthier.types import ExportError, RecipeError
from tests.e2e.test_publish import TOKEN, Hub, refusal
from tests.tiny import chat_model, write_alpaca


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    write_alpaca(folder / "rows.json", 16)
    recipe = {
        "model": {"path": str(chat_model(folder / "base"))},
        "data": {"train": ["rows.json"], "directory": str(folder), "cache": str(folder / "cache")},
        "method": {"type": "lora", "rank": 4},
        "optim": {"lr": 0.02},
        "train": {"rows_per_device": 4, "max_steps": 4, "plots": False, "output": str(folder / "run")},
    }
    return luthier.train(recipe, quiet=True).output


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(publish, "HfApi", hub.api)
    monkeypatch.setattr(publish, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setattr(publish, "get_token", lambda: TOKEN)
    return hub


def export(run: Path, output: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["export", str(run), "-o", str(output), *words])


def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that is lost on the way to the disk."""
    write = merge.write_model

    def written(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
        write(model, tokenizer, folder, **options)
        (folder / "chat_template.jinja").unlink()

    monkeypatch.setattr(merge, "write_model", written)


def test_what_passed_is_uploaded_and_private(hub: Hub, run: Path, tmp_path: Path) -> None:
    done = export(run, tmp_path / "merged", "--push-to-hub", "maker/merged", "--json")
    assert done.exit_code == 0, done.output
    assert hub.asked() == ["whoami", "model_info", "create_repo", "upload_folder"]
    calls = dict(hub.calls)
    assert calls["create_repo"] == {"repo": "maker/merged", "private": True, "exist_ok": True}
    told = json.loads(done.stdout)
    assert told["passed"] and told["uploaded"] == "https://hub.invalid/maker/merged/commit/1"
    local = {path.name for path in (tmp_path / "merged").iterdir()}
    names = {path.name for path in hub.folder.iterdir()}
    assert local - names == {"export_report.json", "manifest.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "chat_template.jinja"} <= names
    for file in hub.folder.iterdir():
        content = file.read_bytes()
        assert TOKEN.encode() not in content
        assert str(tmp_path).encode() not in content and str(run.parent).encode() not in content, file.name
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (hub.folder, tmp_path / "merged")
    )
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_what_failed_is_never_uploaded(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt(monkeypatch)
    done = export(run, tmp_path / "merged", "--push-to-hub", "maker/merged")
    assert done.exit_code == 1 and "not uploaded to maker/merged" in done.stdout
    assert hub.asked() == ["whoami", "model_info"] and not hub.folder.exists()
    assert (tmp_path / "merged" / "EXPORT_FAILED").is_file()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "there is no token for the hub; set HF_TOKEN, or run `hf auth login`"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("refused", "the hub does not let this token in: 401 refused"),
        ("read", "the token may only read; make one that may write"),
        ("public", "maker/merged is public already; give private: false, or name another repository"),
    ],
)
def test_refused_before_anything_is_written(
    case: str, message: str, hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "no token":
        monkeypatch.setattr(publish, "get_token", lambda: None)
    elif case == "offline":
        monkeypatch.setattr(publish, "constants", SimpleNamespace(HF_HUB_OFFLINE=True))
    elif case == "refused":
        hub.refuses["whoami"] = refusal(401)
    elif case == "read":
        hub.role = "read"
    else:
        hub.visible = True
    with pytest.raises(RecipeError) as error:
        luthier.export(run, output=tmp_path / "merged", push_to_hub="maker/merged", quiet=True)
    assert str(error.value).startswith(f"export.push_to_hub: {message}")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("name", ["maker/model/more", "maker/mo del", ""])
def test_names_that_are_none(name: str, hub: Hub, run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^export\.push_to_hub\.repo: "):
        luthier.export(run, output=tmp_path / "merged", push_to_hub=name, quiet=True)
    assert hub.asked() == [] and not (tmp_path / "merged").exists()


def test_a_failing_upload_loses_nothing(hub: Hub, run: Path, tmp_path: Path) -> None:
    hub.refuses["upload_folder"] = refusal(503)
    with pytest.raises(
        PublishError, match=r"is verified and whole, but it could not be uploaded to maker/merged: 503"
    ) as error:
        luthier.export(run, output=tmp_path / "merged", push_to_hub="maker/merged", quiet=True)
    command = shlex.split(str(error.value).splitlines()[-1].partition(": ")[2])
    assert (
        command[:5] == ["hf", "upload", "maker/merged", str(tmp_path / "merged"), "."]
        and "--private" in command
    )
    assert "export_report.json" not in command and "model.safetensors" in command
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_a_recipe_says_where_and_that_it_is_public(hub: Hub, run: Path, tmp_path: Path) -> None:
    tree = {
        "model": {"path": str(run.parent / "base")},
        "method": {"type": "lora", "rank": 4, "adapters": [str(run)]},
        "export": {
            "output": str(tmp_path / "merged"),
            "push_to_hub": {"repo": "maker/one", "private": False, "revision": "trial"},
        },
    }
    file = tmp_path / "merge.json"
    file.write_text(json.dumps(tree))
    hub.visible = True
    assert luthier.export(file, quiet=True).uploaded is not None
    calls = dict(hub.calls)
    assert calls["create_repo"] == {"repo": "maker/one", "private": False, "exist_ok": True}
    assert calls["upload_folder"]["revision"] == "trial"
    # The command line names another one; the rest of the recipe's part stays.
    again = CliRunner().invoke(app, ["export", str(file), "--overwrite", "--push-to-hub", "maker/two"])
    assert again.exit_code == 0 and "uploaded: https://hub.invalid/maker/two" in again.stdout, again.output
    created = [call for name, call in hub.calls if name == "create_repo"]
    assert created[-1] == {"repo": "maker/two", "private": False, "exist_ok": True}


def test_a_llamafactory_file_names_its_repository(hub: Hub, run: Path, tmp_path: Path) -> None:
    keys = {
        "model_name_or_path": str(run.parent / "base"),
        "adapter_name_or_path": str(run),
        "export_dir": str(tmp_path / "merged"),
        "export_hub_model_id": "maker/merged",
        "hf_hub_token": "hf_ofTheFile",
    }
    file = tmp_path / "merge.yaml"
    file.write_text(json.dumps(keys))
    loaded = load_recipe(file, to_export=True)
    spec = loaded.recipe.export.push_to_hub
    assert spec is not None and (spec.repo, spec.private, spec.revision) == ("maker/merged", True, None)
    assert any(note.startswith("export_hub_model_id: uploaded once it has passed") for note in loaded.notes)
    assert luthier.export(file, quiet=True).uploaded == "https://hub.invalid/maker/merged/commit/1"
    assert {call["token"] for name, call in hub.calls if name == "token"} == {"hf_ofTheFile"}
    trains = {"stage": "sft", "do_train": True, "finetuning_type": "lora", "dataset": "x", "output_dir": "y"}
    file.write_text(json.dumps({**keys, **trains, "export_dir": None}))
    assert "export_hub_model_id: no effect without export_dir" in load_recipe(file, to_export=True).notes


# --------------------------------------------------------------------------------------------------
# What failed is marked, and replaces nothing


def test_a_failed_export_never_replaces_a_good_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, aside = tmp_path / "merged", tmp_path / "merged.failed"
    assert export(run, output).exit_code == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with monkeypatch.context() as patched:
        spoilt(patched)
        for _ in range(2):  # a failed one may take the place of a failed one
            done = export(run, output, "--overwrite")
            assert done.exit_code == 1 and f"{aside} is not the model that was trained" in done.stderr
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "chat template" in (aside / "EXPORT_FAILED").read_text()
    assert json.loads((aside / "export_report.json").read_text())["passed"] is False
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "merged.failed"]
    assert export(run, output, "--overwrite").exit_code == 0
    assert not (output / "EXPORT_FAILED").exists() and (aside / "EXPORT_FAILED").exists()


def test_a_failed_export_is_not_overwritten_unasked(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    with monkeypatch.context() as patched:
        spoilt(patched)
        assert export(run, output).exit_code == 1
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        assert export(run, output).exit_code == 2
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
        # Told to, a failed one takes the place of a failed one.
        assert export(run, output, "--overwrite").exit_code == 1
    assert not (tmp_path / "merged.failed").exists()
    assert export(run, output, "--overwrite").exit_code == 0
    assert not (output / "EXPORT_FAILED").exists()


def test_a_folder_of_the_user_is_not_taken_for_a_failed_export(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    assert export(run, output).exit_code == 0
    (tmp_path / "merged.failed").mkdir()
    (tmp_path / "merged.failed" / "notes.txt").write_text("keep me")
    with pytest.raises(ExportError, match=r"merged\.failed is in the way"):
        luthier.export(run, output=output, overwrite=True, quiet=True)
    assert (tmp_path / "merged.failed" / "notes.txt").read_text() == "keep me"

"""The model card, and the upload to a hub that is not there: what would be asked of it, and what when it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM

import luthier
from luthier import publish
from luthier.cli import app
from luthier.recipe.load import load_recipe
from luthier.trainer.checkpoint import hash_file
from luthier.types import RecipeError
from tests.tiny import chat_model, write_alpaca

TOKEN = "hf_nobodyKnowsThis"


def refusal(status: int, kind: type[HfHubHTTPError] = HfHubHTTPError) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub.invalid")
    return kind(f"{status} refused", response=httpx2.Response(status, request=request))


class Hub:
    """Stands for the hub: remembers what it is asked, keeps what is uploaded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.role = "write"
        self.visible: bool | None = None
        self.refuses: dict[str, Exception] = {}

    def api(self, token: str | None = None) -> Hub:
        self.calls.append(("token", {"token": token}))
        return self

    def _asked(self, name: str, **what: Any) -> None:
        self.calls.append((name, what))
        if name in self.refuses:
            raise self.refuses[name]

    def whoami(self) -> dict[str, Any]:
        self._asked("whoami")
        return {"name": "maker", "auth": {"accessToken": {"role": self.role}}}

    def model_info(self, repo: str) -> Any:
        self._asked("model_info", repo=repo)
        if self.visible is None:
            raise refusal(404, RepositoryNotFoundError)
        return SimpleNamespace(private=not self.visible)

    def create_repo(self, repo: str, **what: Any) -> Any:
        self._asked("create_repo", repo=repo, **what)
        return SimpleNamespace(repo_id=repo)

    def create_branch(self, repo: str, **what: Any) -> None:
        self._asked("create_branch", repo=repo, **what)

    def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **what: Any) -> Any:
        self._asked("upload_folder", **what)
        names = [
            path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()
        ]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.folder / name)
        return SimpleNamespace(commit_url=f"https://hub.invalid/{what['repo_id']}/commit/1")

    def asked(self) -> list[str]:
        return [name for name, _ in self.calls if name != "token"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(publish, "HfApi", hub.api)
    monkeypatch.setattr(publish, "constants", SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setattr(publish, "get_token", lambda: None)
    return hub


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> dict[str, Any]:
    write_alpaca(tmp_path / "rows.json", 24)
    return {
        "model": {"path": str(model), "token": TOKEN},
        "data": {
            "train": ["rows.json"],
            "directory": str(tmp_path),
            "cache": str(tmp_path / "cache"),
            "dev_split": 4,
        },
        "method": {"type": "lora", "rank": 4},
        "train": {
            "rows_per_device": 4,
            "max_steps": 2,
            "save_every": 1,
            "plots": False,
            "metrics": ["accuracy"],
            "output": str(tmp_path / "run"),
            "push_to_hub": {"repo": "maker/model"},
        },
    }


def changed(recipe: dict[str, Any], **hub: Any) -> dict[str, Any]:
    return {**recipe, "train": {**recipe["train"], "push_to_hub": {"repo": "maker/model", **hub}}}


FINAL = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "base.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
}


def test_the_final_files_alone_are_uploaded(hub: Hub, recipe: dict[str, Any], model: Path) -> None:
    run = luthier.train(recipe, quiet=True).output
    assert hub.asked() == ["whoami", "model_info", "create_repo", "upload_folder"]
    assert {call["token"] for name, call in hub.calls if name == "token"} == {TOKEN}
    (created,) = [call for name, call in hub.calls if name == "create_repo"]
    assert created == {"repo": "maker/model", "private": True, "exist_ok": True}
    (uploaded,) = [call for name, call in hub.calls if name == "upload_folder"]
    assert (uploaded["repo_id"], uploaded["revision"]) == ("maker/model", None)
    names = {path.relative_to(hub.folder).as_posix() for path in hub.folder.rglob("*") if path.is_file()}
    assert names == FINAL
    assert (run / "checkpoint-2").is_dir(), "there was something else to upload"
    AutoPeftModelForCausalLM.from_pretrained(str(hub.folder))  # it is a model
    for file in hub.folder.iterdir():
        assert TOKEN.encode() not in file.read_bytes()


def test_a_branch_is_made_first(hub: Hub, recipe: dict[str, Any]) -> None:
    luthier.train(changed(recipe, revision="trial", private=False), quiet=True)
    assert hub.asked() == ["whoami", "model_info", "create_repo", "create_branch", "upload_folder"]
    calls = dict(hub.calls)
    assert calls["create_repo"]["private"] is False
    assert calls["create_branch"] == {"repo": "maker/model", "branch": "trial", "exist_ok": True}
    assert calls["upload_folder"]["revision"] == "trial"


def test_the_token_of_the_environment(
    hub: Hub, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "get_token", lambda: "hf_ofTheEnvironment")
    del recipe["model"]["token"]
    luthier.train(recipe, quiet=True)
    assert {call["token"] for name, call in hub.calls if name == "token"} == {"hf_ofTheEnvironment"}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "there is no token for the hub; set HF_TOKEN, or run `hf auth login`"),
        (
            "offline",
            "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it or remove train.push_to_hub",
        ),
        ("refused", "the hub does not let this token in: 401 refused"),
        ("unreachable", "the hub does not let this token in: no route"),
        ("read", "the token may only read; make one that may write"),
        ("public", "maker/model is public already; give private: false, or name another repository"),
        ("eval only", "with train.eval_only there is nothing to upload; remove one of the two"),
    ],
)
def test_refused_before_the_training(
    case: str, message: str, hub: Hub, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if case == "no token":
        del recipe["model"]["token"]
    elif case == "offline":
        monkeypatch.setattr(publish, "constants", SimpleNamespace(HF_HUB_OFFLINE=True))
    elif case == "refused":
        hub.refuses["whoami"] = refusal(401)
    elif case == "unreachable":
        hub.refuses["whoami"] = httpx2.ConnectError("no route")
    elif case == "read":
        hub.role = "read"
    elif case == "public":
        hub.visible = True
    elif case == "eval only":
        recipe["train"]["eval_only"] = True
    with pytest.raises(RecipeError) as error:
        luthier.train(recipe, quiet=True)
    assert str(error.value) == f"train.push_to_hub: {message}"
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", ["maker/model/more", "maker/mo del", ""])
def test_names_that_are_none(name: str, hub: Hub, recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^train\.push_to_hub\.repo: "):
        luthier.train(changed(recipe, repo=name), quiet=True)
    assert hub.asked() == [] and not (tmp_path / "run").exists()


def test_an_existing_public_repository_is_taken_where_the_recipe_says_so(
    hub: Hub, recipe: dict[str, Any]
) -> None:
    hub.visible = True
    luthier.train(changed(recipe, private=False), quiet=True)
    assert hub.asked()[-1] == "upload_folder"


def test_a_name_without_an_owner_is_looked_for_under_the_token_s(hub: Hub, recipe: dict[str, Any]) -> None:
    luthier.train(changed(recipe, repo="model"), quiet=True)
    assert dict(hub.calls)["model_info"] == {"repo": "maker/model"}


@pytest.mark.parametrize("step", ["create_repo", "create_branch", "upload_folder"])
def test_a_failing_upload_loses_nothing(
    step: str, hub: Hub, recipe: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses[step] = refusal(503)
    run = tmp_path / "run"
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(changed(recipe, revision="trial")))
    with pytest.raises(SystemExit) as end:
        app(["train", str(file), "--quiet"])
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert (
        f"the run in {run} is finished and whole, but it could not be uploaded to maker/model: 503 refused"
        in text
    )
    command = shlex.split(text.strip().splitlines()[-1].partition(": ")[2])
    assert command[:5] == ["hf", "upload", "maker/model", str(run), "."]
    included = [word for word, before in zip(command[1:], command, strict=False) if before == "--include"]
    assert set(included) == FINAL
    assert command[-3:] == ["--private", "--revision", "trial"]
    files = json.loads((run / "run.json").read_text())["files"]
    assert all(hash_file(run / name) == digest for name, digest in files.items())
    AutoPeftModelForCausalLM.from_pretrained(str(run))


def test_the_card_tells_what_the_run_knows(recipe: dict[str, Any], model: Path, tmp_path: Path) -> None:
    """Written in every run, over the empty form that PEFT writes; no folder of this machine is in it."""
    del recipe["train"]["push_to_hub"]
    result = luthier.train(recipe, quiet=True)
    text = (result.output / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "peft",
        "license": "unknown",
        "pipeline_tag": "text-generation",
        "tags": ["luthier", "sft", "lora"],
    }
    assert "# run\n" in body and f"`{model.name}`, trained with Luthier {luthier.__version__}" in body
    shown = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert shown["method"]["rank"] == 4 and shown["train"]["max_steps"] == 2
    for name in ("eval_loss", "eval_perplexity", "eval_accuracy"):
        assert f"| {name} | {result.metrics[name]:.6g} |" in body
    (tokens,) = [line for line in body.splitlines() if line.startswith("| train_tokens")]
    assert tokens == f"| train_tokens | {result.metrics['train_tokens']:,} |"
    (report,) = json.loads((result.output / "run.json").read_text())["reports"]
    assert f"| rows | {report['rows']:,} | {report['samples']:,} |" in body
    for private in (str(tmp_path), str(model.parent), TOKEN):
        assert private not in text
    assert "README.md" not in json.loads((result.output / "run.json").read_text())["files"]


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("maker/base", "maker/base"),
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/models/base", None),
        ("./models/base", None),
    ],
)
def test_the_base_is_named_where_it_is_the_hub_s(path: str, base: str | None, tmp_path: Path) -> None:
    settings = load_recipe(
        {
            "model": {"path": path},
            "data": {"train": [{"hf_hub_url": "maker/rows"}, "own"]},
            "method": {"type": "full"},
        }
    ).recipe
    front = yaml.safe_load(publish.model_card(settings, {"reports": []}, {}).split("---\n")[1])
    assert front.get("base_model") == base
    assert (front["library_name"], front["datasets"]) == ("transformers", ["maker/rows"])

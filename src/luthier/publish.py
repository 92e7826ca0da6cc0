"""What others see of a finished run: its model card, and the folder on the hub. Nothing here trains or reads data."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from luthier import __version__
from luthier.recipe.schema import (
    EMBEDDED_MODEL,
    AdapterSpec,
    DatasetSpec,
    DpoSpec,
    HubSpec,
    KtoSpec,
    OnlineSpec,
    PtSpec,
    Recipe,
    ReferenceSpec,
    RmSpec,
    SftSpec,
    StageSpec,
)
from luthier.recipe.stage import REFERENCE_FREE
from luthier.types import LuthierError, RecipeError

CARD_NAME = "README.md"
EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN = ("epochs", "max_steps", "tokens_per_batch", "rows_per_device", "accumulation", "seed", "precision")


_SCORING = (
    "\n## Scoring\n",
    "One number for a whole conversation, read at its last token. `luthier score` computes it. With transformers: one "
    "label (`num_labels=1`), the text of `tokenizer.apply_chat_template(messages, tokenize=False)` tokenized without "
    "further special tokens, and `pad_token_id=tokenizer.pad_token_id`, which an adapter's base need not have.",
)


class PublishError(LuthierError):
    """A run that is finished and whole, and could not be uploaded."""


# --------------------------------------------------------------------------------------------------
# The card


def model_card(
    settings: Recipe,
    manifest: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    merged_as: str | None = None,
) -> str:
    """The text of `README.md`: what was trained from what, how, and the numbers that the run itself measured.

    manifest: the content of `run.json`. merged_as: the name of an exported model, whose adapters are in its weights.
    Paths of this machine are left out; the license stays open, because base model and data decide it.
    """
    base = settings.model.path
    hub_base = EMBEDDED_BASE if base == EMBEDDED_MODEL else _hub_name(base)
    name = merged_as or Path(settings.train.output).resolve().name
    about: dict[str, Any] = {"base_model": hub_base} if hub_base is not None else {}
    if merged_as is not None and hub_base is not None:
        about["base_model_relation"] = "finetune"
    adapted = isinstance(settings.method, AdapterSpec) and merged_as is None
    about["library_name"] = "peft" if adapted else "transformers"
    scores = isinstance(settings.stage, RmSpec)
    about |= {"license": "unknown", "pipeline_tag": "text-classification" if scores else "text-generation"}
    about["tags"] = ["luthier", settings.stage.type, *_loss_tags(settings.stage), settings.method.type]
    sets = [
        data.hf_hub_url for data in settings.data.train if isinstance(data, DatasetSpec) and data.hf_hub_url
    ]
    if sets:
        about["datasets"] = sets
    return "\n".join(
        [
            f"---\n{_yaml(about)}---",
            f"\n# {name}\n",
            f"`{hub_base or Path(base).name}`, trained with Luthier {__version__}: {_stage_text(settings.stage)}, "
            f"method `{settings.method.type}`. Uses and limits are not described yet. The license is that of the base "
            "model and the data, which this card does not know.",
            *(_SCORING if scores else ()),
            "\n## Data\n",
            *_data_lines(manifest["reports"]),
            "\n## Recipe\n",
            f"```yaml\n{_yaml(_shown_recipe(settings))}```",
            *_result_lines(metrics),
            "",
        ]
    )


def _hub_name(path: str) -> str | None:
    return path if _HUB_NAME.fullmatch(path) and not Path(path).exists() else None


def _loss_tags(stage: StageSpec) -> list[str]:
    """What the stage is looked for by, besides its name."""
    if isinstance(stage, RmSpec):
        return ["reward-model"]
    losses = list(_losses(stage))
    return [loss for loss in losses if loss not in ("cross_entropy", "sigmoid", stage.type)]


def _losses(stage: StageSpec) -> Mapping[str, float]:
    """The losses of a stage that has a choice, with their weights."""
    if isinstance(stage, DpoSpec):
        return {str(name): weight for name, weight in stage.losses.items()}
    return {stage.loss: 1.0} if isinstance(stage, SftSpec | KtoSpec) else {}


def _stage_text(stage: StageSpec) -> str:
    losses = _losses(stage)
    named = [f"`{name}`" if len(losses) == 1 else f"{weight:g} `{name}`" for name, weight in losses.items()]
    text = f"stage `{stage.type}`" + (f" with loss {' + '.join(named)}" if named else "")
    if isinstance(stage, RmSpec):
        return f"{text} (one score for an answer, higher is better)"
    tree = _stage_options(stage)
    if "reference" in tree:
        reference = tree["reference"]
        asked = reference["path"] or "start" if isinstance(reference, dict) else reference
        text += f", reference `{asked}`"
    return text


_BELONGS_TO = {
    "entropy_power": ("eaft",),
    "kl_weight": ("asft",),
    "gamma": ("simpo",),
    "discopop_tau": ("discopop",),
    "bco_shift": ("bco_pair",),
}
"""Options that mean something to these losses alone."""


def _stage_options(stage: StageSpec) -> dict[str, Any]:
    """The options that had a part in the training; of folders on this machine the names alone."""
    tree, losses = stage.model_dump(mode="json", exclude_none=True), _losses(stage)
    for option, names in _BELONGS_TO.items():
        if not set(names) & set(losses):
            tree.pop(option, None)
    if tree.get("divergence") != "alpha":
        tree.pop("divergence_alpha", None)
    if isinstance(stage, OnlineSpec):
        tree["rewards"] = [_shown_reward(reward) for reward in tree["rewards"]]
        if "value_start" in tree:
            tree["value_start"] = Path(tree["value_start"]).name
    compares = isinstance(stage, KtoSpec | DpoSpec) and not set(losses) <= set(REFERENCE_FREE)
    compares = compares or (isinstance(stage, OnlineSpec) and bool(stage.kl.coefficient))
    if not (compares or "asft" in losses):
        tree.pop("reference", None)
    elif not isinstance(stage, PtSpec | RmSpec) and isinstance(stage.reference, ReferenceSpec):
        path = stage.reference.path
        tree["reference"] |= {"path": None if path is None else _hub_name(path) or Path(path).name}
        tree["reference"]["adapters"] = [Path(folder).name for folder in stage.reference.adapters]
    return tree


def _shown_reward(reward: Mapping[str, Any]) -> dict[str, Any]:
    """A reward without folders of this machine, addresses and what they are sent."""
    shown = {key: value for key, value in reward.items() if key not in ("url", "headers", "path", "base")}
    names = {key: reward[key] for key in ("path", "base") if key in reward}
    return shown | {key: _hub_name(path) or Path(path).name for key, path in names.items()}


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


def _data_lines(reports: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| data set | rows | samples | tokens | tokens learnt |", "|---|---:|---:|---:|---:|"]
    for report in reports:
        counts = " | ".join(f"{report[key]:,}" for key in ("rows", "samples", "tokens", "targets"))
        lines.append(f"| {Path(report['dataset']).name} | {counts} |")
    return lines


def _shown_recipe(settings: Recipe) -> dict[str, Any]:
    """What decides the training, without folders of this machine."""
    tree = settings.model_dump(mode="json", exclude_none=True)
    tree["method"].pop("adapters", None)
    train = {key: tree["train"][key] for key in _SHOWN if key in tree["train"]}
    lengths = {key: tree["data"][key] for key in ("max_length", "packing")}
    return {
        "data": lengths,
        "stage": _stage_options(settings.stage),
        "method": tree["method"],
        "optim": tree["optim"],
        "train": train,
    }


def _result_lines(metrics: Mapping[str, float]) -> list[str]:
    shown = {
        name: value
        for name, value in metrics.items()
        if name.startswith("eval_") and not name.endswith(("_runtime", "_per_second"))
    }
    if "train_tokens" in metrics:
        shown["train_tokens"] = metrics["train_tokens"]
    if not shown:
        return []
    rows = [
        f"| {name} | {f'{value:,}' if isinstance(value, int) else f'{value:.6g}'} |"
        for name, value in shown.items()
    ]
    return ["\n## Results\n", "| number | value |", "|---|---:|", *rows]


# --------------------------------------------------------------------------------------------------
# The hub


def require_hub(settings: Recipe) -> None:
    """Make sure, before the training, that its result can be uploaded; without `train.push_to_hub` nothing.

    Raises RecipeError where nothing will be trained, and as `require_repository`.
    """
    spec, key = settings.train.push_to_hub, "train.push_to_hub"
    if spec is None:
        return
    if settings.train.eval_only:
        raise RecipeError(f"{key}: with train.eval_only there is nothing to upload; remove one of the two")
    require_repository(spec, key, settings.model.token)


def require_repository(spec: HubSpec, key: str, token: str | None) -> None:
    """Make sure that something can be uploaded where `spec`, the recipe's `key`, says; `token`: else that of the
    environment.

    Raises RecipeError where the name is none, there is no network or no token, the hub refuses the token, the token may
    only read, or the repository is public and the recipe says private.
    """
    try:
        validate_repo_id(spec.repo)
    except HFValidationError as error:
        raise RecipeError(f"{key}.repo: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise RecipeError(
            f"{key}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it or remove {key}"
        )
    token = token or get_token()
    if token is None:
        raise RecipeError(f"{key}: there is no token for the hub; set HF_TOKEN, or run `hf auth login`")
    api = HfApi(token=token)
    try:
        who = api.whoami()
        repo = spec.repo if "/" in spec.repo else f"{who['name']}/{spec.repo}"
        public = _is_public(api, repo)
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise RecipeError(f"{key}: the hub does not let this token in: {error}") from error
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise RecipeError(f"{key}: the token may only read; make one that may write")
    if spec.private and public:
        raise RecipeError(f"{key}: {repo} is public already; give private: false, or name another repository")


def _is_public(api: HfApi, repo: str) -> bool:
    try:
        return api.model_info(repo).private is False
    except RepositoryNotFoundError:
        return False


def upload(spec: HubSpec, token: str | None, output: Path, files: Sequence[str], what: str) -> str:
    """Upload `files` of `output`, nothing else, and return the address; `what` is uploaded, in words.

    Raises PublishError that says how to upload later: what is in `output` is whole.
    """
    api = HfApi(token=token or get_token())
    try:
        repo = api.create_repo(spec.repo, private=spec.private, exist_ok=True).repo_id
        if spec.revision is not None:
            api.create_branch(repo, branch=spec.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=output,
            allow_patterns=list(files),
            revision=spec.revision,
            commit_message=f"Model trained with Luthier {__version__}",
        )
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        command = [
            "hf",
            "upload",
            spec.repo,
            str(output),
            ".",
            *(word for name in files for word in ("--include", name)),
        ]
        command += ["--private"] if spec.private else []
        command += ["--revision", spec.revision] if spec.revision is not None else []
        raise PublishError(
            f"{what}, but it could not be uploaded to {spec.repo}: {error}\n"
            f"to upload it later: {shlex.join(command)}"
        ) from error
    return str(commit.commit_url)

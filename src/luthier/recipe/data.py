"""The data part of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from luthier.recipe.base import Spec
from luthier.recipe.media import MediaSpec
from luthier.recipe.mixture import MixSpec
from luthier.recipe.streaming import StreamSpec
from luthier.recipe.thinking import ThinkingSpec


class ColumnSpec(Spec):
    """Names of the columns in the data file; an absent one keeps the format's own name."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    messages: str | None = None
    system: str | None = None
    tools: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    kto_tag: str | None = None
    margin: str | None = None
    """A number: by how much the better answer is better (rm)."""
    images: str | None = None
    videos: str | None = None
    audios: str | None = None


class TagSpec(Spec):
    """Keys and role names inside a message of a conversation file."""

    role_tag: str = "from"
    content_tag: str = "value"
    user_tag: str = "human"
    assistant_tag: str = "gpt"
    observation_tag: str = "observation"
    function_tag: str = "function_call"
    system_tag: str = "system"


class DatasetSpec(Spec):
    """One data set, in the words of `dataset_info.json`."""

    name: str | None = None
    """What reports call it; the file's or the hub's name where absent."""
    file_name: str | None = None
    """File or folder, relative to `data.directory`; or an address with a protocol, as cloud_file_name."""
    hf_hub_url: str | None = None
    """Name of a data set on the Hugging Face hub."""
    ms_hub_url: str | None = None
    """Name of a data set on ModelScope (extra `modelscope`)."""
    cloud_file_name: str | None = None
    """File, folder or pattern with a protocol: https://, s3:// (extra `s3`), gs:// (extra `gcs`), hf:// and others."""
    dataset_sha1: str | None = None
    """Expected SHA-1 of the file; a mismatch is an error."""
    revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = Field(default=None, gt=0)
    """Draw this many rows (with repetition where the file has fewer)."""
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    columns: ColumnSpec = ColumnSpec()
    tags: TagSpec | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> DatasetSpec:
        origins = (self.file_name, self.hf_hub_url, self.ms_hub_url, self.cloud_file_name)
        if sum(origin is not None for origin in origins) != 1:
            raise ValueError("give exactly one of file_name, hf_hub_url, ms_hub_url and cloud_file_name")
        return self


class TemplateSpec(Spec):
    """A template in four strings: prefix, then for each turn the prompt with its answer, separated."""

    prefix: str = ""
    """Written once at the beginning; a system message takes its place."""
    prompt: str = "{query}"
    """A user's turn; `{query}` stands for the message."""
    separator: str = "\n"
    """Between prefix and turns, and after each answer but the last."""
    use_history: bool = True
    """Show earlier turns; without it a conversation with several is refused."""

    @field_validator("prompt")
    @classmethod
    def _has_query(cls, value: str) -> str:
        if value.count("{query}") != 1 or "{{query}}" in value:
            raise ValueError("should contain {query} exactly once, in single braces")
        return value


class DataSpec(Spec):
    train: tuple[str | DatasetSpec, ...] = ()
    """Data sets to train on: names in dataset_info.json, paths of files, or whole descriptions."""
    eval: tuple[str | DatasetSpec, ...] = ()
    """Data sets to evaluate on; each is reported by its own name."""
    directory: str = "data"
    """Folder of the data files and of dataset_info.json; or its address, as in cloud_file_name."""
    offline: bool = False
    """Refuse whatever is not on this machine; HF_HUB_OFFLINE=1 does, too, but for what the hub's own cache has."""
    template: str | TemplateSpec | None = None
    """A named template, a .jinja file or four strings; the tokenizer's own chat template if absent."""
    default_system: str | None = None
    """System prompt for conversations that have none."""
    tool_format: str | None = None
    """How tools and calls are written, by name, where it is not the template's own way (`luthier templates`)."""
    thinking: ThinkingSpec = ThinkingSpec()
    """What becomes of reasoning."""
    mix: MixSpec = MixSpec()
    """How several training sets become one."""
    stream: StreamSpec | None = None
    """Read and tokenize while training, for files larger than memory; needs `train.max_steps`."""
    media: MediaSpec = MediaSpec()
    """Images, films and sounds."""
    max_length: int = Field(default=2048, gt=1)
    """Longest sample in tokens."""
    overflow: Literal["drop", "truncate", "split", "error"] | None = None
    """What happens to a longer sample. Absent: `split` for pt, `drop` for everything else."""
    max_lost: float | None = Field(default=0.01, ge=0, le=1)
    """Refuse to train when more than this share of rows is lost (dropped, cut, unsupervised); null: never."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first rows of each data set (for a trial run)."""
    dev_split: float = Field(default=0.0, ge=0)
    """Held out of the training rows for evaluation: a share below 1, or a number of rows."""
    packing: bool = False
    """With `train.rows_per_device`: fill rows of `max_length` with whole, isolated samples first."""
    rules: Literal["luthier", "llamafactory"] = "luthier"
    """Whose rules decide which rows, tokens and targets a data set gives; set for that tool's own files."""
    train_on_prompt: bool = False
    """Learn the prompt's tokens too."""
    mask_history: bool = False
    """Learn only the last answer of each conversation."""
    train_roles: tuple[Literal["assistant", "user", "system", "tool"], ...] = ("assistant",)
    """Whose messages are learnt where a message has no `weight` of its own (sft)."""
    train_after_stop: bool = False
    """Learn what the template writes after the stop token too (ChatML's newline), as LLaMA-Factory does."""
    parse_special_tokens: bool = False
    """Let the text of a special token inside user data become that token. Off: text stays text."""
    shuffle: bool = True
    """Visit the training rows in a new random order in every epoch."""
    workers: int = Field(default=1, ge=1)
    """Processes that tokenize."""
    cache: str | None = None
    """Folder of the tokenized cache; the user's cache folder if absent."""

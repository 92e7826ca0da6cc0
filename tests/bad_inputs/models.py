"""Models, tokenizers and adapters that cannot be used: missing, damaged, of another kind, or of another model."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    __version__,
)

from bad_inputs import BadInput
from bad_inputs.data import CACHE
from padded import padded_chat_model
from tiny import FAMILIES, chat_model, chat_tokenizer

ROWS = json.dumps([{"instruction": "Count.", "output": "1 2 3"}] * 4)
LINEAR = "['down_proj', 'gate_proj', 'k_proj', 'lm_head', 'o_proj', 'q_proj', 'up_proj', 'v_proj']"
MAMBA_LINEAR = "['dt_proj', 'in_proj', 'lm_head', 'out_proj', 'x_proj']"

Files = Mapping[str, str | bytes]


def _read(folder: Path, prefix: str) -> dict[str, str | bytes]:
    return {f"{prefix}/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


@cache
def model(family: str = "llama") -> Files:
    """A tiny model with its tokenizer in `m`."""
    with tempfile.TemporaryDirectory() as folder:
        make = chat_model if family in FAMILIES else padded_chat_model
        return _read(make(Path(folder), family), "m")


def _saved(built: PreTrainedModel) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        built.save_pretrained(folder)
        chat_tokenizer().save_pretrained(folder)
        return _read(Path(folder), "m")


@cache
def adapter(family: str = "llama", **changes: int) -> Files:
    """An adapter in `a` of a fresh model, its config changed."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config)
    lora = LoraConfig(target_modules=["q_proj"] if family == "llama" else ["c_attn"], task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        get_peft_model(base, lora).save_pretrained(folder)
        return _read(Path(folder), "a")


def without(files: Files, *names: str) -> Files:
    return {name: content for name, content in files.items() if not name.startswith(names)}


def config(files: Files, **changes: Any) -> Files:
    """The same model with other values in its config.json; None removes one."""
    values = {**json.loads(files["m/config.json"]), **changes}
    kept = {name: value for name, value in values.items() if value is not None}
    return {**files, "m/config.json": json.dumps(kept)}


def weights(files: Files, change: Callable[[dict[str, torch.Tensor]], Any]) -> Files:
    """The same model with other weights."""
    content = files["m/model.safetensors"]
    assert isinstance(content, bytes)
    state = load(content)
    change(state)
    return {**files, "m/model.safetensors": save(state, metadata={"format": "pt"})}


def case(
    name: str,
    files: Files,
    message: str,
    path: str = "m",
    method: Mapping[str, Any] | None = None,
    max_length: int = 128,
    **spec: Any,
) -> BadInput:
    """`luthier train` of a recipe with this model."""
    recipe = {
        "model": {"path": path, **spec},
        "data": {"train": ["rows.json"], "cache": CACHE, "max_length": max_length},
        "method": dict(method or {"type": "lora"}),
        "train": {"output": "run", "max_steps": 1},
    }
    return BadInput(
        name,
        {"rows.json": ROWS, **files, "r.yaml": json.dumps(recipe)},
        ["train", "r.yaml", "--quiet"],
        f"error: {message}\n",
    )


def lora(**spec: Any) -> dict[str, Any]:
    return {"type": "lora", **spec}


def encoder() -> Files:
    """BERT with weights large enough that what it sees shows in what it says."""
    built = BertForMaskedLM(
        BertConfig(
            vocab_size=260, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
        )
    )
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(4.0)
    return _saved(built)


FOLDERS = [
    case("no such folder", {}, "model.path=./nowhere: no such folder or .gguf file", "./nowhere"),
    case(
        "a file that is no model",
        {},
        "model.path=./rows.json: no such folder or .gguf file",
        "./rows.json",
    ),
    case(
        "no config",
        without(model(), "m/config.json"),
        "model.path=m: the folder has no config.json, so it is not a model",
    ),
    case(
        "an adapter as the model",
        {name.replace("a/", "m/"): content for name, content in adapter().items()},
        "model.path=m: the folder holds an adapter; name it in method.adapters, and in model.path the model that it "
        "was trained on",
    ),
    case(
        "broken config",
        {**model(), "m/config.json": '{"model_type": "llama",'},
        "model.path=m: config.json is not valid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 24 (char 23)",
    ),
    case(
        "config not UTF-8",
        {**model(), "m/config.json": b'{"model_type": "ll\xe4ma"}'},
        "model.path=m: config.json is not valid JSON: 'utf-8' codec can't decode byte 0xe4 in position 18: "
        "invalid continuation byte",
    ),
    case(
        "config is a list",
        {**model(), "m/config.json": "[]"},
        "model.path=m: config.json is no JSON object",
    ),
    case(
        "no model type",
        config(model(), model_type=None),
        "model.path=m: config.json has no model_type, so it is not a model of transformers",
    ),
    case(
        "unknown model type",
        config(model(), model_type="lama"),
        f"model.path=m: transformers {__version__} does not know the model_type 'lama' of config.json; "
        "did you mean llama?",
    ),
    case(
        "code of its own",
        {
            **config(model(), model_type="mine", auto_map={"AutoConfig": "mine.Mine"}),
            "m/mine.py": "raise SystemExit(9)",
        },
        "model.path=m: the model brings Python code of its own; read it, then set model.trust_remote_code: true",
    ),
    case(
        "sizes that do not divide",
        config(model(), num_attention_heads=5),
        "model.path=m: its config could not be read: The hidden size (32) is not a multiple of the number of attention "
        "heads (5).",
    ),
    case(
        "a size that is a word",
        config(model(), hidden_size="big"),
        "model.path=m: its config could not be read: Field 'hidden_size' expected int, got str (value: 'big')",
    ),
    case(
        "an encoder",
        encoder(),
        "BertLMHeadModel looks ahead: what it says of a token depends on the tokens after it; "
        "a causal language model is needed, and this is an encoder",
    ),
    case(
        "encoder and decoder",
        _saved(
            T5ForConditionalGeneration(
                T5Config(vocab_size=260, d_model=32, num_layers=1, num_heads=4, d_ff=48)
            )
        ),
        "model.path=m: T5ForConditionalGeneration is no causal language model",
    ),
]

TOKENIZERS = [
    case(
        "no tokenizer",
        without(model(), "m/tokenizer", "m/chat_template"),
        "no tokenizer could be loaded from m: the folder has no tokenizer files (tokenizer.json); "
        "name one with model.tokenizer",
    ),
    case(
        "broken tokenizer",
        {**model(), "m/tokenizer.json": '{"version": "1.0"'},
        "no tokenizer could be loaded from m: tokenizer.json is not valid JSON: Expecting ',' delimiter: "
        "line 1 column 18 (char 17)",
    ),
    case(
        "only a slow tokenizer",
        {
            **without(model(), "m/tokenizer"),
            "m/tokenizer_config.json": '{"tokenizer_class": "CTRLTokenizer"}',
            "m/vocab.json": '{"a": 0, "<unk>": 1}',
            "m/merges.txt": "#version\n",
        },
        "m has only a slow tokenizer; a fast one is needed",
    ),
    case(
        "another tokenizer that is missing",
        model(),
        "model.tokenizer=./tokens: no such folder",
        tokenizer="./tokens",
    ),
    case(
        "fewer rows than tokens",
        weights(
            config(model(), vocab_size=100),
            lambda state: state.update(
                {name: tensor[:100].clone() for name, tensor in state.items() if len(tensor) > 200}
            ),
        ),
        "model.path=m: the tokenizer has 259 tokens and the model rows for 100; give it its own tokenizer, or set "
        "model.vocabulary.resize: true to add rows that are learnt anew",
    ),
]

WEIGHTS = [
    case(
        "no weights",
        without(model(), "m/model.safetensors"),
        "model.path=m could not be loaded: Error no file named model.safetensors, or pytorch_model.bin, found in "
        "directory m.",
    ),
    case(
        "empty weights",
        {**model(), "m/model.safetensors": b""},
        "model.path=m could not be loaded: model.safetensors is damaged or cut short "
        "(Error while deserializing header: header too small); copy it again",
    ),
    case(
        "cut weights",
        {**model(), "m/model.safetensors": model()["m/model.safetensors"][:20_000]},
        "model.path=m could not be loaded: model.safetensors is damaged or cut short "
        "(Error while deserializing header: incomplete metadata, file not fully covered); copy it again",
    ),
    case(
        "a .bin that is none",
        {**without(model(), "m/model.safetensors"), "m/pytorch_model.bin": b"hello"},
        "model.path=m could not be loaded: its .bin file is damaged or no file of weights; copy it again",
    ),
    case(
        "a shard that is missing",
        {
            **without(model(), "m/model.safetensors"),
            "m/model.safetensors.index.json": json.dumps(
                {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00001.safetensors"}}
            ),
        },
        "model.path=m could not be loaded: No such file or directory: m/model-00001-of-00001.safetensors",
    ),
    case(
        "a weight that is missing",
        weights(model(), lambda state: state.pop("model.layers.1.mlp.up_proj.weight")),
        "model.path=m: 1 of the 21 weights that its config asks for are not in its files, "
        "model.layers.1.mlp.up_proj.weight for one; the config is of another model or the files are incomplete",
    ),
    case(
        "more layers than weights",
        config(model(), num_hidden_layers=3),
        "model.path=m: 9 of the 30 weights that its config asks for are not in its files, "
        "model.layers.2.input_layernorm.weight for one; the config is of another model or the files are incomplete",
    ),
    case(
        "other shapes",
        config(model(), intermediate_size=64),
        "model.path=m: model.layers.0.mlp.down_proj.weight is (32, 48) in its files and (32, 64) by its config; "
        "they are of different models",
    ),
    case(
        "weights that are no numbers",
        weights(model(), lambda state: state["model.norm.weight"].fill_(float("nan"))),
        "LlamaForCausalLM answers with NaN: its weights are damaged, or too large for their type (model.dtype)",
    ),
    case(
        "a quantized model without its library",
        config(model(), quantization_config={"quant_method": "gptq", "bits": 4}),
        "model.path=m: its files are quantized with gptq, and optimum is not installed: pip install optimum gptqmodel",
    ),
    case("a GGUF file that is missing", {}, "model.path=./x.gguf: no such folder or .gguf file", "./x.gguf"),
    case(
        "a GGUF file in a folder that is missing",
        model(),
        "m/q4.gguf: no such file",
        gguf_file="q4.gguf",
    ),
    case(
        "no GGUF file",
        {"x.gguf": b"not a gguf"},
        "x.gguf: not a GGUF file (it does not begin with these letters)",
        "./x.gguf",
    ),
    case(
        "a GGUF file that is cut",
        {"x.gguf": b"GGUF\x03\0\0\0\x05\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0"},
        "x.gguf: this GGUF file could not be read: it is cut short",
        "./x.gguf",
    ),
]

METHODS = [
    case(
        "a target that is missing",
        model(),
        f"method.targets: the model has no module ['qproj']; its linear layers are {LINEAR}",
        method=lora(targets=["qproj"]),
    ),
    case(
        "a pattern that fits nothing",
        model(),
        "method.targets='.*nothing': Target modules .*nothing not found in the base model; "
        f"the linear layers are {LINEAR}",
        method=lora(targets=".*nothing"),
    ),
    case(
        "an adapter on a norm",
        model(),
        "method.targets=('input_layernorm',): Target module LlamaRMSNorm((32,), eps=1e-06) is not supported; "
        f"the linear layers are {LINEAR}",
        method=lora(targets=["input_layernorm"]),
    ),
    case(
        "an adapter where Mamba has none",
        model("mamba"),
        "method.targets='all-linear': Module 'out_proj' is incompatible with Mamba-based models (model_type='mamba'); "
        f"the linear layers are {MAMBA_LINEAR}",
    ),
    case(
        "a module to save that is missing",
        model(),
        f"method.modules_to_save: the model has no module ['head']; its linear layers are {LINEAR}",
        method=lora(modules_to_save=["head"]),
    ),
    case(
        "more layers than there are",
        model(),
        "method.layers=5, but the model has only 2 layers",
        method={"type": "freeze", "layers": 5},
    ),
    case(
        "a module of a layer that is missing",
        model(),
        "method.modules: no module 'attn' in model.layers.1; choose from ['input_layernorm', 'mlp', "
        "'post_attention_layernorm', 'self_attn'] or 'all'",
        method={"type": "freeze", "layers": 1, "modules": ["attn"]},
    ),
    case(
        "an adapter that is missing",
        model(),
        "method.adapters: ./a: no such folder",
        method=lora(adapters=["./a"]),
    ),
    case(
        "an adapter without a config",
        {**model(), **without(adapter(), "a/adapter_config.json")},
        "method.adapters: a holds no adapter_config.json, so it is not an adapter",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter with a broken config",
        {**model(), **adapter(), "a/adapter_config.json": "{"},
        "method.adapters: a: adapter_config.json is not valid JSON: Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter of an unknown kind",
        {**model(), **adapter(), "a/adapter_config.json": '{"peft_type": "NOPE"}'},
        "method.adapters: a: PEFT does not know the peft_type 'NOPE' of adapter_config.json",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter without weights",
        {**model(), **without(adapter(), "a/adapter_model")},
        "method.adapters: a holds no weights (adapter_model.safetensors)",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter with damaged weights",
        {**model(), **adapter(), "a/adapter_model.safetensors": b"abc"},
        "method.adapters: a: adapter_model.safetensors is damaged or cut short "
        "(Error while deserializing header: header too small); copy it again",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter of another family",
        {**model(), **adapter("gpt2")},
        "method.adapters: a was trained on another model: its layers are not in this one",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter of another size",
        {**model(), **adapter(hidden_size=64)},
        "method.adapters: a was trained on another model: 2 of its weights have another shape "
        "(base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight for one)",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter of a deeper model",
        {**model(), **adapter(num_hidden_layers=3)},
        "method.adapters: a was trained on another model: 0 of this model's adapted layers have no weights in it, and "
        "2 of its weights have no layer (base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight for one)",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter of a shallower model",
        {**model(), **adapter(num_hidden_layers=1)},
        "method.adapters: a was trained on another model: 2 of this model's adapted layers have no weights in it, and "
        "0 of its weights have no layer (base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight for one)",
        method=lora(adapters=["a"]),
    ),
    case(
        "an adapter with other positions",
        {
            **model(),
            **adapter(),
            "a/positions.json": '{"type": "yarn", "factor": 2, "before": 256, "after": 512}',
        },
        "method.adapters: a was trained with stretched positions (yarn, 2 times, from 256 to 512 positions), and this "
        "run has stretched positions (linear, 2 times, from 256 to 512 positions); give the same model.rope_scaling",
        method=lora(adapters=["a"]),
        rope_scaling={"type": "linear", "factor": 2},
    ),
]

POSITIONS_AND_ROWS = [
    case(
        "positions that cannot be stretched",
        model("gpt2"),
        "model.rope_scaling: GPT2LMHeadModel has no rotary positions that could be stretched; leave it out",
        rope_scaling={"type": "yarn"},
    ),
    case(
        "a stretch that is too short",
        model(),
        "model.rope_scaling.factor=2 stretches 256 positions to 512, and data.max_length=1,000 is longer; "
        "leave the factor out or lower data.max_length",
        max_length=1000,
        rope_scaling={"type": "linear", "factor": 2},
    ),
    case(
        "a sample longer than the learned positions",
        {**model("gpt2"), "rows.json": json.dumps([{"instruction": "a", "output": "b" * 280}])},
        "GPT2LMHeadModel has 256 positions and the longest sample has 302 tokens; set data.max_length=256",
        max_length=400,
    ),
    case(
        "flat rows of a recurrent model",
        model("mamba"),
        "MambaForCausalLM never calls the attention function that was chosen for it, so segments of a packed row would "
        "see each other; so model.rows=flat is not exact here. Give model.rows=padded or auto",
        method={"type": "full"},
        rows="flat",
    ),
    case(
        "a kernel of another device",
        model(),
        "model.attention=varlen needs a CUDA device; use sdpa (or auto) here",
        attention="varlen",
    ),
]

CASES = [*FOLDERS, *TOKENIZERS, *WEIGHTS, *METHODS, *POSITIONS_AND_ROWS]

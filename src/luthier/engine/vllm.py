"""Generation over vLLM, behind the protocol of the other engine: token ids in, token ids out.

vLLM draws the tokens, by its own random numbers: the same seed gives the same answer again here, and another one than
over transformers. Greedy answers are equal, but for ties. It runs in this process, without its tokenizer; stop strings
are found here, by the same lines as over transformers.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from importlib import util
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig

from luthier.engine.key_values import bytes_per_token
from luthier.engine.protocol import BASE, Decode, Engine
from luthier.engine.row import GrowingAnswer
from luthier.generation import Event, Generation, GenerationError, GenerationSettings, Request, TokenChoice
from luthier.types import ModelError

_SHARE = 0.5
"""Of the free memory, the most that keys and values may take on a CPU where no bound is given."""

_COLDEST = 0.01
"""vLLM raises a temperature between 0 and this to this."""

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM makes room for; the next one above an adapter's holds it."""


class VllmEngine(Engine):
    """Answers with the model in a folder (or of a name on the hub).

    dtype: `float32` and the like. rows: the most that are answered at once. memory: bytes that keys and values may
    take; where absent, vLLM's own share of a GPU, and on a CPU what all rows can need, at most half of what is free.
    decode: tokens to text, for stop strings. adapters: folders of LoRA adapters by name, for requests to choose from;
    the first is the default; on a CPU, answers that are under way together have the same. context: tokens of prompt
    and answer; where absent, all that the model can.

    Raises ModelError where vLLM is not installed, or cannot load the model or an adapter.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        rows: int = 8,
        memory: int | None = None,
        decode: Decode | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        context: int | None = None,
    ) -> None:
        require_vllm()
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # else it reports to its makers
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # answers alone are on stdout
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # a second process outlives a kill
        from vllm import EngineArgs, LLMEngine  # after its settings: it reads them once
        from vllm.exceptions import VLLMError
        from vllm.lora.request import LoRARequest

        adapters = adapters or {}
        ranks = [require_plain_lora(name, Path(path)) for name, path in adapters.items()]
        self._on_cpu = on_cpu = not torch.cuda.is_available()
        arguments = EngineArgs(
            model=model,
            dtype=dtype,  # type: ignore[arg-type, unused-ignore]
            max_num_seqs=rows,
            max_model_len=context,
            skip_tokenizer_init=True,
            generation_config="vllm",  # nothing of the model's own: precedence is decided before
            logprobs_mode="raw_logprobs",
            max_logprobs=-1,
            kv_cache_memory_bytes=_cpu_memory(model, dtype, rows, context)
            if on_cpu and not memory
            else memory,
            enforce_eager=on_cpu,  # compiling takes minutes there
            enable_lora=bool(adapters),
            max_loras=max(1, len(adapters)),
            max_lora_rank=_room(ranks),
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        try:
            self._engine = LLMEngine.from_engine_args(arguments)
            self._lora = {
                name: LoRARequest(name, number, str(path))
                for number, (name, path) in enumerate(adapters.items(), 1)
            }
            for lora in self._lora.values():
                self._engine.add_lora(lora)
        except (ValueError, RuntimeError, OSError, KeyError, ImportError, VLLMError) as error:
            raise ModelError(f"{model}: vLLM could not load it: {error}") from error
        config = self._engine.model_config
        super().__init__(tuple(adapters), config.max_model_len, decode)
        self._vocabulary: int = config.get_vocab_size()
        self._rows = rows
        self._tickets = count()
        self._waiting: deque[GrowingAnswer] = deque()
        self._running: dict[str, GrowingAnswer] = {}

    @property
    def rows(self) -> int:
        return self._rows

    @property
    def choices(self) -> tuple[str, ...]:
        return (*self.adapters, BASE) if self.adapters else ()

    def limit(self, request: Request) -> int:
        room = super().limit(request)
        sampling(request.settings, room)
        foreign = next((token for token in request.prompt if not 0 <= token < self._vocabulary), None)
        if foreign is not None:
            raise GenerationError(
                f"the prompt has token {foreign}, and the model's vocabulary {self._vocabulary} tokens"
            )
        return room

    def submit(self, request: Request) -> int:
        answer = GrowingAnswer(next(self._tickets), request, self.limit(request))
        self._waiting.append(answer)
        return answer.ticket

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def cancel(self, ticket: int) -> Generation | None:
        for answer in self._waiting:
            if answer.ticket == ticket:
                self._waiting.remove(answer)
                return answer.ended("cancelled")
        running = self._running.pop(str(ticket), None)
        if running is None:
            return None
        self._engine.abort_request([str(ticket)])
        return running.ended("cancelled")

    def abandon(self) -> list[int]:
        self._engine.abort_request(list(self._running))
        self._running.clear()
        return [answer.ticket for answer in self._waiting]

    def step(self) -> list[Event]:
        while self._waiting and len(self._running) < self._rows and self._may_join(self._waiting[0]):
            self._begin(self._waiting.popleft())
        events: list[Event] = []
        for output in self._engine.step():
            answer = self._running.get(output.request_id)
            if answer is not None:
                events += self._taken(answer, output.outputs[0])
        return events

    def _may_join(self, answer: GrowingAnswer) -> bool:
        # vLLM's LoRA layers on a CPU give rows without an adapter that of their neighbours.
        under_way = next(iter(self._running.values()), None)
        return not self._on_cpu or under_way is None or self._lora_of(under_way) == self._lora_of(answer)

    def _lora_of(self, answer: GrowingAnswer) -> Any:
        """vLLM's request for the adapter of an answer; None for the base."""
        name = answer.request.adapter
        return self._lora.get(next(iter(self.adapters), BASE) if name is None else name)

    def _begin(self, answer: GrowingAnswer) -> None:
        request = answer.request
        self._running[str(answer.ticket)] = answer
        self._engine.add_request(
            str(answer.ticket),
            {"prompt_token_ids": list(request.prompt)},
            sampling(request.settings, answer.limit),
            lora_request=self._lora_of(answer),
        )

    def _taken(self, answer: GrowingAnswer, output: Any) -> list[Event]:
        """The events of the tokens that vLLM has for an answer, which leaves with its end."""
        wanted, events = answer.request.settings.logprobs, []
        scores: Sequence[Any] = output.logprobs or [None] * len(output.token_ids)
        for token, likeliest in zip(output.token_ids, scores, strict=True):
            events.append(answer.take(_choice(token, likeliest, wanted), self._decode))
            if events[-1].end is not None:
                break
        else:
            if output.finish_reason is not None:
                events.append(
                    answer.take(None, self._decode)
                )  # it gave up: nothing that was asked for ended it
        if events and events[-1].end is not None:
            del self._running[str(answer.ticket)]
            if output.finish_reason is None:  # a stop string
                self._engine.abort_request([str(answer.ticket)])
        return events

    def _beams(self, request: Request) -> Generation:
        self.limit(request)
        raise GenerationError(_NO_BEAMS)


_NO_BEAMS = "num_beams: vLLM's engine searches no beams; use generation.engine=hf"


def require_vllm() -> None:
    """Raise ModelError where vLLM is not installed."""
    if util.find_spec("vllm") is None:
        raise ModelError(
            "generation.engine=vllm needs vLLM, which is not installed: in an environment of its own, "
            "pip install 'luthier[vllm]' on a GPU, or as docs/engines.md says on a CPU; or use generation.engine=hf"
        )


def sampling(settings: GenerationSettings, room: int) -> Any:
    """vLLM's SamplingParams for an answer of at most `room` tokens. Raises GenerationError for what they cannot hold.

    Ends that the model's own files name are not asked for: `stop_ids` has all that hold.
    """
    if settings.num_beams > 1:
        raise GenerationError(_NO_BEAMS)
    if 0 < settings.temperature < _COLDEST:
        raise GenerationError(
            f"temperature={settings.temperature}: vLLM draws at {_COLDEST} or more, or greedily at 0"
        )
    if (
        settings.logprobs is not None
        and settings.logprobs_of == "sampling"
        and settings.temperature not in (0, 1)
    ):
        raise GenerationError(
            f"logprobs_of=sampling at temperature={settings.temperature}: vLLM has log-probabilities before the "
            "temperature alone; draw at temperature 1, or use generation.engine=hf"
        )
    from vllm import SamplingParams
    from vllm.exceptions import VLLMClientError
    from vllm.sampling_params import RequestOutputKind

    seed = settings.seed if settings.seed is not None else secrets.randbits(62)
    try:
        return SamplingParams(
            max_tokens=room,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            seed=seed % 2**63,  # it takes -1 for none
            stop_token_ids=list(settings.stop_ids),
            logprobs=settings.logprobs,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
    except (ValueError, VLLMClientError) as error:
        raise GenerationError(f"vLLM cannot hold these settings: {error}") from error


def _choice(token: int, scores: Mapping[int, Any] | None, wanted: int | None) -> TokenChoice:
    """The token with the log-probabilities that vLLM has of it and of the likeliest ones."""
    if scores is None or wanted is None:
        return TokenChoice(token)
    pairs = [(other, float(score.logprob)) for other, score in scores.items()]
    if len(pairs) > wanted:  # the token itself is not among the likeliest
        pairs = [pair for pair in pairs if pair[0] != token]
    top = sorted(pairs, key=lambda pair: -pair[1])
    return TokenChoice(token, float(scores[token].logprob), tuple(top))


_SAYS_NOTHING: tuple[Any, ...] = (None, False, [], {}, "none")
_READ = frozenset(
    (
        "r",
        "lora_alpha",
        "target_modules",
        "use_rslora",
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "lora_dropout",
        "peft_version",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "auto_mapping",
        "init_lora_weights",
        "megatron_core",
        "qalora_group_size",
    )
)
"""What an adapter's configuration may say: read by vLLM, or without meaning once it is trained."""


def require_plain_lora(name: str, folder: Path) -> int:
    """The rank of a LoRA adapter. Raises ModelError for any other adapter, which vLLM would refuse or misread."""
    try:
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"the adapter {name}={folder}: its adapter_config.json cannot be read") from error
    reasons = [key for key, value in said.items() if key not in _READ and value not in _SAYS_NOTHING]
    if isinstance(said.get("init_lora_weights"), str) and said["init_lora_weights"] != "gaussian":
        reasons.append(f"init_lora_weights {said['init_lora_weights']}")  # some change the base itself
    if said.get("peft_type") != "LORA":
        reasons = [f"type {said.get('peft_type')}"]
    if reasons or said["r"] > _RANKS[-1]:
        why = ", ".join(reasons) or f"rank {said['r']}"
        raise ModelError(
            f"the adapter {name}={folder} is more than vLLM can add to its base ({why}): export it with "
            "`luthier export`, and name the exported folder; or use generation.engine=hf"
        )
    return int(said["r"])


def _room(ranks: Iterable[int]) -> Any:
    largest = max(ranks, default=1)
    return next(room for room in _RANKS if room >= largest)


def _cpu_memory(model: str, dtype: str, rows: int, context: int | None) -> int:
    """Bytes of keys and values: of all rows at full length, at most half of what is free."""
    config: Any = AutoConfig.from_pretrained(model)
    length = context or getattr(config.get_text_config(), "max_position_embeddings", None)
    free = int(psutil.virtual_memory().available * _SHARE)
    if length is None:
        return free
    kind: torch.dtype = getattr(torch, dtype, torch.float32)
    # One block more for each row: they are not shared.
    return min(free, rows * (length + 128) * bytes_per_token(config, kind))

"""A judge as a model of lm-evaluation-harness. Imported where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from luthier.answering import Answerer
from luthier.evaluating.judge import Judge
from luthier.types import GenerationError, GenerationSettings, Request, Sample

_LONGEST = 2048
"""Tokens of a context where the model's config does not say."""
_MAX_NEW = 256
_KNOWN = {
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "num_beams",
    "max_gen_toks",
    "max_new_tokens",
}
_PASSED = ("top_p", "top_k", "min_p", "num_beams")


class JudgeLM(TemplateLM):  # type: ignore[misc]
    """`loglikelihood` and `loglikelihood_rolling` by the flat batches of training, `generate_until` by the engine.

    Tokens are those of the tokenizer's own call, special tokens in the text among them, as lm-eval's model over
    transformers has them. Contexts that are too long lose their beginning.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self._judge = judge
        self.tokenizer: Any = judge.template.tokenizer
        self._answerer: Answerer | None = None
        self.max_length = judge.context_length or _LONGEST

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return self._judge.template.fingerprint

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        begins = add_special_tokens is None or add_special_tokens
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos and string.startswith(bos):
            begins = False
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=begins)
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        samples = [self._sample(context, wanted) for _, context, wanted in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(samples)
        for index, judged in self._judge.judge(samples, greedy=True):
            assert judged.is_greedy is not None
            found[index] = (float(judged.logprobs.astype("float64").sum()), bool(judged.is_greedy.all()))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def _sample(self, context: Sequence[int], wanted: Sequence[int]) -> Sample:
        ids = np.array([*context, *wanted], np.int32)[-self.max_length :]
        weights = np.zeros(len(ids), np.float32)
        weights[max(len(ids) - len(wanted), 0) :] = 1
        return Sample(ids, weights)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        windows, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            parts = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            for context, wanted in map(make_disjoint_window, parts):
                windows.append((("", text), context, wanted))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        if self._answerer is None:
            self._answerer = self._judge.answerer()
        asked = [self._request(text, dict(how)) for text, how in (request.args for request in requests)]
        found = [""] * len(asked)
        for number, answer in self._answerer.engine.answers(asked):
            found[number] = self._answerer.text(answer, skip_special_tokens=True)
        return found

    def _request(self, text: str, how: dict[str, Any]) -> Request:
        unknown = sorted(how.keys() - _KNOWN)
        if unknown:
            raise GenerationError(
                f"generation_kwargs.{unknown[0]}: this engine knows {', '.join(sorted(_KNOWN))}"
            )
        until = how.get("until") or []
        most = int(how.get("max_gen_toks", how.get("max_new_tokens", _MAX_NEW)))
        sampled = bool(how.get("do_sample", float(how.get("temperature", 0.0)) > 0))
        settings = GenerationSettings(
            max_new_tokens=most,
            temperature=float(how.get("temperature", 1.0)) if sampled else 0.0,
            stop=tuple([until] if isinstance(until, str) else until),
            stop_ids=self._judge.template.stop_ids,
            **{name: how[name] for name in _PASSED if name in how},
        )
        room = max(1, self.max_length - most)
        return Request(tuple(self.tok_encode(text)[-room:]), settings)

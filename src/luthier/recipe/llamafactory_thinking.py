"""What a LLaMA-Factory file makes of reasoning: enable_thinking, preserve_thinking, and its rule of history."""

from __future__ import annotations

from luthier.recipe.flat import Flat

REASONING = frozenset(
    {
        "aeva",
        "deepseekr1",
        "ernie_vl",
        "gemma4",
        "gemma4n",
        "glm4_5v",
        "glm4_7",
        "glm4_moe",
        "glm4v",
        "glmz1",
        "gpt_oss",
        "hy3",
        "keye_vl",
        "kimi_vl",
        "mimo",
        "mimo_v2",
        "mimo_vl",
        "minimax2",
        "qwen3",
        "qwen3_5",
        "qwen3_6",
        "qwen3_omni",
        "qwen3_vl",
        "seed_oss",
        "youtu",
    }
)
"""Names of its templates that know reasoning; to the others both keys say nothing there."""

_KEYS = ("enable_thinking", "preserve_thinking")


def _thinking(flat: Flat) -> None:
    """An answer without reasoning gets an empty thought there: learnt by default, else a part of the prompt.

    `enable_thinking: false` takes all reasoning out, null does not. Reasoning of earlier turns stays in conversations
    whose every answer is learnt, and goes where only the last one is (mask_history, preferences, prompts), unless
    `preserve_thinking` is set.
    """
    tree, stage = flat.source.tree, flat.get("stage")
    for key in _KEYS:
        if tree.get(key) is not None:
            flat.flag(key)
    if stage == "pt":
        return
    template = flat.get("template")
    defaults = {"enable_thinking": True, "preserve_thinking": False}
    asked = [key for key in _KEYS if tree.get(key, defaults[key]) is not defaults[key]]
    if not isinstance(template, str) or template not in REASONING:
        if asked and template is None:
            flat.problem(asked[0], "name the template, which decides what this does (template: qwen3)")
        for key in asked:
            if template is not None:
                flat.note(f"{key}: says nothing with template: {template}, there as here")
        return
    enabled = tree.get("enable_thinking", True)
    single = flat.flag("mask_history") or stage != "sft"
    keeps = not single or flat.flag("preserve_thinking")
    if enabled is False:
        flat.put("data.thinking.answers", "none", "enable_thinking")
        keeps = not single
    flat.put("data.thinking.history", "keep" if keeps else "strip", "preserve_thinking")
    flat.put("data.thinking.empty", "learn" if enabled else "prompt", "enable_thinking")
    if not enabled:
        flat.put("data.thinking.enable", False, "enable_thinking")
    if single and keeps:
        flat.note(
            "preserve_thinking: earlier answers without reasoning show an empty thought here, as they were generated"
        )


THINKING_SUBJECTS = (_thinking,)

"""The shapes of calls, in the order in which they are tried on what a template writes."""

from __future__ import annotations

from collections.abc import Callable

from luthier.data.calls import gemma, json_form, named, parameters, python_form
from luthier.data.calls.form import CallForm
from luthier.data.calls.json_form import JsonForm
from luthier.data.calls.parameters import ParameterForm
from luthier.data.calls.probe import NAMES, Frame, Probe

SHAPES: tuple[Callable[[Probe], CallForm | None], ...] = (
    json_form.learn,
    gemma.learn,
    python_form.learn,
    named.learn,
    parameters.learn,
)
KNOWN: tuple[tuple[str, CallForm], ...] = (
    ("<|tool_list_start|>", python_form.LFM2),
    ("<|tool_call_start|>", python_form.LFM2),
    ("<|tool_call_argument_begin|>", named.KIMI),
    (
        "<function=",
        ParameterForm(
            Frame("", "<tool_call>\n<function=", "</function>\n</tool_call>", ""),
            ">",
            "<parameter=",
            ">",
            "</parameter>",
            True,
        ),
    ),
    (
        "<arg_key>",
        ParameterForm(
            Frame("", "<tool_call>", "</tool_call>", ""),
            "",
            "<arg_key>",
            "</arg_key>\n<arg_value>",
            "</arg_value>",
            False,
        ),
    ),
    ("<tool_call>", JsonForm("<tool_call>", "</tool_call>", "name", "arguments")),
    ("[AVAILABLE_TOOLS]", JsonForm("[TOOL_CALLS]", "", "name", "arguments")),
)
"""Marks in templates that show tools but no calls, and what their models write."""


def learn(probe: Probe) -> CallForm | None:
    """The form that a template writes calls in; None where it is none of these."""
    if NAMES[0] not in probe.one:
        return known(probe.source)
    return next((form for shape in SHAPES if (form := shape(probe)) is not None), None)


def known(source: str) -> CallForm | None:
    """The form that goes with the marks of a template, where it has a place for tools."""
    if "tools" not in source:
        return None
    return next((form for mark, form in KNOWN if mark in source), None)

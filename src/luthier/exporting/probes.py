"""Conversations of a run's own data, on which the written model is compared with the trained one."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import Image

from luthier.data.encode import media_of
from luthier.data.formats import to_row
from luthier.data.prepare import split_rows
from luthier.data.read import RawRow, read_rows
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.data.template import ChatTemplate
from luthier.recipe.schema import Recipe
from luthier.samples import MediaOpener
from luthier.types import Conversation, DataError, Media, Message, RowError, RowKind

LONGEST = 256
"""Tokens of a probe; what is longer is cut at its end."""

BUILT_IN = (
    ("Name three colours of the rainbow.", "Red, green and violet."),
    ("What is 12 times 12?", "12 times 12 is 144."),
    ("Translate 'good morning' into French.", "Bonjour."),
    ("Write one sentence about the sea.", "The sea was calm that morning, and the boats lay still."),
)


@dataclass(frozen=True, slots=True)
class Probe:
    """One text of at least two tokens: `ids` all of it, `prompt` what an answer is generated from; both show `media`,
    which `opener` opens."""

    ids: tuple[int, ...]
    prompt: tuple[int, ...]
    text: str
    conversation: Conversation | None = None
    media: tuple[Media, ...] = ()
    opener: MediaOpener | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Probes:
    """Probes and where they are from."""

    probes: tuple[Probe, ...]
    origin: str


def probes_of(recipe: Recipe | None, template: ChatTemplate, kind: RowKind, count: int) -> Probes:
    """The first rows of `data.eval`, else of the rows that `data.dev_split` held out, else of `data.train`.

    Short built-in conversations where there is no such data any more: the origin says so. Of a model that takes
    images, one of them at least has an image, a built-in one where the first rows have none.
    """
    found = _probes_of(recipe, template, kind, count)
    if any(probe.media for probe in found.probes):
        return found
    shown = _of_conversation(_picture(), template) if template.opener is not None else None
    if shown is None:
        return found
    return Probes((*found.probes, shown), f"{found.origin}, and a built-in picture")


def _picture() -> Conversation:
    """A question about an image whose colours run from left to right and from top to bottom."""
    across, down = np.meshgrid(np.linspace(0, 255, 112), np.linspace(0, 255, 84))
    pixels = np.stack([across, down, 255 - across], axis=-1).astype(np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    source = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    question = Message("user", "Which colours are in the picture?", media=(Media("image", source),))
    return Conversation((question, Message("assistant", "Blue, red and yellow.")))


def _probes_of(recipe: Recipe | None, template: ChatTemplate, kind: RowKind, count: int) -> Probes:
    if recipe is not None and (recipe.data.train or recipe.data.eval):
        try:
            origin, rows = _rows(recipe)
            probes = tuple(islice(_encoded(rows, template, kind), count))
            if probes:
                return Probes(probes, origin)
            why = f"no row of {origin} can be used"
        except (DataError, OSError) as error:
            why = str(error)
    else:
        why = "the source names no data"
    given = [Conversation((Message("user", q), Message("assistant", a))) for q, a in BUILT_IN]
    made = (_of_conversation(one, template) for one in given)
    probes = tuple(probe for probe in islice(made, count) if probe is not None)
    if not probes:  # a template that wants something else than questions and answers
        probes = tuple(_of_text(answer, template) for _, answer in BUILT_IN)
    return Probes(probes, f"built-in texts ({why})")


_Rows = Iterator[tuple[RawRow, DatasetAttr]]


def _rows(recipe: Recipe) -> tuple[str, _Rows]:
    spec = recipe.data
    if spec.eval:
        return "data.eval", _read(resolve_datasets(spec.eval, spec), recipe)
    attrs = resolve_datasets(spec.train, spec)
    if not spec.dev_split:
        return "data.train", _read(attrs, recipe)
    _, held_out = split_rows(sum(1 for _ in _read(attrs, recipe)), spec.dev_split, recipe.train.seed)
    wanted = set(held_out.tolist())
    rows = ((position, row) for position, row in enumerate(_read(attrs, recipe)) if position in wanted)
    return "data.dev_split", (row for _, row in rows)


def _read(attrs: Sequence[DatasetAttr], recipe: Recipe) -> _Rows:
    model = recipe.model
    for attr in attrs:
        rng = np.random.RandomState(recipe.train.seed)  # as the preparation draws `num_samples`
        for raw in read_rows(
            attr, max_samples=recipe.data.max_samples, rng=rng, cache_dir=model.cache_dir, token=model.token
        ):
            yield raw, attr


def _encoded(rows: _Rows, template: ChatTemplate, kind: RowKind) -> Iterator[Probe]:
    for raw, attr in rows:
        try:
            row = to_row(raw, attr, kind)
        except RowError:  # left out of the training, too
            continue
        if row.text is not None:
            yield _of_text(row.text, template)
            continue
        for conversation in (row.conversation, row.rejected):
            probe = None if conversation is None else _of_conversation(conversation, template)
            if probe is not None:
                yield probe


def _of_text(text: str, template: ChatTemplate) -> Probe:
    ids = tuple(template.document(text))[:LONGEST]
    return Probe(ids, ids[: max(1, len(ids) // 2)], text)


def _of_conversation(conversation: Conversation, template: ChatTemplate) -> Probe | None:
    """None for a conversation that the template has no place for, as in the training."""
    try:
        encoded, text = template.encode(conversation), template.rendering(conversation)
    except DataError:
        return None
    ids = tuple(encoded.input_ids)
    start = encoded.answers[-1].start if encoded.answers else len(ids) // 2
    if encoded.media:  # which are never cut
        last = encoded.media[-1][1]
        if start < last:
            return None
        media = media_of(conversation)
        return Probe(ids[: last + LONGEST], ids[:start], text, conversation, media, template.opener)
    return Probe(ids[:LONGEST], ids[max(0, start - LONGEST) : max(start, 1)], text, conversation)

"""Conversations with media: tokens as the model's processor makes them, masks, cuts, batches."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLConfig

from luthier.check.tokens import show_sample
from luthier.data.collate import branch_batch, flat_batch
from luthier.data.encode import CUT_MEDIA, EncodeOptions, sft_sample
from luthier.data.gate import gate
from luthier.data.media_template import MediaTemplate, load_media_template
from luthier.data.pairs import feedback_sample, pair_sample
from luthier.data.processors import load_processor
from luthier.data.table import SampleTable
from luthier.recipe.schema import DataSpec
from luthier.types import Conversation, DataError, Media, Message, ModelError, Row, Sample
from tests.media import Kind, picture, tiny_processor

PIXELS = ((40, 30), (90, 60), (200, 28), (333, 500))

Load = Callable[..., MediaTemplate]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(kind: Kind, **spec: Any) -> MediaTemplate:
        processor = tiny_processor(kind, tmp_path / kind)
        return load_media_template(processor.tokenizer, processor, DataSpec(**spec))

    return loaded


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    return [str(picture(tmp_path / f"{k}.png", *size, seed=k)) for k, size in enumerate(PIXELS)]


def _asked(pictures: Sequence[str], text: str = "Compare  them.", answer: str = "Same.") -> Conversation:
    """One image before the text, one behind its first word, and the others at the end of a second question."""
    first = Message("user", text, media=(Media("image", pictures[0]), Media("image", pictures[1], 8)))
    more = Message("user", "And?", media=tuple(Media("image", one, 4) for one in pictures[2:]))
    return Conversation((first, Message("assistant", answer), more, Message("assistant", "Yes.")))


def _parts(text: str) -> list[dict[str, str]]:
    image = {"type": "image"}
    return [image, {"type": "text", "text": text[:8]}, image, {"type": "text", "text": text[8:]}]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_tokens_are_those_of_the_processor(kind: Kind, load: Load, pictures: list[str]) -> None:
    template = load(kind)
    processor: Any = template.reader.processor
    messages = [
        {"role": "user", "content": _parts("Compare  them.")},
        {"role": "assistant", "content": "Same."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image"}, {"type": "image"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [Image.open(one).convert("RGB") for one in pictures]
    expected = processor(text=text, images=images, add_special_tokens=False)
    encoded = template.encode(_asked(pictures))
    assert encoded.input_ids == list(expected["input_ids"][0])
    assert [template.decode(encoded.input_ids[a.start : a.stop])[:4] for a in encoded.answers] == [
        "Same",
        "Yes.",
    ]

    sample = Sample(
        np.asarray(encoded.input_ids, np.int32),
        np.ones(len(encoded.input_ids), np.float32),
        media=tuple(Media("image", one) for one in pictures),
        opener=template.reader,
    )
    batch = flat_batch([sample])
    tensors = processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
    names = set(tensors) - {"input_ids", "attention_mask"}
    assert set(batch.media) == names
    for name in names:
        assert batch.media[name].equal(tensors[name]), name


@pytest.mark.parametrize("kind", get_args(Kind))
def test_places_hold_exactly_the_tokens_of_each_image(kind: Kind, load: Load, pictures: list[str]) -> None:
    template = load(kind)
    encoded = template.encode(_asked(pictures))
    counts = {
        "qwen2_5_vl": [1, 6, 7, 12],  # of 28 x 28 pixels each, at most 16
        "gemma3": [4] * 4,
        "llava": [4] * 4,
    }[kind]
    assert [stop - start for start, stop in encoded.media] == counts
    inside = {k for start, stop in encoded.media for k in range(start, stop)}
    stands = template.reader.token_ids()
    assert inside == {k for k, index in enumerate(encoded.input_ids) if index in stands}


def test_the_prompt_of_every_answer_is_a_prefix_with_its_images(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    conversation = _asked(pictures)
    encoded = template.encode(conversation)
    for answer in encoded.answers:
        prompt = template.prompt(Conversation(conversation.messages[: answer.message]))
        assert prompt == encoded.input_ids[: answer.start]


def test_the_gate_compares_with_the_processor(
    load: Load, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    template = load("qwen2_5_vl")
    row = Row("pictures", 3, _asked(pictures))
    assert gate(template, [row]) == 1
    ours = template.reader.expansion

    def one_more(media: Media) -> str:
        return ours(media) + "<|image_pad|>" * (media.source == pictures[1])

    monkeypatch.setattr(template.reader, "expansion", one_more)
    with pytest.raises(
        DataError, match=r"data set 'pictures', row 3: the model's processor makes \d+ tokens"
    ):
        gate(template, [row])


def test_a_users_placeholder_stays_text(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    conversation = _asked(pictures, text="What is <|image_pad|> there?")
    encoded = template.encode(conversation)
    assert [stop - start for start, stop in encoded.media] == [1, 6, 7, 12]
    assert "What is <|vision_start|>" in template.decode(encoded.input_ids)
    assert gate(template, [Row("rows", 0, conversation)]) == 1
    parsed = load("qwen2_5_vl", parse_special_tokens=True)
    dropped = sft_sample(Row("rows", 0, conversation), parsed, EncodeOptions(999, "drop"))
    assert dropped.lost.dropped == "the template does not show every image, film and sound once"


def test_a_template_without_media_is_given_the_models_own_placeholders(
    load: Load, pictures: list[str]
) -> None:
    named = load("qwen2_5_vl", template="chatml")
    own = load("qwen2_5_vl")
    conversation = _asked(pictures)
    assert "<|vision_start|><|image_pad|><|vision_end|>" in named.rendering(conversation)
    assert named.encode(conversation).media == own.encode(conversation).media
    saved = named.reader.processor.apply_chat_template(named.messages(conversation), tokenize=False)
    assert saved == named.rendering(conversation)
    assert gate(named, [Row("rows", 0, conversation)]) == 1


def test_a_template_of_lists_alone_takes_plain_text(tmp_path: Path) -> None:
    processor: Any = tiny_processor("llava", tmp_path / "llava")
    plain = processor.chat_template
    processor.chat_template = plain.replace(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}", ""
    )
    processor.chat_template = processor.chat_template.replace(
        "{% endfor %}{% endif %}<|im_end|>", "{% endfor %}<|im_end|>"
    )
    template = load_media_template(processor.tokenizer, processor, DataSpec())
    said = Conversation((Message("user", "Hello"), Message("assistant", "Hi")))
    assert (
        template.rendering(said) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    )
    assert template.end_token_ids == (processor.tokenizer.eos_token_id,)


def _options(length: int, overflow: Any = "drop", **rules: Any) -> EncodeOptions:
    return EncodeOptions(length, overflow, **rules)


def test_tokens_of_media_are_never_targets(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    (sample,) = sft_sample(
        Row("rows", 0, _asked(pictures)), template, _options(999, train_on_prompt=True)
    ).samples
    stands = np.isin(sample.input_ids, list(template.reader.token_ids()))
    assert stands.sum() == 26
    np.testing.assert_array_equal(sample.weights, np.where(stands, 0, 1))
    assert [one.source for one in sample.media] == pictures


@pytest.mark.parametrize("overflow", ["truncate", "split"])
def test_media_are_never_cut(overflow: str, load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    row = Row("rows", 0, _asked(pictures, answer="Same as before, and before that, and so on."))
    whole = template.encode(row.conversation)  # type: ignore[arg-type]  # it has one
    stands, fates = list(template.reader.token_ids()), set()
    for length in range(8, len(whole.input_ids) + 2):
        encoded = sft_sample(row, template, _options(length, overflow))
        fates.add(encoded.lost.dropped)
        for sample in encoded.samples:
            counts = [stop - start for start, stop in whole.media]
            held = sum(counts[pictures.index(str(one.source))] for one in sample.media)
            assert int(np.isin(sample.input_ids, stands).sum()) == held
    assert {CUT_MEDIA, None} <= fates


def test_answers_share_the_images_of_their_prompt(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    better = _asked(pictures)
    worse = Conversation((*better.messages[:-1], Message("assistant", "No.")))
    encoded = pair_sample(Row("rows", 0, better, rejected=worse), template, _options(999))
    (pair,) = SampleTable.of(enumerate(encoded.samples)).with_opener(template.reader)
    assert [one.source for one in pair.media] == pictures
    shared, copied = (branch_batch([pair, pair], share_prompts=share) for share in (True, False))
    alone = flat_batch([Sample(pair.input_ids, pair.weights, media=pair.media, opener=pair.opener)])
    for batch, times in ((shared, 2), (copied, 4)):
        assert batch.media["image_grid_thw"].equal(alone.media["image_grid_thw"].repeat(times, 1))
        assert batch.media["pixel_values"].equal(alone.media["pixel_values"].repeat(times, 1))
        stands = np.isin(batch.input_ids[0].numpy(), list(template.reader.token_ids()))
        assert batch.media["mm_token_type_ids"][0].tolist() == stands.astype(int).tolist()
        assert stands.sum() == 26 * times

    other = Conversation((_asked(pictures[::-1]).messages[0], *worse.messages[1:]))
    lost = pair_sample(Row("rows", 0, better, rejected=other), template, _options(999)).lost
    assert lost.dropped == "prompts of chosen and rejected differ"
    for length in (40, 70):
        lost = pair_sample(
            Row("rows", 0, better, rejected=worse), template, _options(length, "truncate")
        ).lost
        assert lost.dropped == CUT_MEDIA
    (one,) = feedback_sample(Row("rows", 0, better, desirable=True), template, _options(999)).samples
    assert [medium.source for medium in one.media] == pictures


def test_a_table_keeps_media_by_row_and_order(load: Load, pictures: list[str], tmp_path: Path) -> None:
    film = Media("video", (pictures[0], pictures[1]))
    ids, weights = np.arange(4, dtype=np.int32), np.ones(4, np.float32)
    samples = [
        Sample(ids, weights, "a", k, media=media) for k, media in enumerate([(), (film,), (film, film)])
    ]
    table = SampleTable.of(enumerate(samples), "a")
    assert [sample.media for sample in table] == [(), (film,), (film, film)]
    assert table[1].opener is None
    reader = load("llava").reader
    taken = (
        SampleTable.concat([table.with_opener(reader)], [3]).take_rows(np.array([2, 0])).with_groups([[0, 1]])
    )
    assert [(sample.index, sample.media, sample.opener) for sample in taken] == [
        (2, (film, film), reader),
        (0, (), reader),
    ]
    with pytest.raises(DataError, match=r"data set 'a', row 1: nothing was given that opens its media"):
        flat_batch(table[0:2])


def test_an_image_that_changes_after_it_was_counted_names_its_row(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    encoded = sft_sample(Row("rows", 7, _asked(pictures)), template, _options(999))
    (sample,) = SampleTable.of(enumerate(encoded.samples), "rows").with_opener(template.reader)
    Path(pictures[1]).unlink()
    with pytest.raises(DataError, match=rf"'rows' row 7.*image file is missing: {pictures[1]}"):
        flat_batch([sample])
    picture(Path(pictures[1]), 300, 300)
    with pytest.raises(DataError, match=r"'rows' row 7.*another size than when"):
        flat_batch([sample])


def test_a_template_goes_to_other_processes(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    conversation = _asked(pictures)
    encoded = template.encode(conversation)
    sent = pickle.loads(pickle.dumps(template))
    assert sent.fingerprint == template.fingerprint
    assert sent.encode(conversation) == encoded
    medium = [Media("image", pictures[1])]
    ids = torch.tensor([encoded.input_ids[slice(*encoded.media[1])]])
    ours, theirs = template.reader(medium, ids), sent.reader(medium, ids)
    assert ours["pixel_values"].equal(theirs["pixel_values"])
    smaller = load("qwen2_5_vl", media={"image_max_pixels": 1500})
    assert smaller.fingerprint != template.fingerprint
    # 1,500 pixels are less than two tokens, and no edge is shorter than one.
    assert [stop - start for start, stop in smaller.encode(conversation).media] == [1, 1, 3, 1]


def test_a_processor_is_loaded_from_the_models_folder(tmp_path: Path) -> None:
    config = Qwen2_5_VLConfig()
    assert load_processor(str(tmp_path), {}, config) is None  # no file of one
    made: Any = tiny_processor("qwen2_5_vl", tmp_path)
    found: Any = load_processor(str(tmp_path), {}, config)
    assert type(found).__name__ == "Qwen2_5_VLProcessor"
    assert found.image_processor.to_dict() == made.image_processor.to_dict()
    assert load_processor(str(tmp_path), {}, config.get_text_config()) is None
    (tmp_path / "processor_config.json").write_text(
        '{"processor_class": "LlavaProcessor", "image_processor": {}}'
    )
    with pytest.raises(ModelError, match="its processor LlavaProcessor could not be loaded"):
        load_processor(str(tmp_path), {}, config)


def test_check_shows_the_tokens_of_an_image_as_one(load: Load, pictures: list[str]) -> None:
    template = load("qwen2_5_vl")
    (sample,) = sft_sample(Row("rows", 0, _asked(pictures)), template, _options(999)).samples
    shown = show_sample(sample, template)
    runs = [token.text for token in shown.tokens if token.text.startswith("<|image_pad|>")]
    assert runs == ["<|image_pad|>", *(f"<|image_pad|> x {n}" for n in (6, 7, 12))]
    assert len(shown.tokens) == len(sample) - 26 + 4
    assert shown.learnt == int((sample.weights > 0).sum())

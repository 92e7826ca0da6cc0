"""Columns and parts of rows that name images, films and sounds."""

from __future__ import annotations

import base64
import json
import os
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from luthier.data.encode import EncodeOptions, sft_sample
from luthier.data.formats import require_kind, to_row
from luthier.data.media_files import Extent, Film, MediaRules, fitted_size, measure, opened
from luthier.data.media_template import MediaTemplate, load_media_template
from luthier.data.prepare import Preparation, prepare
from luthier.data.read import RawRow
from luthier.data.registry import DatasetAttr, resolve_datasets
from luthier.data.template import load_template
from luthier.recipe.media import MediaSpec
from luthier.recipe.schema import ColumnSpec, DatasetSpec, DataSpec
from luthier.types import DataError, Media, Message, Row, RowError
from tests.media import picture, tiny_processor
from tests.tiny import chat_tokenizer

Attr = DatasetAttr


def _attr(folder: Path, formatting: Any = "openai", **columns: str) -> Attr:
    file = folder / "rows.json"
    file.write_text("[{}]")
    named = ColumnSpec(**columns)
    (attr,) = resolve_datasets(
        [DatasetSpec(file_name=file.name, formatting=formatting, columns=named)],
        DataSpec(directory=str(folder)),
    )
    return attr


def _row(attr: Attr, row: dict[str, Any], kind: Any = "conversation") -> Row:
    return to_row(RawRow(4, "rows.json, row 4", row), attr, kind)


def _messages(attr: Attr, row: dict[str, Any]) -> tuple[Message, ...]:
    conversation = _row(attr, row).conversation
    assert conversation is not None
    return conversation.messages


ANSWER = {"role": "assistant", "content": "Yes."}


def test_tags_become_places_in_order(tmp_path: Path) -> None:
    attr = _attr(tmp_path, images="images", videos="videos")
    user = {"role": "user", "content": "See <image> and\n<video> or <image>?"}
    first, _, last, _ = _messages(
        attr,
        {
            "messages": [user, ANSWER, {"role": "user", "content": "<image>!"}, ANSWER],
            "images": ["a.png", "b.png", str(tmp_path / "c.png")],
            "videos": [["f/0.png", "f/1.png"]],
        },
    )
    at = str(tmp_path)
    assert first.content == "See  and\n or ?"
    assert first.media == (
        Media("image", f"{at}/a.png", 4),
        Media("video", (f"{at}/f/0.png", f"{at}/f/1.png"), 9),
        Media("image", f"{at}/b.png", 13),
    )
    assert (last.content, last.media) == ("!", (Media("image", f"{at}/c.png", 0),))


def test_media_without_tags_come_in_front_of_the_first_question(tmp_path: Path) -> None:
    attr = _attr(tmp_path, "alpaca", images="images", audios="sound", system="system")
    row = {
        "instruction": "Who?",
        "output": "Me.",
        "system": "Be brief.",
        "images": "a.png",
        "sound": ["b.wav"],
    }
    system, user, _ = _messages(attr, row)
    assert system.media == ()
    assert (user.content, user.media) == (
        "Who?",
        (Media("image", str(tmp_path / "a.png")), Media("audio", str(tmp_path / "b.wav"))),
    )


def test_tags_are_text_where_no_column_of_their_kind_is(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "Is <image> HTML?"}, ANSWER], "images": ["a.png"]}
    (user, _) = _messages(_attr(tmp_path), row)
    assert (user.content, user.media) == ("Is <image> HTML?", ())


def test_parts_of_openais_form(tmp_path: Path) -> None:
    attr = _attr(tmp_path, images="images")
    data = "data:image/png;base64," + base64.b64encode(b"x").decode()
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "one"},
        {"type": "image_url", "image_url": {"url": data}},
        {"type": "text", "text": " two"},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": "UklG", "format": "wav"}},
        {"type": "video", "video": ["0.png", "1.png"]},
    ]
    (user, _) = _messages(
        attr, {"messages": [{"role": "user", "content": parts}, ANSWER], "images": ["c.png"]}
    )
    at = str(tmp_path)
    assert user.content == "one two"
    assert user.media == (
        Media("image", f"{at}/a.png", 0),
        Media("image", data, 3),
        Media("image", f"{at}/c.png", 7),
        Media("audio", "data:audio/wav;base64,UklG", 7),
        Media("video", (f"{at}/0.png", f"{at}/1.png"), 7),
    )


def test_bytes_of_a_parquet_file_are_taken(tmp_path: Path) -> None:
    attr = _attr(tmp_path, images="images")
    (user, _) = _messages(
        attr,
        {
            "messages": [{"role": "user", "content": "<image>"}, ANSWER],
            "images": [{"bytes": picture(tmp_path / "a.png").read_bytes(), "path": None}],
        },
    )
    assert measure(user.media[0], MediaRules()) == Extent("image", 40, 30)


@pytest.mark.parametrize(
    ("content", "images", "reason"),
    [
        ("<image><image>", ["a.png"], "images of the row and their places in its text differ in number"),
        ("<image>", [], "images of the row and their places in its text differ in number"),
        ("<image>", ["a.png", "b.png"], "images of the row and their places in its text differ in number"),
        ("<image>", ["https://a.example/b.png"], "image is named by a web address, and nothing is fetched: download it "
         "and give its path"),
        ("<image>", [7], "image is neither a path nor a data: URL"),
        ([{"type": "image_url", "image_url": {"url": "HTTP://a.example"}}], None, "image is named by a web address, "
         "and nothing is fetched: download it and give its path"),
        ([{"type": "smell"}], None, "content is not text"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(content: Any, images: Any, reason: str, tmp_path: Path) -> None:
    attr = _attr(tmp_path, images="images")
    with pytest.raises(RowError) as error:
        _row(attr, {"messages": [{"role": "user", "content": content}, ANSWER], "images": images})
    assert error.value.reason == reason
    assert "rows.json, row 4" in str(error.value)


def test_answers_of_a_pair_have_the_same_media(tmp_path: Path) -> None:
    (attr,) = resolve_datasets(
        [
            DatasetSpec(
                file_name=_attr(tmp_path).path,
                ranking=True,
                columns=ColumnSpec(chosen="chosen", rejected="rejected", images="images"),
            )
        ],
        DataSpec(),
    )
    row = {
        "instruction": "<image>Who?",
        "chosen": "Me.",
        "rejected": "You.",
        "images": [str(tmp_path / "a.png")],
    }
    found = _row(attr, row, "pair")
    assert found.conversation is not None
    assert found.rejected is not None
    assert found.conversation.messages[0] == found.rejected.messages[0]
    assert found.rejected.messages[0].media == (Media("image", str(tmp_path / "a.png")),)


def test_pretraining_refuses_media(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'rows' has columns of images.*stage 'pt' learns text alone"):
        require_kind(_attr(tmp_path, images="images"), "text", "pt")


def test_pretraining_refuses_media_inside_of_messages(tmp_path: Path) -> None:
    attr = _attr(tmp_path)
    parts = [{"type": "text", "text": "See "}, {"type": "image", "image": "a.png"}]
    with pytest.raises(
        DataError, match=r"rows\.json, row 4: it holds images.*stage 'sft', or leave them out"
    ):
        _row(attr, {"messages": [{"role": "user", "content": parts}]}, "text")
    row = _row(attr, {"messages": [{"role": "user", "content": parts[:1]}]}, "text")
    assert row.text == "See "


# --------------------------------------------------------------------------------------------------
# Files


def test_limits_keep_the_shape() -> None:
    assert fitted_size(4000, 3000, None, 768 * 768) == (886, 665)
    assert fitted_size(10, 20, 32 * 32, None) == (22, 45)
    assert fitted_size(100, 50, 100, 5000) == (100, 50)
    least = MediaRules.of(MediaSpec(), llamafactory=True)
    assert (least.image_pixels, least.video_pixels) == ((1024, 768 * 768), (256, 256 * 256))
    # Our own recipes leave it to the processor.
    assert MediaRules.of(MediaSpec(image_max_pixels=5000)).image_pixels == (None, None)


def test_an_image_is_opened_as_it_was_measured(tmp_path: Path) -> None:
    turned = Image.new("L", (60, 40))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    for upright, size in ((True, (40, 60)), (False, (60, 40))):
        rules = MediaRules(upright=upright)
        image = opened(Media("image", str(tmp_path / "turned.jpg")), rules)
        assert isinstance(image, Image.Image)
        assert (image.size, image.mode) == (size, "RGB")
        assert measure(Media("image", str(tmp_path / "turned.jpg")), rules) == Extent("image", *size)
    frames = Media("video", tuple(str(picture(tmp_path / f"{k}.png", 90, 60)) for k in range(3)))
    rules = MediaRules(video_pixels=(None, 1350), video_fps=4.0)
    film = opened(frames, rules)
    assert isinstance(film, Film)
    assert [frame.size for frame in film.frames] == [(45, 30)] * 3
    assert measure(frames, rules) == Extent("video", 45, 30, frames=3, fps=4.0)


def _broken(folder: Path) -> dict[str, str]:
    for name in ("whole.jpg", "whole.png"):
        picture(folder / name, 200, 200)
        content = (folder / name).read_bytes()
        (folder / name.replace("whole", "half")).write_bytes(content[: len(content) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "empty.wav").write_bytes(b"")
    return {
        "half.jpg": "image file is broken",
        "half.png": "image file is broken",
        "text.png": "image file is broken",
        "none.png": "image file is missing",
        ".": "image file is broken",
    }


def test_a_file_that_cannot_be_opened_in_training_is_found_before(tmp_path: Path) -> None:
    for name, reason in _broken(tmp_path).items():
        with pytest.raises(RowError) as error:
            measure(Media("image", str(tmp_path / name)), MediaRules())
        assert error.value.reason == reason, name
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(RowError, match=r"image file is broken: data:"):
        measure(Media("image", "data:image/png;base64,!!"), MediaRules())
    measure(Media("image", str(tmp_path / "whole.jpg")), MediaRules())


def _sound(file: Path, rate: int, channels: int) -> np.ndarray[Any, Any]:
    data = np.random.default_rng(0).integers(-9000, 9000, (800, channels), np.int16)
    with wave.open(str(file), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(2)
        stream.setframerate(rate)
        stream.writeframes(data.tobytes())
    return data


def test_a_sound_is_its_samples_between_minus_one_and_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    data = _sound(tmp_path / "a.wav", 16000, 2)
    medium = Media("audio", str(tmp_path / "a.wav"))
    samples = opened(medium, MediaRules())
    assert isinstance(samples, np.ndarray)
    np.testing.assert_allclose(samples, data.mean(axis=1) / 32768, rtol=1e-6)
    assert measure(medium, MediaRules()) == Extent("audio", samples=800)
    _sound(tmp_path / "b.wav", 8000, 1)
    with pytest.raises(
        DataError,
        match=r"b\.wav: it has 8000 samples a second and the model wants 16000.*soxr.*pip install 'luthier\[media\]'",
    ):
        opened(Media("audio", str(tmp_path / "b.wav")), MediaRules())
    with pytest.raises(RowError, match=r"audio file is missing: .*none\.wav"):
        opened(Media("audio", str(tmp_path / "none.wav")), MediaRules())


def test_a_film_file_names_what_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(
        DataError,
        match=r"a\.mp4: film files need PyAV, which is not installed: pip install 'luthier\[media\]'",
    ):
        measure(Media("video", str(tmp_path / "a.mp4")), MediaRules())


# --------------------------------------------------------------------------------------------------
# From file to table


def _template(folder: Path, data: DataSpec) -> MediaTemplate:
    processor = tiny_processor("qwen2_5_vl", folder / "processor")
    return load_media_template(processor.tokenizer, processor, data)


def _preparation(template: Any) -> Preparation:
    options = EncodeOptions(512, "drop")
    return Preparation(
        encode=lambda row, template: sft_sample(row, template, options),
        template=template,
        kind="conversation",
        identity={"stage": "sft"},
        seed=0,
    )


@pytest.fixture
def data(tmp_path: Path) -> DataSpec:
    """Five rows, of which one names no file and one a broken one."""
    _broken(tmp_path)
    names = ["whole.png", "none.png", "whole.jpg", "half.jpg", None]
    rows = [
        {
            "instruction": "<image>What?" if name else "What?",
            "input": "",
            "output": f"It {k}.",
            "images": [name] if name else None,
        }
        for k, name in enumerate(names)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    spec = DatasetSpec(file_name="rows.json", columns=ColumnSpec(images="images"))
    return DataSpec(train=(spec,), directory=str(tmp_path), cache=str(tmp_path / "cache"), max_lost=None)


def test_rows_with_images_become_samples(data: DataSpec, tmp_path: Path) -> None:
    how = _preparation(_template(tmp_path, data))
    done: list[int] = []
    prepared = prepare(data, how, lambda name, count: done.append(count))
    (report,) = prepared.reports
    assert report.dropped == {"image file is missing": 1, "image file is broken": 1}
    assert report.examples == {"image file is missing": [1], "image file is broken": [3]}
    assert [[one.source for one in sample.media] for sample in prepared.train] == [
        [str(tmp_path / "whole.png")], [str(tmp_path / "whole.jpg")], []
    ]  # fmt: skip
    assert all(sample.opener is how.opener for sample in prepared.train)
    assert done == [5]

    again = prepare(data, how, lambda name, count: done.append(count))
    assert done == [5]  # from the cache
    assert [sample.media for sample in again.train] == [sample.media for sample in prepared.train]
    assert len(again.train) == 3
    os.utime(tmp_path / "whole.png", ns=(1, 1))
    prepare(data, how, lambda name, count: done.append(count))
    assert done == [5, 5]


def test_a_start_with_nothing_new_reads_no_row(
    data: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read to know their media, and to be encoded; then neither, until a file is another one."""
    from luthier.data import prepare as module

    read: list[int] = []

    def counted(own: Any) -> Any:
        def reading(*args: Any, **options: Any) -> Any:
            read.append(1)
            return own(*args, **options)

        return reading

    monkeypatch.setattr(module, "read_rows", counted(module.read_rows))
    monkeypatch.setattr(module, "unread_rows", counted(module.unread_rows))
    monkeypatch.chdir(tmp_path)
    how = _preparation(_template(tmp_path, data))

    def reads() -> int:
        read.clear()
        prepare(data, how)
        return len(read)

    assert (reads(), reads()) == (2, 0)
    (tmp_path / "whole.png").write_bytes((tmp_path / "whole.png").read_bytes() + b"more")
    assert (reads(), reads()) == (1, 0)
    picture(tmp_path / "none.png")  # which was missing
    assert (reads(), reads()) == (1, 0)
    assert prepare(data, how).reports[0].dropped == {"image file is broken": 1}
    # A file of the same name in a folder that is looked into first: the other one has not changed.
    spec = data.model_copy(update={"media": MediaSpec(directory=str(tmp_path / "photos"))})
    (tmp_path / "photos").mkdir()
    assert len(prepare(spec, how).train[0].media) == 1
    picture(tmp_path / "photos" / "whole.png", 60, 60)
    assert [one.source for one in prepare(spec, how).train[0].media] == [str(tmp_path / "photos/whole.png")]
    # An index that cannot be read is written again; one row more makes another.
    (index,) = (tmp_path / "cache").glob("media-*.json")
    assert json.loads(index.read_text()) == ["whole.png", "none.png", "whole.jpg", "half.jpg"]
    index.write_text("[")
    assert (reads(), reads()) == (1, 0)
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0]]))
    assert (reads(), reads()) == (2, 0)


def test_a_model_that_reads_text_alone_refuses_images(data: DataSpec) -> None:
    template = load_template(chat_tokenizer(), data)
    with pytest.raises(DataError, match=r"row 0: the data has images.*no processor.*leave columns\.images"):
        prepare(data, _preparation(template))


def test_films_without_torchvision_say_so(data: DataSpec, tmp_path: Path) -> None:
    template = _template(tmp_path, data)
    film = Media("video", (str(tmp_path / "whole.png"),) * 2)
    if template.reader.takes("video"):
        assert "<|video_pad|>" in template.reader.expansion(film)
    else:
        with pytest.raises(DataError, match=r"takes none here.*pip install torchvision"):
            template.reader.expansion(film)

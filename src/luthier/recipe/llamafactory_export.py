"""The export keys of a LLaMA-Factory file: where the merged model goes, in which type, in files of which size."""

from __future__ import annotations

from luthier.recipe.flat import Flat
from luthier.recipe.key_rules import Rule
from luthier.recipe.llamafactory_keys import EXPORT_KEYS

_TYPES = ("auto", "float16", "bfloat16", "float32")


def exports(flat: Flat) -> bool:
    """Whether the file says something of an export."""
    return any(flat.changed(key) for key in EXPORT_KEYS)


def _export(flat: Flat) -> None:
    if not flat.given("export_dir"):
        if flat.changed("infer_dtype") and flat.get("do_train") is True:
            flat.note("infer_dtype: is about generating and has no effect on this training")
        for key in EXPORT_KEYS:
            if flat.changed(key) and EXPORT_KEYS[key].rule is Rule.READ:
                flat.note(f"{key}: no effect without export_dir")
        return
    flat.put("export.output", flat.get("export_dir"), "export_dir")
    size = flat.number("export_size")
    if size <= 0:
        flat.problem("export_size", "expected the size of a file in GB, above 0")
    flat.put("export.shard_size", f"{size:g}GB", "export_size")
    flat.put("export.device", flat.choice("export_device", ("cpu", "auto")), "export_device")
    if flat.given("export_hub_model_id"):
        upload = {"repo": flat.get("export_hub_model_id"), "private": True}
        flat.put("export.push_to_hub", upload, "export_hub_model_id")
        flat.note(
            "export_hub_model_id: uploaded once it has passed its verification, into a private repository (there: a "
            "public one, unverified); `luthier migrate` writes a recipe, where private: false makes it public"
        )
    dtype = flat.choice("infer_dtype", _TYPES)
    flat.put("export.dtype", dtype, "infer_dtype")
    if dtype == "auto":
        flat.note(
            "infer_dtype: auto: the type of the base's files is kept (there float32 becomes bfloat16); "
            "give infer_dtype: bfloat16 for smaller files"
        )


EXPORT_SUBJECTS = (_export,)

"""Images, films and sounds in conversations."""

from __future__ import annotations

from pydantic import Field, model_validator

from luthier.recipe.base import Spec


class MediaSpec(Spec):
    directory: str | None = None
    """Folder of the files that rows name; `data.directory` if absent."""
    image_max_pixels: int | None = Field(default=None, gt=0)
    """Shrink larger images to this area: the model's processor does, and is saved so. Its own limits hold too."""
    image_min_pixels: int | None = Field(default=None, gt=0)
    """Enlarge smaller images to this area."""
    pan_and_scan: bool | None = None
    """Show crops of long images too (Gemma 3); the processor's own setting if absent."""
    crop_to_patches: bool | None = None
    """Cut images into tiles (InternVL); the processor's own setting if absent."""
    video_max_pixels: int | None = Field(default=None, gt=0)
    """As for images, of each frame of a film."""
    video_min_pixels: int | None = Field(default=None, gt=0)
    video_fps: float = Field(default=2.0, gt=0)
    """Frames taken of each second of a film."""
    video_max_frames: int = Field(default=128, gt=0)
    """Most frames taken of a film file; a list of frames is taken whole."""
    audio_sampling_rate: int | None = Field(default=None, gt=0)
    """Samples of a sound in each second; those of the model's processor if absent."""

    @model_validator(mode="after")
    def _ordered(self) -> MediaSpec:
        for kind in ("image", "video"):
            least, most = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if least is not None and most is not None and least > most:
                raise ValueError(f"{kind}_min_pixels={least} is more than {kind}_max_pixels={most}")
        return self

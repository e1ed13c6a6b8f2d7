"""A Stable Diffusion pipeline whose U-Net is given numbers beside the time, as DiffusionSat's and Text2Earth's are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline


class LabelledPipeline(StableDiffusionPipeline):
    """Called with `labels`, one for each prompt, which the U-Net gets as its `class_labels`.

    The half of classifier-free guidance without a caption gets labels of 0, which both systems were trained to take as
    unknown.
    """

    def __call__(self, *args: Any, labels: Sequence, guidance_scale: float = 7.5, **options: Any) -> Any:
        """As a StableDiffusionPipeline.

        Args:
            labels: numbers, or arrays of equal length, one for each image.
        """
        given = torch.as_tensor(np.stack(labels), dtype=self.unet.dtype, device=self.unet.device)
        if guidance_scale > 1:
            given = torch.cat([torch.zeros_like(given), given])

        def tell(_: Any, positional: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            return positional, {**named, "class_labels": given}

        hook = self.unet.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            return super().__call__(*args, guidance_scale=guidance_scale, **options)
        finally:
            hook.remove()

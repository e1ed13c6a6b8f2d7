"""A Stable Diffusion pipeline whose U-Net receives numbers besides the time, as in DiffusionSat and Text2Earth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline


class LabelledPipeline(StableDiffusionPipeline):
    """A StableDiffusionPipeline with `labels`, one per prompt, which the U-Net receives as `class_labels`.

    The unconditional half of classifier-free guidance gets labels of 0, which means unknown in the training of both
    systems.
    """

    def __call__(self, *args: Any, labels: Sequence, guidance_scale: float = 7.5, **options: Any) -> Any:
        """Call the StableDiffusionPipeline.

        Args:
            labels: one number per image, or one array per image, all of equal length.
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

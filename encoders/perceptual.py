"""LPIPS: perceptual distance of two images by the features of an AlexNet with weights that the user provides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

from encoders.embedding import device
from encoders.pixels import to_tensor
from runtime.artefacts import file_digest
from runtime.errors import UserError

BATCH = 64
#: Smallest side in pixels for which AlexNet's last layer has an output.
LEAST = 31


@dataclass(frozen=True)
class PerceptualScorer:
    """LPIPS (Zhang et al. 2018) on AlexNet, computed with torchmetrics.

    Attributes:
        network: network that maps two batches of float images [B, 3, H, W] in [-1, 1] to distances [B, 1, 1, 1].
        fingerprint: fingerprint of the weights of AlexNet.
    """

    network: nn.Module
    fingerprint: str

    @torch.no_grad()
    def scores(self, images: np.ndarray, truth: np.ndarray) -> np.ndarray:
        """LPIPS of each pair, float32 [N]; 0 for equal images.

        Args:
            images, truth: uint8 [N, H, W, 3].
        Raises:
            ValueError: the arrays differ in shape.
            UserError: the images are smaller than `LEAST` px.
        """
        if images.shape != truth.shape:
            raise ValueError(f"pairs differ in shape: {images.shape} and {truth.shape}")
        if min(images.shape[1:3]) < LEAST:
            raise UserError(
                f"LPIPS needs images of at least {LEAST} px, these have {min(images.shape[1:3])}: set eval.lpips=null"
            )
        parts = [slice(start, start + BATCH) for start in range(0, len(images), BATCH)]
        pairs = ((to_tensor(x[part]).to(device()) for x in (images, truth)) for part in parts)
        result = [self.network(*pair).flatten().float().cpu().numpy() for pair in pairs]
        return np.concatenate(result) if result else np.empty(0, np.float32)


def perceptual_scorer(weights: str | None) -> PerceptualScorer | None:
    """The scorer of `eval.lpips`; None without weights.

    Args:
        weights: file with the state dict of torchvision's AlexNet, in safetensors or torch format. The weights of the
            layers of LPIPS are part of torchmetrics.
    Raises:
        UserError: the file does not exist or has other content.
    """
    if weights is None:
        return None
    path = Path(weights).expanduser()
    if not path.is_file():
        raise UserError(
            f"eval.lpips={path} does not exist: put torchvision's AlexNet weights there (alexnet-owt-7be5be79.pth), "
            "or set eval.lpips=null to leave lpips out"
        )
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):  # the initial random weights are replaced
        # the public class of torchmetrics would download AlexNet
        network = _LPIPS(net="alex", pnet_rand=True)
    network.net.load_state_dict(_backbone(path, network.net))
    return PerceptualScorer(network.eval().requires_grad_(False).to(device()), file_digest(path))


def _backbone(path: Path, network: nn.Module) -> dict[str, torch.Tensor]:
    """The convolutions in an AlexNet file, by their names in `network`: `features.3.bias` becomes `slice2.3.bias`.

    Raises:
        UserError: the file does not contain them.
    """
    refusal = f"eval.lpips={path} is not torchvision's AlexNet"
    remedy = "give alexnet-owt-7be5be79.pth, its tensors as safetensors, or eval.lpips=null"
    try:
        if path.suffix == ".safetensors":
            source = load_file(path)
        else:
            source = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise any exception
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{refusal} ({reason}): {remedy}") from error
    result = {}
    for name, value in network.state_dict().items():
        key = f"features.{name.split('.', 1)[1]}"
        tensor = source.get(key) if isinstance(source, dict) else None
        if not isinstance(tensor, torch.Tensor) or tensor.shape != value.shape:
            raise UserError(f"{refusal} ({key} is missing or has another shape): {remedy}")
        result[name] = tensor
    return result

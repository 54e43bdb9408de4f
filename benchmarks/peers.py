"""The published implementations that ours are measured beside, each imported from its own package.

What a peer gives decides where it is compared. "entropy" and "statistics" (the target's log-probability and the
entropy) are what ours compute. "cross entropy" is less: it needs one logit of a row and a normaliser, no sum over the
distribution. It is included because people know its cost.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rows import error_text, version
from torch import Tensor


@dataclass(frozen=True)
class Peer:
    """A published implementation.

    Attributes:
        name: the name in tables and rows.
        package: the package that contains it, by its name in the package registry.
        takes: "logits" or "hidden".
        gives: "entropy", "statistics" or "cross entropy".
        load: imports the implementation and returns its function, of (logits, target) or of (hidden, weight, target,
            temperature). An entropy or a cross entropy is the mean over the tokens. Statistics are two tensors, a
            log-probability and an entropy for each token.
        needs_gpu: whether its kernels are for GPUs only.
        differentiable: the devices, "cpu" and "cuda", where its entropy has a gradient.
        overwrites: whether its gradient is written into the logits.
    """

    name: str
    package: str
    takes: str
    gives: str
    load: Callable[[], Callable[..., Any]]
    needs_gpu: bool = False
    differentiable: tuple[str, ...] = ("cpu", "cuda")
    overwrites: bool = False


def peers(
    takes: str, gives: tuple[str, ...], device: torch.device, only: str | None = None
) -> tuple[dict[Peer, Callable[..., Any]], dict[str, str]]:
    """Return the functions of the peers that run here, and by name the reasons why the others do not.

    With `only`, the peer of that name is the only one that is imported.
    """
    found, missing = {}, {}
    for peer in _PEERS:
        if peer.takes != takes or peer.gives not in gives or only not in (None, peer.name):
            continue
        if peer.needs_gpu and device.type == "cpu":
            missing[peer.name] = "needs a GPU"
        elif peer.package != "torch" and version(peer.package) is None:
            missing[peer.name] = f"{peer.package} is not installed"
        else:
            try:
                found[peer] = peer.load()
            # The import of a foreign package may fail in any way, and the other peers are measured all the same.
            except (Exception, SystemExit) as error:
                missing[peer.name] = f"{peer.package} {version(peer.package)}: {error_text(error)}"
    return found, missing


def all_peers(takes: str, gives: str) -> list[Peer]:
    """Return the peers of a kind, including those that do not run here."""
    return [peer for peer in _PEERS if (peer.takes, peer.gives) == (takes, gives)]


def versions() -> dict[str, str | None]:
    """Return the version of each package that contains a peer, None where it is not installed."""
    return {peer.package: version(peer.package) for peer in _PEERS}


def _trl_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    entropy_from_logits = _from("trl.trainer.utils", "entropy_from_logits")
    return lambda logits, target: entropy_from_logits(logits).mean()


def _trl_kernel_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    kernel = _trl_kernel()
    return lambda logits, target: kernel(logits, target)[1].mean()


def _trl_statistics() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return _from("trl.trainer.utils", "selective_log_softmax_and_entropy")


def _trl_kernel() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    # TRL's own function, above, calls this kernel on a GPU. Its module does without the requirements of TRL's trainers.
    return _from("trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy")


def _trl_linear() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    chunked = _from("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    chunk_size = _from("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")

    def statistics(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return chunked.apply(hidden, weight, None, target, temperature, chunk_size, None, 1.0, ("entropy",))[:2]

    return statistics


def _axolotl_entropy() -> Callable[[Tensor, Tensor], Tensor]:
    entropy_from_logits = _from("axolotl.monkeypatch.trainer.utils", "entropy_from_logits")
    return lambda logits, target: entropy_from_logits(logits).mean()


def _axolotl_statistics() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    selective_log_softmax = _from("axolotl.monkeypatch.trainer.utils", "selective_log_softmax")
    entropy_from_logits = _from("axolotl.monkeypatch.trainer.utils", "entropy_from_logits")
    return lambda logits, target: (selective_log_softmax(logits, target), entropy_from_logits(logits))


def _verl_entropy(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    entropy_from_logits = from_verl("verl.utils.torch_functional", name)
    return lambda logits, target: entropy_from_logits(logits).mean()


def _verl_statistics() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    logprobs_from_logits = from_verl("verl.utils.torch_functional", "logprobs_from_logits")
    entropy_from_logits = from_verl("verl.utils.torch_functional", "entropy_from_logits")
    return lambda logits, target: (
        logprobs_from_logits(logits, target, inplace_backward=False),
        entropy_from_logits(logits),
    )


def _verl_chunked() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return from_verl("verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction").apply


def _verl_kernel() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    return from_verl("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")


def _liger_linear() -> Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]:
    function = _from("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction")

    def statistics(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        negative, entropy = function.apply(hidden, weight, target, temperature, -100, 1, True)
        return -negative, entropy

    return statistics


# Peers without a temperature are given hidden states divided by it, which is a small part of the cost.
def _cut_cross_entropy() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    function = _from("cut_cross_entropy", "linear_cross_entropy")
    return lambda hidden, weight, target, temperature: function(hidden / temperature, weight, target)


def _quack_linear() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    function = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda hidden, weight, target, temperature: function(hidden / temperature, weight, target)


def _fla_linear() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    function = _from("fla.modules.fused_linear_cross_entropy", "fused_linear_cross_entropy_loss")
    return lambda hidden, weight, target, temperature: function(hidden, target, weight, logit_scale=1 / temperature)


def _torch_linear() -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    function = torch.nn.functional.linear_cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target, temperature: function(hidden / temperature, weight, target, options=options)


def _flash_attention() -> Callable[[Tensor, Tensor], Tensor]:
    function = _from("flash_attn.ops.triton.cross_entropy", "cross_entropy_loss")
    return lambda logits, target: function(logits, target)[0].mean()


def _from(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


def from_verl(module: str, name: str) -> Any:
    """Return a function or class of verl without what verl's own __init__ imports."""
    # verl's own __init__ imports a cluster manager and its requirements, and these modules use nothing of them.
    if "verl" not in sys.modules:
        found = importlib.util.find_spec("verl")
        assert found is not None
        assert found.submodule_search_locations
        for package in ("verl", "verl.utils"):
            bare = types.ModuleType(package)
            bare.__path__ = [found.submodule_search_locations[0] + package.removeprefix("verl").replace(".", "/")]
            sys.modules[package] = bare
    return _from(module, name)


_GPU = {"needs_gpu": True}
# On GPUs verl's trainers take the log-probabilities from flash-attn. Without it they compute them row by row.
_WITHOUT_FLASH = "" if importlib.util.find_spec("flash_attn") else " (no flash-attn)"
_PEERS = (
    Peer("TRL entropy_from_logits", "trl", "logits", "entropy", _trl_entropy),
    # On a GPU axolotl runs a kernel that has no backward.
    Peer("axolotl entropy_from_logits", "axolotl", "logits", "entropy", _axolotl_entropy, differentiable=("cpu",)),
    Peer("verl entropy_from_logits", "verl", "logits", "entropy", partial(_verl_entropy, "entropy_from_logits")),
    Peer(
        "verl entropy, chunked",
        "verl",
        "logits",
        "entropy",
        partial(_verl_entropy, "entropy_from_logits_with_chunking"),
    ),
    Peer(
        "Liger cross_entropy",
        "liger-kernel",
        "logits",
        "cross entropy",
        lambda: _from("liger_kernel.transformers.functional", "liger_cross_entropy"),
        overwrites=True,
        **_GPU,
    ),
    Peer(
        "QuACK cross_entropy",
        "quack-kernels",
        "logits",
        "cross entropy",
        lambda: _from("quack.cross_entropy", "cross_entropy"),
        **_GPU,
    ),
    Peer(
        "fla cross_entropy",
        "fla-core",
        "logits",
        "cross entropy",
        lambda: _from("fla.modules.fused_cross_entropy", "FusedCrossEntropyLoss")(),
        **_GPU,
    ),
    Peer("FlashAttention cross_entropy", "flash-attn", "logits", "cross entropy", _flash_attention, **_GPU),
    Peer("TRL fused log-prob + entropy kernel", "trl", "logits", "entropy", _trl_kernel_entropy, **_GPU),
    Peer("TRL selective_log_softmax_and_entropy", "trl", "logits", "statistics", _trl_statistics),
    Peer("TRL fused log-prob + entropy kernel", "trl", "logits", "statistics", _trl_kernel, **_GPU),
    Peer(
        "axolotl selective_log_softmax, entropy",
        "axolotl",
        "logits",
        "statistics",
        _axolotl_statistics,
        differentiable=("cpu",),
    ),
    Peer(f"verl logprobs{_WITHOUT_FLASH}, entropy_from_logits", "verl", "logits", "statistics", _verl_statistics),
    Peer("verl FusedLinearForPPO", "verl", "hidden", "statistics", _verl_chunked),
    Peer("verl linear_cross_entropy kernel", "verl", "hidden", "statistics", _verl_kernel, **_GPU),
    Peer("TRL chunked log-prob", "trl", "hidden", "statistics", _trl_linear),
    Peer("Liger fused linear scaled CE", "liger-kernel", "hidden", "statistics", _liger_linear),
    Peer("cut cross entropy", "cut-cross-entropy", "hidden", "cross entropy", _cut_cross_entropy, **_GPU),
    Peer("QuACK linear cross entropy", "quack-kernels", "hidden", "cross entropy", _quack_linear, **_GPU),
    Peer("fla linear cross entropy", "fla-core", "hidden", "cross entropy", _fla_linear, **_GPU),
    Peer("torch linear_cross_entropy", "torch", "hidden", "cross entropy", _torch_linear),
)

"""What takes the place of a model's forward: its output projection makes something other than logits."""

import functools
from typing import Any, Protocol

from torch import Tensor
from transformers.utils import ModelOutput

from em_kernels import OutputHead
from em_kernels.integrations.transformers.labels import Labels

_NAME = "_em_kernels_forward"
_REPLICATE = "_replicate_for_data_parallel"
_GENERATING = ("generate", "generate_batch")
_PREPARE = "prepare_inputs_for_generation"


class Product(Protocol):
    """The statistics, or the loss, that the output projection returns in place of logits."""

    def made_of(self, hidden: Tensor, labels: Labels, head: OutputHead) -> Tensor:
        """Runs in the output projection's forward; returns them as a tensor of three dimensions, like logits."""

    def output(self, output: Any, made: Tensor, labels: Labels, model: Any) -> Any:
        """The model's output with the statistics or the loss in it; `made` is what the projection's hooks returned."""


class Forward:
    """Stands in for a model's forward, and calls it. An object, not a closure, so that a copy of the model has its own.

    Args:
        model: the causal language model itself.
        head: its output projection.
        product: the statistics or the loss in place of logits.

    Attributes:
        active: whether the projection returns the product; False while the model generates, which needs logits.
    """

    def __init__(self, model: Any, head: OutputHead, product: Product) -> None:
        self.model, self.head, self.product, self.active = model, head, product, False

    def put_in(self) -> None:
        """Takes the place of the model's forward.

        Raises:
            RuntimeError: the place is taken.
        """
        check_free(self.model)
        names = [name for name in ("forward", _REPLICATE, _PREPARE, *_GENERATING) if hasattr(self.model, name)]
        self.before = {name: self.model.__dict__.get(name) for name in names}
        self.forward = self.model.forward
        functools.update_wrapper(self, self.forward)
        setattr(self.model, _NAME, self)
        self.model.forward, self.active = self, True
        setattr(self.model, _REPLICATE, _refuse_replica)
        for name in names[2:]:
            stand_in = _Prepare if name == _PREPARE else _Generate
            setattr(self.model, name, stand_in(self, getattr(self.model, name)))

    def take_out(self) -> None:
        """Puts the model's own forward back."""
        # Where another wrapper has been put around it, it stays inside that wrapper and passes everything on.
        self.active = False
        delattr(self.model, _NAME)
        for name, before in self.before.items():
            current = self.model.__dict__.get(name)
            if current not in (self, _refuse_replica) and not (
                isinstance(current, (_Generate, _Prepare)) and current.forward is self
            ):
                continue
            if before is None:
                delattr(self.model, name)
            else:
                setattr(self.model, name, before)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.forward(*args, **kwargs)
        if args:
            raise TypeError(f"the model was called with {len(args)} positional arguments, expected names for all")
        if kwargs.get("fused_lm_head"):
            raise ValueError(
                "the caller passes fused_lm_head, as TRL's trainers do, expected an unattached model: detach it"
            )
        current = self.model.get_output_embeddings()
        if current is not self.head.module:
            raise RuntimeError(
                f"the output projection is now another {type(current).__name__}, expected the one that was attached: "
                "detach the model and attach it again, or make a new trainer"
            )
        labels = Labels.taken_from(kwargs)
        with self.head.replaced(lambda hidden: self.product.made_of(hidden, labels, self.head)) as made:
            output = self.forward(**kwargs)
        if len(made) != 1:
            raise RuntimeError(f"the model used its output projection {len(made)} times in a call, expected 1")
        if not isinstance(output, ModelOutput):
            raise ValueError(f"the model returned a {type(output).__name__}, expected a ModelOutput (return_dict=True)")
        if output.get("logits") is None or output["logits"].shape != made[0].shape:
            raise RuntimeError(
                "the model's logits do not have the shape of what its output projection returned, expected a model "
                "that only scales or caps it: detach the model and attach it again"
            )
        return self.product.output(output, made[0], labels, self.model)


class _Generate:
    """Stands in for a model's generate, which needs logits."""

    def __init__(self, forward: Forward, generate: Any) -> None:
        self.forward, self.generate = forward, generate
        functools.update_wrapper(self, generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before, self.forward.active = self.forward.active, False
        try:
            return self.generate(*args, **kwargs)
        finally:
            self.forward.active = before


class _Prepare:
    """Stands in for what every generate calls, also one that was taken from the model before it was attached."""

    def __init__(self, forward: Forward, prepare: Any) -> None:
        self.forward, self.prepare = forward, prepare
        functools.update_wrapper(self, prepare)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.forward.active:
            raise RuntimeError(
                "generate was taken from the model before it was attached and finds no logits, expected a call of "
                "model.generate itself"
            )
        return self.prepare(*args, **kwargs)


def _refuse_replica() -> None:
    # A replica would call the forward of the first device's model.
    raise ValueError("DataParallel copies the attached model, expected one GPU per process: launch with torchrun")


def installed(model: Any) -> Forward | None:
    """The Forward in the place of the model's forward, or None."""
    return model.__dict__.get(_NAME)


def check_free(model: Any) -> None:
    """Raises RuntimeError where something stands in for the model's forward already."""
    if installed(model) is not None:
        raise RuntimeError(f"the {type(model).__name__} is attached already, expected one that is not: detach it first")


def causal_model(model: Any) -> Any:
    """The causal language model inside the wrappers of compilation, data parallelism and adapters."""
    while not hasattr(type(model), "get_output_embeddings"):
        wrapped = model._modules if hasattr(model, "_modules") else {}
        if "_orig_mod" in wrapped or "module" in wrapped:
            model = wrapped.get("_orig_mod", wrapped.get("module"))
        elif hasattr(type(model), "get_base_model"):
            model = model.get_base_model()
        else:
            break
    return model

"""torch.library.opcheck of an operator whose first result is a loss and whose others are its finished gradients."""

from torch.library import opcheck
from torch.testing._internal.optests import aot_autograd_check


def opcheck_loss(operator, inputs) -> None:
    # The derivative of a gradient is an error, so what differentiates every result is asked of the loss alone.
    opcheck(operator, inputs, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    aot_autograd_check(lambda *given: operator(*given)[0], inputs, {}, dynamic=True, check_gradients="auto")

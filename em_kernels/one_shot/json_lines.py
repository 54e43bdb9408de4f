"""Lines of JSON that every reader of JSON takes."""

import json
import math
from typing import Any


def json_line(values: Any) -> str:
    """One line of JSON; NaN and infinities, which JSON does not have and Python would write, are null."""
    return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

import pytest
import torch
import torch._dynamo


@pytest.fixture
def fresh_compiler(monkeypatch, tmp_path):
    # Compiled graphs are cached across processes by what they call, not by what that does.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()

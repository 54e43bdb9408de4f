"""These tests check that contenders take turns, and that one that fails leaves the others alone."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import timing
import training_step
from timing import Call, Timing, Unusable, measure, slots_beyond_cache, summary

CPU = torch.device("cpu")


def test_a_failing_contender_is_answered_by_its_exception_and_the_others_go_on():
    def fail(slot):
        raise ValueError("broken")

    timings = measure({"broken": Call(fail), "fine": Call(lambda slot: slot)}, CPU, budget=0.01)
    assert isinstance(timings["broken"], ValueError)
    assert isinstance(timings["fine"], Timing)


def test_a_contender_after_which_the_device_answers_with_errors_is_told_from_one_that_only_fails(monkeypatch):
    lost = []

    def synchronize(device):
        if lost:
            raise RuntimeError("illegal memory access")

    def lose(slot):
        lost.append(slot)
        raise RuntimeError("launch failed")

    monkeypatch.setattr(timing, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    calls = {"fine": Call(lambda slot: slot), "bad": Call(lose)}
    with pytest.raises(Unusable, match="illegal memory access") as raised:
        measure(calls, torch.device("cuda"), enqueue=True, budget=0.01)
    assert raised.value.contender == "bad"


def test_what_a_failing_contender_has_overwritten_is_restored():
    restored = []

    def fail(slot):
        raise ValueError("broken")

    measure({"a": Call(fail, restored.append), "b": Call(lambda slot: slot)}, CPU, budget=0.01)
    assert restored == [0]


@pytest.mark.parametrize(("limit", "most", "found"), [(0, 8, 0), (1, 8, 1), (40, 64, 40), (23, 64, 23), (200, 64, 64)])
def test_the_largest_batch_is_found_to_an_eighth(limit, most, found):
    largest, more = training_step._largest(lambda batch: batch <= limit, most)
    assert more == (limit >= most)
    assert largest <= found <= largest * 9 / 8 + 1


def test_a_failing_check_is_the_contenders_failure():
    def check(name, result):
        if result == "wrong":
            raise ArithmeticError(name)

    timings = measure({"a": Call(lambda _: "wrong"), "b": Call(lambda _: "right")}, CPU, budget=0.01, check=check)
    assert isinstance(timings["a"], ArithmeticError)
    assert isinstance(timings["b"], Timing)


def test_contenders_alternate_over_all_slots_and_are_restored_after_each_call(monkeypatch):
    # A slow machine would warm up with fewer calls.
    monkeypatch.setattr(timing, "_WARM_SECONDS", 1e9)
    calls = []
    names = {name: Call(lambda slot, name=name: calls.append((name, slot))) for name in "ab"}
    names["b"] = names["b"]._replace(restore=lambda slot: calls.append(("restore", slot)))
    measure(names, CPU, slots=3, budget=0, most_rounds=5)
    order = "".join(name for name, _ in calls if name != "restore")
    assert order == "aaabbb" + "abbaabbaab"
    assert [slot for name, slot in calls if name != "restore"] == [i % 3 for i in range(16)]
    assert all(calls[i + 1] == ("restore", slot) for i, (name, slot) in enumerate(calls) if name == "b")


def test_inputs_on_the_cpu_are_three_times_the_caches_in_all(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_CPUS", tmp_path)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda process: {0, 1, 5}, raising=False)
    assert slots_beyond_cache(12 << 20, CPU) == 8  # of an unknown cache, which is taken to have 32 MiB
    for i, shared in enumerate(["0-1", "0-1", "2-3", "2-3", "4-5", "4-5"]):
        cache = tmp_path / f"cpu{i}" / "cache" / "index3"
        cache.mkdir(parents=True)
        (cache / "shared_cpu_list").write_text(f"{shared}\n")
        (cache / "size").write_text("512K\n")
    # Two caches of 512 KiB: the third belongs to CPUs that this process may not use.
    assert [slots_beyond_cache(size, CPU) for size in (1 << 30, 3 << 20, 1 << 20, 1_000_000, 1)] == [2, 2, 3, 4, 128]


def test_summary_is_the_median_between_the_percentiles():
    assert summary([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], 0.5) == pytest.approx((3.5, 2.0, 5.0, 6, 0.5))

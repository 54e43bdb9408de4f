from em_kernels.one_shot.policy.rollout import Rollout


def test_micro_batches_hold_every_token_once_and_little_padding(rollout: Rollout) -> None:
    parts = list(rollout.micro_batches(5))
    assert [len(part.input_ids) for part in parts] == [5, 5, 2]

    def sequences(part: Rollout) -> list[tuple[list[int], list[int]]]:
        whole = [ids[mask].tolist() for ids, mask in zip(part.input_ids, part.attention_mask, strict=True)]
        return list(zip(whole, [ids.tolist() for ids in part.completion_ids()], strict=True))

    assert sorted(pair for part in parts for pair in sequences(part)) == sorted(sequences(rollout))
    for part in parts:
        assert part.attention_mask[:, 0].any()
        assert part.completion_mask[:, -1].any()
    assert parts[0].completion_mask.shape[1] < rollout.completion_mask.shape[1]

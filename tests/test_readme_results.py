from benchmarks import examples, record


def test_the_table_counts_the_mini_batches_of_each_replica(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    rounds = dict(zip(examples.EXAMPLES, (24, 117, 117, 469, 11_725), strict=True))
    for example, count in rounds.items():
        for seed, error in ((42, 1.0), (43, 2.0)):
            row = dict(example=example, seed=seed, replicas=3, rounds=count, error=error, seconds=10.0 * seed)
            record.keep("examples", row)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in examples.table().splitlines()[2:]]
    assert [line[0] for line in lines] == [*examples.EXAMPLES]
    assert [line[2] for line in lines] == ["600", "2,925", "2,925", "11,725", "11,725"]  # L is 25; 1 with --method sgd
    assert {line[3] for line in lines} == {"1.50 ± 0.71"}
    assert {line[4] for line in lines} == {"420 to 430"}

from benchmarks import readme_results, results


def test_table_counts_steps_per_replica(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    rounds = zip(readme_results.EXPERIMENTS.values(), (24, 117, 117, 469, 11_725), strict=True)
    for flags, count in rounds:
        for seed, error in ((42, 1.0), (43, 2.0)):
            row = dict(command=readme_results.command_line(flags, seed), seed=seed, num_replicas=3, num_rounds=count)
            results.append_row("readme_results", row | dict(error=error, train_seconds=10.0 * seed))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme_results.table().splitlines()[2:]]
    assert [line[0] for line in lines] == [*readme_results.EXPERIMENTS]
    assert [line[2] for line in lines] == ["600", "2,925", "2,925", "11,725", "11,725"]  # L is 25, or 1 with SGD
    assert {(line[3], line[4]) for line in lines} == {("1.50 ± 0.71", "420 to 430")}

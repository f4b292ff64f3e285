import pytest
import torch

from benchmarks import char_lm, results


@pytest.fixture
def add_row(monkeypatch, tmp_path):
    """Append a row to an empty directory of results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)

    def add_row(config, loss, split="validation", seed=char_lm.SELECTION_SEED):
        row = dict(config=config, seed=seed, split=split, loss=loss, bytes_sent=2e6, machine="a machine")
        results.append_row(char_lm.NAME, row)

    return add_row


@pytest.fixture
def selection(add_row):
    """Rows in which the second setting of each method is best."""
    for configs in char_lm.GRIDS.values():
        for number, config in enumerate(configs):
            add_row(config, 1.0 if number == 1 else 2.0 + number)
    return add_row


def test_each_setting_is_tried_once_on_validation_text():
    trials = list(char_lm.select_trials())
    assert len({char_lm.config_key(config, split) for config, _, split in trials}) == len(trials)
    assert {split for *_, split in trials} == {"validation"}
    for configs in char_lm.GRIDS.values():
        assert len({char_lm.describe(config) for config in configs}) == len(configs)


def test_the_lowest_validation_loss_is_tested_with_other_seeds(selection):
    trials = list(char_lm.test_trials())
    assert {split for *_, split in trials} == {"test"}
    assert char_lm.SELECTION_SEED not in {seed for _, seed, _ in trials}
    for method, configs in char_lm.GRIDS.items():
        assert char_lm.selected(method) == configs[1]
        assert sum(config == configs[1] for config, *_ in trials) == len(char_lm.TEST_SEEDS)


def test_an_incomplete_selection_is_not_used(add_row):
    add_row(char_lm.GRIDS["Parle"][0], 1.0)
    with pytest.raises(SystemExit, match="Parle"):
        char_lm.selected("Parle")
    assert len(char_lm.selection().splitlines()) == 3


def test_table_compares_with_the_baselines(selection):
    for seed, loss in zip(char_lm.TEST_SEEDS, (1.0, 1.1, 1.2), strict=True):
        selection(char_lm.selected("AdamW"), loss + 1, "test", seed)
        selection(char_lm.selected("Parle"), loss, "test", seed)
    adamw, parle = [[cell.strip() for cell in line.split("|")[1:-1]] for line in char_lm.table().splitlines()[2:]]
    assert (adamw[0], adamw[5], adamw[6]) == ("AdamW", "2.100 ± 0.100", "")
    assert parle[0] == "Parle" and parle[6].startswith("-1.000, better (p = ") and parle[7] == "not run"


def test_a_trial_learns_and_counts_what_is_sent(monkeypatch):
    texts = {name: torch.arange(65).repeat(50, 1) for name in ("train", "validation", "test")}
    monkeypatch.setattr(char_lm, "load_text", lambda: texts)
    monkeypatch.setattr(char_lm, "WARMUP", 2)
    row = char_lm.run_trial(dict(steps=6, sync_every=3, batch_size=2), 1, "validation")
    assert row["loss"] < 4.9 and row["bytes_sent"] == 2 * 4 * row["num_parameters"]  # 4.85 = log(128)
    row = char_lm.run_trial(char_lm.ADAMW | dict(steps=6, batch_size=2), 1, "validation")
    assert row["bytes_sent"] == 0
    row = char_lm.run_trial(char_lm.GRIDS["local AdamW"][0] | dict(steps=6, sync_every=3, batch_size=2), 1, "test")
    assert row["split"] == "test" and row["loss"] < 4.9


def test_predictions_depend_on_earlier_characters_only():
    torch.manual_seed(0)
    model, characters = char_lm.Transformer().eval(), torch.randint(128, (1, char_lm.CONTEXT))
    changed = characters.clone()
    changed[0, 40:] = 0
    before, after = model(characters), model(changed)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40], after[0, 40])

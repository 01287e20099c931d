import pytest

from conversion.router.training_arguments import parse_arguments


def test_yaml_values_and_overrides(tmp_path):
    file = tmp_path / "router.yaml"
    file.write_text(
        "checkpoint: merged\ntrain-data: train.jsonl\nlearning_rate: 1e-3\nmax_length: 99\nuse_cpu: true\n"
    )
    config = ["--config", str(file), "--output-dir", str(tmp_path / "out")]
    args, training_args = parse_arguments([*config, "--max-length", "7"])
    assert (args.checkpoint, args.train_data, args.max_length) == ("merged", ["train.jsonl"], 7)
    assert (training_args.learning_rate, training_args.use_cpu) == (1e-3, True)
    file.write_text("learning_rat: 1\n")
    with pytest.raises(ValueError, match="unknown option 'learning_rat'"):
        parse_arguments(config)


REQUIRED = ["--checkpoint", "merged", "--train-data", "train.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "merged"], "required: --train"),
        (REQUIRED, "required: --output"),
        ([*REQUIRED, "--output-dir", "out", "--learning-rat", "1"], "unknown arguments: --learning-rat 1"),
        ([*REQUIRED, "--output-dir", "out", "--max-length", "0"], "max_length is 0"),
        ([*REQUIRED, "--output-dir", "out", "--threshold", "1.5"], "threshold is 1.5, expected a probability"),
        ([*REQUIRED, "--output-dir", "out", "--fsdp"], "fsdp shards what trains, which is the router alone"),
        ([*REQUIRED, "--output-dir", "out", "--learning-rate", "fast"], "invalid float value: 'fast'"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        parse_arguments([*arguments, "--use-cpu"])

from dataclasses import fields

from conversion.router.arguments import RouterArguments, option_help


def test_help_of_an_option():
    """How it is written, what it is for, and what it is where it is not given, also after the parser saw the class."""
    texts = dict(option_help())
    assert texts["--train-data DATA..."].endswith(" [required]")
    assert texts["--augment true|false"].endswith(" [default: true]")
    for option in ("--eval-data DATA...", "--threshold P", "--overwrite"):
        assert texts[option].endswith("."), option
    from conversion.training.argument_parser import TrainingArgumentParser

    parser = TrainingArgumentParser((RouterArguments,))
    assert dict(option_help()) == texts
    assert {option.name for option in fields(RouterArguments)} < {action.dest for action in parser._actions}

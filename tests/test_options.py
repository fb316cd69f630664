"""The command line of every script: what is given counts, or is refused."""

import argparse
import importlib

import pytest
from conftest import WITH_OPTIONS

from lib.errors import UserError


def parsers_of(script, monkeypatch):
    """The parser of a script, and those of its commands."""
    def keep(parser, *_):
        raise StopIteration(parser)

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", keep)
        with pytest.raises(StopIteration) as kept:
            importlib.import_module(script.replace("/", ".")).parse_args([])
    parsers = [kept.value.value]
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return parsers


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_an_option_given_twice_is_refused(script, monkeypatch):
    tried = 0
    for parser in parsers_of(script, monkeypatch):
        for action in parser._actions:
            for flag in action.option_strings if action.nargs != 0 else ():
                special = {"--augment": "none", "--centre": "1,1"}
                value = next(iter(action.choices)) if action.choices else special.get(flag, "1")
                with pytest.raises(UserError, match=f"^{flag} is given twice"):
                    parser.parse_args([flag, value, f"{flag}={value}"])
                tried += 1
    assert tried >= 1


@pytest.mark.parametrize("script", WITH_OPTIONS)
def test_help_fits_100_columns_with_an_example_and_every_default_that_is_a_value(script, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parsers = parsers_of(script, monkeypatch)
    assert f"python {script}.py" in parsers[0].format_help()
    for parser in parsers:
        text = parser.format_help()
        assert "default: None" not in " ".join(text.split())
        assert [line for line in text.splitlines() if len(line) > 100] == []
        assert "['" not in text
        for action in parser._actions:
            if action.option_strings and type(action.default) in (int, float):
                assert "default" in parser._get_formatter()._expand_help(action), action.option_strings

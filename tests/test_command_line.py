import importlib

import pytest

TOOLS = ("predict", "export", "demo", "model_card", "report", "search.report")


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("arguments", [[], ["run", "--no-such-flag=1"], ["run", "--checkpoint"]])
def test_a_mistake_in_the_flags_of_a_tool_is_one_line(tool, arguments, capsys):
    main = importlib.import_module(f"resnet_jax.{tool}").main
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"python -m resnet_jax.{tool.replace('.', ' ')} --help says what there is")


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_how_a_tool_is_used(tool, capsys):
    module = importlib.import_module(f"resnet_jax.{tool}")
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert module.__doc__.strip() in capsys.readouterr().out

"""The command line: what is refused, and what is chosen where nothing is said."""

import pytest
from train_options import OptionError, check_writable, parse_options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "lots"], "'lots' is not a token count"),
        (["--seq-len", "0"], "at least 1"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--batch-size", "-1"], "at least 1"),
        (["--lr", "fast"], "'fast' is not a learning rate"),
        (["--budget", "60 gallons"], "'60 gallons' is not a size"),
        (["--policy", "magic"], "invalid choice: 'magic'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--sdpa-backend", "fastest"], "invalid choice: 'fastest'"),
        (["--compar"], "unrecognized arguments: --compar"),
    ],
)
def test_a_wrong_argument_is_named(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        parse_options(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seq-len", "1"], "trains nothing: a token is predicted"),
        (["--policy", "swap", "--alpha", "0.5"], "alpha=0.5 goes with policy"),
        (["--alpha", "1.5"], "alpha=1.5 is not a fraction"),
        (["--keep-last", "-1"], "not a number of blocks"),
        (["--policy", "none", "--budget", "1GiB"], "leave budget out, or give policy='auto'"),
        (["--attention", "eager", "--sdpa-backend", "math"], "goes with --attention sdpa"),
        (["--plan", "a.json", "--host-budget", "1GiB"], "leave out --host-budget"),
        (["--plan", "a.json", "--save-plan", "b.json"], "give one of them"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(OptionError, match=message):
        parse_options(arguments)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(["--help"])
    assert stopped.value.code == 0
    assert "--geometry llama-1b-d128 --seq-len 128K" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "device", "policy", "alpha"),
    [
        ([], "cpu", "memo", 0.5),
        ([], "cuda", "auto", None),
        (["--alpha", "0.25"], "cuda", "memo", 0.25),
        (["--policy", "swap"], "cpu", "swap", None),
        (["--policy", "memo"], "cpu", "memo", None),
        (["--policy", "none"], "cuda", "none", None),
    ],
)
def test_the_policy(arguments, device, policy, alpha):
    settings = parse_options(arguments).settings(device)
    assert (settings["policy"], settings["alpha"]) == (policy, alpha)


def test_sizes_and_lengths_are_read():
    options = parse_options(["--seq-len", "128K", "--budget", "60GiB", "--host-budget", "60GB"])
    assert (options.seq_len, options.budget, options.host_budget) == (131_072, 60 * 2**30, 60 * 10**9)


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    check_writable(None, "--json-out")
    check_writable(str(tmp_path / "new.json"), "--json-out")
    assert not (tmp_path / "new.json").exists()
    (tmp_path / "old.json").write_text("old")
    check_writable(str(tmp_path / "old.json"), "--json-out")
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize("name", ["no/such/folder.json", "."])
def test_a_file_that_cannot_be_written(tmp_path, name):
    with pytest.raises(OptionError, match=r"--json-out .* cannot be written: "):
        check_writable(str(tmp_path / name), "--json-out")

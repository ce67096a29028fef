"""Command lines: spelling of options, and values that are checked while they are parsed."""

import argparse

import pytest

from diffusers_sana.arguments import ArgumentParser, device, hyphenate, integer, number, seed


def test_underscores_in_option_names():
    parser = ArgumentParser()
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction)
    parser.add_argument("--out-dir", default="x")
    parser.add_argument("rest", nargs="*")
    for argv in (["--batch-size", "2", "--out-dir=a_b"], ["--batch_size", "2", "--out_dir=a_b"]):
        args = parser.parse_args([*argv, "c_d"])
        assert (args.batch_size, args.out_dir, args.rest) == (2, "a_b", ["c_d"])
    assert parser.parse_args(["--no-mixed_precision"]).mixed_precision is False
    assert parser.parse_args(["--", "--a_b"]).rest == ["--a_b"]
    assert "--batch-size" in parser.format_help()
    assert "--batch_size" not in parser.format_help()


def test_underscores_reach_subcommands():
    root = ArgumentParser()
    command = root.add_subparsers(dest="name").add_parser("run")
    command.add_argument("--num-images", type=integer())
    assert root.parse_args(["run", "--num_images", "3"]).num_images == 3


def test_hyphenate_leaves_its_argument():
    given = ["--a_b", "c_d"]
    assert hyphenate(given) == ["--a-b", "c_d"]
    assert given == ["--a_b", "c_d"]


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(integer(), "7", 7), (integer(at_least=0), "0", 0), (number(), "-2.5", -2.5), (seed, "-1", -1)],
)
def test_values(kind, text, value):
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (integer(), "0", "must be at least 1, got 0"),
        (integer(at_most=5), "6", "must be at most 5, got 6"),
        (integer(), "one", "invalid integer value: 'one'"),
        (number(), "nan", "must be finite, got nan"),
        (number(0, 1), "1.5", "must be at most 1, got 1.5"),
        (number(), "one", "invalid number value: 'one'"),
        (seed, str(2**70), "must be an integer of 64 bits"),
        (device, "gpu", "must be one of cpu, cuda, mps, xpu, or such as cuda:1, got 'gpu'"),
        (device, "cuda:x", "such as cuda:1, got 'cuda:x'"),
    ],
)
def test_values_out_of_range(kind, text, message, capsys):
    parser = ArgumentParser()
    parser.add_argument("--value", type=kind)
    with pytest.raises(SystemExit):
        parser.parse_args(["--value", text])
    error = capsys.readouterr().err
    assert "argument --value: " in error
    assert message in error

"""Messages about wrong values speak of keys and of what to write, not of the program."""

import pytest

from feddip_mpi import config
from feddip_mpi.errors import InputError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=1e3", "rounds: got '1e3'; .*; write 1000$"),
        ("rounds=2.5e1", "write 25$"),
        ("control.upload_bytes=1e6", "control.upload_bytes: got '1e6'; .*; write 1000000$"),
        ("data.synthetic=5", "data.synthetic: got 5; .* section .*shape, classes, train_samples, test_samples$"),
        ("control.upload_bytes=on", "control.upload_bytes: got True; .* reads a bare on, off, yes and no as a switch$"),
        ("data.synthetic.shape=[on, 12, 12]", "shape: got .True, 12, 12.; .* reads a bare on, off"),
        (
            f"rounds={10**30}",
            "rounds: got 1000000000000000000000000000000; allowed: .*; no integer may be above 9223372036854775807$",
        ),
        (
            f"penalty.steps={10**400}",
            "penalty.steps: got 1000.*; allowed: .*; no integer may be above 9223372036854775807$",
        ),
        (
            f"data.synthetic.shape=[1, {10**30}, 3]",
            "shape: got .*; allowed: .*; no integer may be above 9223372036854775807$",
        ),
        ("data" + ".data" * 3000 + "=1", "is no key: none has more than 9 dots$"),
        ("rounds=ten", r"rounds: got 'ten'; allowed: integer >= 1 \(T, communication rounds\)$"),
        (
            "sparsity.final=1.5",
            r"final: got 1.5; allowed: number >= 0 and < 1 \(s_p, share of zeros of the final model, .*\)$",
        ),
        ("sparsity.final=1.0", "final: got 1.0; allowed: number >= 0 and < 1 "),
        ("checkpoint.minutes=0", r"minutes: got 0; allowed: number > 0, or none \(also save"),
        ("upload.values=fp8", "upload.values: got 'fp8'; allowed: fp32, fp16, bf16, int8, int4$"),
        ("overlap=maybe", "overlap: got 'maybe'; allowed: on, off$"),
        ("data.path=[a]", "data.path: got .'a'.; allowed: text, or none$"),
        (
            "model.keep_dense=fc9.weight",
            r"keep_dense: got 'fc9.weight'; allowed: list of names; a list is written \[a, b\]$",
        ),
        ("model.keep_dense=[3]", "model.keep_dense.0: got 3; allowed: list of names$"),
        (
            "data.synthetic.shape=[1, 2]",
            r"1 problem:\n  data.synthetic.shape: got \[1, 2\]; allowed: list of 3 integers",
        ),
        ("data.synthetic.shape=[1]", r"1 problem:\n  data.synthetic.shape: got \[1\]; allowed: list of 3 integers"),
        ("data.synthetic.shape=[1, a, 4]", "shape.1: got 'a'; allowed: list of 3 integers"),
        ("mask=erk", "mask: got 'erk'; .* section .*every, initial, allocation, rescale, freeze_after$"),
    ],
)
def test_the_message_says_what_to_write(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        config.parse("", [override])
    assert "Config" not in str(told.value) and "input should" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("on: 4", "  a key is True, which is no name .*; valid keys: seed, rounds"),
        ("mask:\n  3: 4", "  a key of mask is 3, which is no name .*; valid keys: every, initial"),
    ],
)
def test_a_key_that_is_no_text_is_told_as_yaml_reads_it(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.parse(text)


@pytest.mark.parametrize("text", ["many", "1e-3", "2.5", "1e400", "1e99", "nan", "''"])
def test_what_is_no_whole_number_gets_no_proposal(text: str) -> None:
    with pytest.raises(InputError, match="rounds: got") as told:
        config.parse("", [f"rounds={text}"])
    assert "; write" not in str(told.value)


@pytest.mark.parametrize("key", ["watchdog", "control.upload_bytes", "checkpoint.minutes", "data.path"])
def test_none_may_be_written_as_the_reference_writes_it(key: str) -> None:
    assert config.flat(config.parse("", [f"{key}=none"]))[key] is None
    assert config.parse("", ["method=fedavg", "mask.initial=none"]).mask.initial == "none", (
        "where it is a word it stays"
    )

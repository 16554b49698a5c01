"""The configuration: every mistake is named, all of them at once, and what is right survives YAML."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feddip_mpi import config
from feddip_mpi.errors import InputError
from feddip_mpi.settings import Config

PUBLIC_KEYS = [
    "seed", "rounds", "clients", "participants", "local_epochs", "batch_size", "learning_rate", "learning_rate_decay",
    "weight_decay", "data.name", "data.path", "data.partition", "data.alpha", "model.name", "sparsity.initial",
    "sparsity.final", "sparsity.schedule", "mask.every", "mask.initial", "penalty.maximum", "penalty.steps",
    "penalty.schedule", "feedback", "upload.values", "upload.regrow", "upload.residual", "server_memory", "exchange",
    "method", "eval.every", "checkpoint.every", "checkpoint.keep", "upload.entropy", "download.values", "overlap",
    "network.latency", "network.bandwidth",
]  # fmt: skip

WRONG = [
    ("seed", "-1"), ("seed", "9223372036854775808"), ("seed", "1.5"), ("seed", "one"),
    ("rounds", "0"), ("rounds", "-3"), ("rounds", "2.5"), ("rounds", "many"), ("rounds", "null"), ("rounds", "[1]"),
    ("rounds", "yes"), ("rounds", "1e3"),
    ("clients", "0"), ("participants", "0"), ("participants", "51"), ("participants", "off"),
    ("local_epochs", "0"), ("batch_size", "0"),
    ("learning_rate", "0"), ("learning_rate", "-0.1"), ("learning_rate", ".nan"), ("learning_rate", ".inf"),
    ("learning_rate", "on"), ("learning_rate", "1001"), ("learning_rate_decay", "0"), ("learning_rate_decay", "1.01"),
    ("weight_decay", "-1"), ("weight_decay", ".inf"), ("method", "fedsgd"), ("proximal", "-1"), ("feedback", "perhaps"),
    ("feedback", "2"), ("server_memory", "half"), ("server_memory", "1"), ("exchange", "smoke"), ("device", "tpu"),
    ("threads", "0"), ("threads", "1025"), ("deterministic", "3"),
    ("data", "3"), ("data.name", "7"), ("data.path", "[a]"), ("data.download", "maybe"), ("data.partition", "random"),
    ("data.alpha", "0"), ("data.alpha", "-0.5"), ("data.min_samples", "0"), ("data.classes_per_client", "0"),
    ("data.augment", "heavy"), ("data.synthetic.classes", "1"), ("data.synthetic.train_samples", "0"),
    ("data.synthetic.shape", "[1, 2]"), ("data.synthetic.shape", "[1, 2, 3, 4]"), ("data.synthetic.shape", "[1, 0, 4]"),
    ("data.synthetic.shape", "[1, a, 4]"), ("model.name", "[]"), ("model.keep_dense", "conv1"),
    ("sparsity", "0.9"), ("sparsity.initial", "1"), ("sparsity.initial", "-0.1"), ("sparsity.initial", "0.95"),
    ("sparsity.final", "1.0"), ("sparsity.final", "95"), ("sparsity.schedule", "quadratic"), ("mask.every", "0"),
    ("mask.initial", "lottery"), ("mask.freeze_after", "0"), ("mask.freeze_after", "1.1"), ("penalty.maximum", "-1"),
    ("penalty.maximum", "true"), ("penalty.steps", "0"), ("penalty.schedule", "on"), ("penalty.norm", "l3"),
    ("upload.values", "fp8"), ("upload.rounding", "up"), ("upload.mode", "all"), ("upload.regrow", "-0.01"),
    ("upload.regrow_schedule", "cubic"), ("upload.regrow_rounds", "none"), ("upload.residual", "forget"),
    ("upload.residual_decay", "1.5"), ("upload.residual", "ef22"), ("upload.entropy", "gzip"), ("upload.entropy", "on"),
    ("download", "int8"), ("download.values", "fp8"), ("overlap", "maybe"),
    ("exchange", "allreduce"), ("exchange", "off"), ("network.latency", "0"), ("network.latency", "-1"),
    ("network.latency", ".inf"), ("network.bandwidth", "0"), ("network.bandwidth", "fast"), ("network.bandwidth", "1e10"),
    ("eval.every", "0"), ("eval.batch_size", "0"), ("eval.clients", "some"),
    ("checkpoint.every", "0"), ("checkpoint.keep", "0"), ("checkpoint.best", "worst"), ("checkpoint.minutes", "0"),
    ("checkpoint.minutes", "yes"), ("checkpoint.minutes", ".inf"), ("checkpoint.minutes", ".nan"),
]  # fmt: skip


def problems(text: str, *overrides: str) -> list[str]:
    """The lines of the error, without its headline."""
    with pytest.raises(InputError) as caught:
        config.parse(text, overrides)
    head, *lines = str(caught.value).split("\n")
    count = re.fullmatch(r"configuration: (\d+) problems?:", head)
    assert count and int(count[1]) == len(lines), head
    return [line.strip() for line in lines]


def nested(key: str, value: str) -> str:
    """YAML of one dotted key."""
    *sections, last = key.split(".")
    return "".join(f"{s}: {{" for s in sections) + f"{last}: {value}" + "}" * len(sections)


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda item: item)
def test_a_wrong_value_is_named(key: str, value: str) -> None:
    for found in (problems(nested(key, value)), problems("", f"{key}={value}")):
        assert len(found) == 1
        assert re.match(rf"{re.escape(key)}(\.\d)?: got ", found[0]), found
        assert len(found[0]) > len(key) + len("got x; ")


@pytest.mark.parametrize("key", PUBLIC_KEYS)
def test_public_keys_exist_and_can_be_given(key: str) -> None:
    defaults = {name: default for name, _, default in config.fields()}
    value = Config().model_dump()
    for part in key.split("."):
        value = value[part]
    assert defaults[key] == value
    text = {True: "on", False: "off", None: "null"}.get(value, value) if not isinstance(value, (int, float)) else value
    assert config.parse("", [f"{key}={text}"]) == Config()
    assert config.parse(nested(key, str(text).lower())) == Config()


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("particpants", "participants"), ("learningrate", "learning_rate"), ("sparsity.finale", "sparsity.final"),
     ("sparsity.maximum", "penalty.maximum"), ("final", "sparsity.final"), ("upload.regow", "upload.regrow"),
     ("checkpoint.minute", "checkpoint.minutes"), ("data.synthetic.class", "data.synthetic.classes")],
)  # fmt: skip
def test_an_unknown_key_names_the_nearest(misspelt: str, meant: str) -> None:
    assert problems(nested(misspelt, "1")) == [f"{misspelt}: unknown key; did you mean {meant!r}?"]


def test_an_unknown_key_like_no_other_lists_the_valid_ones() -> None:
    (line,) = problems("zzz: 1")
    assert all(name in line for name in Config.model_fields)


def test_a_dotted_key_in_yaml_is_told_how_to_write_it() -> None:
    assert problems("sparsity.final: 0.9") == [
        "sparsity.final: dots are for --set; in YAML write `final:` indented below `sparsity:`"
    ]


def test_all_problems_at_once_also_those_between_keys() -> None:
    found = problems(
        "rounds: 0\nrounded: 3\ndata: {partition: x, synthetic: {shape: [1, 0.5, 3]}}\nparticipants: 99\n"
        "sparsity: {initial: 0.9, final: 0.5}\nmask.every: 2"
    )
    assert sorted(line.split(":")[0] for line in found) == [
        "data.partition", "data.synthetic.shape.1", "mask.every", "participants", "rounded", "rounds", "sparsity.initial",
    ]  # fmt: skip


def test_a_wrong_key_is_not_blamed_twice() -> None:
    assert [line.split(":")[0] for line in problems("participants: x\nclients: 2")] == ["participants"]
    assert [line.split(":")[0] for line in problems("sparsity: {initial: 2, final: 0.1}")] == ["sparsity.initial"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("participants: 6\nclients: 5", "participants"),
        ("sparsity: {initial: 0.91}", "sparsity.initial"),
        ("data: {name: synthetic, synthetic: {train_samples: 9}}\nclients: 10", "data.synthetic.train_samples"),
    ],
)
def test_rules_between_keys(text: str, key: str) -> None:
    (line,) = problems(text)
    assert line.startswith(f"{key}: got ")


@pytest.mark.parametrize(
    "text", ["participants: 5\nclients: 5", "sparsity: {initial: 0.9}", "sparsity: {initial: 0, final: 0}",
             "data: {name: synthetic, synthetic: {train_samples: 10}}\nclients: 10", "data: {synthetic: {train_samples: 1}}"]
)  # fmt: skip
def test_edges_of_the_rules_are_allowed(text: str) -> None:
    config.parse(text)


@pytest.mark.parametrize("values", ["fp16", "bf16", "int8", "int4"])
def test_a_rounded_sum_needs_owners_that_pay_what_they_owe(values: str) -> None:
    """Wherever nobody owns a coordinate until the next mask update, or the sum is itself what is remembered."""
    base = f"download.values={values}"
    assert config.parse("", [base, "exchange=sharded"]).download.values == values
    for residual in ("keep", "decay", "in_mask_only", "drop"):
        config.parse("", [base, "exchange=sharded", f"upload.residual={residual}", "upload.values=int4", "overlap=off"])
    for exchange in ("allgatherv", "node", "dense", "auto"):
        (line,) = problems("", base, f"exchange={exchange}")
        assert line.startswith(f"download.values: got {values}, which needs exchange=sharded, not {exchange}; set ")
    for mode in ("dense", "dense_at_mask_updates"):
        (line,) = problems("", base, "exchange=sharded", f"upload.mode={mode}")
        assert f"needs upload.mode=masked, not {mode}" in line
    (line,) = problems("", base, "exchange=sharded", "upload.residual=ef21")
    assert line.startswith(f"download.values: got {values}, which upload.residual=ef21 does not allow")
    assert len(problems("", base, "upload.mode=dense", "upload.residual=ef21")) == 3
    assert [line.split(":")[0] for line in problems("", base, "exchange=smoke")] == ["exchange"]  # not blamed twice


@pytest.mark.parametrize("exchange", ["allgatherv", "sharded", "node", "dense", "auto"])
@pytest.mark.parametrize("mode", ["masked", "dense", "dense_at_mask_updates"])
def test_exact_sums_go_with_everything(exchange: str, mode: str) -> None:
    for residual in ("keep", "ef21"):
        config.parse("", [f"exchange={exchange}", f"upload.mode={mode}", f"upload.residual={residual}"])


@pytest.mark.parametrize("key", ["exchange", "overlap", "network.latency", "network.bandwidth"])
def test_how_bytes_travel_may_change_on_resume(key: str) -> None:
    assert key in config.RESUMABLE_KEYS


@pytest.mark.parametrize("key", ["upload.residual", "upload.entropy", "upload.values", "download.values"])
def test_what_bytes_mean_may_not(key: str) -> None:
    assert key not in config.RESUMABLE_KEYS


def test_validation_leaves_the_values_given_alone() -> None:
    values = {"rounds": 0, "data": {"synthetic": {"classes": 1, "shape": [1, 2, 3]}}}
    with pytest.raises(InputError):
        config.validate(values)
    assert values == {"rounds": 0, "data": {"synthetic": {"classes": 1, "shape": [1, 2, 3]}}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("server_memory: on", "on"), ("server_memory: off", "off"), ("server_memory: 'off'", "off"),
     ("server_memory: published", "published")],
)  # fmt: skip
def test_yaml_switches_are_words_for_server_memory(text: str, expected: str) -> None:
    assert config.parse(text).server_memory == expected


def test_yaml_switches() -> None:
    assert config.parse("penalty: {schedule: off}").penalty.schedule == "off"
    assert config.parse("feedback: off").feedback is False
    assert config.parse("feedback: on").feedback is True
    assert config.parse("", ["server_memory=off", "penalty.schedule=off"]).penalty.schedule == "off"


def test_numbers_as_yaml_reads_them() -> None:
    assert config.parse("penalty: {maximum: 1e-4}").penalty.maximum == 1e-4  # a text in YAML 1.1
    assert config.parse("rounds: '7'").rounds == 7
    assert config.parse("learning_rate: 1").learning_rate == 1.0
    assert config.parse("checkpoint: {minutes: null}").checkpoint.minutes is None
    assert config.parse("checkpoint: {minutes: 2.5}").checkpoint.minutes == 2.5


@pytest.mark.parametrize(
    ("text", "clue"),
    [
        ("rounds: 1\nrounds: 2", "'rounds' given twice .*line 2"),
        ("data:\n  alpha: 1\n  name: mnist\n  alpha: 2", "'alpha' given twice .*line 4"),
        ("rounds: [1", "not valid YAML"),
        ("? [1]\n: 2", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
        ("- rounds", "expected keys and values"),
        ("rounds", "expected keys and values"),
        ("7: 3", "1 problem"),
        ("rounds: &a [*a]", "rounds: got"),
    ],
)
def test_yaml_that_is_no_configuration(text: str, clue: str) -> None:
    with pytest.raises(InputError, match=clue):
        config.parse(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rounds: 3\n\tclients: 4\n", "line 2: a tab; indent with spaces"),
        ("mask:\n\tevery: 3\n", "line 2: a tab; indent with spaces"),
        (
            "rounds: 3\nmodel: [a,\n  b\nclients: 4\n",
            "line 4: while parsing a flow sequence (line 2), expected ',' or ']', but got ':'",
        ),
        ("rounds: *nothing\n", "line 1: found undefined alias 'nothing'"),
        ("rounds: 3\n---\n", "line 2: expected a single document in the stream (line 1), but found another document"),
        ("rounds: 3\0", "unacceptable character #x0000: special characters are not allowed at position 9"),
    ],
)
def test_wrong_yaml_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        config.parse(text, source="mine.yaml")
    assert str(caught.value) == f"mine.yaml: not valid YAML: {told}"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "null", "sparsity: {}"])
def test_an_empty_file_is_the_default(text: str) -> None:
    assert config.parse(text) == Config()


@pytest.mark.parametrize(
    ("override", "clue"),
    [("rounds", "expected KEY=VALUE"), ("=3", "expected KEY=VALUE"), ("rounds.x=3", "'rounds' holds the value"),
     ("rounds=[", "not valid YAML")],
)  # fmt: skip
def test_overrides_that_are_none(override: str, clue: str) -> None:
    with pytest.raises(InputError, match=clue):
        config.parse("rounds: 5", [override])


def test_overrides_win_and_the_last_one_counts() -> None:
    text = "rounds: 5\nsparsity:\n"
    assert config.parse(text, ["rounds=6", "rounds = 7", "sparsity.final=0.95"]) == config.parse(
        "rounds: 7\nsparsity: {final: 0.95}"
    )


def test_overrides_of_a_resumed_run() -> None:
    base = config.parse("rounds: 5\nseed: 4")
    for key, value in {"rounds": 9, "data.path": "x", "eval.every": 2, "checkpoint.keep": 1, "device": "cpu"}.items():
        changed = config.override(base, [f"{key}={value}"], config.RESUMABLE_KEYS)
        assert config.to_dict(changed) != config.to_dict(base)
    assert base == config.parse("rounds: 5\nseed: 4")
    for key in set(config.keys()) - set(config.RESUMABLE_KEYS):
        with pytest.raises(InputError, match=f"'{re.escape(key)}' cannot change in a resumed run"):
            config.override(base, [f"{key}=1"], config.RESUMABLE_KEYS)
    with pytest.raises(InputError, match="rounds: got 0"):
        config.override(base, ["rounds=0"], config.RESUMABLE_KEYS)
    assert set(config.RESUMABLE_KEYS) <= set(config.keys())
    assert config.override(base, ["seed=5"]).seed == 5


@example(0, 1.0, "on", "a\x85b\u2028\u2029\r\n\ufeff\t c ", (1, 1, 1), False, ["\x85", "\u2028"], "off")
@given(
    st.integers(0, 2**63 - 1), st.floats(1e-300, 1e3), st.sampled_from(["on", "off", "published"]),
    st.text(max_size=20), st.tuples(st.integers(1, 9), st.integers(1, 99), st.integers(1, 99)), st.booleans(),
    st.lists(st.text(max_size=5), max_size=3), st.sampled_from(["off", "steps"]),
)  # fmt: skip
def test_yaml_round_trip(
    seed: int,
    rate: float,
    memory: str,
    name: str,
    shape: tuple[int, int, int],
    switch: bool,
    dense: list[str],
    schedule: str,
) -> None:
    values = {
        "seed": seed, "learning_rate": rate, "server_memory": memory, "feedback": switch,
        "data": {"name": name, "path": name, "synthetic": {"shape": shape}}, "model": {"keep_dense": dense},
        "penalty": {"schedule": schedule},
    }  # fmt: skip
    settings = config.validate(values)
    assert config.parse(config.to_yaml(settings)) == settings
    assert config.validate(config.to_dict(settings)) == settings
    assert (settings.seed, settings.learning_rate, settings.data.synthetic.shape) == (seed, rate, shape)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().rounds = 3
    with pytest.raises(ValueError, match="frozen"):
        Config().sparsity.final = 0.5


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for bad in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(InputError, match=f"cannot read the configuration '{re.escape(str(bad))}'"):
            config.load(bad)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00rounds")
    with pytest.raises(InputError, match="cannot read the configuration"):
        config.load(tmp_path / "binary.yaml")
    with pytest.raises(
        InputError, match=r"missing.yaml': No such file or directory; name a YAML file \(see configs/\)$"
    ):
        config.load(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match=f"'{re.escape(str(tmp_path))}': Is a directory; name a YAML file"):
        config.load(tmp_path)
    run = tmp_path / "demo"
    run.mkdir()
    (run / "config.yaml").write_text("rounds: 3\n")
    with pytest.raises(
        InputError, match=f"its configuration is {run}/config.yaml, and `feddip-mpi resume {run}` goes on"
    ):
        config.load(run)
    (tmp_path / "good.yaml").write_text("rounds: 3\n", encoding="utf-8")
    assert config.load(tmp_path / "good.yaml", ["seed=9"]) == config.validate({"rounds": 3, "seed": 9})
    (tmp_path / "bad.yaml").write_text("rounds: 0\n", encoding="utf-8")
    with pytest.raises(InputError, match=f"{re.escape(str(tmp_path / 'bad.yaml'))}: 1 problem:"):
        config.load(tmp_path / "bad.yaml")


def test_paths_hold_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load` and `override` return is stored, and read again from other folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    Path("mine.yaml").write_text("data: {name: npz, path: mine.npz}\nupload: {residual_folder: scratch}\n")
    loaded = config.load("mine.yaml")
    assert (loaded.data.path, loaded.upload.residual_folder) == (str(tmp_path / "mine.npz"), str(tmp_path / "scratch"))
    assert config.load("mine.yaml", ["data.path=../other.npz"]).data.path == str(tmp_path.parent / "other.npz")
    assert config.override(loaded, ["data.path=~/x.npz"], config.RESUMABLE_KEYS).data.path == "/home/me/x.npz"
    assert config.load("mine.yaml", ["data.path=none"]).data.path is None
    monkeypatch.chdir("/")
    assert config.parse(config.to_yaml(loaded)) == config.override(loaded, []) == loaded


def test_what_a_function_of_your_own_reads_need_be_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("data: {name: 'mine:load'}\n")
    assert config.load("mine.yaml", ["data.path=s3://bucket"]).data.path == "s3://bucket"
    assert config.load("mine.yaml", ["data.path=mine.yaml"]).data.path == str(tmp_path / "mine.yaml")


def test_the_reference_has_one_row_per_key_with_its_range() -> None:
    rows = config.reference().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(config.keys())
    assert "| `sparsity.final` | 0.9 | number >= 0 and < 1 | " in config.reference()
    assert "| `server_memory` | on | on, off, published | " in config.reference()
    assert "| `penalty.schedule` | steps | steps, published, constant, linear, off | " in config.reference()
    assert "| `checkpoint.minutes` | none | number > 0 | " in config.reference()


def test_a_mapping_may_bring_in_another_one() -> None:
    """YAML's `<<`: what is given beside it wins, wherever the other one stands; a key given twice is still refused."""
    text = "b: &b {x: 0, y: 2}\ndeep: {more: {a: &a {<<: *b, x: 1}}}\nlast: {<<: [*a, *b], z: 3}\n"
    read = config.read_mapping(text, "a file")
    assert read["deep"] == {"more": {"a": {"x": 1, "y": 2}}}
    assert read["last"] == {"x": 1, "y": 2, "z": 3}
    for twice in ("a: {<<: {x: 1}, x: 2, x: 3}", "a: {<<: {x: 1}, <<: {x: 2}}", "a: {<<: {x: 1, x: 2}}"):
        with pytest.raises(InputError, match="given twice"):
            config.read_mapping(twice, "a file")
    bomb = "k0: &k0 {x: 1}\n" + "".join(
        f"k{n}: &k{n} {{<<: [{', '.join([f'*k{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
    )
    assert config.read_mapping(bomb, "a file")["k11"] == {"x": 1}

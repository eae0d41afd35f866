"""config.py and arguments.py: names, defaults, precedence, and a clear message for every error."""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pevlm_sglang.settings import flags as arguments
from pevlm_sglang.settings.config import (
    BASE_BACKENDS,
    MAX_FRAMES,
    PevlmConfig,
    find_file,
    flag,
    load_file,
    preset_names,
    resolve,
)
from pevlm_sglang.settings.flags import ArgumentConflictError, given_flags, requested

PER_REQUEST = ("enabled", "sink_frames", "block_frames", "image_runs")
ALL = (
    *PER_REQUEST,
    *("base_backend", "prefill_kernel", "video_resize", "media_device"),
    *("media_memory_mb", "media_cache_mb"),
    *("media_paths", "max_source_mb", "max_fetch_seconds", "max_redirects"),
    *("max_video_seconds", "max_frame_megapixels", "max_request_megapixels"),
)
LONGEST_MESSAGE = 400


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    return tmp_path / "pevlm.yaml"


def for_request(**override: object) -> PevlmConfig:
    return PevlmConfig().for_request({"pevlm": override})


# --- Names, defaults, values ---------------------------------------------------------------------


def test_defaults() -> None:
    assert PevlmConfig().describe() == {
        "enabled": True,
        "sink_frames": 16,
        "block_frames": 16,
        "image_runs": False,
        "base_backend": "auto",
        "prefill_kernel": "auto",
        "video_resize": "uint8",
        "media_device": "auto",
        "media_memory_mb": 512,
        "media_cache_mb": 4096,
        "media_paths": "",
        "max_source_mb": 4096,
        "max_fetch_seconds": 60,
        "max_redirects": 5,
        "max_video_seconds": 14_400,
        "max_frame_megapixels": 64,
        "max_request_megapixels": 16_384,
    }
    assert PevlmConfig.option_names() == ALL
    assert PevlmConfig.option_names(per_request=True) == PER_REQUEST


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PevlmConfig().sink_frames = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"enabled": 1}, "enabled: expected bool, got 1"),
        ({"enabled": "true"}, "enabled: expected bool, got 'true'"),
        ({"enabled": None}, "enabled: expected bool, got None"),
        ({"image_runs": 0}, "image_runs: expected bool, got 0"),
        ({"sink_frames": True}, "sink_frames: expected int, got True"),
        ({"sink_frames": 16.0}, "sink_frames: expected int, got 16.0"),
        ({"sink_frames": float("nan")}, "sink_frames: expected int, got nan"),
        ({"sink_frames": "16"}, "sink_frames: expected int, got '16'"),
        ({"sink_frames": -1}, "sink_frames: expected >= 0, got -1"),
        ({"block_frames": False}, "block_frames: expected int, got False"),
        ({"block_frames": float("inf")}, "block_frames: expected int, got inf"),
        ({"block_frames": [16]}, r"block_frames: expected int, got \[16\]"),
        ({"block_frames": 0}, "block_frames: expected >= 1, got 0"),
        ({"base_backend": None}, "base_backend: expected str, got None"),
        ({"base_backend": "FA3"}, "base_backend: expected one of auto, fa3, .*, got 'FA3'"),
        ({"base_backend": "pevlm"}, "base_backend: expected one of .*, got 'pevlm'"),
        ({"prefill_kernel": "fa3"}, "prefill_kernel: expected one of auto, base, .*, got 'fa3'"),
        ({"video_resize": "uint9"}, "video_resize: expected one of uint8, float32, got 'uint9'"),
        ({"media_device": "gpu"}, "media_device: expected one of auto, cpu, cuda, got 'gpu'"),
        ({"media_memory_mb": 63}, "media_memory_mb: expected >= 64, got 63"),
    ],
)
def test_bad_values(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PevlmConfig(**values)
    name, rest = message.split(":", 1)
    with pytest.raises(ValueError, match=f"^{flag(f'pevlm_{name}')}:{rest}"):
        resolve(None, values)


@pytest.mark.parametrize("backend", BASE_BACKENDS)
def test_every_base_backend_is_accepted(backend: str) -> None:
    assert PevlmConfig(base_backend=backend).base_backend == backend


def test_extreme_values_that_are_legal() -> None:
    config = PevlmConfig(sink_frames=0, block_frames=MAX_FRAMES)
    assert config.override({}) == config


def test_a_number_beyond_any_context_is_refused() -> None:
    for number in (MAX_FRAMES + 1, 10**4000):
        with pytest.raises(ValueError, match="block_frames: expected <= 1000000, got ") as caught:
            PevlmConfig(block_frames=number)
        assert len(str(caught.value)) < LONGEST_MESSAGE


@pytest.mark.parametrize(
    ("prefix", "typed"), [("pevlm_", "--pevlm-sink-frames"), ("", "--sink-frames")]
)
def test_a_bad_flag_is_named_as_it_was_typed(yaml_file: Path, prefix: str, typed: str) -> None:
    yaml_file.write_text("block_frames: 2\n")
    with pytest.raises(ValueError, match=f"^{typed}: expected >= 0, got -1$"):
        resolve(yaml_file, {"sink_frames": -1}, prefix=prefix)
    with pytest.raises(ValueError, match=r"^unknown option 'sinks'"):
        resolve(yaml_file, {"sinks": 1})
    yaml_file.write_text("sink_frames: -1\n")
    with pytest.raises(ValueError, match="yaml: sink_frames: expected >= 0, got -1"):
        resolve(yaml_file, {"sink_frames": 1})


# --- Precedence: defaults < file < flags < request -----------------------------------------------


def test_precedence(yaml_file: Path) -> None:
    yaml_file.write_text("sink_frames: 1\nblock_frames: 2\nimage_runs: true\n")
    config = resolve(yaml_file, {"block_frames": 3, "image_runs": False})
    assert config == PevlmConfig(sink_frames=1, block_frames=3, image_runs=False)
    override = config.for_request({"pevlm": {"image_runs": True, "sink_frames": 4}})
    assert override == PevlmConfig(sink_frames=4, block_frames=3, image_runs=True)
    assert config == PevlmConfig(sink_frames=1, block_frames=3), "the server's own is untouched"
    assert resolve(None, {}) == PevlmConfig()


@pytest.mark.parametrize("content", ["", "# comment only\n", "---\n", "null\n", "{}\n"])
def test_empty_file_is_the_defaults(yaml_file: Path, content: str) -> None:
    yaml_file.write_text(content)
    assert resolve(str(yaml_file), {}) == PevlmConfig()


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("yes", True), ("on", True), ("no", False), ("OFF", False)]
)
def test_yaml_booleans(yaml_file: Path, text: str, value: bool) -> None:
    yaml_file.write_text(f"enabled: {text}\n")
    assert resolve(yaml_file, {}).enabled is value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- sink_frames\n", "expected a mapping of options, got list"),
        ("16\n", "expected a mapping of options, got int"),
        ("sink_frames: [1\n", "not valid YAML"),
        ("a: b: c\n", "not valid YAML"),
        ("!!python/object:os.system {}\n", "not valid YAML"),
        ("sink_frame: 1\n", f"unknown option 'sink_frame'; valid options: {', '.join(ALL)}"),
        ("1: 2\n", "unknown option 1"),
        ("enabled: 'true'\n", "enabled: expected bool, got 'true'"),
        ("sink_frames: 1e3\n", "sink_frames: expected int, got '1e3'"),
        ("sink_frames: .nan\n", "sink_frames: expected int, got nan"),
        ("sink_frames:\n", "sink_frames: expected int, got None"),
        ("block_frames: 0\n", "block_frames: expected >= 1, got 0"),
    ],
)
def test_bad_files_name_the_file(yaml_file: Path, content: str, message: str) -> None:
    yaml_file.write_text(content)
    with pytest.raises(ValueError, match=rf"pevlm config .*pevlm.yaml: .*{message}"):
        load_file(yaml_file)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.yaml: cannot be read: No such file"):
        resolve(tmp_path / "absent.yaml", {})
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        resolve(tmp_path, {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match=r"binary\.yaml: not valid YAML"):
        resolve(tmp_path / "binary.yaml", {})


# --- Presets -------------------------------------------------------------------------------------


def test_presets_of_the_package_are_those_of_configs() -> None:
    """Also where the package is installed: the folder in it is a link in a checkout alone."""
    configs = Path(__file__).parents[2] / "configs"
    assert set(preset_names()) == {path.stem for path in configs.iterdir()}
    for name in preset_names():
        assert find_file(name).read_text() == (configs / f"{name}.yaml").read_text()


def test_presets() -> None:
    assert {name: resolve(name, {}) for name in preset_names()} == {
        "accuracy": PevlmConfig(sink_frames=16, block_frames=16),
        "low-latency": PevlmConfig(sink_frames=2, block_frames=16),
    }
    assert resolve("low-latency", {"sink_frames": 4}).sink_frames == 4


@pytest.mark.parametrize("name", ["lowlatency", "Accuracy", "accuracy ", "fast", "", ".accuracy"])
def test_an_unknown_preset_names_the_known_ones(name: str) -> None:
    message = f"pevlm config '{name}': expected a preset (accuracy, low-latency) or the path"
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(name, {})


def test_a_path_stays_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the current folder never takes a preset's place, nor a preset a path's."""
    monkeypatch.chdir(tmp_path)
    for name in ("accuracy", "accuracy.yaml"):
        (tmp_path / name).write_text("sink_frames: 7")
    for path in ("./accuracy", "accuracy.yaml", str(tmp_path / "accuracy"), Path("accuracy")):
        assert resolve(path, {}).sink_frames == 7
    assert resolve("accuracy", {}).sink_frames == 16
    with pytest.raises(ValueError, match=r"low-latency\.yaml: cannot be read"):
        resolve("low-latency.yaml", {})


# --- One request ---------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [None, {}, {"other": 1}, {"pevlm": None}, {"pevlm": {}}, 7, "x"])
def test_no_override(params: object) -> None:
    config = PevlmConfig(sink_frames=3)
    assert config.for_request(params) == config


def test_other_custom_params_are_left_alone() -> None:
    params = {"pevlm": {"enabled": False}, "other": {"sink_frames": "x"}}
    assert PevlmConfig().for_request(params).enabled is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"sink": 1}, f"unknown option 'sink'; valid options: {', '.join(PER_REQUEST)}$"),
        ({"base_backend": "fa3"}, "unknown option 'base_backend'; valid options: enabled, "),
        ({"prefill_kernel": "base"}, "unknown option 'prefill_kernel'"),
        ({"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}, "unknown option 'a', 'b', 'c' and 2 more;"),
        ({"pevlm": {"sink_frames": 1}}, "unknown option 'pevlm'"),
        ({"sink_frames": True}, "sink_frames: expected int, got True"),
        ({"sink_frames": float("nan")}, "sink_frames: expected int, got nan"),
        ({"block_frames": 0}, "block_frames: expected >= 1, got 0"),
        ([("sink_frames", 1)], "expected a mapping with any of enabled, .*image_runs, got"),
        ("sink_frames=1", "expected a mapping with any of"),
        (False, "expected a mapping with any of .*, got False"),
    ],
)
def test_bad_overrides(override: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"custom_params\['pevlm'\]: {message}"):
        PevlmConfig().for_request({"pevlm": override})


@pytest.mark.parametrize(
    "override",
    [
        "x" * 10**6,
        ["x"] * 10**5,
        {"x" * 10**6: 1},
        {f"x{i}": 1 for i in range(10**4)},
        {"sink_frames": "9" * 10**6},
        {"sink_frames": [[1] * 10**5]},
        {"block_frames": {"a" * 10**6: 1}},
        {"enabled": 10**4000},
    ],
    ids=lambda value: type(value).__name__,
)
def test_huge_overrides_are_cut_in_the_message(override: object) -> None:
    with pytest.raises(ValueError, match="custom_params") as error:
        PevlmConfig().for_request({"pevlm": override})
    assert len(str(error.value)) < LONGEST_MESSAGE


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=100),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    st.dictionaries(st.sampled_from(PER_REQUEST) | st.text(max_size=9), json_values) | json_values
)
def test_any_json_is_a_configuration_or_a_short_message(override: object) -> None:
    message = ""
    try:
        config = PevlmConfig().for_request({"pevlm": override})
    except ValueError as error:
        message = str(error)
    else:
        values = {} if override is None else override
        assert all(getattr(config, name) is value for name, value in values.items())
    assert not message or message.startswith("custom_params['pevlm']: ")
    assert len(message) < LONGEST_MESSAGE


# --- Cache namespace -----------------------------------------------------------------------------


def test_cache_namespace_is_stable() -> None:
    """KV outlives a restart in a hierarchical cache: the same setting keeps its tag."""
    assert PevlmConfig().cache_namespace == "184071dd2b38038f"


def test_cache_namespace_separates_what_changes_the_mask() -> None:
    settings = [
        for_request(sink_frames=sink, block_frames=block, image_runs=runs)
        for sink in (0, 1, 11, 16)
        for block in (1, 11, 16)
        for runs in (False, True)
    ]
    tags = {config.cache_namespace for config in settings}
    assert len(tags) == len(settings)
    assert None not in tags


def test_cache_namespace_ignores_what_does_not() -> None:
    tag = PevlmConfig().cache_namespace
    assert PevlmConfig(base_backend="triton").cache_namespace == tag


def test_cache_namespace_of_disabled_is_none() -> None:
    assert for_request(enabled=False, sink_frames=3).cache_namespace is None


# --- Command line --------------------------------------------------------------------------------


def parse(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    arguments.add_flags(parser)
    return vars(parser.parse_args(words))


FLAGS = {
    "enabled": (("--pevlm-enabled", "false"), False),
    "sink_frames": (("--pevlm-sink-frames", "0"), 0),
    "block_frames": (("--pevlm-block-frames=7",), 7),
    "image_runs": (("--pevlm-image-runs",), True),
    "base_backend": (("--pevlm-base-backend", "flashinfer"), "flashinfer"),
    "prefill_kernel": (("--pevlm-prefill-kernel", "flash"), "flash"),
    "video_resize": (("--pevlm-video-resize", "float32"), "float32"),
    "media_device": (("--pevlm-media-device", "cpu"), "cpu"),
    "media_memory_mb": (("--pevlm-media-memory-mb", "64"), 64),
    "media_cache_mb": (("--pevlm-media-cache-mb", "0"), 0),
    "media_paths": (("--pevlm-media-paths", "/a:/b"), "/a:/b"),
    "max_source_mb": (("--pevlm-max-source-mb", "7"), 7),
    "max_fetch_seconds": (("--pevlm-max-fetch-seconds", "9"), 9),
    "max_redirects": (("--pevlm-max-redirects", "0"), 0),
    "max_request_megapixels": (("--pevlm-max-request-megapixels", "8"), 8),
    "max_video_seconds": (("--pevlm-max-video-seconds", "60"), 60),
    "max_frame_megapixels": (("--pevlm-max-frame-megapixels", "9"), 9),
    "config": (("--pevlm-config", "a.yaml"), "a.yaml"),
}


def test_every_option_has_a_flag() -> None:
    assert {*PevlmConfig.option_names(), "config"} == set(FLAGS)


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name: str) -> None:
    words, value = FLAGS[name]
    values = parse(*words)
    assert values == {f"pevlm_{name}": value}
    assert given_flags(values) == {name: value}
    assert values == {}, "given_flags takes them out"


def test_no_flag_leaves_no_trace() -> None:
    assert parse() == {}
    values = {"model_path": "m"}
    assert given_flags(values) == {}
    assert values == {"model_path": "m"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--pevlm-enabled", "yes"), "--pevlm-enabled: expected true or false, got 'yes'"),
        (("--pevlm-enabled",), "--pevlm-enabled: expected one argument"),
        (("--pevlm-sink-frames", "nan"), "--pevlm-sink-frames: invalid int value: 'nan'"),
        (("--pevlm-block-frames", "1.5"), "--pevlm-block-frames: invalid int value: '1.5'"),
        (("--pevlm-image-runs", "true"), "unrecognized arguments: true"),
        (("--pevlm-base-backend", "pevlm"), "--pevlm-base-backend: invalid choice: 'pevlm'"),
    ],
)
def test_bad_flags(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert message in capsys.readouterr().err


def test_help_shows_every_default() -> None:
    parser = argparse.ArgumentParser(
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=100, width=500)
    )
    arguments.add_flags(parser)
    lines = [line.strip() for line in parser.format_help().splitlines()]
    for name, value in PevlmConfig().describe().items():
        start = f"--pevlm-{name.replace('_', '-')} "
        described = next(line for line in lines if line.startswith(start))
        assert described.endswith(f"(default: {str(value).lower()})")


# --- What server arguments ask for ---------------------------------------------------------------


def server_args(**fields: str | None) -> SimpleNamespace:
    return SimpleNamespace(**(dict.fromkeys(arguments.BACKEND_FIELDS) | fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_backend": "pevlm"},
        {"prefill_attention_backend": "pevlm"},
        {"prefill_attention_backend": "pevlm", "decode_attention_backend": "fa3"},
        {"attention_backend": "pevlm", "decode_attention_backend": "pevlm"},
    ],
)
def test_requested(fields: dict, yaml_file: Path) -> None:
    yaml_file.write_text("sink_frames: 1\nblock_frames: 2\n")
    flags = {"config": str(yaml_file), "block_frames": 3}
    found = requested(server_args(**fields), flags)
    assert found == PevlmConfig(sink_frames=1, block_frames=3)
    assert flags["config"] == str(yaml_file), "the caller's flags are untouched"


@pytest.mark.parametrize("backend", [None, "fa3"])
def test_not_requested(backend: str | None) -> None:
    assert requested(server_args(attention_backend=backend), {}) is None


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({}, {"sink_frames": 1}, "--pevlm-sink-frames: expected .* got no --attention-backend"),
        (
            {"attention_backend": "fa3"},
            {"config": "x", "image_runs": True},
            "--pevlm-config, --pevlm-image-runs: expected --attention-backend pevlm .* got fa3",
        ),
        ({"decode_attention_backend": "pevlm"}, {}, "PEVLM changes prefill alone"),
    ],
)
def test_conflicts(fields: dict, flags: dict, message: str) -> None:
    with pytest.raises(ArgumentConflictError, match=message):
        requested(server_args(**fields), flags)


def test_bad_flag_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--pevlm-block-frames: expected >= 1, got 0"):
        requested(server_args(attention_backend="pevlm"), {"block_frames": 0})


@pytest.mark.parametrize(("base", "written"), [("auto", None), ("triton", "triton")])
def test_base_backend_replaces_the_name(base: str, written: str | None) -> None:
    args = server_args(attention_backend="fa3", prefill_attention_backend="pevlm")
    arguments.write_base_backend(args, PevlmConfig(base_backend=base))
    assert vars(args) == {
        "attention_backend": "fa3",
        "prefill_attention_backend": written,
        "decode_attention_backend": None,
    }
